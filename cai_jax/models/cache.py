"""The keys and values of what a row holds already: a part that rows share, and a part of its own."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.sharding import constrain


class Cache(NamedTuple):
    """A row's text is the first `offset` tokens of the prefix and then its own, which stand in its slots from 0 on without a
    gap. What stands behind the filled slots is never seen."""

    layers: Any  # per layer {"k", "v"} [B, K, S, H]: the slots of a head lie side by side, as the decode step reads them; in
    # int8 with {"k_scale", "v_scale"} [B, K, S]
    filled_B: jax.Array  # int32, own slots that hold a token
    offset_B: jax.Array  # int32, tokens of the prefix that the row begins with
    prefix: Any = None  # the layers of one row, [K, P, H], or None

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
    """Layers of a cache that holds nothing. cfg: a TransformerConfig. dtype: int8 keeps vectors as `quantised` says."""
    shape = (rows, cfg.num_kv_heads, slots, cfg.head_dim)
    layer = dict.fromkeys(("k", "v"), constrain(jnp.zeros(shape, dtype), "batch", "model", None, None))
    if jnp.dtype(dtype) == jnp.int8:
        layer |= dict.fromkeys(("k_scale", "v_scale"), constrain(jnp.zeros(shape[:3], jnp.float32), "batch", "model", None))
    return (layer,) * cfg.num_layers


def quantised(new):
    """Keys and values in int8, each vector [H] with a scale of its own in float32: value = number x scale, and the largest
    number is 127. So no value is off by more than 1/254 of the vector's largest."""
    top = {name: jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32) for name, x in new.items()}
    scale = {name: jnp.maximum(x, 1e-30) / 127 for name, x in top.items()}
    numbers = {name: jnp.round(x.astype(jnp.float32) / scale[name][..., None]).astype(jnp.int8) for name, x in new.items()}
    return numbers | {f"{name}_scale": x for name, x in scale.items()}


def write(layer, new, filled_B):
    """A layer's keys and values with those of T new tokens [B, K, T, H] in the slots from `filled` on. Where T slots are not
    left, the last T are written: only a row that is done may stand so."""
    new = quantised(new) if "k_scale" in layer else new
    put = _one_slot if new["k"].shape[2] == 1 else jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
    return {name: put(old, new[name].astype(old.dtype), filled_B) for name, old in layer.items()}


def _one_slot(old_BKS, new_BK1, filled_B):
    """The decode step's write, in place and in one operation. On TPU, XLA makes of a slice for each row a loop over the rows,
    as dear as reading 2,000 slots, and of one index for all heads of a row another layout, for which it copies the cache."""
    B, K, S = old_BKS.shape[:3]
    at_BK = jnp.broadcast_to(jnp.minimum(filled_B, S - 1)[:, None], (B, K))
    return jax.vmap(jax.vmap(lambda old_S, new_1, at: old_S.at[at].set(new_1[0])))(old_BKS, new_BK1, at_BK)
