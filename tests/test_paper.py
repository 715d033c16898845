"""The figures of the paper show the numbers, intervals and names that they were given, and tell them apart without colour."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.container import BarContainer
from matplotlib.transforms import Bbox

from cai_jax import canvas, paper
from cai_jax.intervals import wilson


def lines_of(ax):
    """Name -> its line, of those that have one."""
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def spans_of(ax):
    """The intervals that are drawn as bars: [((x, x), (y, y))]."""
    return [tuple(map(tuple, line.get_data())) for line in ax.get_lines() if line.get_label().startswith("_child")]


def bands_of(ax):
    return [{tuple(v) for v in band.get_paths()[0].vertices.tolist()} for band in ax.collections]


def names(ax):
    return [t.get_text() for t in ax.texts if t.get_text()]


def elo(value, low, high):
    return {"elo": value, "low": low, "high": high}


def point(model, x, y, group=""):
    return {"group": group, "model": model, "helpfulness": elo(x, x - 10, x + 20), "harmlessness": elo(y, y - 30, y + 40)}


def summary(rate, helps, **more):
    """An oracle's summary, each interval 0.25 to either side; `more`: figures beside it."""
    of = {"harm_rate": rate, "harm_score": 4 * rate, "explained": 1 - rate, "evasive": 0.0}
    of |= {"helpfulness": helps, "over_refusal": 0.0} | more
    return of | {"interval": {k: [v - 0.25, v + 0.25] for k, v in of.items()}}


SNAPSHOTS = [
    {"iteration": 0, "kl": 0.0, "sampled": summary(0.75, 1.0, reward=0.0, referee=0.0), "greedy": summary(0.5, 1.0)},
    {"iteration": 4, "kl": 1.5, "sampled": summary(0.25, 0.75, reward=2.0, referee=-1.0), "greedy": summary(0.0, 0.75)},
]


def test_elo_plane():
    ax = paper.elo_plane([point("base", 0, 0), point("rl_cai", -50, 900)]).axes[0]
    drawn = lines_of(ax)
    assert {k: v.get_xydata().tolist() for k, v in drawn.items()} == {"Base": [[0, 0]], "RL-CAI": [[-50, 900]]}
    assert drawn["Base"].get_marker() != drawn["RL-CAI"].get_marker()
    assert spans_of(ax)[2:] == [((-60, -30), (900, 900)), ((-50, -50), (870, 940))]
    assert names(ax) == ["Base", "RL-CAI"] and ax.get_legend() is None
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("helpfulness, Elo", "harmlessness, Elo")


def test_elo_plane_of_several_runs_names_the_runs_and_has_a_legend_of_models():
    ax = paper.elo_plane([point("base", 0, 0), point("rl_cai", 1, 2, "ppo"), point("rl_cai", 3, 4, "rloo")]).axes[0]
    assert names(ax) == ["Base", "ppo", "rloo"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["Base", "RL-CAI"]
    assert [h.get_marker() for h in ax.get_legend().get_lines()] == [canvas.MARKERS[m] for m in ("base", "rl_cai")]


def test_elo_by_model():
    points = [point("base", 0, 0), point("sl_cai", -50, 900, "ppo"), point("best_of_4", 0.2, 5)]
    left, right = paper.elo_by_model(points).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["Base", "SL-CAI, ppo", "best of 4"]
    assert names(left) == ["0", "−50", "0"] and names(right) == ["0", "+900", "+5"]
    assert [tuple(line.get_xydata()[0]) for line in lines_of(right).values()] == [(0, 0), (900, 1), (5, 2)]
    assert spans_of(right)[1] == ((870, 940), (1, 1))
    low, high = left.get_ylim()
    assert low > high  # the first is on top


def test_judging():
    way = [*paper.METHODS]
    rows = [{"name": f"j{n}", "method": way[m], "value": 0.5 + n / 8, "low": 0.5, "high": 1.0} for n, m in enumerate((1, 0, 1))]
    ax = paper.judging(rows).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["j1", "j0", "j2"]  # by method
    markers = [lines_of(ax)[name].get_marker() for name in ("j1", "j0", "j2")]
    assert markers == [paper.METHODS[way[m]] for m in (0, 1, 1)]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == way[:2] and names(ax) == ["62", "50", "75"]
    assert len({*paper.METHODS.values()}) == len(paper.METHODS)


ROUNDS = {"harm_rate": [1.0, 0.5], "interval": [[0.75, 1.0], [0.25, 0.75]]}
SCORE = {"score": [-1.0, 2.0], "score_interval": [[-1.5, -0.5], [1.5, 2.5]]}


def test_revisions():
    score, harm = paper.revisions({"all": ROUNDS | SCORE, "few": ROUNDS}).axes
    assert list(lines_of(score)) == ["all"] and list(lines_of(harm)) == ["all", "few"]
    assert lines_of(score)["all"].get_xydata().tolist() == [[0, -1], [1, 2]]
    assert bands_of(score) == [{(0, -1.5), (0, -0.5), (1, 1.5), (1, 2.5)}]
    assert bands_of(harm)[0] == {(0, 0.75), (0, 1.0), (1, 0.25), (1, 0.75)}
    assert lines_of(score)["all"].get_color() == lines_of(harm)["all"].get_color()
    assert {*names(harm)} == {"● all", "■ few"} and names(score) == []  # markers tell lines apart also in grey
    assert [t.get_text() for t in harm.get_xticklabels()] == ["0", "1"]
    (alone,) = paper.revisions({"": ROUNDS}, "Harm").axes
    assert alone.get_title(loc="left") == "Harm" and names(alone) == []


def test_principles():
    rows = [{"name": f"{n} of them", "principles": n, "harm": (0.5, [0.25, 0.75]), "diversity": (n / 8, None)} for n in (1, 4)]
    harm, diversity = paper.principles(rows).axes
    assert [tuple(line.get_xydata()[0]) for line in lines_of(diversity).values()] == [(1, 0.125), (4, 0.5)]
    assert spans_of(harm) == [((1, 1), (0.25, 0.75)), ((4, 4), (0.25, 0.75))] and spans_of(diversity) == []
    assert names(harm) == ["1 of them", "4 of them"]


def test_elo_along_rl():
    rows = {"10": elo(50, 40, 70), "0": elo(0, 0, 0), "4": elo(20, 10, 30)}  # by number, and not as text
    left, right = paper.elo_along_rl({"ppo": {"helpfulness": rows, "harmlessness": rows}, "rloo": {"harmlessness": rows}}).axes
    assert lines_of(left)["ppo"].get_xydata().tolist() == [[0, 0], [4, 20], [10, 50]]
    assert bands_of(left)[0] == {(0, 0), (4, 10), (4, 30), (10, 40), (10, 70)}
    assert {*names(right)} == {"● ppo", "■ rloo"} and (left.get_title(loc="left"), left.get_ylabel()) == (
        "helpfulness",
        "Elo",
    )


def test_harmfulness():
    (oracle,) = paper.harmfulness({"": SNAPSHOTS}).axes
    drawn = lines_of(oracle)
    assert drawn["T = 1"].get_xydata().tolist() == [[0, 3], [4, 1]] and drawn["T = 0"].get_xydata().tolist() == [[0, 2], [4, 0]]
    assert drawn["T = 1"].get_linestyle() == "-" and drawn["T = 0"].get_linestyle() == "--"
    assert oracle.get_ylim()[0] == 0
    rated = [s | {"sampled": summary(0.5, 1.0, harm=n + 0.5)} for n, s in enumerate(SNAPSHOTS)]
    oracle, regressor = paper.harmfulness({"ppo": rated}).axes
    assert lines_of(regressor).keys() == {"ppo, T = 1"} and lines_of(oracle).keys() == {"ppo, T = 1", "ppo, T = 0"}
    assert lines_of(regressor)["ppo, T = 1"].get_ydata().tolist() == [0.5, 1.5] and oracle.get_ylim() == regressor.get_ylim()


def test_overoptimisation():
    scores, oracle = paper.overoptimisation(SNAPSHOTS).axes
    drawn = {name: line.get_xydata().tolist() for name, line in lines_of(scores).items()}
    assert drawn == {"reward model": [[0, 0], [1.5, 2]], "referee": [[0, 0], [1.5, -1]]}
    assert lines_of(oracle)["harm"].get_xydata().tolist() == [[0, 0.75], [1.5, 0.25]]
    bare = [s | {"sampled": s["greedy"]} for s in SNAPSHOTS]
    assert [ax.get_title(loc="left") for ax in paper.overoptimisation(bare).axes] == ["Oracle"]


def test_calibration():
    bins = [{"p_model": 0.25, "p_label": 0.5, "n": 4}, {"p_model": 0.75, "p_label": 0.625, "n": 16}]
    ax = paper.calibration({"judge": bins, "other": bins[:1]}).axes[0]
    assert lines_of(ax)["judge"].get_xydata().tolist() == [[0.25, 0.5], [0.75, 0.625]]
    assert spans_of(ax)[1:3] == [((0.25, 0.25), tuple(wilson(0.5, 4))), ((0.75, 0.75), tuple(wilson(0.625, 16)))]
    small, large = ax.collections[0].get_sizes() - 14
    assert large == pytest.approx(4 * small) and {*names(ax)} == {"● judge", "■ other"}


def row(label, kl, harm, group, **more):
    return {"label": label, "kl": kl, "harm_rate": harm, "low": harm - 0.125, "high": harm + 0.125, "group": group} | more


ROWS = [
    row("start", 0.0, 0.5, "sl_cai", helpfulness=1.0, interval=[0.75, 1.0]),
    row("best of 4", 0.75, 0.25, "best_of_4", helpfulness=0.75),
    row("best of 2", 0.25, 0.375, "best_of_2"),
    row("PPO", 2.0, 0.125, "rl_cai", helpfulness=0.5, interval=[0.25, 0.75]),
]


def test_frontier():
    harm, help_ = paper.frontier(ROWS).axes
    assert (harm.get_xscale(), harm.get_xlabel()) == ("log", "KL to the start, nats per response")
    dashed = [line.get_xydata().tolist() for line in harm.get_lines() if line.get_linestyle() == "--"]
    assert dashed == [[[0.25, 0.375], [0.75, 0.25]]]  # by KL
    assert lines_of(harm)["PPO"].get_xydata().tolist() == [[2, 0.125]] and ((2, 2), (0, 0.25)) in spans_of(harm)
    (level,) = [line for line in harm.get_lines() if line.get_linestyle() == ":"]
    assert level.get_ydata() == [0.5, 0.5]
    assert sorted(names(harm)) == ["PPO", "best of 2", "best of 4", "start"]
    assert sorted(names(help_)) == ["PPO", "best of 4", "start"] and ((2, 2), (0.25, 0.75)) in spans_of(help_)
    assert len(paper.frontier([{k: v for k, v in r.items() if k != "helpfulness"} for r in ROWS]).axes) == 1


def test_erosion():
    phases = (("start", 0, 0.0), ("eroded", 25, 0.25), ("eroded", 100, 0.5), ("recovered", 5, 0.125))
    harmful, benign = paper.erosion([{"phase": p, "steps": n} | summary(h, 1.0) for p, n, h in phases]).axes
    assert [t.get_text() for t in harmful.get_xticklabels()] == ["start", "25", "100", "+5"]
    assert lines_of(harmful)["harm"].get_ydata().tolist() == [0, 0.25, 0.5, 0.125]
    assert lines_of(harmful).keys() == {"harm", "explained", "evasive"} and lines_of(benign).keys() == {"help", "over-refusal"}
    (shade,) = harmful.patches
    assert shade.get_x() == 2.5


def test_attacks():
    base = {"direct": {"failure": 0.75, "interval": [0.5, 1.0], "partial": 0.25, "n": 8}}
    trained = {"direct": {"failure": 0.0, "interval": [0.0, 0.5], "partial": None, "n": 8}}
    trained["story"] = {"failure": 0.5, "interval": [0.25, 0.75], "partial": 1.0, "n": 8}
    nothing = {"story": {"failure": None, "interval": [0.0, 1.0], "partial": None, "n": 0}}
    ax = paper.attacks({"rl_cai": trained, "base": base | nothing}).axes[0]
    drawn = [c for c in ax.containers if isinstance(c, BarContainer)]
    bars = [[(round(b.get_x() + b.get_width() / 2, 6), round(b.get_height(), 6), b.get_hatch()) for b in c] for c in drawn]
    assert bars == [
        [(-0.215, 0.75, None)],
        [(-0.215, 0.1875, "/////")],
        [(0.215, 0.0, None), (1.215, 0.5, None)],
        [(0.215, 0.0, "/////"), (1.215, 0.5, "/////")],
    ]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["direct", "story"]
    assert [t.get_text() for t in ax.get_xticklabels(minor=True)] == ["Base", "RL-CAI", "RL-CAI"]
    assert names(ax) == ["75", "0", "50"]


def test_every_bar_of_a_group_is_named():
    """Also the one in the middle, which stands over the name of its kind."""
    of = {"direct": {"failure": 0.5, "interval": [0.25, 0.75], "partial": 0.5, "n": 8}}
    figure = paper.attacks({"base": of, "sl_cai": of, "rl_cai": of})
    canvas.png(figure)
    assert len(figure.axes[0].xaxis.get_minor_ticks()) == len(figure.axes[0].get_xticks(minor=True)) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: paper.elo_plane([point("base", 0, 0), point("$\\bad{$" + "w" * 99, 1, 2, "語")]),
        lambda: paper.harmfulness({"$\\bad{$" + "w" * 99: SNAPSHOTS}),
        lambda: paper.frontier(ROWS),
    ],
)
def test_the_same_numbers_give_the_same_bytes_and_names_of_any_kind_are_drawn(make):
    assert canvas.png(make()) == canvas.png(make())
    once = canvas.svg(make())
    assert once == canvas.svg(make()) and b"<dc:date>" not in once and b"Matplotlib v" not in once


def test_names_of_points_do_not_hide_each_other():
    close = [point("rl_cai", 10 * (n % 3), 10 * (n // 3), f"variant-{n}") for n in range(6)]
    figure = paper.elo_plane([point("base", 2000, 2000, "w" * 26), point("sl_cai", -2000, -2000), *close])
    canvas.png(figure)
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text()]
    both = [Bbox.intersection(a, b) for n, a in enumerate(boxes) for b in boxes[:n]]
    hidden = [x for x in both if x and x.height > 0.2 * boxes[0].height]  # a line of type has room above and below
    assert len(boxes) == 8 and not hidden
    frame = figure.axes[0].get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)


def test_looks_differ_in_more_than_colour():
    assert len({marker for _, marker in canvas.LOOKS}) == len(canvas.LOOKS) == len({to_rgba(c) for c, _ in canvas.LOOKS})
    assert len({canvas.marker_of(m) for m in (*canvas.LABELS, "best_of_2", "other")}) == len(canvas.LABELS) + 2
    assert np.unique([canvas.GLYPHS[marker] for _, marker in canvas.LOOKS]).size == len(canvas.LOOKS)
