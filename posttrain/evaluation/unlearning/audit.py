"""The suite `audit`: is it forgotten, or hidden where fine-tuning, rounding or a look inside finds it again?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from posttrain.evaluation.benchmark import Benchmark
from posttrain.evaluation.bootstrap import Statistic
from posttrain.evaluation.inference import CausalLM
from posttrain.evaluation.progress import bar
from posttrain.evaluation.report import Report, SourceReport
from posttrain.evaluation.rows import Row
from posttrain.evaluation.suite import evaluate, rows_fingerprint
from posttrain.evaluation.unlearning.findings import Findings, Interval
from posttrain.evaluation.unlearning.metrics import extraction_strength, probability
from posttrain.evaluation.unlearning.quantization import ROUNDINGS, Rounding, obstacle, rounded_weights
from posttrain.evaluation.unlearning.relearning import Relearning, merged_copy, relearn, robustness, split
from posttrain.evaluation.unlearning.representations import answer_states, linear_cka, nearest_neighbours
from posttrain.evaluation.unlearning.retain import LoadModel
from posttrain.evaluation.unlearning.tokens import AnswerScorer, Array

KEY = "evaluation.audit"
NO_RETRAINED = f"it compares with a model that never saw the rows; set {KEY}.retrained"

# metric -> (items,) values
Known = Mapping[str, Array]


@dataclass(eq=False)
class AuditSuite(Benchmark):
    """Relearning, rounded weights and representations; see `posttrain.config.unlearning.AuditConfig`.

    Args:
        forget: rows with prompt and completion.
        retain: the same of what was to stay, for what rounding does to it; none leaves that out.
        groups: (rows to forget,) whom or what each is about; None leaves the nearest neighbours out.
        original: loads the model before unlearning; None without one.
        retrained: loads the model that never saw the rows to forget; None without one.
        relearning: how the models are fine-tuned.
        roundings: of the weights.
        neighbours: that vote on a row's group.
        described: what else the report's settings are to say, such as the names of the models.

    Raises:
        ValueError: no rows to forget, or too few for the neighbours.
    """

    forget: Sequence[Row]
    retain: Sequence[Row] = ()
    groups: Sequence[Any] | None = None
    original: LoadModel | None = None
    retrained: LoadModel | None = None
    relearning: Relearning = field(default_factory=Relearning)
    roundings: Sequence[Rounding] = ROUNDINGS
    neighbours: int = 5
    described: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.forget:
            raise ValueError(f"{KEY}.forget has no rows; give another source.")
        if self.groups is not None and len(self.groups) != len(self.forget):
            raise ValueError(f"{len(self.groups)} groups are given for {len(self.forget)} rows; give one each.")
        if self.groups is not None and self.neighbours >= len(self.forget):
            raise ValueError(
                f"{KEY}.neighbours is {self.neighbours} and there are {len(self.forget)} rows to forget; lower it."
            )
        # of the other models, which are always the same
        self._course_of_retrained: list[Known] | None = None
        self._states: dict[str, Array] = {}

    @property
    def settings(self) -> dict[str, Any]:
        names = [one.name for one in self.roundings]
        return {
            "relearning": asdict(self.relearning),
            "roundings": names,
            "neighbours": self.neighbours,
            **self.described,
        }

    def check(self, model: CausalLM) -> None:
        """Any causal language model will do: what it does not allow is left out of the report."""

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
        scorer = AnswerScorer(model, tokenizer, batch_size=batch_size)
        interval = Interval(resamples, level, seed)
        reports: dict[str, SourceReport] = {}
        steps = [("relearning", self._relearned), ("rounding", self._rounded), ("states", self._represented)]
        with bar(progress, "audit", len(steps)) as advance:
            for name, measure in steps:
                for source, rows in (("forget", self.forget), ("retain", self.retain)):
                    if not rows or (source == "retain" and name != "rounding"):
                        continue
                    items = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
                    found = Findings(len(rows), rows_fingerprint(rows), interval, items)
                    measure(scorer, rows, found)
                    reports[f"audit_{source}_{name}"] = found.report()
                if advance is not None:
                    advance(1)
        return reports

    def _relearned(self, scorer: AnswerScorer, rows: Sequence[Row], found: Findings) -> None:
        """What is known of rows that are shown again and of the others, after each epoch."""
        quantised = getattr(scorer.model, "is_quantized", False)
        if quantised or not self.relearning.epochs:
            reason = "the model's weights are quantised" if quantised else f"{KEY}.relearn_epochs is 0"
            found.left_out["relearning"] = reason
            return
        seed = found.interval.seed
        course = self._course(scorer, seed)
        if self._course_of_retrained is None and self.retrained is not None:
            self._course_of_retrained = self._course(scorer.of(self.retrained()), seed)
        shown, others = split(len(rows), self.relearning.share, seed)
        for part, members in (("shown", shown), ("unshown", others)):
            if not members:
                found.left_out[part] = f"{KEY}.relearn_share shows all rows"
                continue
            for metric in course[0]:
                self._note_course(metric, part, members, course, found)

    def _note_course(self, metric: str, part: str, members: list[int], course: list[Known], found: Findings) -> None:
        def of_part(values: Array) -> Array:
            kept = np.full(len(values), np.nan)
            kept[members] = values[members]
            return kept

        theirs = self._course_of_retrained
        for prefix, known in (("", course), ("retrained_", theirs or [])):
            for epoch, values in enumerate(known):
                found.mean(f"{prefix}{metric}_{part}_epoch{epoch}", of_part(values[metric]))
        found.mean(f"relearned_{metric}_{part}", of_part(course[-1][metric] - course[0][metric]))
        name = f"relearning_robustness_{metric}_{part}"
        if theirs is None:
            found.left_out[name] = NO_RETRAINED
            return
        gains = np.stack([known[-1][metric] - known[0][metric] for known in (theirs, course)], axis=1)
        index = np.array([row for row in members if np.isfinite(gains[row]).all()], dtype=np.int64)
        if not len(index):
            found.left_out[name] = "no row has it"
            return
        found.statistic(name, Statistic(gains[index], lambda sums: robustness(sums[..., 0], sums[..., 1])), index)

    def _course(self, scorer: AnswerScorer, seed: int) -> list[Known]:
        """What is known of the rows to forget, before relearning and after each of its epochs."""
        course = [self._known(scorer, self.forget)]
        shown = [self.forget[index] for index in split(len(self.forget), self.relearning.share, seed)[0]]
        relearn(
            scorer.model,
            scorer.tokenizer,
            shown,
            self.relearning,
            seed=seed,
            after_epoch=lambda student: course.append(self._known(scorer.of(student), self.forget)),
        )
        return course

    def _known(self, scorer: AnswerScorer, rows: Sequence[Row]) -> Known:
        answers = scorer.rows(rows, "audit")
        return {"probability": probability(answers), "extraction_strength": extraction_strength(answers)}

    def _rounded(self, scorer: AnswerScorer, rows: Sequence[Row], found: Findings) -> None:
        """What is known after rounding, where unlearning may have moved weights by less than a step."""
        reason = obstacle(scorer.model)
        if reason is not None:
            found.left_out["rounding"] = f"the weights of {type(scorer.model).__name__} cannot be rounded: {reason}"
            return
        model = merged_copy(scorer.model) if isinstance(scorer.model, PeftModel) else scorer.model
        before = self._known(scorer.of(model), rows)
        for metric, values in before.items():
            found.mean(f"{metric}_unrounded", values)
        for rounding in self.roundings:
            with rounded_weights(model, rounding):
                after = self._known(scorer.of(model), rows)
            for metric, values in after.items():
                found.mean(f"{metric}_{rounding.name}", values)
            if rows is self.forget:
                pairs = np.stack([before["probability"], after["probability"]], axis=1)
                # as the robustness of relearning, of what is known instead of what is gained
                kept = Statistic(pairs, lambda sums: robustness(sums[..., 0], sums[..., 1]))
                found.statistic(f"rounding_robustness_{rounding.name}", kept, np.arange(len(rows)))

    def _represented(self, scorer: AnswerScorer, rows: Sequence[Row], found: Findings) -> None:
        """Layer by layer: likeness to the original and to the retrained model, and whether a state tells its group."""
        try:
            own = self._states_of(scorer)
            for name, load in (("original", self.original), ("retrained", self.retrained)):
                if name not in self._states and load is not None:
                    self._states[name] = self._states_of(scorer.of(load()))
        except ValueError as error:
            found.left_out["states"] = str(error)
            return
        for layer in range(len(own)):
            for name in ("original", "retrained"):
                if name not in self._states:
                    found.left_out[f"cka_{name}"] = f"it compares with that model; set {KEY}.{name}"
                elif layer < len(self._states[name]):
                    likeness = linear_cka(own[layer], self._states[name][layer])
                    self._note_likeness(f"cka_{name}_layer{layer}", likeness, found)
            for prefix, states in (("", own), *((f"{name}_", one) for name, one in self._states.items())):
                if self.groups is not None and layer < len(states):
                    told = nearest_neighbours(states[layer], self.groups, self.neighbours)
                    found.mean(f"{prefix}group_told_layer{layer}", told)
        if self.groups is None:
            found.left_out["group_told"] = f"the rows' groups are not known; set {KEY}.group or {KEY}.group_size"
        else:
            found.counts["groups"] = len(set(self.groups))

    def _note_likeness(self, name: str, likeness: float, found: Findings) -> None:
        if np.isfinite(likeness):
            found.number(name, likeness, found.rows)
        else:
            found.left_out[name] = "the states are the same for all rows"

    def _states_of(self, scorer: AnswerScorer) -> Array:
        return answer_states(scorer.model, scorer.tokenizer, self.forget, batch_size=scorer.batch_size)


def audit(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Row],
    *,
    batch_size: int = 64,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Report:
    """The whole audit in one call.

    Args:
        model, tokenizer: both come back as they were.
        forget: rows with prompt and completion.
        batch_size: rows per forward.
        resamples, level, seed: of the bootstrap; the seed also draws the rows that are relearned and their order.
        progress: show a progress bar.
        options: of `AuditSuite`, such as ``retain``, ``groups``, ``original`` and ``retrained``.

    Raises:
        ValueError: as `AuditSuite`, or a row without an answer to score.
    """
    settings: dict[str, Any] = {"batch_size": batch_size, "resamples": resamples, "level": level, "seed": seed}
    return evaluate(model, tokenizer, {"audit": AuditSuite(forget, **options)}, **settings, progress=progress)
