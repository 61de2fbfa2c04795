"""A row's partner is the next row of the epoch's order, however accelerate deals the epoch out."""

import pickle

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from posttrain.data.partners import PartnerSampler, StreamWithPartners, WithPartners


def rows(count: int = 7) -> Dataset:
    """Row i has the prompt [i, i] and the completion [i] * (i + 1)."""
    return Dataset.from_list([{"prompt_ids": [i, i], "completion_ids": [i] * (i + 1)} for i in range(count)])


def pairs(batch: list[dict]) -> list[tuple[int, int]]:
    """Which rows a micro-batch holds, and whose completions beside them."""
    return [(row["prompt_ids"][0], row["mismatched_completion_ids"][0]) for row in batch]


def loader(shuffle: bool, rank: int, ranks: int, batch: int = 2, count: int = 7, workers: int = 0, **options):
    """What a rank's data loader becomes in accelerate's hands."""
    sampler = PartnerSampler(count, shuffle=shuffle, seed=3)
    plain = DataLoader(
        WithPartners(rows(count), sampler, None), batch, sampler=sampler, collate_fn=pairs, num_workers=workers
    )
    return prepare_data_loader(plain, num_processes=ranks, process_index=rank, use_seedable_sampler=True, **options)


def epoch_of(loaders, epoch: int) -> list[tuple[int, int]]:
    """The epoch's pairs in global order: rank after rank within each round of micro-batches."""
    for one in loaders:
        one.set_epoch(epoch)
    return [pair for around in zip(*loaders, strict=True) for batch in around for pair in batch]


def successors(order: list[int]) -> list[tuple[int, int]]:
    return [(row, order[(place + 1) % len(order)]) for place, row in enumerate(order)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("ranks", "batch"), [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_partners_do_not_depend_on_the_split(shuffle, ranks, batch):
    loaders = [loader(shuffle, rank, ranks, batch) for rank in range(ranks)]
    orders = []
    for epoch in range(3):
        found = epoch_of(loaders, epoch)
        order = [row for row, _ in found][:7]
        assert sorted(order) == list(range(7))
        # the last round is filled up with the first rows, which keep their partners
        expected = successors(order)
        assert found == (expected + expected)[: len(found)]
        orders.append(order)
    assert (orders[0] == list(range(7))) is not shuffle
    assert len({tuple(order) for order in orders}) == (3 if shuffle else 1)
    assert orders == [list(row for row, _ in epoch_of([loader(shuffle, 0, 1)], epoch)) for epoch in range(3)]


def test_batches_split_between_ranks_keep_their_partners():
    loaders = [loader(True, rank, 2, batch=4, count=8, split_batches=True) for rank in range(2)]
    found = epoch_of(loaders, 1)
    assert found == successors([row for row, _ in found]) and len(found) == 8


@pytest.mark.parametrize("ranks", [1, 2])
def test_skipping_what_was_seen_gives_the_rest_of_that_epoch(ranks):
    """With several ranks accelerate reaches the data set alone, behind two wrappers of the sampler."""
    whole = [loader(True, rank, ranks) for rank in range(ranks)]
    full = epoch_of(whole, 2)
    resumed = [skip_first_batches(loader(True, rank, ranks), 1) for rank in range(ranks)]
    assert epoch_of(resumed, 2) == full[2 * ranks :]


def test_the_order_is_that_of_the_seedable_sampler():
    plain = prepare_data_loader(
        DataLoader(list(range(7)), 2, shuffle=True), use_seedable_sampler=True, data_seed=3, num_processes=1
    )
    plain.set_epoch(4)
    theirs = [row for batch in plain for row in batch.tolist()]
    assert [row for row, _ in epoch_of([loader(True, 0, 1)], 4)] == theirs


def test_workers_read_the_same_pairs():
    assert epoch_of([loader(True, 0, 1, workers=2)], 1) == epoch_of([loader(True, 0, 1)], 1)
    dataset = WithPartners(rows(), PartnerSampler(7, shuffle=True), None)
    again = pickle.loads(pickle.dumps(dataset))
    assert again[(2, 5)] == dataset[(2, 5)] and len(again) == 7


def test_a_partner_s_completion_is_cut_to_the_room_behind_the_prompt():
    dataset = WithPartners(rows(), PartnerSampler(7, shuffle=False), max_length=5)
    (row,) = dataset.__getitems__([(1, 6)])
    assert row["mismatched_completion_ids"] == [6, 6, 6]
    assert row["prompt_ids"] == [1, 1] and row["completion_ids"] == [1, 1]


def stream(count: int = 7) -> IterableDataset:
    return rows(count).to_iterable_dataset()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_s_partner_is_its_next_row(ranks):
    loaders = [
        prepare_data_loader(
            DataLoader(StreamWithPartners(stream(), None), 2, collate_fn=pairs), num_processes=ranks, process_index=rank
        )
        for rank in range(ranks)
    ]
    assert epoch_of(loaders, 0)[:7] == successors(list(range(7)))


def test_a_stream_passes_the_epoch_on_and_may_be_short():
    shuffled = StreamWithPartners(stream().shuffle(seed=1, buffer_size=7), 4)
    seen = []
    for epoch in range(2):
        shuffled.set_epoch(epoch)
        found = list(shuffled)
        order = [row["prompt_ids"][0] for row in found]
        assert pairs(found) == successors(order)
        assert all(len(row["mismatched_completion_ids"]) <= 2 for row in found)
        seen.append(order)
    assert seen[0] != seen[1]
    assert pairs(list(StreamWithPartners(stream(1), None))) == [(0, 0)]
    assert list(StreamWithPartners(stream(1).filter(lambda row: False), None)) == []


def test_lengths_are_the_rows():
    sampler = PartnerSampler(7, shuffle=True)
    assert len(sampler) == len(list(sampler)) == len(WithPartners(rows(), sampler, None)) == 7
