"""The comparisons that people label: which are chosen, that the run waits for them, and what becomes of their labels."""

import dataclasses
import json

import numpy as np
import pytest

from cai_jax import checks, records, workdir
from cai_jax.config import People, default
from cai_jax.data import compared, load_prompts
from cai_jax.errors import InputError
from cai_jax.evaluation import miniworld
from cai_jax.miniworld import grammar
from cai_jax.stages import people

PROMPTS = load_prompts(default().data.redteam, 60, "x")


def config(stages=("critique", "sft", "preferences", "people", "reward"), **settings):
    cfg = default()
    cfg.stages = stages
    cfg.people.update(settings)
    return checks.resolve(cfg)


def comparisons():
    """Of a recipe with a refusal, which a judge gets wrong where its label is above a half: in a quarter."""
    out = []
    for n, p in enumerate(PROMPTS):
        item, rng = miniworld().item(p["item"]), np.random.default_rng(n)
        said = {"response_a": grammar.answer(rng, item, "right"), "response_b": grammar.answer(rng, item, "explained")}
        label = {"p_a": 0.9 - n / 1000 if n % 4 == 0 else 0.2 + n / 1000, "source": "ai", "disagreement": (n * 7 % 60) / 60}
        out.append(p | said | label)
    return out


@pytest.fixture
def judged(tmp_path):
    folder = tmp_path / "preferences"
    records.write(folder / "comparisons.jsonl", comparisons())
    workdir.finish("preferences", tmp_path, {}, ("comparisons.jsonl",))
    return tmp_path


def test_the_chosen_are_those_that_the_rule_names():
    rows = comparisons()

    def of(**settings):
        found = people.choose(config(**settings), rows)
        again = people.choose(config(**settings), rows[::-1])
        assert [r["id"] for r in again] == [r["id"] for r in found]  # whatever their order
        return found

    assert len(of(share=0.25)) == 15 and len(of(share=0.001)) == 1 and len(of(share=1.0)) == 60
    assert {r["id"] for r in of(share=0.25)} != {r["id"] for r in of(share=0.25, choose="undecided")}
    nearest = sorted(rows, key=lambda r: abs(r["p_a"] - 0.5))[:15]
    assert {r["id"] for r in of(share=0.25, choose="undecided")} == {r["id"] for r in nearest}
    most = [r["disagreement"] for r in of(share=0.25, choose="disputed")]
    assert most == sorted((r["disagreement"] for r in rows), reverse=True)[:15]
    first = people.choose(dataclasses.replace(config(share=0.25), seed=1), rows)
    assert {r["id"] for r in first} != {r["id"] for r in of(share=0.25)}


def test_failing_categories_come_first(tmp_path):
    worst, second = "privacy", "fraud"
    harm = {"weapons": 0.1, "fraud": 0.3, "privacy": 0.5, "illegal": 0.2, "selfharm": 0.0}

    def results(**models):
        of = {name: {"heldout": {"sampled": {"by_category": by}}} for name, by in models.items()}
        workdir.write_json(tmp_path / "results.json", {"models": of})
        return str(tmp_path / "results.json")

    rates = {k: {"harm_rate": x} for k, x in harm.items()} | {"cooking": {"helpfulness": 1.0}}
    path, rows = results(rl_cai=rates, base={k: {"harm_rate": 1 - x} for k, x in harm.items()}), comparisons()
    count = {k: sum(r["category"] == k for r in rows) for k in harm}
    share = (count[worst] + 1) / len(rows)
    found = [r["category"] for r in people.choose(config(choose="failing", results=path, share=share), rows)]
    assert found == [worst] * count[worst] + [second]  # by the last model, not the base
    with pytest.raises(InputError, match="it says nothing of category 'fraud'"):
        people.choose(config(choose="failing", results=results(base={worst: {"harm_rate": 1.0}})), rows)
    with pytest.raises(InputError, match="no model is in it"):
        people.choose(config(choose="failing", results=results()), rows)


def test_a_run_waits_for_labels_and_goes_on_with_them(judged, tmp_path):
    cfg = config(share=0.2, minutes=2.0)
    with pytest.raises(InputError, match="12 of 60 comparisons wait for people in .*people.jsonl") as error:
        people.run(cfg, judged, None)
    assert "--config.people.labels=FILE" in str(error.value) and not (judged / "people").exists()
    queue = records.read(judged / "people.jsonl")
    assert {frozenset(r) for r in queue} == {frozenset(people.SHOWN)} and len(queue) == 12
    labels = judged / "labels.jsonl"
    records.write(labels, [r | {"p_a": 0.0 if n else 0.5} for n, r in enumerate(queue)] + [queue[0] | {"id": "no", "p_a": 1}])
    assert people.run(config(share=0.2, minutes=2.0, labels=str(labels)), judged, None)
    found, before = records.read(judged / "people/comparisons.jsonl"), comparisons()
    asked = {r["id"] for r in queue}
    assert [r["id"] for r in found] == [r["id"] for r in before]
    for r, was in zip(found, before, strict=True):
        if r["id"] in asked:
            assert r == was | {"p_ai": was["p_a"], "p_a": 0.0 if r["id"] != queue[0]["id"] else 0.5, "source": "people"}
        else:
            assert r == was
    counts = json.loads((judged / "people/done.json").read_text())["counts"]
    decided = [r["p_ai"] < 0.5 for r in found if r["id"] in asked - {queue[0]["id"]}]
    assert counts == {
        "comparisons": 60, "people": 12, "share": 0.2, "minutes": 24.0, "agreement with the judge": np.mean(decided)
    }  # fmt: skip
    assert not people.run(config(share=0.2, minutes=2.0, labels=str(labels)), judged, None)
    records.write(labels, [r | {"p_a": 1.0} for r in queue])
    with pytest.raises(InputError, match="started with other inputs"):
        people.run(config(share=0.2, minutes=2.0, labels=str(labels)), judged, None)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: rows[1:], "1 of 6 labels are missing, the first 'redteam-"),
        (lambda rows: [rows[0] | {"response_a": "x"}, *rows[1:]], "has another response_a than was asked about"),
        (lambda rows: [*rows, rows[0] | {"response_a": "x", "rater": "Ben"}], "is of other responses from line to line"),
        (lambda rows: [rows[0] | {"messages": PROMPTS[-1]["messages"]}, *rows[1:]], "has another messages"),
        (lambda rows: [rows[0] | {"p_a": 2}, *rows[1:]], "wanted a number from 0 to 1"),
        (lambda rows: [rows[0], *rows], "the id stands twice"),
    ],
)
def test_labels_that_are_not_of_the_queue_are_refused(judged, change, words):
    cfg = config(share=0.1)
    rows = [{k: r[k] for k in people.SHOWN} | {"p_a": 1.0} for r in people.choose(cfg, comparisons())]
    records.write(judged / "labels.jsonl", change(rows))
    with pytest.raises(InputError) as error:
        people.run(config(share=0.1, labels=str(judged / "labels.jsonl")), judged, None)
    assert (
        words in str(error.value)
        and "labels.jsonl" in str(error.value)
        and not (judged / "people").exists()
        or (json.loads((judged / "people/inputs.json").read_text()) and not (judged / "people/done.json").exists())
    )


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_simulated_people_read_harm_right_but_for_their_errors(judged, error):
    assert people.run(config(share=1.0, labels="oracle", error=error), judged, None)
    found = records.read(judged / "people/comparisons.jsonl")
    wrong = np.mean([r["p_a"] != 0.0 for r in found])  # b refuses
    assert (wrong == 0.0) == (error == 0.0) and abs(wrong - error) < 0.15
    agreement = json.loads((judged / "people/done.json").read_text())["counts"]["agreement with the judge"]
    assert agreement == pytest.approx(np.mean([(r["p_ai"] > 0.5) == (r["p_a"] > 0.5) for r in found]))
    assert error or agreement == 0.75


def test_nobody_simulates_people_of_another_world():
    with pytest.raises(InputError, match="'x' is not of the embedded world"):
        people.simulated(config(), [{"id": "x", "item": "a bomb", "kind": "harmful"}])


def test_what_is_learnt_from_are_the_last_labels():
    assert compared(config().stages) == "people" and compared(("critique", "sft", "preferences")) == "preferences"


@pytest.mark.parametrize(
    "settings, flag",
    [
        ({"share": 0.0}, "share"), ({"share": 1.1}, "share"), ({"error": -0.1}, "error"), ({"choose": "all"}, "choose"),
        ({"choose": "failing"}, "results"), ({"results": "x"}, "results"), ({"minutes": -1.0}, "minutes"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_name_their_flag(settings, flag):
    with pytest.raises(checks.ConfigError, match=f"--config.people.{flag}="):
        config(**settings)
    assert People().share == 0.08  # the journal paper's, of PPO's comparisons


def test_people_come_after_the_judge():
    with pytest.raises(checks.ConfigError, match="preferences, which people reads"):
        config(stages=("critique", "sft", "people"))
