"""A judge is tried on comparisons by people before it labels any, and refused beyond the limits."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_preferences import SEAT, Judge, pair

from cai_jax import checks, gate, records
from cai_jax.config import Config, Limits, Preferences, default
from cai_jax.errors import InputError
from cai_jax.evals import trust
from cai_jax.sections import as_dict
from cai_jax.stages import preferences


def comparisons(n=40, wrong=0.0):
    """By margins from 4 to 9 either way; people say what is better, but in a share of them."""
    rng = np.random.default_rng(0)
    margins = rng.uniform(4, 9, n) * rng.choice((-1, 1), n)
    sides = (margins > 0) != (np.arange(n) < wrong * n)
    return [pair(i, m, 0.0, p_a=float(s)) | {"id": f"g{i}"} for i, (m, s) in enumerate(zip(margins, sides, strict=True))]


def tried(tmp_path, monkeypatch, judge, rows, **settings):
    path = tmp_path / "gate.jsonl"
    records.write(path, rows)
    monkeypatch.setattr(preferences, "option_logprobs", judge)
    monkeypatch.setattr(preferences, "fits", lambda lm, context, more: "too long" not in context)
    journal, kept = SimpleNamespace(done={}), []
    journal.add, journal.remove = kept.extend, kept.clear
    cfg = Config(preferences=Preferences(gate=str(path), **settings))
    return preferences.tried_out(cfg, None, SEAT, {"judge", "base"}, journal, None), kept


def test_a_judge_within_the_limits_passes_with_its_figures(tmp_path, monkeypatch):
    rows = comparisons()
    found, kept = tried(tmp_path, monkeypatch, Judge(), rows + [rows[0] | {"id": "x", "response_b": "too long"}])
    assert found["accuracy"]["value"] == 1.0 and found["beyond"] == [] and found["flip_rate"]["value"] == 0.0
    assert (found["comparisons"], found["left out"]) == (41, 1)
    assert [r["key"] for r in kept] == ["judge, gate 1"] != [SEAT.key]  # its judgements are no labels
    margins = np.array([float(r["response_a"].split()[1]) for r in rows])
    soft = 1 / (1 + np.exp(-margins))
    wanted = trust.trust(soft, np.array([r["p_a"] for r in rows]), np.stack([soft, soft], 1))
    assert found["brier"]["value"] == pytest.approx(wanted["brier"]["value"], abs=1e-6)
    assert {"accuracy", "kappa", "calibration_error", "length_bias"} <= found.keys()


@pytest.mark.parametrize(
    "judge, wrong, flag",
    [
        (Judge(), 0.4, "min_accuracy"),
        (Judge(lean=9.0), 0.0, "max_flip_rate"),
        (Judge(of=lambda _: 0.05), 0.0, "max_calibration_error"),
    ],
    ids=["errs", "leans", "doubts"],
)
def test_a_judge_beyond_a_limit_is_refused_and_the_flag_named(tmp_path, monkeypatch, capsys, judge, wrong, flag):
    rows = comparisons(wrong=wrong)
    with pytest.raises(InputError, match=f"--config.preferences.limits.{flag}") as error:
        tried(tmp_path, monkeypatch, judge, rows)
    assert "--config.preferences.despite=True" in str(error.value) and "of 40" not in str(error.value)
    found, _ = tried(tmp_path, monkeypatch, judge, rows, despite=True)
    assert any(flag in line for line in found["beyond"]) and "labels even so" in capsys.readouterr().err
    wide = replace(Limits(), min_accuracy=0.0, min_kappa=0.0, max_flip_rate=1.0, max_calibration_error=1.0, max_length_bias=1.0)
    assert tried(tmp_path, monkeypatch, judge, rows, limits=wide)[0]["beyond"] == []


def test_a_gate_too_small_for_an_interval_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--config.preferences.gate=.*too few for an interval"):
        tried(tmp_path, monkeypatch, Judge(), comparisons(4))


def test_several_people_are_compared_with_each_other(tmp_path, monkeypatch):
    """Two say the same but of 10 of 40 pairs, of which each is right about half; ben saw every pair the other way round."""
    rows = []
    for n, r in enumerate(comparisons()):
        swapped = {"response_a": r["response_b"], "response_b": r["response_a"]}
        anna, ben = (1 - r["p_a"] if n in of else r["p_a"] for of in (range(5), range(5, 10)))
        rows += [r | {"rater": "anna", "p_a": anna}, r | swapped | {"rater": "ben", "p_a": 1 - ben}]
    found, _ = tried(tmp_path, monkeypatch, Judge(), rows, despite=True)  # the judge is too sure of what people doubt
    assert (found["comparisons"], found["raters"]) == (40, 2)
    assert found["humans"]["agreement"]["value"] == 0.75 and found["humans"]["judge_agreement"]["value"] == 0.875
    assert found["humans"]["below"]["value"] == -0.125 and found["accuracy"]["n"] == 30  # of 10 the people's mean is a half
    apart, _ = tried(tmp_path, monkeypatch, Judge(), [r for n, r in enumerate(rows) if n % 2 == (n < 40)], despite=True)
    assert apart["raters"] == 2 and "humans" not in apart  # no pair was labelled by both
    other = rows[1] | {"id": "g0", "response_b": "answer 3.0", "rater": "cleo"}  # another pair of the same prompt
    more, _ = tried(tmp_path, monkeypatch, Judge(), [*rows, other, other | {"id": "g0+1"}], despite=True)
    assert (more["comparisons"], more["left out"], more["raters"]) == (42, 0, 3)
    assert len({r["id"] for r in gate.comparisons(str(tmp_path / "gate.jsonl"))}) == 42  # each has a judgement of its own
    with pytest.raises(InputError, match="the id stands twice for the rater 'anna'"):
        tried(tmp_path, monkeypatch, Judge(), [*rows, rows[0]])


def test_a_bias_for_its_own_answers_is_seen(tmp_path, monkeypatch):
    """What the judge prefers it has written itself, or another has; people prefer it every other time."""
    limits = replace(Limits(), min_accuracy=0.0, min_kappa=0.0, max_calibration_error=1.0, max_length_bias=1.0)
    rows = comparisons()
    for n, r in enumerate(rows):
        better, worse = "ab" if float(r["response_a"].split()[1]) > 0 else "ba"
        r |= {f"model_{better}": "base", f"model_{worse}": "sl_cai", "p_a": float((better == "a") == (n % 2 == 0))}
    with pytest.raises(InputError, match="bias for its own answers: 0.5.*--config.preferences.limits.max_own_bias"):
        tried(tmp_path, monkeypatch, Judge(), rows, limits=limits)
    found, _ = tried(tmp_path, monkeypatch, Judge(), rows, limits=limits, despite=True)
    assert (found["own_bias"]["judge"], found["own_bias"]["reference"], found["own_bias"]["n"]) == (1.0, 0.5, 40)
    others = [r | {"model_a": ["rl_cai"], "model_b": "sl_cai"} for r in rows]
    assert "own_bias" not in tried(tmp_path, monkeypatch, Judge(), others, limits=limits)[0]


def test_a_clamped_judge_is_tried_as_it_spoke(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "sample_texts", lambda lm, asked, *_: [{"text": "Well."} for _ in asked])
    for thoughts in (1, 2):
        found, kept = tried(tmp_path, monkeypatch, Judge(), comparisons(), chain_of_thought=True, thoughts=thoughts)
        assert found["brier"]["value"] < 0.01  # clamped to 0.4 to 0.6 it would be 0.16
        assert {len(j["thoughts"]) for of in kept[0]["judgements"].values() for j in of} == {2 * thoughts}


def test_who_was_refused_may_be_let_through_and_goes_on(monkeypatch):
    """The inputs of the stage name the comparisons of the gate, and not what is asked of a judge on them."""
    files = []

    def inputs(cfg, workdir, section, given, *_):
        files.append(given["gate"])
        return {"config": as_dict(cfg.preferences), "models": {}}

    monkeypatch.setattr(preferences, "inputs_of", inputs)
    monkeypatch.setattr(preferences, "identity", lambda cfg, name: {})
    found = []
    for settings in ({}, {"gate": "x"}, {"gate": "x", "despite": True}, {"gate": "x", "limits": Limits(min_accuracy=0.1)}):
        cfg = Config(preferences=Preferences(**settings))
        found.append(preferences._inputs(cfg, None, {"judge": cfg}, [SEAT]))
    assert found[0] == found[1] == found[2] == found[3] and files == ["", "x", "x", "x"]


def test_runs_from_before_there_were_further_thoughts_go_on(monkeypatch):
    monkeypatch.setattr(preferences, "inputs_of", lambda cfg, *_: {"config": as_dict(cfg.preferences), "models": {}})
    monkeypatch.setattr(preferences, "identity", lambda cfg, name: {})
    found = []
    for thoughts in (1, 5):
        cfg = Config(preferences=Preferences(chain_of_thought=True, thoughts=thoughts))
        found.append(preferences._inputs(cfg, None, {"judge": cfg}, [SEAT])["config"])
    assert "thoughts" not in found[0] and found[1] == found[0] | {"thoughts": 5}


def test_thoughts_that_nobody_has_are_refused():
    cfg = default()
    cfg.preferences.thoughts = 5
    with pytest.raises(checks.ConfigError, match="--config.preferences.thoughts=5: wanted 1, or .*chain_of_thought=True"):
        checks.resolve(cfg)
    cfg.preferences.chain_of_thought = True
    assert checks.resolve(cfg).preferences.thoughts == 5
    cfg.preferences.thought.temperature = 0.0
    with pytest.raises(checks.ConfigError, match="--config.preferences.thoughts=5: wanted 1 at .*: all are the same"):
        checks.resolve(cfg)


@pytest.mark.parametrize("name", ["min_accuracy", "max_flip_rate"])
def test_limits_are_shares(name):
    cfg = default()
    cfg.preferences.limits[name] = 1.2
    with pytest.raises(checks.ConfigError, match=f"--config.preferences.limits.{name}="):
        checks.resolve(cfg)
