"""Who computes it: every implementation at its own best setting, and why one of them cannot be run here."""

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.benchmark.cases import BETA, TOPK, Case, Values, dense_values
from launch.benchmark.problems import PAIRS, Problem
from posttrain.kernels import LMHead, VocabStatistics, vocab_loss, vocab_statistics

Run = Callable[[Problem], Tensor]
OURS = "posttrain"
# TRL's trainers always use this (trl/trainer/utils.py)
TRL_VOCABULARY_CHUNK = 32768


@dataclass(frozen=True, eq=False)
class Competitor:
    """One implementation of a case.

    Args:
        name: as in the results; ours start with `OURS`.
        run: a problem -> the loss, or None where it cannot be run here.
        units: of work that it does, or None where that depends on the problem.
        missing: why it cannot be run.
        compiles: a first call takes longer and more memory than the next ones.
    """

    name: str
    run: Run | None
    units: float | None
    missing: str = ""
    compiles: bool = False


def competitors(case: Case, device: torch.device) -> list[Competitor]:
    """Everybody who has the case, in the order of the rounds."""
    again = case.units + (4 if case.teacher else 2)
    found = [
        Competitor("dense", _dense(case), case.units),
        Competitor("torch.compile", _compiled(_dense(case)), case.units, compiles=True),
    ]
    if case.wanted == ("logp",):
        found += _of_logp(case, device, again)
    if case.wanted == ("forward_kl",):
        found.append(
            Competitor("trl", lambda problem: case.loss({"forward_kl": _trl_divergence(problem)}, problem), again)
        )
    return [*found, *_ours(case, device, again)]


def _dense(case: Case) -> Run:
    return lambda problem: case.loss(dense_values(problem, case), problem)


def _compiled(run: Run) -> Run:
    """Compiled at its first call, for each shape anew."""
    compiled = cache(lambda: torch.compile(run, dynamic=False))
    return lambda problem: compiled()(problem)


def _of_logp(case: Case, device: torch.device, again: float) -> Iterator[Competitor]:
    def of(logp: Callable[[Problem], Tensor]) -> Run:
        return lambda problem: case.loss({"logp": logp(problem)}, problem)

    yield Competitor("linear_cross_entropy", of(_linear_cross_entropy), again)
    if case.name == "nll":
        yield Competitor("linear_cross_entropy_mean", lambda problem: _linear_cross_entropy_mean(problem), case.units)
    yield Competitor("trl", of(_trl_logp), again)
    liger = _liger_dpo if case.name == "dpo" else _liger_mean if case.name == "nll" else of(_liger_logp)
    yield _on_gpu("liger", "liger-kernel", liger, case.units if case.name in ("dpo", "nll") else None, device)
    for impl in ("cce", "cce_exact"):
        yield _on_gpu(impl, "cut-cross-entropy", of(_cut(impl)), again, device)


def _on_gpu(name: str, package: str, run: Run, units: float | None, device: torch.device) -> Competitor:
    if device.type != "cuda":
        return Competitor(name, None, units, "not measured: needs a GPU")
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Competitor(name, None, units, f"not measured: {package} is not installed")
    return Competitor(name, run, units, compiles=True)


def _linear_cross_entropy(problem: Problem) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(
        problem.hidden, problem.weight, problem.targets, reduction="none", options=options
    ).float()


def _linear_cross_entropy_mean(problem: Problem) -> Tensor:
    """Forms the gradients in the forward."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, options=options).float()


def _trl_logp(problem: Problem) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    found: tuple[Tensor, ...] = ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()
    )
    return found[0]


def _trl_divergence(problem: Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    found: tuple[Tensor, ...] = ChunkedDivergenceFunction.apply(
        problem.hidden, problem.weight, None, problem.teacher_hidden, problem.teacher_weight, None, 0.0
    )
    return found[0]


def _liger_mean(problem: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(problem.weight, problem.hidden, problem.targets)
    return loss.float()


def _liger_logp(problem: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    values: Tensor = loss(problem.weight, problem.hidden, problem.targets)
    return -values.float()


def _liger_dpo(problem: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    width = problem.hidden.shape[1]
    targets = problem.targets.view(2 * PAIRS, -1)
    value: Tensor = loss(problem.weight, problem.hidden.view(2 * PAIRS, -1, width), targets)[0]
    return value.float()


def _cut(impl: str) -> Callable[[Problem], Tensor]:
    def logp(problem: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        values: Tensor = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction="none", impl=impl
        )
        return -values.float()

    return logp


def _ours(case: Case, device: torch.device, again: float) -> Iterator[Competitor]:
    for backend in ("streamed", "triton") if device.type == "cuda" else ("streamed",):
        refused = _refused(device, backend=backend)
        # kernels that know no budget recompute, as with a budget of 0
        budget_refused = _refused(device, backend=backend, budget=0)
        if case.phi is not None or case.name == "kl":
            run = None if refused else _one_pass(case, backend)
            yield Competitor(f"{OURS} one pass ({backend})", run, case.units, refused)
            if device.type == "cpu":
                # more rows at a time than the default's 125 MB allow, still far from dense's memory
                run = None if refused else _one_pass(case, backend, budget=160_000_000)
                yield Competitor(f"{OURS} one pass, 160 MB ({backend})", run, case.units, refused)
        run = None if refused else _recomputing(case, backend, None if budget_refused else 0)
        yield Competitor(f"{OURS} budget 0 ({backend})", run, again, refused)
        run = None if budget_refused else _recomputing(case, backend, "auto")
        yield Competitor(f"{OURS} budget auto ({backend})", run, None, budget_refused)


def _refused(device: torch.device, **options: Any) -> str:
    """Why the kernels do not take these options here; empty where they do."""
    hidden = torch.zeros(1, 1, device=device)
    try:
        _statistics(hidden, LMHead(hidden), torch.zeros(1, dtype=torch.int64, device=device), ("logp",), **options)
    except ValueError as error:
        return f"not measured: {error}"
    return ""


def _statistics(hidden: Tensor, head: LMHead, targets: Tensor, wanted: tuple[str, ...], **options: Any) -> Values:
    return vocab_statistics(hidden, head, targets, wanted, **options).as_dict()


def _recomputing(case: Case, backend: str, budget: int | str | None) -> Run:
    options: dict[str, Any] = {"backend": backend} | ({} if budget is None else {"budget": budget})

    def run(problem: Problem) -> Tensor:
        head = LMHead(problem.weight)
        if case.name == "two_passes":
            assert problem.teacher_hidden is not None and problem.teacher_weight is not None
            with torch.no_grad():
                _statistics(
                    problem.teacher_hidden, LMHead(problem.teacher_weight), problem.targets, ("logp",), **options
                )
            values = _statistics(problem.hidden, head, problem.targets, ("logp",), **options)
        elif case.teacher:
            assert problem.teacher_hidden is not None and problem.teacher_weight is not None
            teacher = (problem.teacher_hidden, LMHead(problem.teacher_weight))
            values = _statistics(problem.hidden, head, problem.targets, case.wanted, teacher=teacher, **options)
        else:
            asked = {"ids": problem.ids, "k": TOPK} if len(case.wanted) > 1 else {}
            values = _statistics(problem.hidden, head, problem.targets, case.wanted, **asked, **options)
        return case.loss(values, problem)

    return run


def _one_pass(case: Case, backend: str, budget: int | None = None) -> Run:
    def phi(found: VocabStatistics) -> Tensor:
        return case.phi(found["logp"]) if case.phi is not None else found["forward_kl"]

    def run(problem: Problem) -> Tensor:
        teacher = None
        if problem.teacher_hidden is not None and problem.teacher_weight is not None:
            teacher = (problem.teacher_hidden, LMHead(problem.teacher_weight))
        tokens = problem.hidden.shape[0]
        weight = torch.full((tokens,), 1 / tokens, dtype=problem.upstream.dtype, device=problem.hidden.device)
        loss, _ = vocab_loss(
            problem.hidden,
            LMHead(problem.weight),
            problem.targets,
            case.wanted,
            phi,
            weight,
            teacher=teacher,
            budget=budget,
            backend=backend,
        )
        return loss

    return run
