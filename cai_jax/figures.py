"""The figures of the report and of ablations: metrics and records in, a matplotlib Figure out. What they share: canvas.py."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cai_jax.canvas import (
    COLOURS,
    INK,
    MUTED,
    axes_of,
    colour_of,
    draw_line,
    draw_smooth,
    label_of,
    name_axes,
    name_ends,
    name_models,
    percent,
    short,
    styled,
    trained,
)  # fmt: skip

# Of `curves`: title, unit, {key: name of its line}. A panel without data is left out.
NORM = ("Gradient norm", "before clipping", {"gradient_norm": ""})
SFT_PANELS = (("Loss", "nats per target token", {"loss": ""}), ("Entropy", "nats per target token", {"entropy": ""}), NORM)
PAIR = (("Loss", "nats per comparison", {"loss": ""}), ("Accuracy in training", "share of the batch", {"accuracy": ""}))
REWARD_PANELS = (*PAIR, NORM)
HARM_PANELS = (("Loss", "squared error of a rating from 0 to 4", {"loss": ""}), NORM)
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


@styled
def plane(models: dict, parents: dict[str, str]) -> Figure:
    """Helpfulness against harmlessness (1 - harm rate) of sampled answers, with 95 % intervals.

    models: "models" of evaluate/results.json. parents: model -> the model it was trained from; arrows join held-out points.
    """
    figure, ax = axes_of(7.6, 4.4)
    at = {}
    for name in trained(models):
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
    name_axes(ax, "", "helpfulness on benign prompts", "harmlessness: 1 − harm rate")
    ax.margins(0.12, 0.09)
    percent(ax.xaxis, ax.yaxis)
    ax.text(0.02, 0.03, "●  held-out prompts     ○  red-team prompts", transform=ax.transAxes, color=MUTED, size=7.5)
    return figure


def _ancestors(name: str, parents: dict[str, str]):
    while (name := parents.get(name)) is not None:
        yield name


@styled
def by_category(models: dict) -> Figure:
    """Harm rate of sampled held-out answers in each category: one group of bars a category, one bar a model."""
    found = {m: models[m].get("heldout", {}).get("sampled", {}).get("by_category", {}) for m in trained(models)}
    found = {m: {c: v for c, v in of.items() if v.get("harm_rate") is not None} for m, of in found.items()}
    names = list(dict.fromkeys(c for of in found.values() for c in of))
    figure, ax = axes_of(7.6, 3.2)
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
    name_axes(ax, "", "", "harm rate")
    percent(ax.yaxis)
    name_models(ax, found)
    return figure


@styled
def rounds(found: dict) -> Figure:
    """Harm and explained refusals of the first response (round 0) and of each revision; right: harm by category.

    found: evaluate/rounds.json.
    """
    figure, (left, right) = axes_of(7.6, 3.2, columns=2)
    steps = range(len(found["harm_rate"]))
    for ax, title in ((left, "All red-team prompts of the pipeline"), (right, "Harm by category")):
        name_axes(ax, title, "revisions", "share of answers")
        ax.set_ylim(-0.03, 1.03)
        ax.set_xticks(list(steps))
        percent(ax.yaxis)
    left.fill_between(steps, *zip(*found["interval"], strict=True), color=INK, alpha=0.1, lw=0)
    lines = {"harmful": (found["harm_rate"], INK), "explained refusal": (found["explained"], MUTED)}
    name_ends(left, {name: draw_line(left, steps, *line) for name, line in lines.items()})
    name_ends(right, {name: draw_line(right, steps, values, MUTED, 1.1) for name, values in found["by_category"].items()})
    return figure


@styled
def curves(records: list[dict], panels: tuple, colour: str, xlabel: str = "step", columns: int = 3) -> Figure:
    """Small multiples of metrics over "step", from the lines of a metrics.jsonl. Values may be "nan" or "inf" as text."""
    panels = [(title, unit, {k: v for k, v in keys.items() if any(k in r for r in records)}) for title, unit, keys in panels]
    panels = [p for p in panels if p[2]]
    columns = min(columns, max(len(panels), 1))
    rows = -(-len(panels) // columns)
    figure, axes = axes_of(2.53 * columns, 1.95 * rows + 0.2, rows, columns)
    for i, ax in enumerate(np.ravel(axes)):
        if i >= len(panels):
            ax.set_axis_off()
            continue
        title, unit, keys = panels[i]
        ends = {}
        for (key, name), shade in zip(keys.items(), (colour, INK, MUTED), strict=False):
            points = [(r["step"], float(r[key])) for r in records if key in r]
            ends[name] = draw_smooth(ax, *map(np.array, zip(*points, strict=True)), shade)
        name_ends(ax, ends if len(keys) > 1 else {})
        name_axes(ax, title, xlabel if i + columns >= len(panels) else "", unit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}"))
    return figure


@styled
def calibration(evaluation: dict) -> Figure:
    """The reward model's probability against the labels' on held-out comparisons, one panel a source; area of a point: n."""
    sources = [name for name in ("ai", "human") if evaluation[name]["n"]]
    figure, axes = axes_of(7.6, 3.7, columns=2)
    for ax in axes[len(sources) :]:
        ax.set_axis_off()
    for ax, name in zip(axes, sources, strict=False):
        x, y, n = (np.array([row[k] for row in evaluation[name]["calibration"]]) for k in ("p_model", "p_label", "n"))
        ax.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, zorder=1)
        ax.plot(x, y, color=INK, lw=1, label=name)
        ax.scatter(x, y, 12 + 110 * n / n.max(), color=INK, lw=0, zorder=3)
        title = {"ai": "AI comparisons", "human": "Human comparisons"}[name]
        name_axes(ax, title, "reward model: P(a is preferred)", "label: P(a is preferred)")
        ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    return figure


@styled
def labels(comparisons: list[dict]) -> Figure:
    """The judge's labels p_a, and each verdict with response a shown first against the same with b shown first."""
    figure, (left, right) = axes_of(7.6, 3.6, columns=2)
    left.hist([r["p_a"] for r in comparisons], bins=np.linspace(0, 1, 21), color=COLOURS["base"], rwidth=0.88)
    left.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    left.set_xlim(0, 1)
    left.grid(False, axis="x")
    name_axes(left, "Labels", "P(a is preferred)", "comparisons")
    verdicts = [j for r in comparisons for j in r["judgements"]]
    for x, low, high in (([0, 0.5], 0.5, 1), ([0.5, 1], 0, 0.5)):
        right.fill_between(x, low, high, color=INK, alpha=0.05, lw=0)
    right.plot([v["p_ab"] for v in verdicts], [v["p_ba"] for v in verdicts], "o", color=INK, ms=3, mew=0, alpha=0.3)
    right.text(0.03, 0.97, "the verdict turns\nwith the order", color=MUTED, size=7.5, va="top")
    right.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    name_axes(right, "One verdict, two orders", "P(a), a shown first", "P(a), b shown first")
    return figure


@styled
def changes(rows: dict[str, dict[str, list[float]]], title: str) -> Figure:
    """How a rate changed from a baseline: rows x columns, each cell [], or [mean, low, high] with None for no interval.
    Dots mark intervals without 0."""
    names = list(dict.fromkeys(c for of in rows.values() for c in of))
    figure, ax = axes_of(2.4 + 1.0 * len(names), 0.9 + 0.26 * len(rows))
    value = np.array([[(of.get(c) or [np.nan])[0] for c in names] for of in rows.values()]).reshape(len(rows), len(names))
    most = max(0.05, np.nanmax(np.abs(value), initial=0.0))
    ax.imshow(value, cmap="PuOr_r", vmin=-2 * most, vmax=2 * most, aspect="auto")  # paler than the text on it
    for (y, x), v in np.ndenumerate(value):
        _, low, high = list(rows.values())[y].get(names[x]) or (0, None, None)
        sure = low is not None and (low > 0 or high < 0)
        if np.isfinite(v):
            ax.text(x, y, f"{100 * v:+.0f}" + " •" * sure, ha="center", va="center", weight="bold" if sure else "normal")
    ax.set_xticks(range(len(names)), map(short, names))
    ax.set_yticks(range(len(rows)), [short(r, 40) for r in rows])
    ax.grid(False)
    name_axes(ax, title, "", "change in points of a hundred;  •  its 95% interval is without 0")
    return figure
