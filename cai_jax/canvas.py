"""What all figures have in common: their style and colours, the names of models, PNG and SVG, and the parts of axes.

One colour per model, apart also for colour-blind eyes and dark enough to be text on white, and one marker, so that nothing is
lost in grey. Lines carry their names; text from data is cut to a length and never read as mathematics. The same input gives the
same PNG and SVG, byte for byte.
"""

import functools
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

LABELS = {"base": "Base", "sl_cai": "SL-CAI", "dpo_cai": "DPO-CAI", "rl_cai": "RL-CAI"}  # in the order they are shown
COLOURS = {"base": "#777777", "sl_cai": "#1f6fb4", "dpo_cai": "#8a3ffc", "rl_cai": "#c8500a"}
MARKERS = {"base": "o", "sl_cai": "s", "dpo_cai": "^", "rl_cai": "D"}
BEST_OF = re.compile(r"best_of_(\d+)")  # of so many answers of a model; it is none itself
BEST = ("#007a5a", "v")
INK, MUTED, FAINT = "#222222", "#767676", "#e4e4e4"
GLYPHS = {"o": "●○", "s": "■□", "^": "▲△", "v": "▼▽", "D": "◆◇", "X": "✖✕"}  # of markers, full and open
LOOKS = ((INK, "o"), ("#c8500a", "s"), ("#1f6fb4", "^"), BEST, ("#8a3ffc", "D"), (MUTED, "X"))  # of lines, in turn
DPI = 200
FEW, MANY = 20, 40  # points: up to FEW each is marked; beyond MANY a line is faint under its running mean

STYLE = {
    "font.size": 8.5, "text.color": INK, "text.parse_math": False,  # a dollar sign in a category is a dollar sign
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 7.5,
    "axes.labelcolor": MUTED, "axes.edgecolor": "#bbbbbb", "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.solid_capstyle": "round", "figure.constrained_layout.use": True,
    "svg.hashsalt": "cai_jax",  # of the names inside an SVG, which are drawn otherwise
    "figure.constrained_layout.h_pad": 0.08, "figure.constrained_layout.w_pad": 0.08,
}  # fmt: skip


def styled(make):
    """Runs a figure function under STYLE and nothing else, whatever the user's matplotlibrc says."""

    @functools.wraps(make)
    def under_style(*args, **kwargs):
        with matplotlib.style.context(["default", STYLE]):
            return make(*args, **kwargs)

    return under_style


def png(figure: Figure) -> bytes:
    """The figure as PNG without time stamps or versions."""
    return _saved(figure, "png", {"Software": None})


def svg(figure: Figure) -> bytes:
    """The figure as SVG, its text as outlines, without time stamps or versions."""
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, metadata: dict) -> bytes:
    out = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]), _any_script():
        figure.savefig(out, format=kind, dpi=DPI, metadata=metadata)
    return out.getvalue()


@contextmanager
def _any_script():
    """One that the font lacks is shown as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def label_of(model: str) -> str:
    if found := BEST_OF.fullmatch(model):
        return f"best of {found[1]}"
    return LABELS[model] if model in LABELS else short(model)


def colour_of(model: str) -> str:
    return COLOURS.get(model, BEST[0] if BEST_OF.fullmatch(model) else INK)


def marker_of(model: str) -> str:
    return MARKERS.get(model, BEST[1] if BEST_OF.fullmatch(model) else "P")


def ordered(models) -> list[str]:
    """Names in the order of LABELS, others after them, and last the best of 2, 4, ... answers."""
    best = {m: int(found[1]) for m in models if (found := BEST_OF.fullmatch(m))}
    known = [m for m in LABELS if m in models]
    return known + [m for m in models if m not in LABELS and m not in best] + sorted(best, key=best.get)


def trained(models) -> list[str]:
    """`ordered`, without the best of n answers."""
    return [m for m in ordered(models) if not BEST_OF.fullmatch(m)]


def short(text: str, width: int = 18) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def axes_of(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure of so many inches, and its axes."""
    figure = Figure(figsize=(width, max(height, 1)))
    return figure, figure.subplots(max(rows, 1), columns)


def name_axes(ax, title: str, xlabel: str, ylabel: str) -> None:
    """Title and labels; the label of y lies flat above its axis, where it can be read."""
    ax.set_title(title, pad=18)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel, rotation=0, ha="left", va="bottom")
    ax.yaxis.set_label_coords(0, 1.02)


def percent(*axes) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g}%"))


def draw_line(ax, x, y, colour: str, width: float = 1.4, alpha: float = 1.0):
    values = [np.nan if v is None else v for v in y]
    return ax.plot(list(x), values, marker="o" if len(values) <= FEW else "", ms=3, color=colour, lw=width, alpha=alpha)[0]


def draw_smooth(ax, x, y, colour: str):
    """-> the line that carries the name."""
    if len(y) <= MANY:
        return draw_line(ax, x, y, colour)
    draw_line(ax, x, y, colour, 0.7, 0.35)
    window = len(y) // 20 // 2 * 2 + 1
    return draw_line(ax, x[window // 2 : len(y) - window // 2], np.convolve(y, np.ones(window) / window, "valid"), colour)


def name_ends(ax, lines: dict) -> None:
    """Names of lines beside their last points, moved apart where they would overlap. lines: name -> line."""
    ends = {name: line.get_ydata()[np.isfinite(line.get_ydata())] for name, line in lines.items()}
    order = sorted((n for n in ends if len(ends[n])), key=lambda n: ends[n][-1])
    low, high = ax.get_ylim()
    inches = ax.figure.get_figheight() / ax.get_subplotspec().get_gridspec().nrows - 0.8  # less title and labels
    steps = 0.13 * (high - low) / max(inches, 0.5) * np.arange(len(order))  # lines of this type lie .13 inch apart
    y = np.array([ends[n][-1] for n in order]) - steps
    y = (np.maximum.accumulate(y) + np.minimum.accumulate(y[::-1])[::-1]) / 2 + steps  # two monotone bounds, and between them
    for name, place in zip(order, y, strict=True):
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        ax.annotate(short(name), (1, place), (3, 0), color=lines[name].get_color(), size=7, **at)


def name_models(ax, models) -> None:
    """The models' names in their colours, in one row above the axes."""
    last, place = ax, {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 25)}
    for model in models:
        last = ax.annotate(label_of(model), textcoords="offset points", color=colour_of(model), va="center", **place)
        last.set_weight("bold")
        place = {"xy": (1, 0.5), "xycoords": last, "xytext": (12, 0)}


def draw_interval(ax, x, y, spans, colour: str, marker: str = "o", size: float = 6.5, hollow: bool = False):
    """A point with its 95 % intervals. spans: ([low, high] of x or None, of y or None). -> the point."""
    for span, along in zip(spans, ("x", "y"), strict=True):
        if span is not None and None not in span:
            ends = (span, [y, y]) if along == "x" else ([x, x], span)
            ax.plot(*ends, color=colour, lw=1.2, alpha=0.55, zorder=2)
    fill = {"mfc": "white", "mew": 1.3} if hollow else {"mec": "white", "mew": 0.6}
    return ax.plot([x], [y], marker, color=colour, ms=size, zorder=4, **fill)[0]


# Of a name, in points from its point, the best first: names are wide, and intervals lie along the axes
PLACES = sorted(
    [(dx, dy) for dx in (7, -7, 22, -22) for dy in (7, -7, 0, 16, -16, 25, -25, 34, -34, 43, -43)] + [(0, 8), (0, -8)],
    key=lambda place: abs(place[0]) + abs(place[1]) + 12 * (0 in place),
)
NEAR = 12  # points up to which a name needs no line to its point


def name_points(ax, names: Sequence[tuple[float, float, str, str]], size: float = 7.5) -> None:
    """Names beside points, each where it hides least of the others and of the points. names: (x, y, name, colour)."""
    with _any_script():
        ax.figure.draw_without_rendering()  # so that places on the page are known
        at, point = ax.transData.transform([(x, y) for x, y, _, _ in names]), ax.figure.dpi / 72
        taken = [Bbox.from_bounds(px - 4 * point, py - 4 * point, 8 * point, 8 * point) for px, py in at]
        for x, y, name, colour in names:
            halo = [withStroke(linewidth=2.2, foreground="white")]
            look = {"textcoords": "offset points", "color": colour, "size": size, "path_effects": halo}
            text = ax.annotate(short(name, 26), (x, y), (0, 0), **look)
            text.set_in_layout(False)
            cost = [_hidden(text, place, taken, ax.get_window_extent()) + rank for rank, place in enumerate(PLACES)]
            place = PLACES[np.argmin(cost)]
            taken.append(_put(text, place))
            if max(map(abs, place)) > NEAR:
                arrow = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 0, "shrinkB": 3}
                ax.annotate("", (x, y), place, textcoords="offset points", arrowprops=arrow).set_in_layout(False)


def _put(text, place: tuple[int, int]) -> Bbox:
    """Moves a name. -> where it is then."""
    sides = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
    (ha, _), (_, va) = (sides[int(np.sign(d))] for d in place)
    text.set(position=place, ha=ha, va=va)
    return text.get_window_extent()


def _hidden(text, place: tuple[int, int], taken: Sequence[Bbox], frame: Bbox) -> float:
    """The area, in pixels, that a name would hide there, and three times that which would lie outside."""
    box = _put(text, place)
    areas = [both.width * both.height for other in (frame, *taken) if (both := Bbox.intersection(box, other))]
    inside = areas.pop(0) if Bbox.intersection(box, frame) else 0.0
    return sum(areas) + 3 * (box.width * box.height - inside)


def marked(marker: str, name: str, hollow: bool = False) -> str:
    """The name of a line, told by its marker also in grey."""
    return f"{GLYPHS[marker][hollow]} {name}"


class Series(NamedTuple):
    """A line: x and y [N], y None or NaN where there is none; interval: [low, high] at each x, None where there is none."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    interval: Sequence[Sequence[float] | None] = ()
    look: int = 0  # of canvas.LOOKS
    dashed: bool = False


class Panel(NamedTuple):
    title: str
    unit: str
    series: Sequence[Series]
    share: bool = False  # from 0 to 1, shown in percent
    limits: tuple[float, float] | None = None  # of y


def _draw_series(ax, series: Sequence[Series]) -> None:
    ends = {}
    for s in series:
        colour, marker = LOOKS[s.look % len(LOOKS)]
        y = [np.nan if v is None else v for v in s.y]
        style = {"ls": (0, (4, 2)) if s.dashed else "-", "marker": marker, "ms": 4.2, "mfc": "white" if s.dashed else colour}
        ends[marked(marker, s.name, s.dashed)] = ax.plot(list(s.x), y, color=colour, lw=1.3, zorder=3, label=s.name, **style)[0]
        spans = [(x, *span) for x, span in zip(s.x, s.interval, strict=False) if span and None not in span]
        if spans and [*s.x] == sorted(s.x):
            x, low, high = zip(*spans, strict=True)
            ax.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
        else:  # it goes back and forth, and a band with it
            ax.vlines(*zip(*spans, strict=True), color=colour, lw=1.2, alpha=0.45) if spans else None
    name_ends(ax, ends if len(series) > 1 else {})


def lines(panels: Sequence[Panel], xlabel: str, ticks: Mapping[float, str] | None = None, height: float = 3.1) -> Figure:
    """Panels of lines side by side. ticks: the only ones of the x axis, and what stands there."""
    most = max(len(p.series) for p in panels)
    figure, axes = axes_of(max(4.2, 3.8 * len(panels)), max(height, 1 + 0.14 * most), columns=len(panels))
    for ax, panel in zip(np.ravel(axes), panels, strict=True):
        name_axes(ax, panel.title, xlabel, panel.unit)
        if panel.share:
            percent(ax.yaxis)
        if panel.share or panel.limits:  # before lines are named
            ax.set_ylim(*(panel.limits or (-0.03, 1.03)))
        _draw_series(ax, panel.series)
        if ticks is not None:
            ax.set_xticks(list(ticks), list(ticks.values()))
        elif all(float(x).is_integer() for s in panel.series for x in s.x):
            ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return figure
