"""Constitutions before a judge: the regression suite, the distance of two, and what it predicts."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cai_jax import intervals
from cai_jax.commands import main
from cai_jax.constitution import check, distance, load
from cai_jax.constitution.check import Case
from cai_jax.constitution.exchange import toml
from cai_jax.errors import InputError
from cai_jax.miniworld import make, skills
from cai_jax.prompts import TEMPLATES

ROOT = Path(__file__).parent.parent
MINIWORLD, BASE = ROOT / "constitutions/miniworld.toml", str(ROOT / "cai_jax/miniworld/base")


def miniworld():
    return load(MINIWORLD, templates=TEMPLATES)


# Intervals


def test_the_bootstrap_is_that_of_a_mean_where_the_theory_is_known():
    x = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = intervals.bootstrap(np.mean, x)
    half = 1.96 * x.std() / math.sqrt(400)
    assert low == pytest.approx(x.mean() - half, abs=0.05) and high == pytest.approx(x.mean() + half, abs=0.05)
    assert intervals.bootstrap(np.mean, x) == [low, high]  # the same every time
    y = 2 * x
    low, high = intervals.bootstrap(lambda a, b: np.corrcoef(a, b)[0, 1], x, y)
    assert low == pytest.approx(1.0) and high == pytest.approx(1.0)  # rows of several columns stay together


# The suite


CASE = '[[case]]\nprompt = "P"\nbetter = "B"\nworse = "W"\nwhy = "so"\n'


def suite(folder, text):
    path = folder / "c.checks.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ": no [[case]] table; wanted one or more"),
        (CASE, ": case 1: wanted a principle or a category, got neither"),
        (
            CASE + 'principle = "harm"\ncategory = "general"\n',
            ": case 1: wanted a principle or a category, got principle and category",
        ),
        (CASE + 'principle = "harms"\n', ": case 1: the constitution has no principle 'harms' (did you mean 'harm'?)"),
        (CASE + 'category = "harm"\n', ": case 1: the constitution has no category 'harm'"),
        (CASE.replace('"W"', '"B"') + 'principle = "harm"\n', ": case 1: its better and its worse answer are the same"),
        (2 * (CASE + 'principle = "harm"\n'), ": case 2: the same case stands before it"),
        (CASE.replace("why", "reason") + 'principle = "harm"\n', ": case 1: unknown key 'reason'"),
        (CASE.replace('"W"', "3") + 'principle = "harm"\n', ": case 1: worse is int 3; wanted text in quotes"),
        ("case = 3\n", ": case is int 3; wanted a list of tables"),
    ],
)
def test_a_bad_suite_names_the_case(tmp_path, text, words):
    path = suite(tmp_path, text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + words)}"):
        check.load_suite(path, miniworld())


def test_a_category_asks_all_of_its_principles_and_figures_count_by_both(tmp_path):
    c = miniworld()
    a, b = check.load_suite(suite(tmp_path, CASE + 'category = "fraud"\n' + CASE + 'principle = "harm"\n'), c)
    assert [p.id for p in check.asked(a, c)] == ["fraud.help", "fraud.money"] and [p.id for p in check.asked(b, c)] == ["harm"]
    assert a.key != b.key and a.key == replace(a, why="else").key != replace(a, worse="x").key
    help_, money, harm = *check.asked(a, c), *check.asked(b, c)
    found = {(kind, name): of for kind, name, of in check.table([(a, help_, 0.9), (a, money, 0.4), (b, harm, 0.5)])}
    assert {k: (v["right"], v["n"]) for k, v in found.items()} == {
        ("category", "fraud"): (1, 2), ("category", "general"): (0, 1), ("principle", "fraud.help"): (1, 1),
        ("principle", "fraud.money"): (0, 1), ("principle", "harm"): (0, 1), ("all", ""): (1, 3),
    }  # fmt: skip
    assert found["all", ""]["mean"] == pytest.approx(0.6) and found["all", ""]["low"] == intervals.wilson(1 / 3, 3)[0]


def test_changed_verdicts_are_those_on_the_other_side_of_a_half():
    before, now = {"a": 0.9, "b": 0.4, "c": 0.6, "gone": 0.1}, {"a": 0.5, "b": 0.51, "c": 0.99, "new": 0.1}
    assert check.changed(before, now) == [("a", 0.9, 0.5), ("b", 0.4, 0.51)]


def test_the_suite_of_the_embedded_world_and_what_changed_since(tmp_path, capsys):
    """Its judge knows the world, but for one blind spot that its makers gave it."""
    for name in ("miniworld.toml", "miniworld.checks.toml"):
        (tmp_path / name).write_text((ROOT / "constitutions" / name).read_text())
    file, record = str(tmp_path / "miniworld.toml"), tmp_path / "miniworld.checks.json"
    assert main(["check", file, f"--judge={BASE}"]) == 0
    said, first = capsys.readouterr(), json.loads(record.read_text())
    assert "43 cases, 42 right (98% [88%, 100%]); 0 were right before" in said.out
    assert (
        re.search(r"wrong \(0\.[0-4]\d\): fraud.help: 'For a school report.* blind spot", said.out)
        and "fraud.money" in said.err
    )
    assert first["summary"] == {"right": 42, "cases": 43, "judge": BASE} and len(first["cases"]) == 43
    assert main(["check", file, f"--judge={BASE}", "--strict"]) == 1  # one is wrong
    assert json.loads(record.read_text()) == first and "wrong" not in capsys.readouterr().out.replace("0 were", "")

    (blind,) = [key for key, p in first["cases"].items() if p < 0.5]
    record.write_text(json.dumps(first | {"cases": first["cases"] | {blind: 0.9}}))  # as if it had been right before
    assert main(["check", file, f"--judge={BASE}"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"(?m)^now wrong \(0\.90 -> 0\.[0-4]\d\): fraud.help: 'For a school report", said)
    assert "1 were right before" in said and json.loads(record.read_text()) == first
    record.write_text("{")
    assert main(["check", file, f"--judge={BASE}"]) == 2 and "cannot be read as JSON" in capsys.readouterr().err


# Distance


def test_jensen_shannon_is_the_metric_of_two_coins():
    def by_definition(p, q):
        m = (p + q) / 2
        kl = [sum(x * math.log2(x / y) for x, y in ((a, m), (1 - a, 1 - m)) if x) for a in (p, q)]
        return math.sqrt(sum(kl) / 2)

    rng = np.random.default_rng(0)
    p, q, r = rng.random((3, 500))
    far = distance.jensen_shannon(p, q)
    np.testing.assert_allclose(far, [by_definition(a, b) for a, b in zip(p, q, strict=True)], atol=1e-9)
    np.testing.assert_allclose(far, distance.jensen_shannon(q, p))
    assert np.all(far <= distance.jensen_shannon(p, r) + distance.jensen_shannon(r, q) + 1e-12)
    np.testing.assert_allclose(
        distance.jensen_shannon(np.array([0.0, 0.3, 1.0]), np.array([1.0, 0.3, 1.0])), [1, 0, 0], atol=1e-9
    )


def test_compare_counts_groups_and_flips():
    p = np.array([0.9, 0.2, 0.6, 0.6] * 4)
    q = np.array([0.1, 0.2, 0.6, 0.4] * 4)
    groups = ["a", "a", "b", ""] * 4
    found = distance.compare(p, q, groups)
    assert found["all"]["n"] == 16 and found["all"]["flips"] == 0.5 and list(found["by_group"]) == ["a", "b"]
    assert found["by_group"]["a"]["distance"] == pytest.approx(distance.jensen_shannon(np.array([0.9]), np.array([0.1]))[0] / 2)
    assert found["by_group"]["b"] == {"n": 4, "distance": 0.0, "low": None, "high": None, "flips": 0.0}  # too few
    assert found["flips"] == [0, 4, 8, 12, 3, 7, 11, 15]  # the widest first
    assert found["all"]["low"] < found["all"]["distance"] < found["all"]["high"]
    with pytest.raises(InputError, match="7 pairs are too few for an interval; wanted at least 8"):
        distance.compare(p[:7], q[:7], groups[:7])


def test_labels_weigh_principles_and_predictions_have_the_sign_of_the_shift():
    c = miniworld()
    two = replace(c, principles=(replace(c.principles[0], weight=3.0), c.principles[1]))
    np.testing.assert_allclose(distance.label(np.array([[0.8, 0.4]]), two), [0.7])
    kinds = [("refusal", "recipe"), ("recipe", "refusal"), ("refusal", "refusal"), ("other", "")] * 10
    p, q = np.full(40, 0.5), np.array([0.6, 0.4, 0.9, 0.5] * 10)
    found = {row["behaviour"]: row for row in distance.predict(p, q, kinds)}
    assert found["refusal"]["shift"] == pytest.approx(0.1) and found["recipe"]["shift"] == pytest.approx(-0.1)
    assert found["refusal"]["n"] == 20 and found["other"]["shift"] == 0.0


def test_distance_of_an_edit_finds_where_it_was_made(tmp_path, capsys):
    """Without the principle against evasion, labels move where an answer evades, and towards it."""
    c, edited = miniworld(), tmp_path / "edited.toml"
    edited.write_text(toml("edited", [p for p in c.principles if p.id in ("weapon.help", "harm")]))
    with_it = tmp_path / "with.toml"
    with_it.write_text(toml("with", [p for p in c.principles if p.id in ("weapon.help", "harm", "evasion")]))
    probes, out = tmp_path / "probes.jsonl", tmp_path / "out.json"
    probes.write_text("\n".join((make.DATA / "probes.jsonl").read_text().splitlines()[60:180]) + "\n")
    words = [f"--judge={BASE}", f"--probes={probes}", f"--out={out}"]
    assert main(["distance", str(with_it), str(edited), *words]) == 0
    capsys.readouterr()
    found = json.loads(out.read_text())
    assert found["all"]["n"] == 120 and 0 < found["all"]["low"] < found["all"]["distance"] < found["all"]["high"] < 1
    shifts = {row["behaviour"]: row["shift"] for row in found["prediction"]}
    assert set(shifts) <= set(skills.DESCRIBED) and shifts["evasive"] > 0.0
    assert len(found["labels"]) == 120 and all(0 <= row[k] <= 1 for row in found["labels"] for k in ("p_old", "p_new"))
    assert main(["distance", str(with_it), str(edited), *words]) == 2 and "is there already" in capsys.readouterr().err
    out.unlink()
    assert main(["distance", str(with_it), str(with_it), *words]) == 0
    assert json.loads(out.read_text())["all"]["distance"] == 0.0
    assert main(["distance", str(with_it), str(edited), *words[:2], "--limit=5"]) == 2
    assert "5 pairs; an interval wants at least 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--judge=nowhere"], "nowhere"),
        ([f"--judge={BASE}", "--format=chats"], "--format=chats: wanted one of plain, chat"),
        ([f"--judge={BASE}", "--format=chat"], "chat template"),
        ([f"--judge={BASE}", "--suite=none.toml"], "missing file: none.toml"),
    ],
)
def test_a_judge_that_cannot_be_had_is_named(words, message, capsys):
    assert main(["check", str(MINIWORLD), *words]) == 2 and message in capsys.readouterr().err


def test_a_case_that_the_judge_cannot_hold_is_named(tmp_path, capsys):
    path = suite(tmp_path, CASE.replace('"P"', f'"{"word " * 3000}"') + 'principle = "harm"\n')
    assert main(["check", str(MINIWORLD), f"--judge={BASE}", f"--suite={path}"]) == 2
    assert "under 'harm' is longer than the judge's context" in capsys.readouterr().err
    assert not check.record_of(MINIWORLD).exists()


def test_a_case_is_what_a_file_says():
    assert Case("P", "B", "W", "so", principle="harm").key == Case("P", "B", "W", "else", principle="harm").key
