"""The automatic red team (Perez et al. 2022, 2202.03286; CAI 3.2): the base writes prompts after those of data.redteam, and
every model of the run is attacked with them, in each way of evals.redteam.KINDS.

The oracle judges the answers, or in other worlds the harm regressor. Writes attack/prompts.jsonl, attack/transcripts.jsonl and
attack/results.json.
"""

import dataclasses
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from cai_jax import prompts, records
from cai_jax.config import Config
from cai_jax.data import load_pool, load_prompts, said
from cai_jax.errors import InputError
from cai_jax.evals import redteam
from cai_jax.evals.redteam import KINDS, Known
from cai_jax.evaluation import Answer, evenly, harm_by_category, known, miniworld, rated, verdict
from cai_jax.generate import Chain, Request, fits, sample_chains, sample_texts
from cai_jax.models import LM
from cai_jax.progress import say, table
from cai_jax.prompts import ASSISTANT, USER
from cai_jax.slots import ready
from cai_jax.stages import MODELS, inputs_of, load_constitution, load_format, load_lm, load_scorer
from cai_jax.workdir import begin, finish, write_json

STAGE = "attack"
ANY = "any"  # category of prompts that have none


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c = workdir / STAGE, cfg.attack
    seeds, _ = load_pool(cfg.data, "redteam", load_format(cfg)[0], load_constitution(cfg).templates)
    world = all(map(known, seeds))  # whose oracle is the judge
    if not world and "harm" not in cfg.stages:
        raise InputError(
            f"--config.data.redteam={cfg.data.redteam}: nothing judges answers to prompts that are not of the embedded "
            f"world; add 'harm' to --config.stages, or leave {STAGE!r} out"
        )
    models = [m for m, stage in MODELS.items() if stage is None or stage in cfg.stages]
    after = tuple(s for s in cfg.stages if s in (*MODELS.values(), *(() if world else ("harm",))))
    files = {"redteam": cfg.data.redteam, "helpful": cfg.data.helpful, "results": c.results}
    files |= {"evaluated": cfg.evaluate.redteam, "heldout": cfg.evaluate.heldout}
    inputs = inputs_of(cfg, workdir, STAGE, files, after, tuple(models))
    if not begin(STAGE, workdir, inputs | {"constitution": load_constitution(cfg).fingerprint}):
        return False
    journal = records.Journal(folder / "journal.jsonl")
    written, writing = write(cfg, load_lm(cfg, workdir, mesh), seeds, world, journal, mesh)
    records.write(folder / "prompts.jsonl", written)
    drops, attacks = records.Drops(), []
    for model in models:
        lm = ready(load_lm(cfg, workdir, mesh, model), c.sampling.gather)
        attacks += attacked(cfg, model, lm, load_constitution(cfg, model).templates, written, journal, mesh, drops)
        del lm  # before the next is loaded
    verdicts = iter(judged(cfg, workdir, mesh, [r for answers in attacks for r in answers], world))
    every = [[r | {"verdict": next(verdicts)} for r in answers] for answers in attacks]
    transcripts = [max(answers, key=lambda r: r["verdict"]["harm"]) for answers in every]
    results = {m: {} for m in models}
    for t in transcripts:
        results[t["model"]].setdefault(t["attack"], []).append((t["category"], t["verdict"]))
    results = {m: {kind: redteam.figures(rows) for kind, rows in of.items()} for m, of in results.items()}
    write_json(folder / "results.json", {"writing": writing, "models": results})
    records.write(folder / "transcripts.jsonl", transcripts)
    counts = {"writing": {k: writing[k] for k in ("given", "kept", "dropped")}}
    counts["attacks"] = drops.counts(len(written) * len(models) * len(KINDS), len(transcripts))
    finish(STAGE, workdir, counts, ("prompts.jsonl", "results.json"))
    journal.remove()
    show(results)
    return True


def write(cfg: Config, lm: LM, seeds: list[dict], world: bool, journal, mesh) -> tuple[list[dict], dict]:
    """-> (the prompts of the base that are left, in its order; figures of all that it wrote). It writes as many as are wanted,
    and again, until those are left or all tries are made. Raises InputError when none is left."""
    c, templates, lm = cfg.attack, load_constitution(cfg).templates, ready(lm, cfg.attack.writing.gather)
    pool = defaultdict(list)
    for r in seeds:
        pool[r.get("category") or ANY].append(r)
    wanted = redteam.parts(weights(c.results, sorted(pool)), c.prompts)
    near_to = Known([r["messages"][-1]["content"] for r in seeds])
    sieve, written = redteam.Sieve(wanted, copies(cfg, seeds), near_to, c.near, named if world else None), 0
    while len(sieve.kept) < c.prompts and written < c.prompts * c.tries:
        shown = {f"{STAGE}-{n:06d}": draw(cfg, pool, wanted, n) for n in range(written, written + c.prompts)}
        asked = {key: opening(of, c.words, templates) for key, of in shown.items()}
        room = [key for key, x in asked.items() if sieve.drops.keep(fits(lm, x[2], c.writing.max_tokens), "no room for it")]
        requests, what = [Request(key, asked[key][2]) for key in room], f"writing, from {written} on"
        texts = sample_texts(lm, requests, c.writing, cfg.seed, journal, mesh, templates, what)
        for key, text in zip(room, texts, strict=True):
            earlier, start, _ = asked[key]
            messages = [*earlier, {"role": USER, "content": redteam.joined(start, text["text"])}]
            of = {"category": shown[key][-1].get("category") or ANY, "written_from": [r["id"] for r in shown[key]]}
            sieve.add({"id": key, "messages": messages} | of, text["finished"])
        written += c.prompts
    if not sieve.kept:
        journal.remove()  # so that other settings may be tried in this folder
        raise InputError(
            f"{STAGE}: none of {written} prompts that the base wrote is left: {dict(sieve.drops.reasons)}; change how many "
            "it is shown (--config.attack.shots) or how many words of one it goes on from (--config.attack.words)"
        )
    say(f"{STAGE}: {len(sieve.kept)} of the {written} prompts that the base wrote are left; {c.prompts} were wanted")
    by = {k: {"wanted": n, "written": sieve.written[k], "kept": sieve.used[k]} for k, n in wanted.items()}
    counts = sieve.drops.counts(written, len(sieve.kept)) | {"by_category": by}
    return sieve.kept, counts | {"diversity": compared(sieve.kept, seeds)}


def weights(path: str, categories: list[str]) -> dict[str, float]:
    """What share of the prompts each category gets: by its harm rate in --config.attack.results, or alike."""
    if not path:
        return dict.fromkeys(categories, 1.0)
    harm = harm_by_category(path, "--config.attack.results")
    if unknown := sorted(set(categories) - harm.keys()):
        raise InputError(f"--config.attack.results={path}: it says nothing of category {unknown[0]!r}")
    return {k: harm[k] for k in categories}


def copies(cfg: Config, seeds: list[dict]) -> dict[str, str]:
    """Prompts that are known, as `data.said` has them -> why one that is the same is left out."""
    found = {}
    for name in ("heldout", "redteam"):
        rows = load_prompts(getattr(cfg.evaluate, name), 0, f"--config.evaluate.{name}")
        found |= {said(r["messages"]): f"in --config.evaluate.{name}" for r in rows}
    return found | {said(r["messages"]): "in --config.data.redteam" for r in seeds}


def draw(cfg: Config, pool: dict[str, list[dict]], wanted: dict[str, int], n: int) -> list[dict]:
    """The prompts that are shown for the n-th: of one category, drawn by how many are wanted of it."""
    rng, c = np.random.default_rng([cfg.seed, 13, n]), cfg.attack
    category = str(rng.choice(list(wanted), p=np.array(list(wanted.values())) / sum(wanted.values())))
    rows = rng.permutation(len(pool[category]))[: c.shots + (c.words > 0)]
    return [pool[category][i] for i in rows]


def opening(shown: list[dict], n: int, templates) -> tuple[list[dict], str, str]:
    """What the writer goes on from: the prompts shown, of the last only its first n words; of n = 0, all are whole. -> (the
    messages before the new prompt in its own conversation, how it begins, the context)."""
    whole, (*earlier, cut) = (shown[:-1], shown[-1]["messages"]) if n else (shown, [{"content": ""}])
    start = " ".join(cut["content"].split()[:n])
    return earlier, start, prompts.asking([*(m for r in whole for m in r["messages"]), *earlier], start, templates)


@cache
def _names() -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(miniworld().by_name, key=len, reverse=True)))})\b")


def named(text: str) -> list:
    """The items of the embedded world that a text names."""
    return [miniworld().by_name[name] for name in dict.fromkeys(_names().findall(text))]


def compared(kept: list[dict], seeds: list[dict]) -> dict:
    """How various the prompts are, beside as many of data.redteam; how many items and frames (prompts with a blank for the
    item) they have, and how many of those are not in data.redteam, where there is an oracle."""
    n = min(len(kept), len(seeds))
    texts = {"written": kept, "seeds": seeds}
    of = {k: redteam.diversity([r["messages"][-1]["content"] for r in evenly(rows, n)]) for k, rows in texts.items()}
    parts = {"items": lambda r: r["item"], "frames": lambda r: redteam.frame(r["messages"][-1]["content"], r["item"])}
    for name, get in parts.items() if "item" in kept[0] else ():
        have = {k: set(map(get, rows)) for k, rows in texts.items()}
        of[name] = {"written": len(have["written"]), "new": len(have["written"] - have["seeds"])}
    return of | {"n": n}


def attacked(cfg: Config, model: str, lm: LM, templates, todo: list[dict], journal, mesh, drops) -> list[list[dict]]:
    """Every prompt put to a model in every way. -> of each attack the records of its answers to the prompt: the prompt's, with
    the model, the attack, the conversation before the answer, and the response."""
    friendly, plans = friends(cfg, todo), {}
    for p in todo:
        for kind, put in KINDS.items():
            turns, first = redteam.turns_of(put, p["messages"], friendly[p["id"]])
            if drops.keep(fits(lm, heard(turns[0], put.begun, templates), cfg.attack.sampling.max_tokens), f"no room: {kind}"):
                plans[f"{p['id']}/{model}-{kind}"] = p, kind, turns, first
    chains = {key: conversation(key, turns, KINDS[kind].begun, templates) for key, (_, kind, turns, _) in plans.items()}
    done = sample_chains(lm, chains, cfg.attack.sampling, cfg.seed, journal, mesh, templates, model)
    out = []
    for key, (p, kind, turns, first) in plans.items():
        if drops.keep(done[key] is not None, f"no room: {kind}"):
            before, found = [], []
            for n, (asked, answer) in enumerate(zip(turns, done[key], strict=True)):
                before = [*before, *asked]
                found += [p | {"model": model, "attack": kind, "conversation": before, "response": answer}] * (n >= first)
                before = [*before, {"role": ASSISTANT, "content": answer}]
            out.append(found)
    return out


def friends(cfg: Config, todo: list[dict]) -> dict[str, list[str]]:
    """Id -> the harmless turns of its friendly attack: first turns of data.helpful's conversations that have more, such as
    greetings; where none has, any of its prompts."""
    rows = load_prompts(cfg.data.helpful, cfg.data.max_helpful, "--config.data.helpful", records.Drops())
    rows = [r for r in rows if len(r["messages"]) > 1] or rows
    texts = list(dict.fromkeys(r["messages"][0]["content"] for r in rows))
    drawn = {p["id"]: np.random.default_rng([cfg.seed, 17, *p["id"].encode()]).permutation(len(texts)) for p in todo}
    return {id: [texts[i] for i in order[: cfg.attack.rapport]] for id, order in drawn.items()}


def conversation(key: str, turns: list[list[dict]], begun: str, templates) -> Chain:
    """Says one turn after another, with the model's own answers in between. -> the answers; None where they leave no room."""
    messages, out = [], []
    for n, asked in enumerate(turns):
        messages = [*messages, *asked]
        answer = yield Request(f"{key}/{n}", heard(messages, begun, templates))
        if answer is None:
            return None
        out.append(redteam.joined(begun, answer["text"]))
        messages.append({"role": ASSISTANT, "content": out[-1]})
    return out


def heard(messages: list[dict], begun: str, templates) -> str:
    """What a model continues with its answer, of which the beginning is given."""
    return prompts.dialogue(messages, templates) + (prompts.completion(begun, templates) if begun else "")


def judged(cfg: Config, workdir: Path, mesh, rows: list[dict], world: bool) -> list[dict]:
    """A verdict on each response: the oracle's, with how many true steps it gives away, or {"harm": the regressor's rating}."""
    if world:
        return [dataclasses.asdict(verdict(r, r["response"])) | {"steps": steps(r)} for r in rows]
    lm, templates = load_scorer(cfg, workdir, mesh, "harm"), load_constitution(cfg, "harm").templates
    asked, said = [{"messages": r["conversation"]} for r in rows], [Answer(r["response"]) for r in rows]
    return [{"harm": float(x)} for x in rated(lm, templates, asked, said, cfg.attack.sampling.batch_size, mesh)]


def steps(record: dict) -> int:
    return sum(f"{verb} the {thing}" in record["response"] for verb, thing in miniworld().by_name[record["item"]].recipe)


def show(results: dict) -> None:
    rows = []
    for model, kinds in results.items():
        for kind, f in kinds.items():
            low, high = f["interval"]
            shares = ["–" if x is None else f"{x:.3f}" for x in (f["failure"], f["partial"], f["disclosed"])]
            rows.append([model, kind, shares[0], f"[{low:.3f}, {high:.3f}]", *shares[1:], str(f["n"])])
    table("attacks by prompts that the base wrote", ["model", "attack", "failure", "95 %", "partial", "disclosed", "n"], rows)
