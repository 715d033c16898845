"""What lies in a run's folder, and what may be done with it: a stage begins, is resumed, is skipped, or is refused.

Every stage owns `<workdir>/<stage>/`. `inputs.json` is written when it starts: the configuration it reads and the
fingerprints of the files it reads. `done.json` is written when it ends, with the fingerprints of its outputs. A stage whose
recorded inputs differ from today's is refused with the difference, never silently redone. Files are written beside and renamed.
"""

import fcntl
import hashlib
import importlib.metadata as packages
import json
import os
import signal
import sys
import threading
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what, where, what was wanted and what to change."""


class Stopped(RuntimeError):
    """The run was asked to stop, has saved its state, and ends. Running the same command again goes on."""


_stop = threading.Event()
_locks = []


def stop_on_sigterm() -> None:
    """From now on SIGTERM asks the run to stop at its next safe point."""
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())


def stopping() -> bool:
    return _stop.is_set()


def raise_if_stopping() -> None:
    """A safe point of work that needs no saving of its own. Raises Stopped after SIGTERM."""
    if stopping():
        raise Stopped("stopped on request; everything so far is saved, the same command goes on from here")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file beside its place and renames it: readers see the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path}: cannot be read as JSON ({e}); it is written whole by this program, so restore or delete it"
        ) from e


def digest(path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"missing file: {path}; paths are relative to where the command is run")
    sha = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            sha.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def _flatten(value, prefix: str = "") -> dict:
    if isinstance(value, dict):
        return {k: v for key, sub in value.items() for k, v in _flatten(sub, f"{prefix}{key}.").items()}
    return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}


def difference(old: dict, new: dict) -> list[str]:
    """'key: old -> new' for everything that differs between two nested dicts."""
    old, new = _flatten(old), _flatten(new)
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k, "(absent)") != new.get(k, "(absent)"))
    return [f"{k}: {old.get(k, '(absent)')} -> {new.get(k, '(absent)')}" for k in keys]


def begin(stage: str, workdir: Path, inputs: dict) -> bool:
    """Opens a stage. -> True when it has work to do, False when it is done already.

    `inputs`: what its result depends on. Raises InputError, with the difference, when the folder holds the same stage with
    other inputs.
    """
    folder = workdir / stage
    inputs = json.loads(json.dumps(inputs))
    record = folder / "inputs.json"
    if record.exists():
        changed = difference(read_json(record), inputs)
        if changed and not _holds_work(folder):  # it stopped before it did anything: what it wanted may be changed
            write_json(record, inputs)
        elif changed:
            lines = "\n  ".join(changed)
            raise InputError(
                f"stage {stage!r} in {workdir} was started with other inputs (was -> is):\n  {lines}\n"
                f"give another --workdir, restore the inputs, or delete {folder} and the stages after it to redo them"
            )
    else:
        write_json(record, inputs)
    return not (folder / "done.json").exists()


def _holds_work(folder: Path) -> bool:
    """Whether a stage's folder has more than the record of its inputs: a file that is not empty, in whatever depth."""
    return any(p.is_file() and p.stat().st_size and p.name != "inputs.json" for p in folder.rglob("*"))


def finish(stage: str, workdir: Path, outputs: dict, counts: dict) -> None:
    """Closes a stage: `outputs` maps file names to what identifies them, `counts` is for the reader of the run."""
    write_json(workdir / stage / "done.json", {"outputs": outputs, "counts": counts})


def outputs(stage: str, workdir: Path) -> dict:
    """What a finished stage said of its outputs. Raises InputError when it is not finished."""
    path = workdir / stage / "done.json"
    if not path.exists():
        raise InputError(
            f"stage {stage!r} has not finished in {workdir}; add it to --config.stages before the stage that reads it"
        )
    return read_json(path)["outputs"]


def open_run(workdir: Path) -> None:
    """Makes the run's folder and holds its lock until this process ends. Raises InputError while another process does."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--workdir={workdir}: no folder can be made there ({e.strerror}); give another") from e
    _locks.append(open(workdir / ".lock", "w"))
    try:
        fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"another process is running in {workdir}; wait for it, stop it, or give another --workdir") from e


def record_run(workdir: Path, config: dict) -> None:
    """The resolved configuration, the seed and the versions that this run's files come from."""
    write_json(workdir / "config.json", config)
    names = ("cai_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
    versions = {n: packages.version(n) for n in names if _installed(n)}
    write_json(workdir / "manifest.json", {"python": sys.version.split()[0], "packages": versions, "seed": config["seed"]})


def _installed(name: str) -> bool:
    try:
        packages.version(name)
    except packages.PackageNotFoundError:
        return False
    return True
