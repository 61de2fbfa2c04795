"""Work that is left out exactly: tiles kept from the forward, and tokens whose incoming gradient is zero."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from posttrain.kernels import STATISTICS, budget, vocab_loss
from posttrain.kernels.projection import Projection
from tests.kernels.problems import gradients, mixed_loss, problem, tiles

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
TOKENS, VOCAB, ROWS, COLUMNS = 7, 13, 3, 4


@pytest.fixture
def formed(monkeypatch):
    """The (tokens, vocabulary entries) of every tile of logits that is computed."""
    shapes = []
    original = Projection.logits

    def logits(self, rows, columns, out=None):
        shapes.append((rows.hidden_ND.shape[0], columns.weight_VD.shape[0]))
        return original(self, rows, columns, out)

    monkeypatch.setattr(Projection, "logits", logits)
    return shapes


def small(**options):
    return problem(TOKENS, VOCAB, 4, bias=True, rank=2, softcap=30.0, **options)


def entries(shapes):
    return sum(rows * columns for rows, columns in shapes)


@pytest.mark.parametrize("names", [("logp",), STATISTICS], ids=["logp", "all"])
@pytest.mark.parametrize("size", [0, 2 * TOKENS * COLUMNS * 8, 5 * TOKENS * COLUMNS * 8, 10**9, "auto"])
def test_kept_tiles_change_nothing(names, size):
    case = small()
    with tiles(ROWS, COLUMNS):
        expected = case.statistics(*names)
        found = case.statistics(*names, budget=size)
        pairs = zip(found.as_dict().values(), expected.as_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        losses = [mixed_loss(values) for values in (found, expected)]
        first, again, plain = (gradients(loss, case.leaves) for loss in (losses[0], losses[0], losses[1]))
    assert all(torch.equal(one, other) for one, other in zip(first, plain, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True)), "kept tiles are not used up"


@pytest.mark.parametrize(("slices_kept", "backward"), [(0, VOCAB), (1, VOCAB - COLUMNS), (4, 0)])
def test_a_budget_saves_the_tiles_that_fit(formed, slices_kept, backward):
    case = small()
    with tiles(ROWS, COLUMNS):
        values = case.statistics("logp", budget=slices_kept * TOKENS * COLUMNS * 8)
        assert entries(formed) == TOKENS * VOCAB
        formed.clear()
        values["logp"].sum().backward()
    assert entries(formed) == TOKENS * backward


def test_nothing_is_kept_without_a_backward(formed):
    case = small()
    with torch.no_grad():
        assert not case.statistics("logp", budget="auto")["logp"].requires_grad
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    assert case.statistics("logp", budget="auto")["logp"].grad_fn is None


def test_a_budget_under_activation_checkpointing():
    case = small()

    def run(hidden):
        return case.with_leaves([hidden, *case.leaves[1:]]).statistics("logp", "entropy", budget="auto")["entropy"]

    expected = gradients(run(case.hidden).sum(), case.leaves)
    found = gradients(checkpoint(run, case.hidden, use_reentrant=False).sum(), case.leaves)
    torch.testing.assert_close(found, expected, **TIGHT)


def test_auto_depends_on_shapes_and_total_memory_alone(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(budget, "total_memory", lambda device: 1600)
    shape = {"vocab": 5, "models": 1, "device": device}
    assert budget.budget_bytes("auto", tokens=2, **shape) == 40
    assert budget.budget_bytes("auto", tokens=20, **shape) == 100, "a sixteenth of it all"
    assert budget.budget_bytes("auto", tokens=2, **{**shape, "models": 2}) == 80
    assert budget.budget_bytes(None, tokens=2, **shape) is None and budget.budget_bytes(7, tokens=2, **shape) == 7


@pytest.mark.parametrize("size", [None, 2 * TOKENS * COLUMNS * 8])
@pytest.mark.parametrize("live", [(0, 1, 2, 3, 4, 5, 6), (1,), (0, 4, 6), ()], ids=len)
def test_tokens_without_incoming_gradient_are_left_out(formed, live, size):
    case = small()
    mask = torch.zeros(TOKENS, dtype=torch.float64)
    mask[list(live)] = 1.0
    names = ("logp", "entropy", "ids_logp", "topk_logp", "reverse_kl", "max_logit")

    def loss(values):
        return (mask * (values["logp"] + values["entropy"].square() + values["reverse_kl"])).sum() + (
            mask[:, None] * (values["ids_logp"] + values["topk_logp"])
        ).sum()

    expected = gradients(loss(case.statistics(*names, backend="dense")), case.leaves)
    with tiles(ROWS, COLUMNS):
        values = case.statistics(*names, budget=size)
        formed.clear()
        found = gradients(loss(values), case.leaves)
    torch.testing.assert_close(found, expected, **TIGHT)
    kept = 0 if size is None else COLUMNS
    assert entries(formed) == 2 * len(live) * (VOCAB - kept), "student and teacher, live tokens alone"


def test_a_token_with_a_nan_gradient_is_alive():
    case = small()
    weight = torch.tensor([0.0, torch.nan, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = gradients((weight * case.statistics("logp")["logp"]).sum(), case.leaves)
    assert found[0][1].isnan().all() and (found[0][2] == 0).all() and found[1].isnan().all()


@pytest.mark.parametrize("live", [(0, 1, 2, 3, 4, 5, 6), (1,), (0, 4, 6), ()], ids=len)
def test_one_pass_leaves_them_out_too(live, monkeypatch):
    case = small()
    mask = torch.zeros(TOKENS, dtype=torch.float64)
    mask[list(live)] = 1.0
    rows = []
    from posttrain.kernels.gradients import Gradients

    original = Gradients.add
    monkeypatch.setattr(
        Gradients, "add", lambda self, dz, *rest: (rows.append(dz.numel()), original(self, dz, *rest))[1]
    )

    def phi(values):
        return values.logp.square() + values.entropy + values.mean_logit + values.reverse_kl

    names = ("logp", "entropy", "mean_logit", "reverse_kl")
    dense = case.statistics(*names, backend="dense")
    expected = gradients((mask * phi(dense)).sum(), case.leaves)
    with tiles(ROWS, COLUMNS):
        loss, _ = vocab_loss(case.hidden, case.head, case.targets, names, phi, mask, **case.options)
        found = gradients(loss, case.leaves)
    torch.testing.assert_close(found, expected, **TIGHT)
    assert sum(rows) == len(live) * VOCAB
