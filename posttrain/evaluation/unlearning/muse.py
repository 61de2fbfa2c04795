"""The suite `muse`: verbatim memory, knowledge and membership of texts to forget (arXiv:2407.06460)."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.data import fields
from posttrain.evaluation.benchmark import Benchmark
from posttrain.evaluation.generation import Sampling, complete
from posttrain.evaluation.inference import CausalLM, max_positions
from posttrain.evaluation.progress import bar
from posttrain.evaluation.report import SourceReport
from posttrain.evaluation.rows import prompt_ids
from posttrain.evaluation.unlearning import membership
from posttrain.evaluation.unlearning.findings import Findings, Interval, add_leak
from posttrain.evaluation.unlearning.overlap import rouge_l
from posttrain.evaluation.unlearning.questions import Question, fingerprint
from posttrain.evaluation.unlearning.retain import LoadModel, RetainResults
from posttrain.evaluation.unlearning.tokens import AnswerScorer, Array

KEY = "evaluation.muse"
CONVENTIONS = {
    "mia_auc": "1 tells every passage to forget from the passages held out",
    "rouge": "ROUGE-L F1, stemmed, of greedy continuations and answers; an answer to a plain prompt ends with its line",
}
Ids = list[int]


def cut_passages(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, length: int, shortest: int, most: int | None
) -> list[Ids]:
    """Texts as consecutive passages of token ids, each begun as the tokenizer begins a text.

    Args:
        texts: each is cut by itself.
        length: tokens of a passage, without what the tokenizer puts in front.
        shortest: a last passage with fewer tokens is left out.
        most: at most this many passages; None for all.
    """
    first = list(tokenizer("a")["input_ids"])[:1]
    start = first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []
    passages: list[Ids] = []
    for text in texts:
        if most is not None and len(passages) >= most:
            break
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        pieces = [ids[begin : begin + length] for begin in range(0, len(ids), length)]
        passages += [start + piece for piece in pieces if len(piece) >= shortest]
    return passages[:most]


def with_examples(question: Question, examples: Sequence[Question]) -> fields.Text:
    """A question's prompt behind others with their answers: turns of a chat, or paragraphs of text."""
    if isinstance(question.prompt, str):
        rows = [one.row(one.answer) for one in examples]
        return "".join(f"{row['prompt']}{row['completion']}\n\n" for row in rows) + question.prompt
    turns = [turn for one in examples for turn in (*one.row(one.answer)["prompt"], *one.row(one.answer)["completion"])]
    return [*turns, *question.prompt]


@dataclass(eq=False)
class MuseSuite(Benchmark):
    """VerbMem, KnowMem and PrivLeak; see `posttrain.config.unlearning.MuseConfig`.

    Args:
        passages: ``forget`` and ``holdout`` -> token ids of passages, as from `cut_passages`.
        questions: ``forget_qa`` and ``retain_qa`` -> questions.
        examples: questions that stand in front of each question.
        retain: loads the retain model, or is its results; None without one.
        prefix_tokens, continuation_tokens, answer_tokens, min_k, cache: as in the configuration.
        described: what else the report's settings are to say.

    Raises:
        ValueError: a passage to forget is held out as well.
    """

    passages: Mapping[str, Sequence[Ids]]
    questions: Mapping[str, Sequence[Question]]
    examples: Sequence[Question] = ()
    retain: LoadModel | RetainResults | None = None
    prefix_tokens: int = 128
    continuation_tokens: int = 128
    answer_tokens: int = 32
    min_k: float = 0.4
    cache: str | None = None
    described: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        forget, holdout = ({tuple(one) for one in self.passages.get(name, ())} for name in ("forget", "holdout"))
        if forget & holdout:
            raise ValueError(
                f"{KEY}.holdout holds {len(forget & holdout)} of the {len(forget)} passages of {KEY}.forget; the texts "
                "held out must be others than those to forget."
            )

    @property
    def settings(self) -> dict[str, Any]:
        names = ("prefix_tokens", "continuation_tokens", "answer_tokens", "min_k")
        return {**{name: getattr(self, name) for name in names}, **self.described, **CONVENTIONS}

    def check(self, model: CausalLM) -> None:
        positions = max_positions(model)
        longest = max((len(one) for several in self.passages.values() for one in several), default=0)
        if positions is not None and longest > positions:
            raise ValueError(
                f"{KEY}.prefix_tokens and continuation_tokens make passages of {longest} tokens, and the model has "
                f"{positions} positions; lower them."
            )
        if self.questions and positions is not None and self.answer_tokens >= positions:
            raise ValueError(f"{KEY}.answer_tokens is {self.answer_tokens}, and the model has {positions} positions.")

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
        scores = self._scores(scorer, "")
        found = {
            name: Findings(len(passages), passages_fingerprint(passages), interval, [{} for _ in passages])
            for name, passages in self.passages.items()
        }
        for name, values in scores.items():
            found[name].mean("mia_min_k", values)
        if "forget" in found:
            self._verbatim(scorer, found["forget"])
        for name, questions in self.questions.items():
            found[name] = Findings(len(questions), fingerprint(questions), interval)
            self._knowledge(scorer, name, found[name])
        digest = hashlib.sha256("".join(one.fingerprint for one in found.values()).encode()).hexdigest()[:16]
        summary = Findings(sum(one.rows for one in found.values()), digest, interval)
        self._leak(scorer, scores, summary)
        return {"muse": summary.report()} | {f"muse_{name}": one.report() for name, one in found.items()}

    def _scores(self, scorer: AnswerScorer, by: str) -> dict[str, Array]:
        """Min-K of every passage."""
        return {
            name: membership.min_k(
                scorer.sequences([(ids, [True] * len(ids)) for ids in passages], f"muse_{name}{by}"), self.min_k
            )
            for name, passages in self.passages.items()
        }

    def _verbatim(self, scorer: AnswerScorer, found: Findings) -> None:
        passages, tokenizer = self.passages["forget"], scorer.tokenizer
        # what the tokenizer puts in front of a text is no token of its prefix
        starts = [self.prefix_tokens + (ids[0] == tokenizer.bos_token_id) for ids in passages]
        prompts = [list(ids[:start]) for ids, start in zip(passages, starts, strict=True)]
        rest = [ids[start:] for ids, start in zip(passages, starts, strict=True)]
        references = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rest]
        written = self._write(scorer, "muse_forget", prompts, self.continuation_tokens, found)
        for item, ids, reference, text in zip(found.items, prompts, references, written, strict=True):
            item |= {"prompt": str(tokenizer.decode(ids)), "reference": reference, "completion": text}
        found.mean("verbmem_rouge_l_f1", rouge_l(references, written)["f1"])

    def _knowledge(self, scorer: AnswerScorer, name: str, found: Findings) -> None:
        questions = self.questions[name]
        prompts = [with_examples(one, self.examples) for one in questions]
        ids = [prompt_ids(scorer.tokenizer, prompt) for prompt in prompts]
        written = self._write(scorer, f"muse_{name}", ids, self.answer_tokens, found)
        # a plain prompt leaves the model to write further questions behind its answer
        plain = [isinstance(prompt, str) for prompt in prompts]
        answers = [text.strip().partition("\n")[0] if cut else text for text, cut in zip(written, plain, strict=True)]
        found.items.extend(
            {"prompt": prompt, "reference": one.answer, "completion": text}
            for prompt, one, text in zip(prompts, questions, answers, strict=True)
        )
        found.mean("knowmem_rouge_l_f1", rouge_l([one.answer for one in questions], answers)["f1"])

    def _write(
        self, scorer: AnswerScorer, what: str, prompts: Sequence[Ids], tokens: int, found: Findings
    ) -> list[str]:
        sampling = Sampling(temperature=0.0, max_new_tokens=tokens, batch_size=scorer.batch_size)
        with bar(scorer.progress, f"{what}: generation", len(prompts)) as advance:
            completions = complete(scorer.model, scorer.tokenizer, prompts, sampling, progress=advance)
        found.counts["truncated_prompts"] = completions.truncated_prompts
        return [texts[0] for texts in completions.texts]

    def _leak(self, scorer: AnswerScorer, scores: Mapping[str, Array], summary: Findings) -> None:
        absent = next((name for name in ("forget", "holdout") if name not in scores), None)
        if absent is not None:
            names = ("mia_min_k_auc", "privleak", "privleak_to_half")
            summary.left_out |= dict.fromkeys(names, f"{KEY}.{absent} is missing")
            return
        estimate = membership.auc_estimate(scores["forget"], scores["holdout"], **summary.interval.options)
        summary.number("mia_min_k_auc", estimate)
        if self.retain is not None and not isinstance(self.retain, RetainResults):
            own = self._scores(scorer.of(self.retain()), " by the retain model")
            self.retain = RetainResults(auc=membership.auc(own["forget"], own["holdout"]))
        retain_auc = None if self.retain is None else self.retain.auc
        reason = "is missing" if self.retain is None else "names results without an AUC of Min-K"
        add_leak(summary, retain_auc, f"{KEY}.retain_model {reason}")


def passages_fingerprint(passages: Sequence[Ids]) -> str:
    """Digest of the token ids."""
    return hashlib.sha256(repr([list(one) for one in passages]).encode()).hexdigest()[:16]
