"""The forward: tiles of logits go in, named per-token sums come out, and out of these the statistics.

The sums ("state") are what the backward needs as well. Names in a state:
    target_logit, ids_logit, topk_logit, topk_ids, sum, sum_square (of z over the vocabulary),
    largest, largest_index, other, other_index (the largest logit, the largest but the target's),
    maximum m, total sum e^(z-m), mean and variance of z-m under p, squares sum e^(2(z-m)), and teacher_* of these,
    forward_difference sum t (w-x), reverse_difference sum p (x-w) with x = z-m and w = u-m' of the teacher,
    mixture_student KL(p || m), mixture_teacher KL(t || m).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.checks import Query
from posttrain.kernels.collectors import Difference, Largest, LargestOther, Picked, Softmax, TopK

State = dict[str, Tensor]

_NO_SOFTMAX = frozenset({"mean_logit", "mean_square_logit", "max_logit", "max_nontarget_logit", "topk_ids", "is_top1"})
_TEACHER_ONLY = frozenset({"teacher_logp", "teacher_entropy"})


class BlockAccumulator:
    """Collects what a query about one block of tokens needs, tile by tile."""

    def __init__(self, query: Query, dtype: torch.dtype) -> None:
        needed = frozenset(query.needed)
        targets_N = query.targets
        device, count = targets_N.device, targets_N.shape[0]
        self.needed = needed
        self.jsd_beta = query.jsd_beta
        self.picked: dict[str, Picked] = {}
        if "logp" in needed:
            self.picked["target_logit"] = Picked(targets_N[:, None], dtype)
        if query.ids is not None:
            self.picked["ids_logit"] = Picked(query.ids, dtype)
        wants_top = "max_logit" in needed or "is_top1" in needed
        self.largest = Largest(count, dtype, device) if wants_top else None
        self.other = LargestOther(targets_N, dtype) if "max_nontarget_logit" in needed else None
        wants_topk = "topk_logp" in needed or "topk_ids" in needed
        self.topk = TopK(query.k) if wants_topk and query.k is not None else None
        self.sums: State = {}
        self.softmax: Softmax | None = None
        if needed - _NO_SOFTMAX - _TEACHER_ONLY:
            variance, squares = "surprisal_variance" in needed, "log_sum_sq_probs" in needed
            self.softmax = Softmax(mean="entropy" in needed, variance=variance, squares=squares)
        self.teacher_picked = Picked(targets_N[:, None], dtype) if "teacher_logp" in needed else None
        self.teacher: Softmax | None = None
        if query.teacher is not None:
            self.teacher = Softmax(mean="teacher_entropy" in needed, variance=False, squares=False)
        self.forward = Difference() if "forward_kl" in needed else None
        self.reverse = Difference() if "reverse_kl" in needed else None

    @property
    def reads_student(self) -> bool:
        return bool(self.needed - _TEACHER_ONLY)

    def update(
        self,
        z_NV: Float[Tensor, "rows columns"] | None,
        teacher_z_NV: Float[Tensor, "rows columns"] | None,
        start: int,
    ) -> None:
        """Takes the tile that starts at vocabulary entry `start`; both tiles are overwritten."""
        if z_NV is not None:
            self._update_plain(z_NV, start)
        if teacher_z_NV is not None and self.teacher_picked is not None:
            self.teacher_picked.update(teacher_z_NV, start)
        both = self.forward is not None or self.reverse is not None
        before_N = self.softmax.total_N if self.softmax and self.softmax.started else None
        teacher_before_N = self.teacher.total_N if self.teacher and self.teacher.started else None
        student = self.softmax.update(z_NV, keep=both) if self.softmax and z_NV is not None else None
        teacher = self.teacher.update(teacher_z_NV, keep=both) if self.teacher and teacher_z_NV is not None else None
        if not both or student is None or teacher is None:
            return
        apart_NV, apart_fall_N = teacher.x_NV.sub_(student.x_NV), teacher.fall_N - student.fall_N
        if self.forward is not None:
            self.forward.update(teacher.e_NV, apart_NV, teacher_before_N, teacher.decay_N, apart_fall_N)
        if self.reverse is not None:
            self.reverse.update(student.e_NV, apart_NV.neg_(), before_N, student.decay_N, -apart_fall_N)

    def _update_plain(self, z_NV: Float[Tensor, "rows columns"], start: int) -> None:
        for collector in (*self.picked.values(), self.largest, self.other, self.topk):
            if collector is not None:
                collector.update(z_NV, start)
        if "mean_logit" in self.needed:
            self._add("sum", z_NV.sum(1))
        if "mean_square_logit" in self.needed:
            self._add("sum_square", z_NV.square().sum(1))

    def update_mixture(self, z_NV: Float[Tensor, "rows columns"], teacher_z_NV: Float[Tensor, "rows columns"]) -> None:
        """The second pass, for the jsd alone; both tiles are overwritten."""
        assert self.softmax is not None and self.teacher is not None
        x_NV = z_NV.sub_(self.softmax.maximum_N[:, None])
        w_NV = teacher_z_NV.sub_(self.teacher.maximum_N[:, None])
        e_NV, teacher_e_NV = x_NV.exp(), w_NV.exp()
        ratio_N = self.teacher.total_N / self.softmax.total_N
        apart_NV = w_NV.sub_(x_NV).sub_(ratio_N.log()[:, None])
        core_NV = log_mixture(apart_NV, self.jsd_beta)
        over_student_NV = core_NV + apart_NV.clamp_min(0.0)
        over_teacher_NV = core_NV.sub_(apart_NV.clamp_max_(0.0))
        self._add("mixture_student", -(e_NV.mul_(over_student_NV)).sum(1) / self.softmax.total_N)
        self._add("mixture_teacher", -(teacher_e_NV.mul_(over_teacher_NV)).sum(1) / self.teacher.total_N)

    def adopt(self, state: State) -> None:
        """Takes maxima and totals of the whole vocabulary, where the tiles seen were a part of it."""
        assert self.softmax is not None and self.teacher is not None
        self.softmax.maximum_N, self.softmax.total_N = state["maximum"], state["total"]
        self.teacher.maximum_N, self.teacher.total_N = state["teacher_maximum"], state["teacher_total"]

    def mixture(self) -> State:
        """What `update_mixture` has added up."""
        return {name: self.sums[name] for name in ("mixture_student", "mixture_teacher")}

    def _add(self, name: str, value_N: Float[Tensor, " rows"]) -> None:
        self.sums[name] = self.sums[name] + value_N if name in self.sums else value_N

    def state(self) -> State:
        """What was collected, by name."""
        state = dict(self.sums)
        for name, picked in self.picked.items():
            state[name] = picked.values_NK if name == "ids_logit" else picked.values_NK[:, 0]
        if self.largest is not None:
            state |= {"largest": self.largest.value_N, "largest_index": self.largest.index_N}
        if self.other is not None:
            state |= {"other": self.other.value_N, "other_index": self.other.index_N}
        if self.topk is not None and self.topk.values_NK is not None and self.topk.ids_NK is not None:
            state |= {"topk_logit": self.topk.values_NK, "topk_ids": self.topk.ids_NK}
        if self.softmax is not None:
            state |= self.softmax.state("")
        if self.teacher is not None:
            state |= self.teacher.state("teacher_")
        if self.teacher_picked is not None:
            state["teacher_target_logit"] = self.teacher_picked.values_NK[:, 0]
        if self.forward is not None and self.forward.sum_N is not None:
            state["forward_difference"] = self.forward.sum_N / state["teacher_total"]
        if self.reverse is not None and self.reverse.sum_N is not None:
            state["reverse_difference"] = self.reverse.sum_N / state["total"]
        return state


def log_mixture(apart_NV: Float[Tensor, "rows columns"], beta: float) -> Float[Tensor, "rows columns"]:
    """r with log(m / p) = r + max(a, 0) and log(m / t) = r - min(a, 0), where m = beta t + (1 - beta) p.

    With a = log t - log p, r = log1p(c expm1(-|a|)), c = 1 - beta where a > 0, else beta. Nothing overflows, no digits
    are lost near a = 0 (where both divergences vanish), and neither logarithm is a difference of large numbers.
    """
    weight_NV = (apart_NV > 0).to(apart_NV.dtype).mul_(1 - 2 * beta).add_(beta)
    return apart_NV.abs().neg_().expm1_().mul_(weight_NV).log1p_()


def statistics(state: State, query: Query, vocab: int) -> dict[str, Tensor]:
    """The needed statistics, by name, of the tokens that `state` is about."""
    return {name: _statistic(name, state, query, vocab) for name in query.needed}


def _statistic(name: str, state: State, query: Query, vocab: int) -> Tensor:
    """One statistic. Log-probabilities are (z - m) - log total, in this order, for the digits of large logits."""
    match name:
        case "logp":
            return state["target_logit"] - state["maximum"] - state["total"].log()
        case "logsumexp":
            return state["maximum"] + state["total"].log()
        case "entropy":
            return state["total"].log() - state["mean"]
        case "mean_logit":
            return state["sum"] / vocab
        case "mean_square_logit":
            return state["sum_square"] / vocab
        case "log_sum_sq_probs":
            return state["squares"].log() - 2 * state["total"].log()
        case "max_logit":
            return state["largest"]
        case "max_nontarget_logit":
            return state["other"]
        case "ids_logp" | "topk_logp":
            logit = state["ids_logit" if name == "ids_logp" else "topk_logit"]
            return logit - state["maximum"][:, None] - state["total"].log()[:, None]
        case "topk_ids":
            return state["topk_ids"]
        case "surprisal_variance":
            return state["variance"]
        case "is_top1":
            return (state["largest_index"] == query.targets).to(state["largest"].dtype)
        case "teacher_logp":
            return state["teacher_target_logit"] - state["teacher_maximum"] - state["teacher_total"].log()
        case "teacher_entropy":
            return state["teacher_total"].log() - state["teacher_mean"]
        case _:
            return _divergence(name, state, query.jsd_beta)


def _divergence(name: str, state: State, beta: float) -> Tensor:
    """A divergence; rounding may leave a tiny negative number, which no divergence is."""
    if name == "jsd":
        value = beta * state["mixture_teacher"] + (1 - beta) * state["mixture_student"]
    else:
        # The logarithm of the ratio, not the difference of logarithms: near zero it keeps its digits.
        log_ratio = (state["teacher_total"] / state["total"]).log()
        forward = name == "forward_kl"
        value = state["forward_difference"] - log_ratio if forward else state["reverse_difference"] + log_ratio
    return value.clamp_min(0.0)
