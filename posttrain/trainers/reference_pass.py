"""The reference's log-probabilities of prepared rows: read from disk, or computed in one pass and kept there."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from rich.progress import Progress
from torch import Tensor, nn

from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preference_collation import REFERENCE_SUM, REFERENCE_TOKENS
from posttrain.modeling import causal_lm
from posttrain.reduction import segment_sum, sum_dtype
from posttrain.reference_cache import Fingerprint, ReferenceCache, folder_beside, hash_rows, hash_weights
from posttrain.side import Side
from posttrain.trainers.prompt_sharing import separate_rows
from posttrain.trainers.reference_choice import Needs

logger = logging.getLogger(__name__)

# a micro-batch, on the device -> the reference's log-probability of each trained token
Ask = Callable[[dict[str, Any]], Tensor]


def shared_hash_of(model: nn.Module, adapter: str | None) -> str:
    """`hash_weights` on the main process, for all of them.

    Args:
        model: the reference, before an engine wraps it.
        adapter: see `hash_weights`.
    """
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    state: Any = PartialState()
    found = [hash_weights(model, adapter) if sharded or state.is_main_process else ""]
    broadcast_object_list(found)
    return found[0]


class ReferencePass:
    """Puts the reference's log-probabilities beside the rows of prepared data sets.

    Args:
        needs: of the terms.
        weights: hash of the reference model.
        model: it, or a model of its precision.
        folder: holds one folder for each data set; None keeps them beside the data sets' own cache files, or in the
            run's output folder.
        roles: of a row's completions.
        ids: columns of lists of integers, prompt and completions, that the numbers depend on.
        collator: of the trainer; every completion gets a row of its own.
        args: of the trainer.
        accelerator: of the trainer.
    """

    def __init__(
        self,
        needs: Needs,
        weights: str,
        model: nn.Module,
        *,
        folder: str | Path | None,
        roles: Sequence[str],
        ids: Sequence[str],
        collator: Any,
        args: Any,
        accelerator: Accelerator,
    ) -> None:
        self.needs, self.weights, self.folder, self.roles = needs, weights, folder, tuple(roles)
        self.ids = tuple(ids)
        self.collator, self.args, self.accelerator = separate_rows(collator), args, accelerator
        precision = str(causal_lm(model).dtype).removeprefix("torch.")
        mixed = str(accelerator.mixed_precision)
        self.precision = precision if mixed == "no" else f"{precision} under {mixed} autocast"

    def add(self, dataset: Dataset, name: str | None, ask: Ask | None) -> Dataset:
        """The data set with ``<role>_reference_sum_logp`` or ``<role>_reference_logp`` beside its columns.

        Args:
            dataset: prepared.
            name: of its folder and for messages; None for one that was not there when training started.
            ask: the reference; None where it is not at hand any more.

        Raises:
            ValueError: the folder holds numbers of something else, the reference is not at hand, or it gives a row a
                log-probability that is not finite.
        """
        cache = self._open(dataset, name)
        everywhere = gather_object([{chunk.start for chunk in cache.missing()}])
        missing = [chunk for chunk in cache.chunks if any(chunk.start in there for there in everywhere)]
        if missing and ask is None:
            raise ValueError(
                "reference is cached, and the reference model is no longer at hand to compute these rows; pass them as "
                "eval_dataset when the trainer is made, or set reference to model."
            )
        if missing and ask is not None:
            self._fill(cache, missing, dataset, name or "evaluation", ask)
        return cache.join(dataset)

    def _open(self, dataset: Dataset, name: str | None) -> ReferenceCache:
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            found = [hash_rows(dataset, self.ids), str(folder_beside(dataset, self.args.output_dir))]
        broadcast_object_list(found)
        fingerprint = Fingerprint(self.weights, found[0], self.needs.cached_statistics, self.precision)
        own = f"reference-{fingerprint.digest[:16]}"
        folder = Path(found[1], own) if self.folder is None else Path(self.folder, name or own)
        return ReferenceCache(folder, fingerprint, len(dataset))

    def _fill(self, cache: ReferenceCache, missing: list[range], dataset: Dataset, name: str, ask: Ask) -> None:
        total, known = sum(map(len, missing)), sum(map(len, cache.chunks)) - sum(map(len, missing))
        logger.info(
            "Asking the reference for %d rows of the %s data%s; kept in %s.",
            total, name, f" ({known} are known)" if known else "", cache.folder,
        )  # fmt: skip
        writes = self.accelerator.is_local_main_process
        if writes:
            cache.start()
        shown = self.accelerator.is_main_process and not self.args.disable_tqdm
        with Progress(disable=not shown) as progress:
            task = progress.add_task(f"Asking the reference ({name})", total=total)
            for chunk in missing:
                columns = self._compute(chunk, dataset, ask, lambda rows: progress.advance(task, rows))
                if writes:
                    cache.write(chunk, columns)
        self.accelerator.wait_for_everyone()

    def _compute(
        self, chunk: range, dataset: Dataset, ask: Ask, advance: Callable[[int], None]
    ) -> dict[str, list[Any]]:
        """A chunk's columns, its batches dealt to the processes in turn and put together on all of them."""
        size, processes = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        batches = [chunk[start : start + size] for start in range(0, len(chunk), size)]
        mine: list[tuple[int, dict[str, list[Any]]]] = []
        for turn in range(math.ceil(len(batches) / processes)):
            number = turn * processes + self.accelerator.process_index
            # without a batch of its own a process repeats the last: sharded weights are gathered by all at once
            rows = batches[min(number, len(batches) - 1)]
            answer = self._ask([dataset[row] for row in rows], ask)
            if number < len(batches):
                mine.append((number, answer))
            advance(sum(map(len, batches[turn * processes : (turn + 1) * processes])))
        parts = [answer for _, answer in sorted(gather_object(mine), key=lambda one: one[0])]
        columns = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        self._check(columns, chunk, dataset)
        return columns

    def _ask(self, examples: list[dict[str, Any]], ask: Ask) -> dict[str, list[Any]]:
        batch = send_to_device(self.collator(examples), self.accelerator.device)
        logp = ask(batch)
        side: Side = batch["side"]
        columns: dict[str, list[Any]] = {}
        for role in self.roles:
            own = logp[side.roles[role].tokens] if role else logp
            lengths, prefix = side.of(role).lengths, f"{role}_" if role else ""
            if self.needs.per_token:
                columns[prefix + REFERENCE_TOKENS] = [part.tolist() for part in own.cpu().split(lengths.tolist())]
            else:
                sums = segment_sum(own.to(sum_dtype(own.device)), lengths)
                columns[prefix + REFERENCE_SUM] = sums.tolist()
        return columns

    def _check(self, columns: dict[str, list[Any]], chunk: range, dataset: Dataset) -> None:
        sums = {name: torch.tensor([math.fsum(v) if isinstance(v, list) else v for v in values])
                for name, values in columns.items()}  # fmt: skip
        for name, values in sums.items():
            wrong = (~values.isfinite()).nonzero().flatten().tolist()
            if wrong:
                numbers = [dataset[chunk[position]].get(ROW_NUMBER, chunk[position]) for position in wrong[:10]]
                raise ValueError(
                    f"the reference model gives {len(wrong)} rows a {name} that is not finite: rows "
                    f"{', '.join(map(str, numbers))}{', ...' if len(wrong) > 10 else ''}; check its weights and dtype."
                )
