"""Weights around another objective: what stands under ``reweight:`` of a term.

A reweighting takes the `Loss` of the term it stands under and returns it with another ``weight``. The trainer divides
by the sum of the weights over the whole optimizer step and all ranks, so weights matter up to a common factor alone.
Statistics per sequence reach every token of their sequence where the term's unit is tokens.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.objectives.base import Loss, declare_reweighting
from posttrain.objectives.checks import check_positive, check_same_shape

Units = Float[Tensor, " units"]
Scalar = Float[Tensor, ""]


def largest_likelihood(mean_logp: Units) -> dict[str, Scalar]:
    """The largest mean log-probability of a step, which gets the weight 1: `loreun`'s ``prepare``.

    Args:
        mean_logp: (units,) nats a token, of every unit of the step.
    Returns:
        largest_mean_logp, 0-d nats a token; 0 where there is no unit.
    """
    return {"largest_mean_logp": _largest(mean_logp)}


def largest_reference_likelihood(reference_mean_logp: Units) -> dict[str, Scalar]:
    """The same of the model before unlearning: `loreun_static`'s ``prepare``.

    Args:
        reference_mean_logp: (units,) nats a token, of every unit of the step.
    Returns:
        largest_reference_mean_logp, 0-d nats a token; 0 where there is no unit.
    """
    return {"largest_reference_mean_logp": _largest(reference_mean_logp)}


def _largest(values: Tensor) -> Tensor:
    return values.detach().max() if values.shape[0] else values.new_zeros(())


@declare_reweighting(
    formula="weight proportional to sg(exp(mean_logp / tau)), mean_logp of the completion",
    paper="arXiv:2507.22499 (LoReUn, dynamic)",
    prepare=largest_likelihood,
)
def loreun(loss: Loss, mean_logp: Units, largest_mean_logp: Scalar | None = None, *, tau: float = 1.0) -> Loss:
    """LoReUn: what the model still knows best weighs most, exp(-l / tau) with l the completion's own present loss.

    l is the mean negative log-likelihood, whatever the term's loss is. The weights carry no gradient, and are
    normalised over the whole optimizer step where the paper takes the batch. Gradient: the term's, times the weight's
    share of the step.

    Args:
        loss: of the term; a weight that it has is multiplied.
        mean_logp: (units,) nats a token, over the completion that the unit belongs to.
        largest_mean_logp: 0-d, the largest of the step; without it weights are not scaled, and may all underflow.
        tau: nats a token, > 0; large values weigh all alike. The paper is about images and gives none for text.
    Returns:
        the same values; weight (units,) in [0, 1], 1 for the unit that is known best; metrics: those of the term and
        reweighting, the weight before normalisation.
    Raises:
        ValueError: shapes differ, or tau is not above 0.
    """
    return _by_likelihood(loss, mean_logp, largest_mean_logp, tau)


@declare_reweighting(
    formula="weight proportional to exp(reference_mean_logp / tau), of the model before unlearning",
    paper="arXiv:2507.22499 (LoReUn, static)",
    prepare=largest_reference_likelihood,
)
def loreun_static(
    loss: Loss,
    reference_mean_logp: Units,
    largest_reference_mean_logp: Scalar | None = None,
    *,
    tau: float = 1.0,
) -> Loss:
    """LoReUn with the loss of the model before unlearning: a row keeps its weight for the whole run.

    Gradient: the term's, times the weight's share of the step.

    Args:
        loss: of the term; a weight that it has is multiplied.
        reference_mean_logp: (units,) nats a token, over the completion that the unit belongs to.
        largest_reference_mean_logp: 0-d, the largest of the step; as in `loreun`.
        tau: nats a token, > 0; large values weigh all alike.
    Returns:
        as `loreun`.
    Raises:
        ValueError: shapes differ, or tau is not above 0.
    """
    return _by_likelihood(loss, reference_mean_logp, largest_reference_mean_logp, tau)


def _by_likelihood(loss: Loss, mean_logp: Tensor, largest: Tensor | None, tau: float) -> Loss:
    check_same_shape(values=loss.values, mean_logp=mean_logp)
    check_positive(tau=tau)
    shifted = mean_logp.detach() if largest is None else mean_logp.detach() - largest
    weight = torch.exp(shifted / tau).to(loss.values.dtype)
    metrics = {**loss.metrics, "reweighting": weight}
    return replace(loss, weight=weight if loss.weight is None else weight * loss.weight, metrics=metrics)
