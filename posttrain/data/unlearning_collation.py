"""Batches of what is to be forgotten and what is to stay, role after role."""

from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.data.collation import ROW_NUMBER
from posttrain.data.preference_collation import REFERENCE_SUM, REFERENCE_TOKENS, number_in
from posttrain.side import Block, Side

# the order of the blocks in a micro-batch
ROLES = ("forget", "refusal", "retain", "retain_refusal")


@dataclass
class UnlearningCollator(DataCollatorForLanguageModeling):
    """Items of `posttrain.data.drawing.DrawnRows` to one batch with a `Side`.

    Args:
        columns: numbers of a row that objectives bind.
        template: ids that repeat over a forget answer's positions, for statistics at given ids; None for none.
        reference: `REFERENCE_SUM` or `REFERENCE_TOKENS`, the column of a cached reference; rows of roles that no term
            compares with one lack it and get zeros. None where nothing is cached.
    """

    columns: tuple[str, ...] = ()
    template: tuple[int, ...] | None = None
    reference: str | None = None

    def alone(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows that nothing is drawn beside."""
        return self.torch_call([{"forget": [row]} for row in rows])

    def torch_call(self, examples: list[dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
        """Collate items, role -> rows with ``input_ids`` and ``labels``.

        Raises:
            ValueError: a column is missing or not finite; the message names the column and the row.
        """
        roles = [role for role in ROLES if any(role in example for example in examples)]
        rows = {role: [row for example in examples for row in example.get(role, ())] for role in roles}
        flat = [row for role in roles for row in rows[role]]
        length = max((len(row["input_ids"]) for row in flat), default=1)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        ids = [row["input_ids"] + [self.pad_token_id] * (length - len(row["input_ids"])) for row in flat]
        mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in flat]
        items = {role: [i for i, e in enumerate(examples) for _ in e.get(role, ())] for role in roles}
        return {
            "input_ids": torch.tensor(ids, dtype=torch.long).reshape(-1, length),
            "attention_mask": torch.tensor(mask, dtype=torch.long).reshape(-1, length),
            "side": self._side(rows, [item for role in roles for item in items[role]], length, len(examples)),
        }

    def _side(self, rows: dict[str, list[dict[str, Any]]], items: list[int], length: int, count: int) -> Side:
        index: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        template: list[int] = []
        blocks: dict[str, Block] = {}
        for role, several in rows.items():
            first_sequence, first_token = len(lengths), len(targets)
            for row in several:
                # the first token of a row has no hidden state before it
                positions = [i for i in range(1, len(row["input_ids"])) if row["labels"][i] != -100]
                index.extend(len(lengths) * length + position - 1 for position in positions)
                targets.extend(row["labels"][position] for position in positions)
                lengths.append(len(positions))
                if self.template:
                    template.extend(self.template[i % len(self.template)] for i in range(len(positions)))
            blocks[role] = Block(slice(first_sequence, len(lengths)), slice(first_token, len(targets)))
        flat = [row for several in rows.values() for row in several]
        token_columns = {"teacher_ids": torch.tensor(template, dtype=torch.long)[:, None]} if self.template else {}
        sequence_columns = {
            name: torch.tensor([number_in(row, name) for row in flat], dtype=torch.float32) for name in self.columns
        }
        if self.reference == REFERENCE_SUM:
            # differences of these are small beside them, so they keep all their digits
            sums = [row.get(REFERENCE_SUM, 0.0) for row in flat]
            sequence_columns[REFERENCE_SUM] = torch.tensor(sums, dtype=torch.float64)
        if self.reference == REFERENCE_TOKENS:
            known = (row.get(REFERENCE_TOKENS, [0.0] * tokens) for row, tokens in zip(flat, lengths, strict=True))
            token_columns[REFERENCE_TOKENS] = torch.tensor([logp for one in known for logp in one], dtype=torch.float32)
        return Side(
            target_index=torch.tensor(index, dtype=torch.long),
            targets=torch.tensor(targets, dtype=torch.long),
            lengths=torch.tensor(lengths, dtype=torch.long),
            batch_row=torch.tensor(items, dtype=torch.long),
            row_number=torch.tensor([row.get(ROW_NUMBER, -1) for row in flat], dtype=torch.long),
            sequence_columns=sequence_columns,
            token_columns=token_columns,
            num_tokens=sum(len(row["input_ids"]) for row in flat),
            rows=count,
            roles=blocks,
        )
