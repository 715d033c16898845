"""The command as a user runs it: end to end on a share of the embedded world, again, changed, killed, given bad input."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import jax
import kills
import pytest

from cai_jax.ahead.steps import steps
from cai_jax.checks import resolve
from cai_jax.config import default

ROOT = kills.ROOT
LOOKING = {"serving", "new", "grow", "first_row", "minibatch", "init", "init_fn"}  # programs without a step


def cai(*arguments, command="run", devices=1, flags="", timeout=600):
    environment = kills.os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
    }
    return subprocess.run(
        [sys.executable, "-m", "cai_jax", command, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small run of every stage."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    done = cai("--config=configs/miniworld.py", f"--workdir={workdir}", *kills.SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stderr


def test_every_stage_leaves_its_files_and_the_summary_is_shown(finished):
    workdir, shown = finished
    for stage in ("critique", "sft", "preferences", "reward", "ppo", "evaluate", "report"):
        assert (workdir / stage / "done.json").exists(), stage
        assert stage in shown
    for name in ("config.json", "manifest.json", "constitution.toml", "report/index.html", "evaluate/transcripts.jsonl"):
        assert (workdir / name).stat().st_size > 0, name
    results = read(workdir / "evaluate" / "results.json")["models"]
    assert set(results) == {"base", "sl_cai", "rl_cai"}
    for sets in results.values():
        for name in ("heldout", "redteam"):
            for mode in ("sampled", "greedy"):
                assert {"harm_rate", "helpfulness", "over_refusal", "evasive", "explained", "coherent", "by_category"} <= set(
                    sets[name][mode]
                )
    base = results["base"]["redteam"]["greedy"]
    assert base["harm_rate"] > 0.9 and base["helpfulness"] > 0.9  # the base helps with anything


def test_what_a_whole_run_compiles_is_counted_and_little(finished):
    """A step of each trained stage, PPO's three programs, and of the sampler a few: by prompt length, and by how many slots."""
    _, shown = finished
    programs = Counter(re.findall(r"compiling (\w+) \(program", shown))
    assert programs["step"] == 3 and programs["generate"] == programs["experience"] == 1
    assert programs["decode"] <= 5 and programs["read"] <= 10
    assert f"compiled {programs.total()} programs in" in shown


def test_what_a_run_compiles_is_what_is_compiled_ahead_of_it(finished, mesh1):
    """But for programs that only make, move or look at arrays."""
    _, shown = finished
    with jax.set_mesh(mesh1):
        ahead = {step.lower.func.__self__.__name__ for step in steps(resolve(default()), mesh1)}
    own = set(re.findall(r"compiling ([^_ ]\w*) \(program", shown))  # JAX's own, as of random numbers, begin with "_"
    assert own - ahead <= LOOKING and "step" in own
    assert {"read", "decode", "step", "tree_logprobs", "pair_scores", "generate", "experience"} <= ahead


def test_lesson_17_counts_add_up(finished):
    workdir, _ = finished
    for stage in ("critique", "sft", "preferences", "reward"):
        counts = read(workdir / stage / "done.json")["counts"]
        assert counts["given"] == counts["kept"] + sum(counts["dropped"].values()), stage
    assert read(workdir / "critique" / "done.json")["counts"]["given"] == 48
    reward = read(workdir / "reward" / "done.json")["counts"]
    assert reward["human"] == 96 and reward["human_share"] == pytest.approx(96 / (96 + reward["ai"]))


def test_lesson_02_the_ratio_starts_at_one(finished):
    workdir, _ = finished
    rows = [json.loads(line) for line in (workdir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2]
    for r in rows:
        assert r["first_ratio_error"] < 1e-3 and r["drift"] < 1e-4
    assert abs(rows[0]["kl"]) < 1e-4  # the policy starts as its reference
    assert any(r["approx_kl"] > 0 for r in rows)


def test_lesson_27_over_refusal_is_watched_while_ppo_runs(finished):
    """A policy that refuses everything has no harm either: both are logged in the loop, and the policy still helps. Such a
    policy has over-refusal 1 and helpfulness 0; the bounds leave room for the few prompts of the small run."""
    workdir, _ = finished
    rows = [json.loads(line) for line in (workdir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    watched = ["eval/over_refusal" in r and "eval/harm_rate" in r for r in rows]
    assert watched == [False, True, True]  # every second, and the last
    results = read(workdir / "evaluate" / "results.json")["models"]["rl_cai"]
    found = [results[s]["sampled"] for s in ("redteam", "heldout")]
    found += [{k: r[f"eval/{k}"] for k in ("over_refusal", "helpfulness")} for r in rows[1:]]
    assert all(0 <= f["over_refusal"] < 0.35 and f["helpfulness"] > 0.35 for f in found), found


def test_critique_records_have_full_provenance(finished):
    workdir, _ = finished
    lines = [json.loads(line) for line in (workdir / "critique" / "revisions.jsonl").read_text().splitlines()]
    assert [r["id"] for r in lines] == [f"redteam-{i:04d}" for i in range(48)]
    assert all(len(r["rounds"]) == 1 and r["rounds"][0]["critique"] and r["rounds"][0]["revision"] for r in lines)
    assert len({r["rounds"][0]["principle"] for r in lines}) > 5


def test_a_finished_run_is_skipped_and_a_changed_one_refused(finished):
    workdir, _ = finished
    before = {n: p.read_bytes() for n, p in kills.files(workdir).items()}
    again = cai("--config=configs/miniworld.py", f"--workdir={workdir}", *kills.SMALL)
    assert again.returncode == 0 and again.stderr.count("done before") == 7
    changed = cai("--config=configs/miniworld.py", f"--workdir={workdir}", *kills.SMALL, "--config.ppo.kl_coef=0.31")
    assert changed.returncode == 2
    assert "ppo" in changed.stderr and "config.kl_coef: 0.2 -> 0.31" in changed.stderr
    assert {n: p.read_bytes() for n, p in kills.files(workdir).items()} == before


def test_lesson_11_killed_at_random_moments_ends_with_the_same_files(finished, tmp_path):
    workdir, _ = finished
    killed = tmp_path / "small"
    assert kills.run(killed, kills.SMALL, 3, random.Random(5), 12.0) >= 1
    assert kills.differences(workdir, killed) == []


def test_every_option_runs_and_upstream_stages_are_taken_over(finished, tmp_path):
    """DPO beside PPO, chain of thought, several principles, hard labels, a shared trunk, adaptive KL, an early stop."""
    workdir = tmp_path / "options"
    for stage in ("critique", "sft"):
        shutil.copytree(finished[0] / stage, workdir / stage)
    options = (
        "--config.stages=('critique','sft','preferences','reward','dpo','ppo','evaluate','report')",
        "--config.preferences.chain_of_thought=True",
        "--config.preferences.principles=2",
        "--config.preferences.thought.batch_size=16",
        "--config.dpo.batch_size=8",
        "--config.ppo.value_network=shared",
        "--config.ppo.kl_adaptive=True",
        "--config.ppo.target_kl=1e-9",
        "--config.reward.microbatches=2",
    )
    done = cai("--config=configs/miniworld.py", f"--workdir={workdir}", *kills.SMALL, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("done before") == 2
    judged = [json.loads(line) for line in (workdir / "preferences" / "comparisons.jsonl").read_text().splitlines()]
    for record in judged:
        assert len({j["principle"] for j in record["judgements"]}) == 2
        for j in record["judgements"]:
            assert 0.4 <= j["p_a"] <= 0.6 and len(j["thoughts"]) == 2 and all(j["thoughts"])  # lesson 21
    assert any(not 0.4 <= j["p_unclamped"] <= 0.6 for r in judged for j in r["judgements"])
    rows = [json.loads(line) for line in (workdir / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert {r["updates"] for r in rows} == {4.0}  # one epoch of four minibatches, then the KL stopped it
    assert rows[1]["kl_coef"] != rows[0]["kl_coef"]  # lesson 22
    assert set(read(workdir / "evaluate" / "results.json")["models"]) == {"base", "sl_cai", "dpo_cai", "rl_cai"}


def test_eight_devices_write_the_greedy_records_of_one(tmp_path):
    greedy = (
        "--config.stages=('critique',)",
        "--config.critique.sampling.temperature=0",
        "--config.critique.temperature_end=0",
    )
    small = ("--config.data.max_redteam=16", "--config.data.max_helpful=8", "--config.critique.sampling.batch_size=16")
    for name, mesh, devices in (("one", "(1,1,1)", 1), ("eight", "(2,2,2)", 8)):
        done = cai(
            "--config=configs/miniworld.py",
            f"--workdir={tmp_path / name}",
            f"--config.mesh={mesh}",
            *greedy,
            *small,
            devices=devices,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for file in ("revisions.jsonl", "helpful.jsonl"):
        assert (tmp_path / "one" / "critique" / file).read_bytes() == (tmp_path / "eight" / "critique" / file).read_bytes()


def test_pretraining_starts_from_nothing_and_learns(tmp_path):
    done = cai(
        "--config=configs/miniworld_pretrain.py",
        f"--workdir={tmp_path / 'w'}",
        "--config.pretrain.steps=12",
        "--config.pretrain.rows=8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "w" / "pretrain"
    loss = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 6.5 < loss[0] < 8.0 and loss[-1] < 0.75 * loss[0]  # ln 1344 = 7.2 at the start
    committed = ROOT / "cai_jax" / "miniworld"
    for name in ("config.json", "tokenizer.json"):
        assert (folder / "base" / name).read_text() == (committed / "base" / name).read_text(), name
    for made in (folder / "data").iterdir():
        assert made.read_bytes() == (committed / "data" / made.name).read_bytes(), made.name


def test_sigterm_saves_and_exits_with_the_code_launchers_restart_on(tmp_path):
    workdir = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        [process] = kills.start(workdir, (*kills.SMALL, "--config.sft.epochs=200"), log)
        metrics = workdir / "sft" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143, (tmp_path / "log").read_text()[-2000:]
    assert "stopped on request" in (tmp_path / "log").read_text()
    steps = [int(p.name) for p in (workdir / "sft" / "checkpoints").iterdir()]
    assert steps and max(steps) == len(metrics.read_text().splitlines())


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (("--config.sft.epoch=3",), "epochs"),
        (("--config.sft.epochs=many",), "epochs"),
        (("--config.sft.epochs=0",), "--config.sft.epochs=0: wanted"),
        (("--config.stages=('ppo',)",), "reward, which ppo reads"),
        (("--config.mesh=(3,1,1)",), "--config.mesh"),
        (("--config.data.redteam=nowhere.jsonl",), "nowhere.jsonl"),
        (("--config.constitution.path=nowhere.toml",), "nowhere.toml"),
        (("--config.constitution.exclude=('weather',)",), "weather"),
        (("--config.model.path=nowhere",), "nowhere"),
        (("--config.critique.sampling.max_tokens=600",), "max_tokens"),
    ],
)
def test_bad_input_is_named(arguments, wanted, tmp_path):
    done = cai("--config=configs/miniworld.py", f"--workdir={tmp_path / 'w'}", *arguments)
    assert done.returncode != 0
    assert wanted in done.stderr + done.stdout
    assert "Traceback" not in done.stderr or "epoch" in wanted  # flags of an unknown or ill-typed key end inside absl


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=4"])
def test_cai_runs_in_a_process_with_large_pages(given, monkeypatch):
    """Begun anew once, with the arguments it was given; not where its user has set something."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    code = (
        "import os, sys; from cai_jax.__main__ import with_large_pages as f; f(); print(os.environ['GLIBC_TUNABLES'], sys.argv)"
    )
    done = subprocess.run([sys.executable, "-c", code, "a b", "--c"], capture_output=True, text=True)
    assert done.stdout == f"{given or 'glibc.malloc.hugetlb=1'} ['-c', 'a b', '--c']\n", done.stderr
