"""What training cost in KL, best-of-n, ratings and scores by round: which texts are asked about, and what is made of them."""

import math

import numpy as np
import pytest

from cai_jax import checks
from cai_jax.config import Config, default
from cai_jax.evaluation import Answer
from cai_jax.sections import section
from cai_jax.stages import evaluate
from cai_jax.workdir import write_json

TODO = [{"id": str(n), "kind": "harmful" if n < 9 else "benign", "messages": []} for n in range(18)]
DEFAULT = section(default(), Config)


def config(**keys):
    cfg = default()
    for section_, of in keys.items():
        cfg[section_].update(**of)
    return checks.resolve(cfg)


@pytest.fixture
def lms(monkeypatch):
    """Models are their names; they have the templates of their names."""

    class Law:
        def __init__(self, name):
            self.templates = f"templates of {name}"

    monkeypatch.setattr(evaluate, "load_constitution", lambda cfg, name: Law(name))
    monkeypatch.setattr(evaluate, "load_lm", lambda cfg, workdir, mesh, name: name)
    monkeypatch.setattr(evaluate, "load_scorer", lambda cfg, workdir, mesh, name: name)
    monkeypatch.setattr(evaluate, "ready", lambda lm, gather: lm)


def test_kl_is_the_mean_log_ratio_of_a_models_own_answers(lms, monkeypatch):
    said, asked = {m: [Answer(f"{m} {n}") for n in range(18)] for m in ("base", "sl_cai", "rl_cai")}, []
    of = {("sl_cai", "sl_cai"): -3.0, ("sl_cai", "base"): -10.0, ("rl_cai", "rl_cai"): -2.0}
    of |= {("rl_cai", "sl_cai"): -4.5, ("rl_cai", "base"): -20.0}

    def likelihood(lm, templates, todo, texts, batch_size, mesh):
        assert templates == f"templates of {lm}" and todo == TODO
        whose = texts[0].text.split()[0]
        asked.append((whose, lm))
        return of[whose, lm] + np.arange(18) % 2 * (whose == lm)

    monkeypatch.setattr(evaluate, "likelihood", likelihood)
    found = evaluate.divergences(DEFAULT, None, None, TODO, said)
    assert sorted(asked) == sorted(of)  # no text is scored twice
    assert {m: {k: x["mean"] for k, x in kl.items()} for m, kl in found.items()} == {
        "sl_cai": {"base": 7.5, "start": 7.5},
        "rl_cai": {"base": 18.5, "start": 3.0},
    }
    low, high = found["rl_cai"]["start"]["interval"]
    assert high - low == pytest.approx(2 * 2.109816 * 0.5145 / math.sqrt(18), rel=1e-3) and (low + high) / 2 == 3.0
    cold = config(evaluate={"sampling": {"temperature": 0.7}})
    assert evaluate.divergences(cold, None, None, TODO, said) == {} == evaluate.divergences(DEFAULT, None, None, TODO[:7], said)


def test_best_of_n_is_the_answer_that_scores_highest_among_the_first_n(lms, monkeypatch):
    drawn = []

    def answers(cfg, lm, templates, todo, sampling, journal, mesh, tag):
        drawn.append(tag)
        return [Answer(f"{tag} to {p['id']}", False) for p in todo]

    score_NP = np.random.default_rng(0).normal(size=(9, 18))

    def rated(lm, templates, todo, texts, batch_size, mesh):
        assert lm == "reward" and templates == "templates of reward"
        return score_NP[int(texts[0].text.split("-")[-1].split()[0])]

    monkeypatch.setattr(evaluate, "answers", answers)
    monkeypatch.setattr(evaluate, "rated", rated)
    found = evaluate.best_of(config(evaluate={"best_of": 9}), None, None, TODO, None)
    assert list(found) == [2, 4, 8] and len(drawn) == len(set(drawn)) == 9
    assert all(tag.startswith("heldout-sl_cai-") for tag in drawn)
    for n, texts in found.items():
        assert texts == [Answer(f"heldout-sl_cai-{score_NP[:n, p].argmax()} to {p}", False) for p in range(18)]
    assert evaluate.best_of(DEFAULT, None, None, TODO, None) == {}
    from_base = config(evaluate={"best_of": 2}, ppo={"init": "base"})
    drawn.clear()
    evaluate.best_of(from_base, None, None, TODO, None)
    assert drawn == ["heldout-base-0", "heldout-base-1"]


def test_best_of_n_wants_a_reward_model():
    cfg = default()
    cfg.stages, cfg.evaluate.best_of = ("critique", "sft", "evaluate"), 4
    with pytest.raises(checks.ConfigError, match="reward, which evaluate reads"):
        checks.resolve(cfg)
    cfg.stages, cfg.preferences.policy, cfg.reward.init = ("preferences", "reward", "evaluate"), "base", "base"
    with pytest.raises(checks.ConfigError, match="sft, which evaluate reads"):
        checks.resolve(cfg)


def test_ratings_stand_at_every_answer_and_their_means_are_of_harmful_prompts(lms, monkeypatch):
    rows = [p | {"model": m, "set": "heldout", "mode": "sampled", "response": m} for m in ("base", "rl_cai") for p in TODO]
    results = {m: {"heldout": {"sampled": {}}, "kl": {}} for m in ("base", "rl_cai")}
    of = {"base": 3.0, "rl_cai": 1.0}

    def rated(lm, templates, todo, texts, batch_size, mesh):
        return np.array([of[x.text] - (p["kind"] == "benign") for p, x in zip(todo, texts, strict=True)])

    monkeypatch.setattr(evaluate, "rated", rated)
    evaluate.add_ratings(DEFAULT, None, None, results, rows)
    assert [r["rating"] for r in rows[7:11]] == [3.0, 3.0, 2.0, 2.0]
    assert {m: r["heldout"]["sampled"]["rating"]["mean"] for m, r in results.items()} == of


def test_elo_by_the_judge_is_of_its_labels_and_equal_texts_are_ties(monkeypatch):
    """The judge likes the longer answer, the oracle the better: rl_cai, whose are both but for prompt 0."""
    full, asked = {"explained": False, "evasive": False, "coherent": True}, {}
    rows = [
        p
        | {
            "model": m,
            "verdict": full | {"harm": 2 - n, "helpful": n / 2},
            "response": "same" if p["id"] == "0" else m + "!" * 9 * n,
        }
        for n, m in enumerate(("base", "sl_cai", "rl_cai"))
        for p in TODO
    ]

    def asked_all(cfg, workdir, mesh, pairs, drops, journal):
        asked.update({p["id"]: p for p in pairs})
        judged = [p | {"p_a": 0.4 + 0.2 * (len(p["response_a"]) > len(p["response_b"]))} for p in pairs]
        return [r for r in judged if drops.keep(r["id"] != "1/base/rl_cai", "longer than the judge's context")]

    monkeypatch.setattr(evaluate, "asked_all", asked_all)
    found = evaluate.by_judge(DEFAULT, None, None, rows, None)
    assert len(asked) == 17 * 3 and not any(id.startswith("0/") for id in asked)
    pair = asked["9/base/rl_cai"]
    assert (pair["response_a"], pair["response_b"], pair["messages"]) == ("base", "rl_cai" + "!" * 18, TODO[9]["messages"])
    harmless = found["elo"]["harmlessness"]
    assert [r["model"] for r in harmless["models"]] == ["rl_cai", "sl_cai", "base"] and harmless["models"][-1]["elo"] == 0.0
    of = {(r["a"], r["b"]): (r["a_wins"], r["ties"], r["b_wins"]) for r in harmless["pairs"]}
    assert of == {("base", "rl_cai"): (0, 2, 7), ("base", "sl_cai"): (0, 1, 8), ("rl_cai", "sl_cai"): (8, 1, 0)}
    apart = {
        k: harmless_of["models"][0]["elo"] for k, harmless_of in ((k, found[k]["harmlessness"]) for k in found if "elo" in k)
    }
    assert apart["elo_at_equal_length"] < 0.5 * apart["elo"]  # it was the length alone
    assert found["agreement"]["accuracy"] == found["agreement"]["accuracy"] | {"value": 1.0, "n": 50}
    assert found["pairs"] == {"given": 51, "kept": 50, "dropped": {"longer than the judge's context": 1}}
    by_oracle = evaluate.rated_by(rows)["elo"]["helpfulness"]
    assert by_oracle["pairs"][0]["ties"] == 0 and by_oracle["models"][0]["win_share"] == 1.0


def test_a_judge_is_asked_only_where_there_is_one():
    cfg = default()
    cfg.stages, cfg.evaluate.judge = ("critique", "sft", "evaluate"), True
    with pytest.raises(checks.ConfigError, match="preferences, which evaluate reads"):
        checks.resolve(cfg)


def test_scores_by_round_are_of_each_rounds_texts_in_the_reward_models_deviations(lms, monkeypatch, tmp_path):
    (tmp_path / "reward").mkdir()
    write_json(tmp_path / "reward/done.json", {"outputs": {"scale": {"mean": 2.0, "std": 4.0}}, "counts": {}})
    value = {"response": 2.0, "first": 6.0, "second": 10.0}
    monkeypatch.setattr(evaluate, "rated", lambda lm, t, todo, texts, *_: np.array([value[x.text] for x in texts]))
    revised = [p | {"response": "response", "rounds": [{"revision": "first"}, {"revision": "second"}]} for p in TODO]
    found = evaluate.scores_by_round(DEFAULT, tmp_path, None, revised)
    assert found == {"score": [0.0, 1.0, 2.0], "score_interval": [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]}
    assert evaluate.scores_by_round(config_without_reward(), tmp_path, None, revised) == {}


def config_without_reward():
    cfg = default()
    cfg.stages = ("critique", "sft", "evaluate")
    return checks.resolve(cfg)
