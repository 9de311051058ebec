"""Line charts as inline SVG, whose colours are the page's own: they follow its light and dark scheme.

No text stands in a chart but numbers (legends and names of axes are HTML), so nothing here needs escaping.
"""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LARGEST = 1e300  # value that is drawn: matplotlib's ticks reach beyond it
SERIES = 6  # colours that page.css defines; more runs use them again
INK, FAINT = "#010101", "#020202"  # stand-ins, replaced by the page's variables
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "topgap_jax",  # else its ids are others each time, and so is a page of the same run
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


class Series(NamedTuple):
    """A line of a chart: x and y (n,), colour = index of its run, `points` marks every value."""

    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    points: bool = False


def line_chart(series: Sequence[Series], *, prefix: str, diagonal: bool = False) -> str:
    """The lines as an SVG element; `diagonal` adds y = x. Values that are not finite are left out.

    prefix: what its ids begin with, different for every chart of a page.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        axes = figure.add_subplot()
        if diagonal:
            axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, dashes=(2, 3))
        for line in series:
            x, y = thin(line.x, line.y)
            marks = (
                {"marker": "o", "markersize": 4, "linewidth": 1.8} if line.points else {"linewidth": 1.1, "alpha": 0.75}
            )
            axes.plot(x, y, color=stand_in(line.colour), dashes=dashes(line.colour), solid_capstyle="round", **marks)
        if all(float(value).is_integer() for line in series for value in line.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return on_page(text.getvalue(), prefix)


def thin(x: Sequence[float], y: Sequence[float | None], most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """The values below `LARGEST`, which NaN and infinity are not; if there are more than `most`, means of
    neighbours."""
    drawn = lambda value: isinstance(value, int | float) and abs(value) < LARGEST
    pairs = [(a, b) for a, b in zip(x, y) if drawn(a) and drawn(b)]
    values = np.array(pairs, float).reshape(-1, 2)
    if len(values) > most:
        values = np.array([part.mean(0) for part in np.array_split(values, most)])
    return values[:, 0], values[:, 1]


def stand_in(colour: int) -> str:
    """The stand-in of a run's colour."""
    return f"#0a0b0{colour % SERIES}"


def dashes(colour: int) -> tuple:
    """Lines that share a colour differ in their dashes."""
    return ((None, None), (4, 2), (1, 2))[min(colour // SERIES, 2)]


def on_page(svg: str, prefix: str) -> str:
    """matplotlib's SVG file as an element of a page: its colours and font, no size, every id begins with `prefix`."""
    svg = svg[svg.index("<svg") :]
    for stand, variable in [(INK, "ink-soft"), (FAINT, "rule"), *((stand_in(i), f"series-{i}") for i in range(SERIES))]:
        svg = svg.replace(stand, f"var(--{variable})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: [^;\"]*", "font-size: 10px", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
