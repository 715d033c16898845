"""Kills a whole run with SIGKILL at random moments and checks that it ends with the same files as a run left alone.

    python tests/kills.py --kills=20 --seed=0 --workdir=runs/kills [--config.section.key=value ...]

Every file is compared byte for byte, but for timing.jsonl (the clock) and checkpoints, whose arrays are compared bit by bit:
the files around them carry the time of writing.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SMALL = (  # a run of every stage in about a minute
    "--config.data.max_redteam=48",
    "--config.data.max_helpful=32",
    "--config.data.max_comparisons=96",
    "--config.critique.rounds=1",
    "--config.critique.sampling.batch_size=16",
    "--config.preferences.sampling.batch_size=16",
    "--config.preferences.score_batch=16",
    "--config.sft.epochs=4",
    "--config.sft.rows=8",
    "--config.sft.checkpoint_every=2",
    "--config.reward.batch_size=8",
    "--config.reward.epochs=1",
    "--config.reward.checkpoint_every=3",
    "--config.ppo.iterations=3",
    "--config.ppo.batch_size=16",
    "--config.ppo.checkpoint_every=1",
    "--config.ppo.evaluate_every=2",
    "--config.evaluate.sampling.batch_size=16",
    "--config.evaluate.limit=16",
)


def command(workdir: Path, overrides) -> list[str]:
    return [sys.executable, "-m", "cai_jax", "run", "--config=configs/miniworld.py", f"--workdir={workdir}", *overrides]


def start(workdir: Path, overrides, log) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command(workdir, overrides), cwd=ROOT, stdout=log, stderr=log, env=environment)


def run(workdir: Path, overrides, kills: int, rng: random.Random, latest: float) -> int:
    """Runs to the end, killing `kills` times, each between 2 (imports take that long) and `latest` seconds after a start.
    -> kills that hit before the run was done."""
    hit = 0
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(workdir.with_suffix(".log"), "a") as log:
        while True:
            process = start(workdir, overrides, log)
            try:
                code = process.wait(timeout=rng.uniform(2, latest) if hit < kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                hit += 1
                continue
            if code:
                raise SystemExit(f"the run ended with exit code {code}; see {workdir.with_suffix('.log')}")
            return hit


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    import jax
    import orbax.checkpoint.experimental.v1 as ocp

    from cai_jax.sharding import path_name

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sharding info not provided")  # read as it was saved: on one device
        tree = ocp.load(path)
    return {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def files(workdir: Path) -> dict[str, Path]:
    return {str(p.relative_to(workdir)): p for p in sorted(workdir.rglob("*")) if p.is_file() and p.name != "timing.jsonl"}


def is_checkpoint(path: Path) -> bool:
    return (path / "_CHECKPOINT_METADATA").exists()


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs; empty when nothing does."""
    found = []
    kept = {
        side: sorted(str(p.relative_to(side)) for p in side.rglob("*") if p.is_dir() and is_checkpoint(p)) for side in (a, b)
    }
    if kept[a] != kept[b]:
        found.append(f"checkpoints {kept[a]} and {kept[b]}")
    for name in kept[a]:
        if name in kept[b]:
            x, y = arrays(a / name), arrays(b / name)
            if x.keys() != y.keys():
                found.append(f"{name}: other arrays")
            found += [f"{name}: {k} differs" for k in x if k in y and x[k].tobytes() != y[k].tobytes()]
    inside = tuple(f"{name}/" for name in kept[a] + kept[b])
    plain = {side: {n: p for n, p in files(side).items() if not n.startswith(inside)} for side in (a, b)}
    found += [f"{n} is only in one run" for n in plain[a].keys() ^ plain[b].keys()]
    both = plain[a].keys() & plain[b].keys()
    return found + [f"{n} differs" for n in sorted(both) if plain[a][n].read_bytes() != plain[b][n].read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/kills"))
    args, overrides = parser.parse_known_args()
    overrides = overrides or list(SMALL)
    whole, killed = args.workdir / "whole", args.workdir / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    run(whole, overrides, 0, random.Random(0), 0.0)
    span = time.monotonic() - began
    hit = run(killed, overrides, args.kills, random.Random(args.seed), 4 + 2 * span / max(args.kills, 1))
    found = differences(whole, killed)
    print(f"{hit} kills over a run of {span:.0f} s; " + ("no difference" if not found else "differences:\n" + "\n".join(found)))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
