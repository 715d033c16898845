"""Saving and restoring training state. The only file that imports orbax.

A checkpoint is committed by renaming its folder, so a kill in the middle of a write leaves the one before. It is restored onto
an abstract tree with the *target* shardings, so it moves between meshes.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from cai_jax import hosts
from cai_jax.errors import InputError
from cai_jax.files import in_bucket
from cai_jax.sharding import path_name


def steps(folder: Path) -> list[int]:
    """Committed steps in a folder, ascending."""
    return hosts.once(_steps, folder)


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in _folders(folder) if _committed(p))


def _folders(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*") if p.is_dir()] if folder.exists() else []


def _committed(path: Path) -> bool:
    """Of a checkpoint: by its name, which is its last change, or in a bucket by a file that is written last."""
    return path.name.isdigit() and (not in_bucket(path) or (path / "commit_success.txt").exists())


def _absolute(path: Path) -> Path:
    return path if in_bucket(path) else path.resolve()


def _remove(folder: Path, unwanted: Callable[[Path], bool]) -> None:
    for path in filter(unwanted, _folders(folder)):
        path.rmtree() if in_bucket(path) else shutil.rmtree(path)


class Saver:
    """Saves in the background, one at a time, and keeps the newest checkpoint only. `close` waits for the last one."""

    def __init__(self, folder: Path):
        self.folder = _absolute(folder)
        self.pending = None
        hosts.once(_remove, self.folder, lambda path: not _committed(path))  # writes that a kill cut short

    def save(self, step: int, state) -> None:
        """`state` may be donated or changed as soon as this returns."""
        self.wait()
        if step not in steps(self.folder):
            self.pending = ocp.save_async(self.folder / str(step), state)

    def wait(self) -> None:
        """Returns when the save in flight is committed, and removes the ones before it."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
        found = steps(self.folder)
        hosts.once(_remove, self.folder, lambda path: _committed(path) and int(path.name) < found[-1])

    close = wait


def restore(folder: Path, abstract, step: int | None = None):
    """The state at `step` (default: the newest) onto `abstract`, ShapeDtypeStructs with shardings.

    Raises InputError when there is none, or when it is of another model.
    """
    found = steps(folder)
    if not found or (step is not None and step not in found):
        raise InputError(f"no checkpoint {'' if step is None else step} in {folder}; there are {found}")
    return _load(_absolute(folder) / str(found[-1] if step is None else step), abstract)


def _load(path: Path, abstract):
    leaves = jax.tree_util.tree_flatten_with_path
    stored = {path_name(p): x.shape for p, x in leaves(ocp.metadata(path).metadata)[0] if hasattr(x, "shape")}
    for name, shape in ((path_name(p), x.shape) for p, x in leaves(abstract)[0]):
        if stored.get(name, shape) != shape:  # seen before reading: orbax would not name the array
            found = f"{name} has shape {stored[name]}, wanted {shape}"
            raise InputError(f"{path} is a checkpoint of another model than the configuration describes: {found}")
    try:
        return ocp.load(path, abstract)
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is a checkpoint of another model or optimizer than the configuration describes: {e}") from e


def remove(folder: Path) -> None:
    """Every checkpoint in a folder, and the folder."""
    hosts.once(_remove, folder.parent, lambda path: path.name == folder.name)


def save_model(folder: Path, params) -> None:
    """The parameters a stage ends with, alone, for the stages that read them."""
    ocp.save(_absolute(folder) / "model", params, overwrite=True)


def load_model(folder: Path, abstract):
    """What `save_model` wrote, onto `abstract`. Raises InputError when it is missing or of another model."""
    path = _absolute(folder) / "model"
    if not path.is_dir():
        raise InputError(f"no model at {path}; has the stage {folder.name!r} finished?")
    return _load(path, abstract)


@jax.jit
def _checksums(leaves):
    def one(x):
        bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16}[x.dtype.itemsize]).astype(jnp.uint32)
        x = bits + jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape) * jnp.uint32(2654435761)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # mixed (MurmurHash3), or sums would miss swaps and signs
            x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
        return jnp.sum(x ^ (x >> jnp.uint32(16)), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def fingerprint(tree) -> str:
    """sha256 of a checksum of every array, value and place mixed: the same on every mesh, computed where the arrays lie."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = jax.device_get(_checksums([x for _, x in leaves]))
    text = "\n".join(f"{path_name(p)} {x.shape} {x.dtype} {int(s)}" for (p, x), s in zip(leaves, sums, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()
