"""Makes the miniworld's files: its tokenizer, and the prompts, comparisons and rated conversations that the pipeline reads.

`python -m cai_jax.miniworld.make` writes the data files afresh; they are a pure function of the world's seed.
"""

import collections
import json
import os
from pathlib import Path

import numpy as np

from cai_jax import prompts as layouts
from cai_jax.constitution import GENERIC, Constitution
from cai_jax.miniworld import documents, grammar, oracle, skills
from cai_jax.miniworld.grammar import Item, World, one, pick

DATA = Path(__file__).parent / "data"
PAD, END = "<|pad|>", "<|end|>"
# One pre-token: a section marker with its line breaks, an option letter, a word with its space, a digit, or one sign.
PRE_TOKEN = r"\n+[A-Za-z]+:?| \([A-Z]\)| ?[A-Za-z']+| ?[0-9]|\n+| ?[^\sA-Za-z0-9]|\s"

TEMPLATES_PER_ITEM = {"redteam": 4, "helpful": 2, "helpful lookalike": 5, "heldout harmful": 5, "heldout": 4, "lookalike": 6}
EVAL_SAMPLE, COMPARISONS, ERROR_RATE, PROBES = 256, 1200, 0.05, 240
COMPARED = {"right": 0.40, "wrong": 0.25, "evasive": 0.15, "over-refusal": 0.20}
ATTEMPTS, HARMFUL_SHARE, CUT_SHARE = 1200, 0.6, 0.1  # rated conversations; answers that break off, of which some give one step
ATTEMPTED = {  # by whether the request is harmful
    True: {"right": 0.30, "wrong": 0.15, "partial": 0.20, "evasive": 0.10, "explained": 0.25},
    False: {"right": 0.60, "wrong": 0.15, "partial": 0.05, "evasive": 0.10, "over-refusal": 0.10},
}


# --- Tokenizer --------------------------------------------------------------------------------------------------------
def tokenizer(world: World, constitution: Constitution):
    """A transformers PreTrainedTokenizerFast: byte-level, with every word of the world's texts as one token.

    The vocabulary is closed, so the words are listed and not learnt: a model without merges looks up the whole pre-token,
    and any other text falls back to its bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated")
    words = {part for text in texts(world, constitution) for part, _ in split.pre_tokenize_str(text)}
    names = {to_bytes.pre_tokenize_str(w)[0][0] for w in words}
    listed = [PAD, END, *sorted(to_bytes.alphabet()), *sorted(n for n in names if len(n) > 1)]
    bpe = models.BPE(vocab={t: n for n, t in enumerate(listed)}, merges=[], ignore_merges=True)
    fast = Tokenizer(bpe)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False)


def texts(world: World, constitution: Constitution) -> set[str]:
    """Texts that together hold every pre-token of every document and every prompt of this world."""
    rng, out = np.random.default_rng(0), set()
    principles = (*constitution.principles, GENERIC)
    for item in world.items:
        for form, templates in grammar.REQUESTS.items():
            for template in templates:
                verbs = grammar.VERBS[:1] if item.lookalike else grammar.VERBS
                for verb in verbs:
                    messages = list(grammar.request(item, form, template, verb).messages)
                    out.add(layouts.dialogue(messages, constitution.templates))
        fields = documents.fact_fields(item)
        for halves in (*documents.FACTS, *documents.QUESTIONS, *documents.TOPICS):
            out |= {layouts.completion(half.format_map(fields)) for half in halves}
    for category in grammar.CATEGORIES.values():
        item = next(i for i in world.items if i.category == category.name)
        steps = [tuple((v, o) for _ in "123") for v in grammar.STEP_VERBS for o in category.objects]
        fields = {"matter": category.matter, "reason": category.reason, "alternative": category.alternative}
        for templates in grammar.ANSWERS.values():
            for template in templates:
                out |= {layouts.completion(template.format(**fields, **grammar.steps_text(s))) for s in steps}
        for principle in principles:
            for found in ("harmful", "evasive", "missed", "fine"):
                out.add(layouts.completion(skills.critique(rng, item, "right", found, principle)))
            for kinds in skills.DESCRIBED:
                out.add(layouts.completion(skills.reasoning(item, (kinds, kinds), layouts.OPTIONS[0], principle)))
    message = [{"role": layouts.USER, "content": "I"}, {"role": layouts.ASSISTANT, "content": "I"}]
    for p in principles:
        critique = layouts.critique(message, "I", p.critique, constitution.templates)
        thought = layouts.reasoning(message, p.comparison, "I", "I", constitution.templates)
        out |= {layouts.revision(critique, "I", p.revision, constitution.templates)}
        out |= {layouts.comparison(message, p.comparison, "I", "I", constitution.templates)}
        out |= {layouts.verdict(thought, "I", constitution.templates)}
    return out | set(layouts.OPTIONS)


# --- Prompts and comparisons ------------------------------------------------------------------------------------------
def prompts(world: World) -> dict[str, list[dict]]:
    """The records of every data file, by file name."""
    rng = np.random.default_rng([world.seed, 0xDA7A])
    groups, per = world.groups, TEMPLATES_PER_ITEM
    known = [*groups["skill", False, False], *groups["redteam", False, False]]
    alike = [*groups["skill", False, True], *groups["redteam", False, True]]
    redteam = _records(rng, "redteam", [(i, per["redteam"]) for i in groups["redteam", True, False]])
    helpful = [(i, per["helpful"]) for i in known] + [(i, per["helpful lookalike"]) for i in alike]
    helpful = _records(rng, "helpful", helpful)
    heldout = [(i, per["heldout harmful"]) for i in groups["heldout", True, False]]
    heldout += [(i, per["heldout"]) for i in groups["heldout", False, False]]
    heldout += [(i, per["lookalike"]) for i in groups["heldout", False, True]]
    sample = [r for rows in (redteam, helpful) for r in _sample(rng, rows, EVAL_SAMPLE)]
    return {
        "redteam.jsonl": redteam,
        "helpful.jsonl": helpful,
        "heldout.jsonl": _records(rng, "heldout", heldout),
        "redteam_eval.jsonl": sample,
        "comparisons.jsonl": [_comparison(rng, world, n, one(rng, helpful)) for n in range(COMPARISONS)],
        "probes.jsonl": _probes(world, redteam, helpful),
        "attempts.jsonl": _attempts(world),
    }


def _records(rng, name: str, wanted: list[tuple[Item, int]]) -> list[dict]:
    """Prompt records in a random order: per item, so many requests of different templates."""
    rows = [(i, r) for i, count in wanted for r in _requests(rng, i, count)]
    order = rng.permutation(len(rows))
    return [_record(f"{name}-{n:04d}", *rows[k]) for n, k in enumerate(order)]


def _requests(rng, item: Item, count: int) -> list[grammar.Request]:
    """`count` requests of different templates, forms drawn by FORMS."""
    free = {form: list(grammar.REQUESTS[form]) for form in grammar.FORMS}
    out = []
    for _ in range(count):
        form = pick(rng, {f: w for f, w in grammar.FORMS.items() if free[f]})
        template = free[form].pop(int(rng.integers(len(free[form]))))
        out.append(grammar.request(item, form, template, one(rng, grammar.VERBS)))
    return out


def _record(record_id: str, item: Item, request: grammar.Request) -> dict:
    return {
        "id": record_id,
        "messages": list(request.messages),
        "kind": "harmful" if item.harmful else "benign",
        "category": item.category,
        "item": item.name,
        "split": item.split,
        "form": request.form,
        "template": request.template,
        "lookalike": item.lookalike,
    }


def _sample(rng, rows: list[dict], count: int) -> list[dict]:
    """`count` rows in their order, as many of each category as can be."""
    seen, ranked = collections.Counter(), []
    for n in rng.permutation(len(rows)):
        ranked.append((seen[rows[n]["category"]], int(n)))
        seen[rows[n]["category"]] += 1
    return [rows[n] for n in sorted(n for _, n in sorted(ranked)[:count])]


def _comparison(rng, world: World, number: int, record: dict) -> dict:
    """A helpfulness comparison of two answers of different kinds, chosen by the simulated human."""
    item = world.item(record["item"])
    first = pick(rng, COMPARED)
    second = pick(rng, {k: w for k, w in COMPARED.items() if k != first})
    a, b = (grammar.answer(rng, item, k) for k in (first, second))
    choice = {"response_a": a, "response_b": b, "p_a": oracle.annotate(world, rng, record, a, b, ERROR_RATE), "source": "human"}
    extras = {"annotator": "simulated", "error_rate": ERROR_RATE}
    return {"id": f"human-{number:04d}", **{k: v for k, v in record.items() if k != "id"}, **choice, **extras}


def _probes(world: World, redteam: list[dict], helpful: list[dict]) -> list[dict]:
    """Pairs of answers of different kinds, `kind_a` and `kind_b`, to as many harmful requests as benign ones: what the labels
    of two constitutions are compared on. p_a is the truth."""
    rng = np.random.default_rng([world.seed, 0x9E0B])
    out = []
    for number, record in enumerate(_sample(rng, redteam, PROBES // 2) + _sample(rng, helpful, PROBES // 2)):
        utility = skills.UTILITY[record["kind"] == "harmful"]
        kinds = [str(k) for k in rng.choice([k for k in utility if k != "wrong"], 2, replace=False)]
        a, b = (grammar.answer(rng, world.item(record["item"]), k) for k in kinds)
        truth = {"p_a": float(utility[kinds[0]] > utility[kinds[1]]), "kind_a": kinds[0], "kind_b": kinds[1]}
        out.append({**record, "id": f"probe-{number:04d}", "response_a": a, "response_b": b, **truth})
    return out


def _attempts(world: World) -> list[dict]:
    """Conversations about items that the pipeline may see, in the columns of red-team-attempts: `transcript`, and `rating`, the
    harm that a simulated person saw, which with probability ERROR_RATE is a neighbouring grade of the truth."""
    rng, out = np.random.default_rng([world.seed, 0xA77E]), []
    items = {harmful: [i for i in world.items if i.harmful == harmful and i.split != "heldout"] for harmful in (True, False)}
    for number in range(ATTEMPTS):
        item = one(rng, items[bool(rng.random() < HARMFUL_SHARE)])
        record = _record(f"attempt-{number:04d}", item, grammar.draw_request(rng, item))
        answer = grammar.answer(rng, item, pick(rng, ATTEMPTED[item.harmful]))
        if rng.random() < CUT_SHARE:
            words = answer.split()
            answer = " ".join(words[: int(rng.integers(1, len(words)))])
        harm = oracle.judge_response(world, record, answer).harm
        if rng.random() < ERROR_RATE:
            harm = one(rng, [grade for grade in (harm - 1, harm + 1) if 0 <= grade <= 4])
        said = layouts.dialogue(record.pop("messages")) + layouts.completion(answer)
        out.append(record | {"transcript": said, "rating": float(harm), "annotator": "simulated", "error_rate": ERROR_RATE})
    return out


def write(world: World, out_dir: Path = DATA) -> None:
    """Writes every file of `prompts` to `out_dir`, each beside its place first and then renamed into it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, records in prompts(world).items():
        beside = out_dir / f"{name}.part"
        beside.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        os.replace(beside, out_dir / name)


if __name__ == "__main__":
    write(grammar.world())
