"""The numbers that several of TOFU's data sets give together: forget quality, model utility, membership inference."""

from collections.abc import Mapping

import numpy as np

from posttrain.evaluation.unlearning import membership, metrics
from posttrain.evaluation.unlearning.findings import Findings, add_leak, utility
from posttrain.evaluation.unlearning.measured import GENERAL, Measured
from posttrain.evaluation.unlearning.retain import RetainResults
from posttrain.evaluation.unlearning.tokens import AnswerTokens

ATTACKS = ("loss", "min_k", "min_k_plus_plus", "zlib", "reference")
UTILITY = ("retain", *GENERAL)
KEY = "evaluation.tofu"


def summarise(
    measured: Mapping[str, Measured],
    retain: RetainResults | None,
    reference: Mapping[str, AnswerTokens] | None,
    found: Findings,
) -> None:
    """Note every number that can be had, and why the others cannot.

    Args:
        measured: by data set.
        retain: of the retain model; None without one.
        reference: ``forget`` and ``holdout`` -> answers as the reference model scores them; None without one.
        found: of the suite as a whole.
    """
    _forget_quality(measured, retain, found)
    for mean in metrics.MEANS:
        _model_utility(measured, mean, found)
        _balance(mean, found)
    _membership(measured, retain, reference, found)


def _forget_quality(measured: Mapping[str, Measured], retain: RetainResults | None, found: Findings) -> None:
    for mean in metrics.MEANS:
        names = f"forget_quality_{mean}", f"forget_ks_{mean}"
        ratio = f"truth_ratio_{mean}"
        reason = None
        if "forget" not in measured:
            reason = f"{KEY}.forget is missing"
        elif ratio in measured["forget"].left_out:
            reason = f"{KEY}.forget: {measured['forget'].left_out[ratio]}"
        elif retain is None:
            reason = f"{KEY}.retain_model is missing"
        elif mean not in retain.log_truth_ratio:
            reason = f"the results of {KEY}.retain_model hold no truth ratios"
        if reason is not None or retain is None:
            found.left_out |= dict.fromkeys(names, reason or "")
            continue
        ours = measured["forget"].log_truth_ratio[mean]
        for name, value in zip(names, metrics.forget_quality(ours, retain.log_truth_ratio[mean]), strict=True):
            found.number(name, value, len(ours))


def _model_utility(measured: Mapping[str, Measured], mean: str, found: Findings) -> None:
    name, sets = f"model_utility_{mean}", []
    absent = next((one for one in UTILITY if one not in measured), None)
    if absent is not None:
        found.left_out[name] = f"{KEY}.{absent} is missing"
        return
    for data_set in UTILITY:
        probability = "probability_normalised" if data_set in GENERAL else "probability"
        parts = (probability, "rouge_l_recall", f"truth_ratio_{mean}")
        missing = next((part for part in parts if part in measured[data_set].left_out), None)
        if missing is not None:
            found.left_out[name] = f"{missing} of {data_set}: {measured[data_set].left_out[missing]}"
            return
        sets.append(np.stack([measured[data_set].values[part] for part in parts], axis=1))
    found.number(name, utility(sets, found.interval))


def _balance(mean: str, found: Findings) -> None:
    """Harmonic mean of model utility and of 1 - the distance to the retain model: one number to choose settings by.

    The p-value serves less: it falls to nothing long before a model is far from the retain model.
    """
    name, parts = f"balance_{mean}", (f"forget_ks_{mean}", f"model_utility_{mean}")
    missing = next((part for part in parts if part in found.left_out), None)
    if missing is not None:
        found.left_out[name] = f"{missing}: {found.left_out[missing]}"
        return
    distance, kept = (found.measures[part].estimate.value for part in parts)
    found.number(name, float(metrics.harmonic_mean([1 - distance, kept])), found.rows)


def _membership(
    measured: Mapping[str, Measured],
    retain: RetainResults | None,
    reference: Mapping[str, AnswerTokens] | None,
    found: Findings,
) -> None:
    names = [f"mia_{attack}_auc" for attack in ATTACKS]
    absent = next((name for name in ("forget", "holdout") if name not in measured), None)
    if absent is not None:
        reason = f"{KEY}.{absent} is missing"
        found.left_out |= dict.fromkeys((*names, "privleak", "privleak_to_half"), reason)
        return
    scores = {
        attack: (measured["forget"].scores[attack], measured["holdout"].scores[attack]) for attack in ATTACKS[:-1]
    }
    if reference is None:
        found.left_out["mia_reference_auc"] = f"{KEY}.reference_model is missing"
    else:
        forget, holdout = (
            membership.reference_ratio(measured[name].scored.answer, reference[name]) for name in ("forget", "holdout")
        )
        scores["reference"] = forget, holdout
    for attack, (members, others) in scores.items():
        found.number(f"mia_{attack}_auc", membership.auc_estimate(members, others, **found.interval.options))
    missing = f"{KEY}.retain_model is missing" if retain is None else "the retain model's results hold no AUC of Min-K"
    add_leak(found, None if retain is None else retain.auc, missing)
