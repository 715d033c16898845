"""What an edit of a constitution changed, principle by principle."""

import difflib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from cai_jax.constitution import PARTS, Constitution, Principle

TEXTS = tuple(part for part in PARTS if part != "id")


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
    out += [Change("removed", p.id, part, getattr(p, part)) for p in gone for part in TEXTS]
    moved = _moved([renamed.get(id, id) for id in now], list(was))
    for id, p in now.items():
        old = was.get(renamed.get(id, id))
        if old is None:
            out += [Change("added", id, part, "", getattr(p, part)) for part in TEXTS]
            continue
        out += [Change("renamed", id, "id", old.id, id)] * (old.id != id)
        parts = [part for part in TEXTS if getattr(old, part) != getattr(p, part)]
        out += [Change("reworded", id, part, getattr(old, part), getattr(p, part)) for part in parts]
        out += [Change("re-weighted", id, "weight", f"{old.weight:g}", f"{p.weight:g}")] * (old.weight != p.weight)
        if old.id in moved:
            places = [list(was).index(old.id), list(now).index(id)]
            out.append(Change("moved", id, "place", *(str(1 + place) for place in places)))
    names = [*a.templates, *(name for name in b.templates if name not in a.templates)]
    templates = [Change("template", name, "", a.templates.get(name, ""), b.templates.get(name, "")) for name in names]
    return out + [c for c in templates if c.old != c.new]


def _renamed(was: dict[str, Principle], now: dict[str, Principle]) -> dict[str, str]:
    """New id -> old id of principles that say the same in all their texts."""

    def said(p: Principle) -> tuple:
        return p.critique, p.revision, p.comparison

    old = {said(p): id for id, p in was.items() if id not in now}
    return {id: old.pop(said(p)) for id, p in now.items() if id not in was and said(p) in old}


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
    a, b = (re.findall(r"\S+\s*", text) for text in (old, new))
    out = []
    for kind, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            out.append(("same", "".join(a[i:j])))
        else:
            out += [(side, "".join(words)) for side, words in (("old", a[i:j]), ("new", b[k:n])) if words]
    return out


def shown(change: Change) -> str:
    """A change in one paragraph: [-old-] and {+new+} words."""
    head = " ".join(filter(None, (change.kind, change.of, change.part)))
    if change.kind not in ("reworded", "added", "removed", "template"):
        return f"{head}: {change.old or '(none)'} -> {change.new or '(none)'}"
    marks = {"same": "{}", "old": "[-{}-]", "new": "{{+{}+}}"}
    runs = [(kind, text.rstrip(), text[len(text.rstrip()) :]) for kind, text in word_diff(change.old, change.new)]
    return f"{head}: " + "".join(marks[kind].replace("{}", text) + space for kind, text, space in runs).replace(
        "{{", "{"
    ).replace("}}", "}")
