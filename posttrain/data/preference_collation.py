"""Batches of prompts with completions, all of one role together, and the `Side` that says which is which."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preference_preparation import PROMPT, expected, is_valid
from posttrain.modeling.shared_prefix import SharedPrefixLayout, shared_prefix_layout
from posttrain.side import Block, Side

# Columns of a reference model, per completion: summed over its tokens, or a list over its trained tokens.
REFERENCE_SUM, REFERENCE_TOKENS = "reference_sum_logp", "reference_logp"


@dataclass(frozen=True)
class Sequences:
    """Prompts with completions, one sequence a row, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    target_index: Tensor
    targets: Tensor
    lengths: list[int]


def lay_out(pairs: Sequence[tuple[list[int], list[int]]], pad_token_id: int, multiple_of: int | None) -> Sequences:
    """Rows of prompt + completion; every completion token but a sequence's first is predicted by the one before it.

    Args:
        pairs: prompt ids and completion ids of each row.
        pad_token_id: fills the rows' ends.
        multiple_of: the rows' length is rounded up to this.
    """
    rows = [prompt + completion for prompt, completion in pairs]
    length = max(map(len, rows), default=1)
    if multiple_of:
        length += -length % multiple_of
    index: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for number, (prompt, _) in enumerate(pairs):
        first = max(len(prompt), 1)
        trained = rows[number][first:]
        index.extend(range(number * length + first - 1, number * length + first - 1 + len(trained)))
        targets.extend(trained)
        lengths.append(len(trained))
    return Sequences(
        torch.tensor([row + [pad_token_id] * (length - len(row)) for row in rows], dtype=torch.long).reshape(
            -1, length
        ),
        torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]).reshape(-1, length),
        torch.tensor(index, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        lengths,
    )


def sequence_side(
    examples: Sequence[dict[str, Any]],
    roles: Sequence[str],
    laid: Sequences | SharedPrefixLayout,
    columns: Sequence[str],
    tokens: int,
) -> Side:
    """The `Side` of sequences that lie role after role, each role in the examples' order.

    Args:
        examples: rows with ``<role>_ids`` (``completion_ids`` for the role "").
        roles: such as ``("chosen", "rejected")``, or ``("",)``.
        laid: where the trained tokens lie.
        columns: numbers of a row that objectives bind.
        tokens: of the micro-batch, without padding.
    """
    count = len(examples)
    starts = [sum(laid.lengths[: count * number]) for number in range(len(roles) + 1)]
    blocks = {
        role: Block(slice(count * number, count * (number + 1)), slice(starts[number], starts[number + 1]))
        for number, role in enumerate(roles)
        if role
    }
    sequence_columns = {
        name: torch.tensor([number_in(example, name) for example in examples] * len(roles), dtype=torch.float32)
        for name in columns
    }
    token_columns: dict[str, Tensor] = {}
    prefixes = [f"{role}_" if role else "" for role in roles]
    if examples and prefixes[0] + REFERENCE_SUM in examples[0]:
        # differences of these are small beside them, so they keep all their digits
        sums = [float(example[prefix + REFERENCE_SUM]) for prefix in prefixes for example in examples]
        sequence_columns[REFERENCE_SUM] = torch.tensor(sums, dtype=torch.float64)
    if examples and prefixes[0] + REFERENCE_TOKENS in examples[0]:
        logps = [logp for prefix in prefixes for example in examples for logp in example[prefix + REFERENCE_TOKENS]]
        token_columns[REFERENCE_TOKENS] = torch.tensor(logps, dtype=torch.float32)
    return Side(
        target_index=laid.target_index,
        targets=laid.targets,
        lengths=torch.tensor(laid.lengths, dtype=torch.long),
        batch_row=torch.arange(count).repeat(len(roles)),
        row_number=torch.tensor([example.get(ROW_NUMBER, -1) for example in examples] * len(roles), dtype=torch.long),
        sequence_columns=sequence_columns,
        token_columns=token_columns,
        num_tokens=tokens,
        rows=count,
        roles=blocks,
    )


def number_in(example: dict[str, Any], name: str) -> float:
    """A row's number in a column.

    Raises:
        ValueError: it is missing or no finite number; column and row are named.
    """
    value = example.get(name)
    if not is_valid(name, value):
        raise ValueError(
            f"column {name!r} holds {value!r} in row {example.get(ROW_NUMBER, -1)} of the data; an objective needs "
            f"{expected(name)} there."
        )
    return float(value)  # type: ignore[arg-type]


def number_or_nan(example: dict[str, Any], name: str) -> float:
    """A row's number in a column that is only watched; NaN where it has none."""
    value = example.get(name)
    return float(value) if is_valid(name, value) else math.nan  # type: ignore[arg-type]


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator of pairs with a `Side` under ``side``; rows come truncated from `finish_completions`.

    Args:
        columns: data columns that objectives bind, one number a pair.
        watched: data columns that diagnostics read; NaN where a pair has no number.
        shares_prompts: whether chosen and rejected of a micro-batch go into one row behind their prompt; called with
            the lengths of prompts, chosen and rejected. None: never.
    """

    columns: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    shares_prompts: Callable[..., bool] | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

        Raises:
            ValueError: a column is missing or not finite; the message names the column and the row.
        """
        roles = ("chosen", "rejected")
        prompts = [example[PROMPT] for example in examples]
        completions = [[example[f"{role}_ids"] for example in examples] for role in roles]
        rows = [(prompt, own) for role in completions for prompt, own in zip(prompts, role, strict=True)]
        tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
        lengths = [[*map(len, part)] for part in (prompts, *completions)]
        if self.shares_prompts is not None and self.shares_prompts(*lengths):
            multiple_of = self.pad_to_multiple_of or 1
            shared = shared_prefix_layout(
                prompts, *completions, pad_token_id=self.pad_token_id, pad_to_multiple_of=multiple_of
            )
            side = self._watching(sequence_side(examples, roles, shared, self.columns, tokens), examples)
            inputs = {name: getattr(shared, name) for name in ("input_ids", "position_ids", "segment_ids")}
            return {**inputs, "side": side}
        laid = lay_out(rows, self.pad_token_id, self.pad_to_multiple_of)
        side = self._watching(sequence_side(examples, roles, laid, self.columns, tokens), examples)
        return {"input_ids": laid.input_ids, "attention_mask": laid.attention_mask, "side": side}

    def _watching(self, side: Side, examples: list[dict[str, Any]]) -> Side:
        for name in self.watched:
            values = [number_or_nan(example, name) for example in examples] * len(side.roles)
            side.sequence_columns.setdefault(name, torch.tensor(values, dtype=torch.float32))
        return side


@dataclass
class CompletionFeedbackCollator(DataCollatorForUnpairedPreference):
    """TRL's collator of single completions with a `Side` under ``side``.

    Where rows hold ``mismatched_completion_ids``, the same prompts with those completions stand under ``mismatched``,
    as a micro-batch of its own.

    Args:
        columns: data columns that objectives bind, one number a completion.
    """

    columns: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with ``prompt_ids`` and ``completion_ids``.

        Raises:
            ValueError: a column is missing or not finite; the message names the column and the row.
        """
        batch = self._batch(examples, "", "completion_ids", self.columns)
        if examples and "mismatched_completion_ids" in examples[0]:
            batch["mismatched"] = self._batch(examples, "mismatched", "mismatched_completion_ids", ())
        return batch

    def _batch(
        self, examples: list[dict[str, Any]], role: str, completion: str, columns: tuple[str, ...]
    ) -> dict[str, Any]:
        rows = [(example[PROMPT], example[completion]) for example in examples]
        laid = lay_out(rows, self.pad_token_id, self.pad_to_multiple_of)
        tokens = sum(len(prompt) + len(completion) for prompt, completion in rows)
        side = sequence_side(examples, (role,), laid, columns, tokens)
        return {"input_ids": laid.input_ids, "attention_mask": laid.attention_mask, "side": side}
