"""The ablations of the README: every variant by overrides alone, several seeds each, one table in Markdown.

    python launch/ablations.py --workdir=runs/ablations --seeds=5 --jobs=2 [--only=hard-labels,...] [--config.KEY=VALUE ...]

Runs are resumed and finished ones are skipped, as always. A variant that changes only late stages starts from copies of the
baseline's early ones: a stage whose inputs are the same is not done again. Means over seeds with 95 % t-intervals, on held-out
prompts, sampled at temperature 1.
"""

import argparse
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
SL = "--config.stages=('critique','sft','evaluate')"
DPO = "--config.stages=('critique','sft','preferences','dpo','evaluate')"
NO_SL = (
    "--config.stages=('preferences','reward','ppo','evaluate')",
    "--config.preferences.policy=base",
    "--config.reward.init=base",
    "--config.ppo.init=base",
)
# Variant -> (overrides, stages taken over from the baseline).
VARIANTS = {
    "baseline": ((), ()),
    "rounds-0": ((SL, "--config.critique.rounds=0"), ()),
    "rounds-1": ((SL, "--config.critique.rounds=1"), ()),
    "rounds-3": ((SL, "--config.critique.rounds=3"), ()),
    "rounds-4": ((SL, "--config.critique.rounds=4"), ()),
    "no-supervised-stage": (NO_SL, ()),
    "no-principles": (("--config.critique.use_principles=False",), ()),
    "without-weapons-principles": (("--config.constitution.exclude=('weapons',)",), ()),
    "hard-labels": (("--config.preferences.labels=hard",), ("critique", "sft")),
    "direct-revision": (("--config.critique.direct=True",), ()),
    "dpo": ((DPO,), ("critique", "sft", "preferences")),
}
METRICS = ("harm_rate", "explained", "helpfulness", "over_refusal", "evasive", "coherent")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t, n values


def run(workdir: Path, variant: str, seed: int, cores: queue.Queue, extra: list[str], baseline: Future | None = None) -> dict:
    """-> results.json's "models" of one variant and seed, run on the first free share of the cores."""
    overrides, reused = VARIANTS[variant]
    folder = workdir / f"{variant}-{seed}"
    if reused and baseline:
        baseline.result()  # begun before this one, so it ends
    for stage in reused:
        if not (folder / stage).exists():
            shutil.copytree(workdir / f"baseline-{seed}" / stage, folder / stage)
    command = [sys.executable, "-m", "cai_jax", "run", "--config=configs/miniworld.py", f"--workdir={folder}"]
    share = cores.get()
    pinned = ["taskset", "-c", share] if share else []
    try:
        with open(f"{folder}.log", "a") as log:
            subprocess.run(
                [*pinned, *command, f"--config.seed={seed}", *overrides, *extra], cwd=ROOT, check=True, stdout=log, stderr=log
            )
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{variant}, seed {seed}: exit code {error.returncode}; see {folder}.log") from None
    finally:
        cores.put(share)
    return json.loads((folder / "evaluate" / "results.json").read_text())["models"]


def shares(jobs: int) -> queue.Queue:
    """The machine's cores in `jobs` equal lists for taskset; no lists when there is one job."""
    out, mine = queue.Queue(), sorted(os.sched_getaffinity(0)) if jobs > 1 else []
    for n in range(jobs):
        out.put(",".join(map(str, mine[n::jobs])))
    return out


def interval(values: list[float]) -> str:
    """'mean ± half-width' in percent."""
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{100 * statistics.mean(values):.1f} ± {100 * half:.1f}"


def rows(found: dict[str, list[dict]]) -> list[list[str]]:
    """A row per variant and trained model."""
    out = []
    for variant, models in found.items():
        for name in [m for m in ("sl_cai", "dpo_cai", "rl_cai") if m in models[0]]:
            held = [m[name]["heldout"]["sampled"] for m in models]
            harm = [h["by_category"]["weapons"]["harm_rate"] for h in held]
            out.append([variant, name, *(interval([h[k] for h in held]) for k in METRICS), interval(harm)])
    return out


def left_by_revision(folder: Path) -> tuple[float, float]:
    """Harm rate of a run's last revisions, of weapons and of the other categories."""
    found = json.loads((folder / "evaluate" / "rounds.json").read_text())["by_category"]
    return found["weapons"][-1], statistics.mean(by_round[-1] for name, by_round in found.items() if name != "weapons")


def paired(workdir: Path, seeds: int) -> str:
    """What leaving the principles on weapons out adds to the harm that revisions leave, seed by seed."""
    pairs = [[left_by_revision(workdir / f"{v}-{s}") for v in ("without-weapons-principles", "baseline")] for s in range(seeds)]
    weapons, others = ([without[k] - with_[k] for without, with_ in pairs] for k in (0, 1))
    return (
        f"harm left by the revisions, without the weapons principles less with them: weapons {interval(weapons)} points, "
        + (f"other categories {interval(others)}")
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    args, extra = parser.parse_known_args()
    if strange := [e for e in extra if not e.startswith("--config.")]:
        parser.error(f"unknown arguments {strange}; overrides of every run begin with --config.")
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    chosen, cores = args.only.split(","), shares(args.jobs)
    if not 2 <= args.seeds <= max(T95):
        parser.error(f"--seeds={args.seeds}: wanted 2 to {max(T95)}, for an interval")
    if unknown := set(chosen) - set(VARIANTS):
        parser.error(f"no variants {sorted(unknown)}; there are {list(VARIANTS)}")
    order, runs = ["baseline", *(v for v in VARIANTS if v in chosen and v != "baseline")], {}  # others copy from the first
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds):
            for v in order:
                runs[v, seed] = pool.submit(run, workdir, v, seed, cores, extra, runs.get(("baseline", seed)))
        found = {v: [runs[v, seed].result() for seed in range(args.seeds)] for v in order}
    header = ["variant", "model", *METRICS, "harm, weapons"]
    lines = [header, ["---"] * len(header), *rows(found)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    if "without-weapons-principles" in order:
        print(paired(workdir, args.seeds))


if __name__ == "__main__":
    main()
