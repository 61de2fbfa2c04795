"""The forward on a GPU: every tile of logits is read once, whatever the query asks for."""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.accumulation import BlockAccumulator, State
from posttrain.kernels.checks import Query
from posttrain.kernels.triton.blocks import next_power, row_blocks
from posttrain.kernels.triton.folding import LOWEST, NOWHERE, SLOTS, Parts
from posttrain.kernels.triton.rows import fold_rows, mixture_rows


class Sums:
    """The folds of some tokens in memory, at first of no logit.

    Args:
        shape: (tokens,), or (splits, tokens) for folds that are still to be joined.
    """

    def __init__(self, shape: tuple[int, ...], parts: Parts, device: torch.device) -> None:
        self.parts = parts
        self.floats = torch.zeros((len(SLOTS), *shape), dtype=torch.float32, device=device)
        for name, value in (("maximum", LOWEST.value), ("teacher_maximum", LOWEST.value), ("other", -torch.inf)):
            self.floats[SLOTS.index(name)] = value
        self.integers = torch.full((2, *shape), NOWHERE.value, dtype=torch.int32, device=device)

    def __getitem__(self, name: str) -> Float[Tensor, " rows"]:
        return self.floats[SLOTS.index(name)]

    def state(self) -> State:
        """The sums under the names that `accumulation` gives them."""
        parts = self.parts
        state: State = {}
        for name in ("sum", "sum_square"):
            if getattr(parts, name):
                state[name] = self[name]
        for on, value, index, place_N in (
            (parts.place, "maximum", "largest", self.integers[0]),
            (parts.other, "other", "other", self.integers[1]),
        ):
            if on:
                # Comparisons pass over a nan, which the largest of anything is.
                state[index] = torch.where(self["invalid"] > 0, torch.nan, self[value])
                state[f"{index}_index"] = torch.where(place_N == NOWHERE.value, -1, place_N.long())
        if parts.softmax:
            state |= {"maximum": self["maximum"], "total": self["total"]}
        if parts.mean:
            state["mean"] = self["mean"]
        if parts.variance:
            state["variance"] = self["spread"] / self["total"]
        if parts.squares:
            state["squares"] = self["squares"]
        return state | self._teacher_state()

    def _teacher_state(self) -> State:
        parts = self.parts
        state: State = {}
        if parts.teacher:
            state |= {"teacher_maximum": self["teacher_maximum"], "teacher_total": self["teacher_total"]}
        if parts.teacher_mean:
            state["teacher_mean"] = self["teacher_mean"]
        if parts.forward:
            state["forward_difference"] = self["forward"] / self["teacher_total"]
        if parts.reverse:
            state["reverse_difference"] = self["reverse"] / self["total"]
        return state


class TritonAccumulator(BlockAccumulator):
    """The collectors of a `BlockAccumulator` as one kernel; only the largest k are still found by torch."""

    def __init__(self, query: Query, dtype: torch.dtype) -> None:
        super().__init__(query, dtype)
        self.targets_N, self.ids_NK = query.targets.contiguous(), None if query.ids is None else query.ids.contiguous()
        self.folds = Sums((query.targets.shape[0],), self._parts(), query.targets.device)

    def _parts(self) -> Parts:
        student, teacher = self.softmax, self.teacher
        return Parts(
            softmax=student is not None,
            mean=student is not None and student.with_mean,
            variance=student is not None and student.with_variance,
            squares=student is not None and student.with_squares,
            place=self.largest is not None,
            other=self.other is not None,
            sum="mean_logit" in self.needed,
            sum_square="mean_square_logit" in self.needed,
            teacher=teacher is not None,
            teacher_mean=teacher is not None and teacher.with_mean,
            forward=self.forward is not None,
            reverse=self.reverse is not None,
        )

    def update(
        self,
        z_NV: Float[Tensor, "rows columns"] | None,
        teacher_z_NV: Float[Tensor, "rows columns"] | None,
        start: int,
    ) -> None:
        """Takes the tile that starts at vocabulary entry `start`; the tiles stay as they are."""
        if z_NV is not None and self.topk is not None:
            self.topk.update(z_NV, start)
        # Where only the teacher is asked about, its tile stands in for the student's, which nobody reads.
        z_NV = teacher_z_NV if z_NV is None else z_NV
        assert z_NV is not None
        u_NV = z_NV if teacher_z_NV is None else teacher_z_NV
        rows, columns = z_NV.shape
        if rows == 0:
            return
        target = self.picked.get("target_logit")
        ids = self.picked.get("ids_logit")
        # Two tiles a step would not fit into the registers.
        blocks = row_blocks(columns, steps=2 if self.folds.parts.teacher else 8)
        ids_count = 0 if self.ids_NK is None else self.ids_NK.shape[1]
        with torch.cuda.device_of(z_NV):
            fold_rows[-(-rows // blocks.rows),](
                z_NV,
                u_NV,
                self.targets_N,
                self.ids_NK if self.ids_NK is not None else self.targets_N,
                self.folds.floats if target is None else target.values_NK,
                self.folds.floats if self.teacher_picked is None else self.teacher_picked.values_NK,
                self.folds.floats if ids is None else ids.values_NK,
                self.folds.floats,
                self.folds.integers,
                rows,
                columns,
                start,
                *z_NV.stride(),
                *u_NV.stride(),
                ids_count,
                parts=self.folds.parts,
                PICKS=(target is not None) + 2 * (self.teacher_picked is not None),
                IDS=min(16, next_power(ids_count)) if ids_count else 0,
                ROWS=blocks.rows,
                STEPS=blocks.steps,
                LANES=blocks.lanes,
                num_warps=blocks.warps,
                enable_fp_fusion=True,
            )

    def update_mixture(self, z_NV: Float[Tensor, "rows columns"], teacher_z_NV: Float[Tensor, "rows columns"]) -> None:
        """The second pass, for the jsd alone; the tiles stay as they are."""
        rows, columns = z_NV.shape
        folds = self.folds
        if not self.sums:
            zero_N = torch.zeros_like(folds["total"])
            self.sums = {"mixture_student": zero_N, "mixture_teacher": zero_N.clone()}
            self.log_ratio_N = (folds["teacher_total"] / folds["total"]).log()
        if rows == 0:
            return
        blocks = row_blocks(columns, steps=2)
        with torch.cuda.device_of(z_NV):
            mixture_rows[-(-rows // blocks.rows),](
                z_NV,
                teacher_z_NV,
                folds["maximum"],
                folds["total"],
                folds["teacher_maximum"],
                folds["teacher_total"],
                self.log_ratio_N,
                self.sums["mixture_student"],
                self.sums["mixture_teacher"],
                rows,
                columns,
                *z_NV.stride(),
                *teacher_z_NV.stride(),
                self.jsd_beta,
                ROWS=blocks.rows,
                STEPS=blocks.steps,
                LANES=blocks.lanes,
                num_warps=blocks.warps,
                enable_fp_fusion=True,
            )

    def adopt(self, state: State) -> None:
        """Takes maxima and totals of the whole vocabulary, where the tiles seen were a part of it."""
        # A copy: states that were handed out are views.
        self.folds.floats = self.folds.floats.clone()
        for name in ("maximum", "total", "teacher_maximum", "teacher_total"):
            self.folds[name].copy_(state[name])

    def state(self) -> State:
        """What was collected, by name."""
        state = self.sums | self.folds.state()
        for name, picked in self.picked.items():
            state[name] = picked.values_NK if name == "ids_logit" else picked.values_NK[:, 0]
        if self.teacher_picked is not None:
            state["teacher_target_logit"] = self.teacher_picked.values_NK[:, 0]
        if self.topk is not None and self.topk.values_NK is not None and self.topk.ids_NK is not None:
            state |= {"topk_logit": self.topk.values_NK, "topk_ids": self.topk.ids_NK}
        return state
