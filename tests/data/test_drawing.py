"""What is drawn together, and that it is the run's and not the batches'."""

from collections import Counter

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader

from posttrain.config import DataSource
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.drawing import DrawingSampler, DrawnRows
from posttrain.data.refusals import read_refusals, with_refusals
from posttrain.data.unlearning_collation import UnlearningCollator


def drawn(sampler, epochs):
    items = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        items.append(list(sampler))
    return items


@pytest.mark.parametrize("ratio", [0.5, 0.29, 1.0, 3.0, 7.3])
def test_every_row_is_forgotten_once_an_epoch_and_retained_as_often_as_any_other(ratio):
    epochs = drawn(DrawingSampler(10, 7, ratio=ratio, seed=3), 20)
    for items in epochs:
        assert sorted(row for row, _ in items) == list(range(10))
        assert {len(retained) for _, retained in items} <= {int(ratio), int(ratio) + 1}
    retained = [row for items in epochs for _, several in items for row in several]
    assert len(retained) == int(200 * ratio)
    counts = Counter(retained)
    assert len(counts) == 7 and max(counts.values()) - min(counts.values()) <= 1
    rounds = [retained[start : start + 7] for start in range(0, len(retained) - 6, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds) and (len(rounds) < 2 or rounds[0] != rounds[1])


def test_the_order_depends_on_seed_and_epoch_alone():
    first, second = drawn(DrawingSampler(10, 7, ratio=1.5, seed=3), 2)
    assert first != second and drawn(DrawingSampler(10, 7, ratio=1.5, seed=4), 1)[0] != first
    late = DrawingSampler(10, 7, ratio=1.5, seed=3)
    late.set_epoch(1)
    assert list(late) == second, "a resumed run draws what the first one would have drawn"
    in_order = DrawingSampler(10, 0, shuffle=False)
    assert list(in_order) == [(row, ()) for row in range(10)]
    same = drawn(DrawingSampler(7, 7, seed=3), 1)[0]
    assert [row for row, _ in same] != [several[0] for _, several in same], "two permutations"


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_micro_batches_and_processes_share_out_the_same_items(batch):
    sampler = DrawingSampler(8, 5, ratio=1.5, seed=1)
    whole = list(sampler)
    parts = [BatchSamplerShard(BatchSampler(sampler, batch, False), 2, process) for process in (0, 1)]
    shared = [item for batches in zip(*parts, strict=True) for items in batches for item in items]
    assert shared == whole


def rows(prefix, count):
    return Dataset.from_list(
        [
            {"input_ids": [prefix, 3, 4 + i, 9], "labels": [-100, -100, 4 + i, 9], ROW_NUMBER: i, "score": float(i)}
            for i in range(count)
        ]
    )


def test_a_batch_has_its_roles_one_after_another():
    sampler = DrawingSampler(4, 3, ratio=0.5, shuffle=False)
    data = DrawnRows(rows(10, 4), rows(20, 3), rows(30, 4), None, sampler)
    collator = UnlearningCollator(pad_token_id=0, columns=("score",), template=(7, 8))
    loader = DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collator)
    for start, batch in zip((0, 2), loader, strict=True):
        side = batch["side"]
        assert batch["input_ids"][:, 0].tolist() == [10, 10, 30, 30, 20]
        assert side.batch_row.tolist() == [0, 1, 0, 1, 1] and side.rows == 2
        assert side.row_number.tolist()[:4] == [start, start + 1] * 2
        assert {role: side.size("sequences", role) for role in side.roles} == {"forget": 2, "refusal": 2, "retain": 1}
        assert torch.equal(side.of("forget").targets, side.of("refusal").targets)
        assert side.token_columns["teacher_ids"][:, 0].tolist() == [7, 8] * 5
        ids = batch["input_ids"].flatten()
        assert torch.equal(ids[side.target_index + 1], side.targets)


def test_a_pad_token_that_also_ends_turns_hides_no_real_one():
    """open-unlearning masks by `ids != pad`, where pad may be the end of a turn: within the prompt, and as a target."""
    end = 9
    row = {"input_ids": [1, end, 2, 3, end], "labels": [-100, -100, -100, 3, end], ROW_NUMBER: 0}
    longer = {"input_ids": [1, 2, 4, 5, 6, end, end], "labels": [-100, -100, 4, 5, 6, end, end], ROW_NUMBER: 1}
    batch = UnlearningCollator(pad_token_id=end)([{"forget": [row]}, {"forget": [longer]}])
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert batch["side"].targets.tolist() == [3, end, 4, 5, 6, end, end]


def turn(role, content):
    return {"role": role, "content": content}


def test_refusals_are_drawn_by_seed_in_the_order_of_the_rows_wanted():
    given = Dataset.from_list(
        [{"prompt": f"q{i}", "completion": f"{' ' if i % 2 else ''}a{i}", ROW_NUMBER: i} for i in range(6)]
    )
    numbers = [5, 0, 3]
    found = with_refusals(given, numbers, ["no", "never"], seed=0)
    assert found["prompt"] == ["q5", "q0", "q3"]
    assert [text[0] == " " for text in found["completion"]] == [True, False, True]
    assert {text.strip() for text in found["completion"]} <= {"no", "never"}
    assert found["completion"] == with_refusals(given, numbers, ["no", "never"], seed=0)["completion"]
    whole = with_refusals(given, range(6), ["no", "never"], seed=0)["completion"]
    assert found["completion"] == [whole[number] for number in numbers], "a row keeps its refusal among others"
    many = [with_refusals(given, range(6), ["no", "never"], seed=seed)["completion"] for seed in range(5)]
    assert len(set(map(tuple, many))) > 1
    chat = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
                ROW_NUMBER: 0,
            }
        ]
    )
    assert with_refusals(chat, [0], ["no"], seed=0)["completion"] == [[turn("assistant", "no")]]
    with pytest.raises(ValueError, match="no text"):
        with_refusals(given, numbers, [], seed=0)
    with pytest.raises(ValueError, match="no `prompt`"):
        with_refusals(given.remove_columns("prompt"), numbers, ["no"], seed=0)


def test_refusals_are_read_from_lines_and_from_columns(tmp_path):
    lines = {
        "a.txt": "I do not know.\n\nNo idea.\n",
        "b.jsonl": '"I do not know."\n"No idea."\n',
        "c.jsonl": '{"text": "I do not know."}\n{"text": "No idea."}\n',
        "d.jsonl": "I do not know.\nNo idea.\n",
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
        assert read_refusals(DataSource(path=str(tmp_path / name))) == ["I do not know.", "No idea."]
    (tmp_path / "e.jsonl").write_text('{"one": "a", "two": "b"}\n')
    with pytest.raises(ValueError, match=r"data.refusal has the columns \['one', 'two'\]"):
        read_refusals(DataSource(path=str(tmp_path / "e.jsonl")))
