"""Data from the field as our records: JSONL, one JSON array, CSV, gzipped or not, and datasets of the Hugging Face hub.

A source is a path, "hub:owner/name[@revision][:config]:split" or a file of such a repository, "hub:owner/name[@revision]/file",
each with the names of its columns where they are not ours:

    harmbench.csv?prompt=Behavior&id=BehaviorID
    hub:owner/name:train?prompt=question
    hub:Anthropic/hh-rlhf/harmless-base/train.jsonl.gz

A row is a prompt by its `messages`, its `prompt` (one message), its `transcript` (the first message of a dialogue, as in
red-team-attempts) or its `chosen` (the dialogue before the last answer, as in hh-rlhf). It is a comparison by `messages`,
`response_a`, `response_b` and `p_a`, or by `chosen` and `rejected` transcripts, and a rated conversation by its `transcript`
and `rating`. Rows without an `id` are numbered.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl

from cai_jax import files, records
from cai_jax.errors import InputError
from cai_jax.prompts import ASSISTANT, USER

FORMS = ("messages", "prompt", "transcript", "chosen")  # of a prompt
OURS = ("id", "messages", "prompt", "transcript", "chosen", "rejected", "response_a", "response_b", "p_a", "rating")
ROLES = {"Human": USER, "Assistant": ASSISTANT}
CUE = "\n\nAssistant:"


def prompts(source: str, limit: int = 0) -> list[dict]:
    """Rows as {"id", "messages", ...}; the other columns are carried along."""
    return [_prompt(row, where) for row, where in _rows(source, limit)]


def comparisons(source: str, limit: int = 0) -> list[dict]:
    """Rows as {"id", "messages", "response_a", "response_b", "p_a", ...}; of two transcripts, a is the chosen one."""
    return [_comparison(row, where) for row, where in _rows(source, limit)]


def attempts(source: str, limit: int = 0) -> list[dict]:
    """Rows as {"id", "messages", "response", "rating", ...}: a transcript before its last answer, that answer, what it got. The
    response is None where a transcript does not end with one."""
    return [_attempt(row, where) for row, where in _rows(source, limit)]


def digest(source: str) -> str:
    """What identifies the content of a source: of a file its bytes, of a dataset its rows, and the columns asked for."""
    place, _, columns = source.partition("?")
    place = _fetched(place)
    if not place.startswith("hub:"):
        return files.digest(place) + (f"?{columns}" if columns else "")
    return hashlib.sha256("".join(map(records.dumps, _hub(place))).encode()).hexdigest() + f"?{columns}"


def turns(transcript: str) -> list[dict]:
    """'\\n\\nHuman: ...\\n\\nAssistant: ...' as messages. A turn begins a paragraph; 'Human:' elsewhere is text."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.strip())
    return [{"role": ROLES[r], "content": text.strip()} for r, text in zip(parts[1::2], parts[2::2], strict=True)]


def pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two transcripts of hh-rlhf -> what they share, and what the assistant says next in each. Most part at their last answer;
    those that parted before are cut where they did."""
    heads = chosen.rpartition(CUE)[0], rejected.rpartition(CUE)[0]
    shared = heads[0] if heads[0] == heads[1] else os.path.commonprefix([chosen, rejected]).rpartition(CUE)[0]
    said = (text.removeprefix(shared + CUE).partition("\n\nHuman:")[0].strip() for text in (chosen, rejected))
    return shared, *said


def _rows(source: str, limit: int) -> list[tuple[dict, str]]:
    """(row with our names, where it stands) for each row."""
    place, _, columns = source.partition("?")
    pairs = parse_qsl(columns, keep_blank_values=True)
    names = dict(pairs)
    if len(names) < len(pairs):
        raise InputError(f"{source}: a column of ours is named twice")
    if unknown := sorted(set(names) - set(OURS)):
        raise InputError(f"{source}: no column of ours is called {unknown[0]!r}; there are {', '.join(OURS)}")
    place = _fetched(place)
    rows = _hub(place) if place.startswith("hub:") else _file(Path(place))
    if not rows:
        raise InputError(f"{place}: no records")
    out, stem = [], re.sub(r"\W+", "-", Path(place).name.partition(".")[0])
    for n, row in enumerate(rows[: limit or None]):
        where = f"{place}: record {n + 1}"
        if missing := [theirs for theirs in names.values() if theirs not in row]:
            raise InputError(f"{where}: no column {missing[0]!r}; it has {', '.join(map(str, row))}")
        other = [form for form in FORMS if form not in names] if set(FORMS) & set(names) else ()  # what is named is meant
        row = {k: v for k, v in row.items() if k not in names and k not in other} | {o: row[t] for o, t in names.items()}
        given = f"{stem}-{n:06d}" if row.get("id") in (None, "") else row["id"]
        if not isinstance(given, str | int):
            raise InputError(f"{where}: the id is a {type(given).__name__}, wanted text or a number")
        out.append((row | {"id": str(given)}, where))
    return out


def _prompt(row: dict, where: str) -> dict:
    if "messages" in row:
        return row
    if isinstance(row.get("prompt"), str):
        return row | {"messages": [{"role": USER, "content": row["prompt"]}]}
    if isinstance(row.get("transcript"), str):
        return row | {"messages": turns(row["transcript"])[:1]}
    if isinstance(row.get("chosen"), str):
        return row | {"messages": turns(row["chosen"].rpartition(CUE)[0])}
    raise InputError(
        f"{where}: no prompt in it; wanted messages, prompt, transcript or chosen, or '?prompt=THEIR_COLUMN' behind it"
    )


def _comparison(row: dict, where: str) -> dict:
    if {"response_a", "response_b", "p_a"} <= row.keys() and ("messages" in row or isinstance(row.get("prompt"), str)):
        return _prompt(row, where) | {"p_a": _number(row["p_a"])}
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        shared, a, b = pair(row["chosen"], row["rejected"])
        return row | {"messages": turns(shared), "response_a": a, "response_b": b, "p_a": 1.0}
    raise InputError(
        f"{where}: no comparison in it; wanted messages or prompt, response_a, response_b and p_a, or chosen and rejected"
    )


def _attempt(row: dict, where: str) -> dict:
    if not isinstance(row.get("transcript"), str) or "rating" not in row:
        raise InputError(f"{where}: no rated conversation in it; wanted transcript and rating, it has {', '.join(row)}")
    said = turns(row["transcript"])
    rated = said[-1]["content"] if said and said[-1]["role"] == ASSISTANT else None
    return row | {"messages": said if rated is None else said[:-1], "response": rated, "rating": _number(row["rating"])}


def _number(cell):
    """A number that is text, as in a CSV, as a number; anything else as it is."""
    return float(cell) if isinstance(cell, str) and re.fullmatch(r"\s*\d*\.?\d+\s*", cell) else cell


def _file(path: Path) -> list[dict]:
    if not path.is_file():
        raise InputError(f"missing file: {path}; paths are relative to where the command is run")
    name, data = path.name.removesuffix(".gz"), path.read_bytes()
    if path.suffix == ".jsonl" and not data.startswith(b"["):
        return records.read(path)  # which names the line of a fault
    try:
        text = (gzip.decompress(data) if name != path.name else data).decode("utf-8-sig")
        if name.endswith(".csv"):
            return _csv(io.StringIO(text, newline=""), path)
        if text.lstrip().startswith("["):  # one array, whatever the name says
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); wanted JSON lines, one JSON array or CSV, is it whole?") from error
    if strange := [r for r in rows if not isinstance(r, dict)]:
        raise InputError(f"{path}: wanted records, got {strange[0]!r:.60}")
    return rows


def _csv(text: io.StringIO, path: Path) -> list[dict]:
    reader = csv.DictReader(text, strict=True)
    header = reader.fieldnames or []
    if len(set(header)) < len(header):
        raise InputError(f"{path}: two columns have one name: {', '.join(header)}")
    rows = list(reader)
    for n, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise InputError(f"{path}: record {n} has not the {len(header)} cells of the header; is a comma not quoted?")
    return rows


def _fetched(place: str) -> str:
    """The path that a file of the hub has in its cache, fetched if need be; another source as it is."""
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w./-]+)", place)
    if not found:
        return place
    from huggingface_hub import hf_hub_download

    name, revision, file = found.groups()
    try:
        return hf_hub_download(name, file, repo_type="dataset", revision=revision)
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors are kinds of these
        raise InputError(f"{place}: the hub does not give it: {' '.join(str(error).split())}") from error


def _hub(place: str) -> list[dict]:
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w.-]+))?:([\w.\[\]%:-]+)", place)
    if not found:
        raise InputError(f"{place}: wanted hub:owner/name[@revision][:config]:split, or hub:owner/name[@revision]/file")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{place}: datasets of the hub want the package: pip install datasets") from error
    name, revision, config, split = found.groups()
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
        return [json.loads(json.dumps(dict(row), default=str)) for row in rows]  # dates and the like as text
    except Exception as error:  # no network, no such name, no such split: each its own kind
        raise InputError(f"{place}: the hub does not give it: {' '.join(str(error).split())}") from error
