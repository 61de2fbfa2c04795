"""From what was measured to an objective to start with, the reason and the paper."""

from dataclasses import dataclass
from typing import Any

from posttrain.evaluation.bootstrap import Estimate

# Where arXiv:2510.00526 sees the ends of the model-capability continuum, by the mean target probability of the base.
STRONG, WEAK = 0.5, 0.1
CONTINUUM = "arXiv:2510.00526"


@dataclass(frozen=True)
class Advice:
    """What to start with.

    Args:
        region: where the data stand.
        objective: as ``objective:`` takes it.
        compare: objectives to compare it with.
        reason: one or two sentences.
        paper: identifiers.
    """

    region: str
    objective: Any
    compare: tuple[Any, ...]
    reason: str
    paper: str


def supervised(mean: Estimate) -> Advice:
    """By the mean target probability, with its interval."""
    prior: tuple[Any, ...] = ("probability", {"name": "probability_threshold", "threshold": 0.2})
    value = f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})"
    found = f"The base gives the target tokens a mean probability of {value}"
    edge = next((edge for edge in (STRONG, WEAK) if mean.low < edge < mean.high), None)
    unsure = f" The interval holds {edge}, so compare both sides before you rely on it." if edge is not None else ""
    if mean.value > STRONG:
        reason = (
            f"{found}, above {STRONG}: it knows this well, and objectives that lean on what it believes (probability, "
            f"thresholds) pull less at tokens that may be noise.{unsure}"
        )
        return Advice("strong", "probability", ("nll", prior[1]), reason, CONTINUUM)
    if mean.value < WEAK:
        reason = (
            f"{found}, below {WEAK}: it knows little of this, and objectives that lean on what it believes would leave "
            f"most tokens untrained.{unsure}"
        )
        return Advice("weak", "nll", (), reason, CONTINUUM)
    reason = (
        f"{found}, between {WEAK} and {STRONG}, where no objective wins reliably: start from nll and let `posttrain "
        f"compare` decide.{unsure}"
    )
    return Advice("intermediate", "nll", prior, reason, CONTINUUM)


def preference(found: dict[str, Any]) -> Advice:
    """By what stands out among the pairs."""
    wishes: list[tuple[str, str, str]] = []
    scores, prefix, length = found.get("scores"), found["shared_prefix"], found["length"]
    if scores is not None and scores["disagree"] + scores["ties"] >= 0.1:
        share = f"in {scores['disagree'] + scores['ties']:.0%} of the pairs the scores tie or contradict the label"
        wishes.append(("mmpo", f"{share}, so that soft targets fit", "arXiv:2410.03145"))
    if prefix >= 0.5:
        share = f"the answers of a pair share {prefix:.0%} of the shorter one from its start"
        wishes.append(("dpop", f"{share}, where DPO lowers the chosen answer as well", "arXiv:2402.13228"))
    if length["difference"]["low"] > 0 and length["chosen_longer"] >= 0.6:
        share = f"the chosen answer is the longer one in {length['chosen_longer']:.0%} of the pairs"
        wishes.append(("simpo", f"{share}, and a margin per token does not reward length", "arXiv:2405.14734"))
    if not wishes:
        wishes.append(("dpo", "nothing stands against the plain objective", "arXiv:2305.18290"))
    papers = "; ".join(paper for _, _, paper in wishes)
    reason = "; ".join(f"{name}: {why}" for name, why, _ in wishes) + "."
    first, *others = [name for name, _, _ in wishes]
    return Advice("preference", first, tuple(others), reason, papers)
