"""Panels: one label from several judges, several constitutions, several principles.

Every judge is asked about the principles drawn of every constitution, and each of these judgements, a probability p_i that
response a is the better one, is a member of the panel. How the M members of a comparison make a label is a rule:

mean: of all; what Bai et al. 2022 (2212.08073, 4.1) do with several principles.
median: however far off some members are, while they are fewer than half it stays where the others are (Huber 1981).
worst: a response is worth what the member that likes it least says, and the label compares these worths: maximin, as in the
  egalitarian rule of social choice and MaxMin-RLHF (2402.08925). Nobody's strong objection is outvoted.
agreement: the mean, weighted by how near a member is to the others on this comparison: the similarity aggregation of Hsu and
  Chen (1996, Fuzzy Sets and Systems 79) on probabilities. It yields to a lone dissenter less than the mean, and more smoothly
  than the median.
priority: the principles that stand first in their constitution's order of priority, if their mean is decided; else the next
  ones; the mean of all if none is: a lexicographic order, one reason deciding as in "take the best" (Gigerenzer and Goldstein
  1996). Constitutions are taken together rank by rank; without a priority all their principles are of the first.

Every rule gives a label between the least and the largest p_i, and 1 - p for the same pair turned round.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cai_jax import prompts
from cai_jax.config import Checkpoint, Config, ConstitutionFile
from cai_jax.constitution import Constitution, sample
from cai_jax.errors import InputError
from cai_jax.tokenizer import Tokenizer

CLOSE = 1e-9  # 0.6 - 0.5 is less than 0.1


def judges(cfg: Config, first: Checkpoint) -> dict[str, Config]:
    """Who judges, "judge", "judge2", ...: for each the configuration in which it does so alone. first: the checkpoint of the
    first, as which the others are talked to."""
    c = cfg.preferences
    further = {f"judge{n}": replace(c, judge=replace(first, path=path)) for n, path in enumerate(c.judges, 2)}
    return {"judge": cfg} | {name: replace(cfg, preferences=alone) for name, alone in further.items()}


def laws(cfg: Config) -> list[Config]:
    """For each constitution that judges are asked about the configuration in which it is the only one; the run's first."""
    files = (cfg.constitution, *(ConstitutionFile(path) for path in cfg.preferences.constitutions))
    return [replace(cfg, constitution=file) for file in files]


def check(cfg: Config, judges: dict[str, Config], constitutions: Sequence[Constitution]) -> None:
    """Raises InputError for a judge or a constitution that is on the panel twice, and for one with fewer principles than are
    drawn. See `judges`, and `laws` for the order of the constitutions."""
    folders = [Path(one.preferences.judge.path or one.model.path).resolve() for one in judges.values()]
    for name, found in (("judges", folders), ("constitutions", [c.fingerprint for c in constitutions])):
        for n, given in enumerate(getattr(cfg.preferences, name), 1):
            if found[n] in found[:n]:
                raise InputError(f"--config.preferences.{name}: {given} is on the panel already; name each once")
    for constitution in constitutions:
        sample(constitution, "check", k=cfg.preferences.principles)


def check_options(path: str, tok: Tokenizer, templates: dict[str, str]) -> None:
    """Raises InputError for a judge whose tokenizer cannot write the options of a comparison, or tell them apart."""
    context = prompts.comparison([{"role": prompts.USER, "content": "a"}], "b", "c", "d", templates)
    try:
        tok.options(context, prompts.OPTIONS)
    except InputError as error:
        raise InputError(f"{path} cannot judge: {error}; give another model (--config.model.path)") from error


def combined(p_M: Sequence[float], ranks_M: Sequence[int], how: str, decided: float) -> float:
    """The label of one comparison by a rule of `RULES`.

    p_M: judgements, in [0, 1], at least one. ranks_M: the rank of each one's principle, see constitution.rank. decided: for
    priority, the distance from a half from which a mean decides.
    """
    return float(RULES[how](np.asarray(p_M, np.float64), np.asarray(ranks_M), decided))


def _worst(p_M, ranks_M, decided):
    worth_a, worth_b = p_M.min(), (1 - p_M).min()
    return worth_a / (worth_a + worth_b) if worth_a + worth_b else 0.5


def _agreement(p_M, ranks_M, decided):
    apart_M = _apart(p_M).sum(axis=1) / max(1, len(p_M) - 1)
    weight_M = 1 - apart_M if apart_M.min() < 1 else np.ones(len(p_M))  # one sure of a, one of b: nobody agrees with anybody
    return 0.5 + np.sum(weight_M * (p_M - 0.5)) / np.sum(weight_M)  # around a half, so that opposite members cancel exactly


def _priority(p_M, ranks_M, decided):
    means = (np.mean(p_M[ranks_M == rank]) for rank in np.unique(ranks_M))
    return next((mean for mean in means if abs(mean - 0.5) >= decided - CLOSE), np.mean(p_M))


RULES = {
    "mean": lambda p_M, ranks_M, decided: np.mean(p_M),
    "median": lambda p_M, ranks_M, decided: np.median(p_M),
    "worst": _worst,
    "agreement": _agreement,
    "priority": _priority,
}


def disagreement(p_M: Sequence[float]) -> float:
    """Mean absolute difference of two members (Gini 1912), in [0, 1]; 0 for one."""
    return float(_apart(np.asarray(p_M, np.float64)).sum() / max(1, len(p_M) * (len(p_M) - 1)))


def _apart(p_M) -> np.ndarray:
    """|p_i - p_j|. -> [M, M]."""
    return np.abs(p_M[:, None] - p_M[None, :])


def statistics(judged: Sequence[dict]) -> dict:
    """Of comparison records with several judgements each: their mean disagreement, and for each judge and constitution that the
    judgements name, how often the mean of its own is on the side of the label, where that is on one. {}: they have one each."""
    if not any("disagreement" in r for r in judged):
        return {}
    found: dict[str, list[bool]] = {}
    for record in judged:
        own: dict[str, list[float]] = {}
        for j in record["judgements"]:
            own.setdefault(" ".join(j[k] for k in ("judge", "constitution") if k in j), []).append(j["p_a"])
        for who, p in own.items():
            if who and record["p_a"] != 0.5:
                found.setdefault(who, []).append((np.mean(p) - 0.5) * (record["p_a"] - 0.5) > 0)
    agreement = {"agreement": {who: float(np.mean(sides)) for who, sides in found.items()}} if found else {}
    return {"disagreement": float(np.mean([r["disagreement"] for r in judged]))} | agreement


def disputed(judged: Sequence[dict], n: int) -> list[dict]:
    """The `n` comparison records on which a panel differs most, for humans to label: by their disagreement (a single judgement
    has none), then by how near their label is to a half, then by id."""

    def order(record: dict):
        return -record.get("disagreement", 0.0), abs(record["p_a"] - 0.5), record["id"]

    return sorted(judged, key=order)[:n]
