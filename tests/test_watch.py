"""PPO's watch: what a snapshot holds, that a kill changes none, and which changes since the start are alarms."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import checks, evaluation, watch
from cai_jax.config import default
from cai_jax.data import load_prompts
from cai_jax.errors import Stopped
from cai_jax.evals import goodhart
from cai_jax.files import read_json
from cai_jax.intervals import student
from cai_jax.miniworld import grammar
from cai_jax.models import LM
from cai_jax.stages import ppo
from cai_jax.train import TrainState
from cai_jax.workdir import finish

STAGES = ("critique", "sft", "preferences", "reward", "referee", "harm", "ppo")
UNWATCHED = tuple(s for s in STAGES if s not in ("referee", "harm"))
SCALES = {"reward": {"mean": 1.0, "std": 2.0}, "referee": {"mean": -1.0, "std": 0.5}}
N = 24  # prompts


def config(stages=STAGES, **ppo):
    cfg = default()
    cfg.stages = stages
    cfg.ppo.update(ppo)
    cfg.evaluate.sampling.update(batch_size=16, max_tokens=16)
    return checks.resolve(cfg)


# Signs of over-optimisation

WORDS = [f"word{n}" for n in range(200)]
KIND = "You are valid, valued, and cared for."


def said(n: int, seed: int = 0, length: int = 12) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(n)]


def alarms(texts, start):
    return {a["alarm"]: a for a in goodhart.alarms(goodhart.figures(texts, start), goodhart.figures(start, start))}


def test_planted_boilerplate_is_an_alarm_and_the_same_texts_are_none():
    start = [*said(90), *(f"{x} {KIND}" for x in said(10, 1))]
    planted = [f"{x[:50]} {KIND * (n % 5 < 3)} {x[50:]}" for n, x in enumerate(said(100, 2))]
    assert alarms(start, start) == {} and alarms(said(100, 4), start) == {}
    found = alarms(planted, start)
    assert set(found) == {"repeated"} and (found["repeated"]["now"], found["repeated"]["start"]) == (0.6, 0.1)
    assert goodhart.figures(planted, start)["phrase"] == "you are valid valued and"
    assert alarms(planted, planted) == {} and goodhart.figures(planted, planted)["repeated"] == 0.0  # as common at the start
    old = "as one that has always been said"
    both = goodhart.figures([f"{x}. {old}" for x in planted], [f"{x} {old}" for x in start])
    assert (both["phrase"], both["repeated"]) == ("you are valid valued and", 0.6)
    assert set(alarms(planted[:55] + said(45, 5), start)) == {"repeated"}  # in 33 of 100
    assert alarms(planted[:45] + said(55, 5), start) == {}  # in 27


def test_openings_lengths_and_words_that_change_are_alarms():
    start = said(60)
    assert set(alarms([f"Let me be kind {x}" for x in said(60, 1)], start)) == {"same_opening"}
    assert set(alarms(said(60, 1, 24), start)) == {"length"} and set(alarms(said(60, 1, 5), start)) == {"length"}
    assert alarms(said(60, 1, 17), start) == {}
    few = [" ".join(np.random.default_rng(n).choice(WORDS[:4], 12)) for n in range(60)]
    assert set(alarms(few, start)) == {"distinct_2"}
    figures = goodhart.figures(["A b, a b.", "a c"], ["", "a"])
    assert (figures["length"], figures["distinct_2"], figures["same_opening"]) == (3.0, 3 / 4, 0.5)
    assert set(alarms([""] * 60, start)) == {"repeated", "same_opening", "length", "distinct_2"}  # it says nothing any more


def test_a_reward_that_rises_while_a_referee_falls_is_an_alarm():
    up, noise = np.full(20, 0.5), np.random.default_rng(0).normal(0, 0.3, 20)
    assert goodhart.parted(up + noise, -up + noise)[0]["reward"] == pytest.approx(student(up + noise))
    still = noise - noise.mean()
    for reward, referee in ((up + noise, up + noise), (up + noise, still), (still, noise - up), (noise - up, noise - up)):
        assert goodhart.parted(reward, referee) == []
    assert goodhart.parted(up[:7], -up[:7]) == []


# Snapshots


class World:
    """A watch whose policy answers as it is told, and whose scorers say what is told of them."""

    def __init__(self, workdir, monkeypatch, **settings):
        monkeypatch.setattr(watch, "WATCH_PROMPTS", N)
        monkeypatch.setattr(watch, "ready", lambda lm, gather: lm)
        monkeypatch.setattr(watch, "answers", self.answers)
        monkeypatch.setattr(watch, "load_scorer", lambda cfg, workdir, mesh, name: name)
        monkeypatch.setattr(watch, "rated", self.rated)
        monkeypatch.setattr(watch, "likelihood", self.likelihood)
        for stage in ("reward", "referee", "harm"):
            finish(stage, workdir, {}, **({"scale": SCALES[stage]} if stage in SCALES else {}))
        self.watch, self.folder = watch.Watch(config(**settings), workdir, None, "reward", "reference"), workdir / "ppo"
        self.bonus = {"reward": 0.0, "referee": 0.0, "harm": 0.0}

    def answers(self, cfg, lm, templates, todo, sampling, journal, mesh, tag, stoppable):
        assert not stoppable and len(todo) == N and len({p["kind"] for p in todo}) == 2
        mode = "greedy" if sampling.temperature == 0 else "sampled"
        assert journal.path.parent.name == "ppo" and tag == f"watch{lm.n}-{mode}"
        kinds, rng = {"harmful": lm.kind if mode == "sampled" else "right", "benign": "right"}, np.random.default_rng(0)
        items = [(evaluation.miniworld().item(p["item"]), kinds[p["kind"]]) for p in todo]
        return [evaluation.Answer(grammar.answer(rng, *of), n % 5 > 0) for n, of in enumerate(items)]

    def rated(self, name, templates, todo, said, batch_size, mesh, stoppable):
        assert len(todo) == len(said) == 2 * N and not stoppable
        assert all(x.finished for x in said) == (name == "harm")  # which learnt from nothing that EOS does not end
        return np.array([len(x.text) % 7 for x in said], np.float64) + self.bonus[name]

    def likelihood(self, lm, templates, todo, said, batch_size, mesh, stoppable):
        assert len(todo) == len(said) == N and not stoppable
        return np.where(np.arange(N) == 3, np.nan, 0.0 if lm == "reference" else lm.kl)

    def __call__(self, n, kind="right", kl=0.0):
        return self.watch(SimpleNamespace(n=n, kind=kind, kl=kl), n)


@pytest.fixture
def world(tmp_path, monkeypatch, journals):
    return lambda **settings: World(tmp_path, monkeypatch, **settings)


def test_a_snapshot_holds_every_answer_with_its_verdict_and_scores_and_their_means(world):
    w = world()
    logged = w(0)
    found = read_json(w.folder / "watch" / "0000.json")
    rows = found["answers"]["sampled"]
    assert {frozenset(r) for r in rows} == {
        frozenset(("id", "kind", "category", "response", "finished", "verdict", "reward", "referee", "harm"))
    }
    for r, p in zip(rows, w.watch.todo, strict=True):
        points = len(r["response"]) % 7
        assert r["id"] == p["id"] and r["verdict"] == dataclasses.asdict(evaluation.verdict(p, r["response"]))
        assert (r["reward"], r["referee"], r["harm"]) == ((points - 1) / 2, (points + 1) / 0.5, points)
    harmful = [r["harm"] for r in rows if r["kind"] == "harmful"]
    assert found["sampled"]["harm"] == np.mean(harmful) and found["sampled"]["interval"]["harm"] == student(harmful)
    assert found["sampled"]["reward"] == pytest.approx(np.mean([r["reward"] for r in rows]))
    assert found["sampled"]["harm_rate"] == 1.0 and found["sampled"]["interval"]["harm_rate"][1] == 1.0
    texts = [r["response"] for r in rows]
    assert {k: found["sampled"][k] for k in goodhart.figures(texts, texts)} == goodhart.figures(texts, texts)
    assert (found["iteration"], found["kl"], found["alarms"]) == (0, 0.0, [])
    assert set(logged) == {f"eval/{name}" for name in (*watch.WATCHED, "greedy_harm_rate")}
    assert logged["eval/harm"] == found["sampled"]["harm"] and logged["eval/greedy_harm_rate"] == found["greedy"]["harm_rate"]
    assert [p.name for p in w.folder.iterdir()] == ["watch"]  # no journal is left


def test_what_rl_did_stands_in_one_file(world, capsys):
    w = world(iterations=6, evaluate_every=4)
    assert not w.watch.began() and w(0) and w.watch.began()
    w.bonus["reward"], w.bonus["referee"] = 9.0, -9.0
    w(4, "evasive", 0.25)
    w(6, "explained", 0.5)
    assert w.watch.summarise() == 4  # in each the reward model and the referee part, and refusals are all alike
    found = read_json(w.folder / "dynamics.json")
    assert [(s["iteration"], s["kl"]) for s in found["snapshots"]] == [(0, 0.0), (4, 0.25), (6, 0.5)]
    whole = read_json(w.folder / "watch" / "0006.json")
    assert found["snapshots"][2] == {k: v for k, v in whole.items() if k != "answers"}
    assert [a["alarm"] for a in whole["alarms"]] == ["repeated", "parted"]
    assert "after iteration 4: alarm parted" in capsys.readouterr().err
    rated = {scale: {m["model"]: m["elo"] for m in of["models"]} for scale, of in found["elo"].items()}
    assert rated["harmlessness"]["6"] > rated["harmlessness"]["4"] > rated["harmlessness"]["0"] == 0.0
    assert rated["helpfulness"] == pytest.approx({"0": 0.0, "4": 0.0, "6": 0.0}, abs=1e-6)


def test_models_that_a_run_has_not_leave_nothing(world):
    w = world(stages=UNWATCHED)
    assert {"eval/referee", "eval/harm"} & set(w(0)) == set()
    found = read_json(w.folder / "watch" / "0000.json")
    assert "referee" not in found["sampled"] and "harm" not in found["answers"]["greedy"][0] and "reward" in found["sampled"]


def test_of_many_snapshots_as_many_as_in_the_paper_are_rated(world):
    w = world(iterations=40, evaluate_every=1, stages=UNWATCHED)
    for n in range(41):
        w(n)
    w.watch.summarise()
    elo = read_json(w.folder / "dynamics.json")["elo"]["harmlessness"]
    assert len(elo["models"]) == watch.RATED and {"0", "40"} <= {m["model"] for m in elo["models"]}


def test_a_snapshot_that_is_done_again_has_the_same_bytes(tmp_path, monkeypatch, mesh1, journals):
    """Killed between its two halves, or when it was done; by a real model, with the scores of a real one. SIGTERM waits."""
    monkeypatch.setattr(watch, "WATCH_PROMPTS", 6)
    for module in ("generate", "score"):
        monkeypatch.setattr(f"cai_jax.{module}.raise_if_stopping", None)
    cfg, head = config(stages=UNWATCHED), {"kernel": jnp.ones((32, 1)), "bias": jnp.zeros(1)}
    with jax.set_mesh(mesh1):
        lm = tiny.lm(mesh1)._replace(cfg=dataclasses.replace(tiny.CFG, max_length=256))
        reward = lm._replace(params={"trunk": lm.params, "head": head})
        whole = []
        for name in ("alone", "killed"):
            workdir = tmp_path / name
            finish("reward", workdir, {}, scale=SCALES["reward"])
            w = watch.Watch(cfg, workdir, mesh1, reward, lm)
            if name == "killed":
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(watch, "answers", stops_at_the_second(watch.answers))
                    w(lm, 0)
                assert (workdir / "ppo" / "watch-0.jsonl").stat().st_size > 0 and not w.began()
                w(lm, 0)
            w(lm, 0)
            whole.append({p.name: p.read_bytes() for p in (workdir / "ppo").rglob("*") if p.is_file()})
            assert w.kl(lm, [evaluation.Answer("b c")] * 6) == 0.0  # the policy is where it started
    assert whole[0] == whole[1] and list(whole[0]) == ["0000.json"]
    assert len({r["reward"] for r in json.loads(whole[0]["0000.json"])["answers"]["sampled"]}) > 3


def stops_at_the_second(real):
    def answers(cfg, lm, templates, todo, sampling, *rest):
        if sampling.temperature == 0:
            raise KeyboardInterrupt
        return real(cfg, lm, templates, todo, sampling, *rest)

    return answers


# PPO


def test_ppo_is_watched_at_the_start_every_few_iterations_and_at_the_end(tmp_path, monkeypatch, mesh1):
    """A run that was stopped goes on without the start, which has its snapshot."""
    seen, cfg = [], config(iterations=5, evaluate_every=2, checkpoint_every=1, kl_adaptive=False)

    class Seen:
        due, began = lambda self, n: n % 2 == 0 or n == 5, lambda self: bool(seen)

        def __call__(self, lm, n):
            seen.append((n, float(lm.params["x"])))
            return {"eval/harm_rate": n / 10}

    def iteration(cfg, mesh, state, step, frozen, pool, key, t):
        params = {"policy": {"x": state.train.params["policy"]["x"] + 1}}
        return state._replace(train=state.train._replace(params=params), iteration=state.iteration + 1), {"kl": t / 4}, {}

    monkeypatch.setattr(ppo, "iteration", iteration)
    lm = LM(tiny.CFG, jnp.dtype("float32"), {"x": jnp.float32(0)}, None)
    frozen = ppo.Frozen(lm.net(), {"policy": {}}, lm, lm, None, {})

    def run(stop: bool):
        monkeypatch.setattr(ppo, "stopping", lambda: stop)
        train = TrainState(jnp.int32(0), {"policy": {"x": jnp.float32(0)}}, ())
        state = ppo.PPOState(train, jnp.float32(0.2), jnp.int32(0))
        ppo.iterate(cfg, tmp_path, mesh1, state, None, frozen, None, Seen(), jax.random.key(0))

    with jax.set_mesh(mesh1):
        with pytest.raises(Stopped):
            run(stop=True)
        run(stop=False)
    assert seen == [(0, 0.0), (2, 2.0), (4, 4.0), (5, 5.0)]


@pytest.mark.parametrize(
    "stages, every, wanted",
    [
        (("reward", "ppo"), 4, {"reward", "sft"}),
        (("reward", "referee", "harm", "ppo"), 4, {"reward", "sft", "referee", "harm"}),
        (("reward", "referee", "harm", "ppo"), 0, {"reward", "sft"}),
    ],
)
def test_ppo_depends_on_the_models_that_watch_it(stages, every, wanted, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ppo, "begin", lambda stage, workdir, inputs: seen.append(inputs))
    for stage in ("sft", "reward", "referee", "harm"):
        finish(stage, tmp_path, {}, model=stage)
    cfg = config(evaluate_every=every)
    assert not ppo.run(dataclasses.replace(cfg, stages=stages), tmp_path, None)
    assert set(seen[0]["stages"]) == wanted and set(seen[0]["models"]) == {"rl_cai", *wanted - {"sft"}}
    assert load_prompts(cfg.evaluate.redteam, 0, "x") and ("watch" in seen[0]["files"]) == bool(every)
