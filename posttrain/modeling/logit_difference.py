"""Two language models as one: the logits of a base minus those of an assistant that knows what is to be forgotten."""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


def logit_difference(
    base: Float[Tensor, "... vocab"], assistant: Float[Tensor, "... vocab"], *, alpha: float = 0.8, filter: float = 0.01
) -> Float[Tensor, "... vocab"]:
    """z_base - alpha z_assistant, where the base holds the token possible at all (arXiv:2406.08607).

    The assistant's logit counts as 0 where log p_base is below both the k-th largest, k = filter x vocabulary, and the
    largest plus log(filter): there a small difference would lift what the base thinks absurd.

    Args:
        base, assistant: (..., vocab) logits.
        alpha: weight of the assistant.
        filter: share, from 0 (the assistant counts everywhere) up to 1.

    Returns:
        (..., vocab) logits, in float32 or wider.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    base, assistant = base.to(dtype), assistant.to(dtype)
    if filter > 0:
        # logits and log-probabilities differ by a constant, which the comparison does not see
        kth = base.topk(max(1, int(filter * base.shape[-1]))).values[..., -1:]
        least = torch.minimum(kth, base.amax(-1, keepdim=True) + math.log(filter))
        assistant = torch.where(base < least, 0.0, assistant)
    return base - alpha * assistant


class LogitDifferenceConfig(PreTrainedConfig):
    """Both models' configurations.

    Args:
        text_config: of the base.
        assistant_config: of the assistant.
        alpha, filter: see `logit_difference`.
    """

    model_type = "logit_difference"
    sub_configs = {"text_config": AutoConfig, "assistant_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        assistant_config: PreTrainedConfig | dict[str, Any] | None = None,
        alpha: float = 0.8,
        filter: float = 0.01,
        **kwargs: Any,
    ) -> None:
        self.text_config, self.assistant_config = _config(text_config), _config(assistant_config)
        self.alpha, self.filter = alpha, filter
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)


def _config(given: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    return AutoConfig.for_model(**given) if isinstance(given, dict) else given


class PairedCache(DynamicCache):
    """The base's cache with the assistant's beside it."""

    def __init__(self, config: LogitDifferenceConfig) -> None:
        super().__init__(config=config.text_config)
        self.assistant = DynamicCache(config=config.assistant_config)

    def reset(self) -> None:
        super().reset()
        self.assistant.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.assistant.reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
        self.assistant.crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.assistant.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.assistant.batch_select_indices(indices)


class LogitDifferenceModel(PreTrainedModel, GenerationMixin):
    """A language model whose logits are `logit_difference` of its two parts; made by `of`, or loaded.

    It saves, loads and generates as any other model of transformers. Its logits are no linear function of hidden
    states, so what asks for a head (`posttrain.modeling.attach`) refuses it and evaluation takes whole logits.
    """

    config_class = LogitDifferenceConfig
    config: LogitDifferenceConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: LogitDifferenceConfig) -> None:
        super().__init__(config)
        self.base: Any = AutoModelForCausalLM.from_config(config.text_config)
        self.assistant: Any = AutoModelForCausalLM.from_config(config.assistant_config)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @classmethod
    def of(
        cls, base: PreTrainedModel, assistant: PreTrainedModel, *, alpha: float = 0.8, filter: float = 0.01
    ) -> "LogitDifferenceModel":
        """Both models as one; they are not copied.

        Args:
            base: that is to forget.
            assistant: trained to know what is to be forgotten and nothing else, without adapters.
            alpha, filter: see `logit_difference`.

        Raises:
            ValueError: another vocabulary, or a number out of range.
        """
        check_difference(alpha, filter)
        mine, theirs = (model.config.get_text_config().vocab_size for model in (base, assistant))
        if mine != theirs:
            raise ValueError(f"the assistant has a vocabulary of {theirs} and the base one of {mine}; they must agree.")
        config = LogitDifferenceConfig(
            copy.deepcopy(base.config), copy.deepcopy(assistant.config), alpha, filter, dtype=base.dtype
        )
        with torch.device("meta"):
            model = cls(config)
        model.base, model.assistant = base, assistant
        model.generation_config = copy.deepcopy(base.generation_config)
        return model.train(base.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate would make a cache of one model; forward makes the `PairedCache`
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PairedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As of any causal language model of transformers.

        Raises:
            ValueError: a cache that is no `PairedCache`.
        """
        if use_cache and past_key_values is None:
            past_key_values = PairedCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, PairedCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}; pass a PairedCache, or nothing.")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        inputs |= {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
        theirs = None if past_key_values is None else past_key_values.assistant
        logits = logit_difference(
            self.base(**inputs, past_key_values=past_key_values).logits,
            self.assistant(**inputs, past_key_values=theirs).logits,
            alpha=self.config.alpha,
            filter=self.config.filter,
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def check_difference(alpha: float, filter: float) -> None:
    """Raise a ValueError unless both are numbers that `logit_difference` takes."""
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; give the assistant's weight, a number of at least 0.")
    if not 0 <= filter < 1:
        raise ValueError(f"filter is {filter}; give a share from 0 up to, not including, 1.")


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of a model that ends after its first layers, with its embeddings, final norm and head.

    Raises:
        ValueError: the model has not so many layers.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise ValueError(f"layers is {layers}, and the model has {text.num_hidden_layers}; give a number from 1.")
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    # what the new weights would be is drawn in vain
    with torch.random.fork_rng(devices=[]):
        short: PreTrainedModel = type(model)(config)
    nn.Module.to(short, model.device, model.dtype)
    whole = model.state_dict()
    short.load_state_dict({name: whole[name] for name in short.state_dict()})
    short.generation_config = copy.deepcopy(model.generation_config)
    return short


AutoConfig.register(LogitDifferenceConfig.model_type, LogitDifferenceConfig, exist_ok=True)
AutoModelForCausalLM.register(LogitDifferenceConfig, LogitDifferenceModel, exist_ok=True)
