"""The training loop of every stage: SFT, reward, DPO and PPO differ only in their loss function and their data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cai_jax import checkpoints, optim
from cai_jax.errors import Stopped
from cai_jax.logprobs import target_logprobs
from cai_jax.losses import cross_entropy, masked_mean
from cai_jax.metrics import Metrics
from cai_jax.models import lora
from cai_jax.progress import Progress
from cai_jax.score import hidden_states
from cai_jax.sharding import BATCH, P, put_batch, shard_init, shardings
from cai_jax.workdir import stopping


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Any  # those that are trained
    opt_state: Any


class Parts(NamedTuple):
    """A batch in N parts of one size. Those after the first `count` hold nothing and cost nothing."""

    arrays: Any  # [B, N, ...] each, so that every device has its share of each part
    count: Any  # int32

    def part(self, i):
        """-> arrays [B, ...]."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), self.arrays)


def put_parts(parts: Parts, mesh) -> Parts:
    """Host arrays onto the mesh, each part split over the batch axes."""
    return Parts(put_batch(parts.arrays, mesh), jnp.int32(parts.count))


def language_model_loss(net):
    """loss_fn of SFT and pretraining: weighted cross-entropy on a packed batch (see data.pack)."""

    def loss_fn(params, batch, key):
        hidden = hidden_states(net, params, batch, "packed")
        logp, entropy = target_logprobs(net, params, hidden, batch["targets"], counts_BT=batch["weights"] > 0)
        loss = cross_entropy(logp, batch["weights"])
        return loss, {"entropy": masked_mean(entropy, batch["weights"]), "weight": jnp.sum(batch["weights"])}

    return loss_fn


def init_state(params, tx: optax.GradientTransformation, mesh) -> TrainState:
    """A fresh state around sharded parameters; the optimizer's arrays lie as the parameters do."""
    return TrainState(jnp.zeros((), jnp.int32), params, shard_init(tx.init, mesh, params))


def abstract(tree, mesh):
    """ShapeDtypeStructs with target shardings, to restore onto."""
    shapes = jax.eval_shape(lambda: tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings(shapes, mesh))


def resumed(folder: Path, state, mesh):
    """The newest checkpoint in `folder` in place of `state`, whose arrays are let go first; `state` where there is none."""
    if not checkpoints.steps(folder):
        return state
    wanted = abstract(state, mesh)
    jax.tree.map(lambda x: x.delete(), state)  # a first step would have donated them
    return checkpoints.restore(folder, wanted)


def make_train_step(loss_fn: Callable, tx: optax.GradientTransformation, mesh, microbatches: int = 1):
    """-> jitted (state, frozen, batch, key) -> (state, metrics). The state is donated.

    loss_fn(params, batch, key) -> (loss, metrics), means over metrics["weight"] tokens or rows; its params are state.params
    joined with `frozen`, those that no gradient is taken of ({}: none). The parts of a batch, those of Parts or B split in
    `microbatches`, count by their weights, so the mean is that of the whole batch.
    """

    def gradient(params, frozen, batch, key):
        def loss_of(trained):
            return loss_fn(lora.join(frozen, trained), batch, key)

        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return optim.wide(grads), {"loss": loss, **metrics}

    def accumulate(params, frozen, parts: Parts, key):
        def one(i, total):
            rows = jax.lax.with_sharding_constraint(parts.part(i), P(BATCH))
            grads, metrics = gradient(params, frozen, rows, jax.random.fold_in(key, i))
            weight = metrics.pop("weight")
            weighted = jax.tree.map(lambda x: x * weight, (grads, metrics))
            return jax.tree.map(jnp.add, total, (*weighted, weight))

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, frozen, parts.part(0), key))
        start = (zeros[0], {k: v for k, v in zeros[1].items() if k != "weight"}, zeros[1]["weight"])
        with jax.named_scope("parts"):
            grads, metrics, weight = jax.lax.fori_loop(0, parts.count, one, start)
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1.0), (grads, metrics))
        return grads, metrics | {"weight": weight}

    def step(state: TrainState, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        if not isinstance(batch, Parts):  # every device keeps its rows
            batch = Parts(jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]), batch), microbatches)
        if jax.tree.leaves(batch.arrays)[0].shape[1] == 1:
            grads, metrics = gradient(state.params, frozen, batch.part(0), key)
        else:
            grads, metrics = accumulate(state.params, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optim.apply(state.params, updates, key)
        metrics = metrics | {"gradient_norm": optax.tree.norm(grads)}
        state = TrainState(state.step + 1, params, opt_state)
        return jax.lax.with_sharding_constraint(state, shardings(state, mesh)), metrics

    return jax.jit(step, donate_argnums=0)


def fit(
    name: str,
    folder: Path,
    state: TrainState,
    frozen,
    step_fn,
    batch_at: Callable[[int], dict],
    steps: int,
    key,
    every: int,
    mesh,
):
    """Runs `step_fn` until `steps` updates are done, resuming from and saving to `folder`/checkpoints. -> the final state.

    batch_at(t) -> host arrays: a pure function of the step. Metrics are read one step late, so that the host never waits for
    the step it has just started; a checkpoint is only written after its last loss was seen to be finite.
    """
    saver = checkpoints.Saver(folder / "checkpoints")
    state = resumed(saver.folder, state, mesh)
    start = int(state.step)
    log = Metrics(folder, start)
    pending = None
    with Progress(name, steps, start, "step") as progress:
        for t in range(start, steps):
            state, metrics = step_fn(state, frozen, put_batch(batch_at(t), mesh), key)
            if pending is not None:
                progress.update(t, log.add(t - 1, pending))
            pending = metrics
            last = t + 1 == steps
            stop = stopping()
            if last or stop or (t + 1) % every == 0:
                progress.update(t + 1, log.add(t, pending))
                pending = None
                log.save()
                saver.save(t + 1, state)
            if stop and not last:
                saver.close()
                raise Stopped(f"{name} stopped on request after step {t + 1} of {steps}; the same command goes on from there")
    saver.close()
    return state
