"""The HTML around a report's sections. Everything is in the one file; it asks nothing of the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["page", "section", "table"]

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --text: #1c1f23; --quiet: #62686f;
  --line: #e1e3e6; --accent: #0b6bb5; --marked: #e9f3fb; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --text: #e6e8ea; --quiet: #9aa2ab;
  --line: #32383e; --accent: #63b3f0; --marked: #1d3244; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.2rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: .4rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: 1rem 0; }
p { margin: .5rem 0; max-width: 46rem; }
.quiet, figcaption { color: var(--quiet); font-size: .88rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem; margin: 0; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.facts dt { color: var(--quiet); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure svg, figure img { width: 100%; height: auto; display: block; }
figure img { border-radius: .4rem; background: #ffffff; min-width: 42rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
th:first-child, td:first-child, td.words { text-align: left; }
tr.marked td, tr.marked td:first-child { background: var(--marked); }
pre { margin: 0; overflow-x: auto; font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 30rem) { body { padding: .6rem .5rem 2rem; } section { padding: .8rem .7rem; } }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole HTML document.

    Args:
        title: Plain text.
        sections: HTML, as `section` makes it.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(sections)}
</body>
</html>
"""


def section(title: str, *content: str) -> str:
    """A titled box.

    Args:
        title: Plain text.
        *content: HTML.
    """
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    """A table of plain texts that scrolls sideways where it is wider than the page.

    Args:
        head: Column titles. Columns are set flush right but for the first and those with an empty title.
        rows: Cells.
        marked: Whether a row stands out, by row. Default: none.
    """
    words = ["" if title else ' class="words"' for title in head]
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(words, row, strict=True))
        lines.append(f'<tr class="marked">{cells}</tr>' if i < len(marked) and marked[i] else f"<tr>{cells}</tr>")
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
