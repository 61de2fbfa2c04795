"""The numerical contract over pairs of dtypes, shapes, logits, heads, statistics and ways of computing them.

The full product is launch/kernel_contract.sh; here every two levels meet once. Many tokens and the large vocabulary
meet in the two cases of `LARGE` only, at width 64: one more in fp16, say, takes half a minute on one core.
"""

from dataclasses import asdict

import pytest

from tests.kernels.contract import FACTORS, Case, measure
from tests.kernels.pairwise import all_pairs, pairs, pairwise

BACKENDS = ("streamed",)
LARGE = [
    Case("bf16", 4097, 64, 50257, "ordinary", "plain", "logp", "statistics"),
    Case("float32", 4097, 64, 50257, "far", "plain", "logp", "loss"),
]


def allowed(combination):
    large = combination.get("tokens") == 4097 and combination.get("vocab") == 50257
    return not large or combination.get("width", 64) == 64


def cost(combination):
    """In millions of numbers, fp16's products being slow on a CPU and a group having several statistics."""
    tokens, vocab, width = (combination[name] for name in ("tokens", "vocab", "width"))
    size = (tokens * vocab + tokens * vocab * width / 500 + vocab * width) / 1e6
    return 30 + size * (4 if combination["dtype"] == "fp16" else 1) * (1 if combination["statistics"] == "logp" else 4)


CASES = [Case(**c) for c in pairwise(FACTORS, allowed=allowed, cost=cost, given=[asdict(case) for case in LARGE])]


def test_every_pair_of_levels_is_covered():
    covered = set().union(*(pairs(asdict(case)) for case in CASES))
    assert covered == all_pairs(FACTORS, allowed)
    assert all(allowed(asdict(case)) for case in CASES)
    missing = all_pairs(FACTORS, lambda part: True) - covered
    assert missing == set(), "what is not allowed forbids no pair, only threes"
    assert len(set(CASES)) == len(CASES) <= 60


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_further_from_the_truth_than_dense(case, backend):
    measured = measure(case, backend)
    assert [m for m in measured if not m.ratio <= 1] == []
