"""The ``kernel`` setting of a trainer, checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from posttrain.config import KernelConfig
from posttrain.config.trainer import checked
from posttrain.kernels import LMHead
from posttrain.kernels.checks import check_query
from posttrain.terms import Term
from posttrain.trainers.one_pass import use_one_pass


def kernel_config(given: KernelConfig | Mapping[str, Any] | None) -> KernelConfig:
    """The setting as a `KernelConfig`; None takes the defaults.

    Raises:
        ValueError: an unknown key or a value that is no choice.
    """
    if isinstance(given, KernelConfig):
        return given
    return KernelConfig(**checked(given or {}, KernelConfig, "kernel"))


def check_kernel(kernel: KernelConfig, terms: Sequence[Term], device: torch.device) -> None:
    """Refuse at the start what the first step would refuse.

    Raises:
        ValueError: an unknown backend or one that cannot run on this device, settings that the backend does not have,
            or an objective that ``one_pass: true`` cannot train.
    """
    one = torch.zeros(1, 1, device=device)
    try:
        check_query(
            one,
            LMHead(one),
            torch.zeros(1, dtype=torch.long, device=device),
            ("logp",),
            backend=kernel.backend,
            gradient_tolerance=kernel.gradient_tolerance,
            budget=kernel.budget,
        )
    except ValueError as error:
        raise ValueError(f"kernel: {error}") from error
    use_one_pass(kernel, terms)
