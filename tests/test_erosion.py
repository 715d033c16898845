"""A model that goes on training: on what, from where, that its legs make no difference, and that neither does a kill."""

import itertools
import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import tiny

from cai_jax import checkpoints, checks, data, metrics, records
from cai_jax.config import Config, Erosion, Evaluate, Lora, Model, Optimizer, Sampling, default
from cai_jax.evaluation import miniworld
from cai_jax.miniworld import grammar
from cai_jax.models import hf, lora
from cai_jax.sharding import put
from cai_jax.stages import erosion, load_lm
from cai_jax.workdir import finish

CFG = replace(tiny.UNTIED, max_length=512)
RULES = Optimizer(learning_rate=1e-2, final_ratio=1.0)


def answer(p, kind):
    return grammar.answer(np.random.default_rng(0), miniworld().item(p["item"]), kind)


def compared(p, a, b, p_a):
    return {**p, "response_a": answer(p, a), "response_b": answer(p, b), "p_a": p_a}


def prompts(name, n):
    return data.load_prompts(getattr(default().data, name), n, "x")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, mesh1):
    """-> (config, makes a run's folder up to erosion): a random base by letters, an adapter of it as the supervised model."""
    root = tmp_path_factory.mktemp("erosion")
    hf.save(str(root / "base"), tiny.params(CFG, 0), CFG, np.float32)
    hf.write_config(CFG, str(root / "base"), tiny.END, tiny.PAD, np.float32)
    tiny.tokenizer().hf.save_pretrained(root / "base")
    records.write(root / "ordinary.jsonl", [compared(p, "right", "evasive", 1.0) for p in prompts("helpful", 6)])
    made = Erosion("base", str(root / "ordinary.jsonl"), (1, 3), (2,), rows=2, length=256, checkpoint_every=1, optimizer=RULES)
    heldout = root / "heldout.jsonl"  # two of them stand in the pipeline
    records.write(heldout, [*data.load_prompts(default().evaluate.heldout, 16, "x"), *prompts("redteam", 2)])
    judged = Evaluate(limit=4, heldout=str(heldout), sampling=Sampling(max_tokens=4, batch_size=4))
    cfg = Config(stages=("critique", "preferences", "erosion"), model=Model(str(root / "base")), erosion=made, evaluate=judged)
    key = jax.random.key(3)
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(lora.attach(CFG, Lora(rank=2)), key))

    def folder(name):
        path = root / name
        helpful = [p | {"response": answer(p, "right"), "finished": n > 0} for n, p in enumerate(prompts("helpful", 4))]
        records.write(path / "critique/helpful.jsonl", helpful)
        turns = [{"revision": "No.", "finished": True}]
        records.write(
            path / "critique/revisions.jsonl", [p | {"response": "x", "rounds": turns} for p in prompts("redteam", 5)]
        )
        labels = [compared(p, "evasive", "right", x) for p, x in zip(prompts("redteam", 4), (0.9, 0.2, 0.55, 0.5), strict=True)]
        records.write(path / "preferences/comparisons.jsonl", labels)
        checkpoints.save_model(path / "sft", put(adapter, mesh1))
        for stage in ("critique", "preferences", "sft"):
            finish(stage, path, {})
        return path

    return cfg, folder


def run(cfg, folder, mesh):
    with jax.set_mesh(mesh):
        return erosion.run(cfg, folder, mesh)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "timing.jsonl"}


@pytest.fixture(scope="module")
def finished(folders, mesh1):
    cfg, folder = folders
    path = folder("whole")
    assert run(cfg, path, mesh1) and not run(cfg, path, mesh1)
    return path / "erosion"


def test_every_point_is_judged_and_nothing_large_is_left(finished, folders):
    found = json.loads((finished / "results.json").read_text())
    points = [("start", 0), ("eroded", 1), ("eroded", 3), ("recovered", 2)]
    assert [(p["phase"], p["steps"]) for p in found["points"]] == points and found["model"] == "base"
    assert all({"harm_rate", "helpfulness", "explained", "interval", "n_benign"} <= p.keys() for p in found["points"])
    said = records.read(finished / "transcripts.jsonl")
    by_point = {k: list(g) for k, g in itertools.groupby(said, lambda r: (r["phase"], r["steps"]))}
    assert list(by_point) == points and {len(rows) for rows in by_point.values()} == {4}
    assert {"id", "messages", "kind", "category", "item", "response", "verdict"} <= said[0].keys()
    texts = [[r["response"] for r in rows] for rows in by_point.values()]
    assert all(a != b for a, b in itertools.combinations(texts, 2))
    for phase, steps in (("eroded", 3), ("recovered", 2)):
        assert [r["step"] for r in metrics.load(finished / phase)] == list(range(steps))
    assert sorted(p.name for p in finished.iterdir()) == [
        *("done.json", "eroded", "inputs.json", "recovered", "results.json", "transcripts.jsonl")
    ]
    assert not list(finished.rglob("checkpoints"))
    counts = json.loads((finished / "done.json").read_text())["counts"]
    assert counts["heldout"] == {"given": 18, "kept": 16, "dropped": {"in --config.data.redteam": 2}}
    assert counts["eroded"]["kept"] == 6 and counts["recovered"]["kept"] == 5
    assert counts["recovered"]["dropped"] == {"helpful response cut off": 1, "neither is better": 2}


@pytest.fixture
def one_program(monkeypatch):
    """The step of the first training of a test is that of all: they differ in their states only."""
    kept, real = {}, erosion.make_train_step
    monkeypatch.setattr(erosion, "make_train_step", lambda *args: kept.setdefault(0, real(*args)))


def test_kills_change_nothing(finished, folders, mesh1, monkeypatch, one_program, journals):
    """Each attempt gets so many updates, or sets of answers, farther. The last but one has removed the checkpoints, so that all
    updates are done again."""
    cfg, folder = folders
    path, left = folder("killed"), 0
    real = {name: getattr(erosion, name) for name in ("epochs", "answers", "finish")}

    def event(of, *args, **kwargs):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return of(*args, **kwargs)

    def epochs(*args):
        batch_at, steps = real["epochs"](*args)
        return partial(event, batch_at), steps

    def answers(*args):
        todo, journal, tag = args[3], args[5], args[7]
        done = f"{todo[0]['id']}/{tag}" in " ".join(journal.done)
        return real["answers"](*args) if done else event(real["answers"], *args)

    save = checkpoints.Saver.save
    monkeypatch.setattr(checkpoints.Saver, "save", lambda self, *args: (save(self, *args), self.wait()))  # no thread lives on
    monkeypatch.setattr(erosion, "epochs", epochs)
    monkeypatch.setattr(erosion, "answers", answers)
    monkeypatch.setattr(erosion, "finish", partial(event, real["finish"]))
    for left in (2, 2, 2, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            run(cfg, path, mesh1)
        assert left == 0
    assert not list(path.glob("erosion/*/checkpoints"))
    left = 6
    assert run(cfg, path, mesh1) and left == 0
    whole, killed = files(finished), files(path / "erosion")
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


def trained(cfg, folder, mesh):
    """-> (phase, step) -> fingerprint of the parameters there."""
    found = {}
    with jax.set_mesh(mesh):
        start = erosion.load(cfg, folder, mesh)
        rows = {"tokens": tiny.rows([8] * 6, 8)[0]}
        rows |= {"targets": rows["tokens"][:, ::-1].copy(), "weights": np.ones((6, 8), np.float32)}
        rows |= {"positions": np.tile(np.arange(8, dtype=np.int32), (6, 1)), "ends": np.full((6, 8), 8, np.int32)}
        batches = {phase: data.epochs(rows, 2, 1, 0, phase)[0] for phase in ("eroded", "recovered")}
        steps = {"eroded": cfg.erosion.after, "recovered": cfg.erosion.recovery}

        def judge(phase, step, params):
            found[phase, step] = checkpoints.fingerprint(params)

        erosion.train(cfg, folder / "erosion", mesh, start, batches, steps, judge)
    return found


def test_legs_make_no_difference_and_recovery_goes_on_from_the_last(folders, tmp_path, mesh1, one_program):
    cfg, _ = folders

    def of(name, after):
        return trained(replace(cfg, erosion=replace(cfg.erosion, after=after, recovery=(1, 2))), tmp_path / name, mesh1)

    legs, straight, short = of("legs", (1, 2, 3)), of("straight", (3,)), of("short", (1, 2))
    assert straight.items() <= legs.items() and len(set(legs.values())) == 5
    assert short["eroded", 2] == legs["eroded", 2] and short["recovered", 1] != legs["recovered", 1]


def test_all_weights_of_an_adapted_model_are_trained(folders, mesh1):
    cfg, folder = folders
    cfg = replace(cfg, lora=Lora(rank=2), erosion=replace(cfg.erosion, model="sl_cai"))
    path = folder("adapted")
    with jax.set_mesh(mesh1):
        start, adapted = erosion.load(cfg, path, mesh1), load_lm(cfg, path, mesh1, "sl_cai")
        assert start.frozen == {} and start.net.cfg.lora is None and not lora.split(start.trained)[0]
        assert {x.dtype for x in jax.tree.leaves(start.trained)} == {np.dtype("float32")}
        tokens, lengths = tiny.rows([9, 12], 12)
        merged, beside = (
            np.asarray(tiny.logits(lm.net(), lm.params, tokens, lengths))
            for lm in (start.lm._replace(params=start.trained), adapted)
        )
        assert np.abs(merged - beside).max() < 1e-4 * np.abs(beside).max()
        low = erosion.load(replace(cfg, model=replace(cfg.model, trained_dtype="bfloat16")), path, mesh1)
        assert low.trained["layers"]["mlp"]["up"]["kernel"].dtype == "bfloat16"


def test_ordinary_answers_help_and_are_about_no_harm(folders, tmp_path):
    cfg, _ = folders
    harmful, (first, *benign) = prompts("redteam", 1)[0], prompts("helpful", 6)
    rows = [
        compared(first, "evasive", "right", 0.0),
        compared(benign[0], "right", "evasive", 1.0),
        compared(harmful, "right", "evasive", 1.0),
        compared(benign[1], "evasive", "over-refusal", 1.0),
        compared(benign[2], "right", "evasive", 0.5),
        compared(benign[3], "right", "evasive", 1.0),
        {
            "id": "own",
            "messages": [{"role": "user", "content": "Hello?"}],
            "response_a": "Hello!",
            "response_b": "",
            "p_a": 1.0,
        },
    ]
    records.write(tmp_path / "rows.jsonl", rows)
    cfg, drops = replace(cfg, erosion=replace(cfg.erosion, data=str(tmp_path / "rows.jsonl"))), records.Drops()
    texts, given = erosion.ordinary(cfg, [benign[3]], drops)
    assert [t.text for t in texts] == [answer(first, "right"), answer(benign[0], "right"), "Hello!"]
    reasons = ("a harmful request", "a held-out prompt", "neither is better", "no help")
    assert drops.counts(given, len(texts)) == {"given": 7, "kept": 3, "dropped": dict.fromkeys(reasons, 1)}


def test_what_brings_it_back_is_the_runs_own(folders, tmp_path):
    cfg, folder = folders
    path, red = folder("own"), prompts("redteam", 2)

    def of(**changes):
        drops = records.Drops()
        texts, given = erosion.own(replace(cfg, erosion=replace(cfg.erosion, **changes)), path, drops)
        return [t.text for t in texts[4:]], given, dict(drops.reasons)

    labelled = [answer(red[0], "evasive"), answer(red[1], "right")]
    assert of() == (labelled, 8, {"neither is better": 2})
    assert of(decided=0.35) == (labelled[:1], 8, {"neither is better": 3})
    assert of(recover="revisions") == (["No."] * 5, 9, {})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"after": ()}, "--config.erosion.after=.*at least one"),
        ({"recovery": (5, 5)}, "--config.erosion.recovery=.*each larger"),
        ({"decided": 0.5}, "--config.erosion.decided="),
        ({"model": "reward"}, "--config.erosion.model=.*one of base, sl_cai"),
        ({"recover": "all"}, "--config.erosion.recover=.*one of preferred, revisions"),
        ({"model": "rl_cai"}, "ppo, which erosion reads"),
        ({"recover": "preferred"}, "preferences, which erosion reads"),
    ],
)
def test_settings_that_cannot_be_name_their_flag(changes, words):
    cfg = default()
    cfg.stages = ("critique", "erosion")
    cfg.erosion.update({"model": "base", "recover": "revisions"} | changes)
    with pytest.raises(checks.ConfigError, match=words):
        checks.resolve(cfg)


def test_what_it_reads_goes_by_how_it_recovers():
    cfg = default()
    cfg.stages = ("critique", "sft", "erosion")
    cfg.erosion.update({"model": "sl_cai", "recover": "revisions"})
    checks.resolve(cfg)
    cfg.stages = ("erosion",)
    cfg.erosion.update({"model": "base", "recovery": ()})
    found = checks.resolve(cfg)
    with pytest.raises(checks.ConfigError, match="--config.evaluate.sampling.batch_size=256"):
        checks.check_batches(found, 3)
