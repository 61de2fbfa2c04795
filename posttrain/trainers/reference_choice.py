"""Which kind of reference serves a trainer: what the terms ask, and what the rest allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import parse_flag_from_env
from datasets import IterableDataset
from peft import PeftConfig, PeftModel

from posttrain.binding import reference_groups
from posttrain.kernels.table import TEACHER_STATISTICS
from posttrain.statistics import Statistic
from posttrain.suggest import unknown
from posttrain.term import KernelOptions, Term

KINDS = ("auto", "cached", "adapter_off", "model", "none")
_WHY = {
    "cached": "log-probabilities of each row are computed once, before training",
    "adapter_off": "the policy answers without its adapter",
    "model": "a frozen model stands beside the policy",
}
# initialisations of LoRA that leave the weights below the adapter as they were
_KEEPS_BASE = (True, False, "gaussian", "eva")


@dataclass(frozen=True)
class Needs:
    """What the terms ask of a reference model.

    Args:
        groups: kernel statistics by kernel options.
        vocabulary: its whole next-token distribution, as the teacher of the kernel.
        per_token: whether log-probabilities are read token by token, not only summed over a completion.
        no_cache: why they cannot be computed once for each row, or None.
    """

    groups: Mapping[KernelOptions, tuple[str, ...]]
    vocabulary: bool = False
    per_token: bool = False
    no_cache: str | None = None

    @property
    def any(self) -> bool:
        return bool(self.groups) or self.vocabulary

    @property
    def cached_statistics(self) -> str:
        """Which numbers a cache holds, in words."""
        what = "log-probabilities per token" if self.per_token else "log-probabilities summed over each completion"
        return f"{what} at temperature {next(iter(self.groups)).temperature:g}"


def reference_needs(terms: tuple[Term, ...], moving_roles: Sequence[str] = ()) -> Needs:
    """What terms ask of a reference model.

    Args:
        terms: of the trainer.
        moving_roles: roles of completions that stand beside other prompts in each epoch.
    """
    groups = reference_groups(terms)
    of_reference = [(term, one) for term in terms for one in term.all_statistics if one.reference_kernel_names]
    vocabulary = any(one.kernel in TEACHER_STATISTICS for term in terms for one in term.all_statistics)
    no_cache = None
    for term, one in of_reference:
        if one.reference_kernel_names != ("logp",):
            no_cache = f"objective {term.name!r} reads {one.name!r}, and only log-probabilities are cached"
        elif (one.role or term.role) in moving_roles:
            no_cache = f"objective {term.name!r} reads {one.name!r}, whose completions change places in each epoch"
    if vocabulary:
        no_cache = "the objective compares whole next-token distributions with the reference's"
    elif len({options.temperature for options in groups}) > 1:
        no_cache = "the objective's terms read the reference at several temperatures"
    return Needs(groups, vocabulary, any(_per_token(one) for _, one in of_reference), no_cache)


def reference_roles(terms: Sequence[Term]) -> list[str]:
    """The roles of the completions whose reference statistics the terms read, each once."""
    read = (one.role or term.role for term in terms for one in term.all_statistics if one.reference_kernel_names)
    return list(dict.fromkeys(read))


def _per_token(statistic: Statistic) -> bool:
    whole = statistic.kernel in ("logratio", "sequence_logp")
    return not (whole or (statistic.kernel == "logp" and statistic.reduction in ("sum", "mean")))


@dataclass(frozen=True)
class Circumstances:
    """What else decides which kind of reference serves.

    Args:
        streamed: whether some data set is a stream.
        whole_epoch: whether training sees each row once or more.
        adapter: whether the policy has adapters.
        changed_base: why the policy without its adapter is not what it was, or None.
        given: whether a reference model is given.
        synced: whether the reference is to follow the policy (TR-DPO).
        fsdp: whether the policy will be sharded by FSDP, and only then.
    """

    streamed: bool = False
    whole_epoch: bool = True
    adapter: bool = False
    changed_base: str | None = None
    given: bool = False
    synced: bool = False
    fsdp: bool = False


def circumstances(
    args: Any, train_dataset: Any, eval_dataset: Any, model: Any, ref_model: Any, peft_config: PeftConfig | None
) -> Circumstances:
    """Those of a trainer that is being made; the policy may be a model or its name."""
    adapters = (
        list(model.peft_config.values()) if isinstance(model, PeftModel) else [peft_config] if peft_config else []
    )
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    streamed = any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated))
    whole = not streamed and rows_drawn(args, len(train_dataset)) >= len(train_dataset)
    return Circumstances(
        streamed=streamed,
        whole_epoch=whole,
        adapter=bool(adapters),
        changed_base=changed_base(adapters),
        given=ref_model is not None,
        synced=getattr(args, "sync_ref_model", False),
        fsdp=bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
    )


def rows_drawn(args: Any, rows: int) -> float:
    """How many rows training draws out of so many, over all its epochs."""
    step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * step if args.max_steps > 0 else args.num_train_epochs * rows


def choose(reference: str, needs: Needs, here: Circumstances) -> tuple[str, str]:
    """The kind of reference, and why in words.

    Args:
        reference: one of `KINDS`; ``auto`` takes the first that serves of ``cached``, where training sees each row
            once or more, ``adapter_off`` and ``model``.
        needs: of the terms.
        here: the rest.

    Raises:
        ValueError: an unknown kind, or one that cannot serve here; the reason is named.
    """
    if reference not in KINDS:
        raise ValueError(unknown("reference", reference, KINDS))
    if not needs.any:
        if here.synced:
            raise ValueError(
                "trainer.sync_ref_model is true, and no term of the objective reads a reference; set it to false."
            )
        return "none", "no term of the objective reads a reference"
    passed: list[str] = []
    for kind in ("cached", "adapter_off", "model") if reference == "auto" else (reference,):
        obstacle = _obstacle(kind, needs, here)
        if obstacle is None and kind == "cached" and reference == "auto" and not here.whole_epoch:
            obstacle = "training ends before it has seen each row once"
        if obstacle is None:
            return kind, "; ".join([_WHY[kind], *passed])
        passed.append(f"not {kind}: {obstacle}")
    if reference == "auto":
        raise ValueError(f"no kind of reference serves here ({'; '.join(passed)}); change one of these.")
    raise ValueError(f"reference is {reference}, which cannot serve here: {obstacle}.")


def _obstacle(kind: str, needs: Needs, here: Circumstances) -> str | None:
    """Why a kind cannot serve, or None."""
    if here.synced and kind != "model":
        return "trainer.sync_ref_model is true, and only a model of its own can follow the policy"
    if here.synced and here.adapter:
        return "trainer.sync_ref_model is true, and TRL lets no reference follow a policy with adapters"
    if kind == "cached":
        if needs.no_cache is not None:
            return needs.no_cache
        if here.streamed:
            return "the data is streamed, and a cache needs rows that stay; set streaming to false"
        if here.adapter and not here.given and here.fsdp:
            return "FSDP shards the policy only when training starts; take adapter_off"
    if kind == "adapter_off":
        if here.given:
            return "a reference model is given, which the policy without its adapter is not"
        if not here.adapter:
            return "the policy has no adapter that could be turned off; set peft, or take cached or model"
    if kind != "model" and here.adapter and not here.given:
        return here.changed_base
    return None


def changed_base(configs: Sequence[PeftConfig]) -> str | None:
    """Why a model without these adapters is not the one they were put on, or None."""
    for config in configs:
        bias = getattr(config, "bias", "none")
        if bias != "none":
            return f"peft.bias is {bias!r}, so that weights below the adapter are trained; set it to none"
        initialisation = getattr(config, "init_lora_weights", True)
        if initialisation not in _KEEPS_BASE:
            return f"peft.init_lora_weights is {initialisation!r}, which changes the weights below the adapter"
    return None
