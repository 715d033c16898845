"""Every model of the run on red-team and held-out prompts, sampled and greedy, judged by the oracle; the KL that its training
spent; and best-of-n, which needs no training.

Writes evaluate/results.json, evaluate/transcripts.jsonl and, when the critiques were of its prompts, evaluate/rounds.json.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cai_jax import records
from cai_jax.config import Config
from cai_jax.constitution.distance import FEWEST
from cai_jax.evals import trust
from cai_jax.evaluation import (
    PRIOR,
    Answer,
    answers,
    by_oracle,
    elos,
    evenly,
    judged,
    known,
    learnt_from,
    likelihood,
    met,
    rated,
    summary,
    unseen,
    untouched,
    verdict,
)
from cai_jax.intervals import student
from cai_jax.progress import table
from cai_jax.slots import ready
from cai_jax.stages import MODELS, OF_INIT, checkpoint, inputs_of, load_constitution, load_lm, load_scorer, origin
from cai_jax.stages.preferences import asked_all
from cai_jax.workdir import begin, finish, outputs, write_json

STAGE = "evaluate"
SPOKEN = ("heldout", "sampled")  # set and mode by which models are compared
SHOWN = ("harm_rate", "harm_score", "helpfulness", "over_refusal", "evasive", "explained", "coherent")


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c = workdir / STAGE, cfg.evaluate
    read = ("critique", "reward", "harm", *(("preferences",) if c.judge else ()), *filter(None, MODELS.values()))
    after = tuple(s for s in cfg.stages if s in read)
    files = learnt_from(cfg) | {"evaluated": c.redteam, "heldout": c.heldout}
    models = [m for m, stage in MODELS.items() if stage is None or stage in cfg.stages]
    inputs = inputs_of(cfg, workdir, STAGE, files, after, tuple(models))
    inputs |= {"best of": OF_INIT[cfg.ppo.init]} if c.best_of else {}
    if not begin(STAGE, workdir, inputs | {"constitution": load_constitution(cfg).fingerprint}):
        return False
    sets = {name: judged(getattr(c, name), f"--config.evaluate.{name}") for name in ("heldout", "redteam")}
    sets["heldout"], counts = unseen(cfg, sets["heldout"])
    sets = {name: evenly(todo, c.limit) for name, todo in sets.items()}
    modes = {"sampled": c.sampling, "greedy": dataclasses.replace(c.sampling, temperature=0.0)}
    journal, results, transcripts = records.Journal(folder / "journal.jsonl"), {}, []

    def add(model: str, which: str, mode: str, said: list[Answer]) -> None:
        about = {"model": model, "set": which, "mode": mode}
        results.setdefault(model, {}).setdefault(which, {})[mode] = summary(sets[which], [x.text for x in said])
        for p, x in zip(sets[which], said, strict=True):
            of = {"response": x.text, "finished": x.finished, "verdict": dataclasses.asdict(verdict(p, x.text))}
            transcripts.append(p | about | of)

    for model in models:
        lm = ready(load_lm(cfg, workdir, mesh, model), c.sampling.gather)
        templates = load_constitution(cfg, model).templates
        for name, todo in sets.items():
            for mode, sampling in modes.items():
                add(model, name, mode, answers(cfg, lm, templates, todo, sampling, journal, mesh, f"{name}-{model}-{mode}"))
        del lm  # before the next is loaded
    spoken = {m: [r for r in transcripts if (r["model"], r["set"], r["mode"]) == (m, *SPOKEN)] for m in models}
    said = {m: [Answer(r["response"], r["finished"]) for r in rows] for m, rows in spoken.items()}
    for model, found in divergences(cfg, workdir, mesh, sets["heldout"], said).items():
        results[model]["kl"] = found
    for n, best in best_of(cfg, workdir, mesh, sets["heldout"], journal).items():
        add(f"best_of_{n}", *SPOKEN, best)
        if untouched(c.sampling):
            results[f"best_of_{n}"]["kl"] = {"start": {"mean": math.log(n) - (n - 1) / n, "interval": None}}
    if "harm" in cfg.stages:
        add_ratings(cfg, workdir, mesh, results, transcripts)
    compared = [r for rows in spoken.values() for r in rows]
    ratings = rated_by(compared) | ({"by_judge": by_judge(cfg, workdir, mesh, compared, journal)} if c.judge else {})
    write_json(folder / "results.json", {"models": results} | ratings)
    records.write(folder / "transcripts.jsonl", transcripts)
    revised = records.read(workdir / "critique" / "revisions.jsonl", ("rounds",)) if "critique" in cfg.stages else []
    rounds = by_round(revised) | scores_by_round(cfg, workdir, mesh, revised) if revised and all(map(known, revised)) else None
    if rounds:
        write_json(folder / "rounds.json", rounds)
    counts = {"prompts": {k: len(v) for k, v in sets.items()}, "heldout": counts}
    finish(STAGE, workdir, counts, ("results.json", "transcripts.jsonl", *(("rounds.json",) if rounds else ())))
    journal.remove()
    show(results)
    for who, of in (("oracle", ratings), ("judge", ratings.get("by_judge"))):
        show_elos(of, who)
    return True


def divergences(cfg: Config, workdir: Path, mesh, todo: list[dict], said: dict[str, list[Answer]]) -> dict[str, dict]:
    """How far training took each model: KL(model | reference), nats per response, from "base" and from the "start" of its own
    training (where that is a model of the run), by the mean log-ratio of its sampled responses, with an interval over them. {}
    where sampling is not that of the model itself (a temperature, a nucleus), or there are too few prompts.

    said: model -> its responses to `todo`."""
    c = cfg.evaluate.sampling
    if not untouched(c) or len(todo) < FEWEST:
        return {}
    starts = {m: origin(cfg, m) or ("base" if checkpoint(cfg, m) == checkpoint(cfg, "base") else None) for m in said}
    of = {m: {"base": "base"} | ({"start": start} if start else {}) for m, start in starts.items() if m != "base"}
    logp = {}
    for scorer in said:
        heard = [m for m in of if scorer in (m, *of[m].values())]
        lm = load_lm(cfg, workdir, mesh, scorer) if heard else None
        for m in heard:
            templates = load_constitution(cfg, scorer).templates
            logp[m, scorer] = likelihood(lm, templates, todo, said[m], c.batch_size, mesh)
        del lm
    ratios = {m: {name: logp[m, m] - logp[m, ref] for name, ref in refs.items()} for m, refs in of.items()}
    held = {m: {name: x[~np.isnan(x)] for name, x in found.items()} for m, found in ratios.items()}
    return {m: {name: mean_of(x) for name, x in found.items() if len(x) >= FEWEST} for m, found in held.items()}


def mean_of(values: np.ndarray) -> dict:
    return {"mean": float(np.mean(values)), "interval": student(values)}


def best_of(cfg: Config, workdir: Path, mesh, todo: list[dict], journal) -> dict[int, list[Answer]]:
    """n -> of the first n answers to each prompt, by the model that RL starts from, the one that the reward model likes best;
    n = 2, 4, ... up to --config.evaluate.best_of. The KL of that from the model is at most log n - (n - 1) / n (Beirami et
    al. 2401.01879)."""
    most, c, start = cfg.evaluate.best_of, cfg.evaluate.sampling, OF_INIT[cfg.ppo.init]
    if not most:
        return {}
    lm, templates = ready(load_lm(cfg, workdir, mesh, start), c.gather), load_constitution(cfg, start).templates
    each = [answers(cfg, lm, templates, todo, c, journal, mesh, f"heldout-{start}-{n}") for n in range(most)]
    del lm
    lm, templates = load_scorer(cfg, workdir, mesh, "reward"), load_constitution(cfg, "reward").templates
    score_NP = np.stack([rated(lm, templates, todo, said, c.batch_size, mesh) for said in each])
    sizes = [2**k for k in range(1, most.bit_length()) if 2**k <= most]
    return {n: [each[best][p] for p, best in enumerate(np.argmax(score_NP[:n], axis=0))] for n in sizes}


def add_ratings(cfg: Config, workdir: Path, mesh, results: dict, transcripts: list[dict]) -> None:
    """Puts the harm regressor's rating of every answer into the transcripts, and their means over harmful prompts, from 0 to 4
    by their scale, into the results."""
    lm, templates = load_scorer(cfg, workdir, mesh, "harm"), load_constitution(cfg, "harm").templates
    said = [Answer(t["response"]) for t in transcripts]  # whole or not, EOS ends what it learnt from
    found = rated(lm, templates, transcripts, said, cfg.evaluate.sampling.batch_size, mesh)
    for t, rating in zip(transcripts, found, strict=True):
        t["rating"] = float(rating)
    for model, of in results.items():
        for which, mode in ((s, m) for s in of if s != "kl" for m in of[s]):
            mine = [t for t in transcripts if (t["model"], t["set"], t["mode"], t["kind"]) == (model, which, mode, "harmful")]
            if len(mine) >= FEWEST:
                of[which][mode]["rating"] = mean_of(np.array([t["rating"] for t in mine]))


def rated_by(rows: list[dict], score: Callable[[dict, dict, str], float] = by_oracle) -> dict:
    """Elo of the models as it is, and as it would be if their answers were equally long."""
    return {"elo": elos(rows, score), "elo_at_equal_length": elos(rows, score, at_equal_length=True)}


def by_judge(cfg: Config, workdir: Path, mesh, rows: list[dict], journal) -> dict:
    """The same by the judge of the labels, as it labels: in both orders, by principles drawn for each pair, a win on the side
    of its label and a tie between equal texts; and how it agrees with the oracle, see evals.trust."""
    pairs, drops, truth = {}, records.Drops(), {}
    for scale, of in met(rows).items():
        for a, b in of:
            key = f"{a['id']}/{a['model']}/{b['model']}"
            truth[key] = by_oracle(a, b, scale)
            if a["response"].strip() != b["response"].strip():
                texts = {"response_a": a["response"], "response_b": b["response"]}
                pairs[key] = {"id": key, "messages": a["messages"]} | texts
    judged = asked_all(cfg, workdir, mesh, [*pairs.values()], drops, journal)
    label = {r["id"]: r["p_a"] for r in judged}

    def score(a: dict, b: dict, scale: str) -> float:
        return float(np.sign(label.get(f"{a['id']}/{a['model']}/{b['model']}", 0.5) - 0.5) + 1) / 2

    p_N, truth_N = np.array([(p, truth[key]) for key, p in label.items()], np.float64).reshape(-1, 2).T
    found = rated_by(rows, score) | {"pairs": drops.counts(len(pairs), len(judged))}
    if np.sum((p_N != 0.5) & (truth_N != 0.5)) >= FEWEST:
        found["agreement"] = {"accuracy": trust.accuracy(p_N, truth_N), "kappa": trust.kappa(p_N, truth_N)}
    return found


def said_in_round(r: dict, n: int) -> Answer:
    turn = r["rounds"][n - 1] if n else r
    return Answer(turn["revision" if n else "response"], turn.get("finished", True))


def scores_by_round(cfg: Config, workdir: Path, mesh, revised: list[dict]) -> dict:
    """What the reward model says of the first responses and of each round's revisions (paper, figure 5), in standard deviations
    of its scores. {} without one."""
    if "reward" not in cfg.stages or len(revised) < FEWEST:
        return {}
    lm, templates = load_scorer(cfg, workdir, mesh, "reward"), load_constitution(cfg, "reward").templates
    scale, rounds = outputs("reward", workdir)["scale"], max(len(r["rounds"]) for r in revised)
    found = []
    for n in range(rounds + 1):
        said = [said_in_round(r, n) for r in revised]
        scores = rated(lm, templates, revised, said, cfg.evaluate.sampling.batch_size, mesh)
        found.append(mean_of((scores - scale["mean"]) / scale["std"]))
    return {"score": [f["mean"] for f in found], "score_interval": [f["interval"] for f in found]}


def by_round(revised: list[dict]) -> dict:
    """Harm of the first response and of each revision, over the red-team prompts of the pipeline."""
    rounds = max((len(r["rounds"]) for r in revised), default=0)
    found = [summary(revised, [said_in_round(r, n).text for r in revised]) for n in range(rounds + 1)]
    categories = sorted(found[0]["by_category"]) if found else []
    return {
        "harm_rate": [f["harm_rate"] for f in found],
        "interval": [f["interval"]["harm_rate"] for f in found],
        "explained": [f["explained"] for f in found],
        "by_category": {k: [f["by_category"][k]["harm_rate"] for f in found] for k in categories},
    }


def show_elos(rated: dict | None, who: str) -> None:
    rows = []
    for scale, of in (rated or {"elo": {}})["elo"].items():
        equal = {r["model"]: r["elo"] for r in rated["elo_at_equal_length"][scale]["models"]}
        for r in of["models"]:
            span = f"[{r['low']:+.0f}, {r['high']:+.0f}]"
            rows.append([scale, r["model"], f"{r['elo']:+.0f}", span, f"{equal[r['model']]:+.0f}", f"{r['win_share']:.0%}"])
    if rows:
        header = ["scale", "model", "Elo", "95 %", "at equal length", "won, ties half"]
        table(f"Elo by the {who}, prior {PRIOR}", header, rows)


def show(results: dict) -> None:
    """The stage table in the terminal."""
    rows = []
    for model, sets in results.items():
        for name, modes in sets.items():
            for mode, found in modes.items() if name != "kl" else ():
                values = ["–" if found[m] is None else f"{found[m]:.3f}" for m in SHOWN]
                rows.append([model, f"{name}, {mode}", *values])
    table("answers of each model", ["model", "prompts", *SHOWN], rows)
