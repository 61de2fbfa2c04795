"""Two real processes on a CPU: every engine, every kind of head, against dense gradients of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("untied", "tied", "lora", "copy")
# float32; the truth is dense, on the whole batch
TOLERANCE = 1e-5


def launch(directory: Path, engines: str) -> dict[str, object]:
    """Runs engine_step.py on two processes and reads what it wrote; judged by that file, not by the exit."""
    out = directory / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(directory / "extensions"),
    }
    script = [str(ROOT / "tests/modeling/engine_step.py"), str(out), engines]
    result = subprocess.run(
        [*command, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert out.exists(), result.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def torch_engines(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("torch"), "ddp,fsdp2,fsdp2_accelerate")


@pytest.fixture(scope="module")
def deepspeed_engine(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    return launch(tmp_path_factory.mktemp("deepspeed"), "zero3")


def assert_equals_one_process(found, engine, kind):
    assert len(found["ranks"]) == 2
    for rank in found["ranks"]:
        result = rank[engine][kind]
        assert max(result["gradients"]) < TOLERANCE
        assert result["check"] < 1e-4
        assert result["restored"] and result["training"]
        assert result["head"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2_accelerate"])
def test_torch_engines_give_the_gradients_of_one_process(torch_engines, engine, kind):
    assert_equals_one_process(torch_engines, engine, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_zero3_gives_the_gradients_of_one_process(deepspeed_engine, kind):
    assert_equals_one_process(deepspeed_engine, "zero3", kind)


def test_a_shard_outside_every_unit_averages_its_gradient(torch_engines):
    assert torch_engines["shard"] < 1e-6
