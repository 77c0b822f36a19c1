"""The frame of a report as one HTML page, light or dark as the reader's system is. It has no script and needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --quiet: #5b6675; --page: #f5f6f8; --card: #ffffff; --edge: #dde1e7;
  --good: #18794e; --bad: #c2321f; --blue: #2f6fde; --orange: #d9690f; --teal: #0f8a8a; --violet: #8a4fd0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --quiet: #a0a9b6; --page: #14181e; --card: #1d232b; --edge: #343d49;
  --good: #4cc38a; --bad: #ff7a66; --blue: #6ea5ff; --orange: #ff9f4a; --teal: #3fc6c6; --violet: #bd93f9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1180px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; } h3 { font-size: 1rem; margin: 0; }
p { margin: .3rem 0; } .quiet { color: var(--quiet); font-size: .87rem; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 14px; min-width: 0; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); }
.verdict { border-left: 6px solid var(--bad); } .verdict.pass { border-left-color: var(--good); }
.verdict strong { color: var(--bad); } .verdict.pass strong, li.pass b { color: var(--good); } li b { color: var(--bad); }
ul { margin: .4rem 0; padding-left: 0; list-style: none; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px 4px 0; text-align: right; border-bottom: 1px solid var(--edge); }
th:first-child, td:first-child { text-align: left; } td:last-child, th:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
svg { display: block; width: 100%; height: auto; max-width: 560px; } svg text { fill: var(--quiet); font-size: 11.5px; }
.grid line, line.grid { stroke: var(--edge); stroke-width: 1; } .fill { fill: var(--c); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .84rem; color: var(--quiet); }
.legend i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em; background: var(--c); }
.a { --c: var(--blue); } .b { --c: var(--orange); } .c { --c: var(--teal); } .d { --c: var(--violet); } .soft { opacity: .5; }
blockquote { margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
blockquote .same { color: var(--quiet); } blockquote mark { background: none; color: inherit; }
details { margin-top: 12px; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .78rem; }
@media (max-width: 560px) { body { padding: 10px; } th, td { padding-right: 7px; font-size: .84rem; } }
"""


def document(title: str, body: Sequence[str]) -> str:
    """Put the parts into a page. ``title`` is escaped; the parts are HTML."""
    # The policy keeps a browser from fetching anything, whatever text the page shows.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def card(title: str, drawn: str, told: str) -> str:
    """Frame a drawing, with a title above and words below it."""
    return f'<section class="card"><h3>{escape(title)}</h3>\n{drawn}\n<p class="quiet">{escape(told)}</p></section>\n'


def table(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Lay out lines of text as a table."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{_cells(line)}</tr>" for line in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(line: Sequence[str]) -> str:
    """Cells of a line. The last one spans the empty ones before it, which gives it the room that a phone lacks."""
    first, *rest = line
    empty = next((index for index, cell in enumerate(rest) if cell), 0)
    spanned = f'<td colspan="{empty + 1}">{escape(rest[empty])}</td>'
    return f"<td>{escape(first)}</td>{spanned}" + "".join(f"<td>{escape(cell)}</td>" for cell in rest[empty + 1 :])
