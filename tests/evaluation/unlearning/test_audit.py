"""Relearning, rounding and representations against hand values and against training itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from posttrain import SupervisedTrainer
from posttrain.config import from_tree, resolve
from posttrain.config.unlearning import AuditConfig
from posttrain.evaluation import evaluate
from posttrain.evaluation.rows import scored_ids
from posttrain.evaluation.unlearning import AuditSuite, audit
from posttrain.evaluation.unlearning.quantization import ROUNDINGS, Rounding, rounded, rounded_weights
from posttrain.evaluation.unlearning.relearning import Relearning, relearn, robustness, split
from posttrain.evaluation.unlearning.representations import answer_states, linear_cka, nearest_neighbours
from posttrain.modeling.logit_difference import LogitDifferenceModel, first_layers
from posttrain.pipeline import evaluate_only
from tests import tiny
from tests.trainers.step import config

ROWS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny.rows()]


def test_cka_by_hand():
    one = np.array([[1.0], [2.0], [3.0]])
    assert linear_cka(one, -7 * one + 5) == pytest.approx(1.0, rel=1e-12)
    # centred x = (-1, 0, 1) and y = (1, -2, 1) / 3 are orthogonal
    assert linear_cka(one, np.array([[1.0], [0.0], [1.0]])) == pytest.approx(0.0, abs=1e-12)
    # x = (-1, 0, 1), y = (-4, -1, 5) / 3: (x.y)^2 / (|x|^2 |y|^2) = 9 / (2 * 42 / 9)
    assert linear_cka(one, np.array([[0.0], [1.0], [3.0]])) == pytest.approx(9 / (2 * 42 / 9), rel=1e-12)
    assert np.isnan(linear_cka(one, np.ones((3, 2))))
    with pytest.raises(ValueError, match="of 3 and of 2 items"):
        linear_cka(one, one[:2])


@pytest.mark.parametrize("items", [4, 40])
def test_cka_is_of_gram_matrices_and_knows_no_rotation(items):
    """Against the definition by centred Gram matrices, where items are fewer and where they are more than the width."""
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(items, 9)), generator.normal(size=(items, 6))
    centre = np.eye(items) - 1 / items
    first, second = (centre @ (x @ x.T) @ centre for x in (one, other))
    expected = (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())
    assert 0 < linear_cka(one, other) < 1
    assert linear_cka(one, other) == pytest.approx(expected, rel=1e-10)
    rotation = np.linalg.qr(generator.normal(size=(9, 9)))[0]
    assert linear_cka(one @ rotation, other) == pytest.approx(expected, rel=1e-10)


def test_nearest_neighbours_by_hand():
    angles = np.deg2rad([0, 10, 20, 90, 100, 15])
    states = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [5], [1], [1], [0.1], [9]])
    labels = ["a", "a", "a", "b", "b", "b"]
    # by angle alone: the last lies among the a's
    assert nearest_neighbours(states, labels, k=3).tolist() == [1, 1, 1, 1, 1, 0]
    assert nearest_neighbours(states, labels, k=1).tolist() == [1, 0, 0, 1, 1, 0]
    # one vote each: the closer one wins, at 90 the b at 100 and not the a at 20
    assert nearest_neighbours(states[[2, 3, 4]], ["a", "b", "b"], k=2).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="k is 6 and there are 6 items"):
        nearest_neighbours(states, labels, k=6)


def test_states_are_those_of_the_answers_own_tokens():
    model, tokenizer = tiny.model(torch.float64).eval(), tiny.tokenizer()
    found = answer_states(model, tokenizer, ROWS, batch_size=3)
    assert found.shape == (3, 8, 16)
    for index, row in enumerate(ROWS):
        ids, scored = scored_ids(tokenizer, row)
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        at = [place for place, flag in enumerate(scored) if flag and place]
        assert at[0] == len(row["prompt"]), "from the answer's first token on"
        for layer, states in enumerate(hidden):
            np.testing.assert_allclose(found[layer, index], states[0, at].mean(0).detach(), rtol=1e-10, atol=1e-12)


def test_the_first_token_alone_would_say_nothing():
    """A text's first state is the same whatever follows; pooled over the answer, states differ."""
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    rows = [{"prompt": "a=", "completion": text} for text in ("12", "3", "456", "78")]
    ids = torch.tensor([scored_ids(tokenizer, row)[0][:3] for row in rows])
    first = model(ids, output_hidden_states=True).hidden_states[-1][:, 0].detach().numpy()
    assert np.allclose(first, first[0], atol=1e-6)
    states = answer_states(model, tokenizer, rows)
    assert all(layer.std(axis=0).min() > 1e-3 for layer in states)


def test_rounding_by_hand():
    weight = torch.tensor([[7.0, -3.2, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0], [0.07, -0.07, 0.024, 0.0]])
    # 4 bits: the largest of a channel is 7 steps
    expected = torch.tensor([[7.0, -3.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.07, -0.07, 0.02, 0.0]])
    torch.testing.assert_close(rounded(weight, Rounding(4)), expected)
    # groups of 3: the last weight of a row stands alone and stays
    expected = torch.tensor([[7.0, -3.0, 0.0, 0.6], [0.0, 0.0, 0.0, 0.0], [0.07, -0.07, 0.02, 0.0]])
    torch.testing.assert_close(rounded(weight, Rounding(4, 3)), expected)
    eight = rounded(weight, Rounding(8))
    assert (eight - weight).abs().max() <= 7.0 / 127 / 2 + 1e-6 and not torch.equal(eight, weight)
    assert rounded(weight.bfloat16(), Rounding(8)).dtype == torch.bfloat16


def test_linear_weights_are_rounded_for_a_while_and_the_head_and_embeddings_are_not():
    model = tiny.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with rounded_weights(model, Rounding(4, 128)):
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    linear = {name for name in before if name.endswith("proj.weight")}
    assert changed == linear and len(linear) == 14
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError, match="inside"), rounded_weights(model, Rounding(4)):
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_relearning_is_supervised_training(tmp_path):
    """The same steps as the supervised trainer's, from data preparation to the optimizer."""
    found = []
    settings = Relearning(epochs=2, learning_rate=1e-2, batch_size=3)
    model = tiny.model(torch.float64)
    relearn(model, tiny.tokenizer(), ROWS, settings, seed=5, after_epoch=lambda student: found.append(student))
    assert len(found) == 2 and found[0] is found[1] is not model
    options = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 1e-2, "optim": "adamw_torch"}
    generator = torch.Generator().manual_seed(5)
    order = [row for _ in range(2) for row in torch.randperm(8, generator=generator).tolist()]
    # an epoch's last step is short: two rows of eight
    rows = Dataset.from_list([ROWS[row] for row in order[:8]])
    trainer = SupervisedTrainer(
        tiny.model(torch.float64), config(str(tmp_path), 3, 1, train_sampling_strategy="sequential", **options),
        train_dataset=rows, processing_class=tiny.tokenizer(),
    )  # fmt: skip
    trainer.train()
    once: list[dict] = []
    relearn(
        model, tiny.tokenizer(), ROWS, Relearning(epochs=1, learning_rate=1e-2, batch_size=3), seed=5,
        after_epoch=lambda student: once.append(student.state_dict()),
    )  # fmt: skip
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(once[0][name], tensor, rtol=1e-9, atol=1e-10)
    untouched = tiny.model(torch.float64).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())


def test_rows_that_are_shown_are_drawn_by_seed():
    shown, others = split(10, 0.3, 0)
    assert len(shown) == 3 and sorted(shown + others) == list(range(10))
    assert split(10, 0.3, 0) == (shown, others) and any(split(10, 0.3, seed)[0] != shown for seed in range(1, 5))
    assert split(3, 0.01, 0)[1] and split(3, 1.0, 0) == ([0, 1, 2], [])


def test_robustness_by_hand():
    # of gains: half as much; more than the unlearned model; the unlearned one lost, or did not move; the other lost
    found = robustness([0.2, 0.4, 0.0, 0.1, -0.05], [0.4, 0.2, -0.1, 0.0, 0.1])
    np.testing.assert_allclose(found, [0.5, 1.0, 1.0, 1.0, 0.0])


def test_layers_that_hold_their_weights_the_other_way_are_rounded_by_output_channel():
    torch.manual_seed(0)
    settings = {"vocab_size": 45, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=1))
    weight = model.transformer.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    assert before.shape == (16, 64), "input by output"
    with rounded_weights(model, Rounding(4)):
        steps = before.abs().amax(dim=0) / 7
        torch.testing.assert_close(weight, (before / steps).round() * steps)
    assert torch.equal(weight, before)
    head = model.lm_head.weight.detach().clone()
    with rounded_weights(model, Rounding(4)):
        assert torch.equal(model.lm_head.weight, head)


def test_weights_that_rounding_would_pass_over_leave_it_out():
    torch.manual_seed(0)
    settings = {"vocab_size": 45, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    experts = MixtralForCausalLM(MixtralConfig(**settings, **heads, max_position_embeddings=64))
    with (
        pytest.raises(ValueError, match="MixtralExperts holds those of several layers"),
        rounded_weights(experts, Rounding(4)),
    ):
        pass
    quantised = tiny.model()
    quantised.is_quantized = True
    found = audit(quantised, tiny.tokenizer(), ROWS, resamples=20)
    assert found.sources["audit_forget_relearning"].not_measured == {"relearning": "the model's weights are quantised"}
    reason = found.sources["audit_forget_rounding"].not_measured["rounding"]
    assert reason == "the weights of LlamaForCausalLM cannot be rounded: they are quantised already"


def test_of_a_logit_difference_the_base_is_looked_into():
    """What the assistant takes off the logits stands in the base's states as before."""
    base = tiny.model()
    model = LogitDifferenceModel.of(base, first_layers(tiny.model(seed=1), 1))
    settings = Relearning(epochs=1, learning_rate=2e-2, batch_size=4)
    found = audit(model, tiny.tokenizer(), ROWS, original=tiny.model, relearning=settings, resamples=20)
    states, known = values(found, "audit_forget_states"), values(found, "audit_forget_relearning")
    assert [states[f"cka_original_layer{layer}"] for layer in range(3)] == pytest.approx([1.0] * 3)
    assert known["probability_shown_epoch1"] > known["probability_shown_epoch0"]
    assert values(found, "audit_forget_rounding")["probability_int4_channel"] > 0


OPTIONS = {
    "groups": [0, 0, 0, 0, 1, 1, 1, 1],
    "retain": [{"prompt": "z" + row["prompt"], "completion": row["completion"]} for row in ROWS],
    "neighbours": 3,
    "relearning": Relearning(epochs=2, share=0.5, learning_rate=2e-2, batch_size=2),
    "resamples": 50,
}


def values(report, source):
    return {name: measure.estimate.value for name, measure in report.sources[source].measures.items()}


@pytest.fixture(scope="module")
def report():
    model = tiny.model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    original, retrained = tiny.model(), tiny.model(seed=1)
    state = torch.random.get_rng_state()
    others = {"original": lambda: original, "retrained": lambda: retrained}
    found = audit(model, tiny.tokenizer(), ROWS, **others, **OPTIONS)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


def test_one_call_gives_the_whole_audit(report):
    names = ["audit_forget_relearning", "audit_forget_rounding", "audit_retain_rounding", "audit_forget_states"]
    assert list(report.sources) == names
    for source in report.sources.values():
        assert not source.not_measured and all(m.estimate.n in (4, 8) for m in source.measures.values())
    relearned = values(report, "audit_forget_relearning")
    course = [relearned[f"probability_shown_epoch{epoch}"] for epoch in range(3)]
    assert course[0] < course[1] < course[2]
    assert relearned["relearned_probability_shown"] == pytest.approx(course[2] - course[0])
    theirs, ours = (
        relearned[f"{prefix}probability_unshown_epoch2"] - relearned[f"{prefix}probability_unshown_epoch0"]
        for prefix in ("retrained_", "")
    )
    expected = min(1.0, max(0.0, theirs) / ours) if ours > 0 else 1.0
    assert relearned["relearning_robustness_probability_unshown"] == pytest.approx(expected)
    name = "relearning_robustness_probability_shown"
    robust = report.sources["audit_forget_relearning"].measures[name].estimate
    assert robust.low <= robust.value <= robust.high and robust.n == 4
    assert relearned["retrained_probability_unshown_epoch0"] != relearned["probability_unshown_epoch0"]
    known = values(report, "audit_forget_rounding")
    moved = [abs(known[f"probability_int{bits}_channel"] - known["probability_unrounded"]) for bits in (8, 4)]
    assert 0 < moved[0] < moved[1]
    for one in ROUNDINGS:
        expected = min(1.0, known["probability_unrounded"] / known[f"probability_{one.name}"])
        assert known[f"rounding_robustness_{one.name}"] == pytest.approx(expected)
    states = values(report, "audit_forget_states")
    # the original is the very model
    assert [states[f"cka_original_layer{layer}"] for layer in range(3)] == pytest.approx([1.0] * 3)
    assert states["cka_retrained_layer2"] < 0.99
    assert states["group_told_layer1"] == states["original_group_told_layer1"]
    assert json.loads(json.dumps(report.to_dict()))["settings"]["audit"]["relearning"]["epochs"] == 2
    assert report.table().row_count == sum(len(source.measures) for source in report.sources.values())


def test_the_audit_repeats(report):
    others = {"original": lambda: tiny.model(), "retrained": lambda: tiny.model(seed=1)}
    again = audit(tiny.model(), tiny.tokenizer(), ROWS, **others, **OPTIONS)
    for name in report.sources:
        assert values(again, name) == values(report, name)


def test_an_adapter_is_merged_and_what_is_missing_is_said():
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    suite = AuditSuite(ROWS, relearning=Relearning(epochs=1, share=1.0))
    found = evaluate(model, tiny.tokenizer(), {"audit": suite}, resamples=20)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    relearned, states = (found.sources[f"audit_forget_{name}"].not_measured for name in ("relearning", "states"))
    assert "evaluation.audit.retrained" in relearned["relearning_robustness_probability_shown"]
    names = {f"relearning_robustness_{metric}_shown" for metric in ("probability", "extraction_strength")}
    assert relearned.keys() == {*names, "unshown"}
    assert states.keys() == {"cka_original", "cka_retrained", "group_told"}
    whole = values(found, "audit_forget_rounding")["probability_unrounded"]
    assert whole == pytest.approx(values(found, "audit_forget_relearning")["probability_shown_epoch0"], rel=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        AuditSuite([])
    with pytest.raises(ValueError, match="2 groups are given for 8 rows"):
        AuditSuite(ROWS, groups=[1, 2])
    with pytest.raises(ValueError, match="neighbours is 8 and there are 8 rows"):
        AuditSuite(ROWS, groups=[0] * 8, neighbours=8)
    for bad in ({"neighbours": 0}, {"relearn_epochs": -1}, {"relearn_share": 0.0}, {"relearn_learning_rate": 0.0},
                {"group": "author", "group_size": 20}, {"group_size": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=f"evaluation.audit.*{next(iter(bad))}"):
            AuditConfig(**bad)


def test_the_suite_of_a_configuration(tmp_path: Path):
    rows = [
        {"question": row["prompt"], "answer": row["completion"], "author": "xy"[i % 2]} for i, row in enumerate(ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    audit_block = {"forget": {"path": str(tmp_path / "rows.jsonl")}, "template": "{question}", "group": "author",
                   "neighbours": 3, "relearn_epochs": 1,
                   "original": {"name_or_path": str(tmp_path / "model")}}  # fmt: skip
    tree = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "trainer": {"output_dir": str(tmp_path / "out"), "use_cpu": True},
        "evaluation": {"audit": audit_block, "resamples": 20},
    }
    found = evaluate_only(resolve(from_tree(tree)))
    assert found is not None
    report, paths = found
    assert values(report, "audit_forget_states")["cka_original_layer1"] == pytest.approx(1.0)
    assert "group_told_layer1" in values(report, "audit_forget_states") and paths["evaluation"].exists()
    tree["evaluation"]["audit"] = {**audit_block, "group": "writer"}
    with pytest.raises(ValueError, match=r"evaluation\.audit\.forget.*'writer'"):
        evaluate_only(resolve(from_tree({**tree, "overwrite": True})))
