"""Teacher top-k columns against the teacher's own logits, and training on them."""

import json

import pytest
import torch
from datasets import Dataset

from posttrain.annotation import annotate_teacher_topk, teacher_topk, write
from posttrain.config import from_tree
from posttrain.data.collation import CompletionCollator
from posttrain.modeling import attach
from tests import tiny

ROWS = [
    {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
    {"input_ids": [7, 8], "labels": [-100, 8]},
    {"input_ids": [9, 10, 11], "labels": [9, 10, 11]},
]


def test_entries_stand_beside_the_token_they_speak_of():
    model = tiny.model().eval()
    attach(model)
    found = teacher_topk(
        model, Dataset.from_list(ROWS), CompletionCollator(pad_token_id=0), k=3, batch_size=2, progress=False
    )
    for row in found:
        logp = torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0].double(), -1)
        for position, (ids, values) in enumerate(zip(row["teacher_ids"], row["teacher_ids_logp"], strict=True)):
            if position == 0 or row["labels"][position] == -100:
                assert ids == [] and values == []
                continue
            expected = logp[position - 1].topk(3)
            assert ids == expected.indices.tolist()
            assert torch.allclose(torch.tensor(values, dtype=torch.float64), expected.values, atol=1e-5)


def test_k_is_bounded_by_the_vocabulary():
    model = tiny.model()
    attach(model)
    with pytest.raises(ValueError, match=r"annotation.k is 99; give a number between 1 and"):
        teacher_topk(model, Dataset.from_list(ROWS), CompletionCollator(pad_token_id=0), k=99)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_are_never_overwritten(tmp_path, suffix):
    path = write(Dataset.from_list(ROWS), tmp_path / f"rows.{suffix}", {"k": 3})
    assert json.loads((tmp_path / f"rows.{suffix}.about.json").read_text()) == {"k": 3}
    with pytest.raises(FileExistsError, match="exists already"):
        write(Dataset.from_list(ROWS), path, {})
    with pytest.raises(ValueError, match=r"ends in \.jsonl or \.parquet"):
        write(Dataset.from_list(ROWS), tmp_path / "rows.csv", {})


def saved(folder, seed):
    tiny.model(seed=seed).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_from_a_configuration_to_a_step_on_the_annotated_rows(tmp_path):
    from posttrain import pipeline
    from posttrain.config import resolve

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows()))
    student, teacher = saved(tmp_path / "student", 0), saved(tmp_path / "teacher", 1)
    tree = {
        "model": {"name_or_path": student},
        "teacher": {"name_or_path": teacher},
        "data": {"train": {"path": str(rows)}},
        "annotation": {"output": str(tmp_path / "annotated.jsonl"), "k": 4},
        "trainer": {"output_dir": str(tmp_path / "a"), "use_cpu": True, "bf16": False},
    }
    written = annotate_teacher_topk(resolve(from_tree(tree)))
    annotated = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["score"] for row in annotated] == [row["score"] for row in tiny.rows()]
    assert all(len(row["teacher_ids"]) == len(row["input_ids"]) for row in annotated)
    training = {
        **tree,
        "teacher": None,
        "data": {"train": {"path": str(written)}},
        "objective": {"name": "logits_finetuning", "alpha": 0.5},
        "trainer": {
            **tree["trainer"],
            "max_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
        },
    }
    outcome = pipeline.train(resolve(from_tree(training)))
    metrics = [json.loads(line) for line in outcome.paths["metrics"].read_text().splitlines()]
    assert metrics[0]["loss"] > 0


def test_skipped_rows_shift_nothing(tmp_path):
    """One row without a completion in the middle, one cut to nothing at the end."""
    from posttrain.config import resolve

    rows = [{**row, "id": index} for index, row in enumerate(tiny.rows(6))]
    rows[2]["completion"] = ""
    rows[5]["prompt"] = "a" * 40
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = saved(tmp_path / "model", 0)
    tree = {
        "model": {"name_or_path": model},
        "teacher": {"name_or_path": model},
        "data": {"train": {"path": str(tmp_path / "rows.jsonl")}},
        "annotation": {"output": str(tmp_path / "annotated.jsonl")},
        "trainer": {"use_cpu": True, "bf16": False, "max_length": 20},
    }
    written = annotate_teacher_topk(resolve(from_tree(tree)))
    annotated = [json.loads(line) for line in written.read_text().splitlines()]
    assert [row["id"] for row in annotated] == [0, 1, 3, 4]
    tokenizer = tiny.tokenizer()
    for row in annotated:
        text = rows[row["id"]]["prompt"] + rows[row["id"]]["completion"]
        assert tokenizer.decode(row["input_ids"]).replace(" ", "").removesuffix("<eos>") == text


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    student = saved(tmp_path / "student", 0)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["extra"])
    tiny.model().save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    tree = {
        "model": {"name_or_path": student},
        "teacher": {"name_or_path": str(tmp_path / "teacher")},
        "data": {"train": {"path": "rows.jsonl"}},
        "annotation": {"output": str(tmp_path / "out.jsonl")},
    }
    with pytest.raises(ValueError, match="another vocabulary"):
        annotate_teacher_topk(from_tree(tree))
    with pytest.raises(ValueError, match="teacher is missing"):
        annotate_teacher_topk(from_tree({**tree, "teacher": None}))
