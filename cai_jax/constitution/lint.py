"""What is wrong with a constitution, and what will make it work badly: findings that say why and how to mend them.

Errors are what `load` refuses. Warnings come of rules on words, without a model: each has a reason in how a principle is used,
which is alone, by its own words, and once for every record that draws it. They know English. What a file's `allow` names, by
rule ("mismatch") or by rule and id ("mismatch truth.self"), is not said.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from cai_jax.constitution import Principle, load, problems
from cai_jax.constitution.file import read, read_text
from cai_jax.errors import InputError

MAX_WORDS = 120  # of a critique's or a revision's request
MAX_QUESTION = 60  # words of a comparison, which is read twice for every principle of a judgement
SAME = 0.8  # cosine of two principles' words, weighted by how rare they are, from which they count as near-duplicates
MAX_SHARE = 0.5  # of all draws that one principle takes
RARE = 8  # principles that hold a word which is rare
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
    r"offer(s|ed)?|points? to|tells?|describes?|shows? how|give (them|the|what)|completes?|safer? way|advice|inform|"
    r"provides?|proposes?|recommends?|guides?|assists?)\b",
    re.IGNORECASE,
)
UNHELPFUL = re.compile(
    r"\b(no|not|without|less|fewer|any|gives?|more) (\w+ ){0,2}(help(ful)?|useful|use|advice|alternatives?)\b|"
    r"\bhelps? (less|to|with|in|someone|anyone|nobody)\b|\b(refuses?|declines?) (this |it )?instead\b|"
    r"\bexplains? that (you|it|they) (cannot|can't|will not)\b|\btells? (\w+ ){1,2}no\b",
    re.IGNORECASE,
)
BAD = (
    r"(harmful|unethical|toxic|dangerous|racist|sexist|illegal|dishonest|offensive|misleading|hateful|unsafe|rude|insulting|"
    r"false|cruel)"
)
WRONG_WAY = re.compile(
    rf"\b(answers?|responses?|repl(y|ies)|one|that|which) (is|are|sounds?|seems?) (the )?(more|most) (likely to be )?{BAD}\b|"
    rf"\b(choose|select|pick) [^.?]{{0,20}}\b(more|most) {BAD}|\b(causes?|does|do) (more|most) (harm|damage)\b|"
    r"\b(less|least) (honest|harmless|truthful|ethical|respectful|polite|safe|helpful)\b|\bworse (answer|response)",
    re.IGNORECASE,
)
ELSEWHERE = re.compile(
    r"\b(see|cf\.?|as in|under|per) (the )?(principles?|articles?|sections?)\b|\b(principle|article|section) \d+\b|"
    r"\b(principles?|categor(y|ies)) (above|below)\b|\b(above|previous|other|following) principles?\b",
    re.IGNORECASE,
)
MARKUP = re.compile(r"\{\w*\}|\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):")
COMMON = set("AI OK US UK EU UN TV ID IDs PDF URL URLs HTML DNA HIV CPR FBI CIA GPS SMS FAQ NOT NEVER ALWAYS MUST DO".split())


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
    return [replace(f, line=at.get(f.where, 0)) for f in warnings(principles, doc.get("allow", []))]


def warnings(principles: Sequence[Principle], allow: Sequence[str] = ()) -> list[Finding]:
    """What will make principles that are well-formed work badly."""
    names = {p.id for p in principles if re.search(r"[.-]", p.id)}
    lower = {w for p in principles for w in re.findall(r"\b[a-z]+\b", f"{p.critique} {p.revision} {p.comparison}")}
    rules = [found for p in principles for found in _alone(p, names, lower)] + list(_together(tuple(principles)))
    allowed = set(allow)
    return [Finding("warning", *found) for found in rules if not {found[0], f"{found[0]} {found[1]}"} & allowed]


def _lines(path: str | Path, doc: dict) -> list[int]:
    """The lines on which principles begin; 0 where the file writes them in another way."""
    rows = doc.get("principle")
    count = len(rows) if isinstance(rows, list) else 0
    text = read_text(path, "a TOML file").split("\n")
    found = [n for n, line in enumerate(text, 1) if re.match(r"\s*\[\[\s*\"?principle\"?\s*\]\]", line)]
    return found if len(found) == count else [0] * count


def _error(message: str, lines: list[int]) -> Finding:
    at = re.match(r"principle (\d+)(?: \('([^']*)'\))?", message)
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


def _alone(p: Principle, names: set[str], lower: set[str]) -> Iterator[tuple[str, str, str]]:
    """-> (rule, id, message). names: ids that no text holds by chance; lower: all words that stand in lower case somewhere."""
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
        for term in _terms(text, lower):
            yield (
                "undefined",
                p.id,
                f"its {part} uses {term!r} and does not say what it means; a model sees this text alone. Write it out here",
            )
        found = ELSEWHERE.search(text)
        if other := found[0] if found else next((name for name in names - {p.id} if name in text), None):
            yield (
                "elsewhere",
                p.id,
                f"its {part} refers to {other!r}, which a model that was given this principle alone does not see. "
                "Say here what is meant",
            )
        if found := MARKUP.search(text):
            yield (
                "markup",
                p.id,
                f"its {part} holds {found[0]!r}, which is text here: braces are filled in templates only, which also write "
                "the turns. Leave it out",
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


def _terms(text: str, lower: set[str]) -> list[str]:
    """Abbreviations that nothing beside them spells out, and names that look defined elsewhere, as Protected Person: those
    whose last word is elsewhere a common one."""
    found = []
    for match in re.finditer(r"\b[A-Z]{2,}s?\b", text):
        near = text[max(0, match.start() - 80) : match.end() + 80]
        if not re.search(rf"\(\s*{match[0]}\s*\)|\b{match[0]}\s*\(|\b{match[0]},? (that is|meaning|short for|means)\b", near):
            found.append(match[0])
    named = re.findall(r"(?<=[a-z,;] )(?:[A-Z][a-z]+ )+[A-Z][a-z]+\b(?! ?\()", text)
    found += [name for name in named if name.split()[-1].lower() in lower]
    return sorted(set(found) - COMMON)


def _together(principles: tuple[Principle, ...]) -> Iterator[tuple[str, str, str]]:
    for a, b, like in _duplicates(principles):
        yield (
            "duplicate",
            b,
            f"says nearly the same as {a!r} ({like}), which doubles its share of the draws. "
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


def _duplicates(principles: tuple[Principle, ...]) -> Iterator[tuple[str, str, str]]:
    """-> (id, id of one that says the same, in what). Only principles that share a word that is rare are compared."""
    seen: dict[tuple, str] = {}
    pairs = set()
    for p in principles:
        for what, text in (("request", (p.critique, p.revision)), ("comparison", (p.comparison,))):
            if (first := seen.setdefault((what, *text), p.id)) != p.id and (first, p.id) not in pairs:
                pairs.add((first, p.id))
                yield first, p.id, f"the same {what}"
    texts = {
        p.id: Counter(_stem(w) for w in words(f"{p.critique} {p.revision} {p.comparison}") if w not in FUNCTION)
        for p in principles
    }
    places: dict[str, list[str]] = {}
    for id, counts in texts.items():
        for w in counts:
            places.setdefault(w, []).append(id)
    rare = {w: math.log((1 + len(texts)) / len(ids)) for w, ids in places.items()}
    size = {id: math.sqrt(sum((n * rare[w]) ** 2 for w, n in counts.items())) for id, counts in texts.items()}
    near = {pair for ids in places.values() if len(ids) <= RARE for pair in combinations(ids, 2)} - pairs
    order = {id: n for n, id in enumerate(texts)}
    for a, b in sorted(near, key=lambda pair: (order[pair[1]], order[pair[0]])):
        dot = sum(n * texts[b][w] * rare[w] ** 2 for w, n in texts[a].items() if w in texts[b])
        if dot >= SAME * size[a] * size[b]:
            yield a, b, f"likeness {dot / (size[a] * size[b]):.2f}"


def _counterweight(p: Principle) -> bool:
    """Whether it asks for help. A comparison that an import made of a critique asks for what that one looks for."""
    own = (p.revision,) if p.critique in p.comparison else (p.revision, p.comparison)
    return any(HELPFUL.search(UNHELPFUL.sub(" ", text)) for text in own)


def _list(found: set[str]) -> str:
    return ", ".join(repr(w) for w in sorted(found))
