"""What one device reaches of what it can do: decoding against its copy bandwidth, training against its products, PPO by phase.

python tests/benchmarks/accelerator.py   a Llama of 1.2 B with random weights, in bfloat16 on a GPU or TPU
    --small                              a tiny one, to see that everything runs
    --write=FILE                         also into a section of a Markdown file
"""

import argparse
import datetime
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ours
import table
import work
from model import Shape
from worker import Job

from cai_jax.models import LM, compute_dtype
from cai_jax.models.transformer import Transformer, TransformerConfig, init_params
from cai_jax.sharding import make_mesh, shard_init
from cai_jax.slots import Rules, decode, new, ready

RUNS = 5
SHAPE = Shape(width=2048, layers=20, heads=16, mlp=5632)
LARGE = replace(work.FULL, shape=SHAPE, rows=64, prompt=512, new=128, train_rows=8, train_steps=1, train_length=2048)
# Of dense bfloat16 products, from the vendors' data sheets.
SHEET = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12}
SHEET |= {"TPU v6 lite": 918e12}

DEFINITIONS = """Copy: one array to another, bytes read and written. Products: square matrices of the compute dtype, summed in
float32. A decode step reads every weight but the embedding once, and what the cache holds; its share is those bytes a second
over the copy bandwidth. MFU: operations of one supervised step (6 for each weight and token, and causal attention; none for
what is computed again) a second over those of the data sheet, or of the products measured here where there is none. Medians
of {runs} runs after one that compiles."""


def seconds(run) -> float:
    """Median of some runs, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(RUNS):
        start = perf_counter()
        jax.block_until_ready(run())
        times.append(perf_counter() - start)
    return median(times)


def load(sizes: work.Sizes):
    """-> (mesh in scope, a random model of float32 parameters, as training wants them)."""
    s = sizes.shape
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    jax.set_mesh(mesh)
    head_dim = s.width // s.heads
    cfg = TransformerConfig(s.vocab, s.layers, s.width, s.mlp, s.heads, s.heads, head_dim, 4096, tied_embeddings=False)
    dtype = compute_dtype("auto")
    params = shard_init(partial(init_params, Transformer(cfg, dtype)), mesh, jax.random.key(0))
    return mesh, LM(cfg, dtype, params, SimpleNamespace(stop_ids=()))


def rates(small: bool, dtype) -> tuple[float, float]:
    """-> (bytes a second copied, operations a second of products)."""
    x, n = jnp.zeros(2 ** (20 if small else 30), jnp.uint8), 256 if small else 8192
    a = jnp.ones((n, n), dtype)
    copy, multiply = jax.jit(jnp.copy), jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
    return 2 * x.size / seconds(lambda: copy(x)), 2 * n**3 / seconds(lambda: multiply(a, a))


def decode_step(lm: LM, s: work.Sizes, rows: int) -> float:
    """Seconds of one step of `rows` slots behind a prompt, from sampling few tokens and all."""
    net, params = lm.net(unrolled=True), ready(lm).params
    rules = Rules(jnp.array([-1]), jnp.zeros((2, s.shape.vocab), jnp.int8))

    def sample(count: int):
        slots = new(net, rows, s.prompt + s.new, s.new)
        filled = slots._replace(filled_B=slots.filled_B + s.prompt, limit_B=slots.limit_B + count, done_B=slots.filled_B > 0)
        filled = filled._replace(temperature_B=slots.temperature_B + 1)
        return decode(net, params, None, filled, rules, jnp.int32(rows))

    few = s.new // 8
    return (seconds(lambda: sample(s.new)) - seconds(lambda: sample(few))) / (s.new - few)


def runs_of(workload, s: work.Sizes, case: str) -> list[dict]:
    """What a workload of ours.py answers for each run, and its "seconds"."""
    answers = []

    class Turns:
        def repeat(self, run):
            run()
            for _ in range(RUNS):
                start = perf_counter()
                stats = run()
                answers.append(stats | {"seconds": perf_counter() - start})

    workload(Job(Path(), s, case), Turns())
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    s = work.SMALL if args.small else LARGE
    mesh, lm = load(s)
    ours.load = lambda job: (mesh, lm._replace(params=jax.tree.map(jnp.copy, lm.params)))  # training donates them
    kind, size = jax.devices()[0].device_kind, jnp.dtype(lm.dtype).itemsize
    copy, products = rates(args.small, lm.dtype)
    sheet = max((x for x in SHEET if x in kind), key=len, default="")
    peak, of = (SHEET[sheet], "of the data sheet") if sheet else (products, "of the products")
    lines = [["copy", f"{copy / 1e9:.1f} GB/s", ""], [f"products, {lm.dtype}", f"{products / 1e12:.3g} Tflop/s", ""]]
    for rows in sorted({s.rows // 4, s.rows, s.rows * 4}):
        took = decode_step(lm, s, rows)
        read = work.decode_cost(replace(s, rows=rows))[0] / 4 * size
        share = f"{read / took / copy:.0%} of the copy bandwidth".replace("%", " %")
        lines.append([f"decode step, {rows} slots", f"{took * 1e3:.3g} ms, {rows / took:,.0f} tokens/s", share])
    took = median(x["seconds"] for x in runs_of(ours.sft, s, "sft-equal")) / s.train_steps
    lines.append(["SFT step", f"{took * 1e3:.4g} ms", f"MFU {work.step_cost(s) / took / peak:.0%} {of}".replace("%", " %")])
    iterations = runs_of(ours.ppo_iteration, s, "ppo-equal")
    for phase in ("rollout", "score", "update", "seconds"):
        lines.append(
            [f"PPO, {phase}".replace("seconds", "whole iteration"), f"{median(x[phase] for x in iterations):.3g} s", ""]
        )
    sizes = f"SFT: {s.train_rows} rows of {s.train_length}. PPO: {s.rows} rollouts of {s.prompt} + {s.new}, {s.epochs} updates."
    shape = str(s.shape).replace("float32", f"{lm.dtype} (trained: float32)")
    head = [f"## {kind}", f"{datetime.date.today()}. jax {jax.__version__}. {shape}.", DEFINITIONS.format(runs=RUNS), sizes]
    text = "\n\n".join([*head, table.markdown(["", "measured", "share"], lines)])
    print(text)
    if args.write:
        old = args.write.read_text() if args.write.exists() else "# One accelerator\n"
        args.write.write_text(table.replace_section(old, kind, text))


if __name__ == "__main__":
    main()
