"""What is measured: the smoke, CPU and GPU sets, each a list of groups whose entries share their rounds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from launch.benchmark.problems import Shape

LIVE_SHARE = 0.7
LIVE_SHARES = (1.0, 0.5, 0.25, 0.1)
FROM_FILE = -1.0

QWEN = Shape("Qwen2.5-0.5B", 8192, 896, 151936)
LLAMA = Shape("Llama-3-8B", 8192, 4096, 128256)
GEMMA = Shape("Gemma-2-2B", 8192, 2304, 256000)
SMALL = Shape("small", 256, 128, 8192)

RECOMPUTING = ("posttrain budget",)
BUDGET_0 = ("posttrain budget 0",)
GROWING = ("dense", "trl", "posttrain one pass", "posttrain budget")
# These differ between losses of logp in their last step alone, so a processor measures them on some losses only.
WITHOUT_COMPILE = ("dense", "linear", "trl", "posttrain")
FEW = ("dense", "trl", "posttrain")


@dataclass(frozen=True)
class Entry:
    """One case on one problem.

    Args:
        case: its name.
        only: beginnings of the names of those who take part; everybody where empty.
        live_share: of the targets, those whose probability lies above the threshold; `FROM_FILE` for given
            probabilities.
    """

    case: str
    only: tuple[str, ...] = ()
    live_share: float = LIVE_SHARE


@dataclass(frozen=True)
class Group:
    """Entries measured side by side, round by round, with one head."""

    name: str
    shape: Shape
    dtype: torch.dtype
    entries: tuple[Entry, ...]
    rounds: int = 3

    @property
    def key(self) -> str:
        """Tells the groups of a run apart."""
        return f"{self.name} {self.shape.name} {self.shape.tokens}x{self.shape.width}x{self.shape.vocab}"


def _cases(name: str, shape: Shape, dtype: torch.dtype, rounds: int) -> Iterator[Group]:
    """Those that the targets need first; what is held against each other stands in one group."""
    gpu = name == "gpu"
    for case in ("nll", "dpo"):
        entry = Entry(case, WITHOUT_COMPILE if name == "smoke" and case == "dpo" else ())
        yield Group(case, shape, dtype, (entry,), rounds)
    live = tuple(Entry("threshold_0.2", BUDGET_0, share) for share in LIVE_SHARES)
    yield Group("live_rows", shape, dtype, live, rounds)
    compiled = () if name != "smoke" else WITHOUT_COMPILE
    both = (Entry("logp", () if gpu else FEW), Entry("statistics", compiled))
    yield Group("logp_statistics", shape, dtype, both, rounds)
    yield Group("kl", shape, dtype, (Entry("kl", compiled), Entry("two_passes", RECOMPUTING)), rounds)
    for case in ("threshold_0.2", "probability_10"):
        yield Group(case, shape, dtype, (Entry(case, () if gpu else FEW),), rounds)


def _growth(base: Shape, dtype: torch.dtype, tokens: tuple[int, ...], vocab: tuple[int, ...]) -> Iterator[Group]:
    entries = (Entry("nll", GROWING),)
    for size in tokens:
        yield Group("growth_tokens", replace(base, name="growth", tokens=size), dtype, entries)
    for size in vocab:
        yield Group("growth_vocabulary", replace(base, name="growth", vocab=size), dtype, entries)


def _real(shape: Shape, dtype: torch.dtype) -> Group:
    entries = tuple(Entry("threshold_0.2", BUDGET_0, share) for share in (1.0, FROM_FILE))
    return Group("live_rows_real", shape, dtype, entries, 5)


def groups(name: str, *, with_file: bool = False) -> list[Group]:
    """The groups of a set, those that the targets need first.

    Raises:
        ValueError: there is no such set.
    """
    if name == "smoke":
        dtype, shapes, rounds = torch.float32, [SMALL], 3
        growth = list(_growth(SMALL, dtype, (64, 128, 256), (2048, 4096, 8192)))
    elif name == "cpu":
        dtype, shapes, rounds = torch.float32, [replace(QWEN, tokens=1024)], 3
        base = Shape("growth", 256, 256, 32768)
        vocabularies = (16384, 32768, 65536, 131072, 262144)
        growth = list(_growth(base, dtype, (128, 256, 512, 1024, 2048), vocabularies))
    elif name == "gpu":
        dtype, shapes, rounds = torch.bfloat16, [QWEN, LLAMA, GEMMA], 15
        tokens = tuple(1024 * 2**i for i in range(7))
        vocabularies = tuple(16384 * 2**i for i in range(5))
        growth = list(_growth(replace(QWEN, vocab=131072), dtype, tokens, vocabularies))
    else:
        raise ValueError(f"unknown set {name!r}; known are smoke, cpu and gpu")
    found: list[Group] = []
    for shape in shapes:
        found += _cases(name, shape, dtype, rounds)
        found += [_real(shape, dtype)] if with_file else []
    return found + growth
