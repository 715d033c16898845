"""The written constitution: principles, templates and few-shot blocks read from TOML, and the draw of a principle.

This module knows no prompt layout. The default templates are handed to `load`, which lays the file's `[templates]` over
them, so a `Constitution` holds every string that it makes a model see, and its fingerprint covers all of them.
"""

import difflib
import hashlib
import json
import operator
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cai_jax.errors import InputError

ID = re.compile(r"[a-z0-9_.-]+")


@dataclass(frozen=True)
class Principle:
    """One principle in its three uses: request for a critique, request for a revision, question on two responses."""

    id: str
    category: str
    critique: str
    revision: str
    comparison: str


# The no-principle ablation: the same three questions with nothing to look for. Its id is reserved.
GENERIC = Principle(
    id="none",
    category="none",
    critique="Please review the assistant's last answer.",
    revision="Please rewrite the assistant's last answer.",
    comparison="Which of these answers is better?",
)


@dataclass(frozen=True)
class Constitution:
    """Principles in the order of the file, every template by name, and the sha256 (hex) of both.

    `name` and `version` are labels: the fingerprint does not cover them, nor the order of the principles, the layout or
    the comments of the file, or its place. It covers the content in force: excluded principles are not in it.
    """

    name: str
    version: str
    principles: tuple[Principle, ...]
    templates: dict[str, str]
    fingerprint: str


@dataclass(frozen=True)
class CritiqueBlock:
    """A worked example of a critique and a revision; all fields are plain text without cues."""

    user: str
    response: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


@dataclass(frozen=True)
class ComparisonBlock:
    """A worked example of a comparison; `better` is "A" or "B". The question comes from a principle drawn for it."""

    user: str
    a: str
    b: str
    better: str


@dataclass(frozen=True)
class FewShot:
    """Worked examples in the order of the file, which is the order in which a model reads them, and their sha256 (hex)."""

    critiques: tuple[CritiqueBlock, ...]
    comparisons: tuple[ComparisonBlock, ...]
    fingerprint: str


def load(path: str | Path, exclude: Sequence[str] = (), *, templates: Mapping[str, str]) -> Constitution:
    """Reads a constitution from TOML: `name`, `version`, `[[principle]]` tables and, optionally, `[templates]`.

    Args:
      path: the file. Texts are stored without outer white space, templates as they are.
      exclude: categories whose principles are left out, for ablations.
      templates: the default templates (`prompts.TEMPLATES`). An entry of the file's `[templates]` replaces the default
        of its name and must use the same placeholders.

    Raises:
      InputError: no such file, or anything in it that is malformed, missing, unknown, empty or doubled; the message names
        the file and the principle, the template or the line.
    """
    doc = _read(path)
    labels = _texts(str(path), doc, ("name", "version"), others=("templates", "principle"))
    principles = tuple(Principle(**row) for row in _rows(path, doc, "principle", Principle))
    _check_ids(path, principles)
    principles = _without(path, principles, exclude)
    merged = dict(templates) | _overrides(path, doc, templates)
    by_id = sorted(map(asdict, principles), key=operator.itemgetter("id"))
    return Constitution(**labels, principles=principles, templates=merged, fingerprint=_digest([by_id, merged]))


def load_few_shot(path: str | Path) -> FewShot:
    """Reads `[[critique]]` and `[[comparison]]` blocks from TOML, at least one of each. Errors as in `load`."""
    doc = _read(path)
    _texts(str(path), doc, (), others=("critique", "comparison"))
    critiques = tuple(CritiqueBlock(**row) for row in _rows(path, doc, "critique", CritiqueBlock))
    comparisons = tuple(ComparisonBlock(**row) for row in _rows(path, doc, "comparison", ComparisonBlock))
    for number, block in enumerate(comparisons, 1):
        if block.better not in ("A", "B"):
            raise InputError(f"{path}: comparison {number}: better is {block.better!r}; wanted 'A' or 'B'")
    content = [list(map(asdict, critiques)), list(map(asdict, comparisons))]
    return FewShot(critiques, comparisons, _digest(content))


def sample(constitution: Constitution, *address: str | int, k: int = 1) -> tuple[Principle, ...]:
    """`k` distinct principles for one address, for instance `sample(constitution, seed, "critique", record_id, round)`.

    The law: uniform over the principles (and over their order, for k > 1), independent between addresses; so rounds and
    records draw with replacement (paper 3.1, 4.1: a random principle at each revision and for each comparison).

    Each principle is ranked by a hash of the address and its id, and the lowest k are taken. A draw is thus a pure
    function of its address: not of batch, host, restart, library version or the order of the file. And leaving out a
    category redraws only the records that had drawn from it, so an ablation is compared under common draws.

    Raises:
      InputError: k outside 1..number of principles.
      ValueError: an empty address.
      TypeError: an address part that is neither str nor int.
    """
    count = len(constitution.principles)
    if not 1 <= k <= count:
        raise InputError(f"cannot draw {k} distinct principles of constitution {constitution.name!r}; wanted 1 <= k <= {count}")
    if not address:
        raise ValueError("sample() got an empty address; wanted at least a seed and what the principle is for")
    parts = [part if isinstance(part, str) else int(operator.index(part)) for part in address]
    # JSON keeps 1 and "1", and ("ab", "c") and ("a", "bc"), apart.
    ranked = sorted(constitution.principles, key=lambda p: _digest([parts, p.id]))
    return tuple(ranked[:k])


def check_template(name: str, text: str, fields: Mapping[str, frozenset[str]]) -> None:
    """Raises InputError unless `text` uses exactly the placeholders that `fields` lists for the template `name`."""
    if name not in fields:
        raise InputError(f"unknown template {name!r}{_hint(name, fields)}; templates are {', '.join(fields)}")
    found, wanted = placeholders(text), fields[name]
    if unknown := sorted(found - wanted):
        raise InputError(f"template {name!r} has the unknown placeholder {{{unknown[0]}}}; it may use {_braced(wanted)}")
    if missing := sorted(wanted - found):
        raise InputError(f"template {name!r} lacks the placeholder {{{missing[0]}}}; it needs {_braced(wanted)}")


def placeholders(text: str) -> frozenset[str]:
    """The names in braces in a template; empty braces count, as the empty name."""
    return frozenset(re.findall(r"\{(\w*)\}", text))


def _braced(names: frozenset[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names)) or "none"


def _read(path: str | Path) -> dict:
    if not Path(path).is_file():
        raise InputError(f"missing file: {path}; wanted a TOML file; paths are relative to where the command is run")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); wanted a TOML file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def _texts(where: str, table: object, wanted: Sequence[str], others: Sequence[str] = ()) -> dict[str, str]:
    """The `wanted` keys of a TOML table as stripped text: all there, none empty, and no key besides them and `others`."""
    keys = (*wanted, *others)
    if not isinstance(table, dict):
        raise InputError(f"{where} is {_shown(table)}; wanted a table with the keys {', '.join(keys)}")
    for key in table:
        if key not in keys:
            raise InputError(f"{where}: unknown key {key!r}{_hint(key, keys)}; keys are {', '.join(keys)}")
    for key in wanted:
        if key not in table:
            raise InputError(f"{where}: key {key!r} is missing; wanted {', '.join(wanted)}")
        if not isinstance(table[key], str):
            raise InputError(f"{where}: {key} is {_shown(table[key])}; wanted text in quotes")
        if not table[key].strip():
            raise InputError(f"{where}: {key} is empty; wanted text")
    return {key: table[key].strip() for key in wanted}


def _rows(path: str | Path, doc: dict, name: str, cls: type) -> list[dict[str, str]]:
    """The `[[name]]` tables of a document, each with exactly the fields of the dataclass `cls`."""
    rows = doc.get(name, [])
    if not isinstance(rows, list):
        raise InputError(f"{path}: {name} is {_shown(rows)}; wanted a list of tables, each headed [[{name}]]")
    if not rows:
        raise InputError(f"{path}: no [[{name}]] table; wanted one or more")
    labelled = ((f"{path}: {name} {i}{_id_of(row)}", row) for i, row in enumerate(rows, 1))
    return [_texts(where, row, tuple(cls.__dataclass_fields__)) for where, row in labelled]


def _id_of(row: object) -> str:
    return f" ({row['id']!r})" if isinstance(row, dict) and "id" in row else ""


def _check_ids(path: str | Path, principles: Sequence[Principle]) -> None:
    seen = {GENERIC.id: "the id of the question without a principle"}
    for number, principle in enumerate(principles, 1):
        where = f"{path}: principle {number} ({principle.id!r})"
        if not ID.fullmatch(principle.id):
            raise InputError(f"{where}: bad id; wanted lower-case letters, digits, '_', '.' and '-' only")
        if principle.id in seen:
            raise InputError(f"{where}: this id is {seen[principle.id]}; wanted a new one")
        seen[principle.id] = f"already that of principle {number}"


def _without(path: str | Path, principles: tuple[Principle, ...], exclude: Sequence[str]) -> tuple[Principle, ...]:
    known = sorted({p.category for p in principles})
    for category in exclude:
        if category not in known:
            raise InputError(f"{path}: cannot exclude the unknown category {category!r}; categories are {', '.join(known)}")
    kept = tuple(p for p in principles if p.category not in exclude)
    if not kept:
        raise InputError(f"{path}: nothing left after excluding {', '.join(known)}; keep at least one category")
    return kept


def _overrides(path: str | Path, doc: dict, templates: Mapping[str, str]) -> dict[str, str]:
    table = doc.get("templates", {})
    if not isinstance(table, dict):
        raise InputError(f"{path}: templates is {_shown(table)}; wanted a table headed [templates]")
    fields = {name: placeholders(text) for name, text in templates.items()}
    for name, text in table.items():
        if not isinstance(text, str):
            raise InputError(f"{path}: template {name!r} is {_shown(text)}; wanted text in quotes")
        try:
            check_template(name, text, fields)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return table


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _hint(key: str, known: Sequence[str] | Mapping) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
