"""Work that a kill does not undo: a folder that one process has at a time, what it was begun with, and journals of parts."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

from cai_jax import files, workdir
from cai_jax.errors import InputError, difference
from cai_jax.progress import Progress
from cai_jax.records import dumps

PART = 1 << 22  # letters, of answers times principles, that are judged and saved together


@contextmanager
def alone(out: Path):
    """Holds the folder's lock. Raises InputError while another process does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out}: no folder can be made there ({error.strerror}); give another") from error
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out={out}: another process is at work there; wait for it, or give another") from error
        yield


def begin(out: Path, inputs: dict) -> None:
    """Records what the audit depends on. Raises InputError, with the difference, where another one has work in the folder, or
    where other files are."""
    record, inputs = out / "inputs.json", json.loads(json.dumps(inputs))
    there = [p for p in sorted(out.iterdir()) if p != record and not p.name.startswith(".")]
    work = [p.name for p in there if p.is_dir() or p.stat().st_size]
    if work and not record.exists():
        raise InputError(f"--out={out}: there is {work[0]}, which is of no audit; give another folder")
    if work and (changed := difference(files.read_json(record), inputs)):
        lines = "\n  ".join(changed)
        raise InputError(
            f"--out={out}: another audit was begun there (was -> is):\n  {lines}\ngive another --out, or restore the inputs"
        )
    workdir.write_json(record, inputs)


def parts(sizes: Iterable[int]) -> list[range]:
    """Consecutive numbers in parts, each ended by the one with which its sizes reach PART. What is computed of a part depends
    on its rows by a rounding, so parts must not depend on what was done before."""
    out, begin, held, n = [], 0, 0, 0
    for n, size in enumerate(sizes, 1):
        held += size
        if held >= PART:
            out.append(range(begin, n))
            begin, held = n, 0
    return [*out, range(begin, n)] if begin < n else out


def resumed(path: Path, todo: list[range], work: Callable[[range], list[dict]], name: str) -> int:
    """Writes a line for every number in `todo`, made by `work`, part by part; parts that stand there whole are kept.
    -> how many lines were made."""
    ends, total = _ends(path), todo[-1].stop if todo else 0
    start = max((part.stop for part in todo if part.stop < len(ends)), default=0)
    with open(path, "ab") as f, Progress(name, total, start, "answer") as progress:
        f.truncate(ends[start])
        for part in (part for part in todo if part.start >= start):
            f.write("".join(map(dumps, work(part))).encode())
            f.flush()
            os.fsync(f.fileno())
            progress.update(part.stop)
    return total - start


def _ends(path: Path) -> list[int]:
    """Where each line of a journal ends, up to the first that is no whole record; 0 before all."""
    path.touch()
    ends = [0]
    with open(path, "rb") as f:
        for line in f:
            if not _is_record(line):
                break
            ends.append(ends[-1] + len(line))
    return ends


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict) and line.endswith(b"\n")
    except ValueError:
        return False
