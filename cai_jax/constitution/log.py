"""The change log of a constitution: who changed what and why, in a chain of hashes, FILE.log.jsonl beside FILE.toml.

Each entry is a line of JSON and holds the hash of the one before it, so none can be edited, removed or moved without those
behind it saying so. What a chain alone cannot show is that its end was cut off, or all of it written anew: a run keeps the
entry it was made with (manifest.json), which `verify` looks for.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType

from cai_jax import files
from cai_jax.constitution import Constitution, Principle, fingerprint_of, load
from cai_jax.constitution.diff import Change, diff
from cai_jax.constitution.exchange import once
from cai_jax.constitution.file import digest, read_text, shown
from cai_jax.constitution.lint import warnings
from cai_jax.errors import InputError

TYPES = {key: str for key in "parent time author reason name version fingerprint hash".split()}
TYPES |= {"entry": int, "changes": list, "lint": list, "check": (dict, NoneType), "content": dict}


def place(path: str | Path) -> Path:
    return Path(path).resolve().with_suffix(".log.jsonl")


def commit(
    path: str | Path, author: str, reason: str, time: str, templates: Mapping[str, str], check: Callable | None = None
) -> dict:
    """Adds the constitution as it is to its log. -> the entry. check: fingerprint -> the summary of its regression suite.

    Raises InputError where the constitution has an error, the log is not whole, nothing changed, or nobody says why.
    """
    for what, text in (("--author", author), ("--reason", reason)):
        if not text.strip():
            raise InputError(f"{what} is empty; a log without it helps nobody")
        if not text.isprintable():
            raise InputError(f"{what}={text!r}: wanted one line of printable text")
    file = place(path)
    folder = os.open(file.parent, os.O_RDONLY)
    try:  # two at once would follow the same entry; the folder stays where an editor replaces the file
        fcntl.flock(folder, fcntl.LOCK_EX)
        new = load(path, templates=templates)
        if broken := verify(path)[: file.exists()]:
            raise InputError(f"{file}: {broken[0]}; nothing is added to a log that is not whole")
        entries = read(path)
        last = entries[-1] if entries else None
        changes = [asdict(c) for c in diff(constitution(last), new)] if last else []
        if last and not changes:
            raise InputError(f"{path}: nothing changed since entry {last['entry']} of {last['time']}")
        content = {
            "priority": list(new.priority),
            "principles": [asdict(p) for p in new.principles],
            "templates": new.templates,
        }
        entry = {"entry": len(entries) + 1, "parent": last["hash"] if last else "", "time": time}
        entry |= {"author": author.strip(), "reason": reason.strip(), "name": new.name, "version": new.version}
        entry |= {"fingerprint": new.fingerprint, "changes": changes, "content": content}
        entry |= {"check": check(new.fingerprint) if check else None}
        entry |= {"lint": [f"{f.rule}: {f.where}" for f in warnings(new.principles)]}
        entry |= {"hash": digest(entry)}
        text = "".join(json.dumps(e, sort_keys=True, ensure_ascii=False) + "\n" for e in (*entries, entry))
        files.put(file, text.encode("utf-8"))
    finally:
        os.close(folder)
    return entry


def read(path: str | Path) -> list[dict]:
    """The entries of a constitution's log, which may be broken; none where there is no log. Raises InputError for a line that
    is no entry."""
    found = _lines(path)
    for line, _, why in found:
        if why:
            raise InputError(f"{place(path)}: line {line} is no entry ({why}); restore it, or all behind it is without proof")
    return [entry for _, entry, _ in found]


def _lines(path: str | Path) -> list[tuple[int, dict, str]]:
    """-> (number, entry, why it is none) of each line of the log."""
    if not place(path).exists():
        return []
    out = []
    for number, line in enumerate(read_text(place(path), "a log", largest=math.inf).removesuffix("\n").split("\n"), 1):
        try:
            entry = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            out.append((number, {}, str(error) or type(error).__name__))
            continue
        wrong = "it is no object" if not isinstance(entry, dict) else _wrong(entry)
        out.append((number, entry, wrong))
    return out


def _wrong(entry: dict) -> str:
    """What is not as in every entry; "": nothing."""
    for key, kind in TYPES.items():
        if key not in entry:
            return f"{key!r} is missing"
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            return f"{key!r} is {shown(entry[key])}"
    try:
        constitution(entry), [Change(**c) for c in entry["changes"]], digest(entry)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        return f"its content cannot be read: {error}"
    return ""


def verify(path: str | Path, known: Iterable[tuple[int, str]] = ()) -> list[str]:
    """What is wrong with the log, by entry; [] for a whole one. known: numbers and hashes of entries that others have kept."""
    found = _lines(path)
    hashes = {e["hash"]: e["entry"] for _, e, why in found if not why}
    out, before = [], None
    if not found:
        out.append("there is no log, or nothing in it")
    for line, e, why in found:
        if why:
            out.append(f"line {line} is no entry ({why})")
            continue
        what = f"entry {e['entry']} (line {line})"
        if e["hash"] != digest({k: v for k, v in e.items() if k != "hash"}):
            out.append(f"{what} was edited: its hash is that of another text")
        elif (mark := constitution(e).fingerprint) != e["fingerprint"]:
            out.append(f"{what} was edited: its principles have the fingerprint {mark[:12]}, not {e['fingerprint'][:12]}")
        if e["parent"] != (before["hash"] if before else ""):
            out.append(f"{what} {_break(e, before, hashes)}")
        elif e["entry"] != (number := before["entry"] + 1 if before else 1):
            out.append(f"{what} was edited: it is number {number}")
        before = e
    for number, mark in known:
        if hashes.get(mark) != number:
            out.append(f"entry {number} ({mark[:12]}), with which a run was made, is not in it: it was removed or rewritten")
    return out


def _break(e: dict, before: dict | None, hashes: dict[str, int]) -> str:
    """Why an entry does not follow the one before it."""
    if not e["parent"]:
        return "was moved: it is the first"
    if e["parent"] in hashes:
        return f"was moved, or the one before it: it follows entry {hashes[e['parent']]}"
    first, last = (before["entry"] if before else 0) + 1, e["entry"] - 1
    if last < first:
        return f"follows another entry {last}, which was rewritten"
    return (
        f"follows entry {last}, which was removed"
        if first == last
        else f"follows entries {first} to {last}, which were removed"
    )


def entry_of(path: str | Path, templates: Mapping[str, str]) -> dict | None:
    """The number and the hash of the newest entry that holds the constitution as it is. None: it was not committed."""
    now = load(path, templates=templates).fingerprint
    found = [e for e in read(path) if e["fingerprint"] == now]
    return {"entry": found[-1]["entry"], "hash": found[-1]["hash"]} if found else None


def constitution(entry: dict) -> Constitution:
    """What an entry holds."""
    c = entry["content"]
    principles = tuple(Principle(**p) for p in c["principles"])
    mark = fingerprint_of(principles, c["templates"], c["priority"])
    return Constitution(entry["name"], entry["version"], principles, c["templates"], mark, tuple(c["priority"]))
