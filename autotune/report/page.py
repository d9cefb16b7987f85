"""One HTML page that needs nothing else: no network, no files beside it; for phones and screens, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { --ink: #1b1f24; --soft: #5b6470; --paper: #fff; --card: #f6f7f9; --line: #dde1e6; --accent: #0f7b4d;
  --warn: #a05a00; --s0: #2f6fd6; --s1: #0f9b63; --s2: #d9730d; --s3: #9a4fd0; --s4: #c8385a; --s5: #0893a8;
  --s6: #7a6a1f; --s7: #6b7480; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa4b0; --paper: #111418; --card: #191d23;
  --line: #2c323a; --accent: #4fd39a; --warn: #f0b05a; --s0: #76a8ff; --s1: #4fd39a; --s2: #ffab5e; --s3: #c79bf2;
  --s4: #ff8aa6; --s5: #5fd2e3; --s6: #d8c568; --s7: #a7b0bb; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.15rem; font-weight: 600; margin: 0 0 4px; color: var(--soft); }
h2 { font-size: 1.1rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 0 0 8px; }
.verdict { font-size: clamp(1.6rem, 5vw, 2.6rem); font-weight: 700; line-height: 1.15; margin: 8px 0; }
.verdict b { color: var(--accent); }
.soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.fact, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.fact b { display: block; font-size: 1.3rem; }
.fact span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; }
svg { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; overflow: visible; }
svg text { fill: var(--soft); } svg .name { fill: var(--ink); } svg .title { fill: var(--ink); }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--line); stroke-width: 1; }
.line, .joined { fill: none; stroke-width: 2; } .joined { stroke: var(--s1); stroke-dasharray: 4 4; }
.median { stroke: var(--ink); stroke-width: 2; } .whisker { stroke: var(--ink); stroke-width: 1.5; opacity: .7; }
.mark { cursor: pointer; } .mark:hover circle { r: 8; } .mark.plain { fill: var(--s7); opacity: .75; }
.mark.best { fill: var(--s1); } .mark.base { fill: var(--s4); } .mark.front { fill: var(--s0); }
STYLES
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 8px 0 0; font-size: .85rem; color: var(--soft); }
.item i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
table.wide { min-width: 44rem; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px;
  overflow-x: auto; }
#tip { position: fixed; pointer-events: none; background: var(--ink); color: var(--paper); padding: 6px 10px;
  border-radius: 6px; font-size: .85rem; max-width: min(340px, 90vw); opacity: 0; z-index: 2; }
"""
_SERIES = "\n".join(
    f".mark.s{n} {{ fill: var(--s{n}); }} .line.s{n} {{ stroke: var(--s{n}); }} i.s{n} {{ background: var(--s{n}); }}"
    for n in range(8)
)
_SCRIPT = """
const tip = document.getElementById("tip");
function show(event) {
  const mark = event.target.closest(".mark");
  if (!mark) { tip.style.opacity = 0; return; }
  tip.textContent = mark.dataset.words;
  tip.style.opacity = 1;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 12, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(8, event.clientY - box.height - 10) + "px";
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
document.querySelectorAll("svg title").forEach((title) => title.remove());
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    style = _STYLE.replace("STYLES", _SERIES)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f'<meta name="color-scheme" content="light dark"><style>{style}</style></head><body><main>\n'
        + "\n".join(body)
        + f'\n</main><div id="tip" role="status"></div><script>{_SCRIPT}</script></body></html>\n'
    )


def verdict(kicker: str, words: str, more: str) -> str:
    """What to use, first of all; ``words`` is HTML."""
    return f'<h1>{escape(kicker)}</h1><p class="verdict">{words}</p><p class="soft">{escape(more)}</p>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Figures in boxes: the figure, and what it is."""
    boxes = "".join(
        f'<div class="fact"><b>{escape(figure)}</b><span>{escape(name)}</span></div>' for figure, name in pairs
    )
    return f'<div class="facts">{boxes}</div>'


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def charts(*figures: tuple[str, str]) -> str:
    """Charts side by side where there is room: a title and the drawing each."""
    found = "".join(f"<figure><h3>{escape(title)}</h3>{drawing}</figure>" for title, drawing in figures)
    return f'<div class="charts">{found}</div>'


def paragraph(words: str) -> str:
    """Plain text."""
    return f'<p class="soft">{escape(words)}</p>'


def code(text: str) -> str:
    """Something to copy."""
    return f"<pre>{escape(text)}</pre>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where it is too wide; ``numbers`` are the columns set flush right."""

    def cell(tag: str, place: int, words: str) -> str:
        kind = ' class="number"' if place in numbers else ""
        return f"<{tag}{kind}>{escape(words)}</{tag}>"

    head = "".join(cell("th", place, words) for place, words in enumerate(header))
    lines = ("".join(cell("td", place, words) for place, words in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="wide"' if len(header) > 3 else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
