"""Figures and tables of one or several finished runs: those of the CAI paper (2212.08073), tables 1 and 2 of Mathew John 2026,
and what else paper.py draws.

What a run has no files for is left out. Runs come in groups, in which only the seeds differ (see runs.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cai_jax import canvas, paper, records
from cai_jax.evals import trust
from cai_jax.evaluation import better, diversity, known
from cai_jax.gallery.captions import CAPTIONS, caption
from cai_jax.gallery.runs import Group, by_model, distinct, pooled, understood
from cai_jax.stages import MODELS, OF_INIT

HHH = ("hhh_alignment", "cai_hhh")  # formats of the sets that figure 4 is about
RESULTS, ROUNDS, DYNAMICS = "evaluate/results.json", "evaluate/rounds.json", "ppo/dynamics.json"


class Picture(NamedTuple):
    key: str  # the name of its files
    title: str
    figure: Figure
    caption: str


def pictures(groups: Sequence[Group]) -> list[Picture]:
    """All figures that the runs have files for. Raises InputError for files of another form."""
    with understood(groups):
        return list(chain.from_iterable(make(groups) for make in FIGURES))


def picture(key: str, figure: Figure, groups: Sequence[Group], n: str, of: str = "", file: str = "") -> Picture:
    return Picture(file or key, CAPTIONS[key][0], figure, caption(key, n, of, [len(g.runs) for g in groups]))


def numbered(key: str, groups: Sequence[Group]) -> Iterator[tuple[str, Group, str]]:
    """A figure for each: under which name, of whom, and that in words."""
    for n, g in enumerate(groups, 1):
        yield key + f"-{n}" * (len(groups) > 1), g, f" of {g.name}" * bool(g.name)


def joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def both_kinds(of: dict, what: str) -> str:
    """How many prompts the oracle's summary is of."""
    return f"{of['n_harmful']:.0f} harmful and {of['n_benign']:.0f} benign {what}"


def heldout(groups: Sequence[Group]) -> str:
    models = groups[0].each(RESULTS)[0]["models"]
    return both_kinds(next(iter(models.values()))["heldout"]["sampled"], "held-out prompts")


def standing(groups: Sequence[Group]) -> list[dict]:
    """Elo of every model on both scales, as paper.elo_plane wants it; a model that groups share is that of the first."""
    out, seen = [], set()
    for g in groups:
        found = g.pool(RESULTS, lambda tree: by_model(tree["elo"]))
        for model in canvas.ordered(set.intersection(*(set(found.get(scale, ())) for scale in paper.SCALES))):
            stage = MODELS[model]
            mark = model, g.made(stage) if stage else g.cfg.model.path
            if mark not in seen:
                about = {"group": g.name if stage else "", "model": model}
                out.append(about | {scale: found[scale][model] for scale in paper.SCALES})
            seen.add(mark)
    return out


def elo(groups: Sequence[Group]) -> Iterator[Picture]:
    there = [g for g in groups if any(tree.get("elo") for tree in g.each(RESULTS))]
    if points := standing(there) if there else []:
        yield picture("figure-2", paper.elo_plane(points), there, heldout(there))
        yield picture("figure-3", paper.elo_by_model(points), there, heldout(there))


def judging(groups: Sequence[Group]) -> Iterator[Picture]:
    rows = {}  # those of variants with the same judge and the same comparisons stand once

    def add(g: Group, name: str, method: str, where: str, found: dict) -> None:
        row = found | {"name": joined(name, g.name, where), "method": method, "set": where}
        rows.setdefault((name, method, where, found["value"], found["n"]), row)

    for g in groups:
        c = g.cfg.preferences
        method = [*paper.METHODS][1 + (c.thoughts > 1) if c.chain_of_thought else 0]
        for judge, of in (g.pool("preferences/gate.json") or {}).items():
            add(g, judge, method, "gate", of["accuracy"])
        for name, of in (g.pool("benchmarks/results.json") or {}).items():
            for model, found in of["models"].items() if of["format"] in HHH else ():
                way = "reward model" if model == "reward" else "log-probs"
                shown = found.get("views", {}).get("letters") or found.get("preferred" if model == "reward" else "accuracy")
                if shown:
                    add(g, canvas.label_of(model), way, name, shown["accuracy"])
    if rows:
        n = joined(*sorted({f"{r['set']}: {r['n']:.0f}" for r in rows.values()}))
        yield picture("figure-4", paper.judging([*rows.values()]), groups, n)


def revised(groups: Sequence[Group]) -> str:
    n = sorted({round(g.pool("critique/done.json")["counts"]["kept"]) for g in groups})
    return f"{' or '.join(map(str, n))} red-team prompts of the pipeline"


def revisions(groups: Sequence[Group]) -> Iterator[Picture]:
    there = [g for g in distinct(groups, "critique", ROUNDS) if g.cfg.critique.rounds and not g.cfg.critique.direct]
    found = {g.name: g.pool(ROUNDS) for g in there}
    if len(found) > 1 or any("score" in of for of in found.values()):  # harm alone has a figure in the report of a run
        yield picture("figure-5", paper.revisions(found), there, revised(there))


def drawn(turns: list[dict]) -> dict:
    """Of a run's revisions: how many principles they were made under, and how diverse the last ones are."""
    named = {turn["principle"] for r in turns for turn in r["rounds"] if turn["principle"]}
    return {"principles": len(named), "mean": diversity(turns), "interval": [None, None]}


def principles(groups: Sequence[Group]) -> Iterator[Picture]:
    alike: dict = {}
    for g in distinct(groups, "critique", ROUNDS):
        if g.cfg.critique.rounds and not g.cfg.constitution.corrupt:
            key = replace(g.cfg.critique, use_principles=True), g.cfg.model, g.cfg.constitution.path
            alike.setdefault(key, []).append(g)
    rows, there = [], max(alike.values(), key=len, default=[])
    for g in there if len(there) > 1 else ():
        each, of = [drawn(turns) for turns in g.each("critique/revisions.jsonl", records.read)], g.pool(ROUNDS)
        found, most = pooled(each), max(e["principles"] for e in each) if g.cfg.critique.use_principles else 0
        rows.append({"name": g.name, "principles": most, "diversity": (found["mean"], found["interval"])})
        rows[-1]["harm"] = of["harm_rate"][-1], of["interval"][-1]
    if len({r["principles"] for r in rows}) > 1:
        yield picture("figure-6", paper.principles(rows), there, revised(there))


def directness(groups: Sequence[Group]) -> Iterator[Picture]:
    rest = distinct(groups, "critique", ROUNDS)

    def like(g: Group) -> tuple:
        return g.cfg.model, g.cfg.constitution, replace(g.cfg.critique, direct=False)

    pairs = [(a, b) for a in rest for b in rest if b.cfg.critique.direct > a.cfg.critique.direct and like(a) == like(b)]
    for pair in pairs[:1]:
        found = {name: g.pool(ROUNDS) for name, g in zip(("critique", "direct"), pair, strict=True)}
        found = {name: {k: of[k] for k in ("harm_rate", "interval")} for name, of in found.items()}
        yield picture("figure-7", paper.revisions(found, "Harm"), pair, revised(pair))


def along_rl(groups: Sequence[Group]) -> Iterator[Picture]:
    there = distinct(groups, "ppo", DYNAMICS)
    found = {g.name: g.pool(DYNAMICS, lambda tree: tree | {"elo": by_model(tree["elo"])}) for g in there}
    if not found:
        return
    n = both_kinds(next(iter(found.values()))["snapshots"][0]["sampled"], "prompts of the red-team set")
    if rated := {name: of["elo"] for name, of in found.items() if of["elo"]}:
        yield picture("figure-8", paper.elo_along_rl(rated), there, n)
    yield picture("figure-10", paper.harmfulness({name: of["snapshots"] for name, of in found.items()}), there, n)
    measured = [g for g in there if all(s["kl"] is not None for s in found[g.name]["snapshots"])]
    for file, g, of in numbered("overoptimisation", measured):
        yield picture("overoptimisation", paper.overoptimisation(found[g.name]["snapshots"]), [g], n, of, file)


def calibration(groups: Sequence[Group]) -> Iterator[Picture]:
    found, against = {}, {}
    there = distinct(groups, "preferences", "preferences/comparisons.jsonl")
    for g in there:
        if gates := g.each("preferences/gate.json"):
            tables = {joined(g.name, judge): of["calibration_error"]["table"] for judge, of in gates[0].items()}
            against["people's comparisons of the gate"] = True
        else:
            rows = [r for of in g.each("preferences/comparisons.jsonl", records.read) for r in of if known(r)]
            p = [np.mean([j.get("p_unclamped", j["p_a"]) for j in r["judgements"]]) for r in rows]
            both = [(x, y) for x, y in zip(p, map(better, rows), strict=True) if y is not None]
            tables = {g.name or "judge": trust.calibration(*np.array(both, np.float64).T)["calibration"]} if both else {}
            against["the oracle's verdicts on the run's own pairs"] = True
        found |= {name: table for name, table in tables.items() if table not in found.values()}
    if found:
        n = joined(*(f"{name}: {sum(r['n'] for r in rows)}" for name, rows in found.items()))
        text = caption("figure-9", n, " and ".join(against))
        yield Picture("figure-9", CAPTIONS["figure-9"][0], paper.calibration(found), text)


def frontier(groups: Sequence[Group]) -> Iterator[Picture]:
    rows, seen, there = [], set(), [g for g in groups if g.each(RESULTS)]
    for g in there:
        found, start = g.pool(RESULTS)["models"], OF_INIT[g.cfg.ppo.init]
        for model in canvas.ordered(found):
            of, kl = found[model]["heldout"]["sampled"], found[model].get("kl", {}).get("start", {"mean": None})["mean"]
            best = canvas.BEST_OF.fullmatch(model)
            from_start = best or model == "rl_cai" or (model, start) == ("dpo_cai", "sl_cai")
            kl = 0.0 if model == start else kl if from_start else None
            stage = MODELS[start] if best else MODELS[model]
            mark = model, g.made("reward") if best else "", g.made(stage) if stage else g.cfg.model.path
            if kl is None or of["harm_rate"] is None or mark in seen:
                continue
            seen.add(mark)
            label = g.name if g.name and kl and not best else canvas.label_of(model)
            low, high = of["interval"]["harm_rate"]
            row = {"label": label, "group": model, "kl": kl, "harm_rate": of["harm_rate"], "low": low, "high": high}
            rows.append(row | {"helpfulness": of["helpfulness"], "interval": of["interval"]["helpfulness"]})
    if any(r["kl"] > 0 for r in rows):
        yield picture("frontier", paper.frontier(rows), there, heldout(there))


def resilience(groups: Sequence[Group]) -> Iterator[Picture]:
    """Erosion and attacks."""
    for file, g, of in numbered("erosion", distinct(groups, "erosion", "erosion/results.json")):
        found = g.pool("erosion/results.json")
        n = both_kinds(found["points"][0], "held-out prompts")
        of = canvas.label_of(found["model"]) + of
        yield picture("erosion", paper.erosion(found["points"]), [g], n, of, file)
    for file, g, of in numbered("attacks", distinct(groups, "attack", "attack/results.json")):
        models = g.pool("attack/results.json")["models"]
        n = sorted({round(x["n"]) for kinds in models.values() for x in kinds.values()})
        yield picture("attacks", paper.attacks(models), [g], " to ".join(map(str, n[:1] + n[1:][-1:])), of, file)


FIGURES = (elo, judging, revisions, principles, directness, along_rl, calibration, frontier, resilience)
