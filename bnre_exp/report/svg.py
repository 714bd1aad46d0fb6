"""Charts as SVG for a page: written by hand, so that they take their colours from the page and cost no import."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460  # of a view box: on a phone text is a little smaller than that of the page, on a desk as large
LETTER = 7.6  # of text, on average, in the widest of the usual fonts
DIGIT = 7.2  # of a number of an axis
LONGEST_LABEL = 26  # letters that stand beside a row; longer labels stand above it
CUT = 62  # letters of any label
MOST_POINTS = 40  # of a line whose points are marked
MOST_MARKS = 8  # numbers of an axis that are all written
COLOURS = 7  # that a page has, by the classes c0 to c6


@dataclass(frozen=True)
class Dot:
    """A row of :func:`dot_chart`. text: the value as it is written; interval: of the value; colour: by its number."""

    label: str
    value: float
    text: str
    interval: tuple[float, float] | None = None
    is_hollow: bool = False
    colour: int = 0


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``, at most ``most + 1``."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * most >= (high - low) * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def dot_chart(
    title: str, dots: Sequence[Dot], *, axis: str = "", reference: float | None = None, names: Sequence[str] = ()
) -> str:
    """A row for each dot: label, dot and interval, value. reference: a value that a line marks; names: of the colours,
    for a legend. Empty text if no value is finite; a single one that is not has its row, and no dot."""
    if not any(math.isfinite(dot.value) for dot in dots):
        return ""
    found = [value for dot in dots for value in (dot.value, *(dot.interval or ())) if math.isfinite(value)]
    marked = reference if reference is not None and math.isfinite(reference) else None
    low, high = _padded([*found, *([] if marked is None else [marked])])
    longest = max(len(dot.label) for dot in dots)
    is_beside = longest <= LONGEST_LABEL
    left = LETTER * longest + 14 if is_beside else 10.0
    right, step = WIDTH - LETTER * max(len(dot.text) for dot in dots) - 18, 24 if is_beside else 38
    parts, top = _legend({name: colour for colour, name in enumerate(names)}) if names else ([], 0.0)
    bottom = top + step * len(dots) + 6.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for mark, text in _readable(low, high, right - left):
        parts += [_rule(x(mark), x(mark), top + 2, bottom), _mark(text, x(mark), bottom + 16)]
    if axis:
        parts.append(_mark(axis, (left + right) / 2, bottom + 33))
    if marked is not None:
        parts.append(_rule(x(marked), x(marked), top + 2, bottom, "reference"))
    for number, dot in enumerate(dots):
        above = top + number * step
        label_at = (left - 10, above + 17) if is_beside else (10.0, above + 14)
        y = above + (12 if is_beside else 26)
        parts.append(_text(_shortened(dot.label), *label_at, "end" if is_beside else "start"))
        parts += [_text(dot.text, WIDTH - 4, y + 5, "end"), *_dot(dot, x, y)]
    described = "; ".join(f"{dot.label}: {dot.text}{_interval_in_words(dot.interval)}" for dot in dots)
    return _svg(title, described, bottom + (40 if axis else 22), parts)


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """Bars from zero: label, value (0 or more) and the value as it is written. Empty text without any."""
    bars = [bar for bar in bars if math.isfinite(bar[1])]
    if not bars:
        return ""
    left = LETTER * max(len(label) for label, _, _ in bars) + 14
    longest = WIDTH - left - LETTER * max(len(text) for _, _, text in bars) - 18
    most = max(value for _, value, _ in bars) or 1.0
    parts = []
    for number, (label, value, text) in enumerate(bars):
        y, width = 28.0 * number, max(longest * value / most, 1.0)
        parts.append(_text(label, left - 10, y + 18, "end"))
        parts.append(
            f'<rect class="c0" fill="currentColor" x="{left:.1f}" y="{y + 4:.1f}" width="{width:.1f}" height="18"/>'
        )
        parts.append(_text(text, left + width + 7, y + 18, "start"))
    return _svg(title, "; ".join(f"{label}: {text}" for label, _, text in bars), 28.0 * len(bars) + 2, parts)


def line_chart(title: str, lines: Mapping[str, Mapping[int, float]], *, x_label: str, is_log: bool = False) -> str:
    """Lines of values by a whole number, each with its name; values that are not finite are left out. is_log: the
    numbers, all above zero, are as far apart as their logarithms. A line has the colour of its place, also where others
    are empty. Empty text if no line has two points."""
    colours = {name: colour for colour, name in enumerate(lines)}
    points = {name: [(n, y) for n, y in sorted(line.items()) if math.isfinite(y)] for name, line in lines.items()}
    points = {name: line for name, line in points.items() if line}
    if not any(len(line) > 1 for line in points.values()):
        return ""
    numbers = sorted({n for line in points.values() for n, _ in line})
    low, high = _padded([y for line in points.values() for _, y in line])
    parts, top = _legend({name: colours[name] for name in points})
    marks = _written(ticks(low, high))
    left, right, bottom = LETTER * max(len(text) for _, text in marks) + 14, WIDTH - 14.0, top + 190
    place: Callable[[float], float] = math.log if is_log else float
    first, last = place(numbers[0]), place(numbers[-1])

    def x(number: float) -> float:
        return left + 8 + (place(number) - first) / (last - first or 1) * (right - left - 16)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    for mark, text in marks:
        parts += [_rule(left, right, y(mark), y(mark)), _mark(text, left - 6, y(mark) + 4, "end")]
    parts += [_mark(f"{n:.0f}", x(n), bottom + 17) for n in _marked(numbers, x, is_log)]
    parts.append(_mark(x_label, (left + right) / 2, bottom + 35))
    parts += [_line([(x(n), y(value)) for n, value in line], colours[name]) for name, line in points.items()]
    said = [
        f"{name}: from {line[0][1]:.4g} at {line[0][0]} to {line[-1][1]:.4g} at {line[-1][0]}"
        for name, line in points.items()
    ]
    return _svg(title, "; ".join(said), bottom + 42, parts)


def _readable(low: float, high: float, room: float) -> list[tuple[float, str]]:
    """Ticks of a horizontal axis as text, as many as can be read in ``room``."""
    for most in (6, 5, 4, 3, 2):
        marks = _written(ticks(low, high, most))
        widest = DIGIT * max((len(text) for _, text in marks), default=0) + 8
        if len(marks) < 2 or room * (marks[1][0] - marks[0][0]) / (high - low) >= widest:
            break
    return marks


def _marked(numbers: Sequence[int], x: Callable[[float], float], is_log: bool) -> list[float]:
    """The whole numbers that an axis has, far enough apart to be read."""
    marks = [float(n) for n in numbers]
    if len(marks) > MOST_MARKS and not is_log:
        return [n for n in ticks(marks[0], marks[-1], 6) if n == round(n)]
    kept = marks[:1]
    for mark in marks[1:]:
        if x(mark) - x(kept[-1]) >= DIGIT * len(f"{mark:.0f}") + 8:
            kept.append(mark)
    return kept


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """A range with room at its ends, never empty."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _written(marks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks as text, all with as many digits."""
    step = abs(marks[1] - marks[0]) if len(marks) > 1 else abs(marks[0]) if marks else 1.0
    digits = max(0, -math.floor(math.log10(step or 1.0) + 1e-9))
    is_plain = digits <= 5 and all(abs(mark) < 1e6 for mark in marks)
    return [(mark, f"{mark + 0.0:.{digits}f}" if is_plain else f"{mark:.1e}") for mark in marks]


def _interval_in_words(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})"


def _shortened(text: str) -> str:
    return text if len(text) <= CUT else f"{text[: CUT - 1]}…"


def _dot(dot: Dot, x: Callable[[float], float], y: float) -> list[str]:
    parts = []
    if dot.interval is not None and all(math.isfinite(end) for end in dot.interval):
        low, high = x(dot.interval[0]), x(dot.interval[1])
        parts.append(f'<path class="interval" d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"/>')
    if math.isfinite(dot.value):
        fill = "var(--paper)" if dot.is_hollow else "currentColor"
        parts.append(f'<circle cx="{x(dot.value):.1f}" cy="{y}" r="4.5" fill="{fill}" stroke="currentColor"/>')
    return [f'<g class="c{dot.colour % COLOURS}">{"".join(parts)}</g>']


def _line(points: Sequence[tuple[float, float]], colour: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="currentColor"/>' for x, y in points]
    marks = marks if len(points) <= MOST_POINTS else []
    return f'<g class="c{colour % COLOURS}"><polyline points="{path}"/>{"".join(marks)}</g>'


def _legend(colours: Mapping[str, int]) -> tuple[list[str], float]:
    """The names of lines in their colours, and where the chart begins below them."""
    parts, x, y = [], 8.0, 14.0
    for name, colour in colours.items():
        name, width = _shortened(name), 34 + LETTER * min(len(name), CUT)
        if x + width > WIDTH and x > 8:
            x, y = 8.0, y + 20
        parts.append(f'<g class="c{colour % COLOURS}"><polyline points="{x:.1f},{y - 4} {x + 16:.1f},{y - 4}"/></g>')
        parts.append(_text(name, x + 21, y, "start"))
        x += width
    return parts, y + 14


def _rule(x1: float, x2: float, y1: float, y2: float, kind: str = "rule") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _mark(text: str, x: float, y: float, anchor: str = "middle") -> str:
    return f'<text class="mark" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    key = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="t-{key} d-{key}">'
        f'<title id="t-{key}">{escape(title)}</title><desc id="d-{key}">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
