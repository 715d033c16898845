"""Figures of evaluation sets: {"value", "low", "high", "n"}, with a 95 % interval and the rows that it rests on; low and high
are None where there are too few, value where there are none. Rows are taken for independent, which those made from one
template, as in BBQ, are not quite."""

from collections.abc import Callable, Sequence

import numpy as np

from cai_jax.constitution.distance import FEWEST
from cai_jax.evals.items import Item
from cai_jax.intervals import bootstrap, wilson


def share(x_N, weights_N=None) -> dict:
    """A share, its rows in [0, 1], with Wilson's interval; of weighted rows with that of as many as they are worth,
    (sum w)^2 / sum w^2 (Kish 1965)."""
    x_N = np.asarray(x_N, np.float64)
    w_N = np.ones(len(x_N)) if weights_N is None else np.asarray(weights_N, np.float64)
    if not len(x_N):
        return {"value": None, "low": 0.0, "high": 1.0, "n": 0}
    value = min(1.0, max(0.0, float(w_N @ x_N / w_N.sum())))
    low, high = wilson(value, float(w_N.sum() ** 2 / (w_N @ w_N)))
    return {"value": value, "low": low, "high": high, "n": len(x_N)}


def mean(x_N) -> dict:
    """A mean of rows in [0, 1], with the bootstrap's interval; of rows that are all 0 or 1 it is the share."""
    x_N = np.asarray(x_N, np.float64)
    if not len(x_N) or set(x_N.tolist()) <= {0.0, 1.0}:
        return share(x_N)
    low, high = bootstrap(np.mean, x_N) if len(x_N) >= FEWEST else (None, None)
    return {"value": float(x_N.mean()), "low": low, "high": high, "n": len(x_N)}


def by_label(items: Sequence[Item], figure: Callable[[list[int]], dict]) -> dict:
    """figure(rows) for each label of the groups, but one that all items have."""
    rows: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        for label in dict.fromkeys(item.group):
            rows.setdefault(label, []).append(i)
    return {label: figure(found) for label, found in sorted(rows.items()) if len(found) < len(items)}


HEADER = ["set", "model", "figure", "value", "95 %", "n"]


def rows_of(results: dict) -> list[list[str]]:
    """benchmarks/results.json as rows under HEADER: the figures that are about all of a set."""
    rows = []
    for name, of in results.items():
        for model, found in of["models"].items():
            for key, x in whole(found):
                value = "–" if x["value"] is None else f"{x['value']:.3f}"
                rows.append(
                    [name, model, key, value, "" if x["low"] is None else f"[{x['low']:.3f}, {x['high']:.3f}]", str(x["n"])]
                )
    return rows


def whole(found) -> list[tuple[str, dict]]:
    """The figures of a score that are about all of a set, by what they are called."""
    rows = []
    for key, x in found.items():
        if isinstance(x, dict) and key not in ("by", "sections"):
            rows += [(key, x)] if "value" in x else [(f"{key} {k}".strip(), v) for k, v in whole(x)]
    return rows
