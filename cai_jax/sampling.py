"""The choice of the next token, and the distribution it was chosen from.

One function shapes the logits for the sampler and for the scorer, so a log-prob always belongs to the distribution that was
sampled (LESSONS of others: a forgotten temperature makes the PPO ratio wrong)."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def record_key_data(*address: str | int) -> np.ndarray:
    """uint32 [2] from (stage, record id, turn): what makes a record's noise its own, whatever batch it is in."""
    text = "\x1f".join(map(str, address))
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)


def record_keys(seed_key, addresses_B2):
    """Per-record keys: the run's key with each record's address folded in. uint32 [B, 2] -> keys [B]."""
    return jax.vmap(lambda a: jax.random.fold_in(jax.random.fold_in(seed_key, a[0]), a[1]))(addresses_B2)


def shape_logits(logits, temperature, top_p: float = 1.0):
    """Log-probs [..., V] (float32) of the distribution sampled from; temperature > 0. Tokens outside the nucleus get -inf."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    if top_p >= 1.0:
        return logp
    inside = logp >= nucleus_threshold(logp, top_p)
    return jax.nn.log_softmax(jnp.where(inside, logp, -jnp.inf), axis=-1)


def nucleus_threshold(logp, top_p: float, iterations: int = 40):
    """The largest log-prob t [..., 1] with P(logp >= t) >= top_p, by bisection: a sort halves decoding speed on CPU.

    40 halvings of [-87, 0] resolve 1e-10 nats, far below float32, so ties are the only freedom: all tied tokens stay.
    """
    low = jnp.full_like(logp[..., :1], -87.0)  # keeps everything a float32 probability can hold
    high = jnp.zeros_like(low)

    def halve(bounds, _):
        low, high = bounds
        mid = (low + high) / 2
        mass = jnp.sum(jnp.where(logp >= mid, jnp.exp(logp), 0.0), axis=-1, keepdims=True)
        enough = mass >= top_p
        return (jnp.where(enough, mid, low), jnp.where(enough, high, mid)), None

    (low, _), _ = jax.lax.scan(halve, (low, high), length=iterations)
    return low


def choose(logits_BV, keys_B, step, temperature, top_p: float, greedy: bool):
    """One token per row and its log-prob. -> (int32 [B], float32 [B]).

    The noise of a row is a function of (its key, step) alone. Greedy: the most likely token; its log-prob is still that of
    the distribution at `temperature`.
    """
    logp_BV = shape_logits(logits_BV, temperature, top_p)
    scores_BV = logp_BV
    if not greedy:
        noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, step), logp_BV.shape[1:], jnp.float32))
        scores_BV = logp_BV + noise(keys_B)
    token_B = jnp.argmax(scores_BV, axis=-1)
    return token_B.astype(jnp.int32), jnp.take_along_axis(logp_BV, token_B[:, None], axis=1)[:, 0]
