"""The ablations' script: every variant is a config, runs wait for what they copy, intervals are Student's."""

import importlib.util
import queue
import subprocess

import pytest
from test_readme import ROOT, TEXT, parse

from cai_jax.workdir import write_json

spec = importlib.util.spec_from_file_location("ablations", ROOT / "launch" / "ablations.py")
ablations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablations)


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_every_variant_is_a_config(variant):
    overrides, reused = ablations.VARIANTS[variant]
    done = parse("--config=configs/miniworld.py", *overrides)
    assert done.returncode == 0, done.stderr[-500:]
    assert all(not o.startswith(f"--config.{stage}.") for o in overrides for stage in reused)  # what is copied is unchanged


def test_the_readme_shows_the_overrides_that_are_run():
    shown = TEXT.replace('"', "").replace(",'report')", ")")  # the script reads results.json and needs no page
    for overrides, _ in ablations.VARIANTS.values():
        for o in overrides:
            assert o in shown or o.startswith(("--config.critique.rounds=", "--config.stages=('critique'")), o


def test_intervals_are_students():
    assert ablations.interval([0.1, 0.2, 0.3, 0.4, 0.5]) == "30.0 ± 19.6"  # 2.776 * sqrt(0.025 / 5)


def test_a_run_starts_from_copies_on_its_own_cores_and_says_where_it_failed(tmp_path, monkeypatch):
    calls = []

    def fake(command, check, stdout, **_):
        calls.append(command)
        if "--config.seed=1" in command:
            raise subprocess.CalledProcessError(3, command)
        folder = next(c for c in command if c.startswith("--workdir=")).removeprefix("--workdir=")
        (tmp_path / folder / "evaluate").mkdir(parents=True)
        (tmp_path / folder / "evaluate" / "results.json").write_text('{"models": {"base": 1}}')

    monkeypatch.setattr(ablations.subprocess, "run", fake)
    for seed in (0, 1):
        (tmp_path / f"baseline-{seed}" / "critique").mkdir(parents=True)
        (tmp_path / f"baseline-{seed}" / "sft").mkdir()
    cores = queue.Queue()
    cores.put("3")
    assert ablations.run(tmp_path, "hard-labels", 0, cores, ["--config.ppo.iterations=1"]) == {"base": 1}
    assert (tmp_path / "hard-labels-0" / "sft").is_dir()
    assert calls[0][:3] == ["taskset", "-c", "3"] and calls[0][-1] == "--config.ppo.iterations=1"
    with pytest.raises(SystemExit, match=r"hard-labels, seed 1: exit code 3; see .*hard-labels-1.log"):
        ablations.run(tmp_path, "hard-labels", 1, cores, [])
    assert cores.get_nowait() == "3"  # given back after a failure too


def test_what_a_left_out_category_suffers_is_paired_by_seed(tmp_path):
    def run(variant, seed, weapons):
        rates = {"weapons": [1.0, 0.6, weapons], "fraud": [1.0, 0.5, 0.25], "privacy": [1.0, 0.5, 0.35]}
        write_json(tmp_path / f"{variant}-{seed}" / "evaluate" / "rounds.json", {"by_category": rates})

    for seed, (without, with_) in enumerate([(0.75, 0.25), (1.0, 0.5)]):
        run("without-weapons-principles", seed, without)
        run("baseline", seed, with_)
    assert ablations.left_by_revision(tmp_path / "baseline-1") == (0.5, pytest.approx(0.3))
    assert "weapons 50.0 ± 0.0 points, other categories 0.0 ± 0.0" in ablations.paired(tmp_path, 2)
