"""What importing a checkpoint costs in host memory: a random Llama of some size, loaded onto simulated devices.

    python tests/measure_import.py [--gigabytes=1.5] [--mesh=1,4,2] [--folder=DIR] [--torch]

The folder is written shard by shard, bfloat16, and loaded as bfloat16 by a fresh process. The memory of simulated devices is
the host's, so the parameters themselves are one file's size of what is measured, and one more for each further entry of the
mesh's first axis, which holds copies. Linux only: the peak is the kernel's own (VmHWM), which counts no parent and misses no
moment.

--torch: as where PyTorch is installed, which transformers then imports to read a config.json. cai_jax does not ask for it, so
the figures are without it unless one does.

Measured on two cores, files in the cache of the disk: 1,487 MB onto eight devices in 2 to 3 s, with a peak of 1.23 times that
(1.07 over the process before); with --torch 1.41 times; --mesh=2,2,2, every parameter twice, 2.26 times.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MESH = (1, 4, 2)
SHARDS = 6  # files of a checkpoint


def write(folder: Path, gigabytes: float) -> None:
    """A random Llama of about that size with an index; no more than one shard is in memory."""
    import jax
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from cai_jax.models import families, hf
    from cai_jax.models.transformer import Transformer, TransformerConfig, init_params
    from cai_jax.sharding import path_name
    from cai_jax.workdir import write_json

    width = 256 * max(1, round(7 * (gigabytes / 1.5) ** (1 / 3)))  # 0.7e9 parameters have 1792
    sizes = {"vocab_size": 16 * width, "width": width, "mlp_width": 5 * width // 2, "max_length": 2048}
    sizes |= {"num_heads": width // 64, "num_kv_heads": width // 128, "head_dim": 64, "tied_embeddings": False}
    layers = max(1, round((gigabytes * 1e9 / 2 - 32 * width**2) / (10.5 * width**2)))
    cfg = TransformerConfig(num_layers=layers, **sizes)
    shapes = jax.eval_shape(lambda: init_params(Transformer(cfg), jax.random.key(0)))
    names, wanted = families.tensors("llama"), []
    for key_path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        theirs, kind = names[path_name(key_path)]
        stacked = "{i}" in theirs
        shape = hf.their_shape(kind, x.shape[1:] if stacked else x.shape, cfg.vocab_size)
        wanted += [(theirs.replace("{i}", str(i)), shape) for i in range(layers if stacked else 1)]

    rng, index, shard = np.random.default_rng(0), {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, shape) in enumerate(wanted, 1):
        shard[name] = rng.integers(0x3C00, 0x3E00, shape, np.uint16).view(ml_dtypes.bfloat16)  # from 1/128 to 1/8
        if sum(x.nbytes for x in shard.values()) > gigabytes * 1e9 / SHARDS or n == len(wanted):
            file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard.clear()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    hf.write_config(cfg, str(folder), 1, 0)


def memory(what: str) -> int:
    """Of this process in bytes: "VmRSS" now, "VmHWM" at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def load(folder: Path, mesh: tuple[int, ...], torch: bool) -> dict[str, float]:
    """Loads the folder in this process. -> bytes, and seconds."""
    if not torch:
        sys.modules["torch"] = None  # transformers then finds none
    import jax
    import jax.numpy as jnp

    from cai_jax.models import hf
    from cai_jax.sharding import make_mesh

    on = make_mesh(mesh)
    jnp.zeros(8).block_until_ready()
    hf.read_config(str(folder))  # imports transformers
    start, since = memory("VmRSS"), time.monotonic()
    params = jax.block_until_ready(hf.load(str(folder), on, jnp.bfloat16))
    seconds, peak = time.monotonic() - since, memory("VmHWM")
    devices = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    file = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return {"file": file, "devices": devices, "start": start, "peak": peak, "seconds": seconds}


def measure(folder: Path, mesh: tuple[int, ...] = MESH, torch: bool = False) -> dict[str, float]:
    """`load` in a fresh process."""
    code = (
        f"import json, pathlib, measure_import as m; print(json.dumps(m.load(pathlib.Path({str(folder)!r}), {mesh}, {torch})))"
    )
    here = Path(__file__).parent
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={math.prod(mesh)}"}
    flags["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--mesh", type=lambda s: tuple(map(int, s.split(","))), default=MESH, help="data,fsdp,model")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is written if it is not there; kept")
    parser.add_argument("--torch", action="store_true", help="leave PyTorch to be found")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "checkpoint"
        if not (folder / "config.json").is_file():
            write(folder, args.gigabytes)
        m = measure(folder, args.mesh, args.torch)
    print(f"{m['file'] / 1e6:.0f} MB of safetensors, mesh {args.mesh}: loaded in {m['seconds']:.1f} s")
    rows = {"peak": m["peak"], "  the process before": m["start"], "  over that": m["peak"] - m["start"]}
    rows |= {"    of it on the devices": m["devices"]}
    for name, size in rows.items():
        print(f"{name:26s}{size / 1e6:8.0f} MB{size / m['file']:8.2f} of the files")


if __name__ == "__main__":
    main()
