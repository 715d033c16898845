"""What fine-tuning on ordinary requests leaves of an aligned model (Qi et al. 2310.03693), and how few steps bring it back.

A model of the run goes on training on answers that people preferred, none of them to a harmful request, and is judged after
some numbers of steps; then on the run's own data, and is judged again. Writes erosion/results.json and
erosion/transcripts.jsonl, and the metrics of the two phases.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from cai_jax import checkpoints, optim, records
from cai_jax.config import Config
from cai_jax.data import (
    Taught,
    compared,
    epochs,
    helped,
    load_comparisons,
    pack_pairs,
    preferred,
    revised,
    said,
    whole,
)
from cai_jax.evaluation import answers, evenly, judged, known, learnt_from, summary, unseen, verdict
from cai_jax.models.transformer import cast_matrices
from cai_jax.progress import table
from cai_jax.sections import as_dict
from cai_jax.slots import ready
from cai_jax.stages import STAGE_OF, Start, inputs_of, load_constitution, load_whole, start_of, stream
from cai_jax.train import fit, init_state, language_model_loss, make_train_step
from cai_jax.workdir import begin, finish, write_json

STAGE = "erosion"
SHOWN = ("harm_rate", "harm_score", "explained", "evasive", "helpfulness", "over_refusal", "coherent")


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c = workdir / STAGE, cfg.erosion
    labelled = (compared(cfg.stages),) if c.recover == "preferred" else ()
    after = (*(("critique", *labelled) if c.recovery else ()), *filter(None, (STAGE_OF[c.model],)))
    files = learnt_from(cfg) | {"ordinary": c.data, "heldout": cfg.evaluate.heldout}
    inputs = inputs_of(cfg, workdir, STAGE, files, after, (c.model,))
    inputs |= {"trained": cfg.model.trained_dtype, "revisions": cfg.sft.revisions}
    inputs["judged"] = {"limit": cfg.evaluate.limit, "sampling": as_dict(cfg.evaluate.sampling)}
    if not begin(STAGE, workdir, inputs | {"constitution": load_constitution(cfg).fingerprint}):
        return False
    todo, counted = unseen(cfg, judged(cfg.evaluate.heldout, "--config.evaluate.heldout"))
    todo = evenly(todo, cfg.evaluate.limit)
    start, templates = load(cfg, workdir, mesh), load_constitution(cfg, c.model).templates
    steps = {"eroded": c.after, "recovered": c.recovery}
    batches, counts = {}, {"heldout": counted}
    for phase in filter(steps.get, steps):
        drops = records.Drops()
        texts, given = ordinary(cfg, todo, drops) if phase == "eroded" else own(cfg, workdir, drops)
        rows, kept = pack_pairs(whole(texts, drops), start.lm.tok, templates, c.length, drops)
        counts[phase] = drops.counts(given, kept)
        batches[phase], counts[phase]["steps of a pass"] = epochs(rows, c.rows, 1, cfg.seed, f"{STAGE}/{phase}")
    journal, points, transcripts = records.Journal(folder / "journal.jsonl"), [], []

    def judge(phase: str, step: int, params) -> None:
        lm = ready(start.lm._replace(params=params), cfg.evaluate.sampling.gather)
        said = answers(cfg, lm, templates, todo, cfg.evaluate.sampling, journal, mesh, f"{phase}-{step}")
        texts = [answer.text for answer in said]
        of = {"phase": phase, "steps": step}
        points.append(of | summary(todo, texts))
        both = zip(todo, texts, strict=True)
        transcripts.extend(p | of | {"response": x, "verdict": dataclasses.asdict(verdict(p, x))} for p, x in both)

    judge("start", 0, start.trained)
    train(cfg, folder, mesh, start, batches, steps, judge)
    write_json(folder / "results.json", {"model": c.model, "points": points})
    records.write(folder / "transcripts.jsonl", transcripts)
    for phase in batches:  # the answers are in the journal: after a kill in here, training alone is done again
        checkpoints.remove(folder / phase / "checkpoints")
    finish(STAGE, workdir, counts, ("results.json",))
    journal.remove()
    rows = [[p["phase"], str(p["steps"]), *("–" if p[m] is None else f"{p[m]:.3f}" for m in SHOWN)] for p in points]
    table(f"{c.model}, fine-tuned on ordinary requests, then on the run's own data", ["", "steps", *SHOWN], rows)
    return True


def load(cfg: Config, workdir: Path, mesh) -> Start:
    """The model, of whose weights all are trained: what an adapter learnt is merged."""
    lm = load_whole(cfg, workdir, mesh, cfg.erosion.model)
    lm = lm._replace(params=cast_matrices(lm.params, jnp.dtype(cfg.model.trained_dtype)))
    return start_of(cfg, lm, STAGE, mesh)


def ordinary(cfg: Config, held: list[dict], drops: records.Drops) -> tuple[list[Taught], int]:
    """The better responses of comparisons that are about no harm. -> (texts, how many comparisons there were). Where an oracle
    can tell, those that do not help are left out: they would teach to refuse, and hide what is to be measured."""
    found = load_comparisons(cfg.erosion.data, 0, "--config.erosion.data", drops)
    given, asked = len(found) + drops.reasons.total(), {said(p["messages"]) for p in held}
    out = []
    for r in found:
        if drops.keep(r.get("kind") != "harmful", "a harmful request") and drops.keep(
            said(r["messages"]) not in asked, "a held-out prompt"
        ):
            best = preferred([r], 0.0, drops)
            out += [t for t in best if drops.keep(not known(r) or verdict(r, t.text).helpful == 1, "no help")]
    return out, given


def own(cfg: Config, workdir: Path, drops: records.Drops) -> tuple[list[Taught], int]:
    """The run's own data. -> (texts, how many there were)."""
    critique, c = workdir / "critique", cfg.erosion
    texts = helped(critique)
    if c.recover == "revisions":
        texts += revised(critique, cfg.sft.revisions)
        return texts, len(texts)
    keys = ("messages", "response_a", "response_b", "p_a")
    found = records.read(workdir / compared(cfg.stages) / "comparisons.jsonl", keys)
    return texts + preferred(found, c.decided, drops), len(texts) + len(found)


def train(cfg: Config, folder: Path, mesh, start: Start, batches: dict, steps: dict[str, tuple[int, ...]], judge) -> None:
    """Trains each phase of `batches` up to the last of its steps, and calls judge(phase, step, parameters) after each of them.

    A phase has one folder of checkpoints. After a restart the newest may be later than a step to be judged; then all answers
    of that step are in the journal, and the model is asked nothing.
    """
    c, params = cfg.erosion, start.trained
    tx = optim.make(c.optimizer, max(n for of in steps.values() for n in of))
    step = make_train_step(language_model_loss(start.net), tx, mesh)
    for phase, batch_at in batches.items():
        state, key = init_state(params, tx, mesh), stream(cfg, f"{STAGE}/{phase}")
        for n in steps[phase]:
            state = fit(
                f"{STAGE}: {phase}", folder / phase, state, start.frozen, step, batch_at, n, key, c.checkpoint_every, mesh
            )
            judge(phase, n, state.params)
        params = state.params
