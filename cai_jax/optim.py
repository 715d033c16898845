"""AdamW with a warm-up, a cosine and a gradient-norm clip, from a config section; float32 inside, whatever is trained."""

import jax
import jax.numpy as jnp
import optax

from cai_jax.config import Optimizer


def schedule(o: Optimizer, steps: int):
    """Learning rate by step: linear from 0 over warmup_steps, then a cosine to final_ratio x peak at `steps`."""
    warmup = min(o.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else o.learning_rate,
        peak_value=o.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, 1),
        end_value=o.learning_rate * o.final_ratio,
    )


def make(o: Optimizer, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates. Decay applies to matrices, not to norms, biases and scales."""

    def decays(params):
        return _map_names(lambda name: name.endswith(("kernel", "embedding", "lora_a", "lora_b")), params)

    tx = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(schedule(o, steps), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decays),
    )

    def update(grads, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers, which strict promotion refuses
            return tx.update(wide(grads), state, wide(params))

    return optax.GradientTransformation(lambda params: tx.init(wide(params)), update)


def wide(tree):
    """Every array in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def apply(params, updates, key):
    """params + updates (float32). A bfloat16 sum is rounded up or down with the odds that keep its mean (2010.06192): most
    updates are smaller than half a step of its 8 bits, and rounding to nearest would lose them all."""
    leaves, tree = jax.tree.flatten(params)
    sums = [x.astype(jnp.float32) + u for x, u in zip(leaves, jax.tree.leaves(updates), strict=True)]
    rounded = [_round(s, x.dtype, jax.random.fold_in(key, i)) for i, (s, x) in enumerate(zip(sums, leaves, strict=True))]
    return jax.tree.unflatten(tree, rounded)


def _round(x, dtype, key):
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (jax.random.bits(key, x.shape, jnp.uint32) >> jnp.uint32(16))  # the half that bfloat16 has no room for
    rounded = jax.lax.bitcast_convert_type((bits >> jnp.uint32(16)).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))  # what is not a number must stay none


def _map_names(f, tree, name: str = ""):
    return {k: _map_names(f, v, f"{name}/{k}") for k, v in tree.items()} if isinstance(tree, dict) else f(name)
