"""Two real processes on a CPU: every engine, every kind of head, against dense gradients of one process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH_ENGINES = ("ddp", "fsdp2", "fsdp2_accelerate")
KINDS = ("untied", "tied", "lora", "copy")
# float32; the truth is dense, on the whole batch
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What engine_step.py wrote, engine by engine: an engine may die at exit after its work is done."""
    directory = tmp_path_factory.mktemp("engines")
    out = directory / "result.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(directory / "extensions"),
    }
    engines = [*TORCH_ENGINES, *(["zero3"] if find_spec("deepspeed") else [])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "tests/modeling/engine_step.py"), str(out), ",".join(engines)]
    ended = subprocess.run(
        [*command, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    results = json.loads(out.read_text()) if out.exists() else {}
    assert set(engines) <= set(results), ended.stderr[-6000:]
    return results


def assert_equals_one_process(ranks, kind):
    assert len(ranks) == 2
    for rank in ranks:
        result = rank[kind]
        assert max(result["gradients"]) < TOLERANCE
        assert result["check"] < 1e-4
        assert result["restored"] and result["training"]
        assert result["head"] == 0
        one_tile, many_tiles = result["gathers"]
        # ZeRO-3 bundles its gathers once it has seen the order of the modules, so that later there are fewer
        assert many_tiles <= one_tile, "gathering has nothing to do with tiles"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", TORCH_ENGINES)
def test_torch_engines_give_the_gradients_of_one_process(found, engine, kind):
    assert_equals_one_process(found[engine], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_zero3_gives_the_gradients_of_one_process(found, kind):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    assert_equals_one_process(found["zero3"], kind)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_the_gathers_were_seen(found, engine):
    """Else the comparison above would be one of zeros."""
    assert all(rank["untied"]["gathers"][0] > 0 for rank in found.get(engine, []))


def test_a_shard_outside_every_unit_averages_its_gradient(found):
    assert found["shard"] < 1e-6
