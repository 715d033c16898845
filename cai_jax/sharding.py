"""The mesh and how arrays lie on it: one table for parameters and optimizer state, one function for activations.

The mesh is always ("data", "fsdp", "model"): the batch is split over the first two, parameters over the last two.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.errors import InputError

AXES = ("data", "fsdp", "model")
BATCH = ("data", "fsdp")

# Path of a parameter (layers are stacked, so their first axis is L) -> its spec. Optimizer state holds the same paths
# behind a prefix. Exactly one row must match: a new parameter is an error until its row is written.
PARAM_RULES = (
    (r"embed/embedding$", P("model", "fsdp")),  # V D
    (r"layers/attention/(q|k|v)/kernel$", P(None, "fsdp", "model", None)),  # L D N H
    (r"layers/attention/(q|k|v)/bias$", P(None, "model", None)),  # L N H
    (r"layers/attention/o/kernel$", P(None, "model", None, "fsdp")),  # L N H D
    (r"layers/mlp/(gate|up)/kernel$", P(None, "fsdp", "model")),  # L D F
    (r"layers/mlp/down/kernel$", P(None, "model", "fsdp")),  # L F D
    (r"layers/(attention/(q|k|v)|mlp/(gate|up))/lora_a$", P(None, "fsdp", None)),  # L D r
    (r"layers/attention/o/lora_a$", P(None, "model", None, None)),  # L N H r
    (r"layers/mlp/down/lora_a$", P(None, "model", None)),  # L F r
    (r"layers/attention/(q|k|v)/lora_b$", P(None, None, "model", None)),  # L r N H
    (r"layers/mlp/(gate|up)/lora_b$", P(None, None, "model")),  # L r F
    (r"layers/(attention/o|mlp/down)/lora_b$", P(None, None, "fsdp")),  # L r D
    (r"layers/mlp/(gate|up)/bias$", P(None, "model")),  # L F
    (r"layers/(attention/o|mlp/down)/bias$", P(None, None)),  # L D
    (r"layers/(attention/)?\w+_norm/(scale|bias)$", P(None, None)),  # L D
    (r"final_norm/(scale|bias)$", P(None)),  # D
    (r"unembed/kernel$", P("fsdp", "model")),  # D V
    (r"head/kernel$", P(None, None)),  # D 1
    (r"head/bias$", P(None)),  # 1
)


def exact_div(a: int, b: int, what: str) -> int:
    """a / b for a split that must be even. Raises InputError that says what was split."""
    if b <= 0 or a % b:
        raise InputError(f"{what}: {a} cannot be split evenly {b} ways; change one of the two")
    return a // b


def make_mesh(shape: tuple[int, int, int], devices=None, where: str = "this machine") -> jax.sharding.Mesh:
    """A mesh over all devices (or those given, of `where`); one entry of `shape` may be -1. Slices lie along data, so that
    no weights go from one to another. Raises InputError if it does not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = list(shape)
    if len(sizes) != len(AXES) or any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise InputError(f"--config.mesh={tuple(shape)}: wanted three sizes for {AXES}, at most one of them -1")
    if -1 in sizes:
        rest = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = exact_div(len(devices), rest, f"--config.mesh={tuple(shape)} on {len(devices)} devices")
    if int(np.prod(sizes)) != len(devices):
        raise InputError(f"--config.mesh={tuple(shape)} wants {int(np.prod(sizes))} devices, {where} has {len(devices)}")
    if (slices := len({getattr(d, "slice_index", None) for d in devices})) > 1:
        own = exact_div(sizes[0], slices, f"--config.mesh={tuple(shape)}: the data axis over {slices} slices")
        shapes = (own, *sizes[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(*shapes, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def path_name(path) -> str:
    """A key path of a pytree as 'layers/attention/q/kernel'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec_of(name: str, shape: tuple[int, ...]) -> P:
    """The spec of the array at path `name`; scalars are replicated. Raises KeyError on no or several matching rows."""
    if len(shape) == 0:
        return P()
    rows = [(pattern, spec) for pattern, spec in PARAM_RULES if re.search(r"(^|/)" + pattern, name)]
    if len(rows) != 1:
        found = ", ".join(p for p, _ in rows) or "none"
        raise KeyError(f"{name} {shape}: wanted exactly one row of sharding.PARAM_RULES, matched {found}")
    if len(rows[0][1]) != len(shape):
        raise KeyError(f"{name} {shape}: the row {rows[0][0]!r} of sharding.PARAM_RULES is for rank {len(rows[0][1])}")
    return rows[0][1]


def shardings(tree, mesh):
    """The NamedSharding of every array of `tree` (arrays or ShapeDtypeStructs). Raises InputError on uneven splits."""

    def one(path, x):
        name = path_name(path)
        spec = spec_of(name, x.shape)
        for size, axis in zip(x.shape, spec, strict=True):
            if axis is not None:
                exact_div(size, mesh.shape[axis], f"{name} {x.shape} over the mesh axis {axis!r} (--config.mesh)")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def shard_init(init, mesh, *args):
    """`init(*args)`, jitted so that every array is born where it belongs. -> the tree, sharded by PARAM_RULES."""
    out = shardings(jax.eval_shape(init, *args), mesh)
    return jax.jit(init, out_shardings=out)(*args)


def apart_specs(tree, whole: bool):
    """The specs of parameters with their layers apart; `whole`: along fsdp they are put together."""

    def one(path, x):
        name = path_name(path)
        alone = re.sub(r"layers_\d+/", "layers/", name)
        spec = spec_of(alone, (1, *x.shape))[1:] if alone != name else spec_of(name, x.shape)
        return P(*(None if whole and axis == "fsdp" else axis for axis in spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def gather_split(tree):
    """Parameters with their layers apart, whole along fsdp and split along model as before. Without a mesh in scope: `tree`."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, apart_specs(tree, whole=True))


def put(tree, mesh):
    """Host arrays onto the mesh by PARAM_RULES."""
    return jax.tree.map(_spread, tree, shardings(tree, mesh))


def _spread(x, sharding):
    """Values that every process has onto devices, of which each has some."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def replicated(mesh) -> NamedSharding:
    """Whole on every device, as what the host reads must be."""
    return NamedSharding(mesh, P())


def batch_ways(mesh) -> int:
    """How many parts the batch is split in."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch, mesh):
    """Host arrays [B, ...] onto the mesh, B split over the batch axes. Raises InputError when B does not split."""
    ways = batch_ways(mesh)
    for name, x in batch.items():
        exact_div(x.shape[0], ways, f"batch array {name!r} over the mesh axes {BATCH} (--config.mesh)")
    return {name: _spread(x, NamedSharding(mesh, P(BATCH))) for name, x in batch.items()}


def by_part(f):
    """`f` on each part of the batch axes alone; it takes and gives arrays split along them. Without a mesh in scope: `f`."""
    if jax.sharding.get_abstract_mesh().empty:
        return f
    return jax.shard_map(f, in_specs=P(BATCH), out_specs=P(BATCH), axis_names=set(BATCH))


def look_up(table_VD, index_BT):
    """Rows of a table that is split both ways (see PARAM_RULES). -> [B, T, D], B split over the batch axes where that is even.

    Every device finds its part of the width for the rows of all that share its weights, and they exchange what each is to
    have: left to itself XLA sends the whole batch to everybody.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return table_VD[index_BT]
    even = len(index_BT) % batch_ways(mesh) == 0

    def part(table_vd, index_bT):
        index = jax.lax.all_gather(index_bT, "fsdp") if even else index_bT
        at = index - jax.lax.axis_index("model") * len(table_vd)
        mine = (at >= 0) & (at < len(table_vd))
        x = jnp.where(mine[..., None], table_vd[jnp.where(mine, at, 0)], 0)
        if even:
            x = jax.lax.all_to_all(x, "fsdp", 0, x.ndim - 1, tiled=True)[0]
        else:
            x = jax.lax.all_gather(x, "fsdp", axis=x.ndim - 1, tiled=True)
        return jax.lax.psum(x, "model")

    rows = P(BATCH) if even else P()
    return on_parts(part, (P("model", "fsdp"), rows), rows)(table_VD, index_BT)


def on_parts(f, specs, out):
    """`f` on what each device has. Without a mesh of several in scope: `f`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f
    return jax.shard_map(f, in_specs=specs, out_specs=out, check_vma=False)


def everywhere(x):
    """`x` whole on every device. Without a mesh in scope it is `x`."""
    return constrain(x, *[None] * x.ndim)


def constrain(x, *axes):
    """`x` with its axes laid out as named: "batch", "model" or None each. Without a mesh in scope it is `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(BATCH if a == "batch" else a for a in axes)))
