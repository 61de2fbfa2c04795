"""The pass over the sample against dense log-probabilities and the true gradient of the head."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from posttrain.data.collation import CompletionCollator
from posttrain.diagnosis.sample import TOLERANCES, read_sample
from posttrain.diagnosis.tolerance import head_bounds
from posttrain.kernels.tolerance import keep_rows
from posttrain.modeling import attach
from posttrain.prepared import PreparedRows
from tests import tiny

ROWS = [
    {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
    {"input_ids": [7, 8], "labels": [-100, 8]},
    {"input_ids": [9, 10, 11, 12, 13], "labels": [9, 10, 11, 12, 13]},
]


@pytest.fixture
def model():
    model = tiny.model(dtype=torch.float64).eval()
    # some tokens nearly certain, so that the tolerances find something
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def prepared(model):
    attach(model)
    collator = CompletionCollator(pad_token_id=0)
    return PreparedRows(model, Dataset.from_list(ROWS), collator, SimpleNamespace(), torch.device("cpu"))


def states(model, rows):
    """Hidden states, targets of the trained tokens, one row at a time."""
    hidden, targets = [], []
    for row in rows:
        with torch.no_grad():
            found = model.model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
        for place in range(1, len(row["labels"])):
            if row["labels"][place] != -100:
                hidden.append(found[place - 1])
                targets.append(row["labels"][place])
    return torch.stack(hidden), torch.tensor(targets)


def test_log_probabilities_and_lengths_are_those_of_training(model):
    sample = read_sample(prepared(model), batch_size=2, progress=False)
    hidden, targets = states(model, ROWS)
    logp = (hidden @ model.lm_head.weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0].detach()
    torch.testing.assert_close(sample.logp, logp, rtol=1e-10, atol=1e-12)
    assert sample.lengths.tolist() == [2, 1, 4]
    assert (sample.batches, sample.padded_tokens) == (2, 2 * 4 + 5)
    assert sample.backbone_seconds > 0
    torch.testing.assert_close(sample.hidden, hidden[:3])
    assert not sample.head.weight.requires_grad and model.lm_head.weight.grad is None


def test_dropped_rows_stay_within_the_tolerance_of_the_true_gradient(model):
    sample = read_sample(prepared(model), batch_size=3, progress=False)
    hidden, targets = states(model, ROWS)
    hidden = hidden.detach()
    probabilities = (hidden @ model.lm_head.weight.T).softmax(-1).detach()
    pull = torch.nn.functional.one_hot(targets, probabilities.shape[1]) - probabilities
    gradient = pull.T @ hidden
    bounds = head_bounds(probabilities.gather(1, targets[:, None])[:, 0].log(), hidden)
    each = torch.linalg.vector_norm(pull, dim=1) * torch.linalg.vector_norm(hidden, dim=1)
    assert (each <= bounds * (1 + 1e-9)).all()
    for tolerance in TOLERANCES:
        keep = keep_rows(bounds, tolerance * gradient.norm())
        error = (gradient - pull[keep].T @ hidden[keep]).norm()
        assert error <= tolerance * gradient.norm()
        assert sample.dropped[tolerance] == pytest.approx((~keep).double().mean().item())


def test_rows_go_smallest_first_and_as_many_as_fit():
    bounds = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert keep_rows(bounds, torch.tensor(3.0)).tolist() == [True, False, False, False]
    assert keep_rows(bounds, torch.tensor(2.9)).tolist() == [True, False, True, False]
    assert keep_rows(bounds, torch.tensor(0.0)).tolist() == [True, True, True, False]


def test_a_broken_model_is_named(model):
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="a log-probability of NaN or infinity"):
        read_sample(prepared(model), batch_size=2, progress=False)
