"""TRL's own losses on given log-probabilities: its trainers' methods, with a model that only hands these out.

Completions have one token, so that a token's log-probability is the completion's. Each returns TRL's scalar loss.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor


def _trainer(**settings) -> SimpleNamespace:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, autocast=nullcontext
    )
    common = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=False),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "label_smoothing": 0.0,
    }
    return SimpleNamespace(**common | settings)


def _batch(logps: Tensor, **columns: Tensor) -> dict[str, Tensor]:
    rows = logps.shape[0]
    mask = torch.tensor([[0, 1]]).repeat(rows, 1)
    return {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask} | {
        **columns
    }


def _model(logps: Tensor):
    column = logps[:, None]
    zeros = torch.zeros_like(column).detach()
    outputs = SimpleNamespace(log_probs=column, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **_: outputs


def dpo_trainer_loss(
    loss_type: str,
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    **settings: float,
) -> Tensor:
    """DPOTrainer's loss on (pairs,) log-probabilities of policy and reference, the mean over the pairs."""
    from trl import DPOTrainer

    logps = torch.cat([chosen, rejected])
    defaults = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, "loss_weights": [1.0]}
    trainer = _trainer(loss_types=[loss_type], **defaults | settings)
    batch = _batch(logps, ref_chosen_logps=reference_chosen, ref_rejected_logps=reference_rejected)
    return DPOTrainer._compute_loss(trainer, _model(logps), batch, False)


def kto_trainer_loss(
    loss_type: str, logps: Tensor, reference: Tensor, mismatched_logratio: Tensor, label: Tensor, **settings: float
) -> Tensor:
    """KTOTrainer's loss on (sequences,) log-probabilities, the mean over the sequences."""
    from trl import KTOTrainer

    trainer = _trainer(
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda model, batch: mismatched_logratio,
        **settings,
    )
    batch = _batch(logps, label=label, ref_logps=reference, ref_KL_logps=torch.zeros_like(mismatched_logratio))
    return KTOTrainer._compute_loss(trainer, _model(logps), batch, False)


def cpo_trainer_losses(loss_type: str, chosen: Tensor, rejected: Tensor, **settings: float) -> Tensor:
    """CPOTrainer's (pairs,) losses on log-probabilities, sums or means, without its likelihood term."""
    with patch.dict("os.environ", {"TRL_EXPERIMENTAL_SILENCE": "1"}):
        from trl.experimental.cpo import CPOTrainer

    defaults = {"alpha": 0.0, "simpo_gamma": 0.0}
    return CPOTrainer.cpo_loss(_trainer(loss_type=loss_type, **defaults | settings), chosen, rejected)[0]


def orpo_trainer_terms(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """ORPOTrainer's (pairs,) beta * log(sigmoid(log-odds ratio)) on mean log-probabilities, in float32."""
    with patch.dict("os.environ", {"TRL_EXPERIMENTAL_SILENCE": "1"}):
        from trl.experimental.orpo import ORPOTrainer

    return ORPOTrainer.odds_ratio_loss(_trainer(beta=beta), chosen, rejected)[0]
