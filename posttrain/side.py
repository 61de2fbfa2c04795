"""What the collator knows of a micro-batch: trained positions, whose they are, and the columns beside them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from posttrain.reduction import repeat_to_tokens


@dataclass(frozen=True)
class Block:
    """Where the sequences of one role, and their tokens, lie in a micro-batch."""

    sequences: slice
    tokens: slice


@dataclass(frozen=True, eq=False)
class Side:
    """What the collator knows of a micro-batch beside the model's own inputs.

    Args:
        target_index: (targets,), positions of the flattened (rows x length) hidden states that predict a trained token.
        targets: (targets,), the trained tokens; those of one sequence lie together.
        lengths: (sequences,), trained tokens per sequence, each at least 1.
        batch_row: (sequences,), the example of the micro-batch a sequence belongs to (packing puts several into one).
        row_number: (sequences,), its row in the data set as given, for messages; -1 where unknown.
        sequence_columns: name -> (sequences,), one number per sequence (both of a pair have the pair's).
        token_columns: name -> (targets,) or (targets, k), one entry per trained token.
        num_tokens: tokens of the micro-batch without padding, prompts included.
        rows: examples of the micro-batch.
        roles: role -> where its sequences lie, all of one role together and in the same order for each role of a
            pair; empty where sequences have no role.
    """

    target_index: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    lengths: Int[Tensor, " sequences"]
    batch_row: Int[Tensor, " sequences"]
    row_number: Int[Tensor, " sequences"]
    sequence_columns: dict[str, Tensor]
    token_columns: dict[str, Tensor]
    num_tokens: int
    rows: int
    roles: Mapping[str, Block] = field(default_factory=dict)

    def size(self, unit: str, role: str = "") -> int:
        """How many of a unit the micro-batch has, known without asking the device.

        Args:
            unit: ``tokens``, ``sequences`` or ``pairs``.
            role: whose; "" for those of all roles.
        """
        if unit == "pairs":
            return self.size("sequences", "chosen")
        if role and role not in self.roles:
            return 0
        if unit == "tokens":
            return _length(self.roles[role].tokens) if role else self.targets.shape[0]
        return _length(self.roles[role].sequences) if role else self.lengths.shape[0]

    def count(self, denominator: str) -> int:
        """`size` by the name of a denominator, such as ``tokens``, ``pairs`` or ``chosen_tokens``."""
        role, _, unit = denominator.rpartition("_")
        return self.size(unit, role)

    def of(self, role: str) -> "Side":
        """The part of one role; the whole for "" and where no sequence has a role."""
        if not role or not self.roles:
            return self
        nothing = Block(slice(0, 0), slice(0, 0))
        block = self.roles.get(role, nothing)
        return self._selected(block.sequences, block.tokens, {})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Side":
        """A copy on ``device``; accelerate moves whatever has this method along with the batch."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Side":
        """A copy in page-locked memory, as the data loader asks for."""
        return self._each(Tensor.pin_memory)

    def first_rows(self, count: int) -> tuple["Side", Tensor]:
        """The part of the first ``count`` examples, and the mask over targets that selects it."""
        sequences = self.batch_row < count
        tokens = repeat_to_tokens(sequences, self.lengths, self.targets.shape[0])
        roles: dict[str, Block] = {}
        first_sequence = first_token = 0
        for role, block in self.roles.items():
            sequence_end = first_sequence + int(sequences[block.sequences].sum())
            token_end = first_token + int(tokens[block.tokens].sum())
            roles[role] = Block(slice(first_sequence, sequence_end), slice(first_token, token_end))
            first_sequence, first_token = sequence_end, token_end
        return replace(self._selected(sequences, tokens, roles), rows=count), tokens

    def _selected(self, sequences: slice | Tensor, tokens: slice | Tensor, roles: Mapping[str, Block]) -> "Side":
        return replace(
            self,
            target_index=self.target_index[tokens],
            targets=self.targets[tokens],
            lengths=self.lengths[sequences],
            batch_row=self.batch_row[sequences],
            row_number=self.row_number[sequences],
            sequence_columns={name: column[sequences] for name, column in self.sequence_columns.items()},
            token_columns={name: column[tokens] for name, column in self.token_columns.items()},
            roles=roles,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Side":
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = change(value)
            elif isinstance(value, dict) and item.name != "roles":
                moved[item.name] = {name: change(tensor) for name, tensor in value.items()}
        return replace(self, **moved)


def _length(part: slice) -> int:
    return part.stop - part.start
