"""The reference of PreferenceTrainer: each kind against dense truth, what is chosen and why, and the cache's life."""

import copy
import functools
import gc
import math
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from posttrain.objectives import Loss
from posttrain.terms import Available, build_terms
from posttrain.trainers import reference_pass
from posttrain.trainers.reference import LiveReference, frozen_copy
from posttrain.trainers.reference_choice import Circumstances, changed_base, choose, reference_needs
from tests import tiny
from tests.trainers.preference_step import build, logged, lora, rows, step
from tests.trainers.test_gradients import relative_difference

SUM = {"chosen": "chosen_reference_sum_logp", "rejected": "rejected_reference_sum_logp"}


def dense_sums(model, dataset):
    """Summed log-probabilities of the completions, from the model's own logits, one sequence at a time."""
    model = copy.deepcopy(model).double().eval()
    found = {}
    for role in ("chosen", "rejected"):
        found[role] = []
        for row in dataset:
            ids = torch.tensor(row["prompt_ids"] + row[f"{role}_ids"])
            with torch.no_grad():
                logp = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])
            found[role].append(logp[len(row["prompt_ids"]) - 1 :].sum().item())
    return found


def live_sums(trainer):
    """The same from what the trainer binds in a micro-batch of all its rows."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    computed, side, _ = trainer._statistics(trainer.model, batch)
    logp = computed[next(iter(computed))]["reference_logp"]
    return {role: [part.sum().item() for part in logp[side.roles[role].tokens].split(side.of(role).lengths.tolist())]
            for role in ("chosen", "rejected")}  # fmt: skip


def needs(objective):
    roles = ["chosen", "rejected", "mismatched"]
    available = Available(["score_margin"], roles, reference=True, needs_role=True)
    return reference_needs(build_terms(objective, available), ("mismatched",))


def reads_entropy(chosen_logratio, chosen_reference_mean_entropy):
    return Loss(chosen_logratio * chosen_reference_mean_entropy)


def reads_probability(chosen_sum_logp, chosen_reference_mean_probability):
    return Loss(chosen_sum_logp * chosen_reference_mean_probability)


def reads_mismatched(chosen_logratio, mismatched_logratio):
    return Loss(chosen_logratio - mismatched_logratio)


@pytest.mark.parametrize(
    ("objective", "per_token", "no_cache"),
    [
        ("dpo", False, None),
        ("ipo", False, None),
        ("aot", False, None),
        ("ld_dpo", True, None),
        (reads_probability, True, None),
        (["dpo", {"name": "ipo", "statistics": {"k": 3}}], False, None),
        ("tdpo", False, "whole next-token distributions"),
        (reads_entropy, True, "only log-probabilities are cached"),
        (reads_mismatched, False, "change places in each epoch"),
        (["dpo", {"name": "ipo", "statistics": {"temperature": 2.0}}], False, "several temperatures"),
    ],
)
def test_needs_are_read_off_the_terms(objective, per_token, no_cache):
    found = needs(objective)
    assert found.any and found.per_token is per_token
    assert (found.no_cache is None) if no_cache is None else (no_cache in found.no_cache)


def test_nothing_is_needed_where_no_term_reads_a_reference():
    assert not needs(["simpo", {"name": "nll", "role": "chosen"}]).any


@pytest.mark.parametrize(
    ("objective", "here", "kind"),
    [
        ("simpo", {}, "none"),
        ("dpo", {}, "cached"),
        ("dpo", {"adapter": True}, "cached"),
        ("dpo", {"given": True}, "cached"),
        ("dpo", {"streamed": True}, "model"),
        ("dpo", {"streamed": True, "adapter": True}, "adapter_off"),
        ("dpo", {"streamed": True, "adapter": True, "given": True}, "model"),
        ("dpo", {"whole_epoch": False}, "model"),
        ("dpo", {"whole_epoch": False, "adapter": True}, "adapter_off"),
        ("dpo", {"synced": True}, "model"),
        ("tdpo", {}, "model"),
        ("tdpo", {"adapter": True}, "adapter_off"),
        ("dpo", {"adapter": True, "changed_base": "peft.bias is 'all'"}, "model"),
        ("dpo", {"adapter": True, "fsdp": True}, "adapter_off"),
        ("dpo", {"fsdp": True}, "cached"),
    ],
)
def test_auto_takes_the_first_that_serves(objective, here, kind):
    assert choose("auto", needs(objective), Circumstances(**here))[0] == kind


@pytest.mark.parametrize(
    ("kind", "objective", "here", "message"),
    [
        ("cached", "dpo", {"streamed": True}, "streamed"),
        ("cached", "tdpo", {}, "whole next-token distributions"),
        ("cached", "dpo", {"synced": True}, "sync_ref_model"),
        ("adapter_off", "dpo", {"synced": True, "adapter": True}, "sync_ref_model"),
        ("model", "dpo", {"synced": True, "adapter": True}, "adapters"),
        ("auto", "dpo", {"synced": True, "adapter": True}, "no kind of reference serves"),
        ("auto", "simpo", {"synced": True}, "no term of the objective reads a reference"),
        ("adapter_off", "dpo", {}, "has no adapter"),
        ("adapter_off", "dpo", {"adapter": True, "given": True}, "a reference model is given"),
        ("adapter_off", "dpo", {"adapter": True, "changed_base": "peft.bias is 'all'"}, "peft.bias"),
        ("cached", "dpo", {"adapter": True, "fsdp": True}, "take adapter_off"),
        ("cashed", "dpo", {}, "did you mean 'cached'"),
    ],
)
def test_what_cannot_serve_is_refused_with_the_reason(kind, objective, here, message):
    with pytest.raises(ValueError, match=message):
        choose(kind, needs(objective), Circumstances(**here))


def test_adapters_that_change_what_lies_below_them_are_known():
    assert changed_base([LoraConfig(), LoraConfig(init_lora_weights="gaussian")]) is None
    assert "bias" in changed_base([LoraConfig(bias="all")])
    assert "pissa" in changed_base([LoraConfig(), LoraConfig(init_lora_weights="pissa")])


@pytest.mark.parametrize("given", [True, False])
def test_cached_numbers_are_those_of_the_dense_model(tmp_path, given):
    reference = tiny.model(seed=1) if given else None
    trainer = build(tmp_path, ref_model=reference, batch=3, max_steps=3)
    assert trainer.reference == "cached" and trainer.ref_model is None
    expected = dense_sums(reference or tiny.model(), trainer.train_dataset)
    for role, name in SUM.items():
        assert trainer.train_dataset[name][:] == pytest.approx(expected[role], rel=1e-6)


def test_the_policy_is_its_own_reference_at_the_first_step(tmp_path):
    trainer = build(tmp_path, {"name": "dpo", "beta": 0.5}, batch=2, accumulation=2, max_steps=2)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer)[1] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "ld_dpo", reads_probability])
def test_cached_and_live_references_give_one_gradient(objective):
    cached, found, _ = step(objective, torch.float32, 4, 2, reference="cached", ref_model=tiny.model(seed=1))
    live, expected, _ = step(objective, torch.float32, 4, 2, reference="model", ref_model=tiny.model(seed=1))
    assert relative_difference(found, expected) < 1e-5
    assert cached._live_reference is None and live.reference == "model"
    assert logged(cached)[0] == pytest.approx(logged(live)[0], rel=1e-6)


def test_no_reference_model_stays_in_memory(tmp_path):
    reference = tiny.model(seed=1)
    gone = weakref.ref(reference)
    trainer = build(tmp_path, reference="cached", ref_model=reference)
    del reference
    gc.collect()
    assert gone() is None and trainer.ref_model is None


def test_nothing_is_loaded_or_copied_where_no_term_asks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.nn.Module, "__deepcopy__", lambda *_: pytest.fail("a model was copied"), raising=False)
    with caplog.at_level("WARNING", "posttrain"):
        trainer = build(tmp_path, "simpo", ref_model=tiny.model(seed=1))
    assert (trainer.reference, trainer.ref_model, trainer._live_reference) == ("none", None, None)
    assert "not used" in caplog.text


def counted(monkeypatch, limit=None):
    """Calls of the reference; the one after ``limit`` is interrupted."""
    calls = []
    original = LiveReference.__call__

    def call(self, *args):
        if limit is not None and len(calls) >= limit:
            raise KeyboardInterrupt
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(LiveReference, "__call__", call)
    return calls


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    small = functools.partial(reference_pass.ReferenceCache, chunk_rows=2)
    monkeypatch.setattr(reference_pass, "ReferenceCache", small)
    arguments = {"reference": "cached", "batch": 2, "ref_model": tiny.model(seed=1)}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        counted(patched, limit=3)
        build(tmp_path, **arguments)
    with monkeypatch.context() as patched:
        calls = counted(patched)
        trainer = build(tmp_path, **arguments)
        assert len(calls) == 1
    whole = build(tmp_path / "other", **arguments)
    assert trainer.train_dataset[SUM["chosen"]][:] == whole.train_dataset[SUM["chosen"]][:]
    with monkeypatch.context() as patched:
        calls = counted(patched)
        build(tmp_path, **arguments)
        build(tmp_path, **{**arguments, "batch": 4})
        assert not calls


def test_a_folder_of_one_s_own_is_refused_when_stale(tmp_path):
    folder = tmp_path / "kept"
    build(tmp_path, reference_cache=folder, eval_dataset=Dataset.from_list(rows(4)))
    assert {path.name for path in folder.iterdir()} == {"train", "eval"}
    build(tmp_path, reference_cache=folder, peft_config=lora("q_proj"))
    stale = [
        ({"model": tiny.model(seed=5)}, "another reference model"),
        ({"train": Dataset.from_list(rows(7))}, "other rows"),
        ({"objective": "ld_dpo"}, "where the objective needs log-probabilities per token"),
        ({"objective": {"name": "dpo", "statistics": {"temperature": 2.0}}}, "at temperature 2"),
        ({"dtype": torch.float64}, "computed in float32, where this run has float64"),
    ]
    for options, message in stale:
        with pytest.raises(ValueError, match=message):
            build(tmp_path, reference_cache=folder, **options)
    with pytest.raises(ValueError, match="reference_cache is set"):
        build(tmp_path, reference_cache=folder, reference="model")


def test_a_reference_that_breaks_is_named_with_its_rows(tmp_path):
    broken = tiny.model(seed=1)
    broken.model.embed_tokens.weight.data[tiny.VOCABULARY.index("9")] = math.nan
    with pytest.raises(ValueError, match=r"8 rows a rejected_reference_sum_logp that is not finite: rows 0, 1"):
        build(tmp_path, reference="cached", ref_model=broken)


def misread(model, where=lambda: True):
    """Let the model scale its logits by what no config says."""

    def scale(module, inputs, output):
        if getattr(output, "logits", None) is not None and where():
            output.logits = 1.5 * output.logits
        return output

    model.register_forward_hook(scale)


@pytest.mark.parametrize("kind", ["cached", "model"])
def test_a_reference_whose_head_is_read_wrongly_is_refused_before_it_is_asked(tmp_path, kind):
    reference = tiny.model(seed=1)
    misread(reference)
    with pytest.raises(RuntimeError, match="differ from those of the model's own logits"):
        build(tmp_path, reference=kind, ref_model=reference).train()
    assert not list(tmp_path.rglob("*.arrow"))


def test_an_adapter_on_the_head_is_checked_switched_off(tmp_path):
    model = tiny.model(tie_word_embeddings=False)
    built = build(tmp_path, model=model, peft_config=lora("lm_head"), reference="adapter_off")
    head = built.model.get_output_embeddings()
    misread(model, lambda: head.disable_adapters)
    with pytest.raises(RuntimeError, match="differ from those of the model's own logits"):
        built.train()


@pytest.mark.parametrize("kind", ["cached", "model"])
def test_a_reference_given_by_name_is_loaded_in_the_policy_s_dtype(tmp_path, kind):
    tiny.model(seed=1).save_pretrained(tmp_path / "reference")
    trainer = build(tmp_path, dtype=torch.float64, ref_model=str(tmp_path / "reference"), reference=kind)
    expected = dense_sums(tiny.model(seed=1), trainer.train_dataset)
    found = live_sums(trainer) if kind == "model" else {r: trainer.train_dataset[n][:] for r, n in SUM.items()}
    for role in SUM:
        assert found[role] == pytest.approx(expected[role], rel=1e-12)


def test_rows_that_come_later_are_computed_while_the_reference_is_at_hand(tmp_path):
    other = Dataset.from_list(rows(5, shift=2))
    trainer = build(tmp_path, eval_dataset={"one": Dataset.from_list(rows(4))}, batch=4, max_steps=2)
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    before = trainer.evaluate(other)["eval_loss"]
    assert before != pytest.approx(math.log(2), abs=1e-3)
    assert trainer.evaluate()["eval_one_loss"] != pytest.approx(math.log(2), abs=1e-3)
    with pytest.raises(ValueError, match="no longer at hand"):
        trainer.evaluate(Dataset.from_list(rows(6, shift=1)))
    with pytest.raises(ValueError, match="the data to evaluate is streamed"):
        trainer.evaluate(other.to_iterable_dataset())


def test_an_adapter_keeps_the_cached_reference_at_hand(tmp_path):
    trainer = build(tmp_path, peft_config=lora("q_proj", "v_proj"), reference="cached", max_steps=2)
    trainer.train()
    live = build(tmp_path, peft_config=lora("q_proj", "v_proj"), reference="adapter_off", max_steps=2)
    live.train()
    other = Dataset.from_list(rows(5, shift=2))
    found, expected = (one.evaluate(other)["eval_loss"] for one in (trainer, live))
    assert found == pytest.approx(expected, rel=1e-6) and found != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "lm_head"), ("lm_head",)])
def test_without_its_adapter_the_policy_is_the_base(tmp_path, targets):
    base = tiny.model(tie_word_embeddings=False, attention_dropout=0.5)
    config = lora(*targets, lora_dropout=0.5)
    options = {"disable_dropout": False, "max_steps": 3, "reference": "adapter_off"}
    trainer = build(tmp_path, model=copy.deepcopy(base), peft_config=config, **options)
    assert set(trainer.model.peft_config) == {"default"} and trainer.ref_model is None
    expected = dense_sums(base, trainer.train_dataset)
    for _ in range(2):
        found = live_sums(trainer)
        for role in SUM:
            assert found[role] == pytest.approx(expected[role], rel=1e-5)
        trainer.train()
    assert any(one.abs().max() > 0 for name, one in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["cached", "adapter_off", "model"])
def test_an_adapter_trained_before_is_the_reference_as_it_was(tmp_path, kind):
    model = get_peft_model(tiny.model(tie_word_embeddings=False), lora("q_proj", "lm_head", init_lora_weights=False))
    start = copy.deepcopy(model)
    trainer = build(tmp_path, model=model, reference=kind, max_steps=2, train=Dataset.from_list(rows()))
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    expected = dense_sums(start, trainer.train_dataset)
    off = dense_sums(tiny.model(tie_word_embeddings=False), trainer.train_dataset)
    found = live_sums(trainer) if kind != "cached" else {r: trainer.train_dataset[n][:] for r, n in SUM.items()}
    for role in SUM:
        assert found[role] == pytest.approx(expected[role], rel=1e-5)
        assert found[role] != pytest.approx(off[role], rel=1e-3)


def test_a_model_of_its_own_is_frozen_and_has_no_dropout(tmp_path):
    model = tiny.model(attention_dropout=0.5)
    trainer = build(tmp_path, model=model, reference="model", disable_dropout=False, max_steps=2)
    expected = dense_sums(tiny.model(), trainer.train_dataset)
    trainer.train()
    found = live_sums(trainer)
    for role in SUM:
        assert found[role] == pytest.approx(expected[role], rel=1e-5)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_a_model_that_another_trainer_had_is_copied_with_its_own_forward():
    """TRL's fused head would answer with the policy's weights, whatever the copy's are."""
    model = tiny.model()
    add_fused_lm_head(model)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        reference = frozen_copy(model, {})
        expected = reference(input_ids=ids).logits
        torch.testing.assert_close(expected, model(input_ids=ids).logits)
        model.lm_head.weight.zero_()
        torch.testing.assert_close(reference(input_ids=ids).logits, expected, rtol=0, atol=0)
    assert expected.abs().max() > 0


class Weights(TrainerCallback):
    """The head of the policy after each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(model.lm_head.weight.detach().clone())


def test_the_reference_follows_the_policy_where_that_is_asked(tmp_path):
    """TR-DPO: reference <- alpha policy + (1 - alpha) reference after every second step."""
    seen = Weights()
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2, "max_steps": 5}
    trainer = build(tmp_path, callbacks=[seen], **options)
    assert trainer.reference == "model"
    expected = tiny.model().lm_head.weight.detach()
    trainer.train()
    for policy in (seen.found[1], seen.found[3]):
        expected = 0.3 * policy + 0.7 * expected
    assert torch.allclose(trainer.ref_model.lm_head.weight, expected, atol=1e-6)
    found, dense = live_sums(trainer), dense_sums(trainer.ref_model, trainer.train_dataset)
    assert found["chosen"] == pytest.approx(dense["chosen"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True, "reference": "cached"}, "sync_ref_model"),
        ({"reference": "adapter_off"}, "no adapter"),
        ({"train": Dataset.from_list(rows()).to_iterable_dataset(), "reference": "cached"}, "streamed"),
        ({"precompute_ref_log_probs": True}, "reference: cached"),
    ],
)
def test_the_trainer_refuses_what_contradicts_the_reference(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **options)


def test_a_policy_that_was_sharded_while_loading_is_loaded_again(tmp_path):
    model = tiny.model(seed=3)
    model.save_pretrained(tmp_path)
    assert frozen_copy(model, {}) is not model
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="give the reference by name"):
        frozen_copy(model, {})
    model.config._name_or_path = str(tmp_path)
    again = frozen_copy(model, {})
    assert not hasattr(next(again.parameters()), "ds_id")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
