"""The written constitution: principles and templates read from TOML, and the draw of a principle.

This module knows no prompt layout. The default templates are handed to `load`, which lays the file's `[templates]` over
them, so a `Constitution` holds every string that it makes a model see, and its fingerprint covers all of them.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from cai_jax.constitution.file import digest, hint, id_of, read, shown, tables, texts
from cai_jax.errors import InputError

ID = re.compile(r"[a-z0-9_.-]+")
LABELS = ("name", "version")
PARTS = ("id", "category", "critique", "revision", "comparison")


@dataclass(frozen=True)
class Principle:
    """One principle in its three uses: request for a critique, request for a revision, question on two responses. It is
    drawn `weight` times as often as a principle of weight 1."""

    id: str
    category: str
    critique: str
    revision: str
    comparison: str
    weight: float = 1.0


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
    """Principles in the order of the file, every template by name, the order of priority, and the sha256 (hex) of these.

    `priority` names categories and principles, those first that others yield to; who is not named comes last.

    `name` and `version` are labels: the fingerprint does not cover them, nor the order of the principles, the layout or
    the comments of the file, or its place. It covers the content in force: excluded principles are not in it.
    """

    name: str
    version: str
    principles: tuple[Principle, ...]
    templates: dict[str, str]
    fingerprint: str
    priority: tuple[str, ...] = ()


def load(
    path: str | Path, exclude: Sequence[str] = (), corrupt: Sequence[str] = (), *, templates: Mapping[str, str]
) -> Constitution:
    """Reads a constitution from TOML: `name`, `version`, `[[principle]]` tables and, optionally, `priority`, `[templates]`.

    Args:
      path: the file. Texts are stored without outer white space, templates as they are.
      exclude: ids of principles, or categories of them, that are left out, for ablations.
      corrupt: likewise, of those that keep their place and their words, but in an order without meaning.
      templates: the default templates (`prompts.TEMPLATES`). An entry of the file's `[templates]` replaces the default
        of its name and must use the same placeholders.

    Raises:
      InputError: no such file, or anything in it that is malformed, missing, unknown, empty or doubled; the message names
        the file and the principle, the template or the line.
    """
    doc = read(path)
    for problem in problems(path, doc, templates):
        raise InputError(problem)
    labels = {key: doc[key].strip() for key in LABELS}
    principles = tuple(
        Principle(**{k: v.strip() if isinstance(v, str) else float(v) for k, v in row.items()}) for row in doc["principle"]
    )
    spoilt = _named(path, principles, corrupt, "corrupt")
    principles = tuple(_scrambled(p) if p in spoilt else p for p in _without(path, principles, exclude))
    merged = dict(templates) | doc.get("templates", {})
    there = {name for p in principles for name in (p.id, p.category)}
    priority = tuple(name for name in map(str.strip, doc.get("priority", ())) if name in there)
    fingerprint = fingerprint_of(principles, merged, priority)
    return Constitution(**labels, principles=principles, templates=merged, fingerprint=fingerprint, priority=priority)


def fingerprint_of(principles: Sequence[Principle], templates: Mapping[str, str], priority: Sequence[str]) -> str:
    rows = [{k: v for k, v in asdict(p).items() if (k, v) != ("weight", 1.0)} for p in principles]
    content = [sorted(rows, key=operator.itemgetter("id")), templates]
    return digest([*content, list(priority)] if priority else content)


def problems(path: str | Path, doc: dict, templates: Mapping[str, str]) -> Iterator[str]:
    """Everything that makes a document of TOML no constitution, in its order; `load` raises the first."""
    rows = doc.get("principle")
    checks: list[Callable] = [partial(texts, str(path), doc, LABELS, others=("priority", "allow", "templates", "principle"))]
    checks += [partial(tables, path, doc, "principle"), partial(_check_allow, path, doc.get("allow", []))]
    if isinstance(rows, list):
        first: dict[str | None, int] = {}
        for i, row in enumerate(rows):
            first.setdefault(_name(row.get("id")) if isinstance(row, dict) else None, i)
        checks += [partial(_check_principle, path, row, i, first) for i, row in enumerate(rows)]
        checks += [partial(_check_priority, path, doc.get("priority", []), rows)]
    checks += [partial(_check_override, path, doc.get("templates", {}), name, templates) for name in _names(doc, "templates")]
    for check in checks:
        try:
            check()
        except InputError as error:
            yield str(error)


def sample(constitution: Constitution, *address: str | int, k: int = 1) -> tuple[Principle, ...]:
    """`k` distinct principles for one address, for instance `sample(constitution, seed, "critique", record_id, round)`.

    The law: in proportion to the weights, which are 1 unless the file says otherwise, each next of k among those left;
    independent between addresses; so rounds and records draw with replacement (paper 3.1, 4.1: a random principle at each
    revision and for each comparison).

    Each principle is ranked by a hash u of the address and its id, taken as an exponential time -log(1 - u) / weight, and
    the first k are taken (Efraimidis and Spirakis 2006). A draw is thus a pure function of its address: not of batch, host,
    restart, library version or the order of the file. And leaving out a category redraws only the records that had drawn
    from it, so an ablation is compared under common draws.

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
    def when(p: Principle) -> tuple[float, str]:
        place = digest([parts, p.id])
        return -math.log1p(-int(place[:13], 16) / 16**13) / p.weight, place

    return tuple(sorted(constitution.principles, key=when)[:k])


def rank(constitution: Constitution, principle: Principle) -> int:
    """The place of a principle in the order of priority, from 0; by its id, else by its category, else behind all named."""
    names = constitution.priority
    return next((names.index(n) for n in (principle.id, principle.category) if n in names), len(names))


def check_template(name: str, text: str, fields: Mapping[str, frozenset[str]]) -> None:
    """Raises InputError unless `text` uses exactly the placeholders that `fields` lists for the template `name`."""
    if name not in fields:
        raise InputError(f"unknown template {name!r}{hint(name, fields)}; templates are {', '.join(fields)}")
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


def _check_principle(path: str | Path, row: object, i: int, first: Mapping[str, int]) -> None:
    """The principle at place i; first: the place where each id stands first."""
    where = f"{path}: principle {i + 1}{id_of(row)}"
    id = texts(where, row, PARTS, others=("weight",))["id"]
    if not _is_weight(row.get("weight", 1.0)):
        raise InputError(
            f"{where}: weight is {shown(row['weight'])}; wanted a number above 0, as 2.0 for twice as often as others"
        )
    if not ID.fullmatch(id):
        raise InputError(f"{where}: bad id; wanted lower-case letters, digits, '_', '.' and '-' only")
    if id == GENERIC.id:
        raise InputError(f"{where}: this id is the id of the question without a principle; wanted a new one")
    if first[id] < i:
        raise InputError(f"{where}: this id is already that of principle {1 + first[id]}; wanted a new one")


def _is_weight(value: object) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and 0 < float(value) < math.inf
    except OverflowError:
        return False


def _name(value: object) -> str | None:
    return value.strip() if isinstance(value, str) else None


def _check_priority(path: str | Path, priority: object, rows: Sequence) -> None:
    """Every entry names a category or a principle that no entry before it has covered."""
    if not isinstance(priority, list) or not all(isinstance(name, str) for name in priority):
        raise InputError(f"{path}: priority is {shown(priority)}; wanted a list of categories and ids, the highest first")
    left = {_name(r.get("id")): _name(r.get("category")) for r in rows if isinstance(r, dict)}
    members: dict[str | None, set] = {}
    for id, category in left.items():
        members.setdefault(category, set()).add(id)
    known = sorted({name for name in (*left, *members) if name})
    for number, name in enumerate(map(str.strip, priority), 1):
        where = f"{path}: priority {number}, {name!r}"
        if name not in left and name not in members:
            if name not in known:
                raise InputError(f"{where}: no category or id is called so{hint(name, known)}")
            raise InputError(f"{where}: never reached, what it names stands before it")
        for id in {name} if name in left else members.pop(name):
            members.get(left.pop(id), set()).discard(id)
        members = {category: ids for category, ids in members.items() if ids}


def _check_allow(path: str | Path, allow: object) -> None:
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        raise InputError(f"{path}: allow is {shown(allow)}; wanted a list of what lint is not to say: 'RULE', or 'RULE ID'")


def _named(path: str | Path, principles: Sequence[Principle], names: Sequence[str], verb: str) -> set[Principle]:
    """The principles of these ids and categories."""
    categories, known = sorted({p.category for p in principles}), {name for p in principles for name in (p.id, p.category)}
    for name in names:
        if name not in known:
            raise InputError(
                f"{path}: cannot {verb} the unknown {name!r}{hint(name, sorted(known))}; wanted the id of a principle, or a "
                f"category: {', '.join(categories)}"
            )
    return {p for p in principles if p.category in names or p.id in names}


def _without(path: str | Path, principles: tuple[Principle, ...], exclude: Sequence[str]) -> tuple[Principle, ...]:
    out = _named(path, principles, exclude, "exclude")
    if len(out) == len(principles):
        raise InputError(f"{path}: nothing left after excluding {', '.join(exclude)}; keep at least one principle")
    return tuple(p for p in principles if p not in out)


def _scrambled(p: Principle) -> Principle:
    """The words of each part in an order that only they decide."""
    parts = {part: getattr(p, part).split() for part in PARTS[2:]}
    return replace(p, **{k: " ".join(sorted(words, key=lambda w: digest([p.id, w]))) for k, words in parts.items()})


def _names(doc: dict, key: str) -> list:
    """The names in a table of the document; one for all where it is no table."""
    table = doc.get(key, {})
    return list(table) if isinstance(table, dict) else [None]


def _check_override(path: str | Path, table: object, name: str, templates: Mapping[str, str]) -> None:
    if not isinstance(table, dict):
        raise InputError(f"{path}: templates is {shown(table)}; wanted a table headed [templates]")
    if not isinstance(table[name], str):
        raise InputError(f"{path}: template {name!r} is {shown(table[name])}; wanted text in quotes")
    try:
        check_template(name, table[name], {key: placeholders(text) for key, text in templates.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
