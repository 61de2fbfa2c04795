"""Every Triton kernel compiles for Hopper down to machine code, which the interpreter never tries."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

backends = pytest.importorskip("triton.backends", reason="triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if "nvidia" not in backends.backends:
        pytest.skip("this triton cannot compile for NVIDIA GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.compile_kernels"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_every_kernel_becomes_machine_code(compiled: list[dict[str, Any]]) -> None:
    names = {one["kernel"] for one in compiled}
    tiles = {"fold_rows", "mixture_rows", "gradient_rows", "add_at_ids"}
    assert names == tiles | {"fold_products", "join_splits", "gradient_products"}
    assert all(one["target"].startswith("sm_90") and one["machine code"] > 0 for one in compiled)


def test_half_operands_meet_on_tensor_cores_and_float32_stays_exact(compiled: list[dict[str, Any]]) -> None:
    products = [one for one in compiled if one["kernel"] in ("fold_products", "gradient_products")]
    assert len(products) == 8
    for one in products:
        assert one["tensor cores"] == (one["case"] != "float32"), one
        assert not one["tf32"], one


def test_rows_are_read_in_wide_loads_and_without_exchanges_on_the_way(compiled: list[dict[str, Any]]) -> None:
    rows = [one for one in compiled if one["kernel"] in ("fold_rows", "gradient_rows", "mixture_rows")]
    assert rows and all(one["wide loads"] for one in rows)
    (logp,) = (one for one in rows if one["kernel"] == "fold_rows" and one["case"] == "logp")
    # One butterfly within a warp and one across warps, for the maximum and for the sum, when the row has ended.
    assert logp["exchanges"] <= 16
