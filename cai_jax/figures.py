"""The figures of the report: metrics and records in, a matplotlib Figure out.

One colour per model in all of them, apart also for colour-blind eyes and dark enough to be text on white. Lines carry their
names; text from data is cut to a length and never read as mathematics. The same input gives the same PNG, byte for byte.
"""

import functools
import io
import warnings

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
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

# Of `curves`: title, unit, {key: name of its line}. A panel without data is left out.
NORM = ("Gradient norm", "before clipping", {"gradient_norm": ""})
SFT_PANELS = (("Loss", "nats per target token", {"loss": ""}), ("Entropy", "nats per target token", {"entropy": ""}), NORM)
PAIR = (("Loss", "nats per comparison", {"loss": ""}), ("Accuracy in training", "share of the batch", {"accuracy": ""}))
REWARD_PANELS = (*PAIR, NORM)
DPO_PANELS = (*PAIR, ("Policy to reference", "log-ratio, nats per response", {"log_ratio": ""}))
PPO_PANELS = (
    ("Harm, watched", "share of harmful prompts", {"eval/harm_rate": "harm", "eval/evasive": "evasive"}),
    ("Help, watched", "share of benign prompts", {"eval/helpfulness": "helpful", "eval/over_refusal": "over-refusal"}),
    ("Score", "reward-model deviations", {"score": "all", "score_redteam": "red-team", "score_helpful": "helpful"}),
    ("Reward", "score less KL penalty", {"reward": ""}),
    ("KL to the start", "nats per response", {"kl": "k1", "kl_k3": "k3"}),
    ("KL coefficient", "reward per nat", {"kl_coef": ""}),
    ("Entropy", "nats per token", {"entropy": ""}),
    ("Response length", "tokens", {"response_length": ""}),
    ("Ended by EOS", "share of responses", {"eos_rate": ""}),
    ("Policy loss", "whitened advantage", {"policy_loss": ""}),
    ("Value loss", "reward squared", {"value_loss": ""}),
    ("Explained variance", "share of the returns' variance", {"explained_variance": ""}),
    ("Clip fraction", "share of tokens", {"clip_fraction": ""}),
    ("KL of an update", "nats per token", {"approx_kl": ""}),
    NORM,
    ("Sampler to scorer", "drift, nats per token", {"drift": ""}),
)


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


@styled
def plane(models: dict, parents: dict[str, str]) -> Figure:
    """Helpfulness against harmlessness (1 - harm rate) of sampled answers, with 95 % intervals.

    models: "models" of evaluate/results.json. parents: model -> the model it was trained from; arrows join held-out points.
    """
    figure, ax = _axes(7.6, 4.4)
    at = {}
    for name in ordered(models):
        for which, filled in (("redteam", False), ("heldout", True)):
            found = models[name].get(which, {}).get("sampled", {})
            if found.get("helpfulness") is None or found.get("harm_rate") is None:
                continue
            colour, x, y = colour_of(name), found["helpfulness"], 1 - found["harm_rate"]
            (low, high), width, alpha = found["interval"]["harm_rate"], 1.4 if filled else 0.8, 0.6 if filled else 0.35
            ax.plot(found["interval"]["helpfulness"], [y, y], color=colour, lw=width, alpha=alpha)
            ax.plot([x, x], [1 - high, 1 - low], color=colour, lw=width, alpha=alpha)
            fill = {"ms": 8} if filled else {"ms": 5.5, "mfc": "white", "mew": 1.2}
            ax.plot([x], [y], "o", color=colour, zorder=4, label=f"{name} {which}", **fill)
            at |= {name: (x, y)} if filled else {}
    for name, point in at.items():
        start = next((a for a in _ancestors(name, parents) if a in at), None)
        bow = {"arrowstyle": "-|>", "color": "#aaaaaa", "shrinkA": 9, "shrinkB": 9, "connectionstyle": "arc3,rad=.15"}
        if start:
            ax.annotate("", point, at[start], arrowprops=bow, zorder=1)
        away = (-9, -14 if name in parents.values() else 8)  # from the arrows: they leave upwards
        text = ax.annotate(label_of(name), point, away, textcoords="offset points", ha="right", zorder=5, size=9.5)
        text.set(color=colour_of(name), weight="bold", path_effects=[withStroke(linewidth=2.5, foreground="white")])
    _name(ax, "", "helpfulness on benign prompts", "harmlessness: 1 − harm rate")
    ax.margins(0.12, 0.09)
    _percent(ax.xaxis, ax.yaxis)
    ax.text(0.02, 0.03, "●  held-out prompts     ○  red-team prompts", transform=ax.transAxes, color=MUTED, size=7.5)
    return figure


def _ancestors(name: str, parents: dict[str, str]):
    while (name := parents.get(name)) is not None:
        yield name


@styled
def by_category(models: dict) -> Figure:
    """Harm rate of sampled held-out answers in each category: one group of bars a category, one bar a model."""
    found = {m: models[m].get("heldout", {}).get("sampled", {}).get("by_category", {}) for m in ordered(models)}
    found = {m: {c: v for c, v in of.items() if v.get("harm_rate") is not None} for m, of in found.items()}
    names = list(dict.fromkeys(c for of in found.values() for c in of))
    figure, ax = _axes(7.6, 3.2)
    width = 0.8 / max(len(found), 1)
    for i, (model, of) in enumerate(found.items()):
        x = [n + (i - (len(found) - 1) / 2) * width for n, c in enumerate(names) if c in of]
        y = [of[c]["harm_rate"] for c in names if c in of]
        bars = ax.bar(x, y, 0.88 * width, color=colour_of(model), label=model)
        ax.bar_label(bars, [f"{100 * v:.0f}" for v in y], size=6.5, color=MUTED, padding=1.5)
    sizes = {c: v["n"] for of in found.values() for c, v in of.items() if "n" in v}
    ax.set_xticks(range(len(names)), [short(c) + (f"\nn = {sizes[c]}" if c in sizes else "") for c in names])
    ax.set_ylim(0, 1.08)
    ax.grid(False, axis="x")
    _name(ax, "", "", "harm rate")
    _percent(ax.yaxis)
    _key(ax, found)
    return figure


@styled
def rounds(found: dict) -> Figure:
    """Harm and explained refusals of the first response (round 0) and of each revision; right: harm by category.

    found: evaluate/rounds.json.
    """
    figure, (left, right) = _axes(7.6, 3.2, columns=2)
    steps = range(len(found["harm_rate"]))
    for ax, title in ((left, "All red-team prompts of the pipeline"), (right, "Harm by category")):
        _name(ax, title, "revisions", "share of answers")
        ax.set_ylim(-0.03, 1.03)
        ax.set_xticks(list(steps))
        _percent(ax.yaxis)
    left.fill_between(steps, *zip(*found["interval"], strict=True), color=INK, alpha=0.1, lw=0)
    lines = {"harmful": (found["harm_rate"], INK), "explained refusal": (found["explained"], MUTED)}
    _name_ends(left, {name: _line(left, steps, *line) for name, line in lines.items()})
    _name_ends(right, {name: _line(right, steps, values, MUTED, 1.1) for name, values in found["by_category"].items()})
    return figure


@styled
def curves(records: list[dict], panels: tuple, colour: str, xlabel: str = "step", columns: int = 3) -> Figure:
    """Small multiples of metrics over "step", from the lines of a metrics.jsonl. Values may be "nan" or "inf" as text."""
    panels = [(title, unit, {k: v for k, v in keys.items() if any(k in r for r in records)}) for title, unit, keys in panels]
    panels = [p for p in panels if p[2]]
    columns = min(columns, max(len(panels), 1))
    rows = -(-len(panels) // columns)
    figure, axes = _axes(2.53 * columns, 1.95 * rows + 0.2, rows, columns)
    for i, ax in enumerate(np.ravel(axes)):
        if i >= len(panels):
            ax.set_axis_off()
            continue
        title, unit, keys = panels[i]
        ends = {}
        for (key, name), shade in zip(keys.items(), (colour, INK, MUTED), strict=False):
            points = [(r["step"], float(r[key])) for r in records if key in r]
            ends[name] = _smooth_line(ax, *map(np.array, zip(*points, strict=True)), shade)
        _name_ends(ax, ends if len(keys) > 1 else {})
        _name(ax, title, xlabel if i + columns >= len(panels) else "", unit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    return figure


@styled
def calibration(evaluation: dict) -> Figure:
    """The reward model's probability against the labels' on held-out comparisons, one panel a source; area of a point: n."""
    sources = [name for name in ("ai", "human") if evaluation[name]["n"]]
    figure, axes = _axes(7.6, 3.7, columns=2)
    for ax in axes[len(sources) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, sources, strict=False):
        x, y, n = (np.array([row[k] for row in evaluation[name]["calibration"]]) for k in ("p_model", "p_label", "n"))
        ax.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, zorder=1)
        ax.plot(x, y, color=INK, lw=1, label=name)
        ax.scatter(x, y, 12 + 110 * n / n.max(), color=INK, lw=0, zorder=3)
        title = {"ai": "AI comparisons", "human": "Human comparisons"}[name]
        _name(ax, title, "reward model: P(a is preferred)", "label: P(a is preferred)")
        ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    return figure


@styled
def labels(comparisons: list[dict]) -> Figure:
    """The judge's labels p_a, and each verdict with response a shown first against the same with b shown first."""
    figure, (left, right) = _axes(7.6, 3.6, columns=2)
    left.hist([r["p_a"] for r in comparisons], bins=np.linspace(0, 1, 21), color=COLOURS["base"], rwidth=0.88)
    left.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    left.set_xlim(0, 1)
    left.grid(False, axis="x")
    _name(left, "Labels", "P(a is preferred)", "comparisons")
    verdicts = [j for r in comparisons for j in r["judgements"]]
    for x, low, high in (([0, 0.5], 0.5, 1), ([0.5, 1], 0, 0.5)):
        right.fill_between(x, low, high, color=INK, alpha=0.05, lw=0)
    right.plot([v["p_ab"] for v in verdicts], [v["p_ba"] for v in verdicts], "o", color=INK, ms=3, mew=0, alpha=0.3)
    right.text(0.03, 0.97, "the verdict turns\nwith the order", color=MUTED, size=7.5, va="top")
    right.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    _name(right, "One verdict, two orders", "P(a), a shown first", "P(a), b shown first")
    return figure


def _axes(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure of so many inches, and its axes."""
    figure = Figure(figsize=(width, max(height, 1)))
    return figure, figure.subplots(max(rows, 1), columns)


def _name(ax, title: str, xlabel: str, ylabel: str) -> None:
    """Title and labels; the label of y lies flat above its axis, where it can be read."""
    ax.set_title(title, pad=18)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel, rotation=0, ha="left", va="bottom")
    ax.yaxis.set_label_coords(0, 1.02)


def _percent(*axes) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.4g}%"))


def _line(ax, x, y, colour: str, width: float = 1.4, alpha: float = 1.0):
    values = [np.nan if v is None else v for v in y]
    return ax.plot(list(x), values, marker="o" if len(values) <= FEW else "", ms=3, color=colour, lw=width, alpha=alpha)[0]


def _smooth_line(ax, x, y, colour: str):
    """-> the line that carries the name."""
    if len(y) <= MANY:
        return _line(ax, x, y, colour)
    _line(ax, x, y, colour, 0.7, 0.35)
    window = len(y) // 20 // 2 * 2 + 1
    return _line(ax, x[window // 2 : len(y) - window // 2], np.convolve(y, np.ones(window) / window, "valid"), colour)


def _name_ends(ax, lines: dict) -> None:
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


def _key(ax, models) -> None:
    """The models' names in their colours, in one row above the axes."""
    last, place = ax, {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 25)}
    for model in models:
        last = ax.annotate(label_of(model), textcoords="offset points", color=colour_of(model), va="center", **place)
        last.set_weight("bold")
        place = {"xy": (1, 0.5), "xycoords": last, "xytext": (12, 0)}
