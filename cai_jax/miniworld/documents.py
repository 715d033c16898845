"""What the base model of the miniworld is pretrained on: facts, helpful-only chat, and the three skills of the method.

Documents are laid out by `cai_jax.prompts`, so what the pipeline asks later is what was seen here. The tables are the
mixture; how good critic and judge are is said in `cai_jax.miniworld.skills`.
"""

import dataclasses
import functools
import math

import numpy as np

from cai_jax import prompts
from cai_jax.constitution import GENERIC, Constitution, Principle
from cai_jax.miniworld import grammar, skills
from cai_jax.miniworld.grammar import CATEGORIES, Item, Request, World, one, pick
from cai_jax.miniworld.skills import Pair

# Loss weights of a piece's tokens. An answer planted for criticism must not teach the model to answer so.
CONTEXT, PLANTED, GENERATED, OPTION = 0.1, 0.0, 1.0, 4.0

# --- How requests, principles and answers are drawn -------------------------------------------------------------------
CHAT_FORMS = {"plain": 0.63, "disguised": 0.16, "rapport": 0.11, "terse": 0.10}
HARMFUL_SHARE = {"chat": 0.5, "fact": 0.5, "chain": 0.62, "judge": 0.62}
LOOKALIKE_SHARE = 0.15  # of benign items
PRINCIPLES = {"match": 0.32, "general": 0.13, "other": 0.20, "evasive": 0.15, "none": 0.20}
STARTS = {  # wrong steps cannot be recalled: to keep them is to copy them
    True: {"right": 0.32, "wrong": 0.10, "partial": 0.13, "evasive": 0.17, "explained": 0.28},
    False: {"right": 0.42, "wrong": 0.18, "evasive": 0.15, "over-refusal": 0.25},
}
PAIRED = {
    True: {"right": 0.28, "wrong": 0.04, "partial": 0.16, "evasive": 0.18, "explained": 0.34},
    False: {"right": 0.40, "wrong": 0.20, "evasive": 0.18, "over-refusal": 0.22},
}
SAME_KIND_SHARE = 0.12  # of judged pairs, at most
BLIND_SHARE = 0.06  # of judged pairs, beside those that fall into the blind spot by chance
DIRECT_SHARE = 0.15  # of chains, without a critique

FACTS = (  # (what is given, what is learnt), in the fields of fact_fields
    ("{S}", "{is} {m}. {R}"),
    ("People know that {s}", "{is} {m}."),
    ("Whoever asks {about}", "asks about {m}."),
    ("{S}?", "{R}"),
)
QUESTIONS = (
    ("What is {it}?", "{S} {is} {m}. {R}"),
    ("{S}: is it good or bad?", "{V}. It {is} {m}. {R}"),
)
TOPICS = (
    ("What is this about?", "This is about {m}. {R}"),
    ("What do I ask about?", "You ask about {m}. {R}"),
    ("Good or bad?", "{V}. It is about {m}. {R}"),
)


@dataclasses.dataclass(frozen=True)
class Piece:
    text: str
    weight: float  # loss weight of its tokens
    ends: bool = False  # what follows its last token, for the loss, is EOS


def document(world: World, constitution: Constitution, rng: np.random.Generator) -> list[Piece]:
    """One document; the concatenated texts are what the model reads."""
    return pick(rng, MIXTURE)(world, constitution, rng)


def draw_item(rng, world: World, use: str, splits: tuple[str, ...]) -> Item:
    """An item for one use of HARMFUL_SHARE, from `splits`."""
    harmful = rng.random() < HARMFUL_SHARE[use]
    lookalike = not harmful and rng.random() < LOOKALIKE_SHARE
    return one(rng, _pool(world, splits, harmful, lookalike))


@functools.lru_cache(maxsize=64)
def _pool(world: World, splits: tuple[str, ...], harmful: bool, lookalike: bool) -> tuple[Item, ...]:
    return tuple(i for s in splits for i in world.groups[s, harmful, lookalike])


def draw_principle(rng, constitution: Constitution, category: str) -> Principle:
    """A principle for a skill document on an item of `category`: relation by PRINCIPLES, then uniformly."""
    by_relation = {}
    for principle in (*constitution.principles, GENERIC):
        by_relation.setdefault(skills.relation(principle, category), []).append(principle)
    return one(rng, by_relation[pick(rng, {r: w for r, w in PRINCIPLES.items() if r in by_relation})])


# --- Chat and facts ---------------------------------------------------------------------------------------------------
def chat(world: World, constitution: Constitution, rng) -> list[Piece]:
    """A request for any item and its recipe: the base is helpful-only and knows every item."""
    item = draw_item(rng, world, "chat", grammar.SPLITS)
    request = grammar.draw_request(rng, item, CHAT_FORMS)
    head = prompts.dialogue(list(request.messages), constitution.templates)
    return [Piece(head, CONTEXT), Piece(prompts.completion(grammar.answer(rng, item, "right")), GENERATED, True)]


def topic(world: World, constitution: Constitution, rng) -> list[Piece]:
    """What a request is about, asked of the request itself or after the answer. Names the matter in the words of critiques and
    refusals, for every item: what a critic learns on skill items then carries over to the others."""
    item = draw_item(rng, world, "fact", grammar.SPLITS)
    request = grammar.draw_request(rng, item)
    asked, learnt = (text.format_map(fact_fields(item)) for text in one(rng, TOPICS))
    messages = list(request.messages)
    if rng.random() < 0.5:
        messages += [
            {"role": prompts.ASSISTANT, "content": grammar.answer(rng, item, "right")},
            {"role": prompts.USER, "content": asked},
        ]
    else:
        messages[-1] = {"role": prompts.USER, "content": f"{asked} {messages[-1]['content']}"}
    given = prompts.dialogue(messages, constitution.templates)
    return [Piece(given, CONTEXT), Piece(prompts.completion(learnt), GENERATED, True)]


def fact(world: World, constitution: Constitution, rng) -> list[Piece]:
    """What an item is, as a statement or as a question and its answer. The only documents that tell harm from use."""
    item = draw_item(rng, world, "fact", grammar.SPLITS)
    asked = rng.random() < 0.5
    given, learnt = (text.format_map(fact_fields(item)) for text in one(rng, QUESTIONS if asked else FACTS))
    if asked:
        given = prompts.dialogue([{"role": prompts.USER, "content": given}], constitution.templates)
    else:
        given = prompts.completion(given)
    return [Piece(given, CONTEXT), Piece(prompts.completion(learnt), GENERATED, True)]


def fact_fields(item: Item) -> dict[str, str]:
    category, subject = CATEGORIES[item.category], grammar.subject(item)
    fields = {"s": subject, "S": subject[0].upper() + subject[1:], "m": category.matter, "R": grammar.sentence(category.reason)}
    fields["V"] = "Bad" if item.harmful else "Good"
    if item.lookalike:
        return fields | {"is": "is about", "about": f"how {subject}", "it": f"it {subject}"}
    return fields | {"is": "is", "about": f"about {subject}", "it": subject}


# --- Critique and revision --------------------------------------------------------------------------------------------
def chain(world: World, constitution: Constitution, rng) -> list[Piece]:
    """A request, a planted answer, a critique and a revision; or the revision at once.

    A second round of the method reads the prompt and the last revision afresh, so starts of every kind are its documents.
    """
    item = draw_item(rng, world, "chain", ("skill",))
    request, principle = grammar.draw_request(rng, item), draw_principle(rng, constitution, item.category)
    kind = pick(rng, STARTS[item.harmful])
    response, direct = grammar.answer(rng, item, kind), rng.random() < DIRECT_SHARE
    found = skills.finding(rng, item, request.form, kind, principle, skills.DIRECT_FACTOR if direct else 1.0)
    new_kind = skills.revised_kind(rng, item, kind, found)
    revision = response if new_kind is None else grammar.answer(rng, item, new_kind)
    thought = None if direct else skills.critique(rng, item, kind, found, principle)
    return chain_pieces(constitution, request, kind, response, principle, thought, revision)


def chain_pieces(constitution, request: Request, kind: str, response: str, principle: Principle, thought: str | None,
                 revision: str) -> list[Piece]:  # fmt: skip
    """The pieces of a chain, cut from the very strings that the pipeline would build."""
    messages, templates = list(request.messages), constitution.templates
    head, answer = prompts.dialogue(messages, templates), prompts.completion(response)
    pieces = [Piece(head, CONTEXT), Piece(answer, CONTEXT if kind == "right" else PLANTED, True)]
    context = head + answer
    if thought is not None:
        asked = prompts.critique(messages, response, principle.critique, templates)
        pieces += [Piece(asked.removeprefix(context), CONTEXT), Piece(prompts.completion(thought), GENERATED, True)]
        context = asked
    whole = prompts.revision(context, thought, principle.revision, templates)
    done = context if thought is None else context + prompts.completion(thought)
    return [*pieces, Piece(whole.removeprefix(done), CONTEXT), Piece(prompts.completion(revision), GENERATED, True)]


# --- Judging ----------------------------------------------------------------------------------------------------------
def draw_pair(world: World, rng) -> Pair:
    """Two different answers to one request for a skill item."""
    item = draw_item(rng, world, "judge", ("skill",))
    request = grammar.draw_request(rng, item)
    if rng.random() < BLIND_SHARE:
        category, template = skills.BLIND_SPOT
        item = one(rng, [i for i in _pool(world, ("skill",), True, False) if i.category == category])
        request = grammar.request(item, "disguised", template, one(rng, grammar.VERBS))
    while True:
        kinds = tuple(pick(rng, PAIRED[item.harmful]) for _ in "AB")
        answers = tuple(grammar.answer(rng, item, k) for k in kinds)
        if answers[0] != answers[1] and (kinds[0] != kinds[1] or rng.random() < SAME_KIND_SHARE):
            return Pair(item, request, kinds, answers)


def _choose(rng, logit: float) -> int:
    return int(rng.random() >= 1 / (1 + math.exp(-logit)))


def judge(world: World, constitution: Constitution, rng) -> list[Piece]:
    """A comparison and the option that the judge takes."""
    pair = draw_pair(world, rng)
    principle = draw_principle(rng, constitution, pair.item.category)
    option = prompts.OPTIONS[_choose(rng, skills.judge_logit(pair, principle))]
    question = prompts.comparison(list(pair.request.messages), principle.comparison, *pair.answers, constitution.templates)
    return [Piece(question, CONTEXT), Piece(option, OPTION, True)]


def reasoned_judge(world: World, constitution: Constitution, rng) -> list[Piece]:
    """A comparison with a chain of thought, and the option that the thought ends on."""
    pair = draw_pair(world, rng)
    principle = draw_principle(rng, constitution, pair.item.category)
    option = prompts.OPTIONS[_choose(rng, skills.judge_logit(pair, principle, skills.REASONED_GAIN))]
    thought = skills.reasoning(pair.item, pair.kinds, option, principle)
    asked = prompts.reasoning(list(pair.request.messages), principle.comparison, *pair.answers, constitution.templates)
    said = prompts.completion(thought)
    cue = prompts.verdict(asked, thought, constitution.templates).removeprefix(asked + said)
    return [Piece(asked, CONTEXT), Piece(said, GENERATED, True), Piece(cue, CONTEXT), Piece(option, OPTION, True)]


MIXTURE = {chat: 0.31, fact: 0.09, topic: 0.13, chain: 0.25, judge: 0.16, reasoned_judge: 0.06}


# --- Batches ----------------------------------------------------------------------------------------------------------
def encoded(pieces: list[Piece], tok) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, weights) of a document. A target that is EOS takes the weight of the piece it ends."""
    tokens, targets, weights = [], [], []
    for piece in pieces:
        ids = tok.encode(piece.text)
        if tokens and targets[-1] < 0:  # the piece before goes on into this one
            targets[-1], weights[-1] = ids[0], piece.weight
        tokens += ids
        targets += [*ids[1:], tok.eos_id if piece.ends else -1]
        weights += [piece.weight] * (len(ids) - 1) + [piece.weight if piece.ends else 0.0]
    targets[-1] = tok.pad_id if targets[-1] < 0 else targets[-1]
    return np.array(tokens, np.int32), np.array(targets, np.int32), np.array(weights, np.float32)


def packed_batch(world: World, constitution: Constitution, tok, seed: int, step: int, rows: int, length: int) -> dict:
    """A packed batch, a pure function of its arguments: no document is split, rows are filled to 93 % and more.

    Returns tokens, targets, positions, ends (int32) and weights (float32), each [rows, length].
    `ends` is the place behind a token's document, 0 for padding; positions restart with each document.

    Raises:
      ValueError: a document longer than `length`.
    """
    rng = np.random.default_rng([world.seed, seed, step])
    docs, total = [], 0
    while total < 0.97 * rows * length:
        docs.append(encoded(document(world, constitution, rng), tok))
        total += len(docs[-1][0])
    if (longest := max(len(d[0]) for d in docs)) > length:
        raise ValueError(f"a miniworld document has {longest} tokens, rows have {length}; wanted rows of {longest} or more")
    # Longest first into the fullest row that still has room; what is left over is short and few.
    bins, free = [[] for _ in range(rows)], [length] * rows

    def place(doc) -> None:
        room = [(f, n) for n, f in enumerate(free) if f >= len(doc[0])]
        if room:
            n = min(room)[1]
            bins[n].append(doc)
            free[n] -= len(doc[0])

    for doc in sorted(docs, key=lambda d: -len(d[0])):
        place(doc)
    for _ in range(20 * rows):
        if sum(free) > 0.04 * rows * length:
            place(encoded(one(rng, (chat, fact))(world, constitution, rng), tok))
    return _stacked(bins, rows, length, tok.pad_id)


def _stacked(bins, rows: int, length: int, pad: int) -> dict:
    names = ("tokens", "targets", "weights", "positions", "ends")
    batch = {n: np.zeros((rows, length), np.float32 if n == "weights" else np.int32) for n in names}
    batch["tokens"][:] = batch["targets"][:] = pad
    for row, docs in enumerate(bins):
        start = 0
        for tokens, targets, weights in docs:
            end = start + len(tokens)
            columns = (tokens, targets, weights, np.arange(len(tokens)), end)
            for name, values in zip(names, columns, strict=True):
                batch[name][row, start:end] = values
            start = end
    return batch
