"""The training step against plain gradients, on one device and eight; the loop against itself, stopped, killed and resumed."""

import json
import time
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax import checkpoints, metrics, optim, train
from cai_jax.config import Optimizer
from cai_jax.data import epochs, pack
from cai_jax.errors import InputError, Stopped
from cai_jax.metrics import NotFinite
from cai_jax.records import Drops
from cai_jax.sharding import put_batch, shardings
from cai_jax.train import TrainState, fit, init_state, language_model_loss, make_train_step

STEPS, EVERY = 6, 2
ADAM = Optimizer(learning_rate=1e-2, warmup_steps=2, weight_decay=0.01)


def examples(n=20):
    """Packed rows of two texts each, with as many targets in every row."""
    rng = np.random.default_rng(0)
    return pack([(rng.integers(2, 98, 8).tolist(), 3) for _ in range(2 * n)], 16, Drops())


def batch_at(t):
    """Three batches a pass, the last one filled up with empty rows."""
    return epochs(examples(), 8, 2, 7, "sft")[0](t)


def first_batch():
    return {k: v for k, v in batch_at(0).items() if k != "row_mask"}


def noisy_loss(params, batch, key):
    """The language model's loss, scaled by noise, so that a wrong key is seen in the parameters."""
    loss, more = language_model_loss(tiny.net())(params, batch, key)
    noise = jax.random.uniform(key)
    return loss * (1 + noise), more | {"noise": noise}


@cache
def sgd_step(mesh, microbatches=1):
    """A step whose update is the gradient itself."""
    return make_train_step(noisy_loss, optax.sgd(1.0), mesh, microbatches)


@cache
def adam_step(mesh):
    return make_train_step(noisy_loss, optim.make(ADAM, STEPS), mesh)


def adam_state(mesh):
    return init_state(tiny.copy(tiny.on(mesh)), optim.make(ADAM, STEPS), mesh)


def sgd_update(mesh, batch, microbatches=1, step=0):
    """-> (gradient by way of the new parameters, metrics)."""
    with jax.set_mesh(mesh):
        state = init_state(tiny.copy(tiny.on(mesh)), optax.sgd(1.0), mesh)._replace(step=jnp.int32(step))
        state, values = sgd_step(mesh, microbatches)(state, {}, put_batch(batch, mesh), jax.random.key(5))
    assert int(state.step) == step + 1
    return jax.tree.map(lambda old, new: old - np.asarray(new), tiny.params(), state.params), jax.device_get(values)


@jax.jit
def plain(params, b, noise):
    """Loss, entropy and gradient without any of the machinery under test: whole logits, a mask written out."""
    net = tiny.net()

    def loss(params):
        mask = (b["ends"][:, :, None] == b["ends"][:, None]) & np.tril(np.ones((16, 16), bool))[None]
        hidden, _ = net.apply({"params": params}, b["tokens"], b["positions"], mask, b["positions"], method="run")
        logp_BTV = jax.nn.log_softmax(net.apply({"params": params}, hidden, method="logits"), axis=-1)
        logp = jnp.take_along_axis(logp_BTV, b["targets"][:, :, None], axis=-1)[:, :, 0]
        entropy = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
        total = b["weights"].sum()
        return -jnp.sum(logp * b["weights"]) / total * (1 + noise), jnp.sum(entropy * b["weights"]) / total

    return jax.value_and_grad(loss, has_aux=True)(params)


def noise_of(*address):
    """The noise of (step, microbatch) under the key of `sgd_update`."""
    key = jax.random.key(5)
    for part in address:
        key = jax.random.fold_in(key, part)
    return float(jax.random.uniform(key))


# --- One step ---------------------------------------------------------------------------------------------------------
def test_losses_and_gradients_on_eight_devices_are_the_plain_ones_on_one(mesh8):
    grads, values = sgd_update(mesh8, first_batch())
    (loss, entropy), wanted = plain(tiny.params(), first_batch(), noise_of(0))
    tiny.assert_close(grads, wanted, rtol=2e-5)
    assert values.pop("weight") == first_batch()["weights"].sum() == 80
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(wanted)))
    tiny.assert_close(values, {"loss": loss, "entropy": entropy, "noise": noise_of(0), "gradient_norm": norm})


def test_microbatches_equal_the_full_batch(mesh8):
    """Every part has noise of its own; with the same rows in both parts, the whole batch's noise is the parts' mean."""
    noise = [noise_of(0, 0), noise_of(0, 1)]
    batch = {k: np.repeat(v[:4], 2, axis=0) for k, v in first_batch().items()}  # a part has every second row
    grads, values = sgd_update(mesh8, batch, microbatches=2)
    (loss, entropy), wanted = plain(tiny.params(), batch, np.mean(noise))
    tiny.assert_close(grads, wanted, rtol=2e-5)
    assert noise[0] != noise[1] and values["noise"] == pytest.approx(np.mean(noise), rel=1e-6)
    tiny.assert_close((values["loss"], values["entropy"]), (loss, entropy))


def test_microbatches_are_different_rows(mesh8):
    """Parts of like weight but unlike rows: the entropy, which the noise leaves alone, is the whole batch's."""
    _, values = sgd_update(mesh8, first_batch(), microbatches=2)
    (_, entropy), _ = plain(tiny.params(), first_batch(), 0.0)
    (_, half), _ = plain(tiny.params(), {k: np.concatenate([v[:4], v[:4]]) for k, v in first_batch().items()}, 0.0)
    assert values["entropy"] == pytest.approx(float(entropy), rel=1e-5) and abs(entropy - half) > 1e-4


def test_the_noise_of_a_step_is_its_own(mesh8):
    for t in (0, 1, 5):
        assert float(sgd_update(mesh8, first_batch(), step=t)[1]["noise"]) == pytest.approx(noise_of(t), rel=1e-6)


def test_the_state_is_donated(mesh1):
    with jax.set_mesh(mesh1):
        state = adam_state(mesh1)
        adam_step(mesh1)(state, {}, put_batch(batch_at(0), mesh1), jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_every_array_of_the_new_state_lies_by_the_rules(mesh8):
    with jax.set_mesh(mesh8):
        state, values = adam_step(mesh8)(adam_state(mesh8), {}, put_batch(batch_at(0), mesh8), jax.random.key(0))
    wanted = jax.tree.leaves(shardings(state, mesh8))
    found = jax.tree_util.tree_leaves_with_path(state)
    assert len(found) == len(wanted) == 1 + 11 * 3 + 2  # step; parameters and two moments; two counts
    for (path, x), sharding in zip(found, wanted, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), jax.tree_util.keystr(path)
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert len(split) == 3 * 8  # all but the norms, in parameters and both moments
    assert all(v.sharding.is_equivalent_to(NamedSharding(mesh8, P()), 0) for v in values.values())


def test_updates_on_eight_devices_equal_those_on_one(mesh1, mesh8):
    """Three steps of AdamW: parameters, moments and metrics."""
    out = []
    for mesh in (mesh1, mesh8):
        with jax.set_mesh(mesh):
            state, log = adam_state(mesh), []
            for t in range(3):
                state, values = adam_step(mesh)(state, {}, put_batch(batch_at(t), mesh), jax.random.key(0))
                log.append(values)
        out.append((state.params, state.opt_state, log))
    tiny.assert_close(out[1][2], out[0][2], rtol=1e-5)
    tiny.assert_close(out[1][1], out[0][1], rtol=1e-4)  # squared gradients double an error
    tiny.assert_close(out[1][0], out[0][0], rtol=1e-4)  # Adam divides by their root, so small gradients are not small steps


# --- The loop ---------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    """As a kill: nothing in the code under test may catch it."""


def run(folder: Path, mesh, data=batch_at, steps=STEPS):
    with jax.set_mesh(mesh):
        state = fit("sft", folder, adam_state(mesh), {}, adam_step(mesh), data, steps, jax.random.key(3), EVERY, mesh)
    return jax.device_get(state)


def killed_at(step):
    def data(t):
        if t == step:
            raise Killed
        return batch_at(t)

    return data


def settle(folder: Path, step: int):
    """The save that was in flight when its process was `killed` is committed after all."""
    for _ in range(1000):
        if step in checkpoints.steps(folder / "checkpoints"):
            return
        time.sleep(0.02)
    raise AssertionError(f"{folder}: the save of step {step} never ended")


@pytest.fixture(scope="module")
def whole(mesh1, tmp_path_factory):
    """A run left alone: (final state, bytes of metrics.jsonl)."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, mesh1), (folder / "metrics.jsonl").read_bytes(), folder


def assert_as_whole(whole, state, folder):
    assert tiny.same_bits(state, whole[0])
    assert (folder / "metrics.jsonl").read_bytes() == whole[1]
    assert checkpoints.steps(folder / "checkpoints") == [STEPS]


def test_a_run_logs_every_step_and_keeps_the_last_checkpoint(whole, mesh1):
    state, log, folder = whole
    lines = [json.loads(line) for line in log.decode().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert set(lines[0]) == {"step", "loss", "entropy", "weight", "noise", "gradient_norm"}
    assert [line["weight"] for line in lines] == [80, 80, 40] * 2
    assert lines[-1]["loss"] / (1 + lines[-1]["noise"]) < lines[0]["loss"] / (1 + lines[0]["noise"]) - 0.1
    assert len((folder / "timing.jsonl").read_text().splitlines()) == STEPS
    assert checkpoints.steps(folder / "checkpoints") == [STEPS]
    with jax.set_mesh(mesh1):
        saved = checkpoints.restore(folder / "checkpoints", train.abstract(adam_state(mesh1), mesh1))
    assert tiny.same_bits(jax.device_get(saved), state) and int(state.step) == STEPS


def test_the_loop_is_the_step_repeated(whole, mesh1):
    with jax.set_mesh(mesh1):
        state = adam_state(mesh1)
        for t in range(STEPS):
            state, _ = adam_step(mesh1)(state, {}, put_batch(batch_at(t), mesh1), jax.random.key(3))
    assert tiny.same_bits(jax.device_get(state), whole[0])


def test_a_finished_run_is_restored_and_not_trained_again(whole, mesh1):
    state = run(whole[2], mesh1, killed_at(0))
    assert_as_whole(whole, state, whole[2])


def test_lesson_11_stopped_and_resumed_ends_with_the_same_bits(whole, mesh1, tmp_path, monkeypatch):
    """Asked to stop at a step that is no checkpoint's: it is saved there all the same."""
    asked = []

    def data(t):
        if t == 2:
            asked.append(t)
        return batch_at(t)

    with monkeypatch.context() as m:
        m.setattr(train, "stopping", lambda: bool(asked))
        with pytest.raises(Stopped, match="sft stopped on request after step 3 of 6"):
            run(tmp_path, mesh1, data)
    assert checkpoints.steps(tmp_path / "checkpoints") == [3]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(whole[1].splitlines(keepends=True)[:3])
    assert_as_whole(whole, run(tmp_path, mesh1), tmp_path)


def test_a_stop_in_the_last_step_is_no_stop(whole, mesh1, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "stopping", lambda: bool(asked))

    def data(t):
        if t == STEPS - 1:
            asked.append(t)
        return batch_at(t)

    assert_as_whole(whole, run(tmp_path, mesh1, data), tmp_path)


@pytest.mark.parametrize("kills", [(0, 1), (3,), (4, 5, 5)], ids=str)
def test_lesson_11_killed_and_resumed_ends_with_the_same_bits(whole, mesh1, tmp_path, kills):
    """Before the first checkpoint; between two, at the edge of a pass; right behind a save, and again and again."""
    for step in kills:
        with pytest.raises(Killed):
            run(tmp_path, mesh1, killed_at(step))
        if step >= EVERY:
            settle(tmp_path, step // EVERY * EVERY)
    assert_as_whole(whole, run(tmp_path, mesh1), tmp_path)


def test_lesson_11_killed_with_a_save_in_flight_ends_with_the_same_bits(whole, mesh1, tmp_path, monkeypatch):
    """The save of step 4 is cut short: a part of it is left under a temporary name, the checkpoint before it is whole."""
    real = checkpoints.ocp.save_async

    class Lost:
        def result(self):
            raise Killed

    def cut(path, state):
        if path.name != "4":
            return real(path, state)
        part = path.with_name("4.orbax-checkpoint-tmp-123")
        (part / "d").mkdir(parents=True)
        (part / "d" / "half").write_bytes(b"\0" * 99)
        return Lost()

    with monkeypatch.context() as m:
        m.setattr(checkpoints.ocp, "save_async", cut)
        with pytest.raises(Killed):
            run(tmp_path, mesh1)
    assert checkpoints.steps(tmp_path / "checkpoints") == [2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) > 2  # what was logged behind the checkpoint goes
    assert_as_whole(whole, run(tmp_path, mesh1), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(STEPS)]


def test_lesson_13_a_run_goes_on_with_other_devices(whole, mesh1, mesh8, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, mesh8, killed_at(5))
    settle(tmp_path, 4)
    state = run(tmp_path, mesh1)
    tiny.assert_close(state.params, whole[0].params, rtol=1e-4)
    for a, b in zip(metrics.load(tmp_path), metrics.load(whole[2]), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("bad", [2, 3])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(whole, mesh1, tmp_path, bad):
    """In the step of a save, and in the one before it, whose metrics are read a step late."""

    def data(t):
        batch = batch_at(t)
        return batch | {"weights": batch["weights"] * np.float32(np.nan)} if t == bad else batch

    with pytest.raises(NotFinite, match=rf"loss.* is nan at step {bad} of .*{tmp_path.name}.*last good checkpoint is kept"):
        run(tmp_path, mesh1, data)
    settle(tmp_path, 2)
    assert checkpoints.steps(tmp_path / "checkpoints") == [2]
    assert metrics.load(tmp_path)[-1] | {"step": bad, "loss": "nan"} == metrics.load(tmp_path)[-1]
    assert_as_whole(whole, run(tmp_path, mesh1), tmp_path)  # with the data repaired


def test_a_checkpoint_of_another_model_is_refused(whole, mesh1):
    other = {**tiny.copy(tiny.on(mesh1)), "embed": {"embedding": jnp.zeros((100, 32))}}
    with jax.set_mesh(mesh1), pytest.raises(InputError, match="another model than.*params/embed/embedding"):
        fit("sft", whole[2], init_state(other, optim.make(ADAM, STEPS), mesh1), {}, None, batch_at, STEPS, None, EVERY, mesh1)


def test_a_fresh_state_has_zero_moments_that_lie_as_the_parameters(mesh8):
    state = adam_state(mesh8)
    assert isinstance(state, TrainState) and int(state.step) == 0
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(state.opt_state))
    mu = next(s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    assert jax.tree.map(lambda x: x.sharding, mu) == jax.tree.map(lambda x: x.sharding, state.params)
