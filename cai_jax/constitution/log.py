"""The change log of a constitution: who changed what and why, in a chain of hashes, FILE.log.jsonl beside FILE.toml.

Each entry is a line of JSON and holds the hash of the one before it, so none can be edited, removed or moved without those
behind it saying so. What a chain alone cannot show is that its end was cut off, or all of it written anew: a run keeps the
entry it was made with (manifest.json), which `verify` looks for.
"""

import fcntl
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from cai_jax import files
from cai_jax.constitution import Constitution, Principle, fingerprint_of, load
from cai_jax.constitution.diff import diff
from cai_jax.constitution.file import digest
from cai_jax.constitution.lint import lint
from cai_jax.errors import InputError

KEYS = "entry parent time author reason name version fingerprint changes lint check content hash".split()


def place(path: str | Path) -> Path:
    return Path(path).with_suffix(".log.jsonl")


def commit(
    path: str | Path, author: str, reason: str, time: str, templates: Mapping[str, str], check: dict | None = None
) -> dict:
    """Adds the constitution as it is to its log. -> the entry. check: the summary of the regression suite, if it was run.

    Raises InputError where the constitution has an error, the log is not whole, nothing changed, or nobody says why.
    """
    for what, text in (("--author", author), ("--reason", reason)):
        if not text.strip():
            raise InputError(f"{what} is empty; a log without it helps nobody")
    new = load(path, templates=templates)
    with open(path, "rb") as held:  # two at once would follow the same entry
        fcntl.flock(held, fcntl.LOCK_EX)
        entries = read(path)
        if broken := verify(path):
            raise InputError(f"{place(path)}: {broken[0]}; nothing is added to a log that is not whole")
        last = entries[-1] if entries else None
        changes = [asdict(c) for c in diff(_constitution(last), new)] if last else []
        if last and not changes:
            raise InputError(f"{path}: nothing changed since entry {last['entry']} of {last['time']}")
        content = {
            "priority": list(new.priority),
            "principles": [asdict(p) for p in new.principles],
            "templates": new.templates,
        }
        entry = {"entry": len(entries) + 1, "parent": last["hash"] if last else "", "time": time}
        entry |= {"author": author.strip(), "reason": reason.strip(), "name": new.name, "version": new.version}
        entry |= {"fingerprint": new.fingerprint, "changes": changes, "check": check, "content": content}
        entry |= {"lint": [f"{f.rule}: {f.where}" for f in lint(path, templates)]}
        entry |= {"hash": digest(entry)}
        text = "".join(json.dumps(e, sort_keys=True, ensure_ascii=False) + "\n" for e in (*entries, entry))
        files.put(place(path), text.encode("utf-8"))
    return entry


def read(path: str | Path) -> list[dict]:
    """The entries of a constitution's log, which may be broken; none where there is no log. Raises InputError for a line that
    is no entry."""
    if not place(path).exists():
        return []
    try:
        lines = place(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{place(path)}: cannot be read ({error})") from None
    out = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not set(KEYS) <= entry.keys():
            raise InputError(f"{place(path)}: line {number} is no entry; restore it, or all behind it is without proof")
        out.append(entry)
    return out


def verify(path: str | Path, known: Iterable[tuple[int, str]] = ()) -> list[str]:
    """What is wrong with the log, by entry; [] for a whole one. known: numbers and hashes of entries that others have kept."""
    entries = read(path)
    hashes = {e["hash"]: e["entry"] for e in entries}
    out, before = [], None
    for line, e in enumerate(entries, 1):
        what = f"entry {e['entry']} (line {line})"
        if e["hash"] != digest({k: v for k, v in e.items() if k != "hash"}):
            out.append(f"{what} was edited: its hash is that of another text")
        elif (found := _fingerprint(e)) != e["fingerprint"]:
            out.append(f"{what} was edited: its principles have the fingerprint {found[:12]}, not {e['fingerprint'][:12]}")
        wanted = before["hash"] if before else ""
        if e["parent"] != wanted:
            out.append(f"{what} {_break(e, before, hashes)}")
        elif e["entry"] != (before["entry"] + 1 if before else 1):
            out.append(f"{what} was edited: it is number {before['entry'] + 1 if before else 1}")
        before = e
    for number, mark in known:
        if mark not in hashes:
            out.append(f"entry {number} ({mark[:12]}), with which a run was made, is not in it: it was removed or rewritten")
    return out


def _break(e: dict, before: dict | None, hashes: dict[str, int]) -> str:
    """Why an entry does not follow the one before it."""
    if not e["parent"]:
        return "was moved: it is the first"
    if e["parent"] in hashes:
        return f"was moved, or the one before it: it follows entry {hashes[e['parent']]}"
    missing = f"entry {e['entry'] - 1}" if isinstance(e["entry"], int) else "the entry before it"
    if before and before["entry"] == e["entry"] - 1:
        return f"follows another {missing}, which was rewritten"
    return f"follows {missing}, which was removed"


def entry_of(path: str | Path, templates: Mapping[str, str]) -> dict | None:
    """The number and the hash of the newest entry that holds the constitution as it is. None: it was not committed."""
    now = load(path, templates=templates).fingerprint
    found = [e for e in read(path) if e["fingerprint"] == now]
    return {"entry": found[-1]["entry"], "hash": found[-1]["hash"]} if found else None


def _constitution(entry: dict) -> Constitution:
    c = entry["content"]
    principles = tuple(Principle(**p) for p in c["principles"])
    mark = fingerprint_of(principles, c["templates"], c["priority"])
    return Constitution(entry["name"], entry["version"], principles, c["templates"], mark, tuple(c["priority"]))


def _fingerprint(entry: dict) -> str:
    try:
        return _constitution(entry).fingerprint
    except (TypeError, KeyError, AttributeError):
        return "of nothing"
