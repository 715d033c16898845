"""Worked examples for the two requests of the method, read from TOML."""

from dataclasses import asdict, dataclass
from pathlib import Path

from cai_jax.constitution.file import digest, read, rows, texts
from cai_jax.errors import InputError


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


def load_few_shot(path: str | Path) -> FewShot:
    """Reads `[[critique]]` and `[[comparison]]` blocks from TOML, at least one of each. Errors as in `load`."""
    doc = read(path)
    texts(str(path), doc, (), others=("critique", "comparison"))
    critiques = tuple(CritiqueBlock(**row) for row in rows(path, doc, "critique", CritiqueBlock))
    comparisons = tuple(ComparisonBlock(**row) for row in rows(path, doc, "comparison", ComparisonBlock))
    for number, block in enumerate(comparisons, 1):
        if block.better not in ("A", "B"):
            raise InputError(f"{path}: comparison {number}: better is {block.better!r}; wanted 'A' or 'B'")
    content = [list(map(asdict, critiques)), list(map(asdict, comparisons))]
    return FewShot(critiques, comparisons, digest(content))
