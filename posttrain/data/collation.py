"""Rows to a micro-batch: TRL's own padding plus what the objectives need, all worked out on the CPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.side import Side
from posttrain.statistics import TOKEN_COLUMNS

ROW_NUMBER = "row_number"


@dataclass(frozen=True)
class Span:
    """One sequence's trained ``positions`` within its row; ``number`` counts the sequences of a packed row."""

    example: dict[str, Any]
    number: int
    positions: list[int]

    @property
    def row_number(self) -> int:
        """Row in the data set as it was given; -1 where unknown (a packed stream)."""
        number = self.example.get(ROW_NUMBER, -1)
        return number[self.number] if isinstance(number, list) else number

    def value(self, name: str) -> Any:
        """The sequence's number in column ``name``, or its trained tokens' entries where the column is a list.

        A packed row holds per-example numbers as one list entry per sequence. That is told from a list beside
        ``input_ids`` by its length: a row with a trained token has more tokens than sequences.
        """
        value = self.example.get(name)
        if value is None:
            raise ValueError(
                f"column {name!r} is missing or empty in row {self.row_number} of the data; fill it or drop the row."
            )
        if not isinstance(value, list):
            return value
        if len(value) == len(self.example.get("seq_lengths") or []):
            return value[self.number]
        if len(value) != len(self.example["input_ids"]):
            raise ValueError(
                f"column {name!r} has {len(value)} entries in row {self.row_number} whose input_ids has "
                f"{len(self.example['input_ids'])}; a list runs beside input_ids, one entry per token."
            )
        return [value[position] for position in self.positions]


@dataclass
class CompletionCollator(DataCollatorForLanguageModeling):
    """TRL's language-modelling collator, with a `Side` under ``side``.

    Args:
        columns: data columns that objectives bind. A number is per example; a list runs beside ``input_ids``.
        vocab_size: bound for ``teacher_ids``; None leaves them unchecked.
    """

    columns: tuple[str, ...] = ()
    vocab_size: int | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with ``input_ids``, ``labels`` and optionally ``seq_lengths`` (packed rows).

        Raises:
            ValueError: a side column is missing, not finite, of the wrong length, or names a token id outside the
                vocabulary; the message names the column and the row.
        """
        batch = super().torch_call(examples)
        return {**batch, "side": self._side(examples, batch["labels"])}

    def _side(self, examples: list[dict[str, Any]], labels: Tensor) -> Side:
        index: list[int] = []
        lengths: list[int] = []
        batch_row: list[int] = []
        taken: list[Span] = []
        flat = 0
        trained = (labels.reshape(-1) != -100).tolist()
        for row, example in enumerate(examples):
            start = flat if self.padding_free else row * labels.shape[1]
            offset = 0
            whole = [len(example["input_ids"])]
            for number, length in enumerate((self.padding_free and example.get("seq_lengths")) or whole):
                # the first token of a sequence has no hidden state before it
                positions = [i for i in range(offset + 1, offset + length) if trained[start + i]]
                offset += length
                if positions:
                    index.extend(start + position - 1 for position in positions)
                    lengths.append(len(positions))
                    batch_row.append(row)
                    taken.append(Span(example, number, positions))
            flat += offset
        target_index = torch.tensor(index, dtype=torch.long)
        sequence_columns, token_columns = self._columns(taken)
        return Side(
            target_index=target_index,
            targets=labels.reshape(-1)[target_index + 1],
            lengths=torch.tensor(lengths, dtype=torch.long),
            batch_row=torch.tensor(batch_row, dtype=torch.long),
            row_number=torch.tensor([span.row_number for span in taken], dtype=torch.long),
            sequence_columns=sequence_columns,
            token_columns=token_columns,
            num_tokens=sum(len(example["input_ids"]) for example in examples),
            rows=len(examples),
        )

    def _columns(self, taken: Sequence[Span]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sequence_columns: dict[str, Tensor] = {}
        token_columns: dict[str, Tensor] = {}
        for name in self.columns:
            values = [span.value(name) for span in taken]
            lists = [isinstance(value, list) for value in values]
            if any(lists) and not all(lists):
                raise ValueError(f"column {name!r} holds numbers in some rows and lists in others; make it one kind.")
            if any(lists) or name in TOKEN_COLUMNS:
                token_columns[name] = self._token_tensor(name, [entry for value in values for entry in value])
            else:
                numbers = [_finite(name, value, span.row_number) for value, span in zip(values, taken, strict=True)]
                sequence_columns[name] = torch.tensor(numbers, dtype=torch.float32)
        return sequence_columns, token_columns

    def _token_tensor(self, name: str, values: list[Any]) -> Tensor:
        """(targets,) numbers or (targets, k) lists, padded to the widest in the micro-batch."""
        ids = name == "teacher_ids"
        dtype = torch.long if ids else torch.float32
        if name not in TOKEN_COLUMNS and not (values and isinstance(values[0], list)):
            return torch.tensor(values, dtype=dtype)
        k = max((len(value) for value in values), default=1)
        # a slot without a teacher token points at token 0 with log-probability -inf, that is, with weight zero
        fill: float = 0 if ids else -math.inf
        tensor = torch.tensor([[*value, *[fill] * (k - len(value))] for value in values], dtype=dtype).reshape(-1, k)
        if ids and self.vocab_size is not None and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"column 'teacher_ids' holds the token id {low if low < 0 else high}, outside the vocabulary of "
                    f"{self.vocab_size}; annotate the data with a teacher that shares this model's tokenizer."
                )
        return tensor


def _finite(name: str, value: Any, row: int) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"column {name!r} holds {value!r} in row {row} of the data; an objective needs a finite number there."
        )
    return float(value)
