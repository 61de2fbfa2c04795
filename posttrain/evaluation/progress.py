"""A progress bar, where one is wanted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress

Advance = Callable[[int], None] | None


@contextmanager
def bar(shown: bool, description: str, total: int) -> Iterator[Advance]:
    """Yields what to call with the number of steps done, None where nothing is shown."""
    if not shown:
        yield None
        return
    with Progress() as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
