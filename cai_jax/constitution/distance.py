"""How differently a judge labels the same pairs under two constitutions, and which behaviours that will move.

A label is P(a is better), averaged over the principles in proportion to their weights, as the ensemble of a judgement is. The
distance of two labels is the square root of the Jensen-Shannon divergence of the two coins in bits: 0 for the same label, 1 for
certainty of opposites; it is a metric (Endres and Schindelin 2003). A behaviour is a kind of answer, such as a refusal that
says why: how much the judge's preference for it rises, on the pairs that have it on one side only, is what training on such
labels will push towards.
"""

from collections.abc import Sequence

import numpy as np

from cai_jax.constitution import Constitution
from cai_jax.errors import InputError
from cai_jax.intervals import bootstrap

FEWEST = 8  # pairs from which an interval means something


def label(p_NK: np.ndarray, constitution: Constitution) -> np.ndarray:
    """The ensemble's label of every pair from those under each principle. -> [N]."""
    weights = np.array([p.weight for p in constitution.principles])
    return p_NK @ (weights / weights.sum())


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The distance of two coins, elementwise, 0 to 1."""
    middle = (p + q) / 2
    bits = _entropy(middle) - (_entropy(p) + _entropy(q)) / 2
    return np.sqrt(np.clip(bits, 0.0, 1.0))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Of a coin, in bits."""
    p = np.clip(np.stack([p, 1 - p]), 1e-300, 1.0)
    return -np.sum(p * np.log2(p), axis=0)


def compare(p_N: np.ndarray, q_N: np.ndarray, groups: Sequence[str], seed: int = 0) -> dict:
    """Mean distance between labels p and q of the same pairs, over all and by group, and the pairs that flip.

    -> {"all": {...}, "by_group": {group: {...}}, "flips": places of pairs, the widest first}. Raises InputError for fewer than
    FEWEST pairs; a group of fewer has no interval.
    """
    if len(p_N) < FEWEST:
        raise InputError(f"{len(p_N)} pairs are too few for an interval; wanted at least {FEWEST}")
    far = jensen_shannon(p_N, q_N)

    def of(rows: np.ndarray) -> dict:
        x, moved = far[rows], (p_N > 0.5) != (q_N > 0.5)
        low, high = bootstrap(np.mean, x, seed=seed) if len(x) >= FEWEST else (None, None)
        return {"n": len(x), "distance": float(x.mean()), "low": low, "high": high, "flips": float(moved[rows].mean())}

    names = np.array(groups)
    by_group = {str(g): of(np.flatnonzero(names == g)) for g in dict.fromkeys(groups) if g}
    flips = np.flatnonzero((p_N > 0.5) != (q_N > 0.5))
    order = flips[np.argsort(-np.abs(p_N - q_N)[flips], kind="stable")]
    return {"all": of(np.arange(len(far))), "by_group": by_group, "flips": order.tolist()}


def predict(p_N: np.ndarray, q_N: np.ndarray, kinds: Sequence[tuple[str, str]], seed: int = 0) -> list[dict]:
    """What will move from the constitution of p to that of q: of each kind of answer, the mean change of the probability that
    it is preferred, over the pairs that have it on one side only; the surest first. kinds: those of (a, b) of each pair."""
    out = []
    for kind in dict.fromkeys(k for pair in kinds for k in pair if k):
        side = np.array([(a == kind) - (b == kind) for a, b in kinds])
        rows = np.flatnonzero(side)
        if len(rows) < FEWEST:
            continue
        shift = (q_N - p_N)[rows] * side[rows]
        low, high = bootstrap(np.mean, shift, seed=seed)
        out.append({"behaviour": kind, "n": len(rows), "shift": float(shift.mean()), "low": low, "high": high})
    return sorted(out, key=lambda row: -abs(row["shift"]) / max(1e-9, row["high"] - row["low"]))
