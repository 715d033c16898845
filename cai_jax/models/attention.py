"""Who sees whom, where they stand, and the reference attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

QUERIES = 256  # that attend together: their scores stay in a cache, and keys behind them all are left out


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (2104.09864). `factor` divides every rate, or with `bands` only the slow ones (Llama 3.1)."""

    theta: float = 10_000.0
    fraction: float = 1.0  # of a head that turns; the rest passes
    factor: float = 1.0
    bands: tuple[float, float, float] | None = None  # low and high frequency factor, original context in tokens


def packed_mask(ends_BT):
    """Which tokens attend to which in a row that holds several texts. -> bool [B, T, S].

    `ends`: for every token the place behind the last one that sees it, 0 for padding. Texts that stand one after another each
    end where the next begins; texts with a common beginning stand as a tree in depth-first order, where a token is seen by
    what descends from it (see data.plant).
    """
    at_T = jnp.arange(ends_BT.shape[1])
    return (at_T[None, None, :] <= at_T[None, :, None]) & (at_T[None, :, None] < ends_BT[:, None, :])


def rope_rates(rope: Rope, head_dim: int):
    """Radians per position of the pairs that turn. -> float32 [pairs]."""
    size = int(head_dim * rope.fraction)  # odd ones too: a last pair then begins at the last of them
    rates = jnp.exp(-jnp.log(jnp.float32(rope.theta)) * jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if not rope.bands:
        return rates if rope.factor == 1 else rates / rope.factor
    low, high, context = rope.bands
    turns = context * rates / (2 * jnp.pi)  # in the original context
    blend = jnp.clip((turns - low) / (high - low), 0.0, 1.0)  # 1: a fast pair, kept; 0: a slow one, divided
    return rates * (blend + (1 - blend) / rope.factor)


def rope_turns(rope: Rope, head_dim: int, positions_BT):
    """Cosines and sines of every pair at every position, [B, T, 1, pairs] each; angles in float32."""
    angle_BTH = positions_BT.astype(jnp.float32)[:, :, None] * rope_rates(rope, head_dim)[None, None, :]
    return jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]


def rotate(x_BTNH, turns):
    """Turns the pairs (j, j + pairs) of each head: the halves convention that checkpoints are stored in."""
    cos, sin = turns
    size = cos.shape[-1]
    a, b = jnp.split(x_BTNH[..., : 2 * size].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
    return turned if 2 * size == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., 2 * size :]], axis=-1)


def soft_cap(x, cap: float):
    """cap * tanh(x / cap), or x where there is none."""
    return cap * jnp.tanh(x / cap) if cap else x


def attend(q_BTNH, parts, mask_BTS, scale: float = 0.0, cap: float = 0.0, causal: bool = False):
    """Reference attention; softmax in float32. Heads N share keys and values in groups of N / K.

    parts: the keys and values seen, {"k", "v"} [B, K, s, H] each, or [K, s, H] where all rows see the same ones: those are
    read once for all rows. S counts the parts' slots s in their order. What is kept in fewer bits (see cache.quantised) is
    widened as it is read: scores are multiplied by the keys' scales, weights by the values'. `causal`: the last part is the
    tokens' own, in full bits, and the mask lets none see one behind it.
    """
    B, T, N, H = q_BTNH.shape
    S, K = mask_BTS.shape[2], parts[0]["k"].shape[-3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    blocks = []
    for i in range(0, T, QUERIES):
        j = min(i + QUERIES, T)
        end = S - (T - j if causal else 0)
        seen = [*parts[:-1], {name: x[..., :j, :] for name, x in parts[-1].items()}] if causal else parts
        blocks.append(_attend(q_BKGTH[:, :, :, i:j], seen, mask_BTS[:, i:j, :end], scale or H**-0.5, cap))
    # Without the barrier XLA's CPU backend multiplies straight into the order of the result, which takes three times as long.
    out_BKGTH = jax.lax.optimization_barrier(jnp.concatenate(blocks, axis=3))
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend(q_BKGTH, parts, mask_BTS, scale: float, cap: float):
    own = ["b" * (part["k"].ndim == 4) for part in parts]  # one letter less where the rows share
    dtype = q_BKGTH.dtype

    def scaled(x_BKGTs, part, name):
        return x_BKGTs * part[name].reshape(-1, part[name].shape[-2], 1, 1, x_BKGTs.shape[-1]) if name in part else x_BKGTs

    def score(part, b):
        k = part["k"].astype(dtype)
        return scaled(jnp.einsum(f"bkgth,{b}ksh->bkgts", q_BKGTH, k, preferred_element_type=jnp.float32), part, "k_scale")

    def read(weights, part, b):
        weights = scaled(weights, part, "v_scale").astype(dtype)
        return jnp.einsum(f"bkgts,{b}ksh->bkgth", weights, part["v"].astype(dtype))

    scores = jnp.concatenate([score(*x) for x in zip(parts, own, strict=True)], axis=-1) * scale
    scores = jnp.where(mask_BTS[:, None, None], soft_cap(scores, cap), -1e30)
    split = jnp.split(jax.nn.softmax(scores, axis=-1), np.cumsum([part["k"].shape[-2] for part in parts])[:-1], axis=-1)
    out = [read(*x) for x in zip(split, parts, own, strict=True)]
    return sum(out[1:], out[0])
