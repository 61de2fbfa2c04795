"""Tables for people and for pipes."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

# Wide enough that no table is folded where nobody looks at it in a window.
PIPE_WIDTH = 200


def console(*, stderr: bool = False) -> Console:
    """Standard output (or error); a pipe or a file gets lines as long as they need to be."""
    found = Console(highlight=False, stderr=stderr)
    return found if found.is_terminal else Console(highlight=False, stderr=stderr, width=PIPE_WIDTH)


def print_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal, else aligned plain lines without folding or truncation."""
    screen = console()
    if screen.is_terminal:
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        screen.print(table)
        return
    widths = [max(len(line[index]) for line in (header, *rows)) for index in range(len(header))]
    print(title)
    for line in (header, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
