"""The report of a comparison: one HTML page that needs nothing beside it, and the same as Markdown."""

from pathlib import Path

from posttrain.experiments.report.content import document
from posttrain.experiments.report.document import Figures
from posttrain.experiments.report.html import to_html
from posttrain.experiments.report.markdown import to_markdown
from posttrain.experiments.results import Comparison

_PLOTS = "plots"


def write_report(comparison: Comparison, folder: str | Path) -> dict[str, Path]:
    """Write ``report.html`` and ``report.md`` with its ``plots/`` into a folder, over what an earlier call wrote.

    Whatever the comparison lacks is left out or stands as a gap, in words.

    Returns:
        ``html`` and ``markdown``: the two files.
    """
    target = Path(folder)
    plots = target / _PLOTS
    plots.mkdir(parents=True, exist_ok=True)
    found = document(comparison)
    figures = [
        one
        for section in found.sections
        for block in section.blocks
        if isinstance(block, Figures)
        for one in block.figures
    ]
    names = {f"{one.name}.png" for one in figures}
    for old in plots.glob("[0-9][0-9]_*.png"):
        if old.name not in names:
            old.unlink()
    for one in figures:
        (plots / f"{one.name}.png").write_bytes(one.png)
    paths = {"html": target / "report.html", "markdown": target / "report.md"}
    paths["html"].write_text(to_html(found), encoding="utf-8")
    paths["markdown"].write_text(to_markdown(found, _PLOTS), encoding="utf-8")
    return paths


__all__ = ["write_report"]
