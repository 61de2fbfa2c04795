"""TRL 1.16's own loss, on the same log-probabilities of the tokens: equal to 1e-5, or different for a written reason.

`DPOTrainer._compute_loss` itself runs, with a model that gives out made-up log-probabilities in place of a forward.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer

from posttrain import objectives
from posttrain.statistics import signature

CHOSEN_LENGTHS, REJECTED_LENGTHS, PROMPT = (3, 5, 1, 4), (4, 2, 6, 4), 2
LENGTHS = torch.tensor([*CHOSEN_LENGTHS, *REJECTED_LENGTHS])


class Given(torch.nn.Module):
    """A model whose forward gives out what it was made with."""

    is_gradient_checkpointing = False

    def __init__(self, logp, log_sum_sq_probs):
        super().__init__()
        zeros = torch.zeros_like(logp)
        self.outputs = SimpleNamespace(log_probs=logp, log_sum_sq_probs=log_sum_sq_probs)
        vars(self.outputs).update(entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def forward(self, **_):
        return self.outputs


class Batch:
    """Four pairs of ragged lengths: what TRL's model would return, and our statistics of the same tokens."""

    def __init__(self, seed=0, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        width = PROMPT + max(*CHOSEN_LENGTHS, *REJECTED_LENGTHS)
        position = torch.arange(width)
        self.mask = ((position >= PROMPT) & (position < PROMPT + LENGTHS[:, None])).long()
        self.scored = self.mask[:, 1:]
        shape = self.scored.shape
        self.policy, self.reference = (-scale * torch.rand(2, *shape, generator=generator) * self.scored).unbind()
        self.log_sum_sq_probs = -0.2 * torch.rand(shape, generator=generator) * self.scored

    def statistics(self):
        """By name, as the trainer binds them."""
        shorter = torch.minimum(*LENGTHS.chunk(2)).repeat(2)
        head = (self.scored.cumsum(1) <= shorter[:, None]) * self.scored
        found = {"length": LENGTHS, "logratio": (self.policy - self.reference).sum(1)}
        for model, logp in (("", self.policy), ("reference_", self.reference)):
            found[f"{model}head_sum_logp"] = (logp * head).sum(1)
            found[f"{model}tail_sum_logp"] = (logp * (self.scored - head)).sum(1)
        found["mean_logp"] = self.policy.sum(1) / LENGTHS
        found["mean_log_sum_sq_probs"] = self.log_sum_sq_probs.sum(1) / LENGTHS
        return {
            f"{role}_{name}": half
            for name, value in found.items()
            for role, half in zip(("chosen", "rejected"), value.chunk(2), strict=True)
        }


def trl_value(batch, loss_type, weights=(1.0,), **settings):
    """The mean loss that TRL would train on."""
    policy = Given(batch.policy, batch.log_sum_sq_probs)

    def gather(tensor):
        return tensor

    trainer = SimpleNamespace(
        model=policy,
        ref_model=Given(batch.reference, batch.log_sum_sq_probs),
        accelerator=SimpleNamespace(device="cpu", gather=gather, gather_for_metrics=gather),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("tau", 0.05)),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        loss_types=[loss_type] if isinstance(loss_type, str) else loss_type,
        loss_weights=weights,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
    divergence = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    vars(trainer).update(defaults | divergence | settings)
    inputs = {"input_ids": batch.mask, "attention_mask": batch.mask, "completion_mask": batch.mask}
    return DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False).item()


def our_value(batch, name, **hyperparameters):
    function = objectives.get(name)
    given = batch.statistics()
    return function(**{key: given[key] for key in signature(function).required}, **hyperparameters).values.mean().item()


SAME = [
    ("dpo", {}, "sigmoid", {}),
    ("dpo", {"beta": 2.0}, "sigmoid", {"beta": 2.0}),
    ("robust_dpo", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    ("ipo", {"tau": 0.3}, "ipo", {"beta": 0.3}),
    ("hinge", {"beta": 0.5}, "hinge", {"beta": 0.5}),
    ("length_normalized_dpo", {"beta": 5.0}, "sigmoid_norm", {"beta": 5.0}),
    ("ld_dpo", {"alpha": 0.3}, "sigmoid", {"ld_alpha": 0.3}),
    ("f_dpo", {"divergence": "forward_kl"}, "sigmoid", {"f_divergence_type": "forward_kl"}),
    ("f_dpo", {"divergence": "js"}, "sigmoid", {"f_divergence_type": "js_divergence"}),
    ("f_dpo", {"divergence": "alpha"}, "sigmoid", {"f_divergence_type": "alpha_divergence"}),
    (
        "f_dpo",
        {"divergence": "alpha", "alpha": 1.4},
        "sigmoid",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.4},
    ),
    ("exo", {"label_smoothing": 1e-3}, "exo_pair", {"label_smoothing": 1e-3}),
    ("nca", {"beta": 0.5}, "nca_pair", {"beta": 0.5}),
    ("bco_pair", {"beta": 0.5}, "bco_pair", {"beta": 0.5}),
    ("sppo", {"beta": 0.1}, "sppo_hard", {"beta": 0.1}),
    ("apo_zero", {"beta": 0.5}, "apo_zero", {"beta": 0.5}),
    ("apo_down", {"beta": 0.5}, "apo_down", {"beta": 0.5}),
    ("discopop", {"beta": 0.05, "tau": 0.05}, "discopop", {"beta": 0.05, "tau": 0.05}),
]


@pytest.mark.parametrize(("name", "ours", "loss_type", "theirs"), SAME)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_value_as_trl(name, ours, loss_type, theirs, seed):
    batch = Batch(seed)
    assert our_value(batch, name, **ours) == pytest.approx(trl_value(batch, loss_type, **theirs), rel=1e-5)


def test_trl_passes_label_smoothing_of_the_sigmoid_loss_over():
    batch = Batch()
    theirs = trl_value(batch, "sigmoid", beta=2.0, label_smoothing=0.3)
    assert theirs == trl_value(batch, "sigmoid", beta=2.0)
    # the same batch with the completions swapped gives the second part
    given = batch.statistics()
    swapped = objectives.get("dpo")(given["rejected_logratio"], given["chosen_logratio"], beta=2.0).values.mean().item()
    assert our_value(batch, "dpo", beta=2.0, label_smoothing=0.3) == pytest.approx(0.7 * theirs + 0.3 * swapped)
    assert our_value(batch, "dpo", beta=2.0, label_smoothing=0.3) != pytest.approx(theirs, rel=1e-3)


def test_wpo_is_trls_where_no_weight_is_above_one():
    """TRL leaves the authors' cut-off at 1 out."""
    batch = Batch()
    batch.log_sum_sq_probs = torch.zeros_like(batch.policy)
    assert our_value(batch, "wpo") == pytest.approx(trl_value(batch, "sigmoid", use_weighting=True), rel=1e-5)
    batch.log_sum_sq_probs = 3 * batch.policy
    weights = torch.exp(-2 * batch.policy.sum(1) / LENGTHS)
    per_pair = objectives.get("dpo")(**logratios(batch)).values
    theirs = (weights[:4] * weights[4:] * per_pair).mean().item()
    assert trl_value(batch, "sigmoid", use_weighting=True) == pytest.approx(theirs, rel=1e-5)
    assert our_value(batch, "wpo") == pytest.approx(per_pair.mean().item(), rel=1e-5)


def logratios(batch):
    return {key: value for key, value in batch.statistics().items() if key.endswith("logratio")}


def test_the_likelihood_term_counts_pairs_where_trl_counts_the_micro_batchs_tokens():
    batch = Batch()
    per_pair = objectives.get("chosen_nll")(batch.statistics()["chosen_mean_logp"]).values
    lengths = torch.tensor(CHOSEN_LENGTHS)
    by_tokens = ((per_pair * lengths).sum() / lengths.sum()).item()
    assert trl_value(batch, "sft") == pytest.approx(by_tokens, rel=1e-5)
    both = trl_value(batch, ["sigmoid", "sft"], weights=(1.0, 0.5))
    assert both == pytest.approx(our_value(batch, "dpo") + 0.5 * by_tokens, rel=1e-5)
    ours = our_value(batch, "iterative_rpo", alpha=0.5)
    assert ours == pytest.approx(our_value(batch, "dpo") + 0.5 * per_pair.mean().item(), rel=1e-6)


def test_far_from_the_reference_ours_stay_finite_where_trls_do_not():
    """A chosen completion 500 nats down, a rejected one unmoved or gone as well."""
    batch = Batch()
    batch.policy = batch.reference - 500.0 * (batch.scored.cumsum(1) == 1) * batch.scored
    far = {"f_divergence_type": "forward_kl"}
    assert math.isnan(trl_value(batch, "sigmoid", **far))
    assert math.isfinite(our_value(batch, "f_dpo", divergence="forward_kl"))
    batch.policy[4:] = batch.reference[4:]
    assert math.isnan(trl_value(batch, "discopop", beta=0.5))
    assert our_value(batch, "discopop", beta=0.5) == pytest.approx(250.0)
    # both cut the exponent of 250 off, TRL at 80 and ours at 30 with a straight line beyond
    theirs = trl_value(batch, "sigmoid", f_divergence_type="alpha_divergence")
    assert theirs == pytest.approx(0.1 * 2 * math.exp(80), rel=1e-5)
    ours = our_value(batch, "f_dpo", divergence="alpha")
    assert ours == pytest.approx(0.1 * 2 * math.exp(30) * (1 + 250 - 30), rel=1e-5)
