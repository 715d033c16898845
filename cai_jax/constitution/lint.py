"""What is wrong with a constitution, and what will make it work badly: findings that say why and how to mend them.

Errors are what `load` refuses. Warnings come of rules on words, without a model: each has a reason in how a principle is used,
which is alone, by its own words, and once for every record that draws it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from cai_jax.constitution import Principle, load, problems
from cai_jax.constitution.file import read
from cai_jax.errors import InputError

MAX_WORDS = 120  # of a critique's or a revision's request
MAX_QUESTION = 60  # words of a comparison, which is read twice for every principle of a judgement
SAME = 0.8  # cosine of two principles' words, weighted by how rare they are, from which they count as near-duplicates
MAX_SHARE = 0.5  # of all draws that one principle takes
ABSTRACT = set(
    """good bad better best worse worst ethical ethically unethical ethics moral morally immoral morality right wrong
    appropriate appropriately inappropriate proper properly improper nice acceptable unacceptable responsible responsibly
    irresponsible problematic harmful harmless harm beneficial positive negative ideal suitable respectable virtuous decent
    values quality""".split()
)
FUNCTION = set(
    """a an the of or and to in on at by for from with without as is are was were be been being it its this that these those
    which who whom whose what when where why how do does did has have had not no nor any all some each every one two both more
    most less least than then there their they them he she his her him you your we our i me my if so such into out up over
    about also very can could would should may might must will shall just only please say says said""".split()
)
FRAME = set(  # what every request has
    """answer answers response responses reply replies assistant assistants human last preceding rewrite revise choose select
    critique identify explain discuss point way ways specific specifically remove make sure anything something someone person
    people content give gives makes quote""".split()
)
HELPFUL = re.compile(
    r"\b(help(s|ed|ful|fully|ing)?|useful(ly)?|usefulness|answer(s|ed)? the|alternatives?|instead|explain(s|ed)?|suggests?|"
    r"offer(s|ed)?|points? to|tells?|describes?|shows? how|give (them|the|what)|completes?|safer? way|advice|inform)\b",
    re.IGNORECASE,
)
UNHELPFUL = re.compile(
    r"\b(no|not|without|less|any|gives?|more) (\w+ )?help\b|\bhelps? (less|to|with|in|someone|anyone|nobody)\b", re.I
)
WRONG_WAY = re.compile(
    r"\b(which|choose|select)\b[^.?]{0,60}\b(more|most|worse|worst)\s+(likely to be |likely )?"
    r"(harmful|unethical|toxic|dangerous|racist|sexist|illegal|dishonest|offensive|misleading)|\bworse (answer|response)",
    re.IGNORECASE,
)
ELSEWHERE = re.compile(
    r"\b(see|cf\.?|as in|under|by|per|from) (the )?(principle|article|section|rule)s?\b|"
    r"\b(principle|article|section|rule) \d+\b|\b(principles?|rules?|categor(y|ies)) (above|below)\b|"
    r"\b(above|previous|other|following) (principle|rule)s?\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """`where`: an id, a category, or "" for the whole file; `line` of the file, 0: none."""

    level: str  # "error" or "warning"
    rule: str
    where: str
    message: str
    line: int = 0


def lint(path: str | Path, templates: Mapping[str, str]) -> list[Finding]:
    """All findings of a file, errors first; with errors there are no warnings, which are about what a model would see."""
    try:
        doc = read(path)
    except InputError as error:
        at = re.search(r"at line (\d+)", str(error))
        return [Finding("error", "file", "", str(error).removeprefix(f"{path}: "), int(at[1]) if at else 0)]
    lines = _lines(path, doc)
    if found := list(problems(path, doc, templates)):
        return [_error(message.removeprefix(f"{path}: "), lines) for message in found]
    principles = load(path, templates=templates).principles
    at = {p.id: line for p, line in zip(principles, lines, strict=True)}
    rules = [f for p in principles for f in _alone(p)] + list(_together(principles))
    return [Finding("warning", rule, where, message, at.get(where, 0)) for rule, where, message in rules]


def _lines(path: str | Path, doc: dict) -> list[int]:
    """The lines on which principles begin; 0 where the file writes them in another way."""
    rows = doc.get("principle")
    count = len(rows) if isinstance(rows, list) else 0
    text = Path(path).read_text(encoding="utf-8").splitlines()
    found = [n for n, line in enumerate(text, 1) if re.match(r"\s*\[\[\s*\"?principle\"?\s*\]\]", line)]
    return found if len(found) == count else [0] * count


def _error(message: str, lines: list[int]) -> Finding:
    at = re.match(r"principle (\d+)(?: \('([^']*)'\))?: ", message)
    number = int(at[1]) if at else 0
    return Finding("error", "form", (at[2] or "") if at else "", message, lines[number - 1] if 0 < number <= len(lines) else 0)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def content(text: str) -> set[str]:
    """The stems of the words that say something."""
    return {_stem(w) for w in words(text) if w not in FUNCTION and w not in FRAME}


def _stem(word: str) -> str:
    """So that a word's common forms are one."""
    for end in ("ingly", "edly", "ings", "ing", "ies", "ied", "ed", "es", "ly", "s", "e", "y"):
        if word.endswith(end) and len(word) - len(end) >= 4:
            return word[: -len(end)]
    return word


def _alone(p: Principle) -> Iterator[tuple[str, str, str]]:
    """-> (rule, id, message)."""
    for part in ("critique", "revision", "comparison"):
        text = getattr(p, part)
        said = {w for w in words(text) if w not in FUNCTION and w not in FRAME}
        vague = said & ABSTRACT
        if vague and len(said - ABSTRACT) <= 1:
            yield (
                "abstract",
                p.id,
                f"its {part} says little but {_list(vague)}: a critique can only point at what it was told to look for. "
                "Name the words, acts or details that would be at fault, and what should stand in their place",
            )
        limit = MAX_QUESTION if part == "comparison" else MAX_WORDS
        if (n := len(words(text))) > limit:
            yield (
                "long",
                p.id,
                f"its {part} has {n} words, more than {limit}; each record that draws it reads all of them. "
                "Keep one demand, and make the rest principles of their own",
            )
        for term in _terms(text):
            yield (
                "undefined",
                p.id,
                f"its {part} uses {term!r} and does not say what it means; a model sees this text alone. Write it out here",
            )
        if found := ELSEWHERE.search(text):
            yield (
                "elsewhere",
                p.id,
                f"its {part} refers to {found[0]!r}, which a model that was given this principle alone does not see. "
                "Say here what is meant",
            )
    if not content(p.comparison) & (content(p.critique) | content(p.revision)):
        yield (
            "mismatch",
            p.id,
            "its comparison shares no word with its critique or revision, so the two phases may be taught different things. "
            "Ask in the comparison for what the critique looks for",
        )
    if found := WRONG_WAY.search(p.comparison):
        yield (
            "direction",
            p.id,
            f"its comparison asks for the worse answer ({found[0]!r}), and what a judge chooses counts as preferred. "
            "Turn it round",
        )


def _terms(text: str) -> list[str]:
    """Abbreviations that nothing beside them spells out, and names that look defined elsewhere, as Protected Person."""
    found = []
    for match in re.finditer(r"\b[A-Z]{2,}s?\b", text):
        near = text[max(0, match.start() - 80) : match.end() + 80]
        if not re.search(rf"\(\s*{match[0]}\s*\)|\b{match[0]}\s*\(|\b{match[0]},? (that is|meaning|short for|means)\b", near):
            found.append(match[0])
    found += re.findall(r"(?<=[a-z,;] )(?:[A-Z][a-z]+ )+[A-Z][a-z]+\b", text)
    return sorted(set(found) - {"AI", "OK", "US", "UK", "EU", "UN", "TV", "ID", "IDs"})


def _together(principles: tuple[Principle, ...]) -> Iterator[tuple[str, str, str]]:
    texts = {
        p.id: Counter(_stem(w) for w in words(f"{p.critique} {p.revision} {p.comparison}") if w not in FUNCTION)
        for p in principles
    }
    df = Counter(w for counts in texts.values() for w in counts)
    rare = {w: math.log((1 + len(texts)) / n) for w, n in df.items()}
    vectors = {id: {w: n * rare[w] for w, n in counts.items()} for id, counts in texts.items()}
    for a, b in combinations(principles, 2):
        if (like := _cosine(vectors[a.id], vectors[b.id])) >= SAME or a.comparison == b.comparison:
            yield (
                "duplicate",
                b.id,
                f"says nearly the same as {a.id!r} (likeness {like:.2f}), which doubles its share of the draws. "
                "Merge them, or give the first a weight",
            )
    weighed = {p.category for p in principles if _counterweight(p)}
    bare = [c for c in dict.fromkeys(p.category for p in principles) if c not in weighed]
    if bare:
        yield (
            "counterweight",
            ", ".join(bare),
            "no principle of the category asks for help to be given, so the surest way to meet them is to refuse. Say in a "
            "revision what to offer instead, or add a principle that an empty refusal fails",
        )
    total = sum(p.weight for p in principles)
    for p in principles:
        if len(principles) > 1 and p.weight / total > MAX_SHARE:
            yield "weight", p.id, f"takes {p.weight / total:.0%} of all draws; the others hardly count. Lower its weight"


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
    dot = sum(x * b[w] for w, x in a.items() if w in b)
    return dot / math.sqrt(max(1e-30, sum(x * x for x in a.values()) * sum(x * x for x in b.values())))


def _counterweight(p: Principle) -> bool:
    return any(HELPFUL.search(UNHELPFUL.sub(" ", text)) for text in (p.revision, p.comparison))


def _list(found: set[str]) -> str:
    return ", ".join(repr(w) for w in sorted(found))
