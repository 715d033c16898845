"""The reward model (HH 2204.05862, CAI 4.1): a language model with a scalar head read at EOS, on soft labels.

AI harmlessness comparisons and human helpfulness comparisons are mixed. A share is held out for accuracy and calibration, and
the scores of the policy's responses give the mean and deviation that PPO centres and scales by. Where the run has a referee, a
second one, each is trained on the comparisons of one half of the prompts (see stages/referee.py).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import checkpoints, optim, records
from cai_jax.config import Config
from cai_jax.data import compared, load_human, longest_pair
from cai_jax.evals import trust
from cai_jax.losses import masked_mean, soft_preference_loss
from cai_jax.models import lora
from cai_jax.models.heads import init_head
from cai_jax.pairs import Pairs, batches, encode_comparisons, held_out
from cai_jax.score import all_pair_scores, pair_scores
from cai_jax.sharding import batch_ways, put
from cai_jax.stages import inputs_of, load_constitution, load_start, origin, stream
from cai_jax.train import fit, init_state, make_train_step
from cai_jax.workdir import begin, finish, write_json

STAGE = "reward"
HALVES = (STAGE, "referee")


def run(cfg: Config, workdir: Path, mesh, stage: str = STAGE) -> bool:
    """Writes checkpoints, model, metrics.jsonl and evaluation.json in reward/, or the folder of another `stage` of HALVES."""
    folder, c = workdir / stage, cfg.reward
    after = (compared(cfg.stages),) + (("sft",) if origin(cfg, stage) == "sl_cai" else ())
    inputs = inputs_of(cfg, workdir, STAGE, {"comparisons": cfg.data.comparisons}, after, (stage,))
    halved = set(HALVES) <= set(cfg.stages)
    if not begin(stage, workdir, inputs | ({"half": HALVES.index(stage)} if halved else {})):
        return False
    start, drops = load_start(cfg, workdir, mesh, stage), records.Drops()
    ai = records.read(workdir / compared(cfg.stages) / "comparisons.jsonl", ("messages", "response_a", "response_b", "p_a"))
    human, given = load_human(cfg.data, len(ai), drops)
    templates, (arch, tok) = load_constitution(cfg, stage).templates, (start.lm.cfg, start.lm.tok)
    pairs = encode_comparisons(tok, templates, ai + human, longest_pair(cfg.data, arch.max_length), drops)
    held = held_out(pairs.prompt, c.heldout_share, cfg.seed)
    learnt = ~held & (half_of(pairs.prompt, cfg.seed) == HALVES.index(stage)) if halved else ~held
    parts = batch_ways(mesh) * c.microbatches
    batch_at, steps = batches(pairs.where(learnt), c.batch_size, c.epochs, cfg.seed, stage, parts)
    net, key = start.net, stream(cfg, stage)
    params = {"trunk": start.trained} | put({"head": init_head(jax.random.fold_in(key, 1), arch.width)}, mesh)
    frozen, tx = {"trunk": start.frozen}, optim.make(c.optimizer, steps)
    step, state = make_train_step(reward_loss(net), tx, mesh, c.microbatches), init_state(params, tx, mesh)
    state = fit(stage, folder, state, frozen, step, batch_at, steps, key, c.checkpoint_every, mesh)
    checkpoints.save_model(folder, state.params)
    report = evaluate(net, lora.join(frozen, state.params), pairs, held, c.batch_size, mesh)
    write_json(folder / "evaluation.json", report)
    by_human, kept = int(pairs.columns["human"].sum()), len(held)
    counts = drops.counts(len(ai) + given, kept) | {"ai": kept - by_human, "human": by_human, "human_share": by_human / kept}
    counts |= {"heldout": int(held.sum()), "steps": steps} | ({"half": int(learnt.sum())} if halved else {})
    finish(stage, workdir, counts, model=checkpoints.fingerprint(state.params), scale=report["scale"])
    return True


def half_of(prompt_N: np.ndarray, seed: int) -> np.ndarray:
    """In which half of the prompts, 0 or 1, each comparison is: prompts are dealt in a random order. -> int [N]."""
    return np.random.default_rng([seed, 8]).permutation(prompt_N.max() + 1)[prompt_N] % 2


def reward_loss(net):
    def loss_fn(params, batch, key):
        scores_RM2 = pair_scores(net, params, batch)
        a, b, mask = scores_RM2[..., 0], scores_RM2[..., 1], batch["row_mask"]
        right = ((a > b) == (batch["p_a"] > 0.5)).astype(a.dtype)
        accuracy = masked_mean(right, jnp.where(batch["p_a"] != 0.5, mask, 0.0))
        return soft_preference_loss(a, b, batch["p_a"], mask), {"accuracy": accuracy, "weight": jnp.sum(mask)}

    return loss_fn


def evaluate(net, params, pairs: Pairs, held, batch_size: int, mesh) -> dict:
    """Held-out accuracy and calibration by who labelled, and the scale of the scores over the policy's responses."""
    scores = all_pair_scores(net, params, pairs, batch_size, mesh)
    p_model = 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    human, p_a = pairs.columns["human"] > 0, pairs.columns["p_a"]
    own = scores[pairs.own]
    report = {"scale": {"mean": float(own.mean()), "std": float(max(own.std(), 1e-6))}}
    for name, rows in (("ai", held & ~human), ("human", held & human)):
        report[name] = agreement(p_model[rows], p_a[rows].astype(float))
    return report


def agreement(p_model: np.ndarray, p_label: np.ndarray) -> dict:
    """Accuracy (same side of 0.5; labels at exactly 0.5 do not count), expected calibration error and its table."""
    decided = p_label != 0.5
    n = len(p_model)
    return {
        "n": n,
        "accuracy": float(np.mean((p_model > 0.5)[decided] == (p_label > 0.5)[decided])) if decided.any() else 0.0,
    } | trust.calibration(p_model, p_label)
