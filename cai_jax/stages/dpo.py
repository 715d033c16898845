"""Direct preference optimisation (2305.18290) on the same soft labels: an alternative to reward + ppo.

The reference is the supervised model; its log-probs are taken once, before training.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import checkpoints, optim, records
from cai_jax.config import Config
from cai_jax.data import encode_comparisons, epochs, load_human, longest_pair
from cai_jax.losses import dpo_loss, masked_mean
from cai_jax.score import hidden_states, row_batch, target_logprobs
from cai_jax.sharding import put_batch
from cai_jax.stages import inputs_of, load_constitution, load_start, stream
from cai_jax.train import fit, init_state, make_train_step
from cai_jax.workdir import begin, finish

STAGE, NAME = "dpo", "dpo_cai"


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes dpo/checkpoints, dpo/model and dpo/metrics.jsonl."""
    folder, c = workdir / STAGE, cfg.dpo
    inputs = inputs_of(cfg, workdir, STAGE, {"comparisons": cfg.data.comparisons}, ("sft", "preferences"), (NAME,))
    if not begin(STAGE, workdir, inputs):
        return False
    start, templates, drops = load_start(cfg, workdir, mesh, NAME), load_constitution(cfg, NAME).templates, records.Drops()
    ai = records.read(workdir / "preferences" / "comparisons.jsonl", ("messages", "response_a", "response_b", "p_a"))
    human, given = load_human(cfg.data, len(ai), drops)
    lm, net = start.lm, start.net
    arrays = encode_comparisons(lm.tok, templates, ai + human, longest_pair(cfg.data, lm.cfg.max_length), drops)
    del arrays["prompt"]
    arrays["reference"] = reference_logprobs(lm.net(), lm.params, arrays, c.batch_size, mesh)
    batch_at, steps = epochs(arrays, c.batch_size, c.epochs, cfg.seed, STAGE)
    tx = optim.make(c.optimizer, steps)
    step = make_train_step(preference_loss(net, c.beta), tx, mesh, c.microbatches)
    state, key = init_state(start.trained, tx, mesh), stream(cfg, STAGE)
    state = fit(STAGE, folder, state, start.frozen, step, batch_at, steps, key, c.checkpoint_every, mesh)
    checkpoints.save_model(folder, state.params)
    counts = drops.counts(len(ai) + given, len(arrays["p_a"])) | {"steps": steps}
    finish(STAGE, workdir, {"model": checkpoints.fingerprint(state.params)}, counts)
    return True


def response_logprobs(net, params, batch):
    """Summed log-prob of each response, EOS included. -> float32 [B, 2]."""
    B, _, T = batch["tokens"].shape
    tokens, lengths = batch["tokens"].reshape(2 * B, T), batch["lengths"].reshape(2 * B)
    hidden = hidden_states(net, params, row_batch(tokens, lengths))
    logp_BT, _ = target_logprobs(net, params, hidden[:, :-1], tokens[:, 1:])
    at = jnp.arange(1, T)[None]
    inside = (at >= jnp.repeat(batch["starts"], 2)[:, None]) & (at < lengths[:, None])
    return jnp.sum(jnp.where(inside, logp_BT, 0.0), axis=-1).reshape(B, 2)


def reference_logprobs(net, params, arrays, batch_size: int, mesh) -> np.ndarray:
    batch_at, steps = epochs(arrays | {"index": np.arange(len(arrays["p_a"]))}, batch_size, 1, 0, "reference")
    out = np.zeros((len(arrays["p_a"]), 2), np.float32)
    score = jax.jit(partial(response_logprobs, net))
    for t in range(steps):
        batch = batch_at(t)
        index, real = batch.pop("index"), batch.pop("row_mask") > 0
        out[index[real]] = np.asarray(score(params, put_batch(batch, mesh)))[real]
    return out


def preference_loss(net, beta: float):
    def loss_fn(params, batch, key):
        logp, ref, mask = response_logprobs(net, params, batch), batch["reference"], batch["row_mask"]
        margin = beta * ((logp - ref)[:, 0] - (logp - ref)[:, 1])
        right = ((margin > 0) == (batch["p_a"] > 0.5)).astype(margin.dtype)
        loss = dpo_loss(logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], batch["p_a"], mask, beta)
        kl = masked_mean(jnp.mean(logp - ref, axis=-1), mask)
        accuracy = masked_mean(right, jnp.where(batch["p_a"] != 0.5, mask, 0.0))
        return loss, {"accuracy": accuracy, "log_ratio": kl, "weight": jnp.sum(mask)}

    return loss_fn
