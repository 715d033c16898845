"""One decoder for every family: what differs between Llama, Mistral, Qwen, Gemma, OLMo 2 and GPT-NeoX is data in its config.

One forward serves decoding, scoring and training. It returns the final hidden states; logits are a second method, so that
scoring can take them a few tokens at a time. Parameters are stored with the layers stacked on a leading axis L, which keeps
compile time flat in depth; `unstack` splits them for the decode loop, where slicing a stack at every token is slow on CPU.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from cai_jax.config import Lora
from cai_jax.models import kernels
from cai_jax.models.attention import Rope, packed_mask, rope_turns, rotate, soft_cap
from cai_jax.models.cache import Cache, write
from cai_jax.models.layers import Linear, Norm
from cai_jax.sharding import constrain, look_up, path_name

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
    attention: str = "auto"  # --config.model.attention
    sequence: str = "whole"  # --config.model.sequence
    lora: Lora | None = None  # adapters beside the matrices of the layers; None, or of rank 0: none


def between_layers(cfg: TransformerConfig, x_BTD):
    """How hidden states lie where layers meet. With `sequence` split each device of the model axis has its part of the tokens
    (2205.05198, section 4.2.2): first products gather them and last ones scatter them, which is as much as to sum them all."""
    mesh = jax.sharding.get_abstract_mesh()
    split = cfg.sequence == "split" and not mesh.empty and x_BTD.shape[1] % mesh.shape["model"] == 0
    return constrain(x_BTD, "batch", "model" if split else None, None)


class Attention(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD, turns, mask_BTS, past, rows):
        c = self.cfg
        D, N, K, H = c.width, c.num_heads, c.num_kv_heads, c.head_dim
        bias = 2 * c.qkv_bias
        q = Linear((D, N, H), D, self.dtype, bias, c.lora, name="q")(x_BTD)
        k = Linear((D, K, H), D, self.dtype, bias, c.lora, name="k")(x_BTD)
        v = Linear((D, K, H), D, self.dtype, bias, c.lora, name="v")(x_BTD)
        q, k = self.normed(q, "q_norm"), self.normed(k, "k_norm")
        q, k = rotate(q, turns), rotate(k, turns)
        q, k, v = (constrain(a, "batch", None, "model", None) for a in (q, k, v))
        if past is None:
            own, out = None, kernels.within(c, q, k, v, mask_BTS, rows)
        else:
            prefix, layer, filled_B = past
            own = {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}
            own = write(layer, own, filled_B) if layer else own
            out = kernels.behind(c, q, prefix, own, mask_BTS, filled_B, rows.window)
        return Linear((N, H, D), N * H, self.dtype, int(c.out_bias), c.lora, name="o")(out), own

    def normed(self, x_BTNH, name: str):
        if not self.cfg.qk_norm:
            return x_BTNH
        B, T, N, H = x_BTNH.shape
        together = x_BTNH.reshape(B, T, N * H) if self.cfg.qk_norm == "all" else x_BTNH
        return Norm(self.cfg.norm, self.cfg.norm_eps, name=name)(together).reshape(B, T, N, H)


class MLP(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        c = self.cfg
        D, F, bias, act = c.width, c.mlp_width, int(c.mlp_bias), ACTIVATIONS[c.activation]
        if c.gated:
            gate = Linear((D, F), D, self.dtype, bias, c.lora, name="gate")(x_BTD)
        up = Linear((D, F), D, self.dtype, bias, c.lora, name="up")(x_BTD)
        inner = constrain(act(gate) * up if c.gated else act(up), "batch", None, "model")
        return Linear((F, D), F, self.dtype, bias, c.lora, name="down")(inner)


class Block(nn.Module):
    """`sliding`: whether this layer is a sliding one; `turns` and `masks` hold a second entry for those. `past`: what the cache
    holds of this layer (see models.cache), or None. `ends`: see kernels.Rows. -> (the block's output, {"k", "v"} with those of
    this call, or None without a past)."""

    cfg: TransformerConfig
    dtype: jnp.dtype
    texts: str = "trees"

    @nn.compact
    def __call__(self, x_BTD, past, sliding, turns, masks, ends_BT):
        c = self.cfg

        def norm(name, x, wanted):
            return Norm(c.norm, c.norm_eps, name=name)(x) if wanted else x

        def mine(pair):
            return pair[0] if len(pair) == 1 else jax.tree.map(lambda full, near: jnp.where(sliding, near, full), *pair)

        start = x_BTD
        y = norm("attention_norm", x_BTD, c.norm_inputs)
        traced = isinstance(sliding, jax.Array)  # one program for all layers: what they see, only a mask can say
        rows = kernels.Rows() if traced else kernels.Rows(self.texts, ends_BT, c.window if sliding else 0)
        y, seen = Attention(c, self.dtype, name="attention")(y, mine(turns), mine(masks), past, rows)
        x_BTD = x_BTD + norm("attention_out_norm", y, c.norm_outputs)
        y = norm("mlp_norm", start if c.parallel else x_BTD, c.norm_inputs)
        x_BTD = x_BTD + norm("mlp_out_norm", MLP(c, self.dtype, name="mlp")(y), c.norm_outputs)
        return between_layers(c, x_BTD), seen


class Embed(nn.Module):
    cfg: TransformerConfig
    dtype: jnp.dtype

    def setup(self):
        shape = (self.cfg.vocab_size + self.cfg.vocab_padding, self.cfg.width)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, jnp.float32)

    def __call__(self, tokens_BT):
        x_BTD = look_up(self.embedding, tokens_BT).astype(self.dtype)
        return x_BTD if self.cfg.embed_scale == 1 else x_BTD * jnp.asarray(self.cfg.embed_scale, self.dtype)

    def attend(self, x_BTD):
        return jnp.einsum("btd,vd->btv", x_BTD, self.embedding.astype(self.dtype), preferred_element_type=jnp.float32)


class Transformer(nn.Module):
    """`unrolled`: the layers' parameters are `layers_0`, `layers_1`, ... (see `unstack`) instead of one stack `layers`.
    `texts`: what rows hold at most (see kernels.TEXTS); the less it is, the less kernels must ask the mask."""

    cfg: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    unrolled: bool = False
    texts: str = "trees"

    def setup(self):
        c = self.cfg
        for name, known in (("remat", REMAT), ("texts", kernels.TEXTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: wanted one of {', '.join(known)}")
        block = REMAT[self.remat](Block, prevent_cse=self.unrolled)
        self.embed = Embed(c, self.dtype)
        if self.unrolled:
            self.blocks = [block(c, self.dtype, self.texts, name=f"layers_{i}") for i in range(c.num_layers)]
        else:
            axes = {"in_axes": (nn.broadcast, 0, *[nn.broadcast] * 3), "out_axes": 0, "length": c.num_layers}
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, **axes)
            self.layers = scanned(c, self.dtype, self.texts)
        self.final_norm = Norm(c.norm, c.norm_eps)
        if not c.tied_embeddings:
            shape = (c.width, c.vocab_size + c.vocab_padding)
            self.unembed = Linear(shape, c.width, self.dtype, out=jnp.float32)  # log-probs want more than bf16

    def __call__(self, tokens_BT, positions_BT, ends_BT):
        """Hidden states [B, T, D] of whole texts after the final norm. `ends`: see attention.packed_mask."""
        return self.run(tokens_BT, positions_BT, packed_mask(ends_BT), positions_BT, ends_BT=ends_BT)[0]

    def beside(self, tokens_BT, positions_BT, ends_BT, prefix, offset):
        """The same of texts that begin with `offset` tokens of `prefix` (see models.cache) before their own. Only unrolled."""
        B, T = tokens_BT.shape
        P = prefix[0]["k"].shape[1]
        before_BTP = jnp.broadcast_to(jnp.arange(P)[None, None] < offset, (B, T, P))
        keys_BS = jnp.concatenate([jnp.broadcast_to(jnp.arange(P)[None], (B, P)), positions_BT + offset], axis=1)
        mask_BTS = jnp.concatenate([before_BTP, packed_mask(ends_BT)], axis=2)
        cache = Cache((None,) * len(prefix), None, None, prefix)
        return self.run(tokens_BT, positions_BT + offset, mask_BTS, keys_BS, cache)[0]

    def extend(self, tokens_BT, cache: Cache):
        """Tokens that follow what `cache` holds of each row. -> (hidden states [B, T, D], the layers of the cache with the keys
        and values of these tokens in place). Only unrolled; `cache.filled_B` is the caller's to move on."""
        at_BT = cache.filled_B[:, None] + jnp.arange(tokens_BT.shape[1])[None]
        return self.run(tokens_BT, cache.offset_B[:, None] + at_BT, *cache.seen(at_BT), cache)

    def run(self, tokens_BT, positions_BT, mask_BTS, keys_BS, cache=None, ends_BT=None):
        """`keys_BS`: the positions of what is attended to, which sliding layers ask for. `ends`: see kernels.Rows."""
        c = self.cfg
        x_BTD = between_layers(c, self.embed(tokens_BT))
        masks, turns = (mask_BTS,), (rope_turns(c.rope, c.head_dim, positions_BT),)
        if any(c.sliding):
            masks += (mask_BTS & (positions_BT[:, :, None] - keys_BS[:, None, :] < c.window),)
            if c.sliding_rope:
                turns += (rope_turns(c.sliding_rope, c.head_dim, positions_BT),)
        if not self.unrolled:
            sliding_L = jnp.array(c.sliding) if any(c.sliding) else None
            return self.final_norm(self.layers(x_BTD, None, sliding_L, turns, masks, ends_BT)[0]), None
        layers = []
        for i, block in enumerate(self.blocks):
            past = cache and (cache.prefix and cache.prefix[i], cache.layers[i], cache.filled_B)
            x_BTD, layer = block(x_BTD, past, c.sliding[i] if any(c.sliding) else None, turns, masks, ends_BT)
            layers.append(layer)
        return self.final_norm(x_BTD), tuple(layers)

    def logits(self, x_BTD):
        """Hidden states -> logits [B, T, V] in float32; what pads the vocabulary is never chosen."""
        c = self.cfg
        logits = self.embed.attend(x_BTD) if c.tied_embeddings else self.unembed(x_BTD)
        logits = constrain(soft_cap(logits.astype(jnp.float32), c.logit_cap), "batch", None, "model")
        if not c.vocab_padding:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1])[None, None] < c.vocab_size, logits, -1e30)

    def both(self, tokens_BT, positions_BT, ends_BT):
        """Logits of every token. Touches every parameter, so `init` runs this."""
        return self.logits(self(tokens_BT, positions_BT, ends_BT))


def init_params(model: Transformer, key):
    """Random parameters (float32) as nested dicts, layers stacked, also for an unrolled model."""
    model = model.clone(unrolled=False)
    zeros = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, zeros, zeros, zeros, method="both")["params"]


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
