"""The metrics of one data set of questions, from its per-token statistics and the answers written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.evaluation.generation import Completions
from posttrain.evaluation.unlearning import membership, metrics
from posttrain.evaluation.unlearning.findings import Findings
from posttrain.evaluation.unlearning.overlap import rouge_l
from posttrain.evaluation.unlearning.questions import Question, ScoredQuestions
from posttrain.evaluation.unlearning.tokens import Array

# General knowledge, where the answer stands in for a paraphrase and probability is taken among the wrong answers.
GENERAL = ("real_authors", "world_facts")
DATA_SETS = ("forget", "retain", *GENERAL, "holdout")


@dataclass(frozen=True, eq=False)
class Measured:
    """One data set's values.

    Args:
        questions: its rows.
        scored: their statistics.
        log_truth_ratio: kind of mean -> (items,); empty where the rows allow none.
        values: metric -> (items,).
        scores: attack -> (items,), the higher the more the row looks trained on.
        left_out: metric -> why it is not there.
    """

    questions: Sequence[Question]
    scored: ScoredQuestions
    log_truth_ratio: Mapping[str, Array]
    values: Mapping[str, Array]
    scores: Mapping[str, Array]
    left_out: Mapping[str, str]


def measure(
    name: str, questions: Sequence[Question], scored: ScoredQuestions, written: Sequence[str] | None, *, min_k: float
) -> Measured:
    """Every metric that one data set allows.

    Args:
        name: one of `DATA_SETS`, which decides how the truth ratio is aggregated.
        questions: the rows.
        scored: their statistics.
        written: a greedy answer to each; None where none were written.
        min_k: of Min-K and Min-K++.
    """
    answer = scored.answer
    values = {"probability": metrics.probability(answer)}
    left_out: dict[str, str] = {}
    if name in GENERAL:
        if scored.perturbed_nll is None:
            left_out["probability_normalised"] = NO_PERTURBED
        else:
            normalised = metrics.normalised_probability(answer.mean_nll, scored.perturbed_nll)
            values["probability_normalised"] = normalised
    if written is not None:
        values["rouge_l_recall"] = rouge_l([one.answer for one in questions], written)["recall"]
    elif name != "holdout":
        left_out["rouge_l_recall"] = "evaluation.tofu.generate is false"
    ratios = log_truth_ratios(name, scored)
    aggregate = metrics.forget_truth_ratio if name == "forget" else metrics.retain_truth_ratio
    values |= {f"truth_ratio_{mean}": aggregate(ratio) for mean, ratio in ratios.items()}
    if name != "holdout" and not ratios:
        reason = NO_PERTURBED if scored.perturbed is None else "the rows have no paraphrased_answer"
        left_out |= {f"truth_ratio_{mean}": reason for mean in metrics.MEANS}
    values["extraction_strength"] = metrics.extraction_strength(answer)
    values["exact_memorization"] = metrics.exact_memorization(answer)
    scores = {
        "loss": membership.loss(answer),
        "min_k": membership.min_k(answer, min_k),
        "min_k_plus_plus": membership.min_k_plus_plus(answer, min_k),
        "zlib": membership.zlib_ratio(answer, [one.answer for one in questions]),
    }
    return Measured(questions, scored, ratios, values, scores, left_out)


NO_PERTURBED = "the rows have no perturbed_answer"


def log_truth_ratios(name: str, scored: ScoredQuestions) -> dict[str, Array]:
    """Kind of mean -> (items,) log truth ratios; none where the rows lack what they need."""
    paraphrase = scored.answer if scored.paraphrase is None and name in GENERAL else scored.paraphrase
    if paraphrase is None or scored.perturbed_nll is None:
        return {}
    nll, perturbed = paraphrase.mean_nll, scored.perturbed_nll
    return {mean: metrics.log_truth_ratio(nll, perturbed, mean) for mean in metrics.MEANS}


def note(measured: Measured, found: Findings, completions: Completions | None) -> None:
    """Write a data set's values into its report, item by item."""
    answer = measured.scored.answer
    found.items.extend({"prompt": one.prompt, "reference": one.answer} for one in measured.questions)
    if completions is not None:
        for item, texts in zip(found.items, completions.texts, strict=True):
            item["completion"] = texts[0]
        found.counts["truncated_prompts"] = completions.truncated_prompts
        found.counts["unfinished_completions"] = completions.unfinished
    found.counts["truncated_answers"] = int(answer.truncated.sum())
    found.left_out |= measured.left_out
    found.each("tokens", answer.lengths)
    found.each("mean_nll", answer.mean_nll)
    for name, values in measured.values.items():
        found.mean(name, values)
    for mean, ratio in measured.log_truth_ratio.items():
        found.each(f"log_truth_ratio_{mean}", ratio)
    for attack, scores in measured.scores.items():
        found.each(f"mia_{attack}", scores)
