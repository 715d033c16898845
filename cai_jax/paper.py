"""The figures of the CAI paper (2212.08073) on our measurements, and some of those that came after it.

Records of files in, a matplotlib Figure out. What has an interval shows it. Lines are told apart by markers and by the names at
their ends, points by markers, so that nothing is lost in grey; a dashed line is always of greedy answers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cai_jax import canvas
from cai_jax.canvas import INK, MUTED, Panel, Series, axes_of, colour_of, draw_interval, label_of, lines, name_axes, styled
from cai_jax.intervals import wilson

SCALES = ("helpfulness", "harmlessness")  # of Elo
SMALL = {"textcoords": "offset points", "ha": "center", "size": 6.5, "color": MUTED}  # text beside a point


# Figures 2 and 3: points are {"group" of runs ("": of the only one), "model", scale of SCALES: {"elo", "low", "high"}}


@styled
def elo_plane(points: Sequence[dict]) -> Figure:
    """Figure 2: Elo of harmlessness against that of helpfulness."""
    (figure, ax), names = axes_of(7.6, 4.4), []
    for p in points:
        at, spans = [p[scale]["elo"] for scale in SCALES], [[p[scale]["low"], p[scale]["high"]] for scale in SCALES]
        draw_interval(ax, *at, spans, colour_of(p["model"]), canvas.marker_of(p["model"])).set_label(name_of(p))
        names.append((*at, p["group"] or label_of(p["model"]), colour_of(p["model"])))
    name_axes(ax, "", "helpfulness, Elo", "harmlessness, Elo")
    ax.margins(0.1, 0.1)
    if any(p["group"] for p in points):
        _legend(ax, {label_of(m): (colour_of(m), canvas.marker_of(m)) for m in canvas.ordered({p["model"] for p in points})})
    canvas.name_points(ax, names)
    return figure


def name_of(point: dict) -> str:
    """Of a model of a group of runs."""
    return ", ".join(filter(None, (label_of(point["model"]), point["group"])))


@styled
def elo_by_model(points: Sequence[dict]) -> Figure:
    """Figure 3: the same, one row a model, one panel a scale."""
    figure, axes = axes_of(7.6, 1.0 + 0.27 * len(points), columns=2)
    for ax, scale in zip(axes, SCALES, strict=True):
        rows = [(name_of(p), p[scale]["elo"], [p[scale]["low"], p[scale]["high"]], p["model"]) for p in points]
        _rows(ax, rows, [f"{value:+.0f}".replace("-", "−") if round(value) else "0" for _, value, _, _ in rows])
        ax.axvline(0, color="#bbbbbb", lw=0.8, zorder=1)
        name_axes(ax, scale, "Elo", "")
    axes[1].tick_params(labelleft=False)
    return figure


def _rows(ax, rows: Sequence[tuple], texts: Sequence[str], markers: Sequence[str] = ()) -> None:
    """A point and its interval in each row, from above, its value beside it. rows: (name, value, interval, model)."""
    for n, (name, value, span, model) in enumerate(rows):
        marker = markers[n] if markers else canvas.marker_of(model)
        draw_interval(ax, value, n, (span, None), colour_of(model), marker).set_label(name)
        ax.annotate(texts[n], (value, n), (0, 5), bbox={"fc": "white", "lw": 0, "pad": 0.3}, **SMALL)
    ax.set_yticks(range(len(rows)), [canvas.short(name, 34) for name, *_ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.7)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.margins(x=0.08)


def _legend(ax, looks: Mapping[str, tuple[str, str]]) -> None:
    """In one row above the axes and their labels. looks: name -> colour and marker."""
    look = {"ls": "", "mec": "white", "mew": 0.6, "ms": 6.5}
    handles = [Line2D([], [], color=colour, marker=marker, label=name, **look) for name, (colour, marker) in looks.items()]
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.04), "ncols": len(handles)}
    ax.legend(handles=handles, frameon=False, fontsize=7.5, handletextpad=0.4, columnspacing=1.4, **place)


METHODS = {"log-probs": "o", "chain of thought": "s", "several chains of thought": "D", "reward model": "^"}  # of judging


@styled
def judging(rows: Sequence[dict]) -> Figure:
    """Figure 4: who finds the better of two answers how often. rows: {"name", "method" of METHODS, "value", "low", "high"}."""
    figure, ax = axes_of(7.6, 1.2 + 0.27 * len(rows))
    rows = sorted(rows, key=lambda r: [*METHODS].index(r["method"]))
    shown = [(r["name"], r["value"], [r["low"], r["high"]], "") for r in rows]
    _rows(ax, shown, [f"{100 * r['value']:.0f}" for r in rows], [METHODS[r["method"]] for r in rows])
    ax.axvline(0.5, color="#bbbbbb", lw=0.8, zorder=1)
    ax.set_xlim(0, 1.02)
    canvas.percent(ax.xaxis)
    _legend(ax, {m: (INK, METHODS[m]) for m in METHODS if m in {r["method"] for r in rows}})
    name_axes(ax, "", "comparisons on which it agrees; the line is chance", "")
    return figure


@styled
def revisions(found: Mapping[str, dict], title: str = "") -> Figure:
    """Figures 5 and 7: the reward model's score, where there is one, and the oracle's harm, by number of revisions. found: name
    of a line -> evaluate/rounds.json."""
    looks = {name: n for n, name in enumerate(found)}
    scored = [(name, of["score"], of["score_interval"]) for name, of in found.items() if "score" in of]
    harm = [(name, of["harm_rate"], of["interval"]) for name, of in found.items()]
    both = [[Series(name, range(len(y)), y, span, looks[name]) for name, y, span in each] for each in (scored, harm)]
    panels = [Panel("Reward model", "mean score, its standard deviations", both[0])] if scored else []
    panels.append(Panel(title or "Oracle", "harmful responses", both[1], share=True))
    rounds = range(max(len(of["harm_rate"]) for of in found.values()))
    return lines(panels, "revisions", {n: str(n) for n in rounds})


@styled
def principles(rows: Sequence[dict]) -> Figure:
    """Figure 6: what is left of harm after the last revision, and how diverse revisions are, by number of principles. rows:
    {"name", "principles", "harm": (value, [low, high]), "diversity": likewise}."""
    figure, axes = axes_of(7.6, 3.1, columns=2)
    titles = (("harm", "Harm of the last revision", "share of answers"), ("diversity", "Diversity", "different beginnings"))
    for ax, (key, title, unit) in zip(axes, titles, strict=True):
        for r in rows:
            draw_interval(ax, r["principles"], r[key][0], (None, r[key][1]), INK).set_label(r["name"])
        name_axes(ax, title, "principles", unit)
        ax.set_ylim(-0.03, 1.03)
        ax.margins(x=0.15)
        canvas.percent(ax.yaxis)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        canvas.name_points(ax, [(r["principles"], r[key][0], r["name"], INK) for r in rows])
    return figure


def _series(name: str, x: Sequence[float], of: Sequence[dict], key: str, look: int, dashed: bool = False) -> Series:
    """A figure of the oracle's summaries (see miniworld.oracle), or one beside them, with its intervals."""
    return Series(name, x, [s[key] for s in of], [s["interval"][key] for s in of], look, dashed)


# Along RL: runs are name -> "snapshots" of ppo/dynamics.json, or its "elo" with a scale's models as {iteration: row}


@styled
def elo_along_rl(runs: Mapping[str, Mapping[str, Mapping[str, dict]]]) -> Figure:
    """Figure 8: Elo of a policy's snapshots against where it started."""
    panels = []
    for scale in SCALES:
        panels.append(Panel(scale, "Elo", []))
        for n, (name, found) in enumerate(runs.items()):
            rows = sorted((int(iteration), of) for iteration, of in found.get(scale, {}).items())
            spans = [[of["low"], of["high"]] for _, of in rows]
            panels[-1].series.append(Series(name, [i for i, _ in rows], [of["elo"] for _, of in rows], spans, n))
    return lines(panels, "iterations of RL")


@styled
def harmfulness(runs: Mapping[str, Sequence[dict]]) -> Figure:
    """Figure 10: harm from 0 to 4 of sampled answers (solid) and greedy ones (dashed), by the oracle and by the regressor."""
    panels = [Panel(title, "mean harm, 0 to 4", []) for title in ("Oracle", "Harm regressor")]
    for n, (name, snapshots) in enumerate(runs.items()):
        at = [s["iteration"] for s in snapshots]
        for mode, temperature in (("sampled", "T = 1"), ("greedy", "T = 0")):
            of = [s[mode] for s in snapshots]
            called, dashed = ", ".join(filter(None, (name, temperature))), mode == "greedy"
            for panel, key in zip(panels, ("harm_score", "harm"), strict=True):
                if all(key in x for x in of):
                    panel.series.append(_series(called, at, of, key, n, dashed))
    ends = [x for p in panels for s in p.series for x in (*s.y, *(high for _, high in s.interval)) if x is not None]
    limits = (0.0, min(4.1, 1.05 * max([0.2, *ends])))
    return lines([p._replace(limits=limits) for p in panels if p.series], "iterations of RL")


@styled
def overoptimisation(snapshots: Sequence[dict]) -> Figure:
    """What is optimised, and what is wanted, by how far the policy went (2210.10760, figure 1): the reward model's score, the
    referee's, who learnt from other comparisons, and the oracle's verdict."""
    kl, of = [s["kl"] for s in snapshots], [s["sampled"] for s in snapshots]
    named = {"reward": "reward model", "referee": "referee"}
    scores = [_series(named[key], kl, of, key, n) for n, key in enumerate(named) if all(key in x for x in of)]
    named = {"harm_rate": "harm", "helpfulness": "help", "over_refusal": "over-refusal"}
    truth = [_series(named[key], kl, of, key, n) for n, key in enumerate(named)]
    panels = [Panel("Scores", "means, their standard deviations", scores)] if scores else []
    return lines([*panels, Panel("Oracle", "share of answers", truth, share=True)], "KL to the start, nats per response")


@styled
def calibration(found: Mapping[str, Sequence[dict]]) -> Figure:
    """Figure 9: how often the first answer is the better one, by the probability that a judge gives it, with Wilson's
    intervals. found: name -> rows {"p_model", "p_label", "n"}, see evals.trust.calibration."""
    figure, ax = axes_of(4.6, 4.2)
    ax.plot([0, 1], [0, 1], color="#bbbbbb", lw=0.8, zorder=1)
    ends = {}
    for (name, rows), (colour, marker) in zip(found.items(), canvas.LOOKS * len(found), strict=False):
        x, y, n = (np.array([r[k] for r in rows]) for k in ("p_model", "p_label", "n"))
        for r in rows:
            ax.plot([r["p_model"]] * 2, wilson(r["p_label"], r["n"]), color=colour, lw=1, alpha=0.45, zorder=2)
        ends[canvas.marked(marker, name)] = ax.plot(x, y, color=colour, lw=1, label=name)[0]
        ax.scatter(x, y, 14 + 90 * n / n.max(), color=colour, marker=marker, lw=0.6, edgecolor="white", zorder=3)
    name_axes(ax, "", "label: P(a is better)", "a is better, share of comparisons")
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    canvas.percent(ax.xaxis, ax.yaxis)
    canvas.name_ends(ax, ends if len(ends) > 1 else {})
    return figure


# Beyond the paper


@styled
def frontier(rows: Sequence[dict]) -> Figure:
    """What alignment costs: harm, and help where rows have it, against KL from the start. Best-of-n is a line, what does not
    move from the start a level, the rest are points.

    rows: {"label", "kl" in nats per response, "harm_rate", "low", "high", "group"}, and "helpfulness" with its "interval".
    group: the model (rl_cai, best_of_8, ...), or any other word."""
    asked = [("harm_rate", "Harm", "harmful prompts"), ("helpfulness", "Help", "benign prompts")]
    asked = [a for a in asked if any(r.get(a[0]) is not None for r in rows)]
    figure, axes = axes_of(4.2 * len(asked), 4.2, columns=len(asked))
    for ax, (key, title, of) in zip(np.ravel(axes), asked, strict=True):
        there, names = [r for r in rows if r.get(key) is not None], []
        ax.set_xscale("log")
        best = sorted((r for r in there if canvas.BEST_OF.fullmatch(r["group"]) and r["kl"] > 0), key=lambda r: r["kl"])
        ax.plot([r["kl"] for r in best], [r[key] for r in best], color=colour_of("best_of_2"), lw=1.2, ls="--", zorder=2)
        for r in there:
            span = [r["low"], r["high"]] if key == "harm_rate" else r.get("interval")
            colour, marker = colour_of(r["group"]), canvas.marker_of(r["group"])
            if r["kl"] <= 0:
                ax.axhline(r[key], color=MUTED, lw=0.9, ls=":", zorder=1)
                ax.annotate(r["label"], (0.06, r[key]), (0, 2), xycoords=("axes fraction", "data"), **SMALL)
                continue
            draw_interval(ax, r["kl"], r[key], (None, span), colour, marker).set_label(r["label"])
            names.append((r["kl"], r[key], r["label"], colour))
        name_axes(ax, title, "KL to the start, nats per response", of)
        ax.margins(0.12, 0.1)
        canvas.percent(ax.yaxis)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        canvas.name_points(ax, names)
    return figure


@styled
def erosion(points: Sequence[dict]) -> Figure:
    """What fine-tuning on other things undoes, and what a few steps of the method bring back. points: those of
    erosion/results.json."""
    before = {"start": "start ", "eroded": "", "recovered": "+"}
    ticks = {n: f"{before[p['phase']]}{p['steps'] or ''}".strip() for n, p in enumerate(points)}
    panels = []
    for title, keys in (
        ("Harmful prompts", {"harm_rate": "harm", "explained": "explained", "evasive": "evasive"}),
        ("Benign prompts", {"helpfulness": "help", "over_refusal": "over-refusal"}),
    ):
        drawn = [_series(name, range(len(points)), points, key, n) for n, (key, name) in enumerate(keys.items())]
        panels.append(Panel(title, "share of answers", drawn, share=True))
    figure = lines(panels, "steps on other things, then + steps of recovery", ticks)
    back = [n for n, p in enumerate(points) if p["phase"] == "recovered"]
    for ax in figure.axes if back else ():
        ax.axvspan(back[0] - 0.5, back[-1] + 0.3, color=INK, alpha=0.05, lw=0, zorder=0)
    return figure


@styled
def attacks(models: Mapping[str, Mapping[str, dict]]) -> Figure:
    """How often models fail at each kind of attack, and hatched, how much of that is partial compliance. models: that of
    attack/results.json."""
    names, kinds = canvas.ordered(models), list(dict.fromkeys(k for of in models.values() for k in of))
    figure, ax = axes_of(max(5.2, 0.5 * len(kinds) * (len(names) + 0.5)), 3.3)
    width, bars = 0.86 / max(len(names), 1), []
    for i, model in enumerate(names):
        colour, of = colour_of(model), {k: v for k, v in models[model].items() if v["n"]}
        x = np.array([kinds.index(k) for k in of]) + (i - (len(names) - 1) / 2) * width
        y, spans = np.array([v["failure"] for v in of.values()]), np.array([v["interval"] for v in of.values()])
        error = {"yerr": np.abs(spans.T - y), "error_kw": {"elinewidth": 0.9, "ecolor": INK}}
        ax.bar(x, y, 0.86 * width, color=colour, lw=0, label=model, **error)
        part = y * np.array([v["partial"] or 0.0 for v in of.values()])
        ax.bar(x, part, 0.86 * width, hatch="/////", fc=colour, ec="white", lw=0)
        for place, (_, top), value in zip(x, spans, y, strict=True):
            ax.annotate(f"{100 * value:.0f}", (place, top), (0, 2), **SMALL)
        bars += [(place, label_of(model)) for place in x]
    ax.set_xticks(range(len(kinds)), map(canvas.short, kinds), color=INK)
    ax.xaxis.remove_overlapping_locs = False  # the bar in the middle stands where its kind does
    ax.set_xticks(*zip(*bars, strict=True), minor=True, size=6.5, color=MUTED)
    ax.tick_params(axis="x", which="major", pad=15)
    ax.tick_params(axis="x", which="minor", length=0)
    ax.set_ylim(0, 1.08)
    ax.grid(False, axis="x")
    name_axes(ax, "", "", "attacks that end in harm; hatched: by partial compliance")
    canvas.percent(ax.yaxis)
    return figure
