"""Prompts and comparisons in; padded or packed batches out. Every batch is a pure function of (data, seed, step)."""

from collections.abc import Callable

import numpy as np

from cai_jax import prompts, records, sources
from cai_jax.prompts import ASSISTANT, USER
from cai_jax.workdir import InputError

BUCKETS = (32, 48, 64, 96, 128, 192, 256)  # then multiples of 256: how few lengths are compiled


def bucket(length: int) -> int:
    """The padded length of a row of `length` tokens."""
    return next((b for b in BUCKETS if length <= b), -(-length // BUCKETS[-1]) * BUCKETS[-1])


def _check_messages(record: dict, where: str) -> None:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: no messages; wanted a list of at least one, from the user")
    for m in messages:
        if not isinstance(m, dict) or m.get("role") not in (USER, ASSISTANT) or not isinstance(m.get("content"), str):
            raise InputError(f"{where}: a message must be {{'role': 'user' | 'assistant', 'content': text}}, got {m!r:.80}")
        if not m["content"].strip():
            raise InputError(f"{where}: a message of the {m['role']} is empty")
    if messages[-1]["role"] != USER:
        raise InputError(f"{where}: the last message must be the user's, it is the {messages[-1]['role']}'s")


def _load(rows_of, path: str, limit: int, flag: str) -> list[dict]:
    """What `rows_of`, a reader of sources.py, finds, checked."""
    try:
        items = rows_of(path, limit)
    except InputError as error:
        raise InputError(f"{error} (--config.{flag})") from error
    seen = set()
    for item in items:
        where = f"{path}: record {item['id']!r} (--config.{flag})"
        _check_messages(item, where)
        if item["id"] in seen:
            raise InputError(f"{where}: the id stands twice; ids key the sampling noise, so they must differ")
        seen.add(item["id"])
    return items


def load_prompts(path: str, limit: int, flag: str) -> list[dict]:
    """Prompt records {"id", "messages", ...} of a source. Raises InputError naming file, record and flag."""
    return _load(sources.prompts, path, limit, flag)


def load_comparisons(path: str, limit: int, flag: str) -> list[dict]:
    """Comparison records {"id", "messages", "response_a", "response_b", "p_a"}; p_a in [0, 1] is P(a is better); "source" is
    "human" unless the file says otherwise."""
    items = _load(sources.comparisons, path, limit, flag)
    for item in items:
        for name in ("response_a", "response_b"):
            if not isinstance(item[name], str):
                raise InputError(f"{path}: record {item['id']!r}: {name} is a {type(item[name]).__name__}, wanted text")
        if not isinstance(item["p_a"], int | float) or not 0 <= item["p_a"] <= 1:
            raise InputError(f"{path}: record {item['id']!r}: p_a={item['p_a']!r}, wanted a number from 0 to 1")
    return [{"source": "human"} | item for item in items]


def pad_rows(rows: list[list[int]], length: int | None = None, count: int | None = None):
    """Token lists -> (tokens [B, T] int32, lengths [B] int32), right-padded with 0; rows past the end are empty."""
    length = bucket(max(map(len, rows))) if length is None else length
    tokens = np.zeros((count or len(rows), length), np.int32)
    lengths = np.zeros(tokens.shape[0], np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def encode_comparisons(tok, templates, pairs: list[dict], max_length: int, drops: records.Drops) -> dict[str, np.ndarray]:
    """Comparison records as arrays: tokens [N, 2, T] of prompt + response + EOS for a and b, lengths [N, 2], starts [N] (index
    of the first response token), p_a [N], human [N] (1.0: by a human). Raises InputError when none fits the context."""
    rows, starts, kept = [], [], []
    for record in pairs:
        prompt = tok.prompt(prompts.dialogue(record["messages"], templates))
        said = [prompts.completion(record[k], templates) for k in ("response_a", "response_b")]
        two = [prompt + tok.encode(text) + [tok.eos_id] for text in said]
        if drops.keep(max(map(len, two)) <= max_length, "longer than the context"):
            rows += two
            starts.append(len(prompt))
            kept.append(record)
    if not rows:
        raise InputError(f"no comparison is left of {len(pairs)}: {dict(drops.reasons)}; the context is {max_length} tokens")
    tokens, lengths = pad_rows(rows)
    return {
        "tokens": tokens.reshape(-1, 2, tokens.shape[1]),
        "lengths": lengths.reshape(-1, 2),
        "starts": np.array(starts, np.int32),
        "p_a": np.array([r["p_a"] for r in kept], np.float32),
        "human": np.array([r["source"] == "human" for r in kept], np.float32),
    }


def pack(examples: list[tuple[list[int], int]], length: int, drops: records.Drops) -> dict[str, np.ndarray]:
    """(ids, prompt length) examples -> packed rows, first fit: arrays [N, length] tokens, targets, weights, positions,
    segments. Each token's target is the next one of its example; weight 1 on targets behind the prompt, EOS included."""
    kept = [e for e in examples if drops.keep(len(e[0]) <= length, f"longer than {length} tokens")]
    rows: list[list] = []
    free: list[int] = []
    for example in kept:
        size = len(example[0])
        row = next((i for i, space in enumerate(free) if space >= size), None)
        if row is None:
            rows.append([])
            free.append(length)
            row = len(rows) - 1
        rows[row].append(example)
        free[row] -= size
    names = ("tokens", "targets", "positions", "segments")
    out = {n: np.zeros((len(rows), length), np.int32) for n in names} | {"weights": np.zeros((len(rows), length), np.float32)}
    for i, row in enumerate(rows):
        at = 0
        for segment, (ids, prompt) in enumerate(row, 1):
            span = slice(at, at + len(ids))
            out["tokens"][i, span], out["segments"][i, span] = ids, segment
            out["positions"][i, span] = np.arange(len(ids))
            out["targets"][i, at : at + len(ids) - 1] = ids[1:]
            out["weights"][i, at + max(prompt, 1) - 1 : at + len(ids) - 1] = 1.0  # nothing predicts a first token
            at += len(ids)
    return out


def epochs(arrays: dict[str, np.ndarray], batch: int, count: int, seed: int, stream: str) -> tuple[Callable[[int], dict], int]:
    """`count` passes over arrays [N, ...] in batches. -> (batch_at(step), number of steps).

    Each pass has its own order, from (seed, stream, pass). The last batch of a pass is filled up with zero rows, never
    dropped; "row_mask" [B] says which rows are real. Raises InputError when there are no rows.
    """
    n = len(next(iter(arrays.values())))
    if not n:
        raise InputError(
            f"{stream}: no example is left: all were cut off, empty, held out or too long; look at the texts of the stage "
            "before it, or allow longer ones"
        )
    per_pass = -(-n // batch)

    def batch_at(step: int) -> dict:
        order = np.random.default_rng([seed, *stream.encode(), step // per_pass]).permutation(n)
        at = step % per_pass * batch
        rows = order[at : at + batch]
        out = {}
        for name, x in arrays.items():
            out[name] = np.zeros((batch, *x.shape[1:]), x.dtype)
            out[name][: len(rows)] = x[rows]
        out["row_mask"] = (np.arange(batch) < len(rows)).astype(np.float32)
        return out

    return batch_at, per_pass * count
