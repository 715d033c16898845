"""AI preference labels (paper 4.1): two samples per prompt, judged by the base, or another model, through option log-probs.

Both orders are averaged, which removes a preference for a position; the label stays soft. Every judgement of every principle
is kept in the record. Writes preferences/comparisons.jsonl.
"""

from pathlib import Path

import numpy as np

from cai_jax import constitution as constitutions
from cai_jax import prompts, records
from cai_jax.config import Config
from cai_jax.constitution.few_shot import load_few_shot
from cai_jax.data import load_pool
from cai_jax.errors import InputError
from cai_jax.generate import Request, fits, sample_texts
from cai_jax.losses import preference_from_logprobs
from cai_jax.score import averaged_preference, option_logprobs
from cai_jax.slots import ready
from cai_jax.stages import OF_INIT, inputs_of, load_constitution, load_lm
from cai_jax.workdir import begin, finish

STAGE = "preferences"
OPTION_TOKENS = 8  # room for an option in any tokenizer


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c = workdir / STAGE, cfg.preferences
    constitution, writer = load_constitution(cfg, "judge"), OF_INIT[c.policy]
    after, files = ("sft",) if c.policy == "sft" else (), {"redteam": cfg.data.redteam, "few_shot": c.few_shot}
    inputs = inputs_of(cfg, workdir, STAGE, files, after, (writer, "judge")) | {"constitution": constitution.fingerprint}
    if not begin(STAGE, workdir, inputs):
        return False
    journal = records.Journal(folder / "journal.jsonl")
    policy = ready(load_lm(cfg, workdir, mesh, writer), c.sampling.gather)
    templates = load_constitution(cfg, writer).templates
    pool, counted = load_pool(cfg.data, "redteam", policy.tok, templates)
    todo = [p | {"id": f"{p['id']}+{n}" if n else p["id"]} for n in range(c.pairs) for p in pool]
    if len({p["id"] for p in todo}) < len(todo):
        raise InputError(f"{cfg.data.redteam}: ids end in '+1' and the like, as those of further pairs do; give others")
    asked = [Request(f"{p['id']}/{side}", prompts.dialogue(p["messages"], templates)) for p in todo for side in "ab"]
    samples = sample_texts(policy, asked, c.sampling, cfg.seed, journal, mesh, templates)
    del policy  # before the judge is loaded
    drops, pairs = records.Drops(), []
    for p, a, b in zip(todo, samples[0::2], samples[1::2], strict=True):
        whole, said = a["finished"] and b["finished"], a["text"] and b["text"]  # what is cut off must not be taught as an end
        if (
            drops.keep(whole, "cut off")
            and drops.keep(bool(said), "empty response")
            and drops.keep(a["text"] != b["text"], "identical responses")
        ):
            pairs.append(p | {"response_a": a["text"], "response_b": b["text"]})
    judged = []
    if pairs:
        lm = ready(load_lm(cfg, workdir, mesh, "judge"), c.thought.gather, decoding=c.chain_of_thought)
        judged = judge(cfg, lm, constitution, pairs, journal, mesh, drops)
    if not judged:
        raise InputError(
            f"preferences: of {len(todo)} prompts none gave two different responses to judge: {dict(drops.reasons)}"
        )
    records.write(folder / "comparisons.jsonl", judged)
    counts = drops.counts(len(todo), len(judged)) | label_statistics(judged) | {"prompts": {"redteam": counted}}
    finish(STAGE, workdir, counts, ("comparisons.jsonl",))
    journal.remove()
    return True


def judge(cfg: Config, lm, constitution, pairs: list[dict], journal, mesh, drops) -> list[dict]:
    """Comparison records with p_a in [0, 1] and the judgements behind it, one per principle. A pair that the judge's context
    cannot hold is dropped and counted."""
    c, templates = cfg.preferences, constitution.templates
    blocks = load_few_shot(c.few_shot).comparisons if c.few_shot else ()
    layout = prompts.reasoning if c.chain_of_thought else prompts.comparison

    def in_both_orders(p: dict, principle) -> list[str]:
        drawn = [constitutions.sample(constitution, cfg.seed, STAGE, p["id"], "few-shot", i)[0] for i in range(len(blocks))]
        prefix = prompts.few_shot_comparison(blocks, drawn, templates) if blocks else ""
        a, b = p["response_a"], p["response_b"]
        return [prefix + layout(p["messages"], principle.comparison, *order, templates) for order in ((a, b), (b, a))]

    def room(context: str) -> bool:
        if c.chain_of_thought:
            return fits(lm, prompts.verdict(context, "", templates), c.thought.max_tokens + OPTION_TOKENS)
        return fits(lm, context, OPTION_TOKENS)

    kept, asked = [], []  # asked: (record, principle, its context in both orders), k in a row for every record kept
    for p in pairs:
        drawn = constitutions.sample(constitution, cfg.seed, STAGE, p["id"], k=c.principles)
        rows = [(p, q, in_both_orders(p, q)) for q in drawn]
        if drops.keep(all(room(x) for *_, both in rows for x in both), "longer than the judge's context"):
            kept.append(p)
            asked += rows
    contexts = [x for *_, both in asked for x in both]
    thoughts = [None] * len(contexts)
    if c.chain_of_thought:
        keys = [f"{p['id']}/{q.id}/{order}" for p, q, _ in asked for order in ("ab", "ba")]
        requests = [Request(k, x) for k, x in zip(keys, contexts, strict=True)]
        said = sample_texts(lm, requests, c.thought, cfg.seed, journal, mesh, templates, "thoughts")
        thoughts = [s["text"] for s in said]
        contexts = [prompts.verdict(x, t, templates) for x, t in zip(contexts, thoughts, strict=True)]
    logp = option_logprobs(lm, contexts, c.score_batch, mesh, "judge").reshape(len(asked), 2, 2)
    judgements = [
        _judgement(q, logp[n], thoughts[2 * n : 2 * n + 2] if c.chain_of_thought else None, c)
        for n, (_, q, _) in enumerate(asked)
    ]
    out = []
    for n, p in enumerate(kept):
        rows = judgements[n * c.principles : (n + 1) * c.principles]
        soft = float(np.mean([r["p_a"] for r in rows]))
        p_a = soft if c.labels == "soft" else float(soft > 0.5) if soft != 0.5 else 0.5
        out.append(p | {"p_a": p_a, "source": "ai", "judgements": rows, "constitution": constitution.fingerprint})
    return out


def _judgement(principle, logp_22, thoughts, c) -> dict:
    """One principle's verdict. logp_22: rows are the orders (a, b) and (b, a), columns the options (A), (B)."""
    p_ab = float(preference_from_logprobs(logp_22[0, 0], logp_22[0, 1]))
    p_ba = float(preference_from_logprobs(logp_22[1, 1], logp_22[1, 0]))
    raw = float(averaged_preference(logp_22[0], logp_22[1]))
    judgement = {"principle": principle.id, "logp_ab": logp_22[0].tolist(), "logp_ba": logp_22[1].tolist()}
    judgement |= {"p_ab": p_ab, "p_ba": p_ba, "p_a": raw}
    if thoughts is not None:
        judgement |= {"p_a": float(np.clip(raw, *c.clamp)), "p_unclamped": raw, "thoughts": thoughts}
    return judgement


def label_statistics(judged: list[dict]) -> dict:
    """Of a judge: how often the order of the responses changes its verdict, its lean to (A), how decided its labels are."""
    rows = [r for record in judged for r in record["judgements"]]
    if not rows:
        return {"flip_rate": 0.0, "position_lean": 0.0, "decidedness": 0.0}
    p_ab, p_ba = np.array([r["p_ab"] for r in rows]), np.array([r["p_ba"] for r in rows])
    return {
        "flip_rate": float(np.mean((p_ab > 0.5) != (p_ba > 0.5))),
        "position_lean": float(np.mean(p_ab - p_ba) / 2),
        "decidedness": float(np.mean(np.abs([r["p_a"] - 0.5 for r in judged]))),
    }
