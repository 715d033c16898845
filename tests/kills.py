"""Kills a whole run with SIGKILL at random moments and checks that it ends with the same files as a run left alone.

    python tests/kills.py --kills=20 --seed=0 --workdir=runs/kills [--config.section.key=value ...]
    python tests/kills.py --layouts=2x4,1x8,4x2

Every file is compared byte for byte, but for timing.jsonl (the clock) and checkpoints, whose arrays are compared bit by bit:
the files around them carry the time of writing.

--layouts: processes x devices. The run begins as the first of them, and goes on as the next one after each kill, which hits one
of its processes; the others must end by themselves. The run left alone is one process with as many devices. Sums between
processes have another order, so numbers are compared to TOLERANCE there, records and everything else still byte for byte.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
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


TOLERANCE = 1e-4  # of a number's size, or of an array's largest, after a run of SMALL; 2e-5 were seen
ENDS = 120  # seconds in which the others must see that a process is gone


def command(workdir: Path, overrides) -> list[str]:
    return [sys.executable, "-m", "cai_jax", "run", "--config=configs/miniworld.py", f"--workdir={workdir}", *overrides]


def start(workdir: Path, overrides, log, layout=(1, 0)) -> list[subprocess.Popen]:
    """A run as `layout`, (processes, devices of each; 0: as many as there are)."""
    n, devices = layout
    flags = f"--xla_force_host_platform_device_count={devices}" if devices else ""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        several = [f"--coordinator=127.0.0.1:{s.getsockname()[1]}", f"--processes={n}"] if n > 1 else []
    commands = [command(workdir, [*overrides, *several, *([f"--process={i}"] if n > 1 else [])]) for i in range(n)]
    return [subprocess.Popen(c, cwd=ROOT, stdout=log, stderr=log, env=environment) for c in commands]


def run(workdir: Path, overrides, kills: int, rng: random.Random, latest: float, layouts=((1, 0),)) -> int:
    """Runs to the end, killing `kills` times, each between 2 (imports take that long) and `latest` seconds after a start.
    -> kills that hit before the run was done."""
    hit = 0
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with open(workdir.with_suffix(".log"), "a") as log:
        while True:
            processes = start(workdir, overrides, log, layouts[hit % len(layouts)])
            victim = rng.choice(processes)
            try:
                victim.wait(timeout=rng.uniform(2, latest) if hit < kills else None)
            except subprocess.TimeoutExpired:
                victim.send_signal(signal.SIGKILL)
                try:
                    codes = [p.wait(timeout=ENDS) for p in processes]
                except subprocess.TimeoutExpired as e:
                    for p in processes:
                        p.kill()
                    raise SystemExit(f"{ENDS} s after a process was killed another still runs; see {log.name}") from e
                if {2, 143} & set(codes):
                    raise SystemExit(f"a process was killed, and the codes are {codes}; see {log.name}") from None
                hit += 1
                continue
            if any(codes := [p.wait() for p in processes]):
                raise SystemExit(f"the run ended with exit codes {codes}; see {log.name}")
            return hit


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, whatever devices it was saved from."""
    import jax
    import orbax.checkpoint.experimental.v1 as ocp

    from cai_jax.sharding import path_name

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = ocp.metadata(path).metadata
    tree = ocp.load(path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved))
    return {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def files(workdir: Path) -> dict[str, Path]:
    return {str(p.relative_to(workdir)): p for p in sorted(workdir.rglob("*")) if p.is_file() and p.name != "timing.jsonl"}


def is_checkpoint(path: Path) -> bool:
    return (path / "_CHECKPOINT_METADATA").exists()


def close(a, b, tolerance: float) -> bool:
    """Whether two JSON values are the same, but for numbers, and for fingerprints of arrays."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance * max(1.0, abs(a))
    fingerprints = all(isinstance(x, str) and len(x) == 64 and set(x) <= set("0123456789abcdef") for x in (a, b))
    return a == b or fingerprints


def same(name: str, a: bytes, b: bytes, tolerance: float) -> bool:
    """Whether two files are; to a `tolerance`, those with numbers that training made."""
    if not tolerance or a == b:
        return a == b
    if name.endswith((".png", ".html")):  # pictures and tables of such numbers
        return True
    if name.endswith(".jsonl"):
        a, b = (b"[%s]" % b",".join(x.splitlines()) for x in (a, b))
    return close(json.loads(a), json.loads(b), tolerance)


def differences(a: Path, b: Path, tolerance: float = 0.0) -> list[str]:
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
            for k in x.keys() & y.keys():
                off = np.abs(x[k].astype(np.float64) - y[k].astype(np.float64)).max() / max(1e-3, np.abs(x[k]).max())
                if x[k].tobytes() != y[k].tobytes() and not off <= tolerance:
                    found.append(f"{name}: {k} differs by {off:.2g} of its largest")
    inside = tuple(f"{name}/" for name in kept[a] + kept[b])
    plain = {side: {n: p for n, p in files(side).items() if not n.startswith(inside)} for side in (a, b)}
    found += [f"{n} is only in one run" for n in plain[a].keys() ^ plain[b].keys()]
    both = sorted(plain[a].keys() & plain[b].keys())
    return found + [f"{n} differs" for n in both if not same(n, plain[a][n].read_bytes(), plain[b][n].read_bytes(), tolerance)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/kills"))
    parser.add_argument("--layouts", type=lambda x: [tuple(map(int, y.split("x"))) for y in x.split(",")], default=[(1, 0)])
    args, overrides = parser.parse_known_args()
    overrides = overrides or list(SMALL)
    whole, killed = args.workdir / "whole", args.workdir / "killed"
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    run(whole, overrides, 0, random.Random(0), 0.0, [(1, args.layouts[0][0] * args.layouts[0][1])])
    span = time.monotonic() - began
    times = 8 if len(args.layouts) > 1 else 2  # several compile for longer than one, and should sometimes get on
    hit = run(killed, overrides, args.kills, random.Random(args.seed), 4 + times * span / max(args.kills, 1), args.layouts)
    found = differences(whole, killed, TOLERANCE if len(args.layouts) > 1 else 0.0)
    print(f"{hit} kills over a run of {span:.0f} s; " + ("no difference" if not found else "differences:\n" + "\n".join(found)))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
