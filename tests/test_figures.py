"""The figures show the numbers they were given, in colours that everybody can tell apart, and are the same each time."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from cai_jax import canvas, figures

CATEGORIES = ("fraud & <b>", "illegal")


def metrics(harm, helpful):
    """What the oracle says of one model, set and mode. harm None: there was no harmful prompt."""
    values = {"harm_rate": harm, "helpfulness": helpful}
    interval = {k: [0.0, 1.0] if v is None else [v - 0.1, v + 0.1] for k, v in values.items()}
    by_category = {} if harm is None else {c: {"harm_rate": harm / (i + 1), "n": 3} for i, c in enumerate(CATEGORIES)}
    by_category["cooking"] = {"helpfulness": helpful, "n": 3}
    return values | {"interval": interval, "by_category": by_category}


MODELS = {
    "rl_cai": {"heldout": {"sampled": metrics(0.25, 0.75)}, "redteam": {"sampled": metrics(0.2, 0.7)}},
    "base": {"heldout": {"sampled": metrics(0.875, 0.9)}, "redteam": {"sampled": metrics(0.8, 0.85)}},
}
ROUNDS = {
    "harm_rate": [0.9, 0.5, 0.2],
    "interval": [[0.8, 0.95], [0.4, 0.6], [0.1, 0.3]],
    "explained": [0.0, None, 0.7],
    "by_category": {"fraud": [1.0, 0.6, 0.3], "illegal": [0.8, 0.4, 0.1]},
}
BINS = [{"p_model": 0.25, "p_label": 0.5, "n": 4}, {"p_model": 0.75, "p_label": 0.625, "n": 16}]
EVALUATION = {
    "scale": {"mean": 0.0, "std": 1.0},
    "ai": {"n": 20, "accuracy": 0.875, "calibration_error": 0.0625, "calibration": BINS},
    "human": {"n": 0, "accuracy": 0.0, "calibration_error": 0.0, "calibration": []},
}


def points(ax):
    return {line.get_label(): tuple(line.get_xydata()[0]) for line in ax.get_lines() if line.get_marker() == "o"}


def names(ax):
    return [t.get_text() for t in ax.texts if t.get_text()]


def test_plane():
    figure = figures.plane(MODELS, {"rl_cai": "sl_cai", "sl_cai": "base"})
    ax = figure.axes[0]
    wanted = {"base heldout": (0.9, 0.125), "rl_cai heldout": (0.75, 0.75), "base redteam": (0.85, 0.2)}
    assert {k: pytest.approx(v) for k, v in points(ax).items()} == wanted | {"rl_cai redteam": (0.7, 0.8)}
    drawn = {line.get_label(): line for line in ax.get_lines()}
    assert drawn["base redteam"].get_markerfacecolor() == "white" and drawn["base heldout"].get_markerfacecolor() != "white"
    bars = [line.get_xydata() for line in ax.get_lines() if line.get_marker() != "o"]
    assert any(np.allclose(b, [[0.65, 0.75], [0.85, 0.75]]) for b in bars)  # helpfulness of rl_cai
    assert any(np.allclose(b, [[0.75, 0.65], [0.75, 0.85]]) for b in bars)  # 1 - harm
    arrows = [(t.xy, t.xyann) for t in ax.texts if getattr(t, "arrow_patch", None)]
    assert arrows == [((0.75, 0.75), (0.9, 0.125))]  # the model between is missing: from its own parent


def test_plane_leaves_out_what_has_no_place():
    ax = figures.plane({"base": {"heldout": {"sampled": metrics(None, 0.5)}}, "new": {}}, {}).axes[0]
    assert not ax.has_data()


def test_by_category():
    ax = figures.by_category(MODELS).axes[0]
    bars = {c.get_label(): [b.get_height() for b in c] for c in ax.containers}
    assert bars == {"base": [0.875, 0.4375], "rl_cai": [0.25, 0.125]}
    assert [c[0].get_facecolor() for c in ax.containers] == [to_rgba(canvas.COLOURS[m]) for m in ("base", "rl_cai")]
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"{c}\nn = 3" for c in CATEGORIES]
    assert {"Base", "RL-CAI", "88", "44", "25", "12"} == set(names(ax))
    first, second = (sorted(b.get_x() + b.get_width() / 2 for b in c) for c in ax.containers)
    assert [round((a + b) / 2, 9) for a, b in zip(first, second, strict=True)] == [0, 1]  # each group stands over its tick


def test_rounds():
    left, right = figures.rounds(ROUNDS).axes
    harm, explained = (line.get_ydata() for line in left.get_lines())
    assert list(harm) == ROUNDS["harm_rate"] and np.allclose(explained, [0, np.nan, 0.7], equal_nan=True)
    band = {tuple(v) for v in left.collections[0].get_paths()[0].vertices}
    assert band == {(x, y) for x, span in enumerate(ROUNDS["interval"]) for y in span}
    assert [list(line.get_ydata()) for line in right.get_lines()] == list(ROUNDS["by_category"].values())
    assert names(left) == ["harmful", "explained refusal"] and sorted(names(right)) == ["fraud", "illegal"]


def test_curves_plot_every_key_where_it_was_logged():
    logged = [{"step": t, "kl": t / 10, "score": "nan" if t == 1 else float(t)} for t in range(6)]
    logged[3] |= {"eval/harm_rate": 0.5}
    logged[5] |= {"eval/harm_rate": 0.25}
    axes = [ax for ax in figures.curves(logged, figures.PPO_PANELS, "#123456", "iteration", 4).axes if ax.axison]
    shown = {ax.get_title(loc="left"): ax for ax in axes}
    assert list(shown) == ["Harm, watched", "Score", "KL to the start"]
    line = {title: ax.get_lines()[0] for title, ax in shown.items()}
    assert line["Harm, watched"].get_xydata().tolist() == [[3, 0.5], [5, 0.25]]
    assert np.allclose(line["Score"].get_ydata(), [0, np.nan, 2, 3, 4, 5], equal_nan=True)
    assert line["KL to the start"].get_xydata().tolist() == [[t, t / 10] for t in range(6)]
    assert {ax.get_ylabel() for ax in axes} == {"share of harmful prompts", "reward-model deviations", "nats per response"}
    assert {ax.get_xlabel() for ax in axes} == {"iteration"} and line["Score"].get_color() == "#123456"


def test_long_curves_show_the_values_and_their_running_mean():
    values = np.arange(101.0) ** 2
    figure = figures.curves([{"step": t + 7, "loss": v} for t, v in enumerate(values)], figures.SFT_PANELS, "#123456")
    raw, mean = figure.axes[0].get_lines()
    assert np.array_equal(raw.get_xydata(), np.stack([np.arange(101) + 7, values], 1)) and raw.get_alpha() < 0.5
    assert mean.get_xdata()[0] == 9 and mean.get_xdata()[-1] == 105  # a window of five points, never past the ends
    assert np.allclose(mean.get_ydata(), [values[i - 2 : i + 3].mean() for i in range(2, 99)])


def test_calibration():
    figure = figures.calibration(EVALUATION)
    ai, human = figure.axes
    diagonal, drawn = ai.get_lines()
    assert drawn.get_xydata().tolist() == [[0.25, 0.5], [0.75, 0.625]] and diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    small, large = ai.collections[0].get_sizes() - 12
    assert large == pytest.approx(4 * small) and not human.axison


def test_labels():
    pairs = [{"p_a": p, "judgements": [{"p_ab": 0.75, "p_ba": p}]} for p in (0.01, 0.02, 0.52, 1.0)]
    left, right = figures.labels(pairs).axes
    heights = [int(b.get_height()) for b in left.patches]
    assert len(heights) == 20 and (heights[0], heights[10], heights[19], sum(heights)) == (2, 1, 1, 4)
    assert right.get_lines()[0].get_xydata().tolist() == [[0.75, p] for p in (0.01, 0.02, 0.52, 1.0)]


def test_names_at_line_ends_keep_apart():
    same = ROUNDS | {"by_category": {f"c{i}": [0.5, 0.4, 0.3 + i / 1000] for i in range(5)}}
    figure = figures.rounds(same)
    canvas.png(figure)
    extents = [t.get_window_extent() for t in figure.axes[1].texts]
    assert names(figure.axes[1]) == [f"c{i}" for i in range(5)]
    assert np.diff([(e.y0 + e.y1) / 2 for e in extents]).min() > 1.2 * 7 / 72 * figure.dpi  # 7 points high


def test_text_from_data_is_cut_and_never_mathematics():
    assert canvas.short("a\n b") == "a b" and canvas.short("x" * 40) == "x" * 17 + "…"
    odd = {"$\\bad{$" + "w" * 99: [0.5, 0.5, 0.5], "語": [0.1, 0.1, 0.1]}
    figure = figures.rounds(ROUNDS | {"by_category": odd})
    assert canvas.png(figure) == canvas.png(figure)
    width = figure.axes[1].get_window_extent().width
    assert width > 100  # a long name does not push the axes away


def test_best_of_n_is_named_and_comes_last_by_n():
    assert canvas.ordered(["best_of_16", "other", "rl_cai", "best_of_4", "base"]) == [
        "base", "rl_cai", "other", "best_of_4", "best_of_16",
    ]  # fmt: skip
    best = {"best_of_4": MODELS["base"]}
    assert points(figures.plane(MODELS | best, {}).axes[0]).keys() == points(figures.plane(MODELS, {}).axes[0]).keys()
    assert len(figures.by_category(MODELS | best).axes[0].containers) == len(MODELS)  # the frontier shows it
    assert canvas.label_of("best_of_16") == "best of 16" and canvas.label_of("best_of_x") == "best_of_x"
    assert canvas.colour_of("best_of_2") == canvas.colour_of("best_of_4") not in (*canvas.COLOURS.values(), canvas.INK)
    assert canvas.marker_of("best_of_2") not in canvas.MARKERS.values()


def test_an_svg_is_the_same_each_time_and_says_no_date():
    first, again = (canvas.svg(figures.rounds(ROUNDS)) for _ in range(2))
    assert first == again and first.startswith(b"<?xml") and b"<dc:date>" not in first
    assert b"<text" not in first  # outlines: nobody's font is wanted


def test_a_band_that_would_go_back_is_bars():
    there, back = (canvas.Series("x", x, [0.0, 1.0, 2.0], [[-1, 1], [0, 2], None]) for x in ((0, 1, 2), (0, 2, 1)))
    left, right = canvas.lines([canvas.Panel("a", "", [there]), canvas.Panel("b", "", [back], limits=(0, 9))], "x").axes
    assert {tuple(v) for v in left.collections[0].get_paths()[0].vertices} == {(0, -1), (0, 1), (1, 0), (1, 2)}
    assert [s.tolist() for s in right.collections[0].get_segments()] == [[[0, -1], [0, 1]], [[2, 0], [2, 2]]]
    assert right.get_ylim() == (0, 9) and right.get_lines()[0].get_xydata().tolist() == [[0, 0], [2, 1], [1, 2]]


def test_colours_tell_models_apart_for_every_eye():
    """Colour differences (CIE76) under simulated dichromacies (Machado 2009, severity 1), and contrast on white as text."""
    views = {
        "usual": np.eye(3),
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    rgb = np.array([to_rgba(canvas.COLOURS[m])[:3] for m in canvas.LABELS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() > 4.4
    for matrix in views.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1)
        xyz = seen @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
        xyz = xyz / [0.95047, 1, 1.08883]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(len(lab), 1)]
        assert apart.min() > 20
