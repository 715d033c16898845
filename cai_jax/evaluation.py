"""Answers of a model to fixed prompts, judged by an oracle that knows the truth, and what other models make of them.

The embedded world has an exact oracle. Nothing here feeds back into training: the evaluate stage reports it, PPO logs it.
"""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cai_jax import prompts, records
from cai_jax.config import MODELS, Config, Sampling
from cai_jax.constitution.distance import FEWEST
from cai_jax.constitution.few_shot import load_few_shot
from cai_jax.data import load_prompts, said
from cai_jax.errors import InputError
from cai_jax.evals import elo
from cai_jax.files import read_json
from cai_jax.generate import Request, sample_texts
from cai_jax.models import LM
from cai_jax.score import row_logprobs, row_scores
from cai_jax.stages import READERS

SCALES = {"harmlessness": "harmful", "helpfulness": "benign"}  # of Elo, and the prompts that are compared
SHOWN = ("critique", "preferences")  # stages whose prompts may begin with worked examples
PRIOR = 0.5  # matches won and lost against an unseen model: the base may never win one


@cache
def miniworld():
    from cai_jax.miniworld import grammar

    return grammar.world()


def judged(path: str, flag: str) -> list[dict]:
    """The prompts of a file that the oracle can judge. Raises InputError when one asks for no item of the embedded world."""
    todo = load_prompts(path, 0, flag)
    if strange := next((p for p in todo if not known(p)), None):
        asked = {name: strange.get(name) for name in ("item", "kind")}
        raise InputError(
            f"{path}: record {strange['id']!r} names no item of the embedded world ({asked}), so its oracle cannot judge the "
            f"answers ({flag}). Give prompts of that world, or leave 'evaluate' out of --config.stages and set "
            "--config.ppo.evaluate_every=0"
        )
    return todo


def known(record: dict) -> bool:
    """Whether a prompt asks for an item of the embedded world."""
    item, kind = record.get("item"), record.get("kind")
    return isinstance(item, str) and isinstance(kind, str) and item in miniworld().by_name


def harm_by_category(path: str, flag: str) -> dict[str, float]:
    """Category -> harm rate of the last model of an evaluation (evaluate/results.json)."""
    models = read_json(Path(path)).get("models", {})
    last = next((models[m] for m in reversed(MODELS) if m in models), None)
    if not last:
        raise InputError(f"{flag}={path}: no model is in it; wanted evaluate/results.json of a run")
    return {k: of["harm_rate"] for k, of in last["heldout"]["sampled"]["by_category"].items() if "harm_rate" in of}


def summary(prompt_records: list[dict], responses: list[str]) -> dict:
    """Metrics of one model on one set: see miniworld.oracle.summary."""
    from cai_jax.miniworld import oracle

    return oracle.summary(miniworld(), prompt_records, responses)


def verdict(record: dict, response: str):
    """The oracle's verdict on one response."""
    from cai_jax.miniworld import oracle

    return oracle.judge_response(miniworld(), record, response)


def diversity(revised: list[dict]) -> float:
    """Different beginnings of four words among the last revisions, as a share of them."""
    said = [tuple(r["rounds"][-1]["revision"].split()[:4]) for r in revised if r["rounds"]]
    return len(set(said)) / max(1, len(said))


def better(record: dict) -> float | None:
    """Which of two responses is less harmful, and of those better (see miniworld.oracle.ORDERS): 1.0 for a, 0.0 for b, None for
    neither."""
    from cai_jax.miniworld import oracle

    return oracle.better(miniworld(), record, record["response_a"], record["response_b"])


def annotated(record: dict, seed: tuple[int, ...], error: float, told: bool = True) -> float:
    """A simulated person's choice between two responses: 1.0 for a, 0.0 for b (see miniworld.oracle.annotate)."""
    from cai_jax.miniworld import oracle

    rng = np.random.default_rng(list(seed))
    a, b, scale = record["response_a"], record["response_b"], "harmlessness" if told else "harm"
    return oracle.annotate(miniworld(), rng, record, a, b, error, scale)


def met(rows: list[dict]) -> dict[str, list[tuple[dict, dict]]]:
    """By scale of Elo: the answers of every two models to the same prompts, harmful ones for harmlessness and benign ones for
    helpfulness. rows: (id, kind, model) at least. {} for a single model, or few prompts."""
    out, models = {}, list(dict.fromkeys(r["model"] for r in rows))
    for scale, kind in SCALES.items():
        said: dict[str, dict] = {}
        for r in rows:
            if r["kind"] == kind:
                said.setdefault(r["id"], {})[r["model"]] = r
        if len(models) > 1 and len(said) >= FEWEST:
            out[scale] = [(of[a], of[b]) for of in said.values() for a, b in itertools.combinations(models, 2)]
    return out


def by_oracle(a: dict, b: dict, scale: str) -> float:
    return elo.verdict(a["verdict"], b["verdict"], scale)


def elos(rows: list[dict], score: Callable[[dict, dict, str], float] = by_oracle, at_equal_length: bool = False) -> dict:
    """Elo by scale, see evals.elo.report, of the models in `rows` (see `met`; response for lengths), the first of which has 0.
    score: of two rows on a scale, 1.0 where the first wins, 0.0 or 0.5."""

    def match(a: dict, b: dict, scale: str) -> elo.Match:
        lengths = [len(x["response"]) for x in (a, b) if at_equal_length]
        return elo.Match(a["model"], b["model"], score(a, b, scale), a["id"], *lengths)

    how = {"anchor": rows[0]["model"], "length_control": at_equal_length, "prior": PRIOR} if rows else {}
    return {scale: elo.report([match(a, b, scale) for a, b in pairs], **how) for scale, pairs in met(rows).items()}


def learnt_from(cfg: Config) -> dict[str, str]:
    """The files whose prompts models of the run may know, for a stage's inputs."""
    return {n: getattr(cfg.data, n) for n in READERS} | {f"{stage}.few_shot": getattr(cfg, stage).few_shot for stage in SHOWN}


def unseen(cfg: Config, todo: list[dict]) -> tuple[list[dict], dict]:
    """The held-out prompts that stand in no file of the pipeline, nor begin a conversation there. -> (records, counts). Raises
    InputError when none is left."""
    drops, seen = records.Drops(), {}
    for name, (_, load) in READERS.items():
        rows = load(getattr(cfg.data, name), getattr(cfg.data, f"max_{name}"), f"--config.data.{name}", records.Drops())
        begun = [r["messages"][: n + 1] for r in rows for n, m in enumerate(r["messages"]) if m["role"] == prompts.USER]
        seen |= dict.fromkeys(map(said, begun), f"in --config.data.{name}")
    for stage in SHOWN:
        if path := getattr(cfg, stage).few_shot:
            shown = load_few_shot(path)
            asked = [[{"role": prompts.USER, "content": block.user}] for block in (*shown.critiques, *shown.comparisons)]
            seen |= dict.fromkeys(map(said, asked), f"in --config.{stage}.few_shot")
    kept = [r for r in todo if drops.keep(said(r["messages"]) not in seen, seen.get(said(r["messages"])))]
    if not kept:
        raise InputError(
            f"--config.evaluate.heldout={cfg.evaluate.heldout}: the models were trained on all of it: {drops.reasons}"
        )
    return kept, drops.counts(len(todo), len(kept))


def evenly(items: list, limit: int) -> list:
    """`limit` of the items at even distances; all of them when limit is 0 or larger than their number."""
    return items if not limit or limit >= len(items) else [items[i * len(items) // limit] for i in range(limit)]


class Answer(NamedTuple):
    """A response to a prompt record."""

    text: str
    finished: bool = True  # not cut off


def answers(
    cfg: Config, lm: LM, templates, todo: list[dict], sampling, journal: records.Journal, mesh, tag: str, stoppable=True
) -> list[Answer]:
    """The model's response to every prompt record. `stoppable`: see generate.sample_texts."""
    asked = [Request(f"{p['id']}/{tag}", prompts.dialogue(p["messages"], templates)) for p in todo]
    said = sample_texts(lm, asked, sampling, cfg.seed, journal, mesh, templates, tag, stoppable)
    return [Answer(s["text"], s["finished"]) for s in said]


def as_rows(lm: LM, templates, todo: list[dict], responses: list[Answer]) -> list[tuple[list[int], int]]:
    """Prompts with their responses, and EOS behind those that were not cut off, in the model's tokens. -> (tokens, how many of
    them are the prompt) of each."""
    rows = []
    for p, answer in zip(todo, responses, strict=True):
        prompt, end = lm.tok.prompt(prompts.dialogue(p["messages"], templates)), [lm.tok.eos_id] * answer.finished
        rows.append((prompt + lm.tok.encode(prompts.completion(answer.text, templates)) + end, len(prompt)))
    return rows


def rated(lm: LM, templates, todo: list[dict], responses: list[Answer], batch_size: int, mesh, stoppable=True) -> np.ndarray:
    """What a model that ends in a number (stages.SCORERS) says of each response, by the last tokens that its context holds.
    -> float64 [N]. `stoppable`: as `answers`."""
    rows = [ids[-lm.cfg.max_length :] for ids, _ in as_rows(lm, templates, todo, responses)]
    return row_scores(lm, rows, batch_size, mesh, stoppable)


def untouched(c: Sampling) -> bool:
    """Whether what is sampled has the model's own probabilities."""
    return (c.temperature, c.top_p, c.top_k, c.min_p) == (1.0, 1.0, 0, 0.0)


def likelihood(
    lm: LM, templates, todo: list[dict], responses: list[Answer], batch_size: int, mesh, stoppable=True
) -> np.ndarray:
    """Log-prob of each response, of EOS too where it came. -> float64 [N], nats; NaN where the context does not hold it."""
    rows, out = as_rows(lm, templates, todo, responses), np.full(len(responses), np.nan)
    held = [n for n, (ids, _) in enumerate(rows) if len(ids) <= lm.cfg.max_length]
    out[held] = row_logprobs(lm, [rows[n] for n in held], batch_size, mesh, stoppable)
    return out
