"""The choice of the next token, and the distribution it was chosen from.

One function shapes the logits for the sampler and for the scorer, so a log-prob always belongs to the distribution that was
sampled (LESSONS of others: a forgotten temperature makes the PPO ratio wrong). Nothing is sorted: on a CPU, sorting 16 x 32,000
takes longer than a small model's whole decoding step."""

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


def shape_logits(logits, temperature, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0):
    """Log-probs [..., V] (float32) of the distribution sampled from; tokens that a filter leaves out get -inf.

    temperature: > 0, a scalar or one for each row, [..., 1]. The filters are static and cost nothing when off. They act in the
    order of transformers (5.23, `_get_logits_processor`), each on the renormalised distribution that the one before it left:
      top_k: the k most likely tokens (0: off)
      top_p: the fewest most likely tokens that hold a share top_p of the probability, 0 < top_p <= 1 (1: off)
      min_p: the tokens at least min_p times as likely as the most likely one, 0 <= min_p <= 1 (0: off)
    Tokens as likely, in float32, as the last one to stay all stay, so what is left never depends on the order of ids. A sort
    may cut through such a tie: transformers' top_p does, its top_k does not. With a filter on, tokens whose probability is 0
    in float32 (e^-87 of the most likely one's) are out as well.
    """
    logits = logits.astype(jnp.float32) / temperature
    if top_k == 0 and top_p >= 1 and min_p == 0:
        return jax.nn.log_softmax(logits, axis=-1)
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(below)  # not normalised: the most likely token has exactly 1
    if 0 < top_k < logits.shape[-1]:
        weight = _at_least(weight, threshold(weight, jnp.ones_like(weight), top_k))
    if top_p < 1:
        weight = _at_least(weight, threshold(weight, weight, top_p * jnp.sum(weight, axis=-1, keepdims=True)))
    if min_p > 0:
        weight = _at_least(weight, min_p)
    return jnp.where(weight > 0, below - jnp.log(jnp.sum(weight, axis=-1, keepdims=True)), -jnp.inf)


def _at_least(weight, least):
    return jnp.where(weight >= least, weight, 0.0)


def threshold(weight, amount, wanted):
    """The largest t [..., 1] in [0, 1] such that the tokens of weight >= t hold `wanted` of `amount`; 0 if there is none.

    weight: float32 [..., V] in [0, 1]. amount: float32 [..., V], >= 0. wanted: a scalar or [..., 1].
    Floats >= 0 are in the order of their bits, so 30 passes that settle one bit each find t to its last bit. What rounds is the
    sum of each pass: counts are exact, a mass is off by some 1e-7 of the whole, and by up to 2e-5, less than a token's, where
    tens of thousands of tokens are nearly equal. Several thresholds a pass, to need fewer, are slower on a CPU.
    """

    def settle(t, bit):
        held = jnp.sum(jnp.where(weight >= _as_float(t | bit), amount, 0.0), axis=-1, keepdims=True)
        return jnp.where(held >= wanted, t | bit, t), None

    bits = jnp.int32(1) << jnp.arange(29, -1, -1, dtype=jnp.int32)  # 30 of them reach up to 2
    t, _ = jax.lax.scan(settle, jnp.zeros_like(weight[..., :1], jnp.int32), bits)
    return jnp.minimum(_as_float(t), 1.0)


def _as_float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def choose(logits_BV, keys_B, step, temperature_B, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0):
    """One token per row and its log-prob in the distribution it was chosen from. -> (int32 [B], float32 [B]).

    step: int32, one for all rows or [B]; the noise of a row is a function of (its key, its step) alone. temperature_B: float32;
    at 0 a row takes its most likely token (of tied ones the first), with the log-prob it has at temperature 1. The filters are
    those of `shape_logits`.
    """
    greedy_B = temperature_B == 0
    logp_BV = shape_logits(logits_BV, jnp.where(greedy_B, 1.0, temperature_B)[:, None], top_p, top_k, min_p)
    steps_B = jnp.broadcast_to(jnp.asarray(step, jnp.int32), greedy_B.shape)

    def noise(key, step):
        return jax.random.gumbel(jax.random.fold_in(key, step), logp_BV.shape[1:], jnp.float32)

    def sampled_B():
        return _argmax(logp_BV + jnp.where(greedy_B[:, None], 0.0, jax.vmap(noise)(keys_B, steps_B)))

    # The noise is most of the cost of a choice, so a batch without any sampled row does not draw it.
    token_B = jax.lax.cond(jnp.all(greedy_B), lambda: _argmax(logp_BV), sampled_B)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=1)[:, 0]


def _argmax(scores_BV):
    """int32 [B]. On a CPU jnp.argmax, a reduction of pairs, takes eight times as long: XLA does not vectorise it."""
    V = scores_BV.shape[1]
    best_BV = scores_BV == jnp.max(scores_BV, axis=1, keepdims=True)
    return jnp.min(jnp.where(best_BV, jnp.arange(V, dtype=jnp.int32)[None], V - 1), axis=1)
