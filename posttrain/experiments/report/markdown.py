"""A document as Markdown whose plots are files beside it."""

import re
from collections.abc import Sequence

from posttrain.experiments.report.document import SIGNS, Block, Cell, Code, Document, Figures, Heading, Table, Text


def to_markdown(document: Document, plots: str) -> str:
    """GitHub's Markdown; ``plots`` is the folder of the PNG files, relative to the Markdown file."""
    parts = [f"# {_escape(document.title)}", _escape(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {_escape(section.title)}")
        parts.extend(_block(block, plots) for block in section.blocks)
    return "\n\n".join(parts) + "\n"


def _block(block: Block, plots: str) -> str:
    match block:
        case Text(text, lead):
            return f"**{_escape(text)}**" if lead else _escape(text)
        case Heading(text):
            return f"### {_escape(text)}"
        case Code(text, summary):
            return _code(text, summary)
        case Figures(figures, caption):
            images = "\n".join(f"![{_escape(one.alt)}]({plots}/{one.name}.png)" for one in figures)
            return f"{images}\n\n*{_escape(caption)}*"
        case Table():
            return _table(block)


def _code(text: str, summary: str) -> str:
    # A fence longer than any run of backticks within cannot be closed by the text.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    code = f"{fence}\n{text.rstrip()}\n{fence}"
    return f"<details><summary>{_escape(summary)}</summary>\n\n{code}\n\n</details>" if summary else code


def _table(table: Table) -> str:
    lines = [_row([_escape(name) for name in table.header]), _row(["---"] * len(table.header))]
    lines += [_row([_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines) + f"\n\n*{_escape(table.caption)}*"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    # Intervals carry brackets of their own.
    detail = cell.detail if not cell.detail or cell.detail[0] in "[+-" else f"({cell.detail})"
    text = _escape(f"{SIGNS.get(cell.mark, '')}{cell.text} {detail}".strip())
    return f"**{text}**" if cell.mark == "best" else f"*{text}*" if cell.mark == "gap" else text


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, in one line: tables end at a newline."""
    return re.sub(r"([\\`*<|\[\]])", r"\\\1", " ".join(text.split()))
