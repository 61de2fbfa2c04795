"""The numerical contract: no further from the float64 truth than dense torch in the input dtype, plus a tolerance.

A `Case` is one combination of dtype, shape, kind of logits, head, statistics and way of computing them; `measure` gives
the errors of its statistics and of the gradient of each of them with respect to every tensor of the case. The truth is
written from the definitions in contract_truth.py, in float64 and from the same rounded numbers.
"""

import math
import zlib
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from posttrain.kernels import DETACHED, LMHead, VocabStatistics, vocab_loss
from tests.kernels.contract_truth import SELECTIONS, Truth, logits, upstream
from tests.kernels.problems import Problem, problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
GROUPS = {
    "logp": ("logp",),
    "softmax": ("logsumexp", "entropy", "surprisal_variance", "log_sum_sq_probs"),
    "plain": ("mean_logit", "mean_square_logit", "max_logit", "max_nontarget_logit", "is_top1"),
    "picked": ("ids_logp", "topk_logp", "topk_ids"),
    "teacher": ("forward_kl", "reverse_kl", "jsd", "teacher_logp", "teacher_entropy"),
}
HEADS: dict[str, dict[str, float]] = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "low_rank": {"rank": 8},
}
FACTORS = {
    "dtype": tuple(DTYPES),
    "tokens": (1, 127, 4097),
    "width": (7, 64, 1000),
    "vocab": (2, 513, 50257),
    # normal; up to ±1e4; all tokens with one hidden state and target; all logits of a token equal
    "logits": ("ordinary", "far", "alike", "flat"),
    "head": tuple(HEADS),
    "statistics": tuple(GROUPS),
    "path": ("statistics", "loss"),
}
FAR = 1e4


@dataclass(frozen=True)
class Case:
    """A combination of levels of `FACTORS`."""

    dtype: str
    tokens: int
    width: int
    vocab: int
    logits: str
    head: str
    statistics: str
    path: str

    def __str__(self) -> str:
        return "-".join(map(str, asdict(self).values()))


@dataclass(frozen=True)
class Measured:
    """One comparison; `name` is that of a statistic, or of a statistic and the tensor of its gradient."""

    name: str
    error: float
    dense_error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """At most 1 where the contract is kept; infinite where something is not finite."""
        if not (math.isfinite(self.error) and math.isfinite(self.allowed)):
            return math.inf
        return self.error / self.allowed if self.error > 0 else 0.0


def build(case: Case, device: str = "cpu") -> Problem:
    """The tensors of a case in its dtype."""
    seed = zlib.crc32(str(replace(case, path="", statistics="")).encode())
    given = problem(case.tokens, case.vocab, case.width, seed=seed, size=2.0, **HEADS[case.head])  # type: ignore[arg-type]
    with torch.no_grad():
        for hidden, head in ((given.hidden, given.head), given.options["teacher"]):
            _shape_logits(case.logits, hidden, head)
    if case.logits == "alike":
        given = replace(given, targets=given.targets[:1].expand(case.tokens).clone())
    given = given.to(DTYPES[case.dtype])
    hidden, head = given.options["teacher"]
    teacher = (hidden.to(device), replace(head, weight=head.weight.to(device)))
    options = {**given.options, "ids": given.options["ids"].to(device), "teacher": teacher}
    moved = given.with_leaves([leaf.detach().to(device).requires_grad_() for leaf in given.leaves])
    return replace(moved, targets=moved.targets.to(device), options=options)


def _shape_logits(kind: str, hidden: Tensor, head: LMHead) -> None:
    hidden2, matrix = head.low_rank or (None, None)
    by_token = [tensor for tensor in (hidden, hidden2) if tensor is not None]
    by_entry = [tensor for tensor in (head.weight, head.bias, matrix) if tensor is not None]
    if kind == "far":
        few = head if hidden2 is None or matrix is None else replace(head, low_rank=(hidden2[:64], matrix))
        largest = logits(hidden[:64], replace(few, scale=1.0, softcap=None), 1.0).abs().amax()
        for tensor in by_entry:
            tensor *= FAR / largest
    elif kind in ("alike", "flat"):
        for tensor in by_token if kind == "alike" else by_entry:
            tensor.copy_(tensor[:1].clone().expand_as(tensor))


Computed = tuple[dict[str, Tensor], dict[str, list[Tensor]]]


def by_statistics(given: Problem, incoming: dict[str, Tensor], backend: str) -> Computed:
    """Values of the statistics, and of each the gradients, by one `vocab_statistics`."""
    values = given.statistics(*incoming, backend=backend)
    found = {
        name: torch.autograd.grad(values[name], given.leaves, weight.to(values[name].dtype), retain_graph=True)
        for name, weight in incoming.items()
        if name not in DETACHED
    }
    return values.detach().as_dict(), {name: list(gradients) for name, gradients in found.items()}


def by_loss(given: Problem, incoming: dict[str, Tensor], backend: str) -> Computed:
    """The same by a `vocab_loss` for each statistic."""
    found_values, found = {}, {}
    ones = torch.ones(given.hidden.shape[0], device=given.hidden.device)
    for name, weight in incoming.items():

        def phi(statistics: VocabStatistics, weight: Tensor, name: str = name) -> Tensor:
            weighted = statistics[name] * weight
            return weighted if weighted.ndim == 1 else weighted.sum(1)

        arguments = (given.hidden, given.head, given.targets, (name,), phi, ones, weight)
        loss, values = vocab_loss(*arguments, backend=backend, **given.options)
        found_values[name] = values[name]
        if name not in DETACHED:
            found[name] = list(torch.autograd.grad(loss, given.leaves))
    return found_values, found


def measure(case: Case, backend: str, device: str = "cpu") -> list[Measured]:
    """The errors of a backend in a case, of every statistic and of every gradient, and what is allowed."""
    given = build(case, device)
    names = GROUPS[case.statistics]
    truth = Truth(given.to(torch.float64), names)
    incoming = {name: upstream(given, name) for name in names}
    for name in SELECTIONS.intersection(names):
        incoming[name] = incoming[name] * truth.decided.reshape(-1, *(1,) * (incoming[name].ndim - 1))
    dense_values, dense = by_statistics(given, incoming, "dense")
    values, gradients = (by_loss if case.path == "loss" else by_statistics)(given, incoming, backend)
    found = []
    for name in names:
        if name in ("topk_ids", "is_top1"):
            wrong = (values[name] != truth.values[name]).reshape(case.tokens, -1).any(1) & truth.decided
            found.append(Measured(name, wrong.sum().item(), 0.0, 0.5))
            continue
        found.append(_compare_values(name, values[name], dense_values[name], truth))
        for i, leaf in enumerate(_leaf_names(given) if name in gradients else ()):
            exact, ours = truth.gradients[name][i], gradients[name][i]
            error, dense_error = _distance(ours, exact), _distance(dense[name][i], exact)
            allowed = max(dense_error, _distance(exact.to(ours.dtype), exact))
            allowed += truth.gradient_tolerances[name][i].item()
            found.append(Measured(f"{name} by {leaf}", error, dense_error, allowed))
    return found


def _distance(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).norm().item()


def _leaf_names(given: Problem) -> list[str]:
    bias, adapter = given.head.bias is not None, given.head.low_rank is not None
    return ["hidden", "weight", *["bias"] * bias, *["hidden2", "matrix"] * adapter]


def _compare_values(name: str, ours: Tensor, dense: Tensor, truth: Truth) -> Measured:
    """Errors of the token that comes nearest to what is allowed for it, or beyond it furthest."""

    def errors(values: Tensor) -> Tensor:
        return (values.double() - truth.values[name]).abs().reshape(len(values), -1).amax(1)

    error, dense_error = errors(ours), errors(dense).amax()
    allowed = dense_error + truth.tolerances[name]
    worst = (error / allowed).nan_to_num(nan=math.inf).argmax()
    return Measured(name, error[worst].item(), dense_error.item(), allowed[worst].item())
