"""Sampling by vLLM, where it is installed; it loads a checkpoint of its own."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.evaluation.generation import Completions, Sampling


def require() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "evaluation.backend is vllm, which is not installed: pip install vllm on a machine with a GPU, or leave "
            "backend at transformers."
        ) from error
    return vllm


def complete(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], sampling: Sampling
) -> Completions:
    """`generation.complete` by vLLM; the draws are its own, seeded by prompt.

    Args:
        checkpoint: folder or hub name of a whole model, not of an adapter.
        tokenizer: its end-of-sequence token ends a completion.
        prompts: token ids.
        sampling: `batch_size` is left to vLLM.
    """
    vllm = require()
    settings = [
        vllm.SamplingParams(
            n=sampling.samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed + index,
            stop_token_ids=[tokenizer.eos_token_id],
            repetition_penalty=1.0,
        )
        for index in range(len(prompts))
    ]
    engine = vllm.LLM(model=checkpoint, seed=sampling.seed, generation_config="vllm")
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
    texts = [[one.text for one in output.outputs] for output in outputs]
    unfinished = sum(one.finish_reason == "length" for output in outputs for one in output.outputs)
    return Completions(texts, 0, unfinished)
