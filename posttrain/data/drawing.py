"""Forget and retain examples drawn together: an item is a row to forget with its share of the rows to retain."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, Sampler

Row = dict[str, Any]
Drawn = tuple[int, tuple[int, ...]]


class DrawingSampler(Sampler[Drawn]):
    """The rows to forget of an epoch, each with the rows to retain that are drawn beside it.

    The retained rows run through permutations of their own, one after another over all epochs, so that each is seen as
    often as any other. What is drawn does not depend on micro-batches or processes.

    Args:
        forget, retain: rows of the two data sets.
        ratio: retained rows for each row to forget; a fraction gives some items one more than others.
        shuffle: a new permutation of the rows to forget each epoch.
        seed: of the permutations.
    """

    def __init__(self, forget: int, retain: int, *, ratio: float = 1.0, shuffle: bool = True, seed: int = 0) -> None:
        self.forget, self.retain, self.ratio = forget, retain, ratio
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose what the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.forget

    def __iter__(self) -> Iterator[Drawn]:
        order = _permutation(self.forget, self.seed + self.epoch) if self.shuffle else list(range(self.forget))
        first = self.epoch * self.forget
        for position, row in enumerate(order, start=first):
            begin, end = int(position * self.ratio), int((position + 1) * self.ratio)
            yield row, tuple(self._retained(draw) for draw in range(begin, end)) if self.retain else ()

    def _retained(self, draw: int) -> int:
        """The row that the whole run's draw of this number takes."""
        round_number, place = divmod(draw, self.retain)
        if getattr(self, "_round", None) != round_number:
            # seeds of their own: never the permutation of the rows to forget
            self._round, self._places = round_number, _permutation(self.retain, 2**31 + self.seed + round_number)
        return self._places[place]


def _permutation(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


class DrawnRows(Dataset[Row]):
    """Rows to forget with their refusals and the retained rows drawn beside them, as `DrawingSampler` names them.

    Args:
        forget: prepared rows.
        retain: prepared rows, or None.
        refusal: prepared rows of the same prompts as ``forget``, in the same order, or None.
        retain_refusal: the same for ``retain``, or None.
        sampler: of these rows.
    """

    def __init__(
        self,
        forget: datasets.Dataset,
        retain: datasets.Dataset | None,
        refusal: datasets.Dataset | None,
        retain_refusal: datasets.Dataset | None,
        sampler: DrawingSampler,
    ) -> None:
        self.parts = {"forget": forget, "refusal": refusal, "retain": retain, "retain_refusal": retain_refusal}
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, drawn: Drawn | int) -> dict[str, list[Row]]:
        return self.__getitems__([drawn])[0]

    def __getitems__(self, several: Sequence[Drawn | int]) -> list[dict[str, list[Row]]]:
        """One dictionary an item, role -> rows; a plain number stands for a row to forget by itself."""
        return [self._item((drawn, ()) if isinstance(drawn, int) else drawn) for drawn in several]

    def _item(self, drawn: Drawn) -> dict[str, list[Row]]:
        row, retained = drawn
        found: dict[str, list[Row]] = {}
        for role, rows in self.parts.items():
            if rows is not None:
                found[role] = [rows[index] for index in (retained if role.startswith("retain") else (row,))]
        return found

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on: accelerate tells the data set where it cannot reach the sampler."""
        self.sampler.set_epoch(epoch)
