"""What an edit of a constitution changed, principle by principle."""

import difflib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cai_jax.constitution import PARTS, Constitution, Principle

TEXTS = tuple(part for part in PARTS if part != "id")
LIKE = 0.8  # share of words in common from which a principle that is gone and one that is new are the same, renamed
MOST_WORDS = 5000  # that are compared one by one


@dataclass(frozen=True)
class Change:
    """kind: added, removed, renamed, reworded, re-weighted, moved, priority, template or label; `of`: the id, or the name of
    what changed; `part`: of a principle; old and new as text."""

    kind: str
    of: str
    part: str = ""
    old: str = ""
    new: str = ""


def diff(a: Constitution, b: Constitution) -> list[Change]:
    """From a to b, in the order of b; what was removed comes first."""
    was, now = {p.id: p for p in a.principles}, {p.id: p for p in b.principles}
    renamed = _renamed(was, now)
    gone = [p for p in was.values() if p.id not in now and p.id not in renamed.values()]
    out = [Change("label", key, "", getattr(a, key), getattr(b, key)) for key in ("name", "version")]
    out += [Change("priority", "priority", "", ", ".join(a.priority), ", ".join(b.priority))]
    out = [c for c in out if c.old != c.new]
    out += [Change("removed", p.id, part, _text(p, part)) for p in gone for part in (*TEXTS, *_weight(p))]
    moved = _moved([renamed.get(id, id) for id in now], list(was))
    old_place, new_place = ({id: str(n) for n, id in enumerate(ids, 1)} for ids in (was, now))
    for id, p in now.items():
        old = was.get(renamed.get(id, id))
        if old is None:
            out += [Change("added", id, part, "", _text(p, part)) for part in (*TEXTS, *_weight(p))]
            continue
        out += [Change("renamed", id, "id", old.id, id)] * (old.id != id)
        parts = [part for part in TEXTS if getattr(old, part) != getattr(p, part)]
        out += [Change("reworded", id, part, getattr(old, part), getattr(p, part)) for part in parts]
        out += [Change("re-weighted", id, "weight", _text(old, "weight"), _text(p, "weight"))] * (old.weight != p.weight)
        out += [Change("moved", id, "place", old_place[old.id], new_place[id])] * (old.id in moved)
    names = [*a.templates, *(name for name in b.templates if name not in a.templates)]
    templates = [Change("template", name, "", a.templates.get(name, ""), b.templates.get(name, "")) for name in names]
    return out + [c for c in templates if c.old != c.new]


def _text(p: Principle, part: str) -> str:
    return str(getattr(p, part)).removesuffix(".0" if part == "weight" else "")


def _weight(p: Principle) -> tuple[str, ...]:
    return ("weight",) * (p.weight != 1.0)


def _renamed(was: dict[str, Principle], now: dict[str, Principle]) -> dict[str, str]:
    """New id -> old id of principles that say the same, or nearly, under another id; each pair once, the likest first."""

    def said(p: Principle) -> Counter:
        return Counter(f"{p.critique} {p.revision} {p.comparison}".split())

    gone = {id: said(p) for id, p in was.items() if id not in now}
    new = {id: said(p) for id, p in now.items() if id not in was}
    if len(gone) * len(new) > 250_000:  # nothing that a person would read
        return {}
    likeness = ((_like(a, b), id, old) for id, a in new.items() for old, b in gone.items())
    out: dict[str, str] = {}
    for like, id, old in sorted(likeness, key=lambda row: -row[0]):
        if like >= LIKE and id not in out and old not in out.values():
            out[id] = old
    return out


def _like(a: Counter, b: Counter) -> float:
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def _moved(now: Sequence[str], was: Sequence[str]) -> set[str]:
    """Those of `now` that changed their place among those in both, as few as explain the new order."""
    place = {id: n for n, id in enumerate(was)}
    order = [place[id] for id in now if id in place]
    ends: list[int] = []  # smallest last place of an increasing run of each length
    before, at = {}, []
    for x in order:
        n = bisect_left(ends, x)
        before[x] = at[n - 1] if n else None
        ends[n:] = [x, *ends[n + 1 :]]
        at[n:] = [x, *at[n + 1 :]]
    kept, x = set(), at[-1] if at else None
    while x is not None:
        kept.add(x)
        x = before[x]
    return {was[x] for x in order if x not in kept}


def word_diff(old: str, new: str) -> list[tuple[str, str]]:
    """-> runs of ("same" | "old" | "new", text), which put together without the "new" ones are `old`."""
    a, b = (re.findall(r"^\s+|\S+\s*", text) for text in (old, new))
    start = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    most = min(len(a), len(b)) - start
    end = next((n for n in range(most) if a[-1 - n] != b[-1 - n]), most)
    out, inner_a, inner_b = [("same", "".join(a[:start]))], a[start : len(a) - end], b[start : len(b) - end]
    if max(len(inner_a), len(inner_b)) > MOST_WORDS:
        out += [("old", "".join(inner_a)), ("new", "".join(inner_b))]
    else:
        for kind, i, j, k, n in difflib.SequenceMatcher(None, inner_a, inner_b, autojunk=False).get_opcodes():
            words = "".join(inner_a[i:j]), "".join(inner_b[k:n])
            out += [("same", words[0])] if kind == "equal" else [("old", words[0]), ("new", words[1])]
    out.append(("same", "".join(a[len(a) - end :])))
    return [run for run in out if run[1]]


def shown(change: Change) -> str:
    """A change in one line: [-old-] and {+new+} words."""
    head = " ".join(filter(None, (change.kind, change.of, change.part)))
    if change.kind not in ("reworded", "added", "removed", "template"):
        return one_line(f"{head}: {change.old or '(none)'} -> {change.new or '(none)'}")
    runs, said = word_diff(change.old, change.new), head + ": "
    for kind, text in runs:
        if kind == "same":
            said += text
        else:  # a last space reads better outside; at the end of a text it may be what changed
            space = " " * (text.endswith(" ") and runs[-1][0] == "same")
            open, close = ("[-", "-]") if kind == "old" else ("{+", "+}")
            said += open + text.removesuffix(space) + close + space
    return one_line(said)


def one_line(text: str) -> str:
    """Text of a file as part of a line: what breaks lines is written out."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") if "\n" in text or "\r" in text else text
