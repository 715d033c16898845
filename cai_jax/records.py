"""JSONL: one record a line. Reading checks every line; a journal appends and survives a kill at any byte."""

import codecs
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cai_jax import hosts
from cai_jax.errors import InputError
from cai_jax.files import in_bucket
from cai_jax.workdir import write_text

READERS = 32  # files of a bucket that are read at once


def read(path, required: tuple[str, ...] = ()) -> list[dict]:
    """All records of a file. Raises InputError naming file and line for anything that is not a whole record."""
    path = Path(path) if isinstance(path, str) else path
    if not path.exists() or path.is_dir():
        raise InputError(f"missing file: {path}; paths are relative to where the command is run")
    out = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as e:  # of JSON, or of UTF-8: a file may end inside a character
            why, start = getattr(e, "msg", "not UTF-8"), line[:60].decode("utf-8", "replace")
            raise InputError(f"{path}:{number}: not a JSON record ({why}); is the file truncated? line: {start!r}") from e
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number}: wanted a JSON object, got {type(record).__name__}")
        if missing := [k for k in required if k not in record]:
            raise InputError(f"{path}:{number}: the record lacks {missing[0]!r}; it has {sorted(record)}")
        out.append(record)
    return out


def dumps(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write(path: Path, items) -> None:
    """Records into a file, all or nothing."""
    write_text(path, "".join(dumps(r) for r in items))


class Journal:
    """Finished pieces of work by key, appended as they finish. After a kill, `done` holds every whole line; a last line cut
    short is dropped from the file, so its work is done again."""

    def __init__(self, path: Path):
        self.path = path
        self.done = {r["key"]: r for r in hosts.once(_whole_lines, path)}
        self._file = open(path, "a", encoding="utf-8") if hosts.first() and not in_bucket(path) else None

    def add(self, items: list[dict]) -> None:
        """Each item has a unique "key"."""
        text = "".join(dumps(i) for i in items)
        if self._file:
            self._file.write(text)
            self._file.flush()
        elif items and in_bucket(self.path):
            write_text(self.path.with_name(f"{self.path.name}.{len(self.done):09d}"), text)
        self.done.update({i["key"]: i for i in items})

    def close(self) -> None:
        if self._file:
            self._file.close()

    def remove(self) -> None:
        self.close()
        if hosts.first():
            for part in _parts(self.path):
                part.unlink(missing_ok=True)


def _parts(path: Path) -> list[Path]:
    """The files of a journal: in a bucket one for each addition."""
    return sorted(path.parent.glob(f"{path.name}.*"), key=str) if in_bucket(path) else [path]


def _whole_lines(path: Path) -> list[dict]:
    if in_bucket(path):
        with ThreadPoolExecutor(READERS) as readers:
            texts = readers.map(lambda part: part.read_text(encoding="utf-8"), _parts(path))
            return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with open(path, "r+b") as f:
            f.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]


class Drops:
    """Counts what is left out, by reason, so that kept + dropped always equals what came in."""

    def __init__(self):
        self.reasons = Counter()

    def keep(self, good: bool, reason: str) -> bool:
        """-> `good`, counting `reason` when it is False."""
        if not good:
            self.reasons[reason] += 1
        return good

    def counts(self, given: int, kept: int) -> dict:
        """For done.json. Raises AssertionError when a record vanished uncounted."""
        assert given == kept + self.reasons.total(), f"{given} in, {kept} kept, {dict(self.reasons)} dropped"
        return {"given": given, "kept": kept, "dropped": dict(sorted(self.reasons.items()))}
