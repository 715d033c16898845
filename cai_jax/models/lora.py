"""Adapters as parameters: which leaves they are, where they start, and the model that has taken them in (2106.09685).

A model with adapters has the parameters of the model and two leaves more beside each kernel that `Lora.targets` finds; the
decoder says what they compute. Every tree here is of nested dicts.
"""

import dataclasses
import math
import zlib
from functools import partial

import jax
import jax.numpy as jnp

from cai_jax.config import Lora
from cai_jax.errors import InputError
from cai_jax.models.transformer import Transformer, TransformerConfig, init_params
from cai_jax.sharding import path_name

LEAVES = ("lora_a", "lora_b")


def attach(cfg: TransformerConfig, lora: Lora | None) -> TransformerConfig:
    """The configuration of the same decoder with adapters, or with None without."""
    return dataclasses.replace(cfg, lora=lora)


def split(params) -> tuple[dict, dict]:
    """-> (the adapters, the rest), without empty branches; either may be {}."""
    return _only(params, lambda name: name in LEAVES), _only(params, lambda name: name not in LEAVES)


def _only(tree: dict, wanted) -> dict:
    branches = {k: _only(x, wanted) if isinstance(x, dict) else x for k, x in tree.items()}
    return {k: x for k, x in branches.items() if (x != {} if isinstance(x, dict) else wanted(k))}


def join(a: dict, b: dict) -> dict:
    """Both trees in one. Raises ValueError for a leaf that both have, or that is a branch in the other."""
    both = {}
    for name in a.keys() & b.keys():
        if not (isinstance(a[name], dict) and isinstance(b[name], dict)):
            raise ValueError(f"both trees have {name!r}: wanted trees without a common leaf")
        both[name] = join(a[name], b[name])
    return a | b | both


def init(cfg: TransformerConfig, key) -> dict:
    """The adapters of a model, float32: A normal with deviation fan_in ** -0.5, B zero, so that they change nothing yet. A
    value depends on `key` and on its path, not on what else has an adapter. {} where cfg.lora is none.

    Raises InputError when its targets find no matrix.
    """
    shapes, rest = split(jax.eval_shape(partial(init_params, Transformer(cfg)), key))
    if cfg.lora and cfg.lora.rank and not shapes:
        layer = jax.tree_util.tree_flatten_with_path(rest["layers"])[0]
        matrices = [path_name(path).removesuffix("/kernel") for path, _ in layer if path_name(path).endswith("/kernel")]
        raise InputError(f"--config.lora.targets={cfg.lora.targets}: it finds none of {', '.join(matrices)}")

    def one(path, x):
        name = path_name(path)
        if name.endswith("lora_b"):
            return jnp.zeros(x.shape, x.dtype)
        own = jax.random.fold_in(key, jnp.uint32(zlib.crc32(name.encode())))
        return jax.random.normal(own, x.shape, x.dtype) * math.prod(x.shape[1:-1]) ** -0.5  # all but layers and rank

    return jax.tree_util.tree_map_with_path(one, shapes)


def merge(params, lora: Lora) -> dict:
    """The parameters without adapters of the same function: W + (alpha / rank) A B, computed in float32 and kept in the
    kernel's dtype. Layers may be stacked or not."""
    if not set(LEAVES) <= params.keys():
        return {k: merge(x, lora) if isinstance(x, dict) else x for k, x in params.items()}
    kernel, a, b = (params[k] for k in ("kernel", *LEAVES))
    product = partial(jnp.tensordot, axes=1, precision="highest")
    stacked = a.ndim + b.ndim - 2 - kernel.ndim  # the layers' axis is in both
    delta = (jax.vmap(product) if stacked else product)(a.astype(jnp.float32), b.astype(jnp.float32))
    whole = kernel.astype(jnp.float32) + (lora.alpha / lora.rank) * delta
    return {k: x for k, x in params.items() if k not in LEAVES} | {"kernel": whole.astype(kernel.dtype)}
