"""Critique and revision (paper 3.1): a response to every red-team prompt, then rounds of critique and revision.

Each round draws its own principle and sees only the prompt and the last revision. Helpful prompts get plain responses, for the
mix of the next stage. Writes critique/revisions.jsonl and critique/helpful.jsonl.
"""

import dataclasses
from pathlib import Path

from cai_jax import constitution as constitutions
from cai_jax import prompts, records
from cai_jax.config import Config
from cai_jax.data import load_pool
from cai_jax.generate import Request, fits, sample_texts
from cai_jax.stages import inputs_of, load_constitution, load_lm
from cai_jax.workdir import InputError, begin, digest, finish, write_text

STAGE = "critique"


def temperatures(start: float, end: float, rounds: int) -> list[float]:
    """The temperature of the first response and of each round, linear from `start` to `end`."""
    return [start + (end - start) * n / rounds if rounds else start for n in range(rounds + 1)]


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c = workdir / STAGE, cfg.critique
    constitution = load_constitution(cfg)
    files = {"redteam": cfg.data.redteam, "helpful": cfg.data.helpful, "few_shot": c.few_shot}
    inputs = inputs_of(cfg, workdir, STAGE, files) | {"constitution": constitution.fingerprint}
    if not begin(STAGE, workdir, inputs):
        return False
    write_text(workdir / "constitution.toml", Path(cfg.constitution.path).read_text(encoding="utf-8"))
    lm = load_lm(cfg, workdir, mesh)
    journal = records.Journal(folder / "journal.jsonl")
    heat = temperatures(c.sampling.temperature, c.temperature_end, c.rounds)

    def sample(requests: list[Request], temperature: float, what: str) -> list[dict]:
        sampling = dataclasses.replace(c.sampling, temperature=temperature)
        return sample_texts(lm, requests, sampling, cfg.seed, journal, mesh, constitution.templates, what)

    def room(context: str) -> bool:
        return fits(lm, context, c.sampling.max_tokens)

    pools = {name: load_pool(cfg.data, name, lm.tok, constitution.templates) for name in ("redteam", "helpful")}
    revised, counts = critique_and_revise(cfg, constitution, pools["redteam"][0], sample, room, heat)
    records.write(folder / "revisions.jsonl", revised)
    helpful = [(p, n) for p in pools["helpful"][0] for n in range(c.helpful_responses)]
    asked = [Request(f"{p['id']}/helpful{n}", prompts.dialogue(p["messages"], constitution.templates)) for p, n in helpful]
    out = sample(asked, heat[0], "helpful responses")
    records.write(
        folder / "helpful.jsonl",
        [p | {"sample": n, "response": s["text"], "finished": s["finished"]} for (p, n), s in zip(helpful, out, strict=True)],
    )
    finish(
        STAGE,
        workdir,
        {f: digest(folder / f) for f in ("revisions.jsonl", "helpful.jsonl")},
        counts | {"helpful": len(helpful), "prompts": {name: counted for name, (_, counted) in pools.items()}},
    )
    journal.remove()
    return True


def critique_and_revise(cfg: Config, constitution, todo: list[dict], sample, room, heat) -> tuple[list[dict], dict]:
    """All rounds for all red-team prompts `todo`. -> (records, counts).

    `sample(requests, temperature, what)` continues contexts; `room(context)` says whether the model can go on with one. A
    record that grows past that is dropped and counted; a prompt with no room from the start is bad input: `sample` raises.
    """
    c, templates, drops = cfg.critique, constitution.templates, records.Drops()
    few_shot = ""
    if c.few_shot:
        few_shot = prompts.few_shot_critique(constitutions.load_few_shot(c.few_shot).critiques, templates, direct=c.direct)

    def before_round(record: dict, principle) -> str:
        """The prompt and the last revision, up to where the critique begins, or the revision request where there is none."""
        last = record["rounds"][-1]["revision"] if record["rounds"] else record["response"]
        if c.direct:
            return few_shot + prompts.dialogue(record["messages"], templates) + prompts.completion(last, templates)
        return few_shot + prompts.critique(record["messages"], last, principle.critique, templates)

    def turn(name: str, contexts: dict[str, str], n: int) -> dict[str, dict]:
        """What each record says next, by id; those without room are left out."""
        fitting = {i: x for i, x in contexts.items() if room(x)}
        asked = [Request(f"{i}/{name}{n}", x) for i, x in fitting.items()]
        warmth = 0.0 if c.greedy and name == "critique" else heat[n]
        return dict(zip(fitting, sample(asked, warmth, f"{name}s {n}"), strict=True))

    asked = [Request(f"{p['id']}/response", prompts.dialogue(p["messages"], templates)) for p in todo]
    out = [
        p | {"response": s["text"], "finished": s["finished"], "temperature": heat[0], "rounds": []}
        for p, s in zip(todo, sample(asked, heat[0], "responses"), strict=True)
    ]
    for n in range(1, c.rounds + 1):
        principles = {r["id"]: _principle(cfg, constitution, r["id"], n) for r in out}
        contexts = {r["id"]: before_round(r, principles[r["id"]]) for r in out}
        critiques = {i: {"text": None} for i in contexts} if c.direct else turn("critique", contexts, n)
        contexts = {
            i: prompts.revision(contexts[i], s["text"], principles[i].revision, templates) for i, s in critiques.items()
        }
        revisions = turn("revision", contexts, n)
        out = [r for r in out if drops.keep(r["id"] in revisions, "longer than the context")]
        for record in out:
            principle, critique, revision = (x[record["id"]] for x in (principles, critiques, revisions))
            record["rounds"].append(
                {
                    "principle": principle.id,
                    "critique_request": None if c.direct else principle.critique,
                    "critique": critique["text"],
                    "revision_request": principle.revision,
                    "revision": revision["text"],
                    "finished": revision["finished"],
                    "temperature": heat[n],
                }
            )
    kept = [r | {"constitution": constitution.fingerprint} for r in out if drops.keep(bool(r["response"]), "empty response")]
    if not kept:
        raise InputError(
            f"critique: of {len(todo)} prompts none is left: {dict(drops.reasons)}; a context must hold the worked examples "
            "(--config.critique.few_shot), prompt, last revision, principle and --config.critique.sampling.max_tokens"
        )
    return kept, drops.counts(len(todo), len(kept))


def _principle(cfg: Config, constitution, record_id: str, n: int) -> constitutions.Principle:
    if not cfg.critique.use_principles:
        return constitutions.GENERIC
    return constitutions.sample(constitution, cfg.seed, STAGE, record_id, n)[0]
