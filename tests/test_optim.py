"""The optimizer on what is trained: float32 inside, bfloat16 rounded at random, and what is frozen left alone."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import optim
from cai_jax.config import Lora, Optimizer
from cai_jax.models import lora
from cai_jax.models.transformer import Transformer, cast_matrices
from cai_jax.sharding import put, put_batch
from cai_jax.train import fit, init_state, language_model_loss, make_train_step

STEADY = Optimizer(learning_rate=1e-4, final_ratio=1.0)


def batch(rows=8):
    tokens, lengths = tiny.rows([12] * rows, 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    weights = np.ones(tokens.shape, np.float32)
    ends = np.full(tokens.shape, 12, np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "positions": positions,
        "ends": ends,
        "weights": weights,
    }


def test_bfloat16_keeps_the_mean_of_updates_that_rounding_to_nearest_loses():
    """A step of bfloat16 at 1 is 2^-7: an update of a tenth of it must move one of ten."""
    x, step = jnp.ones((200, 100), jnp.bfloat16), 2.0**-7
    for share in (0.1, 0.5, -0.25):  # below 1 the steps are half as large
        moved = optim.apply({"w": x}, {"w": jnp.full(x.shape, share * step)}, jax.random.key(0))["w"]
        assert moved.dtype == jnp.bfloat16 and set(np.unique(moved.astype(jnp.float32))) <= {1 - step / 2, 1.0, 1 + step}
        assert np.mean(moved.astype(jnp.float32) - 1) == pytest.approx(share * step, abs=5 * step / 2 / 20_000**0.5)
        assert (x + jnp.full(x.shape, 0.1 * step, jnp.bfloat16) == x).all()  # nearest: nothing moves


def test_what_bfloat16_holds_is_not_moved_and_float32_is_a_plain_sum():
    params = {"w": jnp.array([1.0, -3.5, 0.0, 1e-3], jnp.bfloat16), "s": jnp.array([0.1, 0.2])}
    zero = optim.apply(params, {"w": jnp.zeros(4), "s": jnp.zeros(2)}, jax.random.key(1))
    assert tiny.same_bits(zero, params)
    updates = {"w": jnp.array([0.5, -0.5, 2.0, 0.0]), "s": jnp.array([1e-6, 2e-6])}
    out = optim.apply(params, updates, jax.random.key(2))
    np.testing.assert_array_equal(out["w"].astype(jnp.float32), [1.5, -4.0, 2.0, np.float32(params["w"][3])])
    assert tiny.same_bits(out["s"], params["s"] + updates["s"])


def test_what_is_not_a_number_stays_none():
    bad = jax.lax.bitcast_convert_type(jnp.array([0x7FFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000], jnp.uint32), jnp.float32)
    out = optim.apply({"w": jnp.zeros(4, jnp.bfloat16)}, {"w": bad}, jax.random.key(0))["w"].astype(jnp.float32)
    assert jnp.isnan(out[:2]).all() and out[2] == jnp.inf and out[3] == -jnp.inf


def trained(mesh, dtype, steps=60):
    """-> (start, end) of a model whose matrices are trained in `dtype`, as NumPy float32, and the state."""
    with jax.set_mesh(mesh):
        tx = optim.make(STEADY, steps)
        start = cast_matrices(put(tiny.params(), mesh), dtype)
        state = init_state(tiny.copy(start), tx, mesh)
        step = make_train_step(language_model_loss(tiny.net()), tx, mesh)
        for _ in range(steps):
            state, metrics = step(state, {}, put_batch(batch(), mesh), jax.random.key(0))
    wide = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), (start, state.params))
    return *wide, state, float(metrics["loss"])


def test_training_in_bfloat16_goes_where_float32_goes(mesh1, mesh8):
    """Steps of 1e-4 on weights of 0.2 are a tenth of bfloat16's there: to nearest nearly all would be lost."""
    (a, b, state, loss), (c, d, _, wanted) = trained(mesh1, jnp.bfloat16), trained(mesh1, jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim > 1} == {jnp.dtype("float32")}
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and state.params["final_norm"]["scale"].dtype == jnp.float32
    moved, wanted_moves = (
        np.concatenate([np.ravel(y - x) for x, y in zip(*map(jax.tree.leaves, p), strict=True)]) for p in ((a, b), (c, d))
    )
    along = moved @ wanted_moves / (wanted_moves @ wanted_moves)
    assert along == pytest.approx(1, abs=0.1) and loss == pytest.approx(wanted, abs=0.02)
    _, sharded, _, _ = trained(mesh8, jnp.bfloat16, steps=1)
    _, alone, _, _ = trained(mesh1, jnp.bfloat16, steps=1)
    same = [np.mean(x == y) for x, y in zip(jax.tree.leaves(sharded), jax.tree.leaves(alone), strict=True)]
    assert min(same) > 0.9  # the same noise; sums in another order round some the other way


def test_only_the_adapter_is_trained_and_the_frozen_weights_stay(mesh1):
    cfg = replace(tiny.CFG, lora=Lora(rank=2))
    with jax.set_mesh(mesh1):
        net, frozen = Transformer(cfg), tiny.copy(tiny.on(mesh1))
        tx = optim.make(replace(STEADY, learning_rate=1e-2), 5)
        state = init_state(put(lora.init(cfg, jax.random.key(0)), mesh1), tx, mesh1)
        step, losses = make_train_step(language_model_loss(net), tx, mesh1, microbatches=2), []
        for _ in range(5):
            state, metrics = step(state, frozen, put_batch(batch(), mesh1), jax.random.key(0))
            losses.append(float(metrics["loss"]))
        base = float(language_model_loss(tiny.net())(frozen, put_batch(batch(), mesh1), None)[0])
    assert tiny.same_bits(frozen, tiny.on(mesh1))
    assert losses[0] == pytest.approx(base, rel=1e-5) and losses[-1] < losses[0] - 0.05
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 1]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))


def test_lesson_11_an_adapter_killed_and_resumed_ends_with_the_same_bits(mesh1, tmp_path):
    """And the state that a restored one replaces is let go: both at once might not fit."""
    cfg, tx = replace(tiny.CFG, lora=Lora(rank=2)), optim.make(STEADY, 6)

    def run(folder, kill_at=None):
        def batch_at(t):
            if t == kill_at:
                raise KeyboardInterrupt
            return batch()

        with jax.set_mesh(mesh1):
            step = make_train_step(language_model_loss(Transformer(cfg)), tx, mesh1)
            start = init_state(put(lora.init(cfg, jax.random.key(0)), mesh1), tx, mesh1)
            return start, fit("sft", folder, start, tiny.on(mesh1), step, batch_at, 6, jax.random.key(1), 2, mesh1)

    _, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill_at=5)
    end = time.monotonic() + 60
    while not (tmp_path / "killed/checkpoints/4").exists():  # written by a thread that a kill would have ended
        assert time.monotonic() < end, "a checkpoint is never committed"
        time.sleep(0.05)
    start, resumed = run(tmp_path / "killed")
    assert int(resumed.step) == 6 and tiny.same_bits(resumed, whole)
    assert all(x.is_deleted() for x in jax.tree.leaves(start))
