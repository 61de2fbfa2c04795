"""Batched sampling from any Hugging Face causal language model, the same whatever the batch size."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from posttrain.evaluation.inference import CausalLM, evaluation_mode, max_positions
from posttrain.evaluation.rows import Prompt, prompt_ids

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        samples: completions per prompt.
        temperature: divides the logits; 0 takes the most probable token, so that all samples are the same.
        top_p: keep the smallest set of tokens whose probability reaches it; 1 keeps all.
        max_new_tokens: longest completion, in tokens.
        batch_size: sequences generated at once.
        seed: of the draws.

    Raises:
        ValueError: a value outside its range.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, found {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], found {self.top_p}; 1 keeps every token.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, found {self.seed}.")


@dataclass(frozen=True)
class Completions:
    """Generated texts and what happened on the way.

    Args:
        texts: per prompt its completions, without special tokens.
        truncated_prompts: prompts whose beginning was dropped because the model has too few positions.
        unfinished: completions cut at ``max_new_tokens`` before an end-of-sequence token.
    """

    texts: list[list[str]]
    truncated_prompts: int
    unfinished: int


class InverseTransformSampling(LogitsProcessor):
    """Turns sampling into an argmax: keeps the one token at which the cumulative distribution passes a uniform number.

    Each sequence brings its own uniform numbers, so a draw depends neither on the batch nor on any global generator.

    Args:
        uniforms: (sequences, steps) float64 in [0, 1).
        prompt_length: tokens in front of the first step.
    """

    def __init__(self, uniforms: Float[Tensor, "sequences steps"], prompt_length: int) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length

    def __call__(
        self, input_ids: Int[Tensor, "sequences length"], scores: Float[Tensor, "sequences vocab"]
    ) -> Float[Tensor, "sequences vocab"]:
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:]
        step = input_ids.shape[1] - self.prompt_length
        # Rounding must not carry the threshold to the total: the token after the last possible one would be taken.
        threshold = torch.minimum(self.uniforms[:, step, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(cumulative, threshold, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def generate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[list[str]]:
    """Completions of every prompt, ``samples`` each, in the order of the prompts.

    Sequence s of prompt i has its own stream of random numbers, so the draws do not depend on ``batch_size``, on the
    other prompts' lengths or on the number of samples (up to the rounding of the model's own batched arithmetic). No
    global random state is read or changed; model and tokenizer come back as they were.

    Args:
        model: a causal language model, plain or PEFT, on any device; it runs in evaluation mode.
        tokenizer: padding is done here, on the left; it needs no padding token.
        prompts: texts, or lists of chat messages.
        samples, temperature, top_p, max_new_tokens, batch_size, seed: see `Sampling`.
        progress: called with the number of sequences that each finished batch held.

    Raises:
        ValueError: a setting out of range, max_new_tokens leaving no position for a prompt, or an empty prompt for a
            tokenizer without bos and eos.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    sampling = Sampling(samples, temperature, top_p, max_new_tokens, batch_size, seed)
    return complete(model, tokenizer, ids, sampling, progress=progress).texts


def complete(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    progress: Callable[[int], None] | None = None,
) -> Completions:
    """`generate` for prompts that are token ids already; also counts cut prompts and unfinished completions."""
    positions = max_positions(model)
    room = None if positions is None else positions - sampling.max_new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt: the model has {positions} "
            "positions; lower max_new_tokens."
        )
    kept = [ids if room is None else ids[-room:] for ids in prompts]
    truncated = sum(len(short) < len(ids) for short, ids in zip(kept, prompts, strict=True))
    if truncated:
        logger.warning(f"{truncated} of {len(prompts)} prompts exceed {room} tokens; only their end was kept.")

    # Greedy samples are all alike: one is generated and repeated.
    distinct = sampling.samples if sampling.temperature > 0 else 1
    order = sorted(range(len(kept)), key=lambda index: -len(kept[index]))
    sequences = [(index, sample) for index in order for sample in range(distinct)]
    texts = [[""] * distinct for _ in kept]
    unfinished = 0
    stop = _stop_ids(model, tokenizer)
    with evaluation_mode(model), _generation_settings(model, stop, sampling.max_new_tokens) as padding:
        for start in range(0, len(sequences), sampling.batch_size):
            batch = sequences[start : start + sampling.batch_size]
            generated = _generate_batch(model, [kept[index] for index, _ in batch], batch, sampling, padding)
            for (index, sample), row in zip(batch, generated, strict=True):
                end = next((place for place, token in enumerate(row) if token in stop), None)
                unfinished += end is None
                text = tokenizer.decode(row[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                texts[index][sample] = cast(str, text)
            if progress is not None:
                progress(len(batch) * sampling.samples // distinct)
    repeats = sampling.samples // distinct
    return Completions([row * repeats for row in texts], truncated, unfinished * repeats)


def _stop_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence ids of the tokenizer and of the model's generation settings (chat models name several)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


@contextmanager
def _generation_settings(model: CausalLM, stop: list[int], max_new_tokens: int) -> Iterator[int]:
    """Swap the model's generation settings for ours and yield the padding id.

    Passing a configuration would not do: whatever it leaves open, ``generate`` fills in from the model's own file,
    such as a repetition penalty or top_k.
    """
    owner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    # Padding is masked out, so any id within the vocabulary serves; a padding token need not exist.
    padding = next(iter(stop), 0)
    saved = owner.generation_config
    owner.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop or None, pad_token_id=padding, use_cache=True
    )
    try:
        yield padding
    finally:
        owner.generation_config = saved


def _generate_batch(
    model: CausalLM, prompts: list[list[int]], keys: list[tuple[int, int]], sampling: Sampling, padding: int
) -> list[list[int]]:
    """New token ids of one batch; ``keys`` are the (prompt, sample) pairs that name each sequence's random stream."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[padding] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        streams = [np.random.default_rng((sampling.seed, *key)).random(sampling.max_new_tokens) for key in keys]
        uniforms = torch.from_numpy(np.stack(streams)).to(model.device)
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(InverseTransformSampling(uniforms, width))
    output = cast(Any, model).generate(input_ids=input_ids, attention_mask=mask, logits_processor=processors)
    return output[:, width:].tolist()
