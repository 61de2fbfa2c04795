"""Completions of one prompt in one row, [prompt, chosen, rejected]: the prompt is computed once.

Every completion takes up its positions after the prompt, and attends to the prompt and to itself only, so that its
hidden states are those of a row of its own. Which models allow that: `posttrain.modeling.shared_prefix_support`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

PROMPT_SEGMENT = 0
PADDING_SEGMENT = -1
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")

# Time of an entry of the attention's scores over that of as many operations of a matrix product: 1.3 measured on a CPU
# (float32, head width 64, forward and backward), where the plain causal kernel is hardly faster than the masked one.
_SCORE_COST = 1.3


@dataclass(frozen=True, eq=False)
class SharedPrefixLayout:
    """One row for each prompt with its completions, padded on the right.

    Args:
        input_ids: (rows, length).
        position_ids: (rows, length); every completion goes on from the prompt's end, padding stands at 0.
        segment_ids: (rows, length): 0 in the prompt, k in the k-th completion, -1 in padding.
        target_index: (targets,), positions in the flattened (rows * length) that predict a completion's token. The
            prompt's last position predicts the first token of each of its completions.
        targets: (targets,), these tokens: the first completion of every row, then the second of every row, and so on.
        lengths: targets of each completion, in the same order.
    """

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    segment_ids: Int[Tensor, "rows length"]
    target_index: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    lengths: list[int]


def shared_prefix_layout(
    prompts: Sequence[Sequence[int]],
    *completions: Sequence[Sequence[int]],
    pad_token_id: int,
    pad_to_multiple_of: int = 1,
) -> SharedPrefixLayout:
    """Lays out each prompt with its completions, on the CPU.

    After an empty prompt the first token of a completion is predicted by nothing, as in a row of its own. A completion
    that has no target then, or is empty, has length 0.

    Args:
        prompts: token ids.
        completions: for each role (chosen, rejected, ...) the token ids of one completion a prompt.
        pad_token_id: fills the rows.
        pad_to_multiple_of: of the rows' common length.

    Raises:
        ValueError: a role has not one completion for every prompt.
    """
    for number, role in enumerate(completions, start=1):
        if len(role) != len(prompts):
            raise ValueError(
                f"role {number} has {len(role)} completions for {len(prompts)} prompts; give one for every prompt."
            )
    pairs = list(zip(prompts, *completions, strict=True))
    longest = max((sum(map(len, parts)) for parts in pairs), default=0)
    length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    rows: list[_Row] = []
    targets: list[list[_Targets]] = [[] for _ in completions]
    for number, (prompt, *own) in enumerate(pairs):
        row = _Row([*prompt], [*range(len(prompt))], [PROMPT_SEGMENT] * len(prompt))
        for segment, completion in enumerate(own, start=1):
            targets[segment - 1].append(_targets(number * length, len(prompt), len(row.ids), completion))
            row.ids.extend(completion)
            row.positions.extend(range(len(prompt), len(prompt) + len(completion)))
            row.segments.extend([segment] * len(completion))
        rows.append(row)
    in_order = [one for role in targets for one in role]
    return SharedPrefixLayout(
        input_ids=_padded([row.ids for row in rows], length, pad_token_id),
        position_ids=_padded([row.positions for row in rows], length, 0),
        segment_ids=_padded([row.segments for row in rows], length, PADDING_SEGMENT),
        target_index=torch.tensor([position for one in in_order for position in one.predictors], dtype=torch.long),
        targets=torch.tensor([token for one in in_order for token in one.tokens], dtype=torch.long),
        lengths=[len(one.tokens) for one in in_order],
    )


class _Row(NamedTuple):
    ids: list[int]
    positions: list[int]
    segments: list[int]


class _Targets(NamedTuple):
    predictors: list[int]
    tokens: list[int]


def _targets(row_start: int, prompt: int, start: int, completion: Sequence[int]) -> _Targets:
    """What predicts a completion that begins ``start`` tokens into its row."""
    if not prompt:
        # as in a row of its own: the first token has no hidden state before it
        return _Targets([row_start + start + i for i in range(len(completion) - 1)], [*completion[1:]])
    index = [prompt - 1, *range(start, start + len(completion))][: len(completion)]
    return _Targets([row_start + position for position in index], [*completion])


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Int[Tensor, "rows length"]:
    padded = [row + [value] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), length)


def shared_prefix_mask(
    segment_ids: Int[Tensor, "rows length"], implementation: str, dtype: torch.dtype = torch.float32
) -> Tensor | BlockMask:
    """The ``attention_mask`` with which a Hugging Face model keeps the completions of a row apart.

    transformers passes a mask of four dimensions on as it is, and then does not take positions that start again for
    packed sequences.

    Args:
        segment_ids: (rows, length) of a `SharedPrefixLayout`, on the model's device.
        implementation: of the attention.
        dtype: of the scores, for ``eager``, which adds the mask to them.

    Returns:
        (rows, 1, length, length): for ``sdpa`` true where a position may look, for ``eager`` 0 there and the smallest
        number elsewhere; for ``flex_attention`` a block mask.

    Raises:
        ValueError: another implementation.
    """
    if implementation == "flex_attention":
        return _block_mask(segment_ids)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation {implementation!r} takes no mask; use one of {', '.join(IMPLEMENTATIONS)}."
        )
    visible = _visible(segment_ids)
    if implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def _visible(segment_ids: Int[Tensor, "rows length"]) -> Bool[Tensor, "rows 1 length length"]:
    """Every position sees itself, padding too: a row of scores with nothing in it would give NaN."""
    keys, queries = segment_ids[:, None, None, :], segment_ids[:, None, :, None]
    return ((keys == queries) | (keys == PROMPT_SEGMENT)).tril()


def _block_mask(segment_ids: Int[Tensor, "rows length"]) -> BlockMask:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        segment = segment_ids[row, key]
        return (query >= key) & ((segment == segment_ids[row, query]) | (segment == PROMPT_SEGMENT))

    rows, length = segment_ids.shape
    # compiled on a GPU, where the mask is then never written out in full
    return create_block_mask(
        visible, rows, None, length, length, device=str(segment_ids.device), _compile=segment_ids.is_cuda
    )


def worthwhile(
    prompt_lengths: Sequence[int], *completion_lengths: Sequence[int], width: int, implementation: str
) -> bool:
    """Whether sharing prompts takes less time than a row for every completion, by the count of operations of a layer.

    Shared, a layer of about 12 width² parameters sees each prompt once, but the completions of a row face one another
    in the attention, and only FlexAttention leaves out what the mask hides. With two completions of the prompt's length
    that pays up to about 4 * width tokens each; with long completions it pays from about one token of prompt to four.

    Args:
        prompt_lengths: tokens of each prompt.
        completion_lengths: for each role, tokens of each prompt's completion.
        width: of the model's hidden states.
        implementation: of the attention.
    """
    saved = (len(completion_lengths) - 1) * sum(prompt_lengths)
    if implementation == "flex_attention":
        return saved > 0
    more = 0
    for prompt, *own in zip(prompt_lengths, *completion_lengths, strict=True):
        more += (prompt + sum(own)) ** 2 - sum((prompt + completion) ** 2 for completion in own)
    # forward alone, in operations over 2 * width: the backward doubles both sides alike
    return 12 * width * saved > _SCORE_COST * 2 * more and saved > 0
