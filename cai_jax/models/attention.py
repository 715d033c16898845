"""Who sees whom, where they stand, and the reference attention."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (2104.09864). `factor` divides every rate, or with `bands` only the slow ones (Llama 3.1)."""

    theta: float = 10_000.0
    fraction: float = 1.0  # of a head that turns; the rest passes
    factor: float = 1.0
    bands: tuple[float, float, float] | None = None  # low and high frequency factor, original context in tokens


def causal_mask(segments_BT):
    """Which tokens attend to which in packed rows: own segment, not later; segment 0 is padding. -> bool [B, T, T]."""
    T = segments_BT.shape[1]
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, :, None] > 0)
    return same_BTS & jnp.tril(jnp.ones((1, T, T), bool))


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


def attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale: float = 0.0, cap: float = 0.0):
    """Reference attention; softmax in float32. Heads N share keys and values in groups of N / K."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * (scale or H**-0.5)
    scores = jnp.where(mask_BTS[:, None, None], soft_cap(scores, cap), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(B, T, N, H)
