"""Conversations written out in full: where the prompt ends and the answers begin."""

import itertools
import re
from collections.abc import Sequence

from posttrain.data.fields import Messages, Text, answer, message

_TURN = re.compile(r"(?:\A|\n\n)(?:#+ )?(System|Human|User|Assistant):\n?")
_ROLES = {"System": "system", "Human": "user", "User": "user", "Assistant": "assistant"}


def split_transcripts(texts: Sequence[str], chat: bool) -> tuple[Text, list[Text]]:
    """Prompt and answers of transcripts of one conversation with different ends.

    The prompt goes up to the last turn of the assistant that begins in what all have in common. A turn begins with
    ``Human:``, ``User:``, ``Assistant:`` or ``System:`` after an empty line, ``#`` before it or not.

    Args:
        texts: whole transcripts.
        chat: give messages instead of text.

    Raises:
        ValueError: there is no such turn.
    """
    letters = enumerate(zip(*texts, strict=False))
    common = texts[0][: next((i for i, found in letters if len(set(found)) > 1), min(map(len, texts)))]
    turns = list(_TURN.finditer(common))
    opening = next((turn for turn in reversed(turns) if turn[1] == "Assistant"), None)
    if opening is None:
        raise ValueError(
            "the answers have no turn 'Assistant:' in common that a prompt would end with; give the prompt as a column "
            "of its own."
        )
    ends = [text[opening.end() :] for text in texts]
    if not chat:
        return common[: opening.end()], list(ends)
    prompt = _messages(common, [turn for turn in turns if turn.start() <= opening.start()])
    return prompt, [answer(end.strip(), prompt) for end in ends]


def _messages(text: str, turns: Sequence[re.Match[str]]) -> Messages:
    """The messages before the last of the turns, which is left open."""
    before = text[: turns[0].start()].strip()
    found = [message("system", before)] if before else []
    for turn, following in itertools.pairwise(turns):
        found.append(message(_ROLES[turn[1]], text[turn.end() : following.start()].strip()))
    if not found:
        raise ValueError(
            "nothing stands before the answers' turn 'Assistant:'; give the prompt as a column of its own."
        )
    return found


def split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Prompt and completions of two conversations with a common start.

    The prompt goes up to the last message of the assistant before which both agree.

    Raises:
        ValueError: there is none.
    """
    cut = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
    if cut is None:
        cut = min(len(chosen), len(rejected)) - 1
    while cut and not (chosen[cut]["role"] == rejected[cut]["role"] == "assistant"):
        cut -= 1
    if not cut:
        raise ValueError(
            "chosen and rejected are whole conversations with no prompt in common; give it as a column of its own."
        )
    return chosen[:cut], chosen[cut:], rejected[cut:]
