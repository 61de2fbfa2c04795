"""Whatever is asked for together, with gradients of whatever part of it, equals dense in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.kernels import DETACHED, STATISTICS, vocab_loss
from tests.kernels.problems import gradients, problem, tiles

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
HEADS = {
    "scale": st.sampled_from([1.0, -0.7]),
    "softcap": st.sampled_from([None, 2.0]),
    "bias": st.booleans(),
    "rank": st.integers(0, 2),
    "temperature": st.sampled_from([1.0, 0.4]),
    "seed": st.integers(0, 99),
}
NAMES = st.lists(st.sampled_from(STATISTICS), unique=True)


def total(statistics, names):
    """A nonlinear function of each token's statistics of these names, summed over them."""
    rows = [statistics[name].reshape(len(statistics[name]), -1) for name in names]
    return sum((torch.arange(1, row.shape[1] + 1) * row).sum(1).sin() * (i + 1) for i, row in enumerate(rows))


@given(
    tokens=st.integers(1, 6),
    vocab=st.integers(2, 9),
    tile=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    wanted=NAMES.filter(bool),
    used=NAMES,
    budget=st.sampled_from([None, 0, 300, "auto"]),
    k=st.integers(1, 2),
    jsd_beta=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    head=st.fixed_dictionaries(HEADS),
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_any_subset_equals_dense(tokens, vocab, tile, wanted, used, budget, k, jsd_beta, head):
    case = problem(tokens, vocab, 3, size=2.0, **head)
    options = {**case.options, "k": k, "jsd_beta": jsd_beta}
    differentiable = [name for name in wanted if name not in DETACHED]
    used = [name for name in differentiable if name in used] or differentiable
    truth = case.statistics(*wanted, **options, backend="dense")
    expected = gradients(total(truth, used).sum(), case.leaves) if used else ()
    with tiles(*tile):
        found = case.statistics(*wanted, **options, budget=budget)
        assert list(found.as_dict()) == [name for name in STATISTICS if name in wanted]
        arguments = (case.hidden, case.head, case.targets, wanted, lambda s: total(s, used or wanted))
        loss, values = vocab_loss(*arguments, torch.ones(tokens), **options)
        results = [gradients(total(found, used).sum(), case.leaves), gradients(loss, case.leaves)] if used else []
    for name in wanted:
        for value in (found[name], values[name]):
            torch.testing.assert_close(value, truth[name], **TIGHT, msg=lambda m, name=name: f"{name}: {m}")
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.mark.parametrize("name", sorted(DETACHED))
def test_a_subset_without_gradient_is_not_tied(name):
    assert not problem().statistics(name)[name].requires_grad
