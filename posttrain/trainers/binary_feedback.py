"""Objectives of single completions with a label, on trl.KTOTrainer."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import KTOConfig, KTOTrainer

from posttrain.binding import wanted_groups
from posttrain.config import KernelConfig
from posttrain.data.labels import DESIRABLE, with_desirable
from posttrain.data.partners import MISMATCHED, PartnerSampler, StreamWithPartners, WithPartners
from posttrain.data.preference_collation import CompletionFeedbackCollator
from posttrain.data.preparation import AnyDataset
from posttrain.objectives import Loss
from posttrain.side import Side
from posttrain.term import Term
from posttrain.trainers.coupling import Computed
from posttrain.trainers.metrics import MetricSums
from posttrain.trainers.referenced import ReferencedMixin

logger = logging.getLogger(__name__)

ROLE = "mismatched"
# of lambda_D n_D to lambda_U n_U; arXiv:2402.01306 Eq. 8
ADVISED = (1.0, 4 / 3)


class ClassSums(MetricSums):
    """Sums that also tell the mean reward of either class, and how far apart they are."""

    def add_by_class(self, prefix: str, reward: Tensor, desirable: Tensor) -> None:
        """Add (sequences,) rewards under ``prefix``, with (sequences,) bools."""
        self.add(f"{prefix}desirable_reward", reward, desirable)
        self.add(f"{prefix}undesirable_reward", reward, ~desirable)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """As of `MetricSums`; ``reward_margin`` is the difference of the class means, where both classes occurred."""
        means = super().reduce(accelerator)
        for name in [name for name in means if name.endswith("/undesirable_reward")]:
            prefix = name.removesuffix("undesirable_reward")
            if f"{prefix}desirable_reward" in means:
                means[f"{prefix}reward_margin"] = means[f"{prefix}desirable_reward"] - means[name]
        return means


class BinaryFeedbackTrainer(ReferencedMixin, KTOTrainer):  # type: ignore[misc]
    """trl.KTOTrainer with any objective over named statistics of completions, each desirable or not.

    Where an objective prepares from mismatched completions (`kto`'s baseline), each row's prompt is also seen with the
    completion of its partner, without gradient: the next row in the epoch's order, the first for the last, whatever the
    micro-batches, processes and accumulation.

    Args:
        model, ref_model, args, train_dataset, eval_dataset, processing_class, peft_config, ...: TRL's own; rows hold
            ``prompt``, ``completion`` and ``label`` (bound as ``desirable``, 1 or 0), and the columns that the
            objective names.
        objective: a name, a dotted path, a callable, a mapping with ``name``, ``weight``, ``statistics`` and
            hyper-parameters, or a list of these, which is summed.
        kernel: a `KernelConfig` or a mapping of its keys.
        reference: ``cached``, ``adapter_off``, ``model``, ``none``, or ``auto``, which takes what the objective needs
            and costs least.

    Raises:
        ValueError: unknown objective, statistic, column or hyper-parameter; a TRL setting that ``objective`` or
            ``reference`` replaces; a label that is neither; a step of one row, or an order other than random or
            sequential, where there are mismatched completions.
    """

    _name = "posttrain-KTO"
    roles = ("",)
    extra_roles = (ROLE,)
    config_class = KTOConfig
    default_objective = "kto"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *,
        train_dataset: AnyDataset | None = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is not None:
            train_dataset = with_desirable(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: with_desirable(dataset, name) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = with_desirable(eval_dataset, "eval")
        super().__init__(model, ref_model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if isinstance(self.train_dataset, Dataset):
            self._check_rows(self.train_dataset)

    def _check_terms(self, terms: Sequence[Term], args: Any) -> None:
        super()._check_terms(terms, args)
        apart = _preparing_from_mismatched(terms)
        if apart is None:
            return
        self._prepares_apart = True
        self._apart_groups = wanted_groups(
            tuple(dataclasses.replace(term, statistics={}, update_inputs={}) for term in terms if term.prepares)
        )
        if args.train_batch_size * args.gradient_accumulation_steps * args.world_size == 1:
            raise ValueError(
                f"objective {apart!r} takes its baseline from the mismatched completions of a whole optimizer step, "
                "and trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps and the number of "
                "processes are all 1; raise one of them."
            )
        if args.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"trainer.train_sampling_strategy is {args.train_sampling_strategy!r}, and objective {apart!r} needs "
                "an order in which a row's neighbour is any other row; set it to random or sequential."
            )

    def _check_rows(self, dataset: Dataset) -> None:
        """Refuse a single row where it would be its own partner, and look at the balance of the classes."""
        if self._prepares_apart and len(dataset) == 1:
            raise ValueError(
                "the train data has one row, whose mismatched completion would be its own; give two or more."
            )
        if DESIRABLE not in dataset.column_names or not self.is_world_process_zero():
            return
        desirable = sum(label > 0.5 for label in dataset[DESIRABLE])
        undesirable = len(dataset) - desirable
        if not desirable or not undesirable:
            logger.warning(
                "All %d rows of the train data are %s: one class alone tells no good completion from a bad one.",
                len(dataset), "desirable" if desirable else "undesirable",
            )  # fmt: skip
            return
        for term in self.terms:
            _advise(term, desirable, undesirable)

    def _prepare_dataset(self, dataset: AnyDataset, processing_class: Any, args: Any, dataset_name: str) -> AnyDataset:
        # data sets given to `evaluate` come with their label
        return super()._prepare_dataset(with_desirable(dataset, dataset_name), processing_class, args, dataset_name)

    def _start_objective(self, terms: Sequence[Term], kernel: KernelConfig) -> None:
        super()._start_objective(terms, kernel)
        self._sums = {"train": ClassSums(), "eval": ClassSums()}

    def _observe(self, term: Term, loss: Loss, side: Side, sums: MetricSums) -> None:
        super()._observe(term, loss, side, sums)
        reward, label = loss.metrics.get("reward"), side.sequence_columns.get(DESIRABLE)
        if isinstance(sums, ClassSums) and reward is not None and label is not None and reward.shape == label.shape:
            sums.add_by_class(f"{term.name}/", reward, label > 0.5)

    def _prepared_from(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Computed, Side]:
        computed, side, _ = self._statistics(model, inputs["mismatched"], groups=self._apart_groups)
        return computed, side

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        args: Any = self.args
        if self._prepares_apart and isinstance(dataset, IterableDataset):
            dataset = StreamWithPartners(dataset, args.max_length)
        elif self._prepares_apart:
            seed = args.seed if args.data_seed is None else args.data_seed
            shuffle = is_training and args.train_sampling_strategy == "random"
            sampler = PartnerSampler(len(dataset), shuffle=shuffle, seed=seed)
            dataset, sampler_fn = WithPartners(dataset, sampler, args.max_length), lambda _: sampler
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _collator(self) -> CompletionFeedbackCollator:
        theirs: Any = self.data_collator
        return CompletionFeedbackCollator(
            pad_token_id=theirs.pad_token_id, pad_to_multiple_of=theirs.pad_to_multiple_of, columns=self._columns
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: Any = self._signature_columns
        if MISMATCHED not in names:
            names.append(MISMATCHED)


def _preparing_from_mismatched(terms: Sequence[Term]) -> str | None:
    """The objective that prepares from mismatched completions, if any.

    Raises:
        ValueError: a loss or a state reads them, or one that is prepared otherwise stands beside.
    """
    for term in terms:
        read = [name for name, one in {**term.statistics, **term.update_inputs}.items() if one.role == ROLE]
        if read or term.role == ROLE:
            raise ValueError(
                f"objective {term.name!r} asks for {(read or ['role: mismatched'])[0]!r} in its loss or state; "
                "mismatched completions are seen before the step's losses, by `prepare` alone."
            )
    apart = [term for term in terms if any(one.role == ROLE for one in term.prepare_inputs.values())]
    for term in terms if apart else ():
        plain = [name for name, one in term.prepare_inputs.items() if one.role != ROLE] + list(term.prepare_columns)
        if plain:
            raise ValueError(
                f"the `prepare` of objective {term.name!r} reads {plain[0]!r} and that of {apart[0].name!r} "
                "mismatched completions; a step is prepared from the one or from the other."
            )
    return apart[0].name if apart else None


def _advise(term: Term, desirable: int, undesirable: int) -> None:
    """Warn where weights and class sizes lie outside what KTO's paper advises."""
    weights: list[Any] = [term.hyperparameters.get(f"{name}_weight") for name in ("desirable", "undesirable")]
    if not all(weights):
        return
    good, bad = weights
    low, high = ADVISED
    ratio = good * desirable / (bad * undesirable)
    if low - 1e-9 <= ratio <= high + 1e-9:
        return
    logger.warning(
        "%s: desirable_weight %g * %d desirable rows is %.3g times undesirable_weight %g * %d undesirable rows, and "
        "1 to 1.33 times is advised; set desirable_weight to %.3g to %.3g, or undesirable_weight to %.3g to %.3g.",
        term.name, good, desirable, ratio, bad, undesirable, good * low / ratio, good * high / ratio,
        bad * ratio / high, bad * ratio / low,
    )  # fmt: skip
