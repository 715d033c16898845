"""What all figures have in common: their style and colours, the names of models, PNG, and the parts of axes.

One colour per model, apart also for colour-blind eyes and dark enough to be text on white. Lines carry their names; text from
data is cut to a length and never read as mathematics. The same input gives the same PNG, byte for byte.
"""

import functools
import io
import warnings

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

LABELS = {"base": "Base", "sl_cai": "SL-CAI", "dpo_cai": "DPO-CAI", "rl_cai": "RL-CAI"}  # in the order they are shown
COLOURS = {"base": "#777777", "sl_cai": "#1f6fb4", "dpo_cai": "#8a3ffc", "rl_cai": "#c8500a"}
INK, MUTED, FAINT = "#222222", "#767676", "#e4e4e4"
DPI = 200
FEW, MANY = 20, 40  # points: up to FEW each is marked; beyond MANY a line is faint under its running mean

STYLE = {
    "font.size": 8.5, "text.color": INK, "text.parse_math": False,  # a dollar sign in a category is a dollar sign
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 7.5,
    "axes.labelcolor": MUTED, "axes.edgecolor": "#bbbbbb", "axes.linewidth": 0.7, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.solid_capstyle": "round", "figure.constrained_layout.use": True,
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
    out = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script that the font lacks is shown as boxes
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def label_of(model: str) -> str:
    return LABELS[model] if model in LABELS else short(model)


def colour_of(model: str) -> str:
    return COLOURS[model] if model in COLOURS else INK


def ordered(models) -> list[str]:
    """Names in the order of LABELS, others after them."""
    return [m for m in LABELS if m in models] + [m for m in models if m not in LABELS]


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
