"""A row's partner: the next row in an epoch's order, however that is split over micro-batches and processes."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler

from posttrain.data.preference_preparation import PROMPT

COMPLETION, MISMATCHED = "completion_ids", "mismatched_completion_ids"

Row = dict[str, Any]


class PartnerSampler(Sampler[tuple[int, int]]):
    """The rows of an epoch in order, each with its partner: the next one, and the first for the last.

    Pairs, unlike rows, keep their partner when accelerate deals batches out to processes, repeats the first ones to
    fill up the last, or skips those that an interrupted run has seen.

    Args:
        size: rows of the data set.
        shuffle: a new permutation each epoch, the one that accelerate's seedable sampler draws; False keeps the order.
        seed: of the permutations.
    """

    def __init__(self, size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration."""
        self.epoch = epoch

    def rows(self) -> list[int]:
        """The epoch's order."""
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = self.rows()
        return zip(order, order[1:] + order[:1], strict=True)


class WithPartners(Dataset[Row]):
    """Rows by (row, partner), as `PartnerSampler` names them.

    Args:
        rows: with ``prompt_ids`` and ``completion_ids``.
        sampler: of the same rows.
        max_length: tokens of a prompt and its partner's completion, which is cut at the end; None for no limit.
    """

    def __init__(self, rows: datasets.Dataset, sampler: PartnerSampler, max_length: int | None) -> None:
        self.rows, self.sampler, self.max_length = rows, sampler, max_length
        self._completions = rows.select_columns([COMPLETION])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pair: tuple[int, int]) -> Row:
        return self.__getitems__([pair])[0]

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> list[Row]:
        """The rows of a micro-batch in two reads."""
        own, partners = zip(*pairs, strict=True)
        rows, others = self.rows.__getitems__(list(own)), self._completions.__getitems__(list(partners))
        return [_joined(row, partner, self.max_length) for row, partner in zip(rows, others, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on: accelerate tells the data set where it cannot reach the sampler."""
        self.sampler.set_epoch(epoch)


class StreamWithPartners(IterableDataset[Row]):
    """The rows of a stream, each with the next as its partner, and the last with the first.

    Each process reads the whole stream and keeps its share, so that partners do not depend on their number.

    Args:
        rows, max_length: as of `WithPartners`.
    """

    def __init__(self, rows: datasets.IterableDataset, max_length: int | None) -> None:
        self.rows, self.max_length = rows, max_length

    def __iter__(self) -> Iterator[Row]:
        first: Row | None = None
        row: Row = {}
        for partner in self.rows:
            if first is None:
                first = partner
            else:
                yield _joined(row, partner, self.max_length)
            row = partner
        if first is not None:
            yield _joined(row, first, self.max_length)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the stream, which may shuffle by it."""
        self.rows.set_epoch(epoch)


def _joined(row: Row, partner: Row, max_length: int | None) -> Row:
    """A row with its partner's completion, cut to what its own prompt leaves room for."""
    room = None if max_length is None else max_length - len(row[PROMPT])
    return {**row, MISMATCHED: partner[COMPLETION][:room]}
