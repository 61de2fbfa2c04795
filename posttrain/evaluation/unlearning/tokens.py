"""One forward over many answers: per-token statistics that every metric of unlearning is a function of."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from posttrain.evaluation.inference import CausalLM, max_positions
from posttrain.evaluation.likelihood import token_scores
from posttrain.evaluation.progress import bar
from posttrain.evaluation.rows import Row, scored_ids

Array = npt.NDArray[Any]
# (token ids, which of them are scored), as from `scored_ids`
Sequences = list[tuple[list[int], list[bool]]]


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """Next-token statistics at the tokens of every answer, one answer after another.

    Args:
        lengths: (answers,) scored tokens, at least 1; what closes the answer (the end-of-sequence token) counts.
        text_lengths: (answers,) the scored tokens before what closes the answer.
        logp: (tokens,) nats, of the answer's own tokens.
        is_top1: (tokens,) whether that token is the most probable one.
        entropy: (tokens,) nats, of the distribution over the vocabulary.
        surprisal_variance: (tokens,) variance of log p under that distribution, nats squared.
        truncated: (answers,) whether an answer was cut at the model's positions.
    """

    lengths: Array
    text_lengths: Array
    logp: Array
    is_top1: Array
    entropy: Array
    surprisal_variance: Array
    truncated: Array

    def __len__(self) -> int:
        return len(self.lengths)

    def per_answer(self, values: Array) -> list[Array]:
        """(tokens,) values, cut into one array an answer."""
        return np.split(values, np.cumsum(self.lengths)[:-1])

    @property
    def mean_nll(self) -> Array:
        """(answers,) nats a token, mean over all scored tokens of the answer."""
        return -np.add.reduceat(self.logp, np.cumsum(self.lengths) - self.lengths) / self.lengths

    def take(self, index: Array) -> "AnswerTokens":
        """The answers at ``index``."""
        starts = np.cumsum(self.lengths) - self.lengths
        tokens = _positions(starts[index], self.lengths[index])
        per_token = {name: getattr(self, name)[tokens] for name in _PER_TOKEN}
        per_answer = {name: getattr(self, name)[index] for name in ("lengths", "text_lengths", "truncated")}
        return AnswerTokens(**per_answer, **per_token)


_PER_TOKEN = ("logp", "is_top1", "entropy", "surprisal_variance")


class AnswerScorer:
    """Scores answers with a model, each batch once through the streamed kernel.

    Args:
        model: a causal language model; it comes back as it was.
        tokenizer: padding is done here, on the right and masked by position, whatever the padding token.
        batch_size: sequences per forward.
        cache: folder for results by model weights, token ids and scored positions; None keeps nothing.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        cache: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.cache = None if cache is None else Path(cache).expanduser()
        self._model_fingerprint: str | None = None

    def of(self, model: CausalLM) -> "AnswerScorer":
        """The same for another model, which is moved to where this one is."""
        if not (getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)):
            model.to(self.model.device)  # type: ignore[arg-type]
        return AnswerScorer(model, self.tokenizer, batch_size=self.batch_size, cache=self.cache, progress=self.progress)

    def rows(self, rows: Sequence[Row], what: str) -> AnswerTokens:
        """Statistics of the rows' completions, as training would see them.

        Args:
            rows: prompt and completion.
            what: they are, for the progress bar and for messages.

        Raises:
            ValueError: as `sequences`.
        """
        return self.sequences([scored_ids(self.tokenizer, row) for row in rows], what)

    def sequences(self, sequences: Sequences, what: str) -> AnswerTokens:
        """Statistics of the scored tokens of (ids, scored flags); a first token is never scored, having no context.

        Raises:
            ValueError: a sequence has no token to score within the model's positions, or the model gives one the
                probability zero or NaN.
        """
        limit = max_positions(self.model)
        cut = [(ids[:limit], scored[:limit]) for ids, scored in sequences]
        lengths = np.array([sum(scored[1:]) for _, scored in cut], dtype=np.int64)
        if not lengths.all():
            place = int(lengths.argmin())
            raise ValueError(
                f"{what}: answer {place} has no token to score; it is empty, or its question fills the "
                f"{limit} positions of the model."
            )
        text = [_text_length(self.tokenizer, ids, scored) for ids, scored in cut]
        truncated = np.array([len(short[0]) < len(full[0]) for short, full in zip(cut, sequences, strict=True)])
        known: dict[str, Any] = {"lengths": lengths, "text_lengths": np.array(text), "truncated": truncated}
        file = self._file(cut)
        if file is not None and file.exists():
            with np.load(file) as saved:
                return AnswerTokens(**known, **{name: saved[name] for name in _PER_TOKEN})
        found: dict[str, Any] = self._score(cut, lengths, what)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            # a name of its own until it is whole: several runs may share the folder
            partial = file.with_name(f".{file.stem}-{uuid4().hex}.npz")
            np.savez(partial, **found)
            partial.replace(file)
        return AnswerTokens(**known, **found)

    def _score(self, sequences: Sequences, lengths: Array, what: str) -> dict[str, Array]:
        starts = np.cumsum(lengths) - lengths
        found = {name: np.zeros(int(lengths.sum()), bool if name == "is_top1" else np.float64) for name in _PER_TOKEN}
        with bar(self.progress, f"{what}: likelihood", len(sequences)) as advance:
            for members, _, token in token_scores(
                self.model, sequences, batch_size=self.batch_size, surprisal_variance=True, progress=advance
            ):
                places = _positions(starts[members], lengths[members])
                for name in _PER_TOKEN:
                    found[name][places] = token[name]
        broken = ~np.isfinite(found["logp"])
        if broken.any():
            token_number = int(broken.argmax())
            place = int(np.searchsorted(np.cumsum(lengths), token_number, side="right"))
            raise ValueError(
                f"{what}: the model gives a token of answer {place} the log-probability {found['logp'][token_number]}."
            )
        return found

    def _file(self, sequences: Sequences) -> Path | None:
        if self.cache is None:
            return None
        if self._model_fingerprint is None:
            self._model_fingerprint = model_fingerprint(self.model)
        digest = hashlib.sha256(self._model_fingerprint.encode())
        for ids, scored in sequences:
            digest.update(np.array(ids, dtype=np.int64).tobytes() + b"|" + np.array(scored).tobytes() + b"\n")
        return self.cache / f"{digest.hexdigest()[:32]}.npz"


def model_fingerprint(model: CausalLM) -> str:
    """Digest of a model's class, configuration, adapters' settings and weights (values and types)."""
    described = [{name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}]
    if isinstance(model, PeftModel):
        # how the adapters scale stands in their settings alone
        described += [{"adapters": model.active_adapters, "off": model.get_model_status().enabled is False}]
        described += [model.peft_config[name].to_dict() for name in sorted(model.peft_config)]
    digest = hashlib.sha256(json.dumps([type(model).__name__, *described], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _positions(starts: Array, lengths: Array) -> Array:
    """The places start, start + 1, ... of several runs of the given lengths, one after another."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - offsets, lengths)


def _text_length(tokenizer: PreTrainedTokenizerBase, ids: list[int], scored: list[bool]) -> int:
    """Scored tokens before what closes the answer: its last special token, with the white space behind it."""
    tokens = [token for token, flag in zip(ids[1:], scored[1:], strict=True) if flag]
    closing = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    last = max((place for place, token in enumerate(tokens) if token in closing), default=None)
    if last is None or str(tokenizer.decode(tokens[last + 1 :], skip_special_tokens=True)).strip():
        return len(tokens)
    while last > 0 and tokens[last - 1] in closing:
        last -= 1
    return last
