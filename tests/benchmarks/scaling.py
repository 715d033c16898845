"""What pods would take, by compiling for them: docs/scaling.md.

    python tests/benchmarks/scaling.py                      every model on every topology; an hour on two cores
    python tests/benchmarks/scaling.py --models=Llama-3.2-1B --topologies=v5e:2x4
    --rows=runs/scaling.jsonl    what was compiled; a row that stands there is not compiled again
    --write                      the tables into docs/scaling.md

The work of a chip is the same everywhere: a row of 2,048 tokens in a supervised step, 8 rollouts of up to 384 + 256 tokens in
four PPO updates, 4 slots in decoding.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import table

ROOT = Path(__file__).parent.parent.parent
DOC = ROOT / "docs" / "scaling.md"
# Model -> how many ways its weights are split: along fsdp at most (fewer chips: as many as there are), along model.
SPLIT = {"Llama-3.2-1B": (8, 1), "Llama-3.1-8B": (32, 2), "Qwen3-32B": (32, 4), "Llama-3.1-70B": (64, 4)}
TOPOLOGIES = ("v5e:2x4", "v5e:8x8", "v5e:16x16", "2 x v5e:16x16", "v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:8x8x16")
STEPS = {("critique", "decode"): "decode", ("sft", "train"): "SFT", ("ppo", "train"): "PPO update"}
RING = 8  # devices along fsdp from which the compiler sends weights around while it multiplies, where data is 1
TILE = 128  # of an axis: a part no longer than this is not one of a sum that is scattered
ROWS, ROLLOUTS, MINIBATCHES, SLOTS = 1, 8, 4, 4  # of a chip


class Place(NamedTuple):
    topology: str
    slices: int

    @classmethod
    def of(cls, text: str) -> "Place":
        number, _, topology = text.rpartition(" x ")
        return cls(topology, int(number or 1))

    def __str__(self) -> str:
        return f"{self.slices} x {self.topology}" if self.slices > 1 else self.topology

    def chips(self) -> int:
        n = self.slices
        for size in self.topology.partition(":")[2].split("x"):
            n *= int(size)
        return n


def mesh_of(model: str, chips: int) -> tuple[int, int, int]:
    fsdp, parts = SPLIT[model]
    fsdp = min(fsdp, chips // parts)
    return chips // (fsdp * parts), fsdp, parts


def config(model: str, chips: int):
    """configs/llama3_8b.py with another model and the work of so many chips."""
    spec = importlib.util.spec_from_file_location("llama3_8b", ROOT / "configs" / "llama3_8b.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = module.get_config()
    cfg.stages = ("critique", "sft", "preferences", "reward", "ppo")
    cfg.mesh = mesh_of(model, chips)
    cfg.model.path = f"configs/shapes/{model}"
    cfg.preferences.judge.update(path="", format="plain")
    cfg.critique.few_shot = ""
    cfg.critique.sampling.batch_size = cfg.preferences.sampling.batch_size = SLOTS * chips
    cfg.sft.rows = ROWS * chips
    cfg.ppo.update(batch_size=ROLLOUTS * chips, minibatches=MINIBATCHES)
    cfg.reward.batch_size = cfg.dpo.batch_size = cfg.preferences.score_batch = chips
    return cfg


def compile_all(models: list[str], places: list[Place], file: Path) -> list[dict]:
    """Compiles what `file` does not have, a row at a time. -> all of its rows."""
    import jax

    from cai_jax.ahead import chips, compiled
    from cai_jax.ahead.steps import OF_STAGE
    from cai_jax.checks import resolve
    from cai_jax.sharding import make_mesh

    jax.config.update("jax_platforms", "cpu")
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["model"], r["place"], r["stage"]) for r in rows}
    for place in places:
        for model in models:
            todo = {stage: name for stage, name in STEPS if (model, str(place), stage) not in done}
            if not todo:
                continue
            cfg, devices = resolve(config(model, place.chips())), chips.devices(place.topology, place.slices)
            chip, mesh = chips.CHIPS[place.topology.partition(":")[0]], make_mesh(cfg.mesh, devices, str(place))
            with jax.set_mesh(mesh):
                for stage, name in todo.items():
                    step = next(s for s in OF_STAGE[stage](cfg, mesh) if s.name == name)
                    row = {"model": model, "place": str(place), "mesh": cfg.mesh} | compiled(
                        step, chip, len(devices), place.slices
                    )
                    rows.append(row)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with open(file, "a") as f:
                        f.write(json.dumps(row) + "\n")
                    print(f"{model} on {place}: {stage} {name} in {row['compile_seconds']:.0f} s", file=sys.stderr, flush=True)
    return rows


def cells(row: dict) -> list[str]:
    """A row of the table: where, what it holds, what it sends and what it would take."""
    of = [str(Place.of(row["place"])), STEPS[row["stage"], row["step"]], "x".join(map(str, row["mesh"]))]
    if "memory" not in row:
        return [*of, "refused", *["-"] * 6]
    needs, gib = row["memory"]["needs"], 2**30
    fits = f"{needs / gib:.1f} ({needs / row['hbm']:.0%})"
    if "flops" not in row:
        return [*of, f"**{fits}**", *["-"] * 6]
    sent = sum(c["bytes"] for c in row["collectives"])
    far = sum(c["bytes"] for c in row["collectives"] if c["between_slices"])
    t, formula = row["seconds"], sent_by_formula(row)
    share = (t["links"] + t["network"]) / t["step"]
    out = [
        f"{row['flops'] / 1e12:.3g}",
        f"{sent / 1e9:.3g}",
        f"{sent / formula:.2f}" if formula else "",
        f"{far / 1e9:.3g}" if far else "",
        f"{t['step'] * 1e3:.3g}",
    ]
    return [*of, fits if row["fits"] else f"**{fits}**", *out, f"{share:.0%}"]


def sent_by_formula(row: dict) -> float:
    """Bytes that leave a device in a training step of a dense decoder whose layers are computed again backward; 0 of
    another step. Each line is one of the tables in docs/scaling.md."""
    from cai_jax.ahead.work import weights
    from cai_jax.models import hf

    c = hf.read_config(str(ROOT / "configs" / "shapes" / row["model"]))
    (data, f, m), sizes = row["mesh"], re.search(r"([\d,]+) rows of ([\d,]+)", row["sizes"])
    if not sizes:
        return 0.0
    place, w = Place.of(row["place"]), weights(c)
    d = data // place.slices
    W, E = 2 * sum(w.values()) / m, c.vocab_size * c.width / m  # bytes of the layers; numbers of the vocabulary's matrix
    rows, length = (int(n.replace(",", "")) for n in sizes.groups())
    sums = 2 * (m - 1) / m * rows * length / (data * f) * c.width * 2 * c.num_layers
    nets = 2 if row["stage"] == "ppo" else 1  # policy and value function
    ring = (f + 1) / f if d == 1 and f >= RING else (f - 1) / f
    layers = 2 * ring * W + (f - 1) / f * W + 2 * (d - 1) / d * W / f + 5 * sums
    found = 2 * (d - 1) / d * 4 * E / f  # gradients of what was looked up
    head = (f - 1) / f * (2 + 2 + 4) * E + 2 * (d - 1) / d * 4 * E / f
    if data > 1 and c.width // f <= TILE:
        layers += (f - 1) / f * 2 * (w["o"] + w["down"]) / m
    if place.slices > 1:
        head += 2 * (f - 1) / f * 4 * E
    if data == m == 1 and place.topology.startswith("v5p"):
        head += (f - 1) / f * 4 * E
    return nets * (layers + found) + head


HEADER = ["topology", "step", "mesh", "GiB (of HBM)", "Tflop", "GB sent", "of formula", "between slices", "ms", "sending"]


def report(rows: list[dict], models: list[str]) -> str:
    places = list(map(str, map(Place.of, TOPOLOGIES)))
    out = []
    for model in models:
        mine = [r for r in rows if r["model"] == model and r["place"] in places]
        mine.sort(key=lambda r: (list(STEPS).index((r["stage"], r["step"])), places.index(r["place"])))
        out += [f"### {model}", "", table.markdown(HEADER, [cells(r) for r in mine]), ""]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(SPLIT))
    parser.add_argument("--topologies", type=lambda text: list(map(Place.of, text.split(","))), default=TOPOLOGIES)
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "scaling.jsonl")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = compile_all(args.models, [p if isinstance(p, Place) else Place.of(p) for p in args.topologies], args.rows)
    text = report(rows, args.models)
    print(text)
    if args.write:
        DOC.write_text(table.replace_section(DOC.read_text() if DOC.exists() else "# Scaling", "tables", text))


if __name__ == "__main__":
    main()
