"""What a model card says of the training: the objectives and their paper, in place of the trainer's."""

import re
from collections.abc import Sequence

from posttrain.term import Term


def card_of(terms: Sequence[Term]) -> tuple[str, dict[str, str]]:
    """The name of the training procedure, and the first paper that an objective declares (``title`` and ``id``)."""
    names = " + ".join(term.name for term in terms)
    papers = (term.declaration.paper for term in terms)
    found = next((match for paper in papers if (match := re.search(r"arXiv:(\d+\.\d+)", paper))), None)
    paper = {} if found is None else {"title": f"the paper of {names} ({found[0]})", "id": found[1]}
    return f"posttrain: {names}", paper
