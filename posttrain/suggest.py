"""The sentence for an unknown name, with the nearest known one."""

import difflib
from collections.abc import Iterable

SHOWN_IN_FULL = 40


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None where none is alike."""
    candidates = list(known)
    folded = {candidate.lower(): candidate for candidate in candidates}
    # A wrongly nested key is often right in its last part: optim.learning_rate for learning_rate.
    for wanted in (name.lower(), name.lower().rpartition(".")[2]):
        matches = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
        if matches:
            return folded[matches[0]]
    return None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """A sentence for an error about a name that does not exist.

    Args:
        kind: what the name should have been, such as ``objective`` or ``hyper-parameter of objective 'dft'``.
        name: what was found.
        known: every name that would have been right; a long list is cut to the most similar ones.
    """
    candidates = list(known)
    if not candidates:
        return f"Unknown {kind}: {name!r}; there is none to choose from, leave it out."
    match = nearest(name, candidates)
    hint = f"; did you mean {match!r}?" if match else "."
    if len(candidates) > SHOWN_IN_FULL:
        similar = difflib.get_close_matches(name, candidates, n=5, cutoff=0.3)
        listing = f" Similar ones among {len(candidates)}: {', '.join(similar)}." if similar else ""
    else:
        listing = f" Known: {', '.join(candidates)}."
    return f"Unknown {kind}: {name!r}{hint}{listing}"
