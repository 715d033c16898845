"""Texts with a common beginning as trees, so that what they share stands, and is computed, once. Only NumPy.

A tree lies in a row in depth-first order, each text's tokens behind those it shares with the texts before. A token's position
is its depth, and `ends` says how far its descendants go, which is all that attention must know (attention.packed_mask). A text
alone is the smallest tree, so packed rows of separate texts are the same thing.
"""

from typing import NamedTuple

import numpy as np

WORTH = 16  # tokens in common from which a beginning is read once for all


class Tree(NamedTuple):
    tokens: list[int]
    positions: list[int]
    ends: list[int]  # for every token the place behind its last descendant
    texts: list[tuple[int, list[int]]]  # (number of a text, the places of its tokens)


def shared(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common from their start on."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(np.array(a[:n]) != np.array(b[:n]))
    return int(differ[0]) if len(differ) else n


def common(texts: list[list[int]]) -> list[int]:
    """What all texts begin with; [] where that is not worth a cache. Of a single text: nothing."""
    n = min((shared(texts[0], text) for text in texts[1:]), default=0)
    return texts[0][:n] if n >= WORTH else []


def plant(texts: list[list[int]], limit: int, worth: int = 1) -> list[Tree]:
    """Texts of at least one token as trees of at most `limit` tokens, or of one text that is longer. Neighbours in the order of
    their tokens share a tree where they have `worth` tokens in common, or half of the text that is added."""
    trees, path, before = [], [], []
    for number in sorted(range(len(texts)), key=lambda i: texts[i]):
        text = texts[number]
        kept = shared(before, text) if trees else 0
        if kept < max(1, min(worth, len(text) // 2)) or len(trees[-1].tokens) + len(text) - kept > limit:
            path = _close(trees, path, 0)
            trees.append(Tree([], [], [], []))
            kept = 0
        tree = trees[-1]
        path = _close(trees, path, kept)
        new = range(len(tree.tokens), len(tree.tokens) + len(text) - kept)
        path = [*path, *new]
        tree.tokens.extend(text[kept:])
        tree.positions.extend(range(kept, len(text)))
        tree.ends.extend([0] * len(new))
        tree.texts.append((number, path))
        before = text
    _close(trees, path, 0)
    return trees


def _close(trees: list[Tree], path: list[int], kept: int) -> list[int]:
    """Ends the last tree's branch below its first `kept` tokens. -> the path to there."""
    for place in path[kept:]:
        trees[-1].ends[place] = len(trees[-1].tokens)
    return path[:kept]


def first_fit(sizes: list[int], length: int) -> list[tuple[int, int]]:
    """Where each of `sizes` (at most `length`) lies in rows of `length`: (row, place in it), in the first row that has room."""
    # A tree over the rows: at a node, the most that is free in one of those below it. Looking through all rows each time would
    # take hours for the comparisons of a paper.
    leaves = 1 << max(0, len(sizes) - 1).bit_length()  # a row for each, at most
    most, placed = [length] * (2 * leaves), []
    for size in sizes:
        node = 1
        while node < leaves:
            node = 2 * node + (most[2 * node] < size)
        placed.append((node - leaves, length - most[node]))
        most[node] -= size
        while node := node // 2:
            most[node] = max(most[2 * node], most[2 * node + 1])
    return placed


def lay(trees: list[Tree], placed: list[tuple[int, int]], rows: int, length: int) -> dict[str, np.ndarray]:
    """Trees at their places: arrays tokens, positions, ends [rows, length], 0 where nothing lies."""
    out = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "positions", "ends")}
    for tree, (row, at) in zip(trees, placed, strict=True):
        span = slice(at, at + len(tree.tokens))
        out["tokens"][row, span], out["positions"][row, span] = tree.tokens, tree.positions
        out["ends"][row, span] = np.array(tree.ends) + at
    return out
