"""The gate: before a judge labels anything it labels what people have labelled, and is refused where it is beyond a limit."""

import numpy as np

from cai_jax.config import Preferences
from cai_jax.constitution.distance import FEWEST
from cai_jax.data import load_ratings
from cai_jax.errors import InputError
from cai_jax.evals import trust
from cai_jax.progress import say

FLAG = "--config.preferences.gate"


def comparisons(path: str) -> list[dict]:
    """What people have labelled, see data.load_ratings, under ids that are no prompt's of the pipeline."""
    return [r | {"id": f"gate/{n}/{r['id']}"} for n, r in enumerate(load_ratings(path, FLAG))]


def summary(path: str, known: list[dict], found: dict[str, list[dict]], own: set[str]) -> dict:
    """The figures of evals.trust that there is data for, of a judge's labels before a clamp.

    known: see `comparisons`, of `path`. found: id -> judgements; those that the judge's context did not hold are not there.
    own: what model_a or model_b of a comparison is called where that is the judge. Raises InputError for too few."""
    held = [r for r in known if r["id"] in found]
    rows = [found[r["id"]] for r in held]
    labels_N = np.array([np.mean([j.get("p_unclamped", j["p_a"]) for j in of]) for of in rows])
    people_N = np.array([r["p_a"] for r in held])
    orders_M2 = np.array([(j["p_ab"], j["p_ba"]) for of in rows for j in of]).reshape(-1, 2)
    length_N2 = np.array([(len(r["response_a"]), len(r["response_b"])) for r in held]).reshape(-1, 2)
    own_N2 = np.array([[str(r.get(f"model_{x}")) in own for x in "ab"] for r in held], int).reshape(-1, 2)
    raters = dict.fromkeys(rater for r in held for rater in r["raters"])
    said_NA = np.array([[r["raters"].get(rater, np.nan) for rater in raters] for r in held]).reshape(len(held), -1)

    decided_N = (labels_N != 0.5) & (people_N != 0.5)
    unlike, its = (np.sum(decided_N & (x[:, 0] != x[:, 1])) >= FEWEST for x in (length_N2, own_N2))
    sided_NA = (~np.isnan(said_NA) & (said_NA != 0.5) & (labels_N != 0.5)[:, None]).astype(int)
    several = np.triu(sided_NA.T @ sided_NA, 1).max(initial=0) >= FEWEST
    length_N2, own_N = length_N2 if unlike else None, own_N2[:, 0] - own_N2[:, 1] if its else None
    try:
        of = trust.trust(labels_N, people_N, orders_M2, length_N2, own_N, said_NA if several else None)
    except InputError as error:
        raise InputError(f"{FLAG}={path}: {error}") from error
    return of | {"comparisons": len(known), "left out": len(known) - len(held), "raters": len(raters)}


def admitted(c: Preferences, name: str, of: dict) -> list[str]:
    """What of a judge's summary is beyond the limits, said aloud; raises InputError unless that is let through."""
    beyond = trust.failures(of, c.limits, "--config.preferences.limits.")
    if beyond and not c.despite:
        raise InputError(
            f"{name} is beyond the limits on the comparisons of {FLAG}={c.gate}:\n  "
            + "\n  ".join(beyond)
            + "\ngive another --config.preferences.judge.path, or --config.preferences.despite=True to label even so"
        )
    for line in beyond:
        say(f"{name}: beyond the limits, labels even so: {line}")
    return beyond
