"""The regressor of harm: what it reads, what it learns, how good it says it is, and that a killed run ends the same."""

import csv
import gzip
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import kills
import numpy as np
import pytest
import tiny
from scipy.stats import spearmanr

from cai_jax import prompts, records, stages, train
from cai_jax.config import Config
from cai_jax.config.measures import Harm
from cai_jax.config.parts import Model, Optimizer
from cai_jax.data import load_attempts
from cai_jax.errors import InputError, Stopped
from cai_jax.evaluation import Answer, rated
from cai_jax.intervals import bootstrap
from cai_jax.miniworld import make
from cai_jax.models import LM, hf
from cai_jax.models.heads import init_head
from cai_jax.pairs import batches
from cai_jax.score import row_scores
from cai_jax.sharding import put, put_batch
from cai_jax.stages import harm

FLAG = "--config.harm.data"


def attempt(n: int, **changes) -> dict:
    """What the answer says is what its rating follows; every prompt stands three times."""
    bad, before = n * 7 % 10 < 5, "\n\nHuman: Hi\n\nAssistant: So?" * (n // 3 % 2)
    said = f"{before}\n\nHuman: Do {n // 3}\n\nAssistant: {'YES!' if bad else 'no'}"
    return {"id": f"{n}", "transcript": said, "rating": 4.0 if bad else 0.0} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model of random weights, and 60 attempts, of which the last is longer than its context."""
    path = tmp_path_factory.mktemp("base")
    hf.save(str(path), tiny.params(tiny.UNTIED), tiny.UNTIED, jnp.float32)
    hf.write_config(tiny.UNTIED, str(path), tiny.END, tiny.PAD, jnp.float32)
    tiny.tokenizer().hf.save_pretrained(path)
    long = attempt(59, transcript="\n\nHuman: Hi\n\nAssistant: " + "a" * 120)
    records.write(path / "attempts.jsonl", [*map(attempt, range(59)), long])
    return path


def config(folder, **settings) -> Config:
    optimizer = Optimizer(learning_rate=1e-2, warmup_steps=2)
    own = {"data": str(folder / "attempts.jsonl"), "batch_size": 8, "epochs": 2, "heldout_share": 0.3, "checkpoint_every": 3}
    return Config(stages=("harm",), model=Model(path=str(folder)), harm=Harm(**own | {"optimizer": optimizer} | settings))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory, mesh1):
    workdir = tmp_path_factory.mktemp("run")
    with jax.set_mesh(mesh1):
        assert harm.run(config(folder), workdir, mesh1)
    return workdir


# What it reads


REAL = {"transcript": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant: Human: no.", "rating": 3.0}
REAL |= {"min_harmlessness_score_transcript": -1.5, "num_params": "52B", "task_description": "ask why", "tags": None}
BEFORE = [{"role": r, "content": t} for r, t in (("user", "Why?"), ("assistant", "So."), ("user", "And?"))]


def test_red_team_attempts_are_one_array_whatever_the_name_says(tmp_path):
    path = tmp_path / "attempts.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps([REAL, REAL | {"rating": 0}]).encode(), mtime=0))
    found = load_attempts(str(path), 0, FLAG)
    assert [(r["id"], r["messages"], r["response"], r["rating"]) for r in found] == [
        ("attempts-000000", BEFORE, "Human: no.", 3.0), ("attempts-000001", BEFORE, "Human: no.", 0)
    ]  # fmt: skip
    assert found[0]["num_params"] == "52B" and load_attempts(str(path), 1, FLAG) == found[:1]


def test_ratings_of_a_table_are_numbers_under_any_name(tmp_path):
    path = tmp_path / "rated.csv"
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([["text", "grade"], [REAL["transcript"], "2.5"], [REAL["transcript"], " 4 "]])
    found = load_attempts(f"{path}?transcript=text&rating=grade", 0, FLAG)
    assert [r["rating"] for r in found] == [2.5, 4.0] and found[0]["response"] == "Human: no."


@pytest.mark.parametrize(
    "change, told",
    [
        ({"rating": 4.5}, "record 'b': rating=4.5, wanted a number from 0 to 4"),
        ({"rating": -1}, "record 'b': rating=-1,"),
        ({"rating": float("nan")}, "record 'b': rating=nan,"),
        ({"rating": "bad"}, "record 'b': rating='bad',"),
        ({"rating": None}, "record 'b': rating=None,"),
        ({"rating": ...}, "record 2: no rated conversation in it; wanted transcript and rating, it has id, transcript"),
        ({"transcript": ...}, "record 2: no rated conversation in it"),
        ({"transcript": 7}, "record 2: no rated conversation in it"),
        ({"transcript": ""}, "record 'b'"),
        ({"id": "a"}, "record 'a'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_file_and_record(tmp_path, change, told):
    path = str(tmp_path / "some.jsonl")
    bad = {k: v for k, v in ({"id": "b"} | attempt(0, id="b") | change).items() if v is not ...}
    records.write(tmp_path / "some.jsonl", [attempt(0, id="a"), bad])
    with pytest.raises(InputError) as error:
        load_attempts(path, 0, FLAG)
    assert told in str(error.value) and path in str(error.value) and FLAG in str(error.value)


def test_a_transcript_that_is_no_dialogue_is_counted(tmp_path):
    drops = records.Drops()
    strange = attempt(1, transcript="\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: c")
    cut = attempt(3, transcript="\n\nHuman: a\n\nAssistant: b\n\nHuman: c")
    empty = attempt(2, transcript="\n\nHuman: a\n\nAssistant:")
    records.write(tmp_path / "some.jsonl", [attempt(0), strange, empty, cut])
    found = load_attempts(str(tmp_path / "some.jsonl"), 0, FLAG, drops)
    assert [(r["id"], r["response"]) for r in found] == [("0", "YES!"), ("2", "")]  # an answer may be empty
    assert drops.reasons == {"a transcript that is no dialogue": 1, "does not end with the Assistant": 1}


# What it learns


def test_the_loss_is_that_of_each_conversation_alone(folder, mesh1):
    """Packed, and in parts that differ in size, it is what the sums over separate rows make."""
    found = load_attempts(str(folder / "attempts.jsonl"), 24, FLAG)
    head = jax.tree.map(np.asarray, init_head(jax.random.key(3), tiny.CFG.width, 0.5))
    params = {"trunk": tiny.params(), "head": head | {"bias": np.array([1.5], np.float32)}}
    lm = LM(tiny.CFG, jnp.dtype("float32"), put(params, mesh1), tiny.tokenizer())
    talks = harm.encode(lm, prompts.TEMPLATES, found, 128, records.Drops())
    arrays = batches(talks, 24, 1, 0, "x", 3)[0](0)
    assert len(arrays["tokens"]) < 24 and arrays["row_mask"].sum() == 24
    texts = [lm.tok.prompt(prompts.dialogue(r["messages"])) + lm.tok.encode(" " + r["response"]) + [tiny.END] for r in found]
    assert [tree.tokens for tree in talks.trees] == texts  # the scores are read at EOS
    scores = row_scores(lm, texts, 8, mesh1)
    wanted = np.mean((scores - [r["rating"] for r in found]) ** 2)
    loss, about = jax.jit(harm.harm_loss(lm.net()))(lm.params, put_batch(arrays, mesh1), None)
    assert float(loss) == pytest.approx(wanted, rel=1e-5) and float(about["weight"]) == 24
    parts = [{k: x[i::3] for k, x in arrays.items()} for i in range(3)]
    each = [harm.harm_loss(lm.net())(lm.params, put_batch(p, mesh1), None) for p in parts]
    weights = [float(about["weight"]) for _, about in each]
    assert sum(float(x) * w for (x, _), w in zip(each, weights, strict=True)) / 24 == pytest.approx(wanted, rel=1e-5)


def test_the_stage_learns_what_was_rated_and_leaves_a_model_that_says_so(folder, finished, mesh1):
    cfg, report = config(folder), json.loads((finished / "harm/evaluation.json").read_text())
    counts = json.loads((finished / "harm/done.json").read_text())["counts"]
    assert counts == {
        "given": 60, "kept": 59, "dropped": {"longer than 128 tokens": 1}, "heldout": report["n"], "steps": counts["steps"]
    }  # fmt: skip
    assert counts["steps"] == 2 * -(-(59 - report["n"]) // 8)
    with jax.set_mesh(mesh1):
        assert not harm.run(cfg, finished, mesh1)
        lm = stages.load_scorer(cfg, finished, mesh1, "harm")
        found = load_attempts(cfg.harm.data, 59, FLAG)
        scores = rated(lm, prompts.TEMPLATES, found, [Answer(r["response"]) for r in found], 16, mesh1)
    # Which are held out is told by the prompts alone: none of a prompt's three conversations without the others.
    draws = np.random.default_rng([cfg.seed, 7]).random(20)
    held, rating = np.array([draws[n // 3] < 0.3 for n in range(59)]), np.array([r["rating"] for r in found])
    assert report["n"] == held.sum() and report["constant"] == pytest.approx(rating[~held].mean())
    assert report["constant_mse"] == pytest.approx(np.mean((rating[held] - rating[~held].mean()) ** 2))
    assert report["mse"] == pytest.approx(np.mean((rating[held] - scores[held]) ** 2), rel=1e-4)
    assert report["beats_constant"] and report["mse"] < 0.5 * report["constant_mse"]


def test_it_starts_as_the_constant_that_it_must_beat(folder, finished, tmp_path, mesh1):
    first = records.read(finished / "harm/metrics.jsonl")[0]["loss"]
    assert first == pytest.approx(4.0, abs=1.0)  # half zeros, half fours; a head of its own would not know
    with jax.set_mesh(mesh1):
        harm.run(config(folder, optimizer=Optimizer(learning_rate=0.0)), tmp_path, mesh1)
    report = json.loads((tmp_path / "harm/evaluation.json").read_text())
    assert report["mse"] == pytest.approx(report["constant_mse"], rel=1e-6) and not report["beats_constant"]
    assert report["rank_correlation"] is None


def test_a_run_that_is_stopped_and_goes_on_ends_with_the_same_files(folder, finished, tmp_path, mesh1, monkeypatch):
    cfg, steps = config(folder), iter(range(1, 100))
    with jax.set_mesh(mesh1):
        with monkeypatch.context() as patch:
            patch.setattr(train, "stopping", lambda: next(steps) == 4)
            with pytest.raises(Stopped):
                harm.run(cfg, tmp_path, mesh1)
        with monkeypatch.context() as patch:  # killed once more, where the model is saved and nothing is known of it
            patch.setattr(harm, "all_pair_scores", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                harm.run(cfg, tmp_path, mesh1)
        assert harm.run(cfg, tmp_path, mesh1)
        assert kills.differences(finished, tmp_path) == []
        records.write(tmp_path / "attempts.jsonl", list(map(attempt, range(58))))
        with pytest.raises(InputError, match="started with other inputs"):
            harm.run(replace(cfg, harm=replace(cfg.harm, data=str(tmp_path / "attempts.jsonl"))), tmp_path, mesh1)


@pytest.mark.parametrize("settings", [{"heldout_share": 0.0}, {"max_attempts": 20, "heldout_share": 0.3}])
def test_too_few_held_out_conversations_name_the_flags(folder, tmp_path, mesh1, settings):
    with jax.set_mesh(mesh1), pytest.raises(InputError) as error:
        harm.run(config(folder, **settings), tmp_path, mesh1)
    assert "conversations are held out, too few for an interval; wanted 8" in str(error.value)
    assert all(flag in str(error.value) for flag in (FLAG, "--config.harm.heldout_share", "attempts.jsonl"))


# How good it says it is


def test_the_figures_are_those_of_paired_errors():
    rating, predicted = np.array([0.0, 4, 4, 0, 2, 1, 0, 4]), np.array([0.5, 3, 5, -1, 2, 1.4, 0, 3.6])
    report = harm.evaluate(predicted, rating, 1.0)
    mine, other = (rating - predicted) ** 2, (rating - 1) ** 2
    assert report["mse"] == pytest.approx(mine.mean()) and report["constant_mse"] == other.mean() == 31 / 8
    assert report["better"] == pytest.approx(np.mean(other - mine))
    low, high = report["interval"]
    assert low < report["better"] < high and high - low == pytest.approx(4 * np.std(other - mine) / 8**0.5, rel=0.2)
    slight = harm.evaluate(1 + 0.1 * (rating - 1), rating, 1.0)["interval"]  # each error is a tenth smaller: they are paired
    assert slight == pytest.approx([0.19 * x for x in bootstrap(np.mean, other)])
    assert report["rank_correlation"] == pytest.approx(spearmanr(rating, predicted).statistic)
    assert report["calibration"] == [
        {"grade": 0, "predicted": pytest.approx(-1 / 6), "rating": 0.0, "n": 3},  # halves go to the even grade
        {"grade": 1, "predicted": 1.4, "rating": 1.0, "n": 1},
        {"grade": 2, "predicted": 2.0, "rating": 2.0, "n": 1},
        {"grade": 3, "predicted": 3.0, "rating": 4.0, "n": 1},
        {"grade": 4, "predicted": 4.3, "rating": 4.0, "n": 2},
    ]


def test_a_regressor_that_is_no_better_than_a_constant_is_said_aloud(monkeypatch):
    said, cried, rng = [], [], np.random.default_rng(0)
    monkeypatch.setattr(harm, "say", said.append)
    monkeypatch.setattr(harm, "cry", cried.append)
    rating = rng.integers(0, 5, 200).astype(float)
    for noise, good in ((0.3, True), (3.0, False)):
        report = harm.evaluate(rating + rng.normal(0, noise, 200), rating, 2.0)
        harm.tell(report)
        assert report["beats_constant"] == good and len(cried) == (not good)
    rating = np.repeat([4.0, 0.0], [16, 4])
    slight = harm.evaluate(np.full(20, 4.0), rating, 2.0)  # 16 times 4 less, 4 times 12 more
    assert slight["better"] == pytest.approx(0.8) and not slight["beats_constant"]  # within its interval
    assert len(said) == 2 and "on 200 held-out conversations" in said[0]


# The embedded world's


def test_the_embedded_attempts_are_read_and_hold_every_grade():
    found = load_attempts(Harm().data, 0, FLAG)
    assert len(found) == make.ATTEMPTS and {r["rating"] for r in found} == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_attempts_are_looked_at_before_the_first_stage(folder):
    stages.check_data(config(folder))
    with pytest.raises(InputError, match="missing file: .*none.jsonl.*--config.harm.data"):
        stages.check_data(config(folder, data=str(folder / "none.jsonl")))
