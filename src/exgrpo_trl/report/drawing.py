"""Charts as SVG that takes its colours from the page: drawn by matplotlib, without pyplot and without its settings."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..records import ExperienceBufferError
from .charts import Chart
from .history import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points of a line: more than a screen shows.
MOST_POINTS = 1000
NUM_COLOURS = 2
# Inches of 72 points: about the width of a phone.
_SIZE = (4.6, 2.35)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)))
# What is drawn in these colours gets those of the page.
_COLOURS = {
    "#0a0b01": "--c1", "#0a0b02": "--c2", "#0a0b04": "--grid", "#0a0b05": "--muted", "#0a0b06": "--warn",
    **{f"#0a0c{number:02x}": f"--b{number}" for number in range(8)},
}  # fmt: skip
_OF = {variable: colour for colour, variable in _COLOURS.items()}
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.id": None,
    "font.size": 9.5,
    "axes.edgecolor": _OF["--grid"],
    "axes.labelcolor": _OF["--muted"],
    "axes.linewidth": 0.8,
    "xtick.color": _OF["--muted"],
    "ytick.color": _OF["--muted"],
    "text.color": _OF["--muted"],
    "grid.color": _OF["--grid"],
    "grid.linewidth": 0.6,
    "path.simplify": False,
}


class Drawn(NamedTuple):
    """
    An SVG, and where in it is what.

    Attributes:
        svg (`str`):
            The element.
        left, right (`float`):
            Horizontal ends of the axes, in its units.
        top, bottom (`float`):
            Vertical ends.
        first, last (`float`):
            The steps at the horizontal ends.
    """

    svg: str
    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float


def check_matplotlib() -> None:
    """
    Refuse to begin without what draws.

    Raises:
        ExperienceBufferError: if matplotlib cannot be imported.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ExperienceBufferError(
            f'The report cannot be drawn without matplotlib ({error}). Install it: pip install "exgrpo-trl[report]".'
        ) from error


def drawn(chart: Chart) -> Drawn:
    """The SVG of a chart that has lines."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # A salt for each, as all stand in one page; the names that it makes are the same every time.
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": chart.key}):
        figure = Figure(figsize=_SIZE, dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.115, 0.17, 0.87, 0.76))
        (_draw_stack if chart.is_stack else _draw_lines)(axes, chart)
        axes.set_xlabel("optimizer step", loc="right", labelpad=2)
        axes.set_title(chart.unit, loc="left", fontsize=9.5, pad=5)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, pad=4)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if chart.is_log:
            _set_log_scale(axes)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=3))
            axes.set_ylim(0, chart.top or max(axes.get_ylim()[1], 1e-9))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.margins(x=0.01)
        first, last = axes.get_xlim()
        box = axes.get_position()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    width, height = (size * 72 for size in _SIZE)
    left, right = box.x0 * width, box.x1 * width
    return Drawn(_of_page(file.getvalue()), left, right, (1 - box.y1) * height, (1 - box.y0) * height, first, last)


def _draw_lines(axes: Axes, chart: Chart) -> None:
    if chart.band is not None:
        low, high = map(thinned, chart.band)
        axes.fill_between(low.steps, low.values, high.values, color=_OF["--c1"], alpha=0.2, linewidth=0)
    for number, line in enumerate(chart.lines):
        series = thinned(line.series)
        style = {"color": _OF[f"--c{number + 1}"], "linestyle": _DASHES[number], "linewidth": 1.7}
        # A single point is no line.
        axes.plot(series.steps, series.values, marker="o" if len(series) < 25 else None, markersize=3, **style)
    if chart.threshold is not None:
        axes.axhline(chart.threshold, color=_OF["--warn"], linewidth=1, linestyle=":")


def _draw_stack(axes: Axes, chart: Chart) -> None:
    series = [thinned(line.series) for line in chart.lines]
    steps = series[0].steps
    # Eight colours from one end to the other, however many there are.
    at = np.linspace(0, 7, len(series)).round().astype(int) if len(series) > 1 else [3]
    colours = [_OF[f"--b{number}"] for number in at]
    values = np.stack([one.values for one in series])
    if len(steps) == 1:  # an area has no width
        bottom = 0.0
        for value, colour in zip(values[:, 0], colours, strict=True):
            axes.bar(steps, value, bottom=bottom, color=colour, width=1)
            bottom += value
        axes.set_xlim(steps[0] - 4, steps[0] + 4)
    else:
        axes.stackplot(steps, values, colors=colours, linewidth=0)


def stack_colours(num_bands: int) -> list[int]:
    """Number of the colour of each band, as they are drawn."""
    return np.linspace(0, 7, num_bands).round().astype(int).tolist() if num_bands > 1 else [3]


def thinned(series: Series) -> Series:
    """At most `MOST_POINTS` points, each the mean of neighbours."""
    if len(series) <= MOST_POINTS:
        return series
    starts = np.linspace(0, len(series), MOST_POINTS, endpoint=False).astype(int)
    counts = np.diff(starts, append=len(series))
    steps, values = (np.add.reduceat(of.astype(np.float64), starts) / counts for of in series)
    return Series(steps.astype(np.int64), values)


def short(value: float) -> str:
    """A number on an axis, where there is room for a few characters."""
    for least, size, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.3g}{name}"
    return f"{value:.6g}"


def _set_log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / max(low, 1e-300) < 10:  # else there might be no number on the axis
        axes.set_ylim(low / 2, high * 2)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high / max(low, 1e-300) < 100 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _of_page(svg: str) -> str:
    """The element alone, with the colours and the font of the page, and only the ids that something refers to."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"^<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    return re.sub(r">\s+<", "><", svg)
