"""The unlearning trainer against dense torch, over splits and ranks, and what it refuses."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F

from posttrain.config import from_tree, resolve
from posttrain.data.overlap import refuse_overlap
from posttrain.objectives import Loss, declare
from posttrain.pipeline import train
from tests import tiny
from tests.trainers.test_gradients import relative_difference
from tests.trainers.unlearning_step import (
    CASES,
    REFUSALS,
    disturb,
    kl,
    length_normalised,
    npo,
    preference,
    refused,
    rows_to_retain,
    trainer,
    two_epochs,
)

ROOT = Path(__file__).parents[2]


def logged(made) -> list[dict]:
    return [entry for entry in made.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole() -> dict:
    """Each case in one piece."""
    return {case: two_epochs(case, 8, 1) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_change_nothing(whole, case):
    split = two_epochs(case, 2, 4)
    assert relative_difference(split["gradients"], whole[case]["gradients"]) < 1e-12
    assert split["dual"] == (whole[case]["dual"] and pytest.approx(whole[case]["dual"], rel=1e-12))


def test_two_processes_change_nothing(whole, tmp_path):
    out = tmp_path / "found.pt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "launch/accelerate/ddp2_cpu.yaml"), str(ROOT / "tests/trainers/unlearning_step.py"), str(out),
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert out.exists(), result.stderr[-4000:]
    for (case, _), found in torch.load(out, weights_only=False).items():
        assert found["processes"] == 2
        assert relative_difference(found["gradients"], whole[case]["gradients"]) < 1e-12
        for mine, theirs in zip(found["logs"], whole[case]["logs"], strict=True):
            names = [name for name in theirs if name.endswith("_loss") or name in ("loss", "dual")]
            # the loss alone is summed up in float32 by transformers
            assert {n: mine[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-6)
        assert found["dual"] == (whole[case]["dual"] and pytest.approx(whole[case]["dual"], rel=1e-12))


def dense_logp(model, row) -> torch.Tensor:
    """(trained tokens, vocabulary) log-probabilities of a prepared row, from whole logits, and its targets."""
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    return logits.log_softmax(-1)[labels != -100], labels[labels != -100]


def drawn_rows(made) -> dict[str, list[dict]]:
    """What the first epoch draws, role after role."""
    items = made.train_dataset.__getitems__(list(made.train_dataset.sampler))
    return {role: [row for item in items for row in item.get(role, ())] for role in items[0]}


def gradients_of(loss, model) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def one_step(made):
    """Draw, differentiate by hand at the disturbed weights, and let the trainer take its step."""
    disturb(made.model)
    before = tiny.model(torch.float64)
    before.load_state_dict(made.model.state_dict())
    made.train()
    return before, tiny.model(torch.float64)


def test_each_side_is_divided_by_its_own_count(tmp_path):
    objective = {"forget": length_normalised, "retain": "nll", "combine": {"sum": {"forget": 0.3, "retain": 1.7}}}
    made = trainer(objective, tmp_path, 2, 4, retain_per_forget=1.5)
    rows = drawn_rows(made)
    assert (len(rows["forget"]), len(rows["retain"])) == (8, 12)
    policy, _ = one_step(made)
    forget = []
    for row in rows["forget"]:
        logp, targets = dense_logp(policy, row)
        forget.append(-2 / 2.5 * F.logsigmoid(-2.5 * logp.gather(-1, targets[:, None]).mean()))
    retain = [F.nll_loss(*dense_logp(policy, row), reduction="none") for row in rows["retain"]]
    sides = torch.stack(forget).mean(), torch.cat(retain).mean()
    expected = gradients_of(0.3 * sides[0] + 1.7 * sides[1], policy)
    assert relative_difference(made.gradients.found, expected) < 1e-12
    assert logged(made)[0]["forget_loss"] == pytest.approx(0.3 * sides[0].item(), rel=1e-12)
    for role, several in rows.items():
        found = [dense_logp(policy, row) for row in several]
        known = torch.cat([logp.gather(-1, targets[:, None])[:, 0] for logp, targets in found]).exp().mean()
        assert logged(made)[0][f"{role}/mean_target_probability"] == pytest.approx(known.item(), rel=1e-9)
    assert logged(made)[0]["retain_loss"] == pytest.approx(1.7 * sides[1].item(), rel=1e-12)


def test_kl_and_npo_are_measured_against_the_model_before_unlearning(tmp_path):
    """KL on the retained answers' tokens alone: none of the prompt, of padding or of the rows to forget."""
    made = trainer({"forget": npo, "retain": kl}, tmp_path)
    rows = drawn_rows(made)
    policy, reference = one_step(made)
    forget, retain = [], []
    for row in rows["forget"]:
        (logp, targets), (base, _) = dense_logp(policy, row), dense_logp(reference, row)
        ratio = (logp - base).gather(-1, targets[:, None]).sum()
        forget.append(-20 * F.logsigmoid(-0.1 * ratio))
    for row in rows["retain"]:
        (logp, _), (base, _) = dense_logp(policy, row), dense_logp(reference, row)
        retain.append((base.exp() * (base - logp)).sum(-1))
    sides = torch.stack(forget).mean(), torch.cat(retain).mean()
    assert relative_difference(made.gradients.found, gradients_of(sum(sides), policy)) < 1e-12
    assert logged(made)[0]["retain_loss"] == pytest.approx(sides[1].item(), rel=1e-9)


def test_the_policy_without_its_adapter_serves_as_well_as_a_copy(tmp_path):
    found = {}
    for reference in ("auto", "model"):
        options = {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "reference": reference}
        model = tiny.model(torch.float64)
        made = trainer({"forget": npo, "retain": kl}, tmp_path, model=model, **options)
        disturb(made.model)
        made.train()
        found[made.reference] = made.gradients.found
    assert found.keys() == {"adapter_off", "model"}
    assert relative_difference(found["adapter_off"], found["model"]) < 1e-12


@pytest.mark.parametrize("shuffle", [False, True])
def test_refusals_answer_the_prompts_to_forget_and_depend_on_the_seed_alone(tmp_path, shuffle):
    def texts(**options):
        made = trainer(
            {"forget": preference, "retain": "nll"}, tmp_path, options={"shuffle_dataset": shuffle, **options}
        )
        rows = drawn_rows(made)
        pairs = zip(rows["forget"], rows["refusal"], strict=True)
        decoded = []
        for forget, refusal in pairs:
            prompt, again = (
                [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
                for row in (forget, refusal)
            )
            assert prompt == again
            answer = tiny.tokenizer().decode([t for t in refusal["labels"] if t >= 0], skip_special_tokens=True)
            decoded.append((prompt, answer.replace(" ", "")))
        assert {answer for _, answer in decoded} <= set(REFUSALS)
        return sorted(decoded)

    assert texts() == texts(data_seed=42)
    assert texts() != texts(data_seed=1)


def test_a_term_of_the_refusals_trains_their_tokens(tmp_path):
    made = trainer({"forget": refused}, tmp_path)
    rows = drawn_rows(made)
    policy, _ = one_step(made)
    loss = torch.cat([F.nll_loss(*dense_logp(policy, row), reduction="none") for row in rows["refusal"]]).mean()
    assert relative_difference(made.gradients.found, gradients_of(loss, policy)) < 1e-12


def dual_by_hand(entries, epsilon, step, initial, warmup, per_epoch) -> list[float]:
    value, found = initial, []
    for number, entry in enumerate(entries):
        found.append(value)
        if number / per_epoch >= warmup:
            value = max(0.0, value + step * (entry["retain_loss"] - epsilon))
    return found


@pytest.mark.parametrize("epsilon", [3.0, 9.0])
def test_the_dual_variable_moves_once_a_step_after_the_warm_up(tmp_path, epsilon):
    settings = {"epsilon": epsilon, "step": 0.6, "initial": 1.0, "warmup_epochs": 1}
    objective = {"forget": npo, "retain": "nll", "combine": {"constraint": settings}}
    made = trainer(objective, tmp_path, 2, 2, options={"num_train_epochs": 3, "learning_rate": 0.01})
    made.train()
    entries = logged(made)
    expected = dual_by_hand(entries, epsilon, 0.6, 1.0, 1, per_epoch=2)
    assert [entry["dual"] for entry in entries] == pytest.approx(expected, rel=1e-12)
    assert expected[:3] == [1.0] * 3 and expected[3] != 1.0 and (epsilon < 9) == (expected[-1] > 0)
    for entry in entries:
        assert entry["loss"] == pytest.approx(entry["forget_loss"] + entry["dual"] * entry["retain_loss"], rel=1e-6)


def test_a_step_without_a_row_to_retain_measures_no_retain_loss(tmp_path):
    """One in four steps has one; a loss of 0 in the others would say that the constraint holds."""
    objective = {"forget": npo, "retain": "nll", "combine": {"constraint": {"epsilon": 3.0, "step": 0.5}}}
    made = trainer(objective, tmp_path, 1, 1, retain_per_forget=0.25, options={"learning_rate": 1e-3})
    made.train()
    entries = logged(made)
    assert ["retain_loss" in entry for entry in entries] == [False, False, False, True] * 2
    expected = 1.0 + 0.5 * (entries[3]["retain_loss"] - 3.0)
    assert [entry["dual"] for entry in entries] == pytest.approx([1.0] * 4 + [expected] * 4, rel=1e-12)
    # a loss that nothing is trained on is no step
    value = float(made.dual.value)
    with torch.no_grad():
        made.compute_loss(made.model, next(iter(made.get_train_dataloader())))
    assert float(made.dual.value) == value


def test_a_step_that_broke_off_leaves_nothing_behind(tmp_path):
    objective = {"forget": npo, "retain": "nll", "combine": {"constraint": {"epsilon": 3.0, "step": 0.5}}}
    made = trainer(objective, tmp_path, 4, 2)
    inputs = list(made.get_train_dataloader())
    counts = made._get_num_items_in_batch(inputs, made.accelerator.device)
    made.compute_loss(made.model, inputs[0], num_items_in_batch=counts)
    made.train()
    (entry,) = logged(made)
    assert entry["loss"] == pytest.approx(entry["forget_loss"] + entry["retain_loss"], rel=1e-6)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Two and two steps, from the middle of the second epoch on, against four."""
    settings = {"epsilon": 3.0, "step": 0.5, "initial": 1.0, "warmup_epochs": 1}
    objective = {"forget": npo, "retain": "nll", "combine": {"constraint": settings}}
    options = {"max_steps": 5, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 3}

    def build(name):
        return trainer(objective, str(tmp_path / name), 2, 2, options=options, retain_per_forget=1.5)

    straight = build("run")
    straight.train()
    resumed = build("again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    saved = json.loads((tmp_path / "run/checkpoint-3/objective_state.json").read_text())
    assert saved["dual_variable"]["value"] == pytest.approx(logged(straight)[3]["dual"], rel=1e-12)
    names = ("dual", "forget_loss", "retain_loss")
    for mine, theirs in zip(logged(resumed)[-2:], logged(straight)[-2:], strict=True):
        assert [mine[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-12)
    for name, parameter in straight.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name])
    other = trainer({"forget": npo, "retain": "nll"}, str(tmp_path / "sum"), 2, 2, options=options)
    other.train()
    with pytest.raises(ValueError, match="no dual variable"):
        build("third").train(resume_from_checkpoint=str(tmp_path / "sum/checkpoint-3"))


def test_a_column_of_the_rows_to_forget_reaches_its_term(tmp_path):
    @declare(unit="sequences", formula="", paper="")
    def scored(sum_logp, score):
        return Loss(sum_logp * score)

    @declare(unit="sequences", formula="", paper="")
    def both(logratio, score, second):
        return Loss(logratio * score * second)

    made = trainer({"forget": scored, "retain": "nll"}, tmp_path)
    made.train()
    rows = Dataset.from_list([{**row, "second": 1.0} for row in tiny.rows()])
    bare = Dataset.from_list([{k: row[k] for k in ("prompt", "completion")} for row in rows_to_retain()])
    trainer({"forget": both, "retain": "nll"}, tmp_path, forget_dataset=rows, retain_dataset=bare).train()
    with pytest.raises(ValueError, match=r"retain data .*'score'"):
        trainer({"forget": npo, "retain": scored}, tmp_path, retain_dataset=bare)


def test_rows_in_both_data_sets_are_counted_and_refused_or_allowed(tmp_path, caplog):
    retain = Dataset.from_list([*rows_to_retain(), *tiny.rows()[2:4]])
    with pytest.raises(ValueError, match=r"2 rows of the forget data .*rows 2, 3;.*allow_overlap"):
        trainer({"forget": npo, "retain": "nll"}, tmp_path, retain_dataset=retain)
    with caplog.at_level(logging.WARNING):
        trainer({"forget": npo, "retain": "nll"}, tmp_path, retain_dataset=retain, allow_overlap=True)
    assert "2 rows of the forget data" in caplog.text


STREAM = Dataset.from_list(rows_to_retain()).to_iterable_dataset()
REFUSED = {
    "no rows to forget": ({"forget_dataset": Dataset.from_list([])}, {}, "forget data is empty"),
    "no rows to retain": ({"retain_dataset": Dataset.from_list([])}, {}, "retain data is empty"),
    "none at all to forget": ({"forget_dataset": None}, {}, "forget_dataset is missing"),
    "none at all to retain": ({"retain_dataset": None}, {}, "retain"),
    "no refusals": ({"refusals": []}, {}, "refusal"),
    "a share of none": ({"retain_per_forget": 0.0}, {}, "retain_per_forget is 0.0"),
    "no reference": ({"reference": "none"}, {}, "reference"),
    "a cached reference": ({"reference": "cached"}, {}, "reference is cached, which cannot serve here: the objective "),
    "a stream": ({"retain_dataset": STREAM}, {}, "the retain data is a IterableDataset.*data.retain.streaming"),
    "questions": (
        {"forget_dataset": Dataset.from_list([{"question": "a", "answer": "b"}])},
        {},
        r"forget data has the columns \['answer', 'question'\]; give prompt and completion",
    ),
    "no adapter": ({"reference": "adapter_off"}, {}, "no adapter"),
    "a teacher": ({"teacher": tiny.model(torch.float64)}, {}, "teacher"),
    "packing": ({}, {"packing": True, "max_length": 32}, "packing"),
    "an order by length": ({}, {"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    "evaluation": ({"eval_dataset": Dataset.from_list(tiny.rows())}, {}, "no evaluation loss"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(tmp_path, what):
    given, options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        trainer({"forget": preference, "retain": kl}, tmp_path, options=options, **given)


def test_a_warm_up_that_training_does_not_outlast_is_told(tmp_path, caplog):
    objective = {"forget": npo, "retain": "nll", "combine": {"constraint": {"epsilon": 1.0, "warmup_epochs": 2}}}
    for epochs, told in ((2, True), (3, False)):
        caplog.clear()
        made = trainer(objective, tmp_path, options={"num_train_epochs": epochs})
        assert ("warmup_epochs is 2: the dual variable stays at 1" in caplog.text) is told
        made.train()
        assert (float(made.dual.value) == 1.0) is told


def test_rows_that_are_cut_are_counted(tmp_path, caplog):
    lengths = [len(row["prompt"]) + len(row["completion"]) + 1 for row in tiny.rows()]
    limit = sorted(lengths)[-2]
    trainer({"forget": "simnpo"}, tmp_path, options={"max_length": limit}, retain_dataset=None)
    reached = sum(length >= limit for length in lengths)
    assert f"{reached} of 8 rows of the forget data reach trainer.max_length ({limit} tokens)" in caplog.text
    caplog.clear()
    trainer({"forget": "simnpo"}, tmp_path, options={"max_length": max(lengths) + 1}, retain_dataset=None)
    assert "max_length" not in caplog.text


def test_there_is_no_evaluation_loss(tmp_path):
    with pytest.raises(ValueError, match="unlearning has no evaluation loss"):
        trainer({"forget": "simnpo"}, tmp_path).evaluate(Dataset.from_list(tiny.rows()))


def test_rows_without_a_text_to_train_on_are_compared_whole():
    rows = [Dataset.from_list([{"question": q, "answer": "b"}]) for q in "aac"]
    assert refuse_overlap(rows[0], rows[1], allowed=True) == 1 and refuse_overlap(rows[0], rows[2], allowed=False) == 0


def test_rows_come_in_their_order_where_that_is_asked_for(tmp_path):
    made = trainer({"forget": npo}, tmp_path, options={"train_sampling_strategy": "sequential"})
    assert [row for row, _ in made.train_dataset.sampler] == list(range(8))


def test_a_yaml_run(tmp_path):
    for name, rows in (("forget", tiny.rows()), ("retain", rows_to_retain())):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "refusal.jsonl").write_text('"I do not know."\n"No idea."\n')
    tree = {
        "method": "unlearning",
        "objective": {
            "forget": "tests.trainers.unlearning_step:preference",
            "retain": "nll",
            "combine": {"constraint": {"epsilon": 0.3, "step": 1.0}},
        },
        "data": {
            **{name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("forget", "retain", "refusal")},
            "retain_per_forget": 2,
        },
        "trainer": {"output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 4,
                    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
    }  # fmt: skip
    outcome = train(resolve(from_tree(tree)))
    entries = [json.loads(line) for line in outcome.paths["metrics"].read_text().splitlines()]
    steps = [entry for entry in entries if "dual" in entry]
    assert len(steps) == 2 and steps[1]["dual"] == pytest.approx(1.0 + steps[0]["retain_loss"] - 0.3, rel=1e-6)
    assert (tmp_path / "run/model.safetensors").exists()
