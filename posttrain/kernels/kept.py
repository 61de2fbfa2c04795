"""Tiles of logits: computed, or held from the forward on as far as a budget of memory goes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.kernels.projection import Columns, Projection
from posttrain.kernels.tiling import Workspace, slices, tile_shape


class Models(NamedTuple):
    """Student and, where a divergence is asked for, teacher."""

    student: Projection
    teacher: Projection | None

    @property
    def tile_shape(self) -> tuple[int, int]:
        """(tokens, vocabulary entries) of a tile."""
        student = self.student
        return tile_shape(student.tokens, student.vocab, student.width, student.tensors.hidden.device)

    def selected(self, index: Int[Tensor, " rows"]) -> "Models":
        """Both at some of the tokens."""
        return Models(self.student.selected(index), None if self.teacher is None else self.teacher.selected(index))


class KeptTiles:
    """All tokens' logits at the first vocabulary entries, a tensor (tokens, columns) per slice of the vocabulary.

    Args:
        tiles: (which model, start of the slice) -> its logits. Once complete they are read, never written: a second
            backward through the same graph finds them as they were.
        complete: whether the forward has filled them.
    """

    def __init__(self, tiles: dict[tuple[str, int], Tensor], *, complete: bool) -> None:
        self.tiles = tiles
        self.complete = complete

    @classmethod
    def within(cls, budget: int, models: Models) -> "KeptTiles":
        """Room for as many slices as fit into `budget` bytes, to be filled by the forward."""
        student = models.student
        device, dtype = student.tensors.hidden.device, student.settings.result
        tiles: dict[tuple[str, int], Tensor] = {}
        names = ("student",) if models.teacher is None else ("student", "teacher")
        for columns in slices(student.vocab, models.tile_shape[1]):
            shape = (student.tokens, columns.stop - columns.start)
            budget -= len(names) * shape[0] * shape[1] * dtype.itemsize
            if budget < 0:
                break
            for name in names:
                tiles[name, columns.start] = torch.empty(shape, dtype=dtype, device=device)
        return cls(tiles, complete=False)

    @classmethod
    def of(cls, names: Sequence[tuple[str, int]], tensors: Sequence[Tensor]) -> "KeptTiles":
        """Complete ones, from the keys and values of `tiles`."""
        return cls(dict(zip(names, tensors, strict=True)), complete=True)

    @property
    def columns_size(self) -> int | None:
        """Vocabulary entries of a slice; None where nothing is held."""
        return next((z.shape[1] for z in self.tiles.values()), None)


class Tiles:
    """Tiles of one model's logits; the memory of a tile is the next one's.

    Args:
        name: of the model in `kept`.
        projection: the model at all tokens, or at those of `index`.
        shape: of the largest tile.
        kept: asked first; filled where it is not complete.
        index: which of all tokens the projection is about; None for all.
    """

    def __init__(
        self,
        name: str,
        projection: Projection,
        shape: tuple[int, int],
        kept: KeptTiles,
        index: Int[Tensor, " selected"] | None = None,
    ) -> None:
        self.name, self.projection, self.kept, self.index = name, projection, kept, index
        device = projection.tensors.hidden.device
        self.workspace = Workspace(shape[0] * shape[1], projection.settings.result, device)

    def tile(self, rows: slice, operands: Columns, start: int) -> Float[Tensor, "rows columns"]:
        """z of some tokens at the vocabulary entries from `start` on, to be overwritten by the caller."""
        out = self.blank(rows, operands)
        held = self.kept.tiles.get((self.name, start))
        if held is None or not self.kept.complete:
            z_NV = self.projection.logits(self.projection.rows(rows), operands, out)
            if held is not None:
                held[rows] = z_NV
            return z_NV
        if self.index is None:
            return out.copy_(held[rows])
        return torch.index_select(held, 0, self.index[rows], out=out)

    def blank(self, rows: slice, operands: Columns) -> Float[Tensor, "rows columns"]:
        """Memory of the tile's shape, holding anything."""
        return self.workspace.tile(rows.stop - rows.start, operands.weight_VD.shape[0])
