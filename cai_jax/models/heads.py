"""Scalar heads on the decoder's hidden states: the reward model's and the value function's."""

import jax.numpy as jnp
from flax import linen as nn


class ScalarHead(nn.Module):
    """[..., D] -> [...] in float32. `scale`: standard deviation of the kernel; 0 starts a value function at zero."""

    scale: float

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(self.scale), (width, 1), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (1,), jnp.float32)
        out = jnp.einsum("...d,do->...o", x.astype(jnp.float32), kernel)[..., 0]
        return out + bias[0]


def init_head(key, width: int, scale: float | None = None):
    """Parameters of a ScalarHead. Default scale 1 / sqrt(D + 1), bias 0 (lm-human-preferences, detail 7)."""
    scale = (width + 1) ** -0.5 if scale is None else scale
    return ScalarHead(scale).init(key, jnp.zeros((1, width)))["params"]


def apply_head(params, x):
    """Scores of hidden states [..., D] -> [...], float32."""
    return ScalarHead(0.0).apply({"params": params}, x)
