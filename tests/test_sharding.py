"""The mesh, the table of rules, and where arrays end up."""

import re
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax import optim, sharding
from cai_jax.config import Lora, Optimizer
from cai_jax.errors import InputError
from cai_jax.models.heads import init_head
from cai_jax.models.transformer import init_params
from cai_jax.sharding import constrain, exact_div, look_up, make_mesh, path_name, put, put_batch, shard_init, shardings, spec_of

WANTED = {  # of the reward model's parameters on any mesh
    "trunk/embed/embedding": P("model", "fsdp"),
    "trunk/final_norm/scale": P(None),
    "trunk/layers/attention/k/kernel": P(None, "fsdp", "model", None),
    "trunk/layers/attention/o/kernel": P(None, "model", None, "fsdp"),
    "trunk/layers/attention/q/kernel": P(None, "fsdp", "model", None),
    "trunk/layers/attention/v/kernel": P(None, "fsdp", "model", None),
    "trunk/layers/attention_norm/scale": P(None, None),
    "trunk/layers/mlp/down/kernel": P(None, "model", "fsdp"),
    "trunk/layers/mlp/gate/kernel": P(None, "fsdp", "model"),
    "trunk/layers/mlp/up/kernel": P(None, "fsdp", "model"),
    "trunk/layers/mlp_norm/scale": P(None, None),
    "trunk/unembed/kernel": P("fsdp", "model"),
    "head/kernel": P(None, None),
    "head/bias": P(None),
}
OF_SOME_FAMILIES = {  # behind layers/
    **{f"attention/{name}/bias": P(None, "model", None) for name in "qkv"},
    **{f"mlp/{name}/bias": P(None, "model") for name in ("gate", "up")},
    **{name: P(None, None) for name in ("attention/o/bias", "mlp/down/bias", "attention_norm/bias", "mlp_norm/bias")},
    **{f"attention/{name}/{leaf}": P(None, None) for name in ("q_norm", "k_norm") for leaf in ("scale", "bias")},
    **{f"{name}/{leaf}": P(None, None) for name in ("attention_out_norm", "mlp_out_norm") for leaf in ("scale", "bias")},
}
ADAPTERS = {  # likewise; A is split as the inputs of its kernel are, B as its outputs, the rank is not
    **{f"attention/{name}/lora_a": P(None, "fsdp", None) for name in "qkv"},
    **{f"attention/{name}/lora_b": P(None, None, "model", None) for name in "qkv"},
    **{"attention/o/lora_a": P(None, "model", None, None), "attention/o/lora_b": P(None, None, "fsdp")},
    **{f"mlp/{name}/lora_a": P(None, "fsdp", None) for name in ("gate", "up")},
    **{f"mlp/{name}/lora_b": P(None, None, "model") for name in ("gate", "up")},
    **{"mlp/down/lora_a": P(None, "model", None), "mlp/down/lora_b": P(None, None, "fsdp")},
}


def reward_init(key):
    return {"trunk": init_params(tiny.net(tiny.UNTIED), key), "head": init_head(key, tiny.UNTIED.width)}


def by_name(tree):
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_a_split_must_be_even():
    assert exact_div(12, 4, "rows") == 3
    for a, b in ((12, 5), (12, 0), (12, -4)):
        with pytest.raises(InputError, match=f"rows: 12 cannot be split evenly {b} ways"):
            exact_div(a, b, "rows")


SHAPES = [((2, 2, 2), (2, 2, 2)), ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 8, -1), (1, 8, 1))]


@pytest.mark.parametrize("shape, sizes", SHAPES)
def test_a_mesh_has_the_same_three_axes_and_at_most_one_free_size(shape, sizes):
    mesh = make_mesh(shape)
    assert mesh.axis_names == ("data", "fsdp", "model") and mesh.axis_sizes == sizes
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((-1, -1, 1), "at most one of them -1"),
        ((-1, 3, 1), "on 8 devices: 8 cannot be split evenly 3 ways"),
        ((2, 2, 1), "wants 4 devices, this machine has 8"),
        ((4, 4, 1), "wants 16 devices, this machine has 8"),
        ((0, 1, 1), "wanted three sizes"),
        ((-2, 1, 1), "wanted three sizes"),
        ((8, 1), "wanted three sizes"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_flag(shape, message):
    with pytest.raises(InputError, match=message) as e:
        make_mesh(shape)
    assert "--config.mesh=" in str(e.value)


class Pair(NamedTuple):
    left: dict
    right: list


def test_paths_of_dicts_named_tuples_and_lists_are_names():
    assert set(by_name(Pair({"a": {"b": 1}}, [2, 3]))) == {"left/a/b", "right/0", "right/1"}


def test_every_parameter_has_the_spec_of_its_one_row_and_no_row_is_idle():
    shapes = by_name(jax.eval_shape(reward_init, jax.random.key(0)))
    assert {name: spec_of(name, x.shape) for name, x in shapes.items()} == WANTED
    options = {"norm": "layer", "norm_outputs": True, "qk_norm": "head", "lora": Lora(rank=4)}
    everything = replace(tiny.UNTIED, qkv_bias=True, out_bias=True, mlp_bias=True, **options)
    more = by_name({"trunk": jax.eval_shape(lambda k: init_params(tiny.net(everything), k), jax.random.key(0))})
    found = {name.removeprefix("trunk/"): spec_of(name, x.shape) for name, x in more.items() if name not in shapes}
    in_layers = OF_SOME_FAMILIES | ADAPTERS
    assert found == {"final_norm/bias": P(None)} | {f"layers/{name}": spec for name, spec in in_layers.items()}
    used = {row for name in shapes | more for row, _ in sharding.PARAM_RULES if re.search(r"(^|/)" + row, name)}
    assert used == {pattern for pattern, _ in sharding.PARAM_RULES}


def test_optimizer_state_lies_as_its_parameters_do(mesh8):
    shapes = jax.eval_shape(reward_init, jax.random.key(0))
    state = jax.eval_shape(optim.make(Optimizer(), 10).init, shapes)
    found = {name: s.spec for name, s in by_name(shardings(state, mesh8)).items()}
    moments = {name: spec for name, spec in found.items() if "/mu/" in name or "/nu/" in name}
    assert len(moments) == 2 * len(WANTED)
    for name, spec in moments.items():
        assert spec == WANTED[name.split("/mu/")[-1].split("/nu/")[-1]], name
    assert {spec for name, spec in found.items() if name not in moments} == {P()}  # counts are scalars


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("layers/attention/z/kernel", (2, 4, 4, 4), "matched none"),
        ("preembed/embedding", (4, 4), "matched none"),
        ("embed/embedding/more", (4, 4), "matched none"),
        ("embed/embedding", (2, 4, 4), "is for rank 2"),
    ],
)
def test_a_parameter_without_a_row_is_an_error(name, shape, message):
    with pytest.raises(KeyError, match=message) as e:
        spec_of(name, shape)
    assert name in str(e.value)


def test_a_parameter_with_two_rows_is_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "PARAM_RULES", (*sharding.PARAM_RULES, (r"embedding$", P("fsdp", None))))
    with pytest.raises(KeyError, match=r"embed/embedding.*matched embed/embedding\$, embedding\$"):
        spec_of("embed/embedding", (4, 4))


@pytest.mark.parametrize("shape, axis", [((97, 32), "'model'"), ((98, 31), "'fsdp'")])
def test_a_shape_that_does_not_split_names_array_and_axis(mesh8, shape, axis):
    tree = {"embed": {"embedding": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    with pytest.raises(InputError, match=f"embed/embedding .*over the mesh axis {axis}.*--config.mesh"):
        shardings(tree, mesh8)


def test_parameters_are_born_where_they_belong_with_the_same_values_on_every_mesh(mesh1, mesh8):
    shapes = jax.eval_shape(reward_init, jax.random.key(0))

    def init(key):  # noise in one array only: drawing is what takes long to compile
        tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return tree | {"trunk": tree["trunk"] | {"embed": {"embedding": jax.random.normal(key, (98, 32))}}}

    many, one = (by_name(shard_init(init, mesh, jax.random.key(3))) for mesh in (mesh8, mesh1))
    for name, x in many.items():
        assert x.sharding == NamedSharding(mesh8, WANTED[name]), name
        np.testing.assert_array_equal(x, one[name], err_msg=name)
    assert {s.data.shape for s in many["trunk/embed/embedding"].addressable_shards} == {(49, 16)}
    assert np.unique(many["trunk/embed/embedding"]).size > 3000


def test_host_arrays_are_put_by_the_same_rules(mesh8):
    host, placed = by_name(tiny.params()), by_name(put(tiny.params(), mesh8))
    assert host.keys() == placed.keys()
    for name, x in placed.items():
        assert x.sharding == NamedSharding(mesh8, WANTED["trunk/" + name])
        np.testing.assert_array_equal(x, host[name])


def test_a_batch_is_split_over_data_and_fsdp(mesh8):
    batch = put_batch({"tokens": np.arange(24).reshape(8, 3), "lengths": np.arange(8)}, mesh8)
    assert {x.sharding for x in batch.values()} == {NamedSharding(mesh8, P(("data", "fsdp")))}
    assert {s.data.shape for s in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["tokens"], np.arange(24).reshape(8, 3))


def test_a_batch_that_does_not_split_names_the_array(mesh8):
    with pytest.raises(InputError, match="batch array 'lengths'.*6 cannot be split evenly 4 ways"):
        put_batch({"tokens": np.zeros((8, 3)), "lengths": np.zeros(6)}, mesh8)


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x


def test_constrain_lays_out_activations_on_a_mesh(mesh8):
    with jax.set_mesh(mesh8):
        y = jax.jit(lambda x: constrain(x, "batch", None, "model"))(jnp.ones((8, 3, 4)))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh8, P(("data", "fsdp"), None, "model")), 3)


@pytest.mark.parametrize("rows", [8, 3])
def test_rows_of_a_split_table_are_found_where_they_lie(rows, mesh8):
    """Values and gradients are those of plain indexing, and no device is sent the whole batch: rows that split evenly are
    exchanged, others are on every device anyway."""
    table = jax.random.normal(jax.random.key(0), (32, 8))
    index = jax.random.randint(jax.random.key(1), (rows, 5), 0, 32)
    weight = jax.random.normal(jax.random.key(2), (rows, 5, 8))
    given = lambda table: jnp.sum(look_up(table, index) * weight)  # noqa: E731
    wanted = jax.grad(given)(table)
    with jax.set_mesh(mesh8):
        split = jax.device_put(table, NamedSharding(mesh8, P("model", "fsdp")))
        found = jax.jit(lambda table: look_up(table, index))
        np.testing.assert_array_equal(found(split), table[index])
        gradient = jax.jit(jax.grad(given))(split)
        text = found.lower(split).compile().as_text()
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)
    assert gradient.sharding.spec == P("model", "fsdp")
    if rows == 8:
        assert "all-to-all" in text and f"f32[{rows},5,8]" not in text
