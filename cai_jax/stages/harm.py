"""The regressor of harm (CAI 4.5): a language model with a scalar head read at EOS, fitted by least squares to the harm, from 0
to 4, that people saw in whole conversations (2209.07858). What it is worth is measured on prompts that are held out, beside the
best constant.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import checkpoints, optim, records
from cai_jax.config import Config
from cai_jax.constitution.distance import FEWEST
from cai_jax.data import load_attempts, longest_pair, said
from cai_jax.errors import InputError
from cai_jax.evaluation import Answer, as_rows
from cai_jax.intervals import bootstrap
from cai_jax.losses import squared_error
from cai_jax.models import LM, lora
from cai_jax.models.heads import init_head
from cai_jax.pairs import Pairs, batches, held_out
from cai_jax.progress import cry, say
from cai_jax.score import all_pair_scores, pair_scores
from cai_jax.sharding import batch_ways, put
from cai_jax.stages import inputs_of, load_constitution, load_start, stream
from cai_jax.train import fit, init_state, make_train_step
from cai_jax.trees import plant
from cai_jax.workdir import begin, finish, write_json

STAGE = "harm"
GRADES = 5


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes harm/checkpoints, harm/model, harm/metrics.jsonl and harm/evaluation.json."""
    folder, c, templates, drops = workdir / STAGE, cfg.harm, load_constitution(cfg, STAGE).templates, records.Drops()
    inputs = inputs_of(cfg, workdir, STAGE, {"attempts": c.data}, models=(STAGE,))
    if not begin(STAGE, workdir, inputs | {"data": {"max_pair": cfg.data.max_pair}, "templates": dict(templates)}):
        return False
    found = load_attempts(c.data, c.max_attempts, "--config.harm.data", drops)
    given, start = len(found) + drops.reasons.total(), load_start(cfg, workdir, mesh, STAGE)
    talks = encode(start.lm, templates, found, longest_pair(cfg.data, start.lm.cfg.max_length), drops)
    held = held_out(talks.prompt, c.heldout_share, cfg.seed)
    if held.sum() < FEWEST:
        raise InputError(
            f"{c.data}: {held.sum()} of {len(held)} conversations are held out, too few for an interval; wanted {FEWEST}: give "
            f"more records (--config.harm.data), or a larger --config.harm.heldout_share; left out: {dict(drops.reasons)}"
        )
    parts = batch_ways(mesh) * c.microbatches
    batch_at, steps = batches(talks.where(~held), c.batch_size, c.epochs, cfg.seed, STAGE, parts)
    net, key, constant = start.net, stream(cfg, STAGE), float(talks.columns["rating"][~held].mean())
    # It starts as the constant that it must beat.
    head = init_head(jax.random.fold_in(key, 1), start.lm.cfg.width, 0.0) | {"bias": jnp.full(1, constant, jnp.float32)}
    params, frozen = {"trunk": start.trained} | put({"head": head}, mesh), {"trunk": start.frozen}
    tx = optim.make(c.optimizer, steps)
    step, state = make_train_step(harm_loss(net), tx, mesh, c.microbatches), init_state(params, tx, mesh)
    state = fit(STAGE, folder, state, frozen, step, batch_at, steps, key, c.checkpoint_every, mesh)
    checkpoints.save_model(folder, state.params)
    unseen = talks.where(held)
    predicted = all_pair_scores(net, lora.join(frozen, state.params), unseen, c.batch_size, mesh)[:, 0]
    report = evaluate(predicted, unseen.columns["rating"].astype(float), constant)
    write_json(folder / "evaluation.json", report)
    tell(report)
    counts = drops.counts(given, len(held)) | {"heldout": int(held.sum()), "steps": steps}
    finish(STAGE, workdir, counts, model=checkpoints.fingerprint(state.params))
    return True


def encode(lm: LM, templates, attempts: list[dict], max_length: int, drops: records.Drops) -> Pairs:
    """Rated conversations of at most `max_length` tokens, each a tree of one text: side a of what stands for a comparison."""
    rows = as_rows(lm, templates, attempts, [Answer(r["response"]) for r in attempts])
    both = [(*row, r) for row, r in zip(rows, attempts, strict=True)]
    kept = [x for x in both if drops.keep(len(x[0]) <= max_length, f"longer than {max_length} tokens")]
    number = {}
    return Pairs(
        trees=[plant([ids], max_length)[0] for ids, _, _ in kept],
        starts=np.array([start for _, start, _ in kept], np.int32),
        columns={"rating": np.array([r["rating"] for *_, r in kept], np.float32)},
        prompt=np.array([number.setdefault(said(r["messages"]), len(number)) for *_, r in kept], np.int32),
        own=np.zeros(len(kept), bool),
    )


def harm_loss(net):
    """loss_fn of the regressor on a batch of `encode` (see pairs.batches)."""

    def loss_fn(params, batch, key):
        ratings_RM = pair_scores(net, params, batch)[..., 0]
        return squared_error(ratings_RM, batch["rating"], batch["row_mask"]), {"weight": jnp.sum(batch["row_mask"])}

    return loss_fn


def evaluate(predicted_N: np.ndarray, rating_N: np.ndarray, constant: float) -> dict:
    """Squared errors of the regressor and of the mean of the ratings that it learnt from, how much less the first is, with its
    interval over conversations, Spearman's rank correlation (None if either does not vary), and the mean rating of those that
    are predicted to be nearest to each grade."""
    mine, other = (predicted_N - rating_N) ** 2, (constant - rating_N) ** 2
    interval, near = bootstrap(np.mean, other - mine), np.clip(np.rint(predicted_N), 0, GRADES - 1)
    both = [(grade, predicted_N[near == grade], rating_N[near == grade]) for grade in range(GRADES)]
    return {
        "n": len(rating_N),
        "mse": float(mine.mean()),
        "constant": constant,
        "constant_mse": float(other.mean()),
        "better": float((other - mine).mean()),
        "interval": interval,
        "beats_constant": interval[0] > 0,
        "rank_correlation": rank_correlation(predicted_N, rating_N),
        "calibration": [
            {"grade": g, "predicted": float(p.mean()), "rating": float(r.mean()), "n": len(p)} for g, p, r in both if len(p)
        ],
    }


def rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Spearman's, equal values with the mean of their ranks; None if either does not vary."""
    ranks = []
    for x_N in (a_N, b_N):
        _, at, count = np.unique(x_N, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count + 1) / 2)[at])
    return float(np.corrcoef(ranks)[0, 1]) if all(np.ptp(r) for r in ranks) else None


def tell(report: dict) -> None:
    """One line, and another where the regressor is worth nothing."""
    r, (low, high) = report, report["interval"]
    ranks = "none" if r["rank_correlation"] is None else f"{r['rank_correlation']:.2f}"
    say(
        f"{STAGE}: on {r['n']} held-out conversations a squared error of {r['mse']:.3f}, {r['constant_mse']:.3f} of the "
        f"constant {r['constant']:.2f}: {r['better']:.3f} less ({low:.3f} to {high:.3f}); rank correlation {ranks}"
    )
    if not r["beats_constant"]:
        cry(f"{STAGE}: the regressor is not better than a constant, beyond its interval; its ratings say nothing")
