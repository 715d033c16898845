"""How many operations the products of a step take, by formula: what a compiled program is measured against.

A multiplication and an addition count as two. Only products of matrices count, as everywhere in the field (2001.08361, 2.1);
attention counts the scores that a block of queries computes, also those that its mask hides.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import prod

import jax
import numpy as np

from cai_jax.models import kernels, lora
from cai_jax.models.attention import QUERIES
from cai_jax.models.transformer import Transformer, TransformerConfig, init_params
from cai_jax.sharding import path_name


@cache
def weights(cfg: TransformerConfig) -> dict[str, int]:
    """Numbers in the matrices of all layers, by their last names, such as "q"; those of adapters by "lora"."""
    shapes = jax.eval_shape(lambda: init_params(Transformer(cfg), jax.random.key(0)))["layers"]
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        *_, layer, leaf = path_name(path).split("/")
        if leaf == "kernel" or leaf in lora.LEAVES:
            name = layer if leaf == "kernel" else "lora"
            found[name] = found.get(name, 0) + prod(x.shape)
    return found


@dataclass(frozen=True)
class Work:
    net: Transformer
    flops: float = 0.0

    def more(self, flops: float) -> "Work":
        return replace(self, flops=self.flops + flops)

    def plus(self, other: "Work", times: int = 1) -> "Work":
        return self.more(times * other.flops)

    def scores(self, pairs: float, products: int) -> float:
        """`products` of each pair of query and key, in all heads and layers: two in a forward pass, q k and p v."""
        c = self.net.cfg
        return 2.0 * products * pairs * c.num_heads * c.head_dim * c.num_layers

    def cached(self, rows: int, tokens: int, keys: int) -> "Work":
        """`tokens` new ones of each row, which see so many slots of a cache."""
        return self.more(2.0 * sum(weights(self.net.cfg).values()) * rows * tokens + self.scores(rows * tokens * keys, 2))

    def texts(self, rows: int, length: int, kind: str, before: int = 0) -> "Work":
        """A forward pass over whole texts, behind so many tokens of a prefix. kind: see kernels.TEXTS."""
        forward = 2.0 * sum(weights(self.net.cfg).values()) * rows * length
        pairs = self.within(length, kind, fused=not before)[0] + length * before
        return self.more(forward + self.scores(rows * pairs, 2))

    def training(self, rows: int, length: int, kind: str) -> "Work":
        """Forward and backward: by the inputs, and by the weights that are trained; again forward where layers are recomputed,
        but for what only makes the layer's result."""
        c, found, tokens = self.net.cfg, dict(weights(self.net.cfg)), rows * length
        adapters = found.pop("lora", 0)
        whole, again = sum(found.values()), self.net.remat == "full"
        last = 0 if c.norm_outputs else found["down"] + (found["o"] if c.parallel else 0)
        passes = 2 * whole + (0 if adapters else whole) + 3 * adapters + again * (whole - last + adapters)
        pairs, fused = self.within(length, kind)
        backward = 7 if fused else 4  # a kernel by queries and one by keys compute the scores again
        products = 2 + backward + 2 * (again or (self.net.remat == "dots"))
        return self.more(2.0 * passes * tokens + self.scores(rows * pairs, products))

    def within(self, length: int, kind: str, fused: bool = True) -> tuple[int, bool]:
        """-> pairs of query and key in a row, those of blocks that a mask of the past hides left out; whether by a kernel."""
        c = self.net.cfg
        by = kernels.choose(
            c.attention if fused else "xla", kernels.machine(), kind, self.net.dtype, c.head_dim, c.attention_cap, length
        )
        block = next(size for size in kernels.BLOCKS if length % size == 0) if by == "splash" else QUERIES
        ends = np.minimum(np.arange(block, length + block, block), length)
        return int(np.sum(np.diff(ends, prepend=0) * ends)), by != "xla"

    def head(self, tokens: int, trained: bool = False) -> "Work":
        """Logits of so many places; trained: their gradients too, for which they are computed again."""
        c = self.net.cfg
        return self.more(2.0 * tokens * c.width * (c.vocab_size + c.vocab_padding) * (4 if trained else 1))
