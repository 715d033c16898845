"""The regression suite of a constitution: cases with a better and a worse answer, FILE.checks.toml beside FILE.toml, and what a
judge made of them when they were last run, FILE.checks.json.

    [[case]]
    prompt = "How do I get into my neighbour's mailbox?"
    better = "..."
    worse = "..."
    principle = "privacy.exposure"     # or category = "privacy": all of its principles are asked
    why = "what the case is there for"
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cai_jax.constitution import Constitution, Principle
from cai_jax.constitution.file import digest, hint, id_of, read, tables, texts
from cai_jax.errors import InputError
from cai_jax.files import read_json
from cai_jax.intervals import wilson


@dataclass(frozen=True)
class Case:
    prompt: str
    better: str
    worse: str
    why: str
    principle: str = ""
    category: str = ""

    @property
    def key(self) -> str:
        """What names the case in records: its prompt and answers, and what they are held against."""
        return digest({k: v for k, v in asdict(self).items() if k != "why"})[:16]


def suite_of(path: str | Path) -> Path:
    return Path(path).with_suffix(".checks.toml")


def record_of(path: str | Path) -> Path:
    return Path(path).with_suffix(".checks.json")


def read_record(path: str | Path) -> dict:
    """What the suite of a constitution gave when it was last run; {}: never. Raises InputError for what is no such file."""
    place = record_of(path)
    found = read_json(place) if place.exists() else {}
    wanted = {"fingerprint": str, "judge": list, "summary": dict, "cases": dict}
    if found and not (isinstance(found, dict) and all(isinstance(found.get(k), kind) for k, kind in wanted.items())):
        raise InputError(f"{place}: no record of a suite; wanted {', '.join(wanted)}. Remove it, and run the suite again")
    return found or {}


def load_suite(path: str | Path, constitution: Constitution) -> list[Case]:
    """The cases of a suite. Raises InputError that names the case: a key missing or unknown, both or neither of principle and
    category, one that the constitution has not, the same case twice, answers that do not differ."""
    doc, out = read(path), {}
    texts(str(path), doc, (), others=("case",))
    known = {"principle": [p.id for p in constitution.principles], "category": [p.category for p in constitution.principles]}
    for number, row in enumerate(tables(path, doc, "case"), 1):
        where = f"{path}: case {number}{id_of(row)}"
        of = [k for k in known if isinstance(row, dict) and k in row]
        case = Case(**texts(where, row, ("prompt", "better", "worse", "why", *of), others=tuple(known)))
        if len(of) != 1:
            raise InputError(f"{where}: wanted a principle or a category, got {' and '.join(of) or 'neither'}")
        name = getattr(case, of[0])
        if name not in known[of[0]]:
            raise InputError(f"{where}: the constitution has no {of[0]} {name!r}{hint(name, known[of[0]])}")
        if case.better == case.worse:
            raise InputError(f"{where}: its better and its worse answer are the same")
        if case.key in out:
            raise InputError(f"{where}: the same case stands before it")
        out[case.key] = case
    return list(out.values())


def asked(case: Case, constitution: Constitution) -> list[Principle]:
    """The principles that a case is held against."""
    return [p for p in constitution.principles if case.principle == p.id or case.category == p.category]


def accuracy(p_better: Sequence[float]) -> dict:
    """Of verdicts: how many, the share that is right, its 95 % interval (Wilson 1927), the mean probability of the better."""
    n, right = len(p_better), sum(p > 0.5 for p in p_better)
    low, high = wilson(right / n, n)
    return {"n": n, "right": right, "accuracy": right / n, "low": low, "high": high, "mean": math.fsum(p_better) / n}


def table(verdicts: Sequence[tuple[Case, Principle, float]]) -> list[tuple[str, str, dict]]:
    """-> (kind, name, accuracy) of every category, every principle, and all; a verdict is one principle on one case."""
    out = []
    for kind in ("category", "principle"):
        names = dict.fromkeys(p.category if kind == "category" else p.id for _, p, _ in verdicts)
        for name in names:
            out.append(
                (kind, name, accuracy([x for _, p, x in verdicts if name == (p.category if kind == "category" else p.id)]))
            )
    return [*out, ("all", "", accuracy([x for *_, x in verdicts]))]


def changed(before: dict[str, float], now: dict[str, float]) -> list[tuple[str, float, float]]:
    """-> (key, was, is) of cases in both whose verdict is another; those that are wrong now come first."""
    found = [(k, before[k], x) for k, x in now.items() if k in before and (before[k] > 0.5) != (x > 0.5)]
    return sorted(found, key=lambda f: f[2])
