"""The layers that every part of the decoder is made of."""

import re
from math import prod

import jax
import jax.numpy as jnp
from flax import linen as nn

from cai_jax.config import Lora
from cai_jax.sharding import constrain

LARGE = 2**18  # numbers of a matrix from which on it is turned: less stays in the cache of a core
FEW = 128  # rows up to which a turned matrix stands on the left


def turned(params):
    """Parameters of an unrolled model for decoding on a CPU: large kernels as "turned", their outputs before their inputs.

    A product begins by copying the matrix into blocks, which for few rows is most of its time and goes faster for a left
    operand: 16 rows take three quarters of the time (XLA 0.10, width 768).
    """

    def one(name: str, layer):
        if not isinstance(layer, dict):
            return layer
        kernel = layer.get("kernel")
        if kernel is None or kernel.size < LARGE:
            return {key: one(key, x) for key, x in layer.items()}
        inputs = kernel.shape[: 1 + (name == "o")]  # "o" sums over two
        matrix = kernel.reshape(prod(inputs), -1).T
        return {key: x for key, x in layer.items() if key != "kernel"} | {"turned": matrix}

    return one("", params)


class Linear(nn.Module):
    """Axes of x [B, T, inputs...] against the same axes of a kernel [inputs..., outputs...] -> [B, T, outputs...]; beside it
    an adapter where `lora` targets this matrix. The kernel is cast to `dtype` where it is used."""

    shape: tuple[int, ...]
    fan_in: int  # how many inputs meet in a sum
    dtype: jnp.dtype
    bias: int = 0  # axes of the kernel, the last ones, that a bias has; 0: no bias
    lora: Lora | None = None
    out: jnp.dtype | None = None  # of the product; None: `dtype`

    @nn.compact
    def __call__(self, x):
        if self.has_variable("params", "turned"):
            y = self.times_turned(x, self.get_variable("params", "turned"))
        else:
            kernel = self.param("kernel", nn.initializers.normal(self.fan_in**-0.5), self.shape, jnp.float32)
            # On one device rows are one axis: a gradient that sums over two is followed by a copy into another order there.
            rows = x.shape[:2] if jax.sharding.get_abstract_mesh().size > 1 else (-1,)
            flat, kernel = x.reshape(*rows, *x.shape[2:]), kernel.astype(self.dtype)
            y = jnp.tensordot(flat, kernel, x.ndim - 2, preferred_element_type=self.out)
            y = y.reshape(*x.shape[:2], *y.shape[len(rows) :])
        if self.lora and self.lora.rank and re.search(self.lora.targets, "/".join(self.path[-2:])):
            y = y + self.adapter(x)
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.shape[-self.bias :], jnp.float32)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)

    def times_turned(self, x, matrix):
        """The same product with a matrix of `turned`, which has two axes: with more XLA copies it into another order."""
        x_BTI, shape = x.reshape(*x.shape[:2], -1), (*x.shape[:2], *self.shape[x.ndim - 2 :])
        if x.shape[0] * x.shape[1] > FEW:
            return jnp.einsum("bti,oi->bto", x_BTI, matrix, preferred_element_type=self.out).reshape(shape)
        y_OBT = jnp.einsum("oi,bti->obt", matrix, x_BTI, preferred_element_type=self.out)
        # Without the barrier XLA makes one product of both steps again, with the matrix on the right.
        return jnp.moveaxis(jax.lax.optimization_barrier(y_OBT), 0, 2).reshape(shape)

    def adapter(self, x):
        """(alpha / rank) x A B, which starts at zero (2106.09685, section 4.1). A: [inputs..., r], B: [r, outputs...]."""
        inputs, r = x.ndim - 2, self.lora.rank
        a = self.param("lora_a", nn.initializers.normal(self.fan_in**-0.5), (*self.shape[:inputs], r), jnp.float32)
        b = self.param("lora_b", nn.initializers.zeros, (r, *self.shape[inputs:]), jnp.float32)
        z_BTR = jnp.tensordot(x, a.astype(self.dtype), inputs) * (self.lora.alpha / r)
        return jnp.tensordot(constrain(z_BTR, "batch", None, None), b.astype(self.dtype), 1)


class Norm(nn.Module):
    """Over the last axis, in float32."""

    kind: str  # see TransformerConfig.norm
    eps: float

    @nn.compact
    def __call__(self, x):
        kind, eps, ones = self.kind, self.eps, nn.initializers.ones
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
