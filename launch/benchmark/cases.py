"""What is computed: losses of named statistics, each forward and backward to hidden states and head."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from launch.benchmark.problems import PAIRS, THRESHOLD, Problem
from posttrain.kernels import DETACHED, STATISTICS, TEACHER_STATISTICS

Values = Mapping[str, Tensor]
ALL_STATISTICS = tuple(name for name in STATISTICS if name not in TEACHER_STATISTICS)
TOPK = 8
BETA = 0.1


@dataclass(frozen=True, eq=False)
class Case:
    """One loss.

    Args:
        name: as in the results.
        wanted: the statistics that the loss reads.
        loss: the statistics and the problem -> a scalar.
        phi: where the loss is a mean over tokens of a function of the token's logp alone, that function.
        units: of tokens x width x vocabulary operations that the gradient needs when nothing is computed twice: a
            matrix product is 2.
        teacher: whether the problem needs a teacher.
    """

    name: str
    wanted: tuple[str, ...]
    loss: Callable[[Values, Problem], Tensor]
    phi: Callable[[Tensor], Tensor] | None = None
    units: float = 6
    teacher: bool = False


def _local(name: str, phi: Callable[[Tensor], Tensor]) -> Case:
    return Case(name, ("logp",), lambda values, problem: phi(values["logp"]).mean(), phi)


def _threshold(logp: Tensor) -> Tensor:
    kept = logp.detach().exp() >= THRESHOLD
    return torch.where(kept, -logp, 0)


def _weighted_logp(values: Values, problem: Problem) -> Tensor:
    return (problem.upstream * values["logp"]).mean()


def _dpo(values: Values, problem: Problem) -> Float[Tensor, ""]:
    """Chosen sequences stand first, rejected ones after them, all of one length."""
    sums = values["logp"].view(2, PAIRS, -1).sum(-1)
    chosen, rejected = sums - problem.reference.T
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _every_statistic(values: Values, problem: Problem) -> Tensor:
    """A weighted sum, in which no statistic's gradient is lost beside the others'."""
    # each entry of these gradients is of size 1 / vocabulary
    spread = {name: problem.weight.shape[0] ** 0.5 for name in ("mean_logit", "mean_square_logit")}
    total = torch.zeros((), dtype=problem.upstream.dtype, device=problem.hidden.device)
    for i, name in enumerate(name for name in ALL_STATISTICS if name not in DETACHED):
        value = values[name]
        per_token = value.sum(1) if value.ndim == 2 else value
        total = total + (problem.upstream.roll(i) * per_token).mean() * spread.get(name, 1.0)
    return total


CASES = {
    case.name: case
    for case in (
        _local("nll", torch.neg),
        _local("probability_10", lambda logp: -torch.expm1(10 * logp) / 10),
        _local("threshold_0.2", _threshold),
        Case("logp", ("logp",), _weighted_logp),
        Case("dpo", ("logp",), _dpo),
        Case("statistics", ALL_STATISTICS, _every_statistic),
        Case("kl", ("forward_kl",), lambda v, _: v["forward_kl"].mean(), units=8, teacher=True),
        # what a co-stream is held against: the student's logp with its gradient, the teacher's logp without one
        Case("two_passes", ("logp", "teacher_logp"), lambda v, _: -v["logp"].mean(), units=8, teacher=True),
    )
}


def dense_values(problem: Problem, case: Case) -> Values:
    """The wanted statistics out of full logits, in plain torch; also the truth, for a problem in float64."""
    logits = F.linear(problem.hidden, problem.weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if case.wanted == ("logp",):
        return {"logp": -F.cross_entropy(logits, problem.targets, reduction="none")}
    if case.teacher:
        return _dense_teacher(logits, problem, case)
    return _dense_statistics(logits, problem)


def _dense_teacher(logits: Tensor, problem: Problem, case: Case) -> Values:
    assert problem.teacher_hidden is not None and problem.teacher_weight is not None
    with torch.no_grad():
        teacher = F.linear(problem.teacher_hidden, problem.teacher_weight).to(logits.dtype).log_softmax(-1)
    logp = logits.log_softmax(-1)
    if "forward_kl" in case.wanted:
        return {"forward_kl": F.kl_div(logp, teacher, reduction="none", log_target=True).sum(-1)}
    at = problem.targets[:, None]
    return {"logp": logp.gather(1, at)[:, 0], "teacher_logp": teacher.gather(1, at)[:, 0]}


def _dense_statistics(logits: Tensor, problem: Problem) -> Values:
    at = problem.targets[:, None]
    logsumexp = logits.logsumexp(-1)
    logp = logits - logsumexp[:, None]
    p = logp.exp()
    p_logp = p * logp
    entropy = -p_logp.sum(-1)
    maximum = logits.max(-1)
    topk = logits.topk(TOPK, dim=-1)
    return {
        "logp": logp.gather(1, at)[:, 0],
        "logsumexp": logsumexp,
        "entropy": entropy,
        "mean_logit": logits.mean(-1),
        "mean_square_logit": logits.square().mean(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
        "max_logit": maximum.values,
        "max_nontarget_logit": logits.scatter(1, at, -torch.inf).max(-1).values,
        "ids_logp": logp.gather(1, problem.ids),
        "topk_logp": topk.values - logsumexp[:, None],
        "topk_ids": topk.indices,
        "surprisal_variance": (p_logp * logp).sum(-1) - entropy.square(),
        "is_top1": (maximum.indices == problem.targets).to(logits.dtype),
    }
