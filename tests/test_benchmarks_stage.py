"""Public evaluation sets in a run: what models are asked is what is scored, nothing is lost, and a stop changes nothing."""

import csv
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from cai_jax import checkpoints, checks, prompts, records
from cai_jax.config import Benchmarks, Config, Model, Sampling, default
from cai_jax.errors import InputError, Stopped
from cai_jax.evals import grading, scores, sets
from cai_jax.evals.items import Choice, Open, Pair, asked
from cai_jax.models import hf
from cai_jax.models.heads import init_head
from cai_jax.score import choice_logprobs, reward_scores
from cai_jax.sharding import put
from cai_jax.stages import benchmarks, load_lm, load_scorer, trunk
from cai_jax.workdir import finish

CFG = replace(tiny.UNTIED, max_length=768)
HHH = [
    {"category": c, "input": f"Q{n}?", "targets": {"choices": [f"Yes {n}.", f"No {n}, no."], "labels": [1, 0]}}
    for n, c in enumerate(["kind", "true"] * 5)
]
HHH.append(HHH[0] | {"input": "Why? " * 200})  # longer than the context
XSTEST = [{"id": n, "prompt": f"How? {n}", "type": ("contrast_" * (n % 2)) + "a", "focus": "x"} for n in range(4)]
ATTACKS = [
    {"Behavior": f"Do {n}", "FunctionalCategory": "standard", "SemanticCategory": "s", "BehaviorID": f"b{n}"} for n in range(3)
]
REJECT = [{"category": "c", "source": "s", "forbidden_prompt": f"Tell {n}"} for n in range(3)]
FILES = {"hhh.jsonl": HHH, "xs.csv": XSTEST, "bench.csv": ATTACKS, "reject.csv": REJECT}


@pytest.fixture(scope="module")
def world(tmp_path_factory, mesh1):
    """-> (config, workdir with a reward model): random models with a tokenizer by letters, a context of 768."""
    root = tmp_path_factory.mktemp("world")
    base = root / "base"
    hf.save(str(base), tiny.params(CFG, 0), CFG, np.float32)
    hf.write_config(CFG, str(base), tiny.END, tiny.PAD, np.float32)
    tiny.tokenizer().hf.save_pretrained(base)
    paths = []
    for name, rows in FILES.items():
        paths.append(str(root / name))
        with open(paths[-1], "w", newline="", encoding="utf-8") as f:
            if name.endswith("csv"):
                writer = csv.DictWriter(f, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
            else:
                f.writelines(map(records.dumps, rows))
    sampling = Sampling(max_tokens=8, batch_size=4)
    c = Benchmarks(sets=tuple(paths), score_batch=8, sampling=sampling)
    cfg = Config(stages=("reward", "benchmarks"), model=Model(path=str(base)), benchmarks=c)
    cfg = replace(cfg, reward=replace(cfg.reward, init="base"))
    params = {"trunk": trunk(tiny.params(CFG, 1)), "head": init_head(jax.random.key(0), CFG.width)}
    checkpoints.save_model(root / "run" / "reward", put(jax.tree.map(np.asarray, params), mesh1))
    finish("reward", root / "run", {}, scale={"mean": 0.0, "std": 1.0})
    return cfg, root / "run"


def run(cfg, workdir, mesh):
    with jax.set_mesh(mesh):
        return benchmarks.run(cfg, workdir, mesh)


@pytest.fixture(scope="module")
def finished(world, mesh1):
    cfg, workdir = world
    assert run(cfg, workdir, mesh1) and not run(cfg, workdir, mesh1)
    return json.loads((workdir / "benchmarks/results.json").read_text())


def test_choices_are_scored_by_their_logprobs(world, finished, mesh1):
    cfg, workdir = world
    items = sets.read(cfg.benchmarks.sets[0]).items
    here = [i for i in items if isinstance(i, Choice) and "Why? Why?" not in str(i.messages)]
    with jax.set_mesh(mesh1):
        lm = load_lm(cfg, workdir, mesh1)
        alone = [choice_logprobs(lm, [asked(i)], 1, mesh1, "")[0] for i in here]
    wanted, found = scores.score("hhh_alignment", here, alone), finished["hhh"]["models"]["base"]
    assert found["missing"] == 2 and len(here) == 20 and finished["hhh"]["format"] == "hhh_alignment"
    for view in ("letters", "texts"):
        assert found["views"][view]["accuracy"] == wanted["views"][view]["accuracy"]


def test_pairs_go_to_the_reward_model(world, finished, mesh1):
    cfg, workdir = world
    items = [i for i in sets.read(cfg.benchmarks.sets[0]).items if isinstance(i, Pair)]
    with jax.set_mesh(mesh1):
        lm = load_scorer(cfg, workdir, mesh1, "reward")
        rows, lengths = [], []
        for item in items[:10]:
            for text in (item.chosen, item.rejected):
                ids = lm.tok.prompt(prompts.dialogue(item.messages)) + lm.tok.encode(prompts.completion(text)) + [lm.tok.eos_id]
                rows.append(np.pad(ids, (0, 128 - len(ids))))
                lengths.append(len(ids))
        raw = np.asarray(reward_scores(lm.net(), lm.params, np.array(rows, np.int32), np.array(lengths, np.int32)))
        found = benchmarks.compared(cfg, workdir, mesh1, items)
    assert len(found) == 10 and items[10].id not in found
    np.testing.assert_allclose([found[i.id] for i in items[:10]], raw.reshape(10, 2), rtol=1e-4, atol=1e-5)
    right = np.mean(raw.reshape(10, 2)[:, 0] > raw.reshape(10, 2)[:, 1])
    of = finished["hhh"]["models"]["reward"]
    assert of["preferred"]["accuracy"]["value"] == pytest.approx(right) and of["missing"] == 1


def test_answers_are_kept_and_graded_where_the_set_wants_it(world, finished, mesh1):
    cfg, workdir = world
    said = {(r["set"], r["id"]): r["answer"] for r in records.read(workdir / "benchmarks/answers.jsonl")}
    assert len(said) == 4 + 3 + 3
    for name, path in zip(("xs", "bench", "reject"), cfg.benchmarks.sets[1:], strict=True):
        found = sets.read(path)
        answers = [said[name, i.id] for i in found.items]
        if name == "xs":
            wanted = answers
        else:
            score = benchmarks.SCORES[found.format][Open]
            with jax.set_mesh(mesh1):
                lm = load_lm(cfg, workdir, mesh1, "judge")
                wanted = []
                for item, answer in zip(found.items, answers, strict=True):
                    qs = [asked(q) for q in grading.questions(item, answer, score)]
                    fit = all(len(lm.tok.prompt(context + options[-1])) < 768 for context, options in qs)
                    logp = [choice_logprobs(lm, [q], 1, mesh1, "")[0] for q in qs] if fit else None
                    wanted.append(grading.outcome(score, logp) if logp else None)
        of = finished[name]["models"]["base"]
        assert {k: v for k, v in of.items() if k != "missing"} == json.loads(
            json.dumps(scores.score(found.format, found.items, wanted))
        )


def test_what_a_judge_is_asked_and_what_it_says():
    item = Open("x", [{"role": "user", "content": "Do it"}])
    done, turned = grading.questions(item, "First {a}.", "judged")
    assert "Human: Do it\n\nAssistant: First {a}.\n\nDoes the assistant" in done.messages[0]["content"]
    assert done.choices == (" (A)", " (B)") and " (B) yes" in done.messages[0]["content"]
    assert " (A) yes" in turned.messages[0]["content"] and " (B) no" in turned.messages[0]["content"]
    yes, no, lean = np.array([-2.0, -0.2]), np.array([-0.2, -2.0]), np.array([-0.1, -3.0])
    assert grading.outcome("judged", [yes, no]) is True and grading.outcome("judged", [no, yes]) is False
    assert (
        grading.outcome("judged", [lean, no + [0, 0.5]]) is False
        and grading.outcome("judged", [lean, lean + [0.05, -3]]) is True
    )
    assert [len(q.choices) for q in grading.questions(item, "x", "strongreject")] == [2, 2, 5, 5, 5, 5]
    one = [np.array([-1.0, -2]), np.array([-3.0, -3, -1, -3, -3]), np.array([-3.0, -3, -3, -3, -1])]
    logp = [x for first in one for x in (first, first[::-1])]
    assert grading.outcome("strongreject", logp) == (0, 3, 5) and not grading.questions(item, "x", "xstest")


def test_a_stopped_stage_ends_as_if_it_had_not_been(world, finished, mesh1, tmp_path, monkeypatch, journals):
    cfg, workdir = world
    other = tmp_path / "run"
    other.mkdir()
    (other / "reward").symlink_to(workdir / "reward")
    real, calls = benchmarks.choice_logprobs, []

    def stopping(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 2:
            raise Stopped("here")
        return real(*arguments)

    monkeypatch.setattr(benchmarks, "choice_logprobs", stopping)
    with pytest.raises(Stopped):
        run(cfg, other, mesh1)
    assert run(cfg, other, mesh1) and len(set(calls)) == len(calls) - 1  # only what was stopped is done again
    for name in ("results.json", "answers.jsonl"):
        assert (other / "benchmarks" / name).read_bytes() == (workdir / "benchmarks" / name).read_bytes()


def test_two_files_of_one_name_are_refused(world, tmp_path, mesh1):
    cfg, workdir = world
    path = tmp_path / "hhh.csv"
    path.write_text("id,prompt,type,focus\n1,Hi,a,b\n")
    cfg = replace(cfg, benchmarks=replace(cfg.benchmarks, sets=(*cfg.benchmarks.sets, str(path))))
    with pytest.raises(InputError, match="two files have the same name"):
        run(cfg, workdir, mesh1)


def test_a_stage_without_sets_names_the_flag():
    cfg = default()
    cfg.stages = ("benchmarks",)
    with pytest.raises(checks.ConfigError, match="--config.benchmarks.sets="):
        checks.resolve(cfg)
