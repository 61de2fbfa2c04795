"""What `BinaryFeedbackTrainer` says and refuses before the first step."""

import pytest
from datasets import Dataset

from posttrain.objectives import Loss, declare
from tests import tiny
from tests.trainers.feedback_step import build, rows
from tests.trainers.test_binary_feedback import OBJECTIVES, logged


def test_trl_bakes_no_partners_and_its_settings_stay(tmp_path):
    """Its loss would refuse these settings: single rows, shuffled."""
    trainer = build(tmp_path, "kto", batch=1, accumulation=2, train_sampling_strategy="random")
    assert trainer.calculate_KL is False and trainer.args.loss_type == "kto"
    assert sorted(trainer.train_dataset.column_names) == ["completion_ids", "desirable", "prompt_ids", "row_number"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_class_alone_trains_with_a_warning(tmp_path, caplog, name):
    data = Dataset.from_list([{**row, "label": True} for row in rows()])
    trainer = build(tmp_path, OBJECTIVES[name], data, 4, 2)
    assert "All 8 rows of the train data are desirable: one class alone" in caplog.text
    trainer.train()
    found = logged(trainer)
    assert found["loss"] > 0 and f"{name}/reward_margin" not in found and f"{name}/undesirable_reward" not in found


def test_weights_out_of_balance_are_named_with_ranges_that_are_in_balance(tmp_path, caplog):
    """Five rows against three; TRL's own advice, on its own weights, keeps silent."""
    build(tmp_path, {"name": "kto", "desirable_weight": 2.0, "undesirable_weight": 1.0})
    assert (
        "desirable_weight 2 * 5 desirable rows is 3.33 times undesirable_weight 1 * 3 undesirable rows, and 1 to 1.33 "
        "times is advised; set desirable_weight to 0.6 to 0.8, or undesirable_weight to 2.5 to 3.33." in caplog.text
    )
    assert "we recommend" not in caplog.text
    caplog.clear()
    for weights in ({"desirable_weight": 0.6}, {"desirable_weight": 0.8}, {"undesirable_weight": 1.5}):
        build(tmp_path, {"name": "kto", **weights})
    build(tmp_path, "bco")
    assert "advised" not in caplog.text


@declare(unit="sequences", formula="", paper="")
def reads_mismatched(logratio, mismatched_logratio):
    return Loss(logratio - mismatched_logratio)


def both(logratio, mismatched_logratio):
    return {"shift": logratio.mean() - mismatched_logratio.mean()}


@declare(unit="sequences", formula="", paper="", prepare=both)
def prepares_from_both(logratio, shift):
    return Loss(logratio - shift)


@declare(unit="sequences", formula="", paper="", prepare=lambda logratio: {"shift": logratio.mean()})
def prepares_plainly(logratio, shift):
    return Loss(logratio - shift)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 1}, "all 1; raise one of them"),
        ({"data": Dataset.from_list(rows(1))}, "one row, whose mismatched completion would be its own"),
        ({"train_sampling_strategy": "group_by_length"}, "set it to random or sequential"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is true"),
        ({"loss_type": "apo_zero_unpaired"}, "which `objective` replaces"),
        ({"desirable_weight": 2.0}, "`desirable_weight: 2.0` beside the objective's name"),
        ({"objective": reads_mismatched}, "'mismatched_logratio' in its loss or state"),
        ({"objective": {"name": "kto", "role": "mismatched"}}, "'role: mismatched' in its loss or state"),
        ({"objective": prepares_from_both}, "reads 'logratio' and that of 'prepares_from_both' mismatched"),
        ({"objective": ["kto", prepares_plainly]}, "'prepares_plainly' reads 'logratio' and that of 'kto' mismatched"),
        ({"reference": "cached"}, "mismatched_logratio"),
        ({"data": Dataset.from_list([{**row, "desirable": 1.0} for row in rows()])}, "both `label` and `desirable`"),
        ({"data": Dataset.from_list(tiny.rows())}, "no `label` among its columns"),
        ({"data": Dataset.from_list([{**row, "label": 2} for row in rows()])}, "row 0: label is 2; give true or false"),
        ({"data": Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)}, "take them apart"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_at_the_start(tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        build(tmp_path, **options)


def test_objectives_without_a_baseline_take_steps_of_one_row(tmp_path):
    trainer = build(tmp_path, "bco", Dataset.from_list(rows(1)), batch=1)
    trainer.train()
    assert logged(trainer)["loss"] > 0


def test_labels_may_be_numbers_and_streams_name_the_row(tmp_path):
    numbers = Dataset.from_list([{**row, "label": int(row["label"])} for row in rows()])
    assert build(tmp_path, "kto", numbers).train_dataset["desirable"][:3] == [1.0, 0.0, 0.0]
    wrong = [{**row, "label": None if i == 5 else row["label"]} for i, row in enumerate(rows())]
    with pytest.raises(ValueError, match="the train data, row 5: label is None"):
        build(tmp_path, "kto", Dataset.from_list(wrong).to_iterable_dataset()).train()
