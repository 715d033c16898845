"""A model and a tokenizer small enough to compile in a moment, for every test that needs one."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.models import LM
from cai_jax.models.transformer import Transformer, TransformerConfig, init_params
from cai_jax.score import hidden_states, row_batch
from cai_jax.sharding import path_name, put
from cai_jax.tokenizer import Tokenizer

PAD, END = 0, 1
# 98 = 2 x 7 x 7: no other size of the model has the factor 7, so an array that holds the vocabulary is known by its size.
CFG = TransformerConfig(
    vocab_size=98, num_layers=2, width=32, mlp_width=64, num_heads=4, num_kv_heads=2, head_dim=8, max_length=128
)
UNTIED = replace(CFG, tied_embeddings=False)


def net(cfg: TransformerConfig = CFG, **options) -> Transformer:
    return Transformer(cfg, jnp.float32, **options)


@cache
def params(cfg: TransformerConfig = CFG, seed: int = 0):
    """Random parameters as NumPy arrays (compiling JAX's own draws takes seconds). Norms are not all 1, and predictions differ
    clearly from row to row and from token to token."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name = path_name(path)
        if "norm" in name:
            return rng.uniform(0.5, 1.5, shape.shape).astype(shape.dtype)
        return rng.normal(0.0, 0.4 if "embed" in name else 0.2, shape.shape).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(partial(init_params, net(cfg)), jax.random.key(0)))


@cache
def on(mesh, cfg: TransformerConfig = CFG):
    """The parameters on a mesh. They are shared: a step that donates needs `copy`."""
    return put(params(cfg), mesh)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@cache
def tokenizer() -> Tokenizer:
    """One token per ASCII byte behind <pad> and <end>: 98 tokens."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    signs = [to_bytes.pre_tokenize_str(chr(i))[0][0] for i in (10, *range(32, 127))]
    listed = ["<pad>", "<end>", *signs]
    fast = Fast(models.BPE(vocab={t: i for i, t in enumerate(listed)}, merges=[]))
    fast.pre_tokenizer, fast.decoder = to_bytes, decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>"), END, PAD)


def lm(mesh) -> LM:
    return LM(CFG, jnp.dtype("float32"), on(mesh), tokenizer())


def rows(lengths, width: int, seed: int = 0, pad: int = PAD):
    """Random right-padded rows -> (tokens [B, width] int32, lengths [B] int32), NumPy."""
    lengths = np.array(lengths, np.int32)
    tokens = np.random.default_rng(seed).integers(2, CFG.vocab_size, (len(lengths), width), np.int32)
    return np.where(np.arange(width)[None] < lengths[:, None], tokens, np.int32(pad)), lengths


@partial(jax.jit, static_argnames="net")
def logits(net: Transformer, params, tokens_BT, lengths_B):
    """Logits of every position of right-padded rows by one plain forward pass. -> [B, T, V]."""
    return net.apply({"params": params}, hidden_states(net, params, row_batch(tokens_BT, lengths_B)), method="logits")


def log_softmax(x):
    """NumPy, float64, over the last axis."""
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it (scans, checkpoints, jits)."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def same_bits(a, b) -> bool:
    """Two trees of arrays are equal in structure, dtype, shape and every bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(*(map(np.asarray, jax.device_get(jax.tree.leaves(t))) for t in (a, b)), strict=True)
    return all((x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()) for x, y in pairs)


def assert_close(a, b, rtol=1e-5):
    """Every array of tree `a` equals that of `b` within `rtol` of the largest value in `b`'s array."""
    flat = zip(jax.tree_util.tree_leaves_with_path(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    for (path, x), y in flat:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.abs(y).max(initial=0.0), 1e-8)
        assert x.shape == y.shape and np.abs(x - y).max(initial=0.0) <= rtol * scale, jax.tree_util.keystr(path)
