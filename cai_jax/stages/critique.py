"""Critique and revision (paper 3.1): a response to every red-team prompt, then rounds of critique and revision.

Each round draws its own principle and sees only the prompt and the last revision. Helpful prompts get plain responses, for the
mix of the next stage. Writes critique/revisions.jsonl and critique/helpful.jsonl.
"""

import dataclasses
from pathlib import Path

from cai_jax import constitution as constitutions
from cai_jax import prompts, records
from cai_jax.config import Config
from cai_jax.data import load_prompts
from cai_jax.generate import Request, sample_texts
from cai_jax.stages import inputs_of, load_constitution, load_lm
from cai_jax.workdir import begin, digest, finish, write_text

STAGE = "critique"


def temperatures(start: float, end: float, rounds: int) -> list[float]:
    """The temperature of the first response and of each round, linear from `start` to `end`."""
    return [start + (end - start) * n / rounds if rounds else start for n in range(rounds + 1)]


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c = workdir / STAGE, cfg.critique
    constitution = load_constitution(cfg)
    files = {"redteam": cfg.data.redteam, "helpful": cfg.data.helpful, "few_shot": c.few_shot}
    inputs = inputs_of(cfg, workdir, STAGE, files) | {"constitution": constitution.fingerprint}
    inputs["limits"] = [cfg.data.max_redteam, cfg.data.max_helpful]
    if not begin(STAGE, workdir, inputs):
        return False
    write_text(workdir / "constitution.toml", Path(cfg.constitution.path).read_text(encoding="utf-8"))
    lm = load_lm(cfg, workdir, mesh)
    journal = records.Journal(folder / "journal.jsonl")
    heat = temperatures(c.sampling.temperature, c.temperature_end, c.rounds)

    def sample(requests: list[Request], temperature: float, what: str) -> list[dict]:
        sampling = dataclasses.replace(c.sampling, temperature=temperature)
        return sample_texts(lm, requests, sampling, cfg.seed, journal, mesh, constitution.templates, what)

    revised, counts = critique_and_revise(cfg, constitution, sample, heat)
    records.write(folder / "revisions.jsonl", revised)
    helpful = []
    for p in load_prompts(cfg.data.helpful, cfg.data.max_helpful, "data.helpful"):
        helpful += [(p, n) for n in range(c.helpful_responses)]
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
        counts | {"helpful": len(helpful)},
    )
    journal.remove()
    return True


def critique_and_revise(cfg: Config, constitution, sample, heat: list[float]) -> tuple[list[dict], dict]:
    """All rounds for all red-team prompts. `sample(requests, temperature)` continues contexts. -> (records, counts)."""
    c, templates = cfg.critique, constitution.templates
    few_shot = ""
    if c.few_shot:
        few_shot = prompts.few_shot_critique(constitutions.load_few_shot(c.few_shot).critiques, templates, direct=c.direct)
    todo = load_prompts(cfg.data.redteam, cfg.data.max_redteam, "data.redteam")
    first = sample(
        [Request(f"{p['id']}/response", prompts.dialogue(p["messages"], templates)) for p in todo], heat[0], "responses"
    )
    out = [
        p | {"response": s["text"], "finished": s["finished"], "temperature": heat[0], "rounds": []}
        for p, s in zip(todo, first, strict=True)
    ]
    for n in range(1, c.rounds + 1):
        chosen = [_principle(cfg, constitution, p["id"], n) for p in todo]
        before = [r["rounds"][-1]["revision"] if r["rounds"] else r["response"] for r in out]
        critiques: list[str | None] = [None] * len(out)
        if c.direct:
            contexts = [
                few_shot + prompts.dialogue(p["messages"], templates) + prompts.completion(b)
                for p, b in zip(todo, before, strict=True)
            ]
        else:
            contexts = [
                few_shot + prompts.critique(p["messages"], b, principle.critique, templates)
                for p, b, principle in zip(todo, before, chosen, strict=True)
            ]
            asked = [Request(f"{p['id']}/critique{n}", x) for p, x in zip(todo, contexts, strict=True)]
            found = sample(asked, heat[n], f"critiques {n}")
            critiques = [s["text"] for s in found]
        asked = [
            Request(f"{p['id']}/revision{n}", prompts.revision(x, critique, principle.revision, templates))
            for p, x, critique, principle in zip(todo, contexts, critiques, chosen, strict=True)
        ]
        revisions = sample(asked, heat[n], f"revisions {n}")
        for record, principle, critique, revision in zip(out, chosen, critiques, revisions, strict=True):
            record["rounds"].append(
                {
                    "principle": principle.id,
                    "critique_request": None if c.direct else principle.critique,
                    "critique": critique,
                    "revision_request": principle.revision,
                    "revision": revision["text"],
                    "finished": revision["finished"],
                    "temperature": heat[n],
                }
            )
    drops = records.Drops()
    kept = [r | {"constitution": constitution.fingerprint} for r in out if drops.keep(bool(r["response"]), "empty response")]
    return kept, drops.counts(len(out), len(kept))


def _principle(cfg: Config, constitution, record_id: str, n: int) -> constitutions.Principle:
    if not cfg.critique.use_principles:
        return constitutions.GENERIC
    return constitutions.sample(constitution, cfg.seed, STAGE, record_id, n)[0]
