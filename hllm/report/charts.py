"""Charts as inline SVG: sharp at any size, readable in light and dark, nothing to load.

Colours are CSS variables of the page (`page.html`); each series also has a shape of its own, so that no chart
depends on telling colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate

from markupsafe import Markup, escape

WIDTH = 480
FONT = 12
GLYPH = 0.56
"""Mean width of a letter in units of the font size."""


STYLES = {"circle": "candidate", "square": "baseline", "diamond": "champion", "triangle": "untrained"}
"""The mark of a family -> colour and shape in a chart of several families."""


@dataclass(frozen=True)
class Point:
    """One estimate with its interval; `kind` names colour and shape (candidate, baseline, untrained, ...)."""

    name: str
    kind: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    name: str
    note: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Dot:
    """One item of the map; `kind` is the number of its colour."""

    x: float
    y: float
    kind: int
    size: float
    title: str


@dataclass(frozen=True)
class Curve:
    """Estimates along an axis, each (value, low, high), and the power law through them."""

    name: str
    kind: str
    places: Sequence[float]
    values: Sequence[tuple[float, float, float]]
    factor: float
    exponent: float


def forest(title: str, axis: str, groups: Sequence[Group]) -> Markup:
    """Estimates with their intervals, one line each, groups under headings."""
    longest = max((len(point.name) for group in groups for point in group.points), default=0)
    left, right, top, row, head = max(128.0, 16 + longest * 12.5 * GLYPH), 54, 34, 22, 24
    rows = sum(len(group.points) for group in groups)
    headings = sum(bool(group.name) for group in groups)
    gaps = 8 * max(len(groups) - 1, 0)
    bottom = top + rows * row + headings * head + gaps
    points = [point for group in groups for point in group.points]
    ticks = nice_ticks(0.0, max((point.high for point in points), default=0.0))
    scale = _scale(ticks[0], ticks[-1], left, WIDTH - right)
    parts = [_title(title, WIDTH)]
    for tick in ticks:
        parts.append(_line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(_text(scale(tick), bottom + 15, number(tick), "middle", "tick"))
    parts.append(_text((left + WIDTH - right) / 2, bottom + 32, axis, "middle", "axis"))
    y = float(top)
    for group in groups:
        if group.name:
            parts.append(_text(0, y + 16, group.name, "start", "strong"))
            parts.append(_text(WIDTH, y + 16, group.note, "end", "tick"))
            y += head
        for point in group.points:
            middle = y + row / 2
            parts.append(_text(left - 10, middle + 4, point.name, "end", "label"))
            parts.append(
                _line(scale(point.low), middle, scale(point.high), middle, f"interval s-{point.kind}")
            )
            parts.append(_mark(scale(point.value), middle, point.kind))
            parts.append(_text(WIDTH, middle + 4, f"{point.value:.4f}", "end", "value"))
            y += row
        y += 8
    described = "; ".join(f"{point.name} {point.value:.4f}" for point in points)
    return _svg(parts, WIDTH, bottom + 40, f"{title}: {described}")


def lines(
    title: str, x_axis: str, y_axis: str, steps: Sequence[float], values: Sequence[float], smooth: bool
) -> Markup:
    """One curve over the training steps; noisy curves get a moving average on top."""
    left, right, top, bottom, height = 52, 14, 34, 190, 232
    spread = sorted(values)
    # The first losses are far above the rest: they may leave the picture so that the others can be seen.
    highest = spread[min(len(spread) - 1, int(len(spread) * 0.995))] if smooth else spread[-1]
    y_ticks = nice_ticks(spread[0], max(highest, spread[0]))
    x_ticks = nice_ticks(0.0, max(steps))
    x = _scale(0.0, max(max(steps), 1e-9), left, WIDTH - right)
    y = _scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [_title(title, WIDTH)]
    for tick in y_ticks:
        parts.append(_line(left, y(tick), WIDTH - right, y(tick), "grid"))
        parts.append(_text(left - 7, y(tick) + 4, number(tick), "end", "tick"))
    for tick in x_ticks:
        if tick <= max(steps):
            parts.append(_text(x(tick), bottom + 16, f"{tick:,.0f}", "middle", "tick"))
    parts.append(_text((left + WIDTH - right) / 2, height - 8, x_axis, "middle", "axis"))
    parts.append(
        _text(0, 0, y_axis, "middle", "axis", transform=f"translate(11 {(top + bottom) / 2}) rotate(-90)")
    )
    clipped = [min(value, y_ticks[-1]) for value in values]
    if smooth:
        parts.append(_path(steps, clipped, x, y, "curve raw"))
        parts.append(
            _path(steps, [min(value, y_ticks[-1]) for value in moving_average(values)], x, y, "curve")
        )
    else:
        parts.append(_path(steps, clipped, x, y, "curve"))
        parts.extend(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" class="dot"/>'
            for a, b in zip(steps, clipped, strict=True)
        )
    return _svg(
        parts,
        WIDTH,
        height,
        f"{title}: from {values[0]:.4g} to {values[-1]:.4g} over {max(steps):,.0f} steps",
    )


def power_laws(title: str, x_axis: str, curves: Sequence[Curve]) -> Markup:
    """Estimates with their intervals on logarithmic axes; a power law is a straight line there."""
    left, right, top, bottom, height = 62, 14, 54, 230, 272
    places = sorted({place for curve in curves for place in curve.places})
    ends = [end for curve in curves for value in curve.values for end in value if end > 0]
    span = (math.log(min(ends)) - 0.05, math.log(max(ends)) + 0.05)
    x = _scale(math.log(places[0]), math.log(places[-1]), left + 12, WIDTH - right - 12)
    y = _scale(*span, bottom, top)
    parts = [_title(title, WIDTH)]
    for tick in (math.exp(span[0] + share * (span[1] - span[0])) for share in (0.05, 0.35, 0.65, 0.95)):
        parts.append(_line(left, y(math.log(tick)), WIDTH - right, y(math.log(tick)), "grid"))
        parts.append(_text(left - 7, y(math.log(tick)) + 4, f"{tick:.3g}", "end", "tick"))
    for place in places:
        parts.append(_text(x(math.log(place)), bottom + 16, f"{place:g}", "middle", "tick"))
    parts.append(_text((left + WIDTH - right) / 2, height - 8, x_axis, "middle", "axis"))
    for number, curve in enumerate(curves):
        named = f"{curve.name}: exponent {curve.exponent:+.3f}"
        parts.append(_mark(left + 8 + number * 210, 32, curve.kind))
        parts.append(_text(left + 20 + number * 210, 36, named, "start", "label"))
        law = [math.log(curve.factor) + curve.exponent * math.log(end) for end in curve.places]
        parts.append(
            _line(
                x(math.log(curve.places[0])),
                y(law[0]),
                x(math.log(curve.places[-1])),
                y(law[-1]),
                f"interval s-{curve.kind}",
            )
        )
        for place, (value, low, high) in zip(curve.places, curve.values, strict=True):
            across = x(math.log(place))
            low_y, high_y = (y(max(math.log(max(end, 1e-12)), span[0])) for end in (low, high))
            parts.append(_line(across, low_y, across, high_y, f"interval s-{curve.kind}"))
            parts.append(_mark(across, y(math.log(value)), curve.kind))
    described = "; ".join(f"{curve.name}, exponent {curve.exponent:+.3f}" for curve in curves)
    return _svg(parts, WIDTH, height, f"{title} over {x_axis}: {described}")


def timeline(
    title: str, y_axis: str, seconds: Sequence[int], counts: Sequence[int], width_days: int
) -> Markup:
    """Events per period."""
    left, right, top, bottom, height = 52, 14, 34, 190, 232
    x_from, x_to = seconds[0], seconds[-1] + width_days * 86_400
    y_ticks = nice_ticks(0, max(counts))
    x, y = _scale(x_from, x_to, left, WIDTH - right), _scale(0, y_ticks[-1], bottom, top)
    parts = [_title(title, WIDTH)]
    for tick in y_ticks:
        parts.append(_line(left, y(tick), WIDTH - right, y(tick), "grid"))
        parts.append(_text(left - 7, y(tick) + 4, short_count(tick), "end", "tick"))
    for start, count in zip(seconds, counts, strict=True):
        a, b = x(start), x(start + width_days * 86_400)
        parts.append(
            f'<rect x="{a:.1f}" y="{y(count):.1f}" width="{max(b - a - 1, 0.5):.1f}" '
            f'height="{bottom - y(count):.1f}" class="column">'
            f"<title>{day(start)}: {count:,} events</title></rect>"
        )
    ends = ((x_from, "start"), ((x_from + x_to) // 2, "middle"), (x_to - 86_400, "end"))
    for moment, anchor in ends:
        parts.append(
            _text(x(moment) if anchor != "end" else WIDTH - right, bottom + 16, day(moment), anchor, "tick")
        )
    parts.append(_text((left + WIDTH - right) / 2, height - 8, "day of the event (UTC)", "middle", "axis"))
    parts.append(
        _text(0, 0, y_axis, "middle", "axis", transform=f"translate(11 {(top + bottom) / 2}) rotate(-90)")
    )
    return _svg(parts, WIDTH, height, f"{title}: {sum(counts):,} events from {day(x_from)} to {day(x_to)}")


def scatter(title: str, x_axis: str, y_axis: str, dots: Sequence[Dot], labelled: Sequence[int]) -> Markup:
    """A map: every dot has its title as a tooltip; some have it beside them, never over each other."""
    width, height, pad, top = 900, 600, 30, 40
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    x = _scale(min(xs), max(xs), pad, width - pad)
    y = _scale(min(ys), max(ys), height - pad - 14, top + 10)
    parts = [_title(title, width)]
    parts.append(
        f'<rect x="1" y="{top - 12}" width="{width - 2}" height="{height - top - 12}" class="frame"/>'
    )
    parts.extend(
        f'<circle cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}" r="{dot.size:.1f}" class="item k{dot.kind}">'
        f"<title>{escape(dot.title)}</title></circle>"
        for dot in dots
    )
    box = (4.0, float(top - 10), float(width - 4), float(height - 28))
    spots = [(x(dots[row].x), y(dots[row].y), short_title(dots[row].title)) for row in labelled]
    for text_x, text_y, anchor, text, (dot_x, dot_y) in place_labels(spots, box, most=12):
        parts.append(f'<circle cx="{dot_x:.1f}" cy="{dot_y:.1f}" r="4.5" class="ring"/>')
        parts.append(_text(text_x, text_y, text, anchor, "place"))
    parts.append(_text(width / 2, height - 6, x_axis, "middle", "axis"))
    parts.append(_text(0, 0, y_axis, "middle", "axis", transform=f"translate(14 {height / 2}) rotate(-90)"))
    return _svg(parts, width, height, f"{title}: {len(dots):,} items", "wide")


Label = tuple[float, float, str, str, tuple[float, float]]


def place_labels(
    spots: Sequence[tuple[float, float, str]], box: tuple[float, float, float, float], most: int
) -> list[Label]:
    """Beside its dot on the right, left, above or below: the first free place; without one it is left out."""
    taken: list[tuple[float, float, float, float]] = []
    placed: list[Label] = []
    for dot_x, dot_y, text in spots:
        width = len(text) * 13 * GLYPH
        choices = [
            (dot_x + 8, dot_y + 4, "start", dot_x + 6),
            (dot_x - 8, dot_y + 4, "end", dot_x - 8 - width),
            (dot_x, dot_y - 9, "middle", dot_x - width / 2),
            (dot_x, dot_y + 18, "middle", dot_x - width / 2),
        ]
        for text_x, text_y, anchor, start in choices:
            area = (start - 3, text_y - 14, start + width + 3, text_y + 5)
            inside = area[0] >= box[0] and area[1] >= box[1] and area[2] <= box[2] and area[3] <= box[3]
            dot = (dot_x - 6, dot_y - 6, dot_x + 6, dot_y + 6)
            if inside and not any(_overlap(area, other) or _overlap(dot, other) for other in taken):
                taken += [area, dot]
                placed.append((text_x, text_y, anchor, text, (dot_x, dot_y)))
                break
        if len(placed) == most:
            break
    return placed


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def short_title(title: str, limit: int = 28) -> str:
    return title if len(title) <= limit else title[: limit - 1].rstrip() + "…"


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that enclose the range."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def moving_average(values: Sequence[float], share: float = 0.05) -> list[float]:
    """The mean of a twentieth of the curve around each point; of what there is at its ends."""
    half = round(len(values) * share / 2)
    sums = list(accumulate(values, initial=0.0))
    edges = ((max(0, index - half), min(len(values), index + half + 1)) for index in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in edges]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short_count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def day(seconds: int) -> str:
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=int(seconds))).strftime("%Y-%m-%d")
    except OverflowError:
        return f"{seconds:,} s"


def _scale(low: float, high: float, start: float, end: float):  # type: ignore[no-untyped-def]
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _svg(parts: Sequence[str], width: float, height: float, described: str, css: str = "") -> Markup:
    body = "\n".join(str(part) for part in parts)
    return Markup(  # noqa: S704 - every text in it went through escape()
        f'<svg class="chart {css}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(described)}">{body}</svg>'
    )


def _title(text: str, width: float) -> str:
    return _text(0, 15, text, "start", "title")


def _text(x: float, y: float, text: str, anchor: str, css: str, transform: str = "") -> str:
    turned = f' transform="{transform}"' if transform else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}"{turned}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _path(xs: Sequence[float], ys: Sequence[float], x, y, css: str) -> str:  # type: ignore[no-untyped-def]
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    return f'<polyline points="{points}" class="{css}"/>'


def _mark(x: float, y: float, kind: str) -> str:
    shapes = {
        "candidate": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5"',
        "stage": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"',
        "baseline": f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"',
        "champion": f'<path d="M{x:.1f} {y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z"',
        "untrained": f'<path d="M{x:.1f} {y - 5.5:.1f}l5.8 10.4h-11.6z"',
    }
    return f'{shapes.get(kind, shapes["stage"])} class="mark s-{kind}"/>'
