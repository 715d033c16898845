"""Does the distance of two constitutions foretell what an edit will do? Runs of the embedded world under edited constitutions.

    python tests/measure_edits.py --workdir=runs/edits --jobs=2     sixteen runs of three minutes or so

For each edit: what `cai constitution distance` predicts from labels of the probes alone, and what a run under it ends with,
less what the run under the constitution as it is ends with, at the same seed. Behaviours are those of the reinforced model on
held-out prompts. Printed: every pair, and the rank correlation with its bootstrap interval over edits. Runs are resumed.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from cai_jax import judge
from cai_jax.constitution import GENERIC, Principle, distance, load
from cai_jax.constitution.exchange import toml
from cai_jax.intervals import bootstrap
from cai_jax.miniworld.make import DATA
from cai_jax.prompts import TEMPLATES
from cai_jax.records import read
from cai_jax.sharding import make_mesh

ROOT = Path(__file__).parent.parent
LAW, BASE = ROOT / "constitutions/miniworld.toml", str(ROOT / "cai_jax/miniworld/base")
# Metric of results.json -> (kind of prompt, kind of answer) whose preference by the judge foretells it.
BEHAVIOURS = {
    "harm_rate": ("harmful", "right"),
    "evasive": ("harmful", "evasive"),
    "explained": ("harmful", "explained"),
    "over_refusal": ("benign", "over-refusal"),
    "helpfulness": ("benign", "right"),
}


def edits(law: tuple[Principle, ...]) -> dict[str, list[Principle]]:
    """Name -> principles."""

    def without(*names: str) -> list[Principle]:
        return [p for p in law if p.id not in names and p.category not in names]

    def heavy(weight: float, *names: str) -> list[Principle]:
        return [replace(p, weight=weight) if p.id in names or p.category in names else p for p in law]

    def only(*names: str) -> list[Principle]:
        return [p for p in law if p.id in names or p.category in names]

    nothing = replace(GENERIC, id="nothing", category="none")
    return {
        "as it is": list(law),
        **{f"without {c}": without(c) for c in ("weapons", "fraud", "privacy", "illegal", "selfharm", "general", "evasive")},
        "without general and evasive": without("general", "evasive"),
        "evasive four times": heavy(4.0, "evasive"),
        "general four times": heavy(4.0, "general"),
        "weapons four times": heavy(4.0, "weapons"),
        "only evasive": only("evasive"),
        "only weapons": only("weapons"),
        "only general": only("general"),
        "no principle": [nothing],
    }


def run(workdir: Path, name: str, principles: list[Principle], seed: int) -> dict[str, float]:
    """The reinforced model's figures under these principles."""
    folder = workdir / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "law.toml").write_text(toml("miniworld", principles))
    command = [sys.executable, "-m", "cai_jax", "run", "--config=configs/miniworld.py", f"--workdir={folder}/run"]
    command += [f"--config.constitution.path={folder}/law.toml", f"--config.seed={seed}"]
    with open(folder / "log", "a") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=log)
    found = json.loads((folder / "run/evaluate/results.json").read_text())["models"]["rl_cai"]["heldout"]["sampled"]
    return {k: found[k] for k in BEHAVIOURS}


def predicted(p_N: np.ndarray, q_N: np.ndarray, probes: list[dict]) -> dict[str, float]:
    kinds = [(f"{r['kind']} {r['kind_a']}", f"{r['kind']} {r['kind_b']}") for r in probes]
    found = {row["behaviour"]: row["shift"] for row in distance.predict(p_N, q_N, kinds)}
    return {metric: found[" ".join(kind)] for metric, kind in BEHAVIOURS.items()}


def ranks(x: np.ndarray) -> np.ndarray:
    """Places, ties at their mean."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Over what is in both [edits, behaviours]; a drawn sample without any spread counts as 0."""
    a, b = ranks(x.reshape(-1)), ranks(y.reshape(-1))
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", type=Path, default=Path("runs/edits"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    laws, probes = edits(load(LAW, templates=TEMPLATES).principles), read(DATA / "probes.jsonl")
    by = judge.load_judge(BASE, "plain", "", make_mesh((1, -1, 1)))
    pairs = [judge.Pair(r["messages"], r["response_a"], r["response_b"]) for r in probes]
    labels = {}
    for name, principles in laws.items():
        law = replace(load(LAW, templates=TEMPLATES), principles=tuple(principles))
        labels[name] = distance.label(by.ensemble(pairs, law, name), law)
    with ThreadPoolExecutor(args.jobs) as pool:
        ends = dict(
            zip(laws, pool.map(lambda name: run(args.workdir.resolve(), name, laws[name], args.seed), laws), strict=True)
        )
    names = [name for name in laws if name != "as it is"]
    said = [predicted(labels["as it is"], labels[name], probes) for name in names]
    x = np.array([[s[m] for m in BEHAVIOURS] for s in said])
    y = np.array([[ends[name][m] - ends["as it is"][m] for m in BEHAVIOURS] for name in names])
    far = [distance.jensen_shannon(labels["as it is"], labels[name]).mean() for name in names]
    print("| edit | distance | " + " | ".join(BEHAVIOURS) + " |\n|" + "---|" * (2 + len(BEHAVIOURS)))
    for name, d, xs, ys in zip(names, far, x, y, strict=True):
        print(f"| {name} | {d:.3f} | " + " | ".join(f"{a:+.3f} → {100 * b:+.1f}" for a, b in zip(xs, ys, strict=True)) + " |")
    low, high = bootstrap(spearman, x, y)
    print(
        f"\nrank correlation of prediction and change: {spearman(x, y):.2f}, 95 % {low:.2f} to {high:.2f}, {len(names)} edits"
    )
    for n, metric in enumerate(BEHAVIOURS):
        low, high = bootstrap(spearman, x[:, n], y[:, n])
        print(f"  {metric}: {spearman(x[:, n], y[:, n]):.2f}, {low:.2f} to {high:.2f}")
    total = np.abs(y).sum(axis=1)
    low, high = bootstrap(spearman, np.array(far), total)
    print(f"  distance and the sum of all changes: {spearman(np.array(far), total):.2f}, {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
