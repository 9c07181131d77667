"""The figures of a report as PNG files, for slides and papers, drawn by matplotlib.

matplotlib is optional and loaded here only; the page itself never needs it. The drawings are those
of the page in its light colours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsert.bench.report.figures import Bars, Figure, Plot
from sparsert.bench.report.style import LIGHT
from sparsert.errors import InputError

#: matplotlib's names of the marker shapes that svg.py draws, by slot.
_MARKERS = ("s", "o", "D", "^", "v", "P", "X", "p")
_DOTS_PER_INCH = 200


def require_matplotlib() -> None:
    """Refuse ``--png`` before anything is written when matplotlib is missing.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--png draws with matplotlib, which is not installed; run `pip install matplotlib`, or leave --png out"
        )


def write_pngs(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Draw each figure into a file named after it.

    Args:
        figures: those of :class:`sparsert.bench.report.page.Page`.
        directory: where to put the files; made if it does not exist.

    Returns:
        The files, in the order of the figures.

    Raises:
        InputError: matplotlib is missing, or the directory cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure as Canvas

    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = []
        for figure in figures:
            canvas = Canvas(figsize=(7, 4.2), layout="constrained")
            axes = canvas.subplots()
            _draw_bars(axes, figure) if isinstance(figure, Bars) else _draw_plot(axes, figure)
            axes.set_title(f"{figure.title}\n{figure.subtitle}", loc="left", fontsize=11)
            axes.spines[["top", "right"]].set_visible(False)
            path = directory / f"{figure.slug}.png"
            canvas.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None})
            written.append(path)
    except OSError as error:
        raise InputError(f"--png {directory}: cannot be written ({error.strerror}); give another directory") from error
    return written


def _draw_plot(axes: Any, plot: Plot) -> None:
    for axis, name in ((plot.x, "x"), (plot.y, "y")):
        getattr(axes, f"set_{name}scale")("log" if axis.log else "linear")
        getattr(axes, f"set_{name}lim")(axis.low, axis.high)
        getattr(axes, f"set_{name}ticks")([value for value, _ in axis.ticks], [text for _, text in axis.ticks])
        getattr(axes, f"set_{name}label")(axis.label)
    axes.minorticks_off()
    axes.grid(axis="y", color="#dde1e7", linewidth=0.8)
    for guide in plot.guides:
        (x0, y0), (x1, y1) = guide.points
        axes.plot([x0, x1], [y0, y1], color=LIGHT[0], linestyle=(0, (5, 4)), linewidth=1.2, label=guide.name)
    for series in plot.series:
        colour = LIGHT[series.slot]
        xs, ys = [point.x for point in series.points], [point.y for point in series.points]
        if series.joined:
            axes.plot(xs, ys, color=colour, linewidth=1.6)
        for point in series.points:
            if point.tail is not None:
                axes.plot([point.x, point.tail], [point.y, point.y], color=colour, linewidth=1.6, marker="|")
        for checked in (True, False):
            shown = [point for point in series.points if point.checked is checked]
            if shown:
                axes.scatter(
                    [point.x for point in shown],
                    [point.y for point in shown],
                    marker=_MARKERS[series.slot],
                    s=26,
                    facecolor=colour if checked else "white",
                    edgecolor=colour,
                    zorder=3,
                    label=series.name if checked else f"{series.name}, not checked",
                )
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_bars(axes: Any, bars: Bars) -> None:
    place, places, names = 0.0, [], []
    known: set[str] = set()
    for bar in bars.bars:
        left, first = 0.0, place
        for segment in bar.segments:
            label = None if segment.name in known else segment.name
            known.add(segment.name)
            colour = LIGHT[segment.slot]
            axes.barh(
                place,
                segment.value,
                left=left,
                color=colour if segment.checked else "white",
                edgecolor="white" if segment.checked else colour,
                label=label,
                height=0.7,
            )
            if bars.stacked:
                left += segment.value
            else:
                axes.text(segment.value, place, f" {segment.text}", va="center", fontsize=8)
                place += 1
        last = first if bars.stacked else place - 1
        places.append((first + last) / 2)
        names.append(f"{bar.name}\n{bar.total}")
        place = last + 1.5
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, bars.high * 1.05)
    axes.set_xticks([])
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
