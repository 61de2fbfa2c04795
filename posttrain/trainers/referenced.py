"""What trainers of completions against a reference model share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from posttrain.config import KernelConfig
from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preference_collation import REFERENCE_SUM, REFERENCE_TOKENS
from posttrain.data.preference_preparation import PROMPT, finish_completions
from posttrain.data.preparation import AnyDataset, column_names, number_rows, without_truncation
from posttrain.modeling import attach
from posttrain.term import Term
from posttrain.terms import Available, Objective, build_terms
from posttrain.trainers import trl_adapter
from posttrain.trainers.base import ObjectiveMixin
from posttrain.trainers.checkpoints import ReferenceInCheckpoints
from posttrain.trainers.kernel import check_kernel, kernel_config
from posttrain.trainers.reference_choice import circumstances, reference_needs
from posttrain.trainers.reference_handling import ReferenceHandling

TEXT_COLUMNS = frozenset(
    ["prompt", "chosen", "rejected", "completion", "label", "messages", "conversations", "tools",
     "chat_template_kwargs", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", ROW_NUMBER]
)  # fmt: skip


class ReferencedMixin(ReferenceHandling, ReferenceInCheckpoints, ObjectiveMixin):
    """Goes before trl.DPOTrainer or trl.KTOTrainer: objectives over completions by role, and their reference model."""

    # ("chosen", "rejected"), or ("",) for completions without a role
    roles: ClassVar[Sequence[str]]
    # columns that go along where they are, though no objective binds them
    watched: ClassVar[tuple[str, ...]] = ()
    # roles of sequences that only `prepare` reads
    extra_roles: ClassVar[Sequence[str]] = ()
    config_class: ClassVar[Any]
    ref_model: Any
    default_objective: ClassVar[Objective]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: str | PreTrainedModel | None = None,
        args: Any = None,
        *,
        objective: Objective | list[Objective] | None = None,
        kernel: KernelConfig | Mapping[str, Any] | None = None,
        reference: str = "auto",
        reference_cache: str | Path | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = self._config(args, model)
        trl_adapter.refuse_replaced_settings(args)
        trl_adapter.refuse_own_parts(kwargs, type(self).__name__)
        if train_dataset is None:
            raise ValueError("train_dataset is missing; pass a datasets.Dataset or IterableDataset.")
        terms = build_terms(objective or self.default_objective, self._available(train_dataset, reference))
        self._check_terms(terms, args)
        kernel = kernel_config(kernel)
        check_kernel(kernel, terms, args.device)
        needs = reference_needs(terms, self.extra_roles)
        self._columns = tuple(dict.fromkeys(name for term in terms for name in term.all_columns))
        self._check_data(args, train_dataset, eval_dataset)
        trl_adapter.refuse_prompt_learning(model, peft_config)
        trl_adapter.refuse_unwrapped_adapter(model)
        here = circumstances(args, train_dataset, eval_dataset, model, ref_model, peft_config)
        self._choose_reference(reference, needs, here, reference_cache)
        named = isinstance(model, str)
        model = trl_adapter.loaded(model, args, kwargs)
        ref_model = self._reference_model(here, args, model, ref_model)
        fresh_adapter = peft_config is not None
        if peft_config is not None and trl_adapter.adapts_head(peft_config, model):
            model, peft_config = trl_adapter.with_head_adapter(model, args, peft_config), None
        with (
            trl_adapter.hidden_head_adapter(model),
            trl_adapter.without_init_kwargs(args, named),
            trl_adapter.without_reference_model(type(self)),
            trl_adapter.without_mismatched_completions(args),
        ):
            construct: Any = super().__init__
            construct(
                model=model,
                ref_model=ref_model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                peft_config=peft_config,
                **kwargs,
            )
        trl_adapter.refuse_parallelism(self.accelerator)
        self.data_collator = self._collator()
        attach(self.model)
        if fresh_adapter or self.reference == "none":
            trl_adapter.drop_copied_adapter(self.model)
        self._start_reference(needs, kernel, reference_cache)
        self._start_objective(terms, kernel)

    def _config(self, args: Any, model: Any) -> Any:
        if isinstance(args, self.config_class):
            return args
        if args is not None:
            given = args.to_dict()
            given["hub_token"] = args.hub_token  # to_dict hides it
            return self.config_class(**given)
        name = model if isinstance(model, str) else model.config._name_or_path
        return self.config_class(f"{name.rstrip('/').rpartition('/')[2]}-posttrain")

    def _available(self, dataset: AnyDataset, reference: str) -> Available:
        return Available(
            columns=[name for name in column_names(dataset) if name not in TEXT_COLUMNS],
            roles=[role for role in (*self.roles, *self.extra_roles) if role],
            reference=reference != "none",
            needs_role="" not in self.roles,
        )

    def _check_terms(self, terms: Sequence[Term], args: Any) -> None:
        """Refuse objectives that the trainer cannot serve under these arguments."""

    def _check_data(self, args: Any, train_dataset: AnyDataset, eval_dataset: Any) -> None:
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for name, dataset in evaluated.items():
            missing = [] if dataset is None else [one for one in self._columns if one not in column_names(dataset)]
            if missing:
                raise ValueError(
                    f"the {name} data lacks the column {missing[0]!r} that the objective needs; it has "
                    f"{sorted(column_names(dataset))}."
                )
        streams = [isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated.values())]
        if any(streams):
            args.accelerator_config.dispatch_batches = False
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "trainer.accelerator_config.dispatch_batches is true, and batches hold columns of several lengths that "
                "one process cannot cut up for the others; set it to false."
            )
        if any(streams[1:]) and args.world_size > 1:
            raise ValueError(
                f"data.eval is streamed and there are {args.world_size} processes, between which a stream fills up "
                "with repeated rows that would count twice; set data.eval.streaming to false."
            )

    @abstractmethod
    def _collator(self) -> Any:
        """What makes batches of this trainer's rows."""

    def _completions(self) -> tuple[str, ...]:
        return tuple(role or "completion" for role in self.roles)

    def _prepare_dataset(self, dataset: AnyDataset, processing_class: Any, args: Any, dataset_name: str) -> AnyDataset:
        """TRL tokenises; cutting and skipping are ours, so that side columns come along and nothing goes silently."""
        prepare: Any = super()._prepare_dataset  # type: ignore[misc]
        # by the name "train" TRL's KTO would advise on weights that its own loss has
        name = "training" if dataset_name == "train" else dataset_name
        tokenized = prepare(number_rows(dataset), processing_class, without_truncation(args), name)
        finished = finish_completions(
            tokenized,
            name=dataset_name,
            completions=self._completions(),
            columns=self._columns,
            watched=self.watched,
            max_length=args.max_length,
            truncation_mode=getattr(args, "truncation_mode", "keep_start"),
        )
        return self._with_reference(finished)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            names = [PROMPT, ROW_NUMBER, *self._columns, *self.watched]
            for role, completion in zip(self.roles, self._completions(), strict=True):
                prefix = f"{role}_" if role else ""
                names += [f"{completion}_ids", prefix + REFERENCE_SUM, prefix + REFERENCE_TOKENS]
            self._signature_columns = names  # type: ignore[assignment]
