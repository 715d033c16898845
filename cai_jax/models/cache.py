"""The keys and values of what a row holds already: a part that rows share, and a part of its own."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.sharding import constrain


class Cache(NamedTuple):
    """A row's text is the first `offset` tokens of the prefix and then its own, which stand in its slots from 0 on without a
    gap. What stands behind the filled slots is never seen."""

    layers: Any  # per layer {"k", "v"} [B, K, S, H]: the slots of a head lie side by side, as the decode step reads them
    filled_B: jax.Array  # int32, own slots that hold a token
    offset_B: jax.Array  # int32, tokens of the prefix that the row begins with
    prefix: Any = None  # per layer {"k", "v"} [K, P, H], or None

    def seen(self, at_BT):
        """What tokens at the own slots `at_BT` attend to, and the positions of it: (bool [B, T, P + S], int32 [B, P + S])."""
        S = self.layers[0]["k"].shape[2]
        P = self.prefix[0]["k"].shape[1] if self.prefix else 0
        prefix_1P, own_1S = jnp.arange(P)[None], jnp.arange(S)[None]
        shared_BTP = jnp.broadcast_to((prefix_1P < self.offset_B[:, None])[:, None], (*at_BT.shape, P))
        own_BTS = own_1S[None] <= at_BT[:, :, None]
        keys_BP = jnp.broadcast_to(prefix_1P, (at_BT.shape[0], P))
        keys_BS = jnp.concatenate([keys_BP, self.offset_B[:, None] + own_1S], axis=1)
        return jnp.concatenate([shared_BTP, own_BTS], axis=2), keys_BS


def empty(cfg, rows: int, slots: int, dtype):
    """Layers of a cache that holds nothing. cfg: a TransformerConfig."""
    shape = (rows, cfg.num_kv_heads, slots, cfg.head_dim)
    zeros = constrain(jnp.zeros(shape, dtype), "batch", "model", None, None)
    return tuple({"k": zeros, "v": zeros} for _ in range(cfg.num_layers))


def write(layer, new, filled_B):
    """A layer's keys and values with those of T new tokens [B, K, T, H] in the slots from `filled` on. Where T slots are not
    left, the last T are written: only a row that is done may stand so."""
    put = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
    return {name: put(layer[name], new[name].astype(layer[name].dtype), filled_B) for name in ("k", "v")}
