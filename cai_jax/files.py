"""Files, in a folder or in a bucket: what is read from them, and that they are written whole."""

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

from cai_jax.errors import InputError


def folder_of(text: str):
    """A run's folder: a Path, or what is used like one and lies in a bucket, gs://BUCKET/FOLDER."""
    if "://" not in text:
        return Path(text)
    if not text.startswith("gs://"):
        raise InputError(f"--workdir={text}: wanted a folder, or gs://BUCKET/FOLDER")
    if not find_spec("gcsfs"):
        raise InputError(f"--workdir={text}: buckets want gcsfs, which is not installed: pip install -e '.[gcs]'")
    from etils import epath

    return epath.Path(text)


def in_bucket(path) -> bool:
    """Whether a file lies where files appear whole, are not locked and do not grow."""
    return not isinstance(path, Path)


def put(path: Path, data: bytes) -> None:
    """Writes a whole file beside its place and renames it: readers see the old one or the new, never a part. A link stays one,
    a mode stays. Raises InputError for what is there and is no file, such as a folder or a device."""
    if in_bucket(path):
        path.write_bytes(data)
        return
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: there is something that is no file; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            os.chmod(beside, path.stat().st_mode)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(
            f"{path}: cannot be read as JSON ({e}); it is written whole by this program, so restore or delete it"
        ) from e


def digest(path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files."""
    path = Path(path) if isinstance(path, str) else path
    if not path.exists():
        raise InputError(f"missing file: {path}; paths are relative to where the command is run")
    sha = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            sha.update(str(file.relative_to(path)).encode())
        with file.open("rb") as f:
            while block := f.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()
