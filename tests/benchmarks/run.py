"""Ratios measured side by side: our side and the peers a user would pick, in turns, in one run.

bash tests/benchmarks/setup.sh                       once: the peers' environments
python tests/benchmarks/run.py BENCHMARK             generate mixed critique options logprobs train ppo roofline
    --rounds=5             every contender runs once a round; ratios are taken within a round
    --peers=floor,torch    besides our side; default all: floor, torch (transformers and TRL), tunix
    --envs=.venv-peers     where setup.sh has put them
    --cases=sft-mixed      of a benchmark that has several
    --small                a tiny model, to see that everything runs
    --write                also into docs/benchmarks.md
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import model
import table
import work

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEERS = ("floor", "torch", "tunix")
SCRIPT = {"ours": "ours", "floor": "floor", "torch": "torch_peer", "trl": "trl_peer", "tunix": "tunix_peer"}

# Case -> who runs it: name in the table -> (worker, its workload where that is not the case itself).
CONTENDERS = {
    "generate": {"transformers": "torch", "tunix": "tunix"},
    "mixed": {"transformers": "torch", "transformers, continuous batching": "torch mixed:continuous", "tunix": "tunix"},
    "critique": {
        "ours, nothing shared": "ours critique:apart",
        "transformers": "torch",
        "transformers, prefix cached": "torch critique:cached",
    },
    "options": {"transformers, row by option": "torch", "transformers, context once": "torch options:shared"},
    "logprobs": {"transformers and TRL": "torch"},
    "sft-equal": {"TRL": "trl"},
    "sft-mixed": {"TRL": "trl", "TRL, packing": "trl sft-mixed:packing"},
    "reward-equal": {"TRL": "trl"},
    "reward-mixed": {"TRL": "trl"},
    "dpo-equal": {"TRL": "trl", "TRL, reference in every step": "trl dpo-equal:default"},
    "dpo-mixed": {"TRL": "trl", "TRL, reference in every step": "trl dpo-mixed:default"},
    "ppo-equal": {"TRL": "trl", "tunix": "tunix"},
    "ppo-mixed": {"TRL": "trl"},
    "copy": {},
    "products": {"PyTorch": "torch"},
    "decode": {
        "transformers": "torch",
        "XLA, products alone": "ours decode:products",
        "PyTorch, products alone": "torch decode:products",
    },
}
MACHINE = ("copy", "products")  # which our side has no part in
NO_FLOOR = ("ppo-equal", "ppo-mixed")


class Failed(SystemExit):
    """Ends the run with a message."""


class Worker:
    """A process that waits for its turn."""

    def __init__(self, kind: str, workload: str, args):
        folder, self.log = models(args, workload), args.folder / f"{kind}.{workload.replace(':', '.')}.log"
        command = [python_of(kind, args), str(HERE / f"{SCRIPT[kind]}.py"), workload, f"--folder={folder}"]
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))) if kind in ("ours", "floor") else ""
        env = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(work.cores())}
        env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # as `cai` sets it, for everybody
        env |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(command + ["--small"] * args.small, env=env, text=True, **pipes)

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise Failed(f"{' '.join(self.process.args)} ended early; the end of {self.log}:\n{tail}")
        return json.loads(line)

    def go(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def python_of(kind: str, args) -> str:
    if kind in ("ours", "floor"):
        return sys.executable
    python = args.envs / ("tunix" if kind == "tunix" else "torch") / "bin" / "python"
    if not python.exists():
        raise Failed(f"no {python}: run `bash tests/benchmarks/setup.sh`, name its folder with --envs, or choose --peers=floor")
    return str(python)


def models(args, workload: str) -> Path:
    """The folder of the model that a workload runs, written if it is not there."""
    shape = args.sizes.shape_of(workload)
    folder = args.folder / f"vocab{shape.vocab}-width{shape.width}-layers{shape.layers}"
    model.write(folder, shape)
    return folder


def contenders(case: str, peers: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (worker, workload), ours first."""
    out = {} if case in MACHINE else {"ours": ("ours", case)}
    if case in MACHINE or ("floor" in peers and case not in NO_FLOOR):
        out["floor: plain JAX"] = ("floor", case)
    for name, spec in CONTENDERS[case].items():
        kind, _, workload = spec.partition(" ")
        if kind == "ours" or {"trl": "torch"}.get(kind, kind) in peers:
            out[name] = (kind, workload or case)
    return out


def measure(case: str, args) -> tuple[list[dict], dict]:
    """-> (rounds, each contender -> what its worker answered; the versions of all packages)."""
    versions, rounds = {}, []
    with ExitStack() as stack:
        workers = {}
        for name, (kind, workload) in contenders(case, args.peers).items():
            print(f"{case}: preparing {name}", file=sys.stderr, flush=True)
            workers[name] = Worker(kind, workload, args)
            stack.callback(workers[name].close)
            # One after the other: compiling is work too.
            versions |= {f"{p} {v}": None for p, v in workers[name].answer()["ready"].items()}
        for i in range(args.rounds):
            names = list(workers) if i % 2 else list(workers)[::-1]  # nobody is always first
            rounds.append({name: workers[name].go() for name in names})
            done = ", ".join(f"{name} {rounds[-1][name]['seconds']:.3g} s" for name in workers)
            print(f"{case}: round {i + 1} of {args.rounds}: {done}", file=sys.stderr, flush=True)
    return [{name: r[name] for name in workers} for r in rounds], versions


def machine() -> str:
    """Processor, cores, memory, and whether something else was running."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    size = f"{work.cores()} cores, {memory:.0f} GiB"
    return f"{cpu}, {size}, {platform.system()}, large pages, load {os.getloadavg()[0]:.1f} before the run"


def roofline(results: dict[str, list[dict]], s: work.Sizes) -> str:
    """What the machine does, and the shares of it that a decoding and a training step reach."""

    def best(case, field):
        return max(answer[field] / answer["seconds"] for r in results[case] for answer in r.values())

    copy, products = best("copy", "bytes"), best("products", "operations")
    bytes_read, operations = work.decode_cost(s)
    least = {"decode": max(bytes_read / copy, operations / products), "sft-equal": work.step_cost(s) / products}
    rows = [
        ["copy bandwidth", f"{copy / 1e9:.1f} GB/s", ""],
        ["float32 products", f"{products / 1e9:.0f} Gflop/s", ""],
        ["one decoding step, least", f"{least['decode'] * 1e3:.1f} ms", ""],
        ["one training step, least", f"{least['sft-equal'] * 1e3:.0f} ms", ""],
    ]
    for case in ("decode", "sft-equal"):
        for name in results[case][0]:
            times = sorted(r[name].get("step", r[name]["seconds"] / s.train_steps) for r in results[case])
            seconds = times[len(times) // 2]
            what = {"decode": "decoding", "sft-equal": "training"}[case]
            rows.append([f"{name}, one {what} step", f"{seconds * 1e3:.1f} ms", f"{100 * least[case] / seconds:.0f} %"])
    return table.markdown(["", "measured", "share of what the machine allows"], rows)


def report(results: dict[str, list[dict]], versions: dict, before: str, args) -> str:
    """The section of one benchmark, as Markdown."""
    s, name = args.sizes, args.benchmark
    lines = [f"## {name}", "", f"{args.date}. {before}. {', '.join(sorted(versions))}.", ""]
    shapes = dict.fromkeys(str(s.shape_of(case)) for case in results if case not in MACHINE)
    lines += [f"Model: {shape}." for shape in shapes]
    lines += [f"{args.rounds} rounds in turns; ratios are medians of the rounds' (least to most): above 1, ours is faster.", ""]
    if name == "roofline":
        lines += [work.definition(case, s) for case in results] + ["", roofline(results, s)]
        return "\n".join(lines) + "\n"
    for case, rounds in results.items():
        lines += [f"### {case}"] * (len(results) > 1) + [work.definition(case, s), ""]
        lines += [table.markdown(table.head(rounds), table.rows(rounds)), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=work.CASES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=lambda text: [p for p in text.split(",") if p], default=list(PEERS))
    parser.add_argument("--envs", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--cases", type=lambda text: text.split(","))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmarks", help="models and logs of workers")
    parser.add_argument("--write", type=Path, nargs="?", const=ROOT / "docs" / "benchmarks.md", help="a Markdown file")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    args = parser.parse_args()
    args.sizes = work.SMALL if args.small else work.FULL
    cases = args.cases or work.CASES[args.benchmark]
    if unknown := [p for p in args.peers if p not in PEERS] + [c for c in cases if c not in work.CASES[args.benchmark]]:
        parser.error(
            f"unknown: {', '.join(unknown)}; peers are {', '.join(PEERS)}, cases {', '.join(work.CASES[args.benchmark])}"
        )
    for kind, _ in (c for case in cases for c in contenders(case, args.peers).values()):
        python_of(kind, args)  # before anything runs for minutes
    args.folder.mkdir(parents=True, exist_ok=True)
    results, versions, before = {}, {}, machine()
    for case in cases:
        results[case], found = measure(case, args)
        versions |= found
    text = report(results, versions, before, args)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        old = args.write.read_text() if args.write.exists() else "# Benchmarks\n"
        args.write.write_text(table.replace_section(old, args.benchmark, text))


if __name__ == "__main__":
    main()
