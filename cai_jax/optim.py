"""AdamW with a warm-up, a cosine and a gradient-norm clip, from a config section."""

import jax
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
        return _map_names(lambda name: name.endswith(("kernel", "embedding")), params)

    tx = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(schedule(o, steps), o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decays),
    )

    def update(grads, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers, which strict promotion refuses
            return tx.update(grads, state, params)

    return optax.GradientTransformation(tx.init, update)


def _map_names(f, tree, name: str = ""):
    return {k: _map_names(f, v, f"{name}/{k}") for k, v in tree.items()} if isinstance(tree, dict) else f(name)
