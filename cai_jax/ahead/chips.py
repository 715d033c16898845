"""The chips that a program can be compiled for without having one, and what they can do."""

import os
from typing import NamedTuple

from cai_jax.errors import InputError

GIB = 1024**3


class Chip(NamedTuple):
    """What one device of JAX has: a chip, or half of one on tpu7x. Rates a second."""

    hbm: float  # bytes
    flops: float  # bfloat16
    memory: float  # bytes read or written
    link: float  # bytes one way over one link to a neighbour
    network: float  # bytes one way to other slices: its share of its machine's


ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# cloud.google.com/tpu/docs, the page of each. The network of v4 and tpu7x is taken for that of v5p.
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 50e9, 6.25e9),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 50e9, 3.125e9),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 100e9, 6.25e9),
    "v6e": Chip(32 * GIB, 918e12, 1600e9, 100e9, 12.5e9),
    "tpu7x": Chip(96 * GIB, 1153e12, 3690e9, 100e9, 6.25e9),
}


def devices(topology: str, slices: int = 1) -> list:
    """The devices of `slices` slices such as "v5e:16x16". Raises InputError where there is no such thing, or no compiler."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise InputError(f"--topology={topology}: wanted one of {', '.join(CHIPS)}, a colon and a shape, as in v5e:16x16")
    if slices < 1:
        raise InputError(f"--slices={slices}: wanted at least 1")
    # The compiler asks neither this machine nor its cloud for a TPU, and holds none that another process may want.
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        options = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(f"{name}:{shape}", "tpu", **options).devices
    except Exception as error:  # the plugin's and the compiler's errors are of several kinds
        why = " ".join(str(error).split())
        if "not installed" in why:
            raise InputError("--topology wants the TPU compiler, which needs no TPU: pip install -e '.[tpu]'") from error
        raise InputError(
            f"--topology={topology} --slices={slices}: the TPU compiler knows no such slice: {why:.300}"
        ) from error
