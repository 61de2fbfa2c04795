"""The suite `tofu`: five data sets of questions, one forward over each, and every metric from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.evaluation.benchmark import Benchmark
from posttrain.evaluation.generation import Completions, Sampling, complete
from posttrain.evaluation.inference import CausalLM, max_positions
from posttrain.evaluation.progress import bar
from posttrain.evaluation.report import SourceReport
from posttrain.evaluation.rows import prompt_ids
from posttrain.evaluation.unlearning import membership
from posttrain.evaluation.unlearning.findings import Findings, Interval
from posttrain.evaluation.unlearning.measured import DATA_SETS, log_truth_ratios, measure, note
from posttrain.evaluation.unlearning.questions import Question, fingerprint, score_questions, shared
from posttrain.evaluation.unlearning.retain import LoadModel, RetainResults
from posttrain.evaluation.unlearning.summary import KEY, summarise
from posttrain.evaluation.unlearning.tokens import AnswerScorer, AnswerTokens
from posttrain.suggest import unknown

# What the metrics' papers leave open, as it is done here.
CONVENTIONS = {
    "end_of_sequence": "part of probability, truth ratio and membership scores; not of extraction strength and "
    "exact memorization",
    "extraction_strength_floor": 0.0,
    "mia_auc": "1 tells every row to forget from the rows held out",
    "rouge": "ROUGE-L recall, stemmed, of greedy answers",
}


@dataclass(eq=False)
class TofuSuite(Benchmark):
    """The metrics of TOFU and of membership inference; see `posttrain.config.unlearning.TofuConfig`.

    Args:
        data: name among `posttrain.evaluation.unlearning.measured.DATA_SETS` -> its questions.
        retain: loads the retain model, or is its results; None without one.
        reference: loads the reference model; None without one.
        generate, max_new_tokens, min_k, cache: as in the configuration.
        described: what else the report's settings are to say, such as the names of the models.

    Raises:
        ValueError: an unknown name, a data set without rows, or rows to forget that stand among those to keep or held
            out as well.
    """

    data: Mapping[str, Sequence[Question]]
    retain: LoadModel | RetainResults | None = None
    reference: LoadModel | None = None
    generate: bool = True
    max_new_tokens: int = 200
    min_k: float = 0.4
    cache: str | None = None
    described: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reference: dict[str, AnswerTokens] | None = None
        for name, questions in self.data.items():
            if name not in DATA_SETS:
                raise ValueError(unknown(KEY, name, DATA_SETS))
            if not questions:
                raise ValueError(f"{KEY}.{name} has no rows; give another source.")
        for other, meant in (("retain", "to keep"), ("holdout", "held out")):
            both = shared(self.data.get("forget", ()), self.data.get(other, ()))
            if both:
                raise ValueError(
                    f"{KEY}.{other} holds {both} of the {len(self.data['forget'])} rows of {KEY}.forget; the rows "
                    f"{meant} must be others than those to forget."
                )

    @property
    def settings(self) -> dict[str, Any]:
        numbers = {"generate": self.generate, "max_new_tokens": self.max_new_tokens, "min_k": self.min_k}
        return {**numbers, **self.described, **CONVENTIONS}

    def check(self, model: CausalLM) -> None:
        positions = max_positions(model)
        if self.generate and positions is not None and self.max_new_tokens >= positions:
            raise ValueError(
                f"{KEY}.max_new_tokens is {self.max_new_tokens}, and the model has {positions} positions in all; lower "
                f"it, or set {KEY}.generate to false."
            )

    def run(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        resamples: int,
        level: float,
        seed: int,
        progress: bool,
    ) -> dict[str, SourceReport]:
        self.check(model)
        interval = Interval(resamples, level, seed)
        scorer = AnswerScorer(model, tokenizer, batch_size=batch_size, cache=self.cache, progress=progress)
        measured, reports = {}, {}
        for name, questions in self.data.items():
            scored = score_questions(scorer, questions, f"tofu_{name}", answers_only=name == "holdout")
            written = self._write(scorer, name) if self.generate and name != "holdout" else None
            texts = None if written is None else [one[0] for one in written.texts]
            measured[name] = measure(name, questions, scored, texts, min_k=self.min_k)
            found = Findings(len(questions), fingerprint(questions), interval)
            note(measured[name], found, written)
            reports[f"tofu_{name}"] = found.report()
        everything = [one for questions in self.data.values() for one in questions]
        summary = Findings(len(everything), fingerprint(everything), interval)
        summarise(measured, self._retain_results(scorer), self._reference_scores(scorer), summary)
        return {"tofu": summary.report(), **reports}

    def _write(self, scorer: AnswerScorer, name: str) -> Completions:
        """A greedy answer to each question."""
        prompts = [prompt_ids(scorer.tokenizer, one.prompt) for one in self.data[name]]
        sampling = Sampling(temperature=0.0, max_new_tokens=self.max_new_tokens, batch_size=scorer.batch_size)
        with bar(scorer.progress, f"tofu_{name}: generation", len(prompts)) as advance:
            return complete(scorer.model, scorer.tokenizer, prompts, sampling, progress=advance)

    def _retain_results(self, scorer: AnswerScorer) -> RetainResults | None:
        """Of the retain model, which is loaded for it once."""
        if self.retain is None or isinstance(self.retain, RetainResults) or "forget" not in self.data:
            return self.retain if isinstance(self.retain, RetainResults) else None
        own = scorer.of(self.retain())
        forget = score_questions(own, self.data["forget"], "tofu_forget by the retain model")
        auc = None
        if "holdout" in self.data:
            others = score_questions(own, self.data["holdout"], "tofu_holdout by the retain model", answers_only=True)
            auc = membership.auc(*(membership.min_k(one.answer, self.min_k) for one in (forget, others)))
        self.retain = RetainResults(log_truth_ratios("forget", forget), auc)
        return self.retain

    def _reference_scores(self, scorer: AnswerScorer) -> dict[str, AnswerTokens] | None:
        """Answers as the reference model scores them, which is loaded for it once."""
        if self._reference is None and self.reference is not None and {"forget", "holdout"} <= self.data.keys():
            own = scorer.of(self.reference())
            self._reference = {
                name: score_questions(
                    own, self.data[name], f"tofu_{name} by the reference model", answers_only=True
                ).answer
                for name in ("forget", "holdout")
            }
        return self._reference
