"""How it is measured: gradients checked first, time in rounds A B A B, memory by the allocator's own events."""

import gc
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from launch.benchmark.cases import Case, dense_values
from launch.benchmark.competitors import Competitor, Run
from launch.benchmark.problems import Problem

# A gradient is wrong where its error is larger than this and than dense torch's in the same dtype, three times over.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Errors:
    """Relative to float64: of the loss, and the larger one of the gradients' in the 2-norm."""

    loss: float
    gradient: float


@dataclass
class Times:
    """Seconds of each round."""

    total: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """MiB at the peak: beyond the inputs, and beyond inputs and gradients."""

    total: float
    extra: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients(loss: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, problem.leaves)


def truth(case: Case, problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients in float64, of logits in full."""
    exact = problem.double()
    loss = case.loss(dense_values(exact, case), exact)
    return loss.detach(), gradients(loss, exact)


def errors(run: Run, problem: Problem, exact: tuple[Tensor, tuple[Tensor, ...]]) -> Errors:
    loss = run(problem)
    found = gradients(loss, problem)
    exact_loss, exact_gradients = exact

    def relative(value: Tensor, true: Tensor) -> float:
        error = float((value.double() - true).norm() / true.norm())
        return error if error == error else float("inf")

    worst = max(relative(value, true) for value, true in zip(found, exact_gradients, strict=True))
    return Errors(relative(loss.detach(), exact_loss), worst)


def is_right(found: Errors, dense: Errors, dtype: torch.dtype) -> bool:
    """Both loss and gradients are about as near to float64 as dense torch's in the same dtype."""
    slack = TOLERANCE[dtype]
    return found.loss <= 3 * dense.loss + slack and found.gradient <= 3 * dense.gradient + slack


def check(case: Case, entries: Sequence[Competitor], problem: Problem) -> tuple[dict[str, Errors], dict[str, str]]:
    """Errors on a reduced problem, and by name why somebody is not to be timed."""
    exact = truth(case, problem)
    dense = errors(lambda p: case.loss(dense_values(p, case), p), problem, exact)
    found: dict[str, Errors] = {}
    refused: dict[str, str] = {}
    for entry in entries:
        if entry.run is None:
            refused[entry.name] = entry.missing
            continue
        try:
            found[entry.name] = errors(entry.run, problem, exact)
        except Exception as error:  # of any kind, by other people's code: it becomes the row
            refused[entry.name] = failure(error)
            continue
        if not is_right(found[entry.name], dense, problem.hidden.dtype):
            refused[entry.name] = "wrong gradient"
    return found, refused


def failure(error: Exception) -> str:
    """What a row says of an exception, without the places of this machine."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"(?<![\w.])/[\w./-]+", "...", lines[0] if lines else "")
    return f"failed: {type(error).__name__}: {text}"[:160]


def timed(run: Run, problem: Problem) -> tuple[float, float]:
    """Seconds of forward and backward, and of the backward alone."""
    device = problem.hidden.device
    synchronize(device)
    start = time.perf_counter()
    loss = run(problem)
    synchronize(device)
    middle = time.perf_counter()
    gradients(loss, problem)
    synchronize(device)
    end = time.perf_counter()
    return end - start, end - middle


def rounds(entries: Mapping[str, tuple[Run, Problem]], count: int) -> dict[str, Times]:
    """Everybody once, in order, `count` times over."""
    times = {name: Times() for name in entries}
    for _ in range(count):
        for name, (run, problem) in entries.items():
            gc.collect()
            total, backward = timed(run, problem)
            times[name].total.append(total)
            times[name].backward.append(backward)
    return times


def matmul_rate(problem: Problem, count: int = 2) -> float:
    """Operations per second of the library's product hidden weightᵀ, the median of `count` runs after one more."""
    hidden, weight = (leaf.detach() for leaf in problem.leaves)
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    seconds = []
    for _ in range(count + 1):
        synchronize(hidden.device)
        start = time.perf_counter()
        torch.mm(hidden, weight.t(), out=out)
        synchronize(hidden.device)
        seconds.append(time.perf_counter() - start)
    return 2 * hidden.numel() * weight.shape[0] / statistics.median(seconds[1:])


def memory(run: Run, problem: Problem) -> Memory:
    """One forward and backward, by every allocation and release that torch's allocators report.

    Unlike the resident size of a process this repeats exactly, sees what compiled code and libraries take from the
    allocator, and knows which storage ends up as a gradient: such a storage is not counted at any time, so nobody is
    charged for writing the gradient early or credited for writing it late.
    """
    device = problem.hidden.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = run(problem)
        found = gradients(loss, problem)
        synchronize(device)
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    assert results is not None
    kept = {gradient.untyped_storage().data_ptr() for gradient in found}
    total, extra = replay(_allocations(results.experimental_event_tree(), device), kept)
    if device.type == "cuda":
        total = torch.cuda.max_memory_allocated(device) - before
    return Memory(total / MEBIBYTE, extra / MEBIBYTE)


def _allocations(roots: Sequence[object], device: torch.device) -> list[tuple[int, int]]:
    """(address, bytes) in order of time; a release has a negative size."""
    found: list[tuple[int, int, int]] = []
    pending: list[object] = list(roots)
    while pending:
        event: object = pending.pop()
        pending.extend(event.children)  # type: ignore[attr-defined]
        typed, fields = event.typed  # type: ignore[attr-defined]
        if typed == _EventType.Allocation and fields.device.type == device.type:
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))  # type: ignore[attr-defined]
    # events of one time stamp stay in no known order, so releases come first
    return [(address, size) for _, address, size in sorted(found, key=lambda entry: (entry[0], entry[2]))]


def replay(events: Sequence[tuple[int, int]], kept: set[int]) -> tuple[int, int]:
    """Peak bytes of everything, and of everything but the last allocations at the addresses in `kept`."""
    last = {address: index for index, (address, size) in enumerate(events) if size > 0}
    gradient = {last[address] for address in kept if address in last}
    live: dict[int, tuple[int, bool]] = {}
    total = extra = peak = peak_extra = 0
    for index, (address, size) in enumerate(events):
        if size > 0:
            is_extra = index not in gradient
            live[address] = (size, is_extra)
        elif address in live:
            size, is_extra = live.pop(address)
            size = -size
        else:
            continue
        total += size
        extra += size if is_extra else 0
        peak, peak_extra = max(peak, total), max(peak_extra, extra)
    return peak, peak_extra
