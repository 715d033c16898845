"""Prompts and comparisons in; padded or packed batches out. Every batch is a pure function of (data, seed, step)."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cai_jax import prompts, records, sources
from cai_jax.config import Data
from cai_jax.errors import InputError
from cai_jax.prompts import ASSISTANT, USER
from cai_jax.trees import first_fit

BUCKETS = (32, 48, 64, 96, 128, 192, 256)  # then multiples of 256: how few lengths are compiled


def bucket(length: int) -> int:
    """The padded length of a row of `length` tokens."""
    return next((b for b in BUCKETS if length <= b), -(-length // BUCKETS[-1]) * BUCKETS[-1])


def fault_of(messages) -> str:
    """What is wrong with the messages of a record; "" when nothing is."""
    if not isinstance(messages, list) or not messages:
        return "no messages; wanted a list of at least one, from the user"
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in (USER, ASSISTANT) or not isinstance(m.get("content"), str):
            return f"a message must be {{'role': 'user' | 'assistant', 'content': text}}, got {m!r:.80}"
        if not m["content"].strip():
            return f"a message of the {m['role']} is empty"
    last = messages[-1]["role"]
    return "" if last == USER else f"the last message must be the user's, it is the {last}'s"


def _load(rows_of, path: str, limit: int, flag: str, drops: records.Drops | None, also: str = "") -> list[dict]:
    """What `rows_of`, a reader of sources.py, finds, checked. With `drops`, a transcript that is no dialogue is counted there:
    collected dialogues have some. also: what, with its id, tells a record from others."""
    try:
        items = rows_of(path, limit)
    except InputError as error:
        raise InputError(f"{error} ({flag})") from error
    seen, kept = set(), []
    for item in items:
        where, fault = f"{path}: record {item['id']!r} ({flag})", fault_of(item["messages"])
        try:
            records.dumps(item).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: it holds half a character (a lone surrogate), which is no text") from error
        key = item["id"], str(item.get(also, ""))
        if key in seen:
            whose = f" for the {also} {key[1]!r}" * bool(also)
            raise InputError(f"{where}: the id stands twice{whose}; ids key the sampling noise, so they must differ")
        seen.add(key)
        if not fault:
            kept.append(item)
        elif drops is None or not {"chosen", "transcript"} & item.keys():
            raise InputError(f"{where}: {fault}")
        else:
            drops.keep(False, "a transcript that is no dialogue")
    return kept


def load_prompts(path: str, limit: int, flag: str, drops: records.Drops | None = None) -> list[dict]:
    """Prompt records {"id", "messages", ...} of a source. Raises InputError naming file, record and flag."""
    return _load(sources.prompts, path, limit, flag, drops)


def load_comparisons(path: str, limit: int, flag: str, drops: records.Drops | None = None, also: str = "") -> list[dict]:
    """Comparison records {"id", "messages", "response_a", "response_b", "p_a"}; p_a in [0, 1] is P(a is better); "source" is
    "human". also: see `_load`."""
    items = _load(sources.comparisons, path, limit, flag, drops, also)
    for item in items:
        for name in ("response_a", "response_b"):
            if not isinstance(item[name], str):
                raise InputError(f"{path}: record {item['id']!r}: {name} is a {type(item[name]).__name__}, wanted text")
        if not isinstance(item["p_a"], int | float) or not 0 <= item["p_a"] <= 1:
            raise InputError(f"{path}: record {item['id']!r}: p_a={item['p_a']!r}, wanted a number from 0 to 1")
    return [item | {"source": "human"} for item in items]


def load_ratings(path: str, flag: str) -> list[dict]:
    """Comparison records of one or several people, whom "rater" tells apart. Every pair of responses to a prompt is there once,
    whichever is called a: p_a is the mean over people, and "raters" has what each said. An id may stand for several pairs."""
    found: dict[tuple, dict] = {}
    for r in load_comparisons(path, 0, flag, also="rater"):
        key = r["id"], said(r["messages"]), frozenset((r["response_a"], r["response_b"]))
        first = found.setdefault(key, r | {"raters": {}})
        turned = r["response_a"] != first["response_a"]
        first["raters"][str(r.get("rater", ""))] = 1 - r["p_a"] if turned else r["p_a"]
    return [r | {"p_a": float(np.mean([*r["raters"].values()]))} for r in found.values()]


def load_attempts(path: str, limit: int, flag: str, drops: records.Drops | None = None) -> list[dict]:
    """Rated conversations {"id", "messages", "response", "rating"}; rating in [0, 4] is the harm that a person saw."""
    items, counted = _load(sources.attempts, path, limit, flag, drops), drops or records.Drops()
    items = [item for item in items if counted.keep(item["response"] is not None, "does not end with the Assistant")]
    for item in items:
        if not isinstance(item["rating"], int | float) or not 0 <= item["rating"] <= 4:
            raise InputError(f"{path}: record {item['id']!r}: rating={item['rating']!r}, wanted a number from 0 to 4 ({flag})")
    return items


def said(messages: list[dict]) -> str:
    """What makes two prompts the same: roles and texts, but for white space and case."""
    return "\x1e".join(f"{m['role']}\x1f{' '.join(m['content'].split()).casefold()}" for m in messages)


def load_pool(data: Data, name: str, tok, templates) -> tuple[list[dict], dict]:
    """The prompts of the pipeline called `name`, "redteam" or "helpful", each once, none longer than data.max_prompt tokens,
    and no helpful one that is a red-team prompt too. -> (records, counts)."""
    drops, kept, seen = records.Drops(), [], set()
    found = load_prompts(getattr(data, name), getattr(data, f"max_{name}"), f"--config.data.{name}", drops)
    given = len(found) + drops.reasons.total()
    other = set()
    if name == "helpful":
        redteam = load_prompts(data.redteam, data.max_redteam, "--config.data.redteam", records.Drops())
        other = {said(r["messages"]) for r in redteam}
    for record in found:
        text = said(record["messages"])
        ids = tok.prompt(prompts.dialogue(record["messages"], templates)) if data.max_prompt else ()
        if (
            drops.keep(text not in seen, "the same prompt again")
            and drops.keep(text not in other, "a red-team prompt too")
            and drops.keep(len(ids) <= data.max_prompt or not data.max_prompt, f"longer than {data.max_prompt} tokens")
        ):
            kept.append(record)
        seen.add(text)
    if not kept:
        raise InputError(f"{getattr(data, name)}: no prompt is left: {dict(drops.reasons)} (--config.data.{name})")
    return kept, drops.counts(given, len(kept))


def longest_pair(data: Data, context: int) -> int:
    """Tokens that a comparison's prompt and response may have."""
    return min(context, data.max_pair or context)


def compared(stages: tuple[str, ...]) -> str:
    """The stage whose comparisons of the policy's responses are learnt from: the last that labelled them."""
    return "people" if "people" in stages else "preferences"


def load_human(data: Data, ai: int, drops: records.Drops) -> tuple[list[dict], int]:
    """Human comparisons, each once and with two answers that say something; those beyond data.human_share of all, with `ai`
    others, are left out at even distances. -> (records, how many there were)."""
    before = drops.reasons.total()
    found, once = load_comparisons(data.comparisons, data.max_comparisons, "--config.data.comparisons", drops), {}
    given = len(found) + drops.reasons.total() - before
    for record in found:
        a, b, p = record["response_a"].strip(), record["response_b"].strip(), record["p_a"]
        # The label is part of it: another one of the same answers is another person's.
        key = (said(record["messages"]), *min((a, b, p), (b, a, 1 - p)))
        if drops.keep(bool(a and b), "empty response") and drops.keep(key not in once, "the same comparison again"):
            once[key] = record
    kept = list(once.values())
    if data.human_share:
        wanted = min(round(ai * data.human_share / (1 - data.human_share)), len(kept))
        chosen = {i * len(kept) // wanted for i in range(wanted)}
        kept = [r for i, r in enumerate(kept) if drops.keep(i in chosen, "beyond --config.data.human_share")]
    return kept, given


def pad_rows(rows: list[list[int]], length: int | None = None, count: int | None = None):
    """Token lists -> (tokens [B, T] int32, lengths [B] int32), right-padded with 0; rows past the end are empty."""
    length = bucket(max(map(len, rows))) if length is None else length
    tokens = np.zeros((count or len(rows), length), np.int32)
    lengths = np.zeros(tokens.shape[0], np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def pack(examples: list[tuple[list[int], int]], length: int, drops: records.Drops) -> dict[str, np.ndarray]:
    """(ids, prompt length) examples -> packed rows, first fit: arrays [N, length] tokens, targets, weights, positions, ends
    (see attention.packed_mask). Each token's target is the next one of its example; weight 1 on targets behind the prompt,
    EOS included."""
    kept = [e for e in examples if drops.keep(len(e[0]) <= length, f"longer than {length} tokens")]
    placed = first_fit([len(ids) for ids, _ in kept], length)
    count = max((row for row, _ in placed), default=-1) + 1
    names = ("tokens", "targets", "positions", "ends")
    out = {n: np.zeros((count, length), np.int32) for n in names} | {"weights": np.zeros((count, length), np.float32)}
    for (ids, prompt), (i, at) in zip(kept, placed, strict=True):
        span = slice(at, at + len(ids))
        out["tokens"][i, span], out["ends"][i, span] = ids, span.stop
        out["positions"][i, span] = np.arange(len(ids))
        out["targets"][i, at : at + len(ids) - 1] = ids[1:]
        out["weights"][i, at + max(prompt, 1) - 1 : at + len(ids) - 1] = 1.0  # nothing predicts a first token
    return out


class Taught(NamedTuple):
    """A text to be fine-tuned on."""

    messages: list[dict]
    text: str
    finished: bool  # not cut off
    what: str  # it is


def revised(folder: Path, revisions: str) -> list[Taught]:
    """The revisions of the stage critique, in its folder: those that config.SFT.revisions names."""
    out = []
    for r in records.read(folder / "revisions.jsonl", ("messages", "response", "rounds")):
        rounds = r["rounds"] if revisions == "all" else r["rounds"][-1:]
        out += [Taught(r["messages"], x["revision"], x["finished"], "revision") for x in rounds]
        if not r["rounds"]:
            out.append(Taught(r["messages"], r["response"], r["finished"], "response"))
    return out


def helped(folder: Path) -> list[Taught]:
    """The helpful responses of the stage critique, in its folder."""
    rows = records.read(folder / "helpful.jsonl", ("messages", "response"))
    return [Taught(r["messages"], r["response"], r["finished"], "helpful response") for r in rows]


def preferred(comparisons: list[dict], decided: float, drops: records.Drops) -> list[Taught]:
    """The better response of each comparison whose label is more than `decided` from a half."""
    out = []
    for r in comparisons:
        if drops.keep(abs(r["p_a"] - 0.5) > decided, "neither is better"):
            out.append(Taught(r["messages"], r["response_a" if r["p_a"] > 0.5 else "response_b"], True, "preferred response"))
    return out


def whole(texts: list[Taught], drops: records.Drops) -> list[tuple[list[dict], str]]:
    """-> (messages, completion) pairs. A text that was cut off or is empty teaches nothing good and is counted out."""
    return [
        (t.messages, t.text)
        for t in texts
        if drops.keep(t.finished, f"{t.what} cut off") and drops.keep(bool(t.text), f"{t.what} empty")
    ]


def pack_pairs(pairs: list[tuple[list[dict], str]], tok, templates, length: int, drops: records.Drops):
    """(messages, completion) pairs, EOS behind each -> (packed rows, see `pack`; how many pairs are in them)."""
    examples = []
    for messages, text in pairs:
        prompt = tok.prompt(prompts.dialogue(messages, templates))
        examples.append((prompt + tok.encode(prompts.completion(text, templates)) + [tok.eos_id], len(prompt)))
    rows = pack(examples, length, drops)
    return rows, int(((rows["positions"] == 0) & (rows["ends"] > 0)).sum())


def epochs(arrays: dict[str, np.ndarray], batch: int, count: int, seed: int, stream: str) -> tuple[Callable[[int], dict], int]:
    """`count` passes over arrays [N, ...] in batches. -> (batch_at(step), number of steps).

    The last batch of a pass is filled up with zero rows, never dropped; "row_mask" [B] says which rows are real. Raises
    InputError when there are no rows.
    """
    rows_at, steps = passes(len(next(iter(arrays.values()))), batch, count, seed, stream)

    def batch_at(step: int) -> dict:
        rows, out = rows_at(step), {}
        for name, x in arrays.items():
            out[name] = np.zeros((batch, *x.shape[1:]), x.dtype)
            out[name][: len(rows)] = x[rows]
        out["row_mask"] = (np.arange(batch) < len(rows)).astype(np.float32)
        return out

    return batch_at, steps


def passes(n: int, batch: int, count: int, seed: int, stream: str) -> tuple[Callable[[int], np.ndarray], int]:
    """The order of `count` passes over n rows. -> (rows_at(step), at most `batch` row numbers; number of steps).

    Each pass has its own order, from (seed, stream, pass). Raises InputError when there are no rows.
    """
    if not n:
        raise InputError(
            f"{stream}: no example is left: all were cut off, empty, held out or too long; look at the texts of the stage "
            "before it, or allow longer ones"
        )
    per_pass = -(-n // batch)

    def rows_at(step: int) -> np.ndarray:
        order = np.random.default_rng([seed, *stream.encode(), step // per_pass]).permutation(n)
        at = step % per_pass * batch
        return order[at : at + batch]

    return rows_at, per_pass * count
