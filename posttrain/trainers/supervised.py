"""Supervised objectives on trl.SFTTrainer."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from trl import SFTConfig, SFTTrainer

from posttrain.config import KernelConfig
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preparation import column_names, finish, number_rows, without_truncation
from posttrain.modeling import VocabRequest, attach
from posttrain.sharding import unsharded
from posttrain.side import Side
from posttrain.terms import Available, Objective, Term, build_terms
from posttrain.trainers import trl_adapter
from posttrain.trainers.base import ObjectiveMixin
from posttrain.trainers.coupling import Computed
from posttrain.trainers.kernel import check_kernel, kernel_config

TEXT_COLUMNS = frozenset(
    ["prompt", "completion", "messages", "conversations", "text", "input_ids", "labels", "attention_mask",
     "completion_mask", "assistant_masks", "seq_lengths", "tools", "chat_template_kwargs", ROW_NUMBER]
)  # fmt: skip

AnyDataset = Dataset | IterableDataset


class SupervisedTrainer(ObjectiveMixin, SFTTrainer):  # type: ignore[misc]
    """trl.SFTTrainer with any objective over named statistics of the trained tokens.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, peft_config, ...: TRL's own.
        objective: a name, a dotted path, a callable, a mapping with ``name``, ``weight``, ``statistics`` and
            hyper-parameters, or a list of these, which is summed.
        kernel: a `KernelConfig` or a mapping of its keys: how the statistics of the vocabulary are computed.
        teacher: a model (or where to load it from) for the kernel's teacher statistics (``forward_kl``, ...). It must
            share the tokenizer.

    Raises:
        ValueError: unknown objective, statistic, column or hyper-parameter; a TRL setting that ``objective`` replaces;
            a packing strategy that cuts sequences under an objective that needs them whole; a kernel setting that the
            objective or this machine does not allow.
    """

    _name = "posttrain-SFT"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        *,
        objective: Objective | list[Objective] = "nll",
        kernel: KernelConfig | Mapping[str, Any] | None = None,
        teacher: str | PreTrainedModel | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = sft_config(args, model)
        trl_adapter.refuse_replaced_settings(args)
        trl_adapter.refuse_own_parts(kwargs, type(self).__name__)
        if train_dataset is None:
            raise ValueError("train_dataset is missing; pass a datasets.Dataset or IterableDataset.")
        terms = self._build_terms(objective, train_dataset, teacher is not None)
        kernel = kernel_config(kernel)
        check_kernel(kernel, terms, args.device)
        _check_streams(args, train_dataset, eval_dataset)
        self._columns = tuple(dict.fromkeys(name for term in terms for name in term.all_columns))
        self._sequence_term = next((term.name for term in terms if _needs_sequences(term)), None)
        _check_eval_columns(eval_dataset, self._columns)
        _check_packing(args, self._sequence_term, self._columns)
        trl_adapter.refuse_prompt_learning(model, peft_config)
        trl_adapter.refuse_unwrapped_adapter(model)
        loads = False
        if peft_config is not None and trl_adapter.adapts_head(peft_config, model):
            loads = isinstance(model, str)
            model = trl_adapter.loaded(model, args, kwargs)
            model, peft_config = trl_adapter.with_head_adapter(model, args, peft_config), None
        with trl_adapter.hidden_head_adapter(model), trl_adapter.without_init_kwargs(args, loads):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                peft_config=peft_config,
                **kwargs,
            )
        trl_adapter.refuse_parallelism(self.accelerator)
        self.data_collator = self._collator()
        attach(self.model)
        self.teacher = self._place_teacher(teacher)
        self._start_objective(terms, kernel)

    def _build_terms(
        self, objective: Objective | list[Objective], dataset: AnyDataset, teacher: bool
    ) -> tuple[Term, ...]:
        return build_terms(objective, Available(columns=side_columns(dataset), teacher=teacher))

    def _collator(self) -> Any:
        vocab_size = self.model.config.get_text_config().vocab_size
        return trl_adapter.own_collator(self.data_collator, self._columns, vocab_size)

    def _place_teacher(self, teacher: str | PreTrainedModel | None) -> nn.Module | None:
        if teacher is None:
            return None
        if isinstance(teacher, str):
            with unsharded(self.args):
                teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=self.model.dtype)
        if any(hasattr(parameter, "ds_id") for parameter in teacher.parameters()):
            raise ValueError(
                "teacher was sharded by ZeRO-3 while it was loaded, and has no engine that would gather it; pass its "
                "name, or load it before the trainer's configuration is made."
            )
        mine, theirs = (model.config.get_text_config().vocab_size for model in (self.model, teacher))
        if mine != theirs:
            raise ValueError(
                f"teacher has a vocabulary of {theirs} and the model one of {mine}; a teacher must share the tokenizer."
            )
        attach(teacher)
        placed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
        return (teacher if placed else teacher.to(self.accelerator.device)).eval().requires_grad_(False)

    @torch.no_grad()
    def _frozen(self, model: nn.Module, model_inputs: dict[str, Any], side: Side) -> tuple[Computed, Any]:
        if self.teacher is None:
            return {}, None
        request = VocabRequest(side.target_index, side.targets, return_hidden=True, return_head=True)
        outputs = self.teacher(**model_inputs, vocab_request=request)
        return {}, (outputs.hidden, outputs.head)

    def _prepare_dataset(
        self,
        dataset: AnyDataset,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> AnyDataset:
        """TRL tokenises; cutting, skipping, shuffling and packing are ours, so that side columns come along."""
        names = column_names(dataset)
        if trl_adapter.is_packed(dataset, names):
            return dataset
        dataset = super()._prepare_dataset(
            number_rows(dataset), processing_class, without_truncation(args), False, formatting_func, dataset_name
        )
        return finish(
            dataset,
            name=dataset_name,
            columns=self._columns,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            packing=args.packing_strategy if packing else None,
            shuffle_seed=args.seed if args.shuffle_dataset else None,
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            names = [
                "input_ids",
                "labels",
                "seq_lengths",
                ROW_NUMBER,
                *self._columns,
            ]
            self._signature_columns = names  # type: ignore[assignment]


def sft_config(args: SFTConfig | TrainingArguments | None, model: Any) -> SFTConfig:
    if isinstance(args, SFTConfig):
        return args
    if args is not None:
        given = args.to_dict()
        given["hub_token"] = args.hub_token  # to_dict hides it
        return SFTConfig(**given)
    name = model if isinstance(model, str) else model.config._name_or_path
    return SFTConfig(f"{name.rstrip('/').rpartition('/')[2]}-posttrain")


def side_columns(dataset: AnyDataset) -> list[str]:
    return [name for name in column_names(dataset) if name not in TEXT_COLUMNS]


def _check_streams(args: SFTConfig, train_dataset: AnyDataset, eval_dataset: Any) -> None:
    """A stream's batches are built by each process: accelerate's dispatching would concatenate what is no tensor."""
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    streams = [isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated)]
    if any(streams):
        settings: Any = args.accelerator_config
        settings.dispatch_batches = False
    if any(streams[1:]) and args.world_size > 1:
        raise ValueError(
            f"data.eval is streamed and there are {args.world_size} processes, between which a stream fills up with "
            "repeated rows that would count twice; set data.eval.streaming to false."
        )


def _needs_sequences(term: Term) -> bool:
    return term.declaration.unit != "tokens" or any(one.unit != "tokens" for one in term.all_statistics)


def _check_eval_columns(eval_dataset: Any, columns: tuple[str, ...]) -> None:
    named = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in named.items():
        if dataset is None:
            continue
        there = column_names(dataset)
        missing = [column for column in columns if column not in there]
        if missing:
            raise ValueError(
                f"the {name} data lacks the column {missing[0]!r} that the objective needs; it has {sorted(there)}."
            )


def _check_packing(args: SFTConfig, sequence_term: str | None, columns: tuple[str, ...]) -> None:
    if args.eval_packing and not args.packing:
        raise ValueError(
            "trainer.eval_packing is true and trainer.packing is false; packed evaluation rows would see each other's "
            "tokens, so set both or neither."
        )
    if not args.packing or args.packing_strategy == "bfd":
        return
    reason = f"objective {sequence_term!r} needs whole sequences" if sequence_term else ""
    reason = reason or (f"the objective binds the columns {sorted(columns)}" if columns else "")
    if reason:
        raise ValueError(f"trainer.packing_strategy {args.packing_strategy!r} cuts sequences, and {reason}; use bfd.")
