"""Figures as inline SVG: text a browser scales, colours from the page's stylesheet, no script.

A plot is 380 units wide, which is a phone's width, so that its text stays as large as the text
around it there. Names stand at the ends of the lines instead of in a legend, moved apart where
lines end together; every point carries its words as ``title``, which browsers show on hover. The
shape of a marker says the same as its colour, and a hollow marker was not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from sparsert.bench.report.figures import Bars, Figure, Plot, Segment

WIDTH = 380
HEIGHT = 270
TOP = 26
BOTTOM = 40
LEFT = 40
RIGHT = 14
CHARACTER = 6.3  #: width of an average character of the 11.5 unit text, for what must fit
LINE = 14  #: distance of two lines of text


def draw(figure: Figure) -> str:
    """A figure as one ``svg`` element."""
    return _bars(figure) if isinstance(figure, Bars) else _plot(figure)


def swatch(slot: int, *, marker: bool) -> str:
    """The colour of a slot beside its name in a legend: its marker, or a square for bars."""
    shape = _marker(slot, 7, 7, 4.5) if marker else '<rect x="1" y="1" width="12" height="12" rx="2"/>'
    return f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true"><g class="mark s{slot}">{shape}</g></svg>'


def _open(height: float, title: str, summary: str) -> list[str]:
    return [
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(summary)}">',
        f"<title>{escape(title)}</title><desc>{escape(summary)}</desc>",
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "") -> str:
    name = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(text)}</text>'


def _marker(slot: int, x: float, y: float, r: float) -> str:
    """The shape of a slot around (x, y): one of eight that stay apart in grey."""
    if slot == 0:
        return f'<rect x="{x - r * 0.85:.1f}" y="{y - r * 0.85:.1f}" width="{r * 1.7:.1f}" height="{r * 1.7:.1f}"/>'
    if slot == 1:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'
    corners = {
        2: ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        3: ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
        4: ((0, 1.2), (1.15, -0.85), (-1.15, -0.85)),
        5: ((-1.2, -0.45), (-0.45, -0.45), (-0.45, -1.2), (0.45, -1.2), (0.45, -0.45), (1.2, -0.45),
            (1.2, 0.45), (0.45, 0.45), (0.45, 1.2), (-0.45, 1.2), (-0.45, 0.45), (-1.2, 0.45)),
        6: ((-1.2, -0.6), (-0.6, -1.2), (0, -0.6), (0.6, -1.2), (1.2, -0.6), (0.6, 0), (1.2, 0.6), (0.6, 1.2),
            (0, 0.6), (-0.6, 1.2), (-1.2, 0.6), (-0.6, 0)),
    }.get(slot, ((0, -1.25), (1.2, -0.4), (0.75, 1.05), (-0.75, 1.05), (-1.2, -0.4)))  # fmt: skip
    return f'<polygon points="{" ".join(f"{x + dx * r:.1f},{y + dy * r:.1f}" for dx, dy in corners)}"/>'


def _plot(plot: Plot) -> str:
    at_edge = [series.name for series in plot.series if series.named and series.joined]
    at_edge += [guide.name for guide in plot.guides if guide.at is None]
    right = RIGHT + max((8 + len(name) * CHARACTER for name in at_edge), default=0)
    width, height = WIDTH - LEFT - right, HEIGHT - TOP - BOTTOM

    def x_of(value: float) -> float:
        return LEFT + plot.x.share(value) * width

    def y_of(value: float) -> float:
        return TOP + (1 - plot.y.share(value)) * height

    out = _open(HEIGHT, f"{plot.title}, {plot.subtitle}", plot.summary)
    for value, text in plot.y.ticks:
        out.append(f'<path class="grid" d="M{LEFT} {y_of(value):.1f}h{width:.1f}"/>')
        out.append(_text(LEFT - 6, y_of(value) + 4, text, "end", "tick"))
    out.append(f'<path class="axis" d="M{LEFT} {TOP + height}h{width:.1f}"/>')
    for value, text in plot.x.ticks:
        out.append(f'<path class="axis" d="M{x_of(value):.1f} {TOP + height}v4"/>')
        out.append(_text(x_of(value), TOP + height + 17, text, "middle", "tick"))
    out.append(_text(4, 13, plot.y.label, "start", "name"))
    out.append(_text(LEFT + width, HEIGHT - 5, plot.x.label, "end", "name"))
    for guide in plot.guides:
        (x0, y0), (x1, y1) = ((x_of(x), y_of(y)) for x, y in guide.points)
        out.append(f'<path class="guide" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
        if guide.at is not None:
            x, y = x0 + (x1 - x0) * guide.at, y0 + (y1 - y0) * guide.at
            out.append(_text(x - 9, y + 3, guide.name, "end", "note"))
    for series in plot.series:
        if series.joined and len(series.points) > 1:
            path = "L".join(f"{x_of(point.x):.1f} {y_of(point.y):.1f}" for point in series.points)
            out.append(f'<path class="line s{series.slot}" d="M{path}"/>')
    for series in plot.series:
        for point in series.points:
            x, y = x_of(point.x), y_of(point.y)
            if point.tail is not None:
                end = x_of(point.tail)
                out.append(f'<path class="line s{series.slot}" d="M{x:.1f} {y:.1f}H{end:.1f}m0 -4v8"/>')
            css = f"mark s{series.slot}" + ("" if point.checked else " open")
            shape = _marker(series.slot, x, y, 3.6 if series.named else 3)
            out.append(f'<g class="{css}"><title>{escape(point.text)}</title>{shape}</g>')
    return "".join(out + _names(plot, x_of, y_of, LEFT + width, TOP + height)) + "</svg>"


def _names(
    plot: Plot, x_of: Callable[[float], float], y_of: Callable[[float], float], edge: float, bottom: float
) -> list[str]:
    """Names at the ends of lines, moved apart in the right margin; beside the point for points alone."""
    out = []
    ends: list[tuple[str, str, float, float]] = []
    for series in plot.series:
        if not (series.named and series.points):
            continue
        last = series.points[-1]
        x, y, css = x_of(last.x), y_of(last.y), f"s{series.slot}"
        if series.joined:
            ends.append((series.name, css, x, y))
        elif x - 10 - len(series.name) * CHARACTER > LEFT:
            out.append(_text(x - 9, y + 4, series.name, "end", f"end {css}"))
        else:
            out.append(_text(x_of(last.tail or last.x) + 9, y + 4, series.name, "start", f"end {css}"))
    ends += [(guide.name, "s0", edge, y_of(guide.points[-1][1])) for guide in plot.guides if guide.at is None]
    for (name, css, x, y), label_y in zip(ends, _spread([y for *_, y in ends], TOP, bottom), strict=True):
        if abs(label_y - y) > 3 or x < edge - 3:
            out.append(f'<path class="leader {css}" d="M{x + 5:.1f} {y:.1f}L{edge + 8:.1f} {label_y:.1f}"/>')
        out.append(_text(edge + 10, label_y + 4, name, "start", f"end {css}"))
    return out


def _spread(wanted: list[float], low: float, high: float) -> list[float]:
    """Heights for labels, as near to those wanted as one line of text between any two allows."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed = list(wanted)
    previous = low - LINE
    for index in order:
        placed[index] = previous = max(wanted[index], previous + LINE)
    following = high + LINE
    for index in reversed(order):
        placed[index] = following = min(placed[index], following - LINE)
    return placed


def _bars(bars: Bars) -> str:
    row = 50 if bars.stacked else 22
    heights = [row if bars.stacked else 20 + row * len(bar.segments) for bar in bars.bars]
    out = _open(sum(heights) + 8, f"{bars.title}, {bars.subtitle}", bars.summary)
    unit = (WIDTH - 4) / bars.high
    y = 0.0
    for bar, height in zip(bars.bars, heights, strict=True):
        out.append(_text(2, y + 14, bar.name, "start", "bar"))
        out.append(_text(WIDTH - 2, y + 14, bar.total, "end", "bar"))
        x, piece_y = 2.0, y + 20
        for segment in bar.segments:
            length = segment.value * unit
            title = f"<title>{escape(f'{bar.name}: {segment.name}, {segment.text}')}</title>"
            shown = max(length - (1.5 if bars.stacked else 0), 0.5)
            css = f"piece s{segment.slot}" + ("" if segment.checked else " open")
            out.append(
                f'<g class="{css}">{title}<rect x="{x:.1f}" y="{piece_y:.1f}" '
                f'width="{shown:.1f}" height="{24 if bars.stacked else 18}" rx="2"/></g>'
            )
            out += _piece_text(segment, x, piece_y, length, stacked=bars.stacked)
            if bars.stacked:
                x += length
            else:
                piece_y += row
        y += height
    return "".join(out) + "</svg>"


def _piece_text(piece: Segment, x: float, y: float, length: float, *, stacked: bool) -> list[str]:
    """The longest label that fits into a piece of a bar; beside it where bars stand alone."""
    css = "inside" if piece.checked else f"end s{piece.slot}"
    full = f"{piece.name} {piece.text}"
    for label in (full, piece.name, piece.text) if stacked else (full,):
        if len(label) * CHARACTER + 10 <= length:
            return [_text(x + 5, y + (16 if stacked else 13), label, "start", css)]
    return [] if stacked else [_text(x + length + 5, y + 13, full, "start", f"end s{piece.slot}")]
