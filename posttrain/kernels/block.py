"""Some tokens with their full rows of logits, of which the gradient is formed while they are still in hand.

Suffixes: N tokens of a block, V vocabulary entries of a tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from posttrain.kernels.accumulation import State
from posttrain.kernels.checks import Query
from posttrain.kernels.coefficients import coefficients
from posttrain.kernels.gradients import Gradients, RowSums
from posttrain.kernels.kept import Models
from posttrain.kernels.operations import new_accumulator, new_tile_gradient
from posttrain.kernels.parallel import merge_over_ranks, sum_over_ranks
from posttrain.kernels.passes import live_rows
from posttrain.kernels.projection import Projection, Rows
from posttrain.kernels.tiling import Workspace, block_shape, slices


@dataclass
class BlockMemory:
    """Memory that every block uses in turn.

    Args:
        shape: (tokens, vocabulary entries) of a block's tiles; together they cover the vocabulary.
        student, teacher: of full rows.
        scratch: of a tile each, for torch, which overwrites a tile that it reads.
    """

    shape: tuple[int, int]
    student: Workspace
    teacher: Workspace | None
    scratch: Workspace
    teacher_scratch: Workspace | None

    @classmethod
    def of(cls, models: Models, budget: int | None) -> "BlockMemory":
        student, teacher = models
        device, dtype = student.tensors.hidden.device, student.settings.result
        count = 1 if teacher is None else 2
        # By the whole vocabulary, so that ranks with slices of different sizes still have the same blocks.
        vocab, width = student.whole_vocab, student.width
        rows, columns = block_shape(student.tokens, vocab, width, device, models=count, budget=budget)
        shape = rows, min(columns, student.vocab)

        def space(columns: int) -> Workspace:
            return Workspace(shape[0] * columns, dtype, device)

        full, tile = student.vocab, shape[1]
        return cls(
            shape,
            space(full),
            None if teacher is None else space(full),
            space(tile),
            None if teacher is None else space(tile),
        )


class Block:
    """Computes the logits of `rows`, and the teacher's."""

    def __init__(self, models: Models, query: Query, rows: slice, memory: BlockMemory) -> None:
        self.models, self.query, self.rows, self.memory = models, query, rows, memory
        self.count = rows.stop - rows.start
        student, teacher = models
        self.columns = list(slices(student.vocab, memory.shape[1]))
        self.tiles = self._logits(student, memory.student)
        self.teacher_tiles = None
        if teacher is not None and memory.teacher is not None:
            self.teacher_tiles = self._logits(teacher, memory.teacher)

    def _logits(self, projection: Projection, workspace: Workspace) -> list[Float[Tensor, "rows columns"]]:
        operands = projection.rows(self.rows)
        tiles = []
        for columns in self.columns:
            out = workspace.tile(self.count, columns.stop - columns.start, start=self.count * columns.start)
            tiles.append(projection.logits(operands, projection.columns(columns), out))
        return tiles

    def _copies(self, number: int) -> tuple[Tensor, Tensor | None]:
        """A tile and the teacher's, to be read once."""
        if self.query.backend == "triton":
            return self.tiles[number], None if self.teacher_tiles is None else self.teacher_tiles[number]

        def copy(tile: Tensor, scratch: Workspace) -> Tensor:
            return scratch.tile(*tile.shape).copy_(tile)

        z_NV = copy(self.tiles[number], self.memory.scratch)
        if self.teacher_tiles is None or self.memory.teacher_scratch is None:
            return z_NV, None
        return z_NV, copy(self.teacher_tiles[number], self.memory.teacher_scratch)

    def collect(self, logit_sum: Float[Tensor, " rows"] | None) -> State:
        """The sums over the vocabulary; the logits stay. `logit_sum` is that of z, where it is known already."""
        query = self.query if logit_sum is None else self.query.without("mean_logit")
        student = self.models.student
        accumulator = new_accumulator(query, self.memory.student.memory.dtype)
        for number, columns in enumerate(self.columns):
            accumulator.update(*self._copies(number), student.start + columns.start)
        state = accumulator.state() | ({} if logit_sum is None else {"sum": logit_sum})
        state = merge_over_ranks(state, student.settings.shard, query.k)
        if "jsd" in query.needed:
            if student.settings.shard is not None:
                accumulator.adopt(state)
            for number in range(len(self.columns)):
                z_NV, teacher_z_NV = self._copies(number)
                assert teacher_z_NV is not None
                accumulator.update_mixture(z_NV, teacher_z_NV)
            mixture = accumulator.mixture()
            sum_over_ranks(tuple(mixture.values()), student.settings.shard)
            state |= mixture
        return state

    def propagate(self, arrived: Mapping[str, Tensor], state: State, gradients: Gradients) -> None:
        """Adds the gradients of this block; the logits are used up."""
        # Elsewhere than on a CPU finding the live rows would wait for the device once a block.
        index = live_rows(arrived, self.count) if self.tiles[0].device.type == "cpu" else None
        operands, query = self.models.student.rows(self.rows), self.query
        if index is not None:
            arrived = {name: gradient[index] for name, gradient in arrived.items()}
            state = {name: value[index] for name, value in state.items()}
            hidden_ND, hidden2_NR = operands
            operands = Rows(hidden_ND[index], None if hidden2_NR is None else hidden2_NR[index])
            query = query.rows(index)
        sums = gradients.new_rows(operands.hidden_ND.shape[0])
        self._propagate(arrived, state, query, operands, gradients, sums, index)
        gradients.put_rows(self.rows if index is None else index + self.rows.start, sums)

    def _propagate(
        self,
        arrived: Mapping[str, Tensor],
        state: State,
        query: Query,
        operands: Rows,
        gradients: Gradients,
        sums: RowSums,
        index: Int[Tensor, " live"] | None,
    ) -> None:
        student = self.models.student
        found = coefficients(arrived, state, query, student.whole_vocab)
        tile_gradient = new_tile_gradient(found, state, query, slice(None), student.settings)
        for number, columns in enumerate(self.columns):
            z_NV = self._live(self.tiles, number, index)
            u_NV = None if self.teacher_tiles is None else self._live(self.teacher_tiles, number, index)
            dz_NV = tile_gradient(z_NV, u_NV, student.start + columns.start)
            gradients.open(columns, fresh=not gradients.reached_weight)
            gradients.add(dz_NV, operands, student.columns(columns), sums, columns)
            gradients.close(columns)
        gradients.reached_weight = True

    def _live(self, tiles: list[Tensor], number: int, index: Int[Tensor, " live"] | None) -> Tensor:
        return tiles[number] if index is None else tiles[number].index_select(0, index)
