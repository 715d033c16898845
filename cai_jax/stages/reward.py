"""The reward model (HH 2204.05862, CAI 4.1): a language model with a scalar head read at EOS, on soft labels.

AI harmlessness comparisons and human helpfulness comparisons are mixed. A share is held out for accuracy and calibration, and
the scores of the AI comparisons' responses give the mean and deviation that PPO centres and scales by.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import checkpoints, optim, records
from cai_jax.config import Config
from cai_jax.data import load_human, longest_pair
from cai_jax.losses import masked_mean, soft_preference_loss
from cai_jax.models import lora
from cai_jax.models.heads import apply_head, init_head
from cai_jax.pairs import Pairs, batches, encode_comparisons
from cai_jax.score import hidden_states
from cai_jax.sharding import batch_ways, put, put_batch, replicated
from cai_jax.stages import inputs_of, load_constitution, load_start, origin, stream
from cai_jax.train import fit, init_state, make_train_step
from cai_jax.workdir import begin, finish, write_json

STAGE = "reward"
BINS = 10  # of the calibration table


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes reward/checkpoints, reward/model, reward/metrics.jsonl and reward/evaluation.json."""
    folder, c = workdir / STAGE, cfg.reward
    after = ("preferences",) + (("sft",) if origin(cfg, STAGE) == "sl_cai" else ())
    inputs = inputs_of(cfg, workdir, STAGE, {"comparisons": cfg.data.comparisons}, after, (STAGE,))
    if not begin(STAGE, workdir, inputs):
        return False
    start, drops = load_start(cfg, workdir, mesh, STAGE), records.Drops()
    ai = records.read(workdir / "preferences" / "comparisons.jsonl", ("messages", "response_a", "response_b", "p_a"))
    human, given = load_human(cfg.data, len(ai), drops)
    templates, (arch, tok) = load_constitution(cfg, STAGE).templates, (start.lm.cfg, start.lm.tok)
    pairs = encode_comparisons(tok, templates, ai + human, longest_pair(cfg.data, arch.max_length), drops)
    held = held_out(pairs.prompt, c.heldout_share, cfg.seed)
    parts = batch_ways(mesh) * c.microbatches
    batch_at, steps = batches(pairs.where(~held), c.batch_size, c.epochs, cfg.seed, STAGE, parts)
    net, key = start.net, stream(cfg, STAGE)
    params = {"trunk": start.trained} | put({"head": init_head(jax.random.fold_in(key, 1), arch.width)}, mesh)
    frozen, tx = {"trunk": start.frozen}, optim.make(c.optimizer, steps)
    step, state = make_train_step(reward_loss(net), tx, mesh, c.microbatches), init_state(params, tx, mesh)
    state = fit(STAGE, folder, state, frozen, step, batch_at, steps, key, c.checkpoint_every, mesh)
    checkpoints.save_model(folder, state.params)
    report = evaluate(net, lora.join(frozen, state.params), pairs, held, c.batch_size, mesh)
    write_json(folder / "evaluation.json", report)
    by_human, kept = int(pairs.columns["human"].sum()), len(held)
    counts = drops.counts(len(ai) + given, kept) | {"ai": kept - by_human, "human": by_human, "human_share": by_human / kept}
    counts |= {"heldout": int(held.sum()), "steps": steps}
    finish(STAGE, workdir, counts, model=checkpoints.fingerprint(state.params), scale=report["scale"])
    return True


def held_out(prompt_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which comparisons are kept from training: all or none of those on one prompt. -> bool [N]."""
    return (np.random.default_rng([seed, 7]).random(prompt_N.max() + 1) < share)[prompt_N]


def pair_scores(net, params, batch):
    """-> the scores of both responses of every comparison, read at their last tokens, float32 [R, M, 2] (see pairs.batches)."""
    hidden = hidden_states(net, params["trunk"], batch)
    R, M, _ = batch["last"].shape
    last = jnp.take_along_axis(hidden, batch["last"].reshape(R, 2 * M, 1), axis=1)
    return apply_head(params["head"], last).reshape(R, M, 2)


def reward_loss(net):
    def loss_fn(params, batch, key):
        scores_RM2 = pair_scores(net, params, batch)
        a, b, mask = scores_RM2[..., 0], scores_RM2[..., 1], batch["row_mask"]
        right = ((a > b) == (batch["p_a"] > 0.5)).astype(a.dtype)
        accuracy = masked_mean(right, jnp.where(batch["p_a"] != 0.5, mask, 0.0))
        return soft_preference_loss(a, b, batch["p_a"], mask), {"accuracy": accuracy, "weight": jnp.sum(mask)}

    return loss_fn


def evaluate(net, params, pairs: Pairs, held, batch_size: int, mesh) -> dict:
    """Held-out accuracy and calibration by source, and the scale of the scores over the responses of AI comparisons."""
    batch_at, steps = batches(pairs, batch_size, 1, 0, "evaluation", batch_ways(mesh))
    scores = np.zeros((len(held), 2))
    score = jax.jit(partial(pair_scores, net), out_shardings=replicated(mesh))
    for t in range(steps):
        batch = batch_at(t)
        real = batch["row_mask"] > 0
        scores[batch["index"][real]] = np.asarray(score(params, put_batch(batch, mesh)))[real]
    p_model = 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    human, p_a = pairs.columns["human"] > 0, pairs.columns["p_a"]
    report = {"scale": {"mean": float(scores[~human].mean()), "std": float(max(scores[~human].std(), 1e-6))}}
    for name, rows in (("ai", held & ~human), ("human", held & human)):
        report[name] = agreement(p_model[rows], p_a[rows].astype(float))
    return report


def agreement(p_model: np.ndarray, p_label: np.ndarray) -> dict:
    """Accuracy (same side of 0.5; labels at exactly 0.5 do not count), expected calibration error and its table."""
    decided = p_label != 0.5
    bins = np.minimum((p_model * BINS).astype(int), BINS - 1)
    table = [
        {"p_model": float(p_model[bins == i].mean()), "p_label": float(p_label[bins == i].mean()), "n": int((bins == i).sum())}
        for i in range(BINS)
        if (bins == i).any()
    ]
    n = len(p_model)
    return {
        "n": n,
        "accuracy": float(np.mean((p_model > 0.5)[decided] == (p_label > 0.5)[decided])) if decided.any() else 0.0,
        "calibration_error": sum(r["n"] * abs(r["p_model"] - r["p_label"]) for r in table) / n if n else 0.0,
        "calibration": table,
    }
