"""Constitutions of other projects, read and written: three public formats, told apart by their shape.

critique     Bai et al. 2022, github.com/anthropics/ConstitutionalHarmlessnessPaper, CritiqueRevisionInstructions.json:
             {name: {"prompt": ["\\n\\nCritiqueRequest: ...\\n\\nCritique:"], "edit_request": "\\n\\nRevisionRequest: ..."}}
comparison   the same, RLMadisonInstructions.json: ["\\n... Options:", ...]
llm-swarm    github.com/huggingface/llm-swarm: {"constitutions": [{"critic": ..., "revision": ...}], "system_chat": [...]}
icai         Findeis et al. 2024, github.com/rdnfn/icai, 060_constitution.json: "1. Select the response that ...\\n2. ..."

None of them has all three parts of a principle. What is missing is asked by what is there, in words that say so.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cai_jax.constitution import GENERIC, PARTS, Principle
from cai_jax.constitution.file import read_text, shown
from cai_jax.errors import InputError

CRITIQUE = ("\n\nCritiqueRequest: ", "\n\nCritique:"), ("\n\nRevisionRequest: ", "\n\nRevision:")
COMPARISON = "\n", " Options:"
# What stands in for a part that a format does not have.
COMPARED = 'Which of these answers leaves less to say when asked: "{critique}"'
CRITICISED = 'Say what in the assistant\'s last answer would make it the worse choice when asked: "{comparison}"'
REVISED = 'Rewrite the assistant\'s last answer so that it would be the better choice when asked: "{comparison}"'


@dataclass(frozen=True)
class Format:
    category: str
    matches: Callable[[object], bool]
    read: Callable[[object], Iterable[tuple[str, dict]]]  # -> (id, the parts that are there)
    write: Callable[[list[Principle]], object]


def load_foreign(path: str | Path) -> tuple[str, list[Principle]]:
    """-> the name of a file's format, its principles in their order. Raises InputError for what is none of the formats."""
    text = read_text(path, "a JSON file")
    try:
        doc = json.loads(text, object_pairs_hook=once)
        json.dumps(doc, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{path}: half of a character (a lone surrogate) stands in it; write the whole one") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    name = next((name for name, form in FORMATS.items() if form.matches(doc)), None)
    if name is None:
        raise InputError(f"{path}: {shown(doc)[:60]} of no known format; wanted {', '.join(FORMATS)} (see {__name__})")
    out, taken = [], {GENERIC.id: 1}
    for number, (id, parts) in enumerate(FORMATS[name].read(doc), 1):
        where = f"{path}: principle {number}"
        for part, text in parts.items():
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}: its {part} is {shown(text)}; wanted text")
        out.append(_whole(_free(id, taken), FORMATS[name].category, {k: v.strip() for k, v in parts.items()}))
    if not out:
        raise InputError(f"{path}: {name}, but without a principle")
    return name, out


def _whole(id: str, category: str, parts: dict[str, str]) -> Principle:
    if "comparison" not in parts:
        parts["comparison"] = COMPARED.replace("{critique}", parts["critique"])
    for part, words in (("critique", CRITICISED), ("revision", REVISED)):
        parts.setdefault(part, words.replace("{comparison}", parts["comparison"]))
    return Principle(id, category, **parts)


def _free(id: str, taken: dict[str, int]) -> str:
    """`id` in the letters of ours, with a number behind it where it is taken. taken: how often each was asked for."""
    base = id = re.sub(r"[^a-z0-9_.-]+", "-", id.lower()) or "p"
    while id in taken:
        taken[base] = taken.get(base, 0) + 1
        id = f"{base}-{taken[base]}"
    taken[id] = 1
    return id


def once(pairs: list[tuple[str, object]]) -> dict:
    """For json.loads: a key that stands twice would hide what stands first."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError(f"the key {next(k for k, _ in pairs if sum(k == other for other, _ in pairs) > 1)!r} stands twice")
    return out


def foreign(principles: list[Principle], name: str) -> str:
    """The principles in one of the formats, as JSON. What the format has no place for is left out. Raises InputError for a
    format that there is not, and for a text that would be read back as something else."""
    if name not in FORMATS:
        raise InputError(f"--format={name}: wanted one of {', '.join(FORMATS)}")
    doc = FORMATS[name].write(principles)
    again = [parts for _, parts in FORMATS[name].read(doc)]
    said = [{k: getattr(p, k) for k in parts} for p, parts in zip(principles, again, strict=False)]
    if len(again) != len(principles) or said != again:
        at = next((n for n, (a, b) in enumerate(zip(said, again, strict=False)) if a != b), len(said) - 1)
        raise InputError(f"{principles[at].id}: its text cannot be told from the cues or numbers of the format {name}")
    return json.dumps(doc, indent=2, ensure_ascii=False) + "\n"


def toml(name: str, principles: list[Principle]) -> str:
    """A constitution file of these principles."""
    tables = []
    for p in principles:
        lines = ["[[principle]]", *(f"{part} = {_quoted(getattr(p, part))}" for part in PARTS)]
        tables.append("\n".join(lines + [f"weight = {p.weight}"] * (p.weight != 1.0)))
    return "\n\n".join([f'name = {_quoted(name)}\nversion = "1"', *tables]) + "\n"


def _quoted(text: str) -> str:
    """A basic string of TOML, which are JSON's but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _inside(text: object, around: tuple[str, str]) -> object:
    """`text` without the cues around it, where they are there."""
    return text.removeprefix(around[0]).removesuffix(around[1]) if isinstance(text, str) else text


def _is_critique(doc: object) -> bool:
    return isinstance(doc, dict) and any(isinstance(r, dict) and {"prompt", "edit_request"} & r.keys() for r in doc.values())


def _read_critique(doc: dict) -> Iterable[tuple[str, dict]]:
    for name, row in doc.items():
        row = row if isinstance(row, dict) else {}
        said = row.get("prompt")
        said = said[0] if isinstance(said, list) and len(said) == 1 else said  # several would be several principles
        yield name, {"critique": _inside(said, CRITIQUE[0]), "revision": _inside(row.get("edit_request"), CRITIQUE[1])}


def _write_critique(principles: list[Principle]) -> dict:
    def around(text: str, cue: tuple[str, str]) -> str:
        return cue[0] + text + cue[1]

    return {
        p.id: {"prompt": [around(p.critique, CRITIQUE[0])], "edit_request": around(p.revision, CRITIQUE[1])} for p in principles
    }


def _strings(doc: object) -> list[str]:
    return doc if isinstance(doc, list) and doc and all(isinstance(x, str) for x in doc) else []


def _is_comparison(doc: object) -> bool:
    return any(x.rstrip().endswith("Options:") for x in _strings(doc))


def _read_comparison(doc: list[str]) -> Iterable[tuple[str, dict]]:
    for n, x in enumerate(doc, 1):
        cued = x.rstrip().endswith(COMPARISON[1].strip())
        yield f"comparison-{n:02}", {"comparison": _inside(x.rstrip(), COMPARISON) if cued else None}


def _is_swarm(doc: object) -> bool:
    return (
        isinstance(doc, dict) and isinstance(rows := doc.get("constitutions"), list) and all(isinstance(r, dict) for r in rows)
    )


def _read_swarm(doc: dict) -> Iterable[tuple[str, dict]]:
    for n, row in enumerate(doc["constitutions"], 1):
        yield f"swarm-{n:02}", {"critique": row.get("critic"), "revision": row.get("revision")}


def _is_icai(doc: object) -> bool:
    lines = doc.splitlines() if isinstance(doc, str) else _strings(doc)
    return bool(lines) and bool(re.match(r"\s*1\.|\s*[Ss]elect the response", lines[0]))


def _read_icai(doc: str | list[str]) -> Iterable[tuple[str, dict]]:
    """Only the next number at the beginning of a line begins another principle."""
    found: list[str] = [] if isinstance(doc, str) else [re.sub(r"^\s*\d+\.\s+", "", x) for x in doc]
    for line in doc.split("\n") if isinstance(doc, str) else ():
        if line.startswith(f"{len(found) + 1}. "):
            found.append(line.partition(". ")[2])
        elif found:
            found[-1] += f"\n{line}"
    return ((f"icai-{n:02}", {"comparison": x}) for n, x in enumerate(found, 1))


FORMATS = {
    "critique": Format("harmful", _is_critique, _read_critique, _write_critique),
    "comparison": Format(
        "harmless", _is_comparison, _read_comparison, lambda ps: [COMPARISON[0] + p.comparison + COMPARISON[1] for p in ps]
    ),
    "llm-swarm": Format(
        "harmless",
        _is_swarm,
        _read_swarm,
        lambda ps: {"constitutions": [{"critic": p.critique, "revision": p.revision} for p in ps], "system_chat": []},
    ),
    "icai": Format("inverse", _is_icai, _read_icai, lambda ps: "\n".join(f"{n}. {p.comparison}" for n, p in enumerate(ps, 1))),
}
