"""How ambiguous a principle is: how much a judge's label of the same pair depends on how the principle is put.

It is put in other words, which a person wrote (FILE.paraphrases.toml), in other ways to ask, and, to a judge that reasons
first, after other thoughts. A principle whose labels move with these does not say what it means, or the judge does not know it.

    [[paraphrase]]
    principle = "privacy.exposure"
    comparison = "Which answer tells less about a person who has not agreed to it?"
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cai_jax.constitution import Constitution, Principle
from cai_jax.constitution.file import hint, read, rows, texts
from cai_jax.errors import InputError
from cai_jax.intervals import bootstrap

ASKED = ("{}", "Read both answers with care. {}", "{} Take the better one.")  # ways to ask a question, the first as it is


@dataclass(frozen=True)
class Paraphrase:
    principle: str
    comparison: str


def paraphrases_of(path: str | Path) -> Path:
    return Path(path).with_suffix(".paraphrases.toml")


def load_paraphrases(path: str | Path, constitution: Constitution) -> list[Paraphrase]:
    """Raises InputError that names the paraphrase: a key missing or unknown, a principle that the constitution has not, words
    that are its own or another paraphrase's."""
    doc = read(path)
    texts(str(path), doc, (), others=("paraphrase",))
    out, known = [], {p.id: p.comparison for p in constitution.principles}
    for number, row in enumerate(rows(path, doc, "paraphrase", Paraphrase), 1):
        p, where = Paraphrase(**row), f"{path}: paraphrase {number}"
        if p.principle not in known:
            raise InputError(f"{where}: the constitution has no principle {p.principle!r}{hint(p.principle, list(known))}")
        if p.comparison == known[p.principle] or p in out:
            raise InputError(f"{where}: these words stand in the constitution, or in a paraphrase before it")
        out.append(p)
    return out


def versions(principle: Principle, paraphrases: Sequence[Paraphrase]) -> dict[str, list[Principle]]:
    """Source of difference -> the principle as it is and as that puts it; without what it has no other version by."""
    words = [principle.comparison, *(p.comparison for p in paraphrases if p.principle == principle.id)]
    found = {"words": words, "asked": [way.replace("{}", principle.comparison) for way in ASKED]}
    return {source: [replace(principle, comparison=x) for x in of] for source, of in found.items() if len(of) > 1}


def ambiguity(p_by_source: dict[str, np.ndarray], seed: int = 0) -> dict:
    """Of a principle. p_by_source: labels [N, V] of the same N pairs in the V versions of each source.

    -> "deviation": the root of the labels' variance among versions, mean over sources, so that principles of more sources are
    not more ambiguous for that, and over pairs; its interval (bootstrap over pairs); "by_source"; "split": share of pairs whose
    verdict is not the same in all versions; "pairs": places of pairs, those that differ most first.
    """
    variance_NS = np.stack([p_NV.var(axis=1, ddof=1) for p_NV in p_by_source.values()], axis=1)
    verdicts = np.concatenate([p_NV > 0.5 for p_NV in p_by_source.values()], axis=1)
    total_N = variance_NS.mean(axis=1)

    def deviation(x: np.ndarray) -> float:
        return float(np.sqrt(x.mean()))

    low, high = bootstrap(deviation, total_N, seed=seed)
    return {
        "deviation": deviation(total_N),
        "low": low,
        "high": high,
        "by_source": {source: deviation(variance_NS[:, s]) for s, source in enumerate(p_by_source)},
        "split": float(np.mean(verdicts.any(axis=1) & ~verdicts.all(axis=1))),
        "pairs": np.argsort(-total_N, kind="stable").tolist(),
    }
