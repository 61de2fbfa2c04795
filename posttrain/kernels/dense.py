"""The truth: logits in full, plain torch, gradients by autograd."""

from math import log

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.kernels.checks import Query
from posttrain.kernels.head import LMHead
from posttrain.kernels.projection import operand_dtype, statistics_dtype
from posttrain.kernels.table import VocabStatistics


def dense_logits(
    hidden: Float[Tensor, "tokens width"], head: LMHead, temperature: float
) -> Float[Tensor, "tokens vocab"]:
    """z in float32 (float64 for float64 input); the products round to the operands' dtype as in any torch model."""
    dtype = operand_dtype(hidden, head)
    bias = None if head.bias is None else head.bias.to(dtype)
    logits = F.linear(hidden.to(dtype), head.weight.to(dtype), bias)
    if head.low_rank is not None:
        hidden2, matrix = head.low_rank
        logits = logits + F.linear(hidden2.to(dtype), matrix.to(dtype))
    logits = logits.to(statistics_dtype(dtype)) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits / temperature


def dense_statistics(hidden: Float[Tensor, "tokens width"], head: LMHead, query: Query) -> VocabStatistics:
    """Every wanted statistic by its definition."""
    needed, targets = query.needed, query.targets[:, None]
    logits = dense_logits(hidden, head, query.temperature)
    logp = logits.log_softmax(-1)
    p = logp.exp()
    values: dict[str, Tensor] = {}
    if "logp" in needed:
        values["logp"] = logp.gather(1, targets)[:, 0]
    if "logsumexp" in needed:
        values["logsumexp"] = logits.logsumexp(-1)
    if "entropy" in needed:
        values["entropy"] = -(p * logp).sum(-1)
    if "mean_logit" in needed:
        values["mean_logit"] = logits.mean(-1)
    if "mean_square_logit" in needed:
        values["mean_square_logit"] = logits.square().mean(-1)
    if "log_sum_sq_probs" in needed:
        values["log_sum_sq_probs"] = (2 * logp).logsumexp(-1)
    if "max_logit" in needed:
        values["max_logit"] = logits.max(-1).values
    if "max_nontarget_logit" in needed:
        values["max_nontarget_logit"] = logits.scatter(1, targets, -torch.inf).max(-1).values
    if query.ids is not None:
        values["ids_logp"] = logp.gather(1, query.ids)
    if "topk_logp" in needed or "topk_ids" in needed:
        assert query.k is not None
        ids = logits.detach().topk(query.k, dim=-1).indices
        values |= {"topk_ids": ids, "topk_logp": logp.gather(1, ids)}
    if "surprisal_variance" in needed:
        mean = (p * logp).sum(-1, keepdim=True)
        values["surprisal_variance"] = (p * (logp - mean).square()).sum(-1)
    if "is_top1" in needed:
        values["is_top1"] = (logits.argmax(-1) == query.targets).to(logits.dtype)
    if query.teacher is not None:
        values |= _teacher_statistics(logp, query)
    return query.answer(values)


def _teacher_statistics(logp: Float[Tensor, "tokens vocab"], query: Query) -> dict[str, Tensor]:
    assert query.teacher is not None
    needed = query.needed
    with torch.no_grad():
        teacher_logp = dense_logits(*query.teacher, query.temperature).to(logp.dtype).log_softmax(-1)
    p, t = logp.exp(), teacher_logp.exp()
    values: dict[str, Tensor] = {}
    if "teacher_logp" in needed:
        values["teacher_logp"] = teacher_logp.gather(1, query.targets[:, None])[:, 0]
    if "teacher_entropy" in needed:
        values["teacher_entropy"] = -(t * teacher_logp).sum(-1)
    if "forward_kl" in needed:
        values["forward_kl"] = (t * (teacher_logp - logp)).sum(-1)
    if "reverse_kl" in needed:
        values["reverse_kl"] = (p * (logp - teacher_logp)).sum(-1)
    if "jsd" in needed:
        beta = query.jsd_beta
        mixture = torch.logaddexp(teacher_logp + log(beta), logp + log(1 - beta))
        to_teacher, to_student = (t * (teacher_logp - mixture)).sum(-1), (p * (logp - mixture)).sum(-1)
        values["jsd"] = beta * to_teacher + (1 - beta) * to_student
    return values
