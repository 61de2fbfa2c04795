"""``posttrain doctor``: what this machine offers, and why something is missing."""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable

from posttrain.cli.output import print_rows
from posttrain.run_record import hardware, version_of, versions

Finding = tuple[str, str, str]


def doctor() -> None:
    """Print versions, devices, kernel backends and optional packages; asks each one instead of guessing."""
    found = hardware()
    print_rows("versions", ("package", "version"), [(name, one or "not installed") for name, one in versions().items()])
    print()
    gib = 2**30
    devices = [
        (one["name"], f"{one['memory_bytes'] / gib:.1f} GiB" if "memory_bytes" in one else "")
        for one in found["devices"]
    ]
    cpu = (f"CPU, {found['cores']} cores, {found['machine']}", f"{found['memory_bytes'] / gib:.1f} GiB")
    print_rows("devices", ("device", "memory"), [cpu, *devices])
    if not devices:
        print("  no accelerator: training runs on the CPU, with trainer.use_cpu=true and trainer.bf16=false")
    print()
    print_rows("kernel backends", ("backend", "usable", "detail"), _backends())
    print()
    print_rows("optional packages", ("package", "usable", "detail"), [check() for check in _OPTIONAL])


def _backends() -> list[Finding]:
    """Each backend on a tiny problem, against the dense one."""
    import torch

    from posttrain.kernels import LMHead, vocab_statistics
    from posttrain.kernels.backends import BACKENDS

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator) for rows in (5, 23))
    targets = torch.arange(5)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    def logp(backend: str) -> torch.Tensor:
        head = LMHead(weight.to(device))
        found = vocab_statistics(hidden.to(device), head, targets.to(device), ("logp",), backend=backend)["logp"]
        assert found is not None
        return found

    truth = logp("dense")
    findings: list[Finding] = []
    for name in BACKENDS:
        try:
            error = (logp(name) - truth).abs().max().item()
            findings.append((name, "yes" if error < 1e-5 else "NO", f"on {device}, off the dense one by {error:.1e}"))
        except Exception as problem:
            findings.append((name, "no", _one_line(problem)))
    return findings


def _optional(package: str, module: str, extra: str, needs: Callable[[], str | None]) -> Callable[[], Finding]:
    def check() -> Finding:
        if importlib.util.find_spec(module) is None:
            return package, "no", f"not installed{extra}; {_or_fine(needs())}"
        obstacle = needs()
        if obstacle:
            return package, "no", obstacle
        try:
            importlib.import_module(module)
        except Exception as problem:
            return package, "no", f"cannot be imported: {_one_line(problem)}"
        return package, "yes", version_of(package) or ""

    return check


def _or_fine(obstacle: str | None) -> str:
    return obstacle or "this machine could use it"


def _needs_nothing() -> str | None:
    return None


def _needs_cuda() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    built = "without CUDA" if torch.version.cuda is None and torch.version.hip is None else "for CUDA"
    return f"needs a CUDA device, and torch (built {built}) sees none"


def _needs_triton_device() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    missing = _needs_cuda()
    return f"{missing}; TRITON_INTERPRET=1 runs kernels slowly without one" if missing else None


def _needs_compiler_on_cpu() -> str | None:
    if _needs_cuda() is None or shutil.which("c++") or shutil.which("g++"):
        return None
    return "on a CPU it builds an operation on first use, and no C++ compiler was found"


_OPTIONAL = (
    _optional("deepspeed", "deepspeed", ": pip install 'posttrain[deepspeed]'", _needs_compiler_on_cpu),
    _optional("flash-attn", "flash_attn", ": pip install 'posttrain[flash]'", _needs_cuda),
    _optional("triton", "triton", " (comes with torch for CUDA)", _needs_triton_device),
    _optional("bitsandbytes", "bitsandbytes", ", for quantised bases", _needs_nothing),
    _optional("vllm", "vllm", "", _needs_cuda),
    _optional("reasoning-gym", "reasoning_gym", ": pip install 'posttrain[evaluation]'", _needs_nothing),
    _optional("lm-eval", "lm_eval", ": pip install 'posttrain[evaluation]'", _needs_nothing),
    _optional("math-verify", "math_verify", ": pip install 'posttrain[evaluation]'", _needs_nothing),
)


def _one_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:160]
