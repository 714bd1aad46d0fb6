"""What the pages of runs and sweeps are made of: one HTML file that fetches nothing, runs no script, and can be read on
a phone, in print, and in the dark."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

REPORT = "report.html"  # in the folder of a run and of a sweep
# Light and dark by the reader's own setting; paper is light. The colours of series are those of the plots (Okabe and
# Ito), on a dark ground the lighter ones of them.
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1b1b;--muted:#5c5c5c;--rule:#ddd;--soft:#f4f5f6;--bad:#b3261e;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#e69f00;--c5:#56b4e9;--c6:#1b1b1b}
@media screen and (prefers-color-scheme:dark){:root{--paper:#16181a;--ink:#e8e8e8;--muted:#a3a8ad;--rule:#3a3e42;
--soft:#202326;--bad:#ff8a80;--c0:#56b4e9;--c1:#ff8b3d;--c2:#2fc79b;--c5:#8fd0f5;--c6:#e8e8e8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--paper);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.15rem;line-height:1.35;margin:.2rem 0 1rem}
h1 span{display:block;margin:.5rem 0;padding-left:.7rem;border-left:4px solid var(--c0)}
h1 small{display:block;font-size:.9rem;font-weight:normal}
h2{font-size:1.1rem;margin:1.8rem 0 .5rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1rem 0 .3rem}
.name{margin:0;color:var(--muted)}
.error{border-left:4px solid var(--bad);padding:.4rem .7rem;background:var(--soft);white-space:pre-wrap;margin:.5rem 0}
.error b{color:var(--bad)}
.charts{columns:2 22rem;column-gap:2rem}
figure{margin:0 0 1.2rem;max-width:36rem;break-inside:avoid}
.plots figure{max-width:none;overflow-x:auto}
figcaption{font-weight:600;margin-bottom:.3rem}
figcaption small{display:block;font-weight:normal;color:var(--muted)}
svg{display:block;width:100%;height:auto;fill:var(--ink);overflow:visible}
.plots svg{min-width:30rem;max-width:44rem}
.chart text{font:13px system-ui,sans-serif;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.chart .mark{font-size:12px;fill:var(--muted)}
.chart .rule{stroke:var(--rule)}
.chart .reference{stroke:var(--muted);stroke-dasharray:4 3}
.chart polyline,.chart .interval{fill:none;stroke:currentColor;stroke-width:2}
.chart circle{stroke-width:2}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}
.table{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);overflow-wrap:normal}
td.long{min-width:14rem;overflow-wrap:anywhere}
td.value{min-width:6.5rem;overflow-wrap:anywhere}
.number{text-align:right}
summary{cursor:pointer;padding:.2rem 0}
code{font:.85em ui-monospace,monospace;background:var(--soft);padding:.05rem .25rem;border-radius:3px}
a{color:var(--c0)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.5rem 0}
dd{margin:0}
@media(max-width:40rem){table{font-size:.8rem}th,td{padding:.2rem .35rem}
dl{display:block}dd{margin:0 0 .5rem}}
@media print{body{max-width:none;padding:0;font-size:11pt}h2,h3,section>p{break-after:avoid}
.table,.plots figure{overflow:visible}
.plots svg{min-width:0}tr{break-inside:avoid}details.told::details-content{content-visibility:visible;height:auto}}
"""
# Nothing is fetched and no script runs, whatever the text of the page holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, *parts: str) -> str:
    """A whole page. title: text; parts: HTML."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def write_page(path: Path, page: str) -> None:
    """Write a page as UTF-8, as it says of itself. What UTF-8 cannot hold (a file's name may be such) is replaced."""
    path.write_text(page.encode("utf-8", "replace").decode("utf-8"), encoding="utf-8")


def section(heading: str, *parts: str) -> str:
    """A heading (text) and what is below it (HTML); empty if nothing is."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def figure(picture: str, caption: str = "", note: str = "") -> str:
    """A picture (SVG) below its caption and a note (text), unless it has its title itself; empty without a picture."""
    if not picture:
        return ""
    small = f"<small>{escape(note)}</small>" if note else ""
    above = f"<figcaption>{escape(caption)}{small}</figcaption>\n" if caption else ""
    return f"<figure>\n{above}{picture}\n</figure>"


def figures(*shown: str, kind: str = "charts") -> str:
    """Figures side by side where there is room; empty if there are none. kind: "charts", or "plots", which have small
    text and are as wide as that needs."""
    body = "\n".join(one for one in shown if one)
    return f'<div class="{kind}">\n{body}\n</div>' if body else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str]) -> str:
    """A table of cells that are HTML, below headings that are text. kinds: of each column, "number", "value" (which
    may break anywhere), "long" or ""."""
    classes = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(f"<th{of}>{escape(heading)}</th>" for heading, of in zip(headings, classes))
    body = ["<tr>" + "".join(f"<td{of}>{cell}</td>" for cell, of in zip(row, classes)) + "</tr>" for row in rows]
    lines = "\n".join(body)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def folded_away(summary: str, body: str, kind: str = "") -> str:
    """What is only seen on demand: a summary (text) that opens a body (HTML). kind "told": print shows it."""
    of_kind = f' class="{kind}"' if kind else ""
    return f"<details{of_kind}><summary>{escape(summary)}</summary>\n{body}\n</details>"


def bullets(items: Sequence[str]) -> str:
    """A list of items that are HTML."""
    return "<ul>\n" + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ul>"


def described(terms: Mapping[str, str]) -> str:
    """Terms (text) and what each is (HTML)."""
    return "<dl>\n" + "\n".join(f"<dt>{escape(term)}</dt><dd>{what}</dd>" for term, what in terms.items()) + "\n</dl>"


def code(text: str) -> str:
    """Text as it is typed, or a name."""
    return f"<code>{escape(text)}</code>"


def link(text: str, address: str) -> str:
    """A link to an address of the web, or to a path relative to the page."""
    return f'<a href="{escape(address)}">{escape(text)}</a>'


def relative(path: Path, folder: Path) -> str:
    """The address of a file from a page in ``folder``."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def failure(status: str, error: str) -> str:
    """What a run ended with."""
    return f'<p class="error" role="alert"><b>{escape(status)}</b> {escape(error)}</p>'
