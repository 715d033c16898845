"""A language model as the stages pass it around: configuration, compute dtype, parameters, tokenizer."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from cai_jax.models.kernels import machine
from cai_jax.models.transformer import Transformer, TransformerConfig
from cai_jax.tokenizer import Tokenizer


class LM(NamedTuple):
    cfg: TransformerConfig
    dtype: Any  # of the computation
    params: Any
    tok: Tokenizer

    def net(self, **options) -> Transformer:
        return Transformer(self.cfg, self.dtype, **options)


def compute_dtype(name: str):
    """'auto' is float32 on CPU and bfloat16 on accelerators."""
    return jnp.dtype({"auto": "float32" if machine() == "cpu" else "bfloat16"}.get(name, name))
