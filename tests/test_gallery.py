"""`cai report` and what it is made of: runs are found and put together, files are pooled over seeds, figures and tables say
what they rest on, and what cannot be drawn is refused by name."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cai_jax import canvas, config, gallery, records, report
from cai_jax.gallery import captions, runs, tables
from cai_jax.intervals import student
from cai_jax.sections import as_dict
from cai_jax.terminal import INPUT_EXIT
from cai_jax.workdir import finish, write_json

ROOT = Path(__file__).parent.parent
STAGES = ("critique", "sft", "preferences", "reward", "ppo", "evaluate", "report")
KINDS = ("weapons", "fraud & <b>")


def summary(harm, **more):
    of = {"harm_rate": harm, "harm_score": 4 * harm, "explained": 1 - harm, "evasive": 0.0, "helpfulness": 0.75} | more
    of |= {"over_refusal": 0.0}
    spans = {k: [v - 0.125, v + 0.125] for k, v in of.items()}
    by = {c: {"harm_score": 4 * harm / (n + 1), "n": 30} for n, c in enumerate(KINDS)} | {
        "garden": {"helpfulness": 1.0, "n": 9}
    }
    return of | {"interval": spans, "by_category": by, "n_harmful": 60, "n_benign": 9}


def elo(**models):
    rows = [{"model": m, "elo": x, "low": x - 10, "high": x + 10, "n": 5, "win_share": 0.5} for m, x in models.items()]
    return {"n": 5, "models": sorted(rows, key=lambda r: -r["elo"])}


def build(folder, seed=0, shift=0.0, made="x", cfg=None, **changes):
    """A finished run. made: what its critique and sft ended with; shift: of its figures."""
    cfg = dataclasses.replace(cfg or config.Config(stages=STAGES), seed=seed, **changes)
    write_json(folder / "config.json", as_dict(cfg))
    steps = {"steps": 10, "kept": 60, "target_tokens": 1000}
    finish("critique", folder, {"given": 61, "kept": 60}, revisions=made)
    finish("sft", folder, steps, model=made)
    finish("preferences", folder, {"kept": 50}, comparisons=made)
    finish("reward", folder, {"kept": 70, "steps": 7}, model=f"{made} {seed}")
    finish("ppo", folder, {"rollouts": 256, "updates": 8}, model=f"{folder.name} {seed}")
    turn = {"principle": "harm", "revision": f"one two three {made}"}
    rounds = [turn] * cfg.critique.rounds
    records.write(
        folder / "critique/revisions.jsonl", [{"rounds": rounds}, {"rounds": [*rounds[1:], turn | {"principle": made}]}]
    )
    records.write(folder / "ppo/metrics.jsonl", [{"step": t, "response_length": 10.0 + t} for t in range(2)])
    models = {"base": 1.0, "sl_cai": 0.5 + shift, "rl_cai": 0.125 + shift, "best_of_4": 0.25}
    kl = {"rl_cai": 0.5, "best_of_4": 0.75, "sl_cai": 3.0}
    results = {m: {"heldout": {"sampled": summary(x)}} for m, x in models.items()}
    for model, x in kl.items():
        results[model]["kl"] = {"start": {"mean": x, "interval": [x - 0.125, x + 0.125]}}
    ratings = {"harmlessness": elo(base=0.0, sl_cai=500 + shift, rl_cai=900 + 80 * shift)}
    ratings["helpfulness"] = elo(base=0.0, sl_cai=-50.0, rl_cai=-60.0)
    judged = {"elo": {"harmlessness": elo(base=0.0, rl_cai=300.0 + 96 * shift)}}
    judged["elo_at_equal_length"] = {"harmlessness": elo(base=0.0, rl_cai=200.0)}
    write_json(folder / "evaluate/results.json", {"models": results, "elo": ratings, "by_judge": judged})
    harm = [1.0, 0.5 + shift, 0.25 + shift]
    score = {"score": [-1.0, 0.5, 1.0], "score_interval": [[-1.1, -0.9], [0.4, 0.6], [0.9, 1.1]]}
    write_json(folder / "evaluate/rounds.json", {"harm_rate": harm, "interval": [[x - 0.125, x] for x in harm]} | score)
    dynamics = [{"iteration": n, "kl": n / 4, "sampled": summary(0.5 - n / 8 + shift), "greedy": summary(0.25)} for n in (0, 2)]
    along = {scale: elo(**{"0": 0.0, "2": 90.0 + shift}) for scale in ("harmlessness", "helpfulness")}
    write_json(folder / "ppo/dynamics.json", {"snapshots": dynamics, "elo": along})
    return folder


def lines_of(ax):
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines() if not line.get_label().startswith("_")}


def drawn(*places):
    return {p.key: p for p in gallery.pictures(runs.find([str(p) for p in places]))}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return build(tmp_path_factory.mktemp("runs") / "a")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two seeds of three variants that share their supervised stage, and one that has another."""
    folder = tmp_path_factory.mktemp("study")
    ppo = config.Config(stages=STAGES)
    for seed in (0, 1):
        shift = seed / 16
        build(folder / f"plain-{seed}", seed, shift, cfg=ppo)
        build(folder / f"rloo-{seed}", seed, shift, cfg=ppo, ppo=config.method.PPO(advantage="rloo", group=4))
        direct = config.method.Critique(direct=True)
        build(folder / f"direct-{seed}", seed, shift + 0.25, made="y", cfg=ppo, critique=direct)
        none = config.method.Critique(use_principles=False)
        build(folder / f"no-principles-{seed}", seed, shift + 0.25, made="z", cfg=ppo, critique=none)
    order = ["plain", "rloo", "no-principles", "direct"]
    write_json(folder / "study.json", {"answers": [{"variant": v, "who": "base"} for v in order for _ in range(2)]})
    return folder


@pytest.fixture(scope="module")
def of_one(one):
    return drawn(one)


@pytest.fixture(scope="module")
def of_study(study):
    return drawn(study)


def test_one_run(of_one):
    found = of_one
    assert [*found] == ["figure-2", "figure-3", "figure-5", "figure-8", "figure-10", "overoptimisation", "frontier"]
    plane = lines_of(found["figure-2"].figure.axes[0])
    assert plane == {"Base": [[0, 0]], "SL-CAI": [[-50, 500]], "RL-CAI": [[-60, 900]]}
    assert found["figure-8"].figure.axes[1].get_lines()[0].get_xydata().tolist() == [[0, 0], [2, 90]]
    assert lines_of(found["figure-10"].figure.axes[0])["T = 1"] == [[0, 2], [2, 1]]
    harm = found["frontier"].figure.axes[0]
    points = {"RL-CAI": [[0.5, 0.125]], "best of 4": [[0.75, 0.25]]}  # the supervised model is where RL starts: a level
    assert {k: v for k, v in lines_of(harm).items() if k in points} == points
    assert {t.get_text() for t in harm.texts if t.get_text()} == {*points, "SL-CAI"}


def test_files_of_stages_that_the_run_does_not_have_are_not_its_own(tmp_path):
    assert [*drawn(build(tmp_path / "a", stages=("critique", "sft", "reward", "evaluate")))] == [
        "figure-2", "figure-3", "figure-5", "frontier",
    ]  # fmt: skip


def test_the_frontier_has_models_that_start_where_rl_does(tmp_path):
    def shown(**changes):
        of = build(tmp_path / str(len(changes)), **changes)
        results = runs.read_json(of / "evaluate/results.json")
        results["models"]["dpo_cai"] = results["models"]["rl_cai"]
        write_json(of / "evaluate/results.json", results)
        return {t.get_text() for t in drawn(of)["frontier"].figure.axes[0].texts if t.get_text()}

    assert shown() == {"SL-CAI", "DPO-CAI", "RL-CAI", "best of 4"}
    assert shown(ppo=config.method.PPO(init="base")) == {"Base", "RL-CAI", "best of 4"}


def test_captions_say_what_they_rest_on(of_one, of_study):
    for found in (of_one, of_study):
        for p in found.values():
            assert p.title == captions.CAPTIONS["overoptimisation" if "over" in p.key else p.key][0]
            assert any(c.isdigit() for c in p.caption) and "{" not in p.caption
            assert "paper" in p.caption or "After" in p.caption or "2026" in p.caption
    assert "the same 60 harmful and 9 benign held-out prompts" in of_one["figure-2"].caption
    assert "over prompts; another seed may do otherwise" in of_one["figure-2"].caption
    assert "Student's over 2 seeds." in of_study["figure-2"].caption


@pytest.mark.parametrize(
    "seeds, words",
    [([1], "over prompts; another seed"), ([1, 3, 5], "Student's over 3 or 5 seeds, over prompts where there is one."),
     ([2, 2], "Student's over 2 seeds.")],
)  # fmt: skip
def test_what_intervals_are_of(seeds, words):
    assert words in captions.sure(seeds)


def test_a_study_is_its_variants_over_seeds(study, of_study):
    groups = runs.find([str(study)])
    assert [g.name for g in groups] == ["plain", "rloo", "no-principles", "direct"]  # as the study has them
    assert [[run.cfg.seed for run in g.runs] for g in groups] == [[0, 1]] * 4
    found = of_study
    plane = lines_of(found["figure-2"].figure.axes[0])
    assert plane["RL-CAI, plain"] == [[-60, 902.5]] and plane.keys() == {
        "Base", "SL-CAI, plain", "RL-CAI, plain", "RL-CAI, rloo", "SL-CAI, no-principles", "RL-CAI, no-principles",
        "SL-CAI, direct", "RL-CAI, direct",
    }  # fmt: skip
    spans = [line.get_data() for line in found["figure-2"].figure.axes[0].get_lines() if line.get_label().startswith("_")]
    assert any(list(y) == pytest.approx(student([900, 905])) for _, y in spans)
    assert lines_of(found["figure-5"].figure.axes[1]) == {  # once for those that share the stage, and without the direct ones
        "plain": [[0, 1], [1, 0.53125], [2, 0.28125]],
        "no-principles": [[0, 1], [1, 0.78125], [2, 0.53125]],
    }
    assert lines_of(found["figure-7"].figure.axes[0]).keys() == {"critique", "direct"}
    assert lines_of(found["figure-7"].figure.axes[0])["direct"][2] == [2, 0.53125]
    harm, diversity = found["figure-6"].figure.axes
    assert lines_of(harm) == {"plain": [[2, 0.28125]], "no-principles": [[0, 0.53125]]}
    assert lines_of(diversity) == {"plain": [[2, 0.5]], "no-principles": [[0, 0.5]]}
    over = [k for k in found if k.startswith("overoptimisation")]
    assert over == [f"overoptimisation-{n}" for n in (1, 2, 3, 4)] and " of rloo on" in found["overoptimisation-2"].caption


def test_gates_and_public_sets_are_figure_4(tmp_path):
    accuracy = {"value": 0.75, "low": 0.5, "high": 1.0, "n": 40}
    table = [{"p_model": 0.25, "p_label": 0.5, "n": 40}]
    names = []
    for name, thinks in (("a", {}), ("b", {"chain_of_thought": True}), ("c", {"chain_of_thought": True, "thoughts": 5})):
        of = build(tmp_path / name, made=name, stages=(*STAGES, "benchmarks"), preferences=config.method.Preferences(**thinks))
        names.append(name)
        gate = {"accuracy": accuracy | {"value": 0.5 + len(names) / 8}, "calibration_error": {"table": table}}
        write_json(of / "preferences/gate.json", {"judge": gate})
        records.write(of / "preferences/comparisons.jsonl", [])
    views = {"letters": {"accuracy": accuracy}, "texts": {"accuracy": accuracy | {"value": 0.0}}}
    found = {"base": {"missing": 0, "views": views}, "reward": {"preferred": {"accuracy": accuracy | {"value": 0.875}}}}
    sets = {
        "hhh": {"format": "hhh_alignment", "models": found},
        "xs": {"format": "xstest", "models": {"base": {"accuracy": {"accuracy": accuracy}}}},
    }
    write_json(tmp_path / "a/benchmarks/results.json", sets)
    found = drawn(tmp_path)
    ax = found["figure-4"].figure.axes[0]
    values = {
        line.get_label(): (line.get_xdata()[0], line.get_marker()) for line in ax.get_lines() if line.get_label()[0] != "_"
    }
    assert values == {
        "judge, a, gate": (0.625, "o"), "judge, b, gate": (0.75, "s"), "judge, c, gate": (0.875, "D"),
        "Base, a, hhh": (0.75, "o"), "reward, a, hhh": (0.875, "^"),
    }  # fmt: skip
    assert "(gate: 40, hhh: 40)" in found["figure-4"].caption
    assert "people's comparisons of the gate (a, judge: 40)" in found["figure-9"].caption  # the others' tables are the same


def test_labels_are_held_against_the_oracle_where_there_is_no_gate(tmp_path):
    from cai_jax.data import load_prompts
    from cai_jax.evaluation import better

    asked = [p for p in load_prompts(config.Config().data.redteam, 4, "x") if p["kind"] == "harmful"]
    yes = "First open the tape, then press the camera, and last fold the curtain."
    rows = []
    for n, p in enumerate(asked):
        pair = p | {"response_a": "I cannot answer that.", "response_b": yes, "p_a": 0.5}
        judged = [{"p_a": 0.5, "p_unclamped": 0.875}, {"p_a": 0.5, "p_unclamped": 0.625 if n else 0.75}]
        rows.append(pair | {"judgements": judged})
    rows.append(rows[0] | {"response_b": rows[0]["response_a"]})  # equals say nothing
    records.write(build(tmp_path / "a") / "preferences/comparisons.jsonl", rows)
    assert [better(r) for r in rows] == [*[1.0] * len(asked), None]
    p = drawn(tmp_path / "a")["figure-9"]
    x = sum([0.75] * (len(asked) - 1), 0.0)
    assert "oracle" in p.caption and f"judge: {len(asked)}" in p.caption
    line = lines_of(p.figure.axes[0])["judge"]
    assert line[0] == pytest.approx([x / (len(asked) - 1), 1.0]) and line[1] == pytest.approx([0.8125, 1.0])


def test_erosion_and_attacks(tmp_path):
    of = build(tmp_path / "a", stages=(*STAGES[:-1], "attack", "erosion"))
    points = [{"phase": "start", "steps": 0} | summary(0.0), {"phase": "eroded", "steps": 5} | summary(0.5)]
    write_json(of / "erosion/results.json", {"model": "rl_cai", "points": points})
    kinds = {"direct": {"failure": 0.5, "interval": [0.25, 0.75], "partial": 0.5, "n": 8}}
    write_json(of / "attack/results.json", {"writing": {}, "models": {"base": kinds}})
    found = drawn(of)
    assert lines_of(found["erosion"].figure.axes[0])["harm"] == [[0, 0], [1, 0.5]]
    assert found["erosion"].caption.startswith("RL-CAI after steps") and "60 harmful" in found["erosion"].caption
    assert found["attacks"].figure.axes[0].containers and "ways, 8 for a bar" in found["attacks"].caption


def test_tables(one, study):
    scale, five, rated = tables.tables(runs.find([str(one)]))
    assert scale.header == ["stage", "given", "examples", "tokens", "epochs", "updates"]
    c = config.Config()
    assert ["sft", "revisions and helpful answers", "60", f"{1000 * c.sft.epochs:,}", str(c.sft.epochs), "10"] in scale.rows
    assert ["ppo", "rollouts", "256", f"{21 * 128 * c.ppo.epochs:,}", str(c.ppo.epochs), "8"] in scale.rows
    assert ["critique", "red-team prompts", "60", "–", "–", "–"] in scale.rows
    assert five.header == ["model", *sorted(KINDS), "mean"] and "60 harmful" in five.caption
    assert five.rows[:2] == [["Base", "3.00", "1.00", "1.00"], ["SL-CAI", "4.00", "3.00", "3.00"]]
    assert rated.header == ["model", "scale", "by", "Elo (95 %)", "at equal length"]
    assert rated.rows[1] == ["SL-CAI", "harmlessness", "oracle", "+500 (+490 to +510)", "–"] and len(rated.rows) == 8
    assert rated.rows[-1] == ["RL-CAI", "harmlessness", "judge", "+300 (+290 to +310)", "+200"]
    scale, five, rated = tables.tables(runs.find([str(study)]))
    assert ["RL-CAI", "plain", "harmlessness", "judge", "+303 (+265 to +341)", "+200"] in rated.rows
    assert scale.header[:2] == ["stage", "run"]
    assert [r[1] for r in scale.rows if r[0] == "sft"] == ["plain", "no-principles", "direct"]  # shared ones once
    assert [r[:2] for r in five.rows][:4] == [["Base", ""], ["SL-CAI", "plain"], ["RL-CAI", "plain"], ["best of 4", ""]]


@pytest.mark.parametrize(
    "trees, wanted",
    [
        ([{"a": 1, "b": "x", "c": 5}], {"a": 1, "b": "x", "c": 5}),
        ([{"a": 1, "b": "x", "c": 5}, {"a": 2, "b": "y"}], {"a": 1.5, "b": "x"}),
        ([{"n": 4}, {"n": 4}], {"n": 4}),
        ([{"mean": 1.0, "interval": [0, 2]}, {"mean": 2.0, "interval": [1, 3]}], {"mean": 1.5, "interval": student([1, 2])}),
        ([{"elo": 1.0, "low": 0, "high": 2}] * 2, {"elo": 1.0, "low": 1.0, "high": 1.0}),
        (
            [{"x": n, "y": None, "interval": {"x": [0, 1], "y": [0, 1]}} for n in (1.0, 2.0)],
            {"x": 1.5, "y": None, "interval": {"x": student([1, 2]), "y": [None, None]}},
        ),
        (
            [{"harm_rate": [1.0, n], "interval": [[0, 1], [0, 1]]} for n in (0.0, 1.0)],
            {"harm_rate": [1.0, 0.5], "interval": [student([1, 1]), student([0, 1])]},
        ),
        (
            [{"score": [n], "score_interval": [[0, 1]], "interval": 3} for n in (0.0, 1.0)],
            {"score": [0.5], "score_interval": [student([0, 1])], "interval": 3},
        ),
    ],
)
def test_pooled(trees, wanted):
    assert runs.pooled(trees) == wanted


def refused(args, words, capsys):
    assert report.main(args) == INPUT_EXIT
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said


def test_what_cannot_be_drawn_is_refused_and_named(tmp_path, one, capsys):
    out = f"--out={tmp_path / 'out'}"
    refused([f"--run={tmp_path / 'nothing'}", out], "nothing: there is no run; wanted a folder with its config.json", capsys)
    refused(["--run=s3://a/b", out], "--run=s3://a/b: wanted a folder, or gs://", capsys)
    for name, text in (("list", "[]"), ("words", '{"stages": 3}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        refused([f"--run={tmp_path / name}", out], f"{name}/config.json", capsys)
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_bytes((one / "config.json").read_bytes())
    refused([f"--run={other}", out], "other: there is nothing to draw", capsys)
    write_json(other / "evaluate/results.json", {"models": {"base": {"harm": 1}}, "elo": {}})
    refused([f"--run={other}", out], "other: there are files that are not as this version writes them (KeyError: 'held", capsys)
    build(tmp_path / "copies" / one.name)
    refused([f"--run={one}", f"--run={tmp_path / 'copies'}", out], "are the same run; give one of them", capsys)
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_name_are_told_apart(tmp_path, one):
    build(tmp_path / one.name, cfg=config.Config(stages=STAGES, critique=config.method.Critique(rounds=3)))
    assert [g.name for g in runs.find([str(one), str(tmp_path / one.name)])] == [str(one), str(tmp_path / one.name)]
    assert [g.name for g in runs.find([str(one), str(one)])] == [""]  # named twice


def test_the_command_writes_the_same_bytes_again(one, of_one, tmp_path, capsys):
    for name in ("x", "y"):
        assert report.main([f"--run={one}", f"--out={tmp_path / name}"]) == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "y").iterdir()}
    keys = [*of_one]
    assert files.keys() == {f"{k}.{kind}" for k in keys for kind in ("png", "svg")} | {"index.html"}
    page = files["index.html"].decode()
    assert page.count("data:image/png;base64,") == len(keys) and "fraud &amp; &lt;b&gt;" in page and "<script" not in page
    assert page.count("<table") == 3 and "index.html: 7 figures and 3 tables of 1 run(s)" in capsys.readouterr().out


def test_the_command_of_the_readme(one, tmp_path):
    line = next(line for line in (ROOT / "README.md").read_text().split("\n") if line.startswith("cai report "))
    words = [w.replace("runs/a", str(one)).replace("runs/figures", str(tmp_path / "f")) for w in line.partition("#")[0].split()]
    command = [sys.executable, "-m", "cai_jax", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "f" / "index.html").exists() and canvas.LABELS["rl_cai"] in (tmp_path / "f" / "index.html").read_text()
