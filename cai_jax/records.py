"""JSONL: one record a line. Reading checks every line; a journal appends and survives a kill at any byte."""

import codecs
import json
from collections import Counter
from pathlib import Path

from cai_jax.workdir import InputError, write_text


def read(path, required: tuple[str, ...] = ()) -> list[dict]:
    """All records of a file. Raises InputError naming file and line for anything that is not a whole record."""
    path = Path(path)
    if not path.is_file():
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
    write_text(Path(path), "".join(dumps(r) for r in items))


class Journal:
    """Finished pieces of work by key, appended as they finish. After a kill, `done` holds every whole line; a last line cut
    short is dropped from the file, so its work is done again."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = b""
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) != len(data):
                with open(path, "r+b") as f:
                    f.truncate(len(whole))
        self.done = {r["key"]: r for r in map(json.loads, whole.decode("utf-8").split("\n")[:-1])}
        self._file = open(path, "a", encoding="utf-8")

    def add(self, items: list[dict]) -> None:
        """Each item has a unique "key"."""
        self._file.write("".join(dumps(i) for i in items))
        self._file.flush()
        self.done.update({i["key"]: i for i in items})

    def remove(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


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
