"""A document as one HTML page that needs nothing beside it."""

import base64
import re
from html import escape

from posttrain.experiments.report.document import (
    SIGNS,
    Block,
    Cell,
    Code,
    Document,
    Figures,
    Heading,
    Section,
    Table,
    Text,
)

_STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --wash: #f6f8fa; --link: #0a5bb5; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; overflow-wrap: anywhere; }
p, li { max-width: 75ch; overflow-wrap: anywhere; }
.subtitle, figcaption, caption, .detail { color: var(--soft); }
.lead { font-size: 1.12rem; padding: .9rem 1.1rem; background: #eef5fc; border-left: 4px solid var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: 1rem 0 0; }
a { color: var(--link); }
.scroll { overflow-x: auto; margin: 1rem 0 1.5rem; border: 1px solid var(--line); border-radius: 6px; }
.scroll { background: linear-gradient(90deg, #fff 60%, #fff0) 0 0 / 40px 100% local no-repeat,
  linear-gradient(270deg, #fff 60%, #fff0) 100% 0 / 40px 100% local no-repeat,
  linear-gradient(270deg, #0002, #0000) 100% 0 / 14px 100% scroll no-repeat; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { display: none; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { background: var(--wash); vertical-align: bottom; }
tbody th { font-weight: 500; position: sticky; left: 0; background: #fff; border-right: 1px solid var(--line); }
tbody th { min-width: 6rem; max-width: 17rem; overflow-wrap: break-word; }
td { max-width: 26rem; }
td.short { white-space: nowrap; }
.detail { display: block; font-size: .8rem; white-space: nowrap; }
th .detail { white-space: normal; }
.best { font-weight: 700; } .best .detail { font-weight: 400; } .better { color: #04603e; } .worse { color: #a3330b; }
.gap { color: var(--soft); font-style: italic; }
.note { color: var(--soft); font-size: .88rem; margin: -1rem 0 1.5rem; }
figure { margin: 1rem 0 1.75rem; }
figcaption { font-size: .9rem; max-width: 75ch; margin-top: .5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: .75rem; }
.plots img { width: 100%; max-width: 560px; height: auto; border: 1px solid var(--line); border-radius: 6px; }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--wash); }
pre { border: 1px solid var(--line); border-radius: 6px; }
code { font: .85rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 600px) {
  main { padding: 1rem .9rem 3rem; }
  h1 { font-size: 1.4rem; }
  tbody th { max-width: 9rem; min-width: 0; }
  th, td { padding: .4rem .55rem; }
  td { max-width: 16rem; }
}
@media print { .scroll { overflow: visible; } section { break-inside: auto; } figure { break-inside: avoid; } }
"""


def to_html(document: Document) -> str:
    """The whole page: style within, plots as data."""
    sections = "\n".join(_section(section) for section in document.sections)
    links = "".join(f'<li><a href="#{_anchor(one.title)}">{escape(one.title)}</a></li>' for one in document.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(document.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(document.title)}</h1>
<p class="subtitle">{escape(document.subtitle)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
{sections}
</main>
</body>
</html>
"""


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{_anchor(section.title)}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Text(text, lead):
            return f'<p class="lead">{escape(text)}</p>' if lead else f"<p>{escape(text)}</p>"
        case Heading(text):
            return f"<h3>{escape(text)}</h3>"
        case Code(text, summary):
            code = f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
            return f"<details><summary>{escape(summary)}</summary>{code}</details>" if summary else code
        case Figures():
            return _figures(block)
        case Table():
            return _table(block)


def _figures(block: Figures) -> str:
    images = "\n".join(
        f'<img src="data:image/png;base64,{base64.b64encode(one.png).decode()}" alt="{escape(one.alt)}">'
        for one in block.figures
    )
    caption = f"<figcaption>{escape(block.caption)}</figcaption>"
    return f'<figure><div class="plots">\n{images}\n</div>{caption}</figure>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_breakable(name)}</th>' for name in table.header)
    rows = "\n".join(
        "<tr>" + "".join(_cell(cell, "th" if column == 0 else "td") for column, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    # The box that scrolls must be reachable by keyboard, and then named.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">\n'
        f"<table><caption>{escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table>\n</div>\n"
        f'<p class="note">{escape(table.caption)}</p>'
    )


def _cell(cell: Cell, tag: str) -> str:
    classes = " ".join(name for name in (cell.mark, "short" if len(cell.text) < 30 and tag == "td" else "") if name)
    named = f' class="{classes}"' if classes else ""
    scope = ' scope="row"' if tag == "th" else ""
    detail = f' <span class="detail">{escape(cell.detail)}</span>' if cell.detail else ""
    text = _breakable(cell.text) if tag == "th" else escape(cell.text)
    return f"<{tag}{scope}{named}>{SIGNS.get(cell.mark, '')}{text}{detail}</{tag}>"


def _breakable(text: str) -> str:
    """A name that a narrow column may break after its brackets and underscores, not within its words."""
    return re.sub(r"([(,/_])", r"\1<wbr>", escape(text))
