"""`cai compile`: every jitted step of a configuration, compiled for TPUs on a machine without one, and what each would take.

The estimate of a step's time is a roofline (Williams et al. 2009) with nothing hidden behind anything else: its products at
the chip's peak or its memory traffic, whichever takes longer, and after it what it sends, over one ring of two links, or
between slices over the network that the devices of a machine share.
"""

import re
import time
from pathlib import Path
from typing import Any

from cai_jax.ahead import chips, cost
from cai_jax.config import Config
from cai_jax.errors import InputError
from cai_jax.progress import say

SHAPES = Path("configs/shapes")  # config.json of models, by name
SPARE = 0.1  # of the memory, below which a step that fits is told to be close
LARGER = {  # what to change, by what a step holds most of: its arguments or what it makes on its way
    "arguments": "split the weights more ways (the last two of --config.mesh), train adapters (--config.lora.rank), or take "
    "more or larger chips",
    "temporaries": {
        "train": "--config.model.remat=full, more --config.{stage}.microbatches (--config.ppo.minibatches), or a smaller batch",
        "roll out": "a smaller --config.ppo.batch_size, or --config.ppo.sampling.gather=False",
        "score options": "a smaller --config.preferences.score_batch",
        "": "a smaller --config.{stage}.sampling.batch_size, --config.{stage}.sampling.cache=int8 or .gather=False",
    },
}


def compiled(step, chip: chips.Chip, devices: int, slices: int) -> dict[str, Any]:
    """What the compiler makes of a step, all of it of one device. "memory" in bytes, of
    which there is "needs" alone where that is too much; "error" instead, where the compiler refuses the step otherwise."""
    began = time.monotonic()
    row = {"stage": step.stage, "step": step.name, "sizes": step.sizes, "hbm": chip.hbm}
    lowered = step.lower()
    try:
        program = lowered.compile()
    except Exception as error:  # of the compiler, which names no class of its own
        row |= {"fits": False, "compile_seconds": time.monotonic() - began}
        if needs := re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMG])", str(error)):
            return row | {"memory": {"needs": float(needs[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[needs[2]]}}
        return row | {"error": " ".join(str(error).split())}
    m = program.memory_analysis()
    memory = {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "output": m.output_size_in_bytes,
        "aliased": m.alias_size_in_bytes,
        "program": m.generated_code_size_in_bytes,
    }
    memory["needs"] = sum(memory.values()) - 2 * memory["aliased"]
    found = cost.cost(program.as_text(), devices, slices, step.loops)
    sent = {far: sum(n for (_, f), n in found.sent.items() if f == far) for far in (False, True)}
    seconds = {
        "products": found.flops / chip.flops,
        "memory": found.bytes / chip.memory,
        "links": sent[False] / (2 * chip.link),
        "network": sent[True] / chip.network,
    }
    total = max(seconds["products"], seconds["memory"]) + seconds["links"] + seconds["network"]
    return row | {
        "fits": memory["needs"] <= chip.hbm,
        "memory": memory,
        "flops": found.flops,
        "flops_by_formula": step.work.flops / devices,
        "bytes": found.bytes,
        "collectives": [
            {"kind": kind, "between_slices": far, "bytes": n, "calls": found.calls[kind, far]}
            for (kind, far), n in sorted(found.sent.items())
        ],
        "compile_seconds": time.monotonic() - began,
        "seconds": seconds | {"step": total},
    }


def warning(row: dict[str, Any]) -> str:
    """What is wrong with a step and what to change; "": nothing is."""
    if "error" in row:
        where = f"{row['stage']}, {row['step']} ({row['sizes']})"
        return f"{where} is refused. Change: the mesh (--config.mesh) or the topology. The compiler: {row['error']:.400}"
    needs, hbm = row["memory"]["needs"], row["hbm"]
    if needs <= (1 - SPARE) * hbm:
        return ""
    fit = f"fits, with {1 - needs / hbm:.0%} to spare" if row["fits"] else "does not fit"
    where = f"{row['stage']}, {row['step']} ({row['sizes']}) {fit}: {needs / chips.GIB:.1f} of {hbm / chips.GIB:.0f} GiB"
    return f"{where}. Change: {_change(row)}"


def _change(row: dict[str, Any]) -> str:
    m = row["memory"]
    if m.get("arguments", 0) > m.get("temporaries", 0):
        return LARGER["arguments"]
    found = LARGER["temporaries"]
    return found.get(row["step"], found[""]).format(stage=row["stage"])


HEADER = ["stage", "step", "GiB", "of HBM", "Tflop", "of formula", "GB moved", "GB sent", "ms", "sending", "compiled in"]


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    seconds = f"{row['compile_seconds']:.0f} s"
    if "error" in row:
        return [row["stage"], row["step"], *["-"] * 8, seconds]
    needs = row["memory"]["needs"]
    out = [row["stage"], row["step"], f"{needs / chips.GIB:.2f}", f"{needs / row['hbm']:.0%}"]
    if "flops" in row:
        t, sent = row["seconds"], sum(c["bytes"] for c in row["collectives"])
        out += [f"{row['flops'] / 1e12:.4g}", f"{row['flops'] / row['flops_by_formula']:.3f}", f"{row['bytes'] / 1e9:.3g}"]
        out += [f"{sent / 1e9:.3g}", f"{t['step'] * 1e3:.3g}", f"{(t['links'] + t['network']) / t['step']:.0%}"]
    else:
        out += ["-"] * 6
    return [*out, seconds]


def local(path: str, flag: str) -> str:
    """The folder of a model's config.json, which is all that is read of it: `path`, what configs/shapes has of its size, or
    that file from the hub. Raises InputError when there is none."""
    name = re.sub(r"@.*|-(Instruct|it)(@.*)?$", "", path.rpartition("/")[2])
    if not path or Path(path).exists():
        return path
    if (SHAPES / name / "config.json").is_file():
        return str(SHAPES / name)
    from huggingface_hub import hf_hub_download

    name, _, revision = path.partition("@")
    try:
        return str(Path(hf_hub_download(name, "config.json", revision=revision or None)).parent)
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors are kinds of these
        why = " ".join(str(error).split())
        raise InputError(
            f"--config.{flag}.path={path}: no such folder here, no {SHAPES / name}, "
            f"and the hub gives no config.json: {why:.300}"
        ) from error


def rehearse(cfg: Config, topology: str, slices: int = 1) -> list[dict[str, Any]]:
    """Every step of `cfg` on a topology. -> see `compiled`, in order. Raises InputError where it cannot be."""
    import jax

    from cai_jax import checks
    from cai_jax.ahead.steps import OF_STAGE, steps
    from cai_jax.sharding import make_mesh

    jax.config.update("jax_platforms", "cpu")  # the machine's own TPU, if it has one, is left alone
    devices = chips.devices(topology, slices)
    mesh = make_mesh(cfg.mesh, devices, f"{slices} x {topology}" if slices > 1 else topology)
    checks.check_batches(cfg, mesh.shape["data"] * mesh.shape["fsdp"])
    chip, rows = chips.CHIPS[topology.partition(":")[0]], []
    with jax.set_mesh(mesh):
        if not (todo := steps(cfg, mesh)):
            raise InputError(f"--config.stages={cfg.stages}: none of them is compiled ahead; wanted {', '.join(OF_STAGE)}")
        for i, step in enumerate(todo, 1):
            say(f"compiling {step.stage}, {step.name} ({i} of {len(todo)}): {step.sizes}")
            rows.append(compiled(step, chip, len(devices), slices))
    return rows
