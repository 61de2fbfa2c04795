"""A model and a tokenizer small enough to build in every test."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = ["<pad>", "<eos>", "<unk>", *"0123456789abcdefghijklmnopqrstuvwxyz+-=?.:"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def config(**changes: object) -> LlamaConfig:
    """Two layers of width 16 over the character vocabulary."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.5,
        **changes,
    }
    return LlamaConfig(**settings)


def model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A seeded random Llama whose probabilities differ enough between tokens to tell objectives apart."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes)).to(dtype)


def rows(count: int = 8) -> list[dict[str, object]]:
    """Prompts and completions of ragged lengths, with a number a row.

    No two rows share a prefix: equal probabilities would make a quantile fall on a tie that rounding decides.
    """
    return [
        {
            "prompt": "hgfedcba"[i] + "abc"[: i % 3] + "=",
            "completion": "0123456789"[: 1 + (3 * i) % 7],
            "score": float(i) / 4,
        }
        for i in range(count)
    ]
