"""One decoder for every family: what differs between Llama, Mistral, Qwen, Gemma, OLMo 2 and GPT-NeoX is data in its config.

One forward serves decoding, scoring and training. It returns the final hidden states; logits are a second method, so that
scoring can take them a few tokens at a time. Parameters are stored with the layers stacked on a leading axis L, which keeps
compile time flat in depth; `unstack` splits them for the decode loop, where slicing a stack at every token is slow on CPU.
"""

import re
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from cai_jax.config import Lora
from cai_jax.models.attention import Rope, attend, rope_turns, rotate, soft_cap
from cai_jax.sharding import constrain, path_name

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
REMAT = {  # what of a layer the backward pass computes again
    "none": lambda block, prevent_cse: block,
    "full": nn.remat,
    "dots": partial(nn.remat, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),  # all but products with weights
}


@dataclass(frozen=True)
class TransformerConfig:
    """The defaults are Llama's; models/families.py says which family sets what."""

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    norm: str = "rms"  # "rms", "rms_plus_one" (scale 1 + w) or "layer" (mean, scale, bias)
    norm_inputs: bool = True  # of attention and MLP
    norm_outputs: bool = False  # before they join the residual
    parallel: bool = False  # the MLP reads the block's input and not the attention's sum
    qk_norm: str = ""  # "head": over each head, "all": over all heads together
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    query_scale: float = 0.0  # of the scores; 0: head_dim ** -0.5
    attention_cap: float = 0.0  # scores are cap * tanh(score / cap); 0: not capped
    logit_cap: float = 0.0
    embed_scale: float = 1.0
    window: int = 0  # tokens that a sliding layer sees, its own included
    sliding: tuple[bool, ...] = ()  # per layer; (): none slides
    sliding_rope: Rope | None = None  # where it is another than the others'
    vocab_padding: int = 0  # rows of the embedding behind the vocabulary, for meshes that would not divide it
    lora: Lora | None = None  # adapters beside the matrices of the layers; None, or of rank 0: none


class Linear(nn.Module):
    """An einsum with a kernel that is cast to `dtype` where it is used, and beside it an adapter where `lora` targets this
    matrix. `fan_in`: how many inputs meet in a sum."""

    equation: str
    shape: tuple[int, ...]
    fan_in: int
    dtype: jnp.dtype
    bias: int = 0  # axes of the kernel, the last ones, that a bias has; 0: no bias
    lora: Lora | None = None
    out: jnp.dtype | None = None  # of the product; None: `dtype`

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(self.fan_in**-0.5), self.shape, jnp.float32)
        y = jnp.einsum(self.equation, x, kernel.astype(self.dtype), preferred_element_type=self.out)
        if self.lora and self.lora.rank and re.search(self.lora.targets, "/".join(self.path[-2:])):
            y = y + self.adapter(x)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.shape[-self.bias :], jnp.float32)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def adapter(self, x):
        """(alpha / rank) x A B, which starts at zero (2106.09685, section 4.1). A: [inputs..., r], B: [r, outputs...]."""
        inputs, r = x.ndim - 2, self.lora.rank
        a = self.param("lora_a", nn.initializers.normal(self.fan_in**-0.5), (*self.shape[:inputs], r), jnp.float32)
        b = self.param("lora_b", nn.initializers.zeros, (r, *self.shape[inputs:]), jnp.float32)
        z_BTR = jnp.tensordot(x, a.astype(self.dtype), inputs) * (self.lora.alpha / r)
        return jnp.tensordot(constrain(z_BTR, "batch", None, None), b.astype(self.dtype), 1)


class Norm(nn.Module):
    """Over the last axis, in float32."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x):
        kind, eps, ones = self.cfg.norm, self.cfg.norm_eps, nn.initializers.ones
        shape, wide = x.shape[-1:], (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.zeros if kind == "rms_plus_one" else ones, shape, jnp.float32)
        scale = scale.astype(jnp.float32).reshape(wide)
        x32 = x.astype(jnp.float32)
        if kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
        normed = normed * (1 + scale if kind == "rms_plus_one" else scale)
        if kind == "layer":
            normed = normed + self.param("bias", nn.initializers.zeros, shape, jnp.float32).astype(jnp.float32).reshape(wide)
        return normed.astype(x.dtype)


class Attention(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD, turns, mask_BTS, cache, index):
        c = self.cfg
        D, N, K, H = c.width, c.num_heads, c.num_kv_heads, c.head_dim
        bias = 2 * c.qkv_bias
        q = Linear("btd,dnh->btnh", (D, N, H), D, self.dtype, bias, c.lora, name="q")(x_BTD)
        k = Linear("btd,dkh->btkh", (D, K, H), D, self.dtype, bias, c.lora, name="k")(x_BTD)
        v = Linear("btd,dkh->btkh", (D, K, H), D, self.dtype, bias, c.lora, name="v")(x_BTD)
        q, k = self.normed(q, "q_norm"), self.normed(k, "k_norm")
        q, k = rotate(q, turns), rotate(k, turns)
        q, k, v = (constrain(a, "batch", None, "model", None) for a in (q, k, v))
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache["k"], k.astype(cache["k"].dtype), index, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache["v"], v.astype(cache["v"].dtype), index, axis=1)
            cache = {"k": k, "v": v}
        out = attend(q, k.astype(self.dtype), v.astype(self.dtype), mask_BTS, c.query_scale, c.attention_cap)
        return Linear("btnh,nhd->btd", (N, H, D), N * H, self.dtype, int(c.out_bias), c.lora, name="o")(out), cache

    def normed(self, x_BTNH, name: str):
        if not self.cfg.qk_norm:
            return x_BTNH
        B, T, N, H = x_BTNH.shape
        together = x_BTNH.reshape(B, T, N * H) if self.cfg.qk_norm == "all" else x_BTNH
        return Norm(self.cfg, name=name)(together).reshape(B, T, N, H)


class MLP(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        c = self.cfg
        D, F, bias, act = c.width, c.mlp_width, int(c.mlp_bias), ACTIVATIONS[c.activation]
        if c.gated:
            gate = Linear("btd,df->btf", (D, F), D, self.dtype, bias, c.lora, name="gate")(x_BTD)
        up = Linear("btd,df->btf", (D, F), D, self.dtype, bias, c.lora, name="up")(x_BTD)
        inner = constrain(act(gate) * up if c.gated else act(up), "batch", None, "model")
        return Linear("btf,fd->btd", (F, D), F, self.dtype, bias, c.lora, name="down")(inner)


class Block(nn.Module):
    """`sliding`: whether this layer is a sliding one; `turns` and `masks` hold a second entry for those."""

    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD, cache, sliding, turns, masks, index):
        c = self.cfg

        def norm(name, x, wanted):
            return Norm(c, name=name)(x) if wanted else x

        def mine(pair):
            return pair[0] if len(pair) == 1 else jax.tree.map(lambda full, near: jnp.where(sliding, near, full), *pair)

        start = x_BTD
        y = norm("attention_norm", x_BTD, c.norm_inputs)
        y, cache = Attention(c, self.dtype, name="attention")(y, mine(turns), mine(masks), cache, index)
        x_BTD = x_BTD + norm("attention_out_norm", y, c.norm_outputs)
        y = norm("mlp_norm", start if c.parallel else x_BTD, c.norm_inputs)
        x_BTD = x_BTD + norm("mlp_out_norm", MLP(c, self.dtype, name="mlp")(y), c.norm_outputs)
        return constrain(x_BTD, "batch", None, None), cache


class Embed(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    def setup(self):
        shape = (self.cfg.vocab_size + self.cfg.vocab_padding, self.cfg.width)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)

    def __call__(self, tokens_BT):
        x_BTD = self.embedding.astype(self.dtype)[tokens_BT]
        return x_BTD if self.cfg.embed_scale == 1 else x_BTD * jnp.asarray(self.cfg.embed_scale, self.dtype)

    def attend(self, x_BTD):
        return jnp.einsum("btd,vd->btv", x_BTD, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32)


class Transformer(nn.Module):
    """`unrolled`: the layers' parameters are `layers_0`, `layers_1`, ... (see `unstack`) instead of one stack `layers`."""

    cfg: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unrolled: bool = False

    def setup(self):
        c = self.cfg
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}: wanted one of {', '.join(REMAT)}")
        block = REMAT[self.remat](Block, prevent_cse=self.unrolled)
        self.embed = Embed(c, self.dtype)
        if self.unrolled:
            self.blocks = [block(c, self.dtype, name=f"layers_{i}") for i in range(c.num_layers)]
        else:
            axes = {"in_axes": (0, 0, *[nn.broadcast] * 3), "out_axes": 0, "length": c.num_layers}
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, **axes)
            self.layers = scanned(c, self.dtype)
        self.final_norm = Norm(c)
        if not c.tied_embeddings:
            shape = (c.width, c.vocab_size + c.vocab_padding)
            self.unembed = Linear("btd,dv->btv", shape, c.width, self.dtype, out=jnp.float32)  # log-probs want more than bf16

    def __call__(self, tokens_BT, positions_BT, mask_BTS, cache=None, index=0, key_positions_BS=None):
        """Hidden states [B, T, D] after the final norm, and the cache with this call's keys and values at slot `index`.

        mask_BTS: S = T without a cache, else the cache's slots. `cache`: from `init_cache`, or None. `key_positions_BS`: the
        positions of the slots, which sliding layers ask for where there is a cache.
        """
        c = self.cfg
        x_BTD = constrain(self.embed(tokens_BT), "batch", None, None)
        masks, turns = (mask_BTS,), (rope_turns(c.rope, c.head_dim, positions_BT),)
        if any(c.sliding):
            keys_BS = positions_BT if key_positions_BS is None else key_positions_BS
            masks += (mask_BTS & (positions_BT[:, :, None] - keys_BS[:, None, :] < c.window),)
            if c.sliding_rope:
                turns += (rope_turns(c.sliding_rope, c.head_dim, positions_BT),)
        if self.unrolled:
            caches = []
            for i, block in enumerate(self.blocks):
                sliding = bool(c.sliding) and c.sliding[i]
                x_BTD, layer_cache = block(x_BTD, cache and cache[i], sliding, turns, masks, index)
                caches.append(layer_cache)
            cache = tuple(caches) if cache else None
        else:
            sliding_L = jnp.array(c.sliding) if any(c.sliding) else None
            x_BTD, cache = self.layers(x_BTD, cache, sliding_L, turns, masks, index)
        return self.final_norm(x_BTD), cache

    def logits(self, x_BTD):
        """Hidden states -> logits [B, T, V] in float32; what pads the vocabulary is never chosen."""
        c = self.cfg
        logits = self.embed.attend(x_BTD) if c.tied_embeddings else self.unembed(x_BTD)
        logits = constrain(soft_cap(logits.astype(jnp.float32), c.logit_cap), "batch", None, "model")
        if not c.vocab_padding:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1])[None, None] < c.vocab_size, logits, -1e30)

    def both(self, tokens_BT, positions_BT, mask_BTS):
        """Logits of every token. Touches every parameter, so `init` runs this."""
        return self.logits(self(tokens_BT, positions_BT, mask_BTS)[0])


def init_params(model: Transformer, key):
    """Random parameters (float32) as nested dicts, layers stacked, also for an unrolled model."""
    model = model.clone(unrolled=False)
    zeros = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, zeros, zeros, jnp.ones((1, 1, 1), bool), method="both")["params"]


def cast_matrices(params, dtype):
    """Parameters as they are kept frozen: kernels and embeddings in `dtype`; norm scales, adapters and heads stay float32."""
    matrix = ("kernel", "embedding")
    names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
    return jax.tree.map(lambda x, n: x.astype(dtype) if n.endswith(matrix) and "head/" not in n else x, params, names)


def unstack(params, num_layers: int):
    """Stacked layer parameters -> the layout of an unrolled Transformer. Gradients through it are stacked."""
    rest = {k: v for k, v in params.items() if k != "layers"}
    # The backward of one split is one concatenation; that of x[i] for every i would be a sum of stacks.
    leaves, tree = jax.tree.flatten(params["layers"])
    layers = zip(*(jax.lax.split(x, [1] * num_layers) for x in leaves), strict=True)
    return rest | {f"layers_{i}": tree.unflatten(x.squeeze(0) for x in layer) for i, layer in enumerate(layers)}


def init_cache(cfg: TransformerConfig, batch: int, slots: int, dtype):
    """An empty cache for an unrolled Transformer: per layer k and v [B, S, K, H]."""
    shape = (batch, slots, cfg.num_kv_heads, cfg.head_dim)
    zeros = constrain(jnp.zeros(shape, dtype), "batch", None, "model", None)
    return tuple({"k": zeros, "v": zeros} for _ in range(cfg.num_layers))
