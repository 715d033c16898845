"""Comparisons as batches: a prompt and its two responses are one tree, trees are packed in rows, and every batch of a stage has
the same shape. So a prompt is computed once, and little padding; what is learned is what separate rows would teach."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cai_jax import prompts, records
from cai_jax.data import bucket, passes, said
from cai_jax.errors import InputError
from cai_jax.trees import Tree, first_fit, lay


class Pairs(NamedTuple):
    trees: list[Tree]  # of [prompt + response a + EOS, prompt + response b + EOS]
    starts: np.ndarray  # int32 [N], tokens of each prompt
    columns: dict[str, np.ndarray]  # float32 [N]: p_a; human (1.0: labelled by a human)
    prompt: np.ndarray  # int32 [N], a number that comparisons of the same prompt share, from 0 in order
    own: np.ndarray  # bool [N], whether the responses are those of the run's policy

    def where(self, chosen: np.ndarray) -> "Pairs":
        """Those that a mask [N] chooses."""
        trees = [tree for tree, yes in zip(self.trees, chosen, strict=True) if yes]
        columns = {k: v[chosen] for k, v in self.columns.items()}
        return Pairs(trees, self.starts[chosen], columns, self.prompt[chosen], self.own[chosen])


def encode_comparisons(tok, templates, pairs: list[dict], max_length: int, drops: records.Drops) -> Pairs:
    """Comparison records as trees. Raises InputError when no conversation of one is at most `max_length` tokens."""
    trees, starts, kept, number = [], [], [], {}
    for record in pairs:
        prompt = tok.prompt(prompts.dialogue(record["messages"], templates))
        texts = [prompts.completion(record[k], templates) for k in ("response_a", "response_b")]
        a, b = (tok.encode(text) + [tok.eos_id] for text in texts)
        if drops.keep(len(prompt) + max(len(a), len(b)) <= max_length, f"longer than {max_length} tokens"):
            trees.append(fork(prompt, a, b))
            starts.append(len(prompt))
            kept.append(record)
    if not trees:
        raise InputError(f"no comparison is left of {len(pairs)}: {dict(drops.reasons)}; wanted at most {max_length} tokens")
    columns = {
        "p_a": np.array([r["p_a"] for r in kept], np.float32),
        "human": np.array([r["source"] != "ai" for r in kept], np.float32),
    }
    number = np.array([number.setdefault(said(r["messages"]), len(number)) for r in kept], np.int32)
    own = np.array([r["source"] != "human" for r in kept])  # what is read from data.comparisons
    return Pairs(trees, np.array(starts, np.int32), columns, number, own)


def held_out(prompt_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which comparisons are kept from training: all or none of those on one prompt. -> bool [N]."""
    return (np.random.default_rng([seed, 7]).random(prompt_N.max(initial=-1) + 1) < share)[prompt_N]


def fork(prompt: list[int], a: list[int], b: list[int]) -> Tree:
    """A prompt and two responses to it, which share nothing else even where they begin alike."""
    p, n, end = len(prompt), len(prompt) + len(a), len(prompt) + len(a) + len(b)
    positions = [*range(n), *range(p, p + len(b))]
    paths = [[*range(n)], [*range(p), *range(n, end)]]
    return Tree([*prompt, *a, *b], positions, [end] * p + [n] * len(a) + [end] * len(b), list(enumerate(paths)))


def batches(pairs: Pairs, batch: int, count: int, seed: int, stream: str, parts: int) -> tuple[Callable[[int], dict], int]:
    """`count` passes over the comparisons, `batch` of them a step (see data.passes). -> (batch_at(step), number of steps).

    Arrays of a batch, R rows (`parts` divides R) of T tokens with up to M comparisons and A response tokens each:
      tokens, positions, ends [R, T]  see trees.py
      last [R, M, 2]                  places of the responses' last tokens
      at, next, owner [R, A]          of each response token: the place that predicts it, the token, 2 x comparison (+ 1: b)
      row_mask, index and the columns [R, M]  which comparisons are real, their numbers
    """
    sizes = [len(tree.tokens) for tree in pairs.trees]
    chosen_at, steps = passes(len(sizes), batch, count, seed, stream)
    longest = max(sizes)

    def rows_at(step: int) -> list[int]:
        return sorted(chosen_at(step), key=lambda i: -sizes[i])  # the long ones first leave little room unused

    plans = {}
    for length in {bucket(longest), bucket(2 * longest)}:
        placed = [first_fit([sizes[i] for i in rows_at(t)], length) for t in range(steps)]
        R = max(row for plan in placed for row, _ in plan) + 1
        plans[length] = -(-R // parts) * parts
    T = min(plans, key=lambda length: (plans[length] * length, length))
    R, M, A = plans[T], 0, 0
    for t in range(steps):
        held, tokens = np.zeros(R, int), np.zeros(R, int)
        for i, (row, _) in zip(rows_at(t), first_fit([sizes[i] for i in rows_at(t)], T), strict=True):
            held[row] += 1
            tokens[row] += sizes[i] - pairs.starts[i]
        M, A = max(M, held.max()), max(A, tokens.max())

    def batch_at(step: int) -> dict[str, np.ndarray]:
        index = rows_at(step)
        placed = first_fit([sizes[i] for i in index], T)
        out = lay([pairs.trees[i] for i in index], placed, R, T)
        out |= {name: np.zeros((R, A), np.int32) for name in ("at", "next")} | {"owner": np.full((R, A), 2 * M, np.int32)}
        out |= {"last": np.zeros((R, M, 2), np.int32), "index": np.zeros((R, M), np.int32)}
        out |= {name: np.zeros((R, M), np.float32) for name in ("row_mask", *pairs.columns)}
        held, tokens = [0] * R, [0] * R
        for i, (row, at) in zip(index, placed, strict=True):
            m, tree = held[row], pairs.trees[i]
            held[row] += 1
            for side, path in tree.texts:
                said = path[pairs.starts[i] :]
                span = slice(tokens[row], tokens[row] + len(said))
                tokens[row] = span.stop
                out["at"][row, span] = at + np.array([path[pairs.starts[i] - 1], *said[:-1]])
                out["next"][row, span] = [tree.tokens[place] for place in said]
                out["owner"][row, span], out["last"][row, m, side] = 2 * m + side, at + said[-1]
            out["row_mask"][row, m], out["index"][row, m] = 1.0, i
            for name, column in pairs.columns.items():
                out[name][row, m] = column[i]
        return out

    return batch_at, steps
