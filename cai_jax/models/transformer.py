"""One decoder: rotary, grouped-query attention, gated MLP, RMS norms, as Llama has it.

One forward serves decoding, scoring and training. It returns the final hidden states; logits are a second method, so that
scoring can take them a few tokens at a time. Parameters are stored with the layers stacked on a leading axis L, which keeps
compile time flat in depth; `unstack` splits them for the decode loop, where slicing a stack at every token is slow on CPU.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from cai_jax.sharding import constrain, path_name


@dataclass(frozen=True)
class TransformerConfig:
    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = True


def causal_mask(segments_BT):
    """Which tokens attend to which in packed rows: own segment, not later; segment 0 is padding. -> bool [B, T, T]."""
    T = segments_BT.shape[1]
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, :, None] > 0)
    return same_BTS & jnp.tril(jnp.ones((1, T, T), bool))


def rotate(x_BTNH, positions_BT, theta: float):
    """Rotary position embedding, halves convention (2104.09864 as Llama's checkpoints store it); angles in float32."""
    half = x_BTNH.shape[-1] // 2
    rates = jnp.exp(-jnp.log(jnp.float32(theta)) * jnp.arange(half, dtype=jnp.float32) / half)
    angle_BTH = positions_BT.astype(jnp.float32)[:, :, None] * rates[None, None, :]
    cos, sin = jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    """Reference attention; softmax in float32. Heads N share keys and values in groups of N / K."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(B, T, N, H)


class Linear(nn.Module):
    """An einsum with a kernel in float32, cast to `dtype` where it is used. `fan_in`: how many inputs meet in a sum."""

    equation: str
    shape: tuple[int, ...]
    fan_in: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(self.fan_in**-0.5), self.shape, jnp.float32)
        return jnp.einsum(self.equation, x, kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = self.param("scale", nn.initializers.ones, x_BTD.shape[-1:], jnp.float32)
        x32 = x_BTD.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * scale_D[None, None, :].astype(jnp.float32)).astype(x_BTD.dtype)


class Attention(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask_BTS, cache, index):
        c = self.cfg
        D, N, K, H = c.width, c.num_heads, c.num_kv_heads, c.head_dim
        q = Linear("btd,dnh->btnh", (D, N, H), D, self.dtype, name="q")(x_BTD)
        k = Linear("btd,dkh->btkh", (D, K, H), D, self.dtype, name="k")(x_BTD)
        v = Linear("btd,dkh->btkh", (D, K, H), D, self.dtype, name="v")(x_BTD)
        q, k = rotate(q, positions_BT, c.rope_theta), rotate(k, positions_BT, c.rope_theta)
        q, k, v = (constrain(a, "batch", None, "model", None) for a in (q, k, v))
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k.astype(cache["k"].dtype), index, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v.astype(cache["v"].dtype), index, axis=1)
            cache = {"k": k, "v": v}
        out = attend(q, k.astype(self.dtype), v.astype(self.dtype), mask_BTS)
        return Linear("btnh,nhd->btd", (N, H, D), N * H, self.dtype, name="o")(out), cache


class MLP(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        D, F = self.cfg.width, self.cfg.mlp_width
        gate = Linear("btd,df->btf", (D, F), D, self.dtype, name="gate")(x_BTD)
        up = Linear("btd,df->btf", (D, F), D, self.dtype, name="up")(x_BTD)
        inner = constrain(jax.nn.silu(gate) * up, "batch", None, "model")
        return Linear("btf,fd->btd", (F, D), F, self.dtype, name="down")(inner)


class Block(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD, cache, positions_BT, mask_BTS, index):
        eps = self.cfg.norm_eps
        normed = RMSNorm(eps, name="attention_norm")(x_BTD)
        y, cache = Attention(self.cfg, self.dtype, name="attention")(normed, positions_BT, mask_BTS, cache, index)
        x_BTD = x_BTD + y
        x_BTD = x_BTD + MLP(self.cfg, self.dtype, name="mlp")(RMSNorm(eps, name="mlp_norm")(x_BTD))
        return constrain(x_BTD, "batch", None, None), cache


class Embed(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    def setup(self):
        shape = (self.cfg.vocab_size, self.cfg.width)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)

    def __call__(self, tokens_BT):
        return self.embedding.astype(self.dtype)[tokens_BT]

    def attend(self, x_BTD):
        return jnp.einsum("btd,vd->btv", x_BTD, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32)


class Transformer(nn.Module):
    """`unrolled`: the layers' parameters are `layers_0`, `layers_1`, ... (see `unstack`) instead of one stack `layers`."""

    cfg: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unrolled: bool = False

    def setup(self):
        c = self.cfg
        block = nn.remat(Block, prevent_cse=self.unrolled) if self.remat else Block
        self.embed = Embed(c, self.dtype)
        if self.unrolled:
            self.blocks = [block(c, self.dtype, name=f"layers_{i}") for i in range(c.num_layers)]
        else:
            axes = {"in_axes": (0, nn.broadcast, nn.broadcast, nn.broadcast), "out_axes": 0, "length": c.num_layers}
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, **axes)
            self.layers = scanned(c, self.dtype)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tied_embeddings:
            self.unembed = Linear("btd,dv->btv", (c.width, c.vocab_size), c.width, self.dtype)

    def __call__(self, tokens_BT, positions_BT, mask_BTS, cache=None, index=0):
        """Hidden states [B, T, D] after the final norm, and the cache with this call's keys and values at slot `index`.

        mask_BTS: S = T without a cache, else the cache's slots. `cache`: from `init_cache`, or None.
        """
        x_BTD = constrain(self.embed(tokens_BT), "batch", None, None)
        if self.unrolled:
            caches = []
            for i, block in enumerate(self.blocks):
                x_BTD, layer_cache = block(x_BTD, cache and cache[i], positions_BT, mask_BTS, index)
                caches.append(layer_cache)
            cache = tuple(caches) if cache else None
        else:
            x_BTD, cache = self.layers(x_BTD, cache, positions_BT, mask_BTS, index)
        return self.final_norm(x_BTD), cache

    def logits(self, x_BTD):
        """Hidden states -> logits [B, T, V] in float32."""
        logits = self.embed.attend(x_BTD) if self.cfg.tied_embeddings else self.unembed(x_BTD)
        return constrain(logits.astype(jnp.float32), "batch", None, "model")

    def both(self, tokens_BT, positions_BT, mask_BTS):
        """Logits of every token. Touches every parameter, so `init` runs this."""
        return self.logits(self(tokens_BT, positions_BT, mask_BTS)[0])


def init_params(model: Transformer, key):
    """Random parameters (float32) as nested dicts, layers stacked."""
    zeros = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, zeros, zeros, jnp.ones((1, 1, 1), bool), method="both")["params"]


def cast_matrices(params, dtype):
    """Parameters as the forward multiplies by them: kernels and embeddings in `dtype`; norm scales and heads stay float32."""
    matrix = ("kernel", "embedding")
    names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
    return jax.tree.map(lambda x, n: x.astype(dtype) if n.endswith(matrix) and "head/" not in n else x, params, names)


def unstack(params, num_layers: int):
    """Stacked layer parameters -> the layout of an unrolled Transformer."""
    rest = {k: v for k, v in params.items() if k != "layers"}
    return rest | {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}


def init_cache(cfg: TransformerConfig, batch: int, slots: int, dtype):
    """An empty cache for an unrolled Transformer: per layer k and v [B, S, K, H]."""
    shape = (batch, slots, cfg.num_kv_heads, cfg.head_dim)
    zeros = constrain(jnp.zeros(shape, dtype), "batch", None, "model", None)
    return tuple({"k": zeros, "v": zeros} for _ in range(cfg.num_layers))
