"""The backward: gradients of statistics become per-token coefficients, and with them each tile of dz follows.

With x = z - m, p = e^x / total, y = z - mean, w = u - m' and t of the teacher, each statistic's gradient is
    logp                 [k = target] - p                   (ids_logp, topk_logp likewise at their ids)
    logsumexp            p
    entropy              -p y
    mean_logit           1 / V
    mean_square_logit    2 z / V
    log_sum_sq_probs     2 (p^2 / sum p^2 - p)
    surprisal_variance   p (y^2 + 2 y - variance)
    max_logit            [k = argmax]                       (max_nontarget_logit likewise)
    forward_kl           p - t
    reverse_kl           p ((x - w) - sum p (x - w))
    jsd                  (1 - beta) p (log(p / mixture) - KL(p || mixture))
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.kernels.accumulation import State, log_mixture
from posttrain.kernels.checks import Query
from posttrain.kernels.collectors import local_picks


@dataclass
class Coefficients:
    """Per-token factors of the terms of dz, (tokens,) each, already divided by the totals; None where there is none.

    Args:
        softmax: of e = exp(x).
        linear, quadratic: of e y and e y^2; quadratic never comes alone.
        square: of e^2.
        constant: of 1.
        logit: of z.
        teacher: of exp(w).
        reverse: of e ((x - w) - its mean under p).
        mixture: of e (log(p / mixture) - KL(p || mixture)).
        scatters: (ids, values), (tokens, k) each: values to add at ids; an id of -1 stands for none.
    """

    softmax: Tensor | None = None
    linear: Tensor | None = None
    quadratic: Tensor | None = None
    square: Tensor | None = None
    constant: Tensor | None = None
    logit: Tensor | None = None
    teacher: Tensor | None = None
    reverse: Tensor | None = None
    mixture: Tensor | None = None
    scatters: list[tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        held = getattr(self, name)
        setattr(self, name, value if held is None else held + value)

    @property
    def reads_student(self) -> bool:
        """Whether a tile of z is needed."""
        names = ("softmax", "linear", "quadratic", "square", "logit", "reverse", "mixture")
        return any(getattr(self, name) is not None for name in names)

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher's tile is needed."""
        return any(value is not None for value in (self.teacher, self.reverse, self.mixture))


def coefficients(gradients: Mapping[str, Tensor], state: State, query: Query, vocab: int) -> Coefficients:
    """What the incoming gradients, by statistic, make of dz."""
    result = Coefficients()
    for name, gradient in gradients.items():
        _add(result, name, gradient, state, query, vocab)
    return result


def _add(result: Coefficients, name: str, gradient: Tensor, state: State, query: Query, vocab: int) -> None:
    match name:
        case "logp":
            _add_picked(result, query.targets[:, None], gradient[:, None], state)
        case "ids_logp":
            assert query.ids is not None
            _add_picked(result, query.ids, gradient, state)
        case "topk_logp":
            _add_picked(result, state["topk_ids"], gradient, state)
        case "logsumexp":
            result.add("softmax", gradient / state["total"])
        case "entropy":
            result.add("linear", -gradient / state["total"])
        case "mean_logit":
            result.add("constant", gradient / vocab)
        case "mean_square_logit":
            result.add("logit", gradient * (2 / vocab))
        case "log_sum_sq_probs":
            result.add("square", 2 * gradient / state["squares"])
            result.add("softmax", -2 * gradient / state["total"])
        case "surprisal_variance":
            scaled = gradient / state["total"]
            result.add("quadratic", scaled)
            result.add("linear", 2 * scaled)
            result.add("softmax", -scaled * state["variance"])
        case "max_logit":
            result.scatters.append((state["largest_index"][:, None], gradient[:, None]))
        case "max_nontarget_logit":
            result.scatters.append((state["other_index"][:, None], gradient[:, None]))
        case "forward_kl":
            result.add("softmax", gradient / state["total"])
            result.add("teacher", -gradient / state["teacher_total"])
        case "reverse_kl":
            result.add("reverse", gradient / state["total"])
        case "jsd":
            result.add("mixture", gradient * (1 - query.jsd_beta) / state["total"])
        case _:
            raise AssertionError(f"{name} has no gradient")


def _add_picked(result: Coefficients, ids: Tensor, gradient: Tensor, state: State) -> None:
    """The gradient of log p at some ids."""
    result.scatters.append((ids, gradient))
    result.add("softmax", -gradient.sum(1) / state["total"])


def softcap_slope(z_NV: Float[Tensor, "rows columns"], softcap: float, temperature: float) -> Tensor:
    """The derivative of the softcap at a tile of z: 1 - (capped / softcap)^2."""
    return (z_NV * (temperature / softcap)).square_().neg_().add_(1.0)


class TileGradient:
    """Turns the tiles of one block of tokens into tiles of dz."""

    def __init__(
        self,
        result: Coefficients,
        state: State,
        jsd_beta: float,
        rows: slice,
        *,
        softcap: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        def column(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows, None]

        # One column per token, broadcast over the vocabulary entries of a tile.
        self.softmax, self.linear, self.quadratic = map(column, (result.softmax, result.linear, result.quadratic))
        self.square, self.constant, self.logit = map(column, (result.square, result.constant, result.logit))
        self.teacher, self.reverse, self.mixture = map(column, (result.teacher, result.reverse, result.mixture))
        self.scatters = [(ids[rows], values[rows]) for ids, values in result.scatters]
        self.state = {name: values[rows, None] for name, values in state.items() if values.ndim == 1}
        self.jsd_beta = jsd_beta
        self.softcap, self.temperature = softcap, temperature

    def __call__(
        self,
        z_NV: Float[Tensor, "rows columns"],
        teacher_z_NV: Float[Tensor, "rows columns"] | None,
        start: int,
    ) -> Float[Tensor, "rows columns"]:
        """dz of the tile that starts at vocabulary entry `start`; z (its values unless needed) is overwritten.

        Where a softcap is given, dz is by what the softcap was applied to, over the temperature.
        """
        slope_NV = None if self.softcap is None else softcap_slope(z_NV, self.softcap, self.temperature)
        dz_NV = self._gradient(z_NV, teacher_z_NV, start)
        return dz_NV if slope_NV is None else dz_NV.mul_(slope_NV)

    def _gradient(self, z_NV: Tensor, teacher_z_NV: Tensor | None, start: int) -> Tensor:
        plain_NV = z_NV * self.logit if self.logit is not None else None
        dz_NV = self._softmax_terms(z_NV, teacher_z_NV)
        if dz_NV is None:
            dz_NV = z_NV.zero_() if plain_NV is None else plain_NV
        elif plain_NV is not None:
            dz_NV.add_(plain_NV)
        if self.constant is not None:
            dz_NV.add_(self.constant)
        for ids_NK, values_NK in self.scatters:
            local_NK, inside_NK = local_picks(ids_NK, start, dz_NV.shape[1])
            dz_NV.scatter_add_(1, local_NK, torch.where(inside_NK, values_NK, 0.0))
        return dz_NV

    def _softmax_terms(self, z_NV: Tensor, teacher_z_NV: Tensor | None) -> Tensor | None:
        """Everything that the distributions weigh: e (softmax + linear y + quadratic y^2 + ...) + teacher exp(w)."""
        divergent = self.reverse is not None or self.mixture is not None
        factors = (self.softmax, self.linear, self.quadratic, self.square)
        if all(factor is None for factor in factors) and not divergent and self.teacher is None:
            return None
        x_NV = z_NV.sub_(self.state["maximum"])
        keep = divergent or self.linear is not None
        e_NV = x_NV.exp() if keep else x_NV.exp_()
        factor_NV: Tensor | None = self.softmax
        w_NV = None if teacher_z_NV is None else teacher_z_NV.sub_(self.state["teacher_maximum"])
        teacher_NV = w_NV.exp().mul_(self.teacher) if self.teacher is not None and w_NV is not None else None
        if divergent and w_NV is not None:
            factor_NV = _plus(factor_NV, self._divergence(w_NV.sub_(x_NV)))
        if self.linear is not None:
            factor_NV = _plus(factor_NV, self._polynomial(x_NV, self.linear))
        if self.square is not None:
            factor_NV = _plus(factor_NV, e_NV * self.square)
        dz_NV = e_NV.zero_() if factor_NV is None else e_NV.mul_(factor_NV)
        return dz_NV if teacher_NV is None else dz_NV.add_(teacher_NV)

    def _polynomial(self, x_NV: Tensor, linear: Tensor) -> Tensor:
        """linear y + quadratic y^2, in place of x."""
        y_NV = x_NV.sub_(self.state["mean"])
        if self.quadratic is None:
            return y_NV.mul_(linear)
        return y_NV.mul_((y_NV * self.quadratic).add_(linear))

    def _divergence(self, apart_NV: Tensor) -> Tensor:
        """The factors of e in the gradients of reverse_kl and jsd, from apart = w - x."""
        total: Tensor | None = None
        if self.reverse is not None:
            total = (apart_NV + self.state["reverse_difference"]).mul_(-self.reverse)
        if self.mixture is not None:
            log_ratio = (self.state["teacher_total"] / self.state["total"]).log()
            core_NV = log_mixture(apart_NV.sub_(log_ratio), self.jsd_beta)
            over_student_NV = core_NV.add_(apart_NV.clamp_min_(0.0))
            total = _plus(total, over_student_NV.add_(self.state["mixture_student"]).mul_(-self.mixture))
        assert total is not None
        return total


def _plus(total: Tensor | None, term_NV: Tensor) -> Tensor:
    """The sum, in the memory of the tile `term_NV`."""
    return term_NV if total is None else term_NV.add_(total)
