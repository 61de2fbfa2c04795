"""The parts a report is made of, free of any format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mark = Literal["", "best", "better", "worse", "gap"]
# Marks must be seen without colour, too.
SIGNS: dict[Mark, str] = {"best": "★ ", "better": "▲ ", "worse": "▼ "}


@dataclass(frozen=True)
class Cell:
    """Text of a table's cell; ``detail`` stands smaller beside it, ``mark`` says what it is to the reader."""

    text: str
    detail: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Table:
    """Rows under a header; a row's first cell names it."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A plot as PNG; ``name`` is its file's stem, unique in the report, ``alt`` what it shows, in words."""

    name: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Figures:
    """Plots side by side under one caption."""

    figures: Sequence[Figure]
    caption: str


@dataclass(frozen=True)
class Text:
    """A paragraph; ``lead`` sets it larger."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Heading:
    """Within a section."""

    text: str


@dataclass(frozen=True)
class Code:
    """Text as it is; behind ``summary`` where that is given."""

    text: str
    summary: str = ""


Block = Table | Figures | Text | Heading | Code


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """The report: ``title`` is the question."""

    title: str
    subtitle: str
    sections: Sequence[Section]
