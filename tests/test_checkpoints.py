"""Checkpoints come back bit by bit, on any mesh, or not at all; fingerprints see every value in its place."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from cai_jax import optim
from cai_jax.checkpoints import Saver, fingerprint, load_model, restore, save_model, steps
from cai_jax.config import Optimizer
from cai_jax.errors import InputError
from cai_jax.sharding import make_mesh, path_name, put, shardings
from cai_jax.train import TrainState, abstract, init_state


def state_on(mesh, cfg=tiny.CFG, optimizer=None):
    """A training state that looks used: no two values alike, moments and counts not zero."""
    tx = optimizer or optim.make(Optimizer(), 10)
    state = init_state(put(tiny.params(cfg), mesh), tx, mesh)
    rng = np.random.default_rng(1)
    used = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype) if x.ndim else np.full((), 7, x.dtype), state)
    return put(used._replace(params=tiny.params(cfg)), mesh)


@pytest.fixture(scope="module")
def saved(mesh8, tmp_path_factory):
    """A folder with the state of step 3, written from eight devices."""
    folder = tmp_path_factory.mktemp("saved")
    saver = Saver(folder)
    saver.save(3, state_on(mesh8))
    saver.close()
    return folder


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 2, 2), (1, 4, 1), (1, 1, 1)], ids=str)
def test_lesson_13_a_state_of_eight_devices_comes_back_on_any_number(saved, mesh8, shape):
    """Every bit of parameters and optimizer state, each array where the rules of the new mesh put it."""
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    written = state_on(mesh8)
    found = restore(saved, abstract(state_on(mesh), mesh))
    assert isinstance(found, TrainState) and tiny.same_bits(found, written)
    for (path, x), s in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(shardings(found, mesh)), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim), path_name(path)
    moment = next(x for p, x in jax.tree_util.tree_leaves_with_path(found) if path_name(p).endswith("nu/embed/embedding"))
    assert moment.addressable_shards[0].data.shape == (98 // shape[2], 32 // shape[1])


def test_a_state_of_one_device_comes_back_on_eight(mesh1, mesh8, tmp_path):
    saver = Saver(tmp_path)
    saver.save(1, state_on(mesh1))
    saver.close()
    assert tiny.same_bits(restore(tmp_path, abstract(state_on(mesh8), mesh8)), state_on(mesh1))


def test_only_the_newest_is_kept_and_the_step_can_be_named(mesh1, tmp_path):
    saver, states = Saver(tmp_path), {}
    for step in (2, 10, 9):  # by number, not by name
        states[step] = {"head": {"bias": jnp.array([float(step)])}}
        saver.save(step, states[step])
        saver.wait()
        assert steps(tmp_path) == ([step] if step != 9 else [10])
    want = abstract(states[10], mesh1)
    assert float(restore(tmp_path, want)["head"]["bias"][0]) == 10
    assert float(restore(tmp_path, want, 10)["head"]["bias"][0]) == 10
    with pytest.raises(InputError, match=r"no checkpoint 2 in .*there are \[10\]"):
        restore(tmp_path, want, 2)


def test_a_step_that_is_saved_is_not_saved_again(mesh1, tmp_path):
    saver = Saver(tmp_path)
    for value in (1.0, 2.0):
        saver.save(5, {"head": {"bias": jnp.array([value])}})
        saver.close()
    assert float(restore(tmp_path, abstract({"head": {"bias": jnp.zeros(1)}}, mesh1))["head"]["bias"][0]) == 1.0


def test_the_one_before_stays_until_the_new_one_is_committed(tmp_path):
    saver = Saver(tmp_path)
    saver.save(1, {"bias": jnp.zeros(1)})
    saver.save(2, {"bias": jnp.zeros(1)})  # waits for 1, which is now the newest that is committed
    assert 1 in steps(tmp_path)
    saver.close()
    assert steps(tmp_path) == [2]


def test_a_state_may_be_donated_while_its_save_is_in_flight(mesh1, tmp_path):
    """What is written is the state at the time of the call."""
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"embed": {"embedding": jnp.arange(1 << 20, dtype=jnp.float32).reshape(1 << 10, -1)}}
    saver = Saver(tmp_path)
    saver.save(1, state)
    for _ in range(5):
        state = change(state)
    jax.block_until_ready(state)
    saver.close()
    found = restore(tmp_path, abstract(state, mesh1))
    np.testing.assert_array_equal(found["embed"]["embedding"].ravel(), np.arange(1 << 20, dtype=np.float32))


def test_what_a_kill_left_behind_is_removed_and_never_read(saved, mesh1, tmp_path):
    os.makedirs(tmp_path / "4.orbax-checkpoint-tmp" / "state")
    (tmp_path / "4.orbax-checkpoint-tmp" / "state" / "part").write_bytes(b"half")
    assert steps(tmp_path) == []
    saver = Saver(tmp_path)
    assert list(tmp_path.iterdir()) == []
    saver.save(4, {"bias": jnp.ones(1)})
    saver.close()
    assert [p.name for p in tmp_path.iterdir()] == ["4"]


def test_no_checkpoint_is_named(mesh1, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert steps(folder) == []
        with pytest.raises(InputError, match=r"no checkpoint .*there are \[\]"):
            restore(folder, {})
    Saver(tmp_path / "nowhere").close()  # a folder that does not exist yet is no error
    with pytest.raises(InputError, match="no model at .*nowhere"):
        load_model(tmp_path / "nowhere", {})


DEEPER = {**tiny.params(), "layers": jax.tree.map(lambda x: np.concatenate([x, x]), tiny.params()["layers"])}
WIDER = {**tiny.params(), "embed": {"embedding": np.zeros((100, 32), np.float32)}}
OTHERS = {
    "another vocabulary": lambda mesh: state_on(mesh)._replace(params=WIDER),
    "another depth": lambda mesh: state_on(mesh)._replace(params=DEEPER),
    "an array more": lambda mesh: state_on(mesh)._replace(params={**tiny.params(), "head": {"bias": np.zeros(1)}}),
    "an array less": lambda mesh: state_on(mesh)._replace(params={k: v for k, v in tiny.params().items() if k != "embed"}),
    "another optimizer": lambda mesh: state_on(mesh, optimizer=optax.sgd(0.1)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused(saved, mesh1, other):
    with pytest.raises(InputError, match=r"/3 is a checkpoint of another model") as e:
        restore(saved, abstract(OTHERS[other](mesh1), mesh1))
    if other == "another vocabulary":
        assert "params/embed/embedding has shape (98, 32), wanted (100, 32)" in str(e.value)
    assert steps(saved) == [3]  # refused, not removed


def test_a_model_alone_comes_back_and_replaces_the_one_before(mesh1, mesh8, tmp_path):
    save_model(tmp_path, put(tiny.params(seed=1), mesh8))
    save_model(tmp_path, put(tiny.params(), mesh8))
    found = load_model(tmp_path, abstract(tiny.on(mesh1), mesh1))
    assert tiny.same_bits(found, tiny.params())
    with pytest.raises(InputError, match="another model"):
        load_model(tmp_path, abstract(tiny.on(mesh1, tiny.UNTIED), mesh1))


# --- Fingerprints -----------------------------------------------------------------------------------------------------
def test_a_fingerprint_is_the_same_on_every_mesh_and_another_for_other_values(mesh1, mesh8):
    wanted = fingerprint(tiny.on(mesh1))
    assert wanted == fingerprint(tiny.on(mesh8)) and len(wanted) == 64
    assert wanted != fingerprint(put(tiny.params(seed=1), mesh1))


A, B = 1.0, 2.0  # floats with few bits set, as those of rounded weights


@pytest.mark.parametrize("distance", [1, 2, 512, 4096, 65536])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fingerprint_sees_two_values_that_changed_places(dtype, distance):
    x = np.zeros(65536 + 8, np.float32)
    x[4], x[4 + distance] = A, B
    y = x.copy()
    y[4], y[4 + distance] = B, A
    assert fingerprint({"x": jnp.asarray(x, dtype)}) != fingerprint({"x": jnp.asarray(y, dtype)})


def test_a_fingerprint_sees_rows_that_changed_places_in_weights_that_were_bfloat16():
    """Sixteen rows of 4096 apart: 65,536 places, while every value has its lower 16 bits zero."""
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.normal(size=(32, 4096)), jnp.bfloat16).astype(jnp.float32))
    y = x[np.r_[16, 1:16, 0, 17:32]]
    assert fingerprint({"x": jnp.asarray(x)}) != fingerprint({"x": jnp.asarray(y)})


def test_a_fingerprint_sees_names_shapes_types_signs_and_the_smallest_change():
    x = jnp.arange(1.0, 7.0)
    trees = [
        {"x": x},
        {"y": x},
        {"x": x.reshape(2, 3)},
        {"x": x.astype(jnp.bfloat16)},
        {"x": x.at[3].set(np.nextafter(np.float32(4), np.float32(5)))},
        {"x": -x},
        {"x": x, "y": jnp.zeros(1)},
        {"x": x.astype(jnp.int32)},
    ]
    assert len({fingerprint(t) for t in trees}) == len(trees)
    assert fingerprint({"x": x}) == fingerprint({"x": jnp.asarray(np.asarray(x))})
