"""A tiny random model of every supported family, in float64, with no parameter left at zero or one."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 24,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DROPOUTLESS = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "mistral": _SMALL,
    "gemma": _SMALL,
    "gemma2": {**_SMALL, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SMALL, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": {**_SMALL, "logits_scaling": 3.0},
    "hyperclovax": {**_SMALL, "logits_scaling": 3.0},
    "cohere": {**_SMALL, "logit_scale": 0.25},
    "cohere2": {**_SMALL, "logit_scale": 0.25},
    "minicpm3": {
        **_SMALL,
        "num_key_value_heads": 2,
        "dim_model_base": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "phi": {**_SMALL, "resid_pdrop": 0.0},
    "gpt2": {**_GPT, **_DROPOUTLESS},
    "gptj": {**_GPT, **_DROPOUTLESS, "rotary_dim": 4},
    "gpt_neox": _SMALL,
    "opt": {**_SMALL, "ffn_dim": 24, "word_embed_proj_dim": 12, "dropout": 0.0, "do_layer_norm_before": True},
    "mixtral": {**_SMALL, **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_SMALL, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 12, "norm_topk_prob": True},
}


def model(family: str, *, tied: bool = False, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A seeded model in float64 and evaluation mode; every parameter gets noise, so that none can be ignored."""
    settings = {**FAMILIES[family], "tie_word_embeddings": tied, "initializer_range": 0.3, **changes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **settings)
    # torch's grouped matmul knows no float64
    config._experts_implementation = "eager"
    built = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def batch(rows: int = 3, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Right-padded rows of ragged length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.arange(length, length - rows, -1)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), torch.zeros(())).long(), "attention_mask": mask}


def targets(inputs: dict[str, torch.Tensor], prompt: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(target_index, targets) of every token after the prompt: position i predicts token i + 1."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    wanted = mask[:, 1:] & (torch.arange(1, ids.shape[1]) >= prompt)
    rows, columns = wanted.nonzero(as_tuple=True)
    return rows * ids.shape[1] + columns, ids[rows, columns + 1]


def own_logp(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: object) -> torch.Tensor:
    """The truth: log_softmax of the model's own logits at the targets."""
    index, wanted = targets(inputs)
    logits = model(**inputs, use_cache=False, **options).logits
    rows = logits.reshape(-1, logits.shape[-1])[index]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.log_softmax(-1)[torch.arange(len(wanted)), wanted]


def gradients(model: torch.nn.Module, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a sum with unequal weights."""
    model.zero_grad()
    (values * torch.linspace(0.5, 1.5, len(values), dtype=values.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
