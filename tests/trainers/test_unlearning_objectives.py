"""Objectives in the unlearning trainer against whole logits and hidden states: positions, counts, references."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from posttrain.objectives.unlearning_representation import random_direction
from posttrain.presets import PRESETS
from posttrain.trainers.logit_difference import LogitDifferenceTrainer
from tests import tiny
from tests.trainers.step import config
from tests.trainers.test_gradients import relative_difference
from tests.trainers.test_unlearning import dense_logp, drawn_rows, gradients_of, one_step
from tests.trainers.unlearning_step import disturb, rows_to_retain, trainer


def states(model, row, layer):
    """(trained tokens, width) of a block's output, at the positions that predict each answer token."""
    hidden = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[layer + 1][0, :-1]
    return hidden[torch.tensor(row["labels"][1:]) != -100]


def logits(model, row):
    """(trained tokens, vocabulary), and the targets."""
    found = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    return found[labels != -100], labels[labels != -100]


def test_undial_on_answer_tokens_alone(tmp_path):
    """open-unlearning takes its mean over prompt and padding too, with -100 for a token of the vocabulary."""
    made = trainer({"forget": {"name": "undial", "beta": 3.0}}, tmp_path, 2, 4)
    rows = drawn_rows(made)["forget"]
    policy, reference = one_step(made)
    losses = []
    for row in rows:
        (logp, targets), (base, _) = dense_logp(policy, row), logits(reference, row)
        target = (base - 3.0 * F.one_hot(targets, base.shape[1])).softmax(-1).detach()
        losses.append(-(target * logp).sum(-1))
    assert len({len(loss) for loss in losses}) > 1
    expected = gradients_of(torch.cat(losses).mean(), policy)
    assert relative_difference(made.gradients.found, expected) < 1e-12


def test_margin_flattening_at_the_positions_that_predict_the_answer(tmp_path):
    """open-unlearning's mask is not shifted: it leaves out the first answer token and counts what follows the last."""
    made = trainer({"forget": "margin_flattening"}, tmp_path, 2, 4)
    rows = drawn_rows(made)["forget"]
    policy, _ = one_step(made)
    losses = [(z.max(-1).values - z.mean(-1)).square() for z, _ in (logits(policy, row) for row in rows)]
    expected = gradients_of(torch.cat(losses).mean(), policy)
    assert relative_difference(made.gradients.found, expected) < 1e-12


def test_rmu_at_a_layer_with_each_token_counted_once(tmp_path):
    layer = {"statistics": {"layer": 0}}
    objective = {
        "forget": {"name": "representation_misdirection", "scale": 6.5, "seed": 1, **layer},
        "retain": {"name": "representation_retention", **layer},
        "combine": {"sum": {"retain": 2.0}},
    }
    made = trainer(objective, tmp_path, 2, 4)
    rows = drawn_rows(made)
    policy, reference = one_step(made)
    point = 6.5 * random_direction(policy.config.hidden_size, 1)
    forget = [(states(policy, row, 0) - point).square().mean(-1) for row in rows["forget"]]
    retain = [(states(policy, row, 0) - states(reference, row, 0).detach()).square().mean(-1) for row in rows["retain"]]
    loss = torch.cat(forget).mean() + 2.0 * torch.cat(retain).mean()
    names = [name for name, _ in policy.named_parameters()]
    found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    expected = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    assert any(".layers.0." in name for name in expected) and not any(".layers.1." in name for name in expected)
    mine = {name: made.gradients.found[name] for name in expected}
    assert relative_difference(mine, expected) < 1e-12


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("batch", [8, 2])
def test_loreun_s_weights_are_normalised_over_the_whole_step(tmp_path, batch, static):
    reweight = {"name": "loreun_static" if static else "loreun", "tau": 0.05}
    made = trainer({"forget": {"name": "gradient_ascent", "reweight": reweight}}, tmp_path, batch, 8 // batch)
    rows = drawn_rows(made)["forget"]
    policy, reference = one_step(made)
    losses, weights = [], []
    for row in rows:
        (logp, targets), (base, _) = dense_logp(policy, row), dense_logp(reference, row)
        own = logp.gather(-1, targets[:, None])[:, 0]
        known = base.gather(-1, targets[:, None])[:, 0] if static else own
        losses.append(own)
        weights.append(torch.exp(known.detach().mean() / 0.05).expand_as(own))
    weight = torch.cat(weights)
    assert weight.max() > 2 * weight.min()
    expected = gradients_of((torch.cat(losses) * weight).sum() / weight.sum(), policy)
    assert relative_difference(made.gradients.found, expected) < 1e-12


def test_jensun_s_refusal_repeats_over_the_answer(tmp_path):
    made = trainer({"preset": "jensun"}, tmp_path, 4, 2, refusal_template="ab")
    cycle = tiny.tokenizer()("ab", add_special_tokens=False)["input_ids"]
    assert len(cycle) > 1
    rows = drawn_rows(made)
    policy, reference = one_step(made)
    forget, retain = [], []
    for row in rows["forget"]:
        s = dense_logp(policy, row)[0].exp()
        ids = torch.tensor([cycle[i % len(cycle)] for i in range(len(s))])
        forget.append(divergence(s, F.one_hot(ids, s.shape[1]).to(s)))
    for row in rows["retain"]:
        retain.append(divergence(dense_logp(policy, row)[0].exp(), dense_logp(reference, row)[0].exp().detach()))
    expected = gradients_of(torch.cat(forget).mean() + torch.cat(retain).mean(), policy)
    assert relative_difference(made.gradients.found, expected) < 1e-12


def divergence(p, q):
    middle = ((p + q) / 2).log()
    return (p * (p.log() - middle) + q * (q.clamp(min=1e-300).log() - middle)).sum(-1) / 2


def test_an_assistant_s_preset_and_a_model_s_are_not_taken_for_each_other(tmp_path):
    """A model under `uld` would learn what it is to forget."""
    with pytest.raises(ValueError, match=r"objective\.preset is 'uld', .*; set assistant "):
        trainer({"preset": "uld"}, tmp_path)
    options = {
        "forget_dataset": Dataset.from_list(tiny.rows()),
        "retain_dataset": Dataset.from_list(rows_to_retain()),
        "processing_class": tiny.tokenizer(),
        "layers": 1,
    }
    args = config(str(tmp_path), 8, 1, num_train_epochs=1, max_steps=-1)
    with pytest.raises(ValueError, match=r"objective\.preset is 'npo', .*; set it to uld"):
        LogitDifferenceTrainer(tiny.model(torch.float64), args, objective={"preset": "npo"}, **options)
    made = LogitDifferenceTrainer(tiny.model(torch.float64), args, objective={"preset": "uld"}, **options)
    made.train()
    (entry,) = [entry for entry in made.state.log_history if "retain_loss" in entry]
    assert entry["retain_loss"] == pytest.approx(5.0 * entry["uniform_kl/loss"], rel=1e-6)


LACKING = {
    "jensun": ({}, "set data.refusal_template"),
    "idk_nll": ({"refusals": None}, "'refusal_nll' reads refusal completions, and there are none; set data.refusal "),
    "idk_dpo": ({"refusals": None}, "'refusal_logratio', .*; set data.refusal "),
    "flat": ({"refusals": None}, "'refusal_mean_probability', .*; set data.refusal "),
    "npo": ({"retain_dataset": None}, "'nll' reads retain completions, and there are none; set data.retain "),
    "idk_ap": ({"retain_dataset": None}, "set data.retain "),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_a_preset_lacks_is_told_by_the_setting_that_gives_it(tmp_path, name):
    given, message = LACKING[name]
    with pytest.raises(ValueError, match=message):
        trainer({"preset": name}, tmp_path, **given)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "uld"])
def test_every_preset_takes_two_steps(tmp_path, name):
    options = {"num_train_epochs": 2, "learning_rate": 1e-3}
    replaced = {}
    if name == "rmu":
        shallow = {"statistics": {"layer": 0}}
        replaced = {"forget": {"name": "representation_misdirection", **shallow},
                    "retain": {"name": "representation_retention", **shallow}}  # fmt: skip
    template = "ab" if name == "jensun" else None
    made = trainer({"preset": name, **replaced}, tmp_path, 4, 2, options=options, refusal_template=template)
    disturb(made.model)
    made.train()
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(entries) == 2 and all(torch.isfinite(torch.tensor(entry["loss"])) for entry in entries)
    assert all(gradient.isfinite().all() for gradient in made.gradients.found.values())
