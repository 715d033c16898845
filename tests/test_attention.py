"""Every implementation of attention against the reference, and which one is chosen. Kernels of TPUs are interpreted."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import topologies
from jax.sharding import NamedSharding

from cai_jax import stages
from cai_jax.checks import ConfigError, resolve
from cai_jax.config import default
from cai_jax.experience import policy_and_value
from cai_jax.models import kernels
from cai_jax.models.attention import packed_mask
from cai_jax.models.cache import Cache, empty
from cai_jax.models.kernels import Rows, choose, paged
from cai_jax.models.transformer import Transformer, cast_matrices, init_params, unstack
from cai_jax.score import hidden_states, reward_scores, row_batch
from cai_jax.sharding import BATCH, P, make_mesh, path_name, shardings
from cai_jax.slots import Rules, decode, new, serving
from cai_jax.stages import dpo, reward
from cai_jax.train import language_model_loss

F32, BF16 = jnp.float32, jnp.bfloat16


# --- Which one --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wanted, found, texts, dtype, head_dim, cap, length, even, by",
    [
        ("auto", "cpu", "alone", F32, 128, 0.0, 1024, True, "xla"),
        ("auto", "gpu", "alone", BF16, 128, 0.0, 1024, True, "xla"),  # AMD's, or one before Ampere
        ("auto", "cudnn", "alone", BF16, 128, 0.0, 1024, True, "cudnn"),
        ("auto", "cudnn", "alone", jnp.float16, 64, 0.0, 30, True, "cudnn"),
        ("auto", "cudnn", "packed", BF16, 128, 0.0, 1024, True, "xla"),
        ("auto", "cudnn", "trees", BF16, 128, 0.0, 1024, True, "xla"),
        ("auto", "cudnn", "alone", F32, 128, 0.0, 1024, True, "xla"),
        ("auto", "cudnn", "alone", BF16, 256, 0.0, 1024, True, "xla"),
        ("auto", "cudnn", "alone", BF16, 100, 0.0, 1024, True, "xla"),
        ("auto", "cudnn", "alone", BF16, 128, 50.0, 1024, True, "xla"),
        ("auto", "cudnn", "alone", BF16, 128, 0.0, 1023, True, "xla"),
        ("auto", "cudnn", "alone", BF16, 128, 0.0, 1024, False, "xla"),
        ("cudnn", "cudnn", "trees", BF16, 128, 0.0, 1024, True, "cudnn"),
        ("cudnn", "cudnn", "alone", BF16, 128, 50.0, 1024, True, "xla"),
        ("auto", "tpu", "trees", BF16, 128, 0.0, 1024, True, "splash"),
        ("auto", "tpu", "alone", F32, 80, 50.0, 384, True, "splash"),
        ("auto", "tpu", "alone", BF16, 128, 0.0, 192, True, "xla"),
        ("auto", "tpu", "alone", BF16, 128, 0.0, 1, True, "xla"),
        ("auto", "tpu", "packed", BF16, 128, 0.0, 1024, False, "xla"),
        ("splash", "cpu", "trees", F32, 8, 0.0, 128, True, "splash"),  # as asked, wherever it is compiled for
        ("splash", "tpu", "trees", BF16, 128, 0.0, 100, True, "xla"),
        ("xla", "cudnn", "alone", BF16, 128, 0.0, 1024, True, "xla"),
        ("xla", "tpu", "alone", BF16, 128, 0.0, 1024, True, "xla"),
    ],
)
def test_the_choice_within_rows(wanted, found, texts, dtype, head_dim, cap, length, even, by):
    assert choose(wanted, found, texts, dtype, head_dim, cap, length, even) == by


@pytest.mark.parametrize(
    "wanted, found, dtype, head_dim, slots, window, even, yes",
    [
        ("auto", "tpu", BF16, 128, 1024, 0, True, True),
        ("auto", "tpu", BF16, 256, 768, 0, True, True),
        ("auto", "tpu", BF16, 128, 512, 0, True, False),  # one block: nothing to spare
        ("auto", "tpu", BF16, 128, 1000, 0, True, False),
        ("auto", "tpu", BF16, 64, 1024, 0, True, False),
        ("auto", "tpu", F32, 128, 1024, 0, True, False),
        ("auto", "tpu", jnp.int8, 128, 1024, 0, True, False),
        ("auto", "tpu", BF16, 128, 1024, 1023, True, False),
        ("auto", "tpu", BF16, 128, 1024, 1024, True, True),  # a window that holds all
        ("auto", "tpu", BF16, 128, 1024, 0, False, False),
        ("auto", "cudnn", BF16, 128, 1024, 0, True, False),
        ("auto", "cpu", BF16, 128, 1024, 0, True, False),
        ("xla", "tpu", BF16, 128, 1024, 0, True, False),
        ("splash", "cpu", BF16, 128, 1024, 0, True, True),
    ],
)
def test_the_choice_in_a_decode_step(wanted, found, dtype, head_dim, slots, window, even, yes):
    assert paged(wanted, found, dtype, head_dim, slots, window, even) == yes


@pytest.mark.parametrize(
    "backend, capability, name",
    [
        ("cpu", None, "cpu"),
        ("tpu", None, "tpu"),
        ("gpu", "8.0", "cudnn"),
        ("gpu", "12.0", "cudnn"),
        ("gpu", "7.5", "gpu"),
        ("gpu", "gfx942", "gpu"),
        ("gpu", None, "gpu"),
    ],
)
def test_the_machine(backend, capability, name, monkeypatch):
    device = SimpleNamespace(compute_capability=capability) if capability else SimpleNamespace()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert kernels.machine() == name


# What a network tells of its rows. Two layers, of which the first slides in the second configuration.
GEMMA = replace(tiny.CFG, window=50, sliding=(True, False), attention_cap=2.0, query_scale=0.3)


@pytest.mark.parametrize(
    "cfg, texts, options, told",
    [
        (tiny.CFG, "trees", {}, [("trees", 0)]),
        (tiny.CFG, "packed", {}, [("packed", 0)]),
        (tiny.CFG, "alone", {"remat": "full"}, [("alone", 0)]),
        (tiny.CFG, "packed", {"unrolled": True, "remat": "full"}, [("packed", 0)] * 2),
        (GEMMA, "packed", {"unrolled": True}, [("packed", 50), ("packed", 0)]),
        (GEMMA, "packed", {}, [("trees", 0)]),  # one program for layers that slide and layers that do not
    ],
)
def test_what_is_known_of_rows_reaches_the_kernels(cfg, texts, options, told, monkeypatch):
    net, params, ends = tiny.net(cfg, texts=texts, **options), tiny.params(cfg), jnp.zeros((2, 16), jnp.int32)
    found, within = [], kernels.within
    monkeypatch.setattr(kernels, "within", lambda *args: found.append(args[-1]) or within(*args))
    jax.eval_shape(net.apply, {"params": unstack(params, 2) if net.unrolled else params}, ends, ends, ends)
    assert [(rows.texts, rows.window) for rows in found[: len(told)]] == told
    assert all(rows.ends_BT.shape == (2, 16) for rows in found if rows.texts != "trees")


def test_each_layer_says_in_a_decode_step_whether_it_slides(monkeypatch):
    net, params = tiny.net(GEMMA, unrolled=True), unstack(jax.tree.map(jnp.asarray, tiny.params(GEMMA)), 2)
    found, behind = [], kernels.behind
    monkeypatch.setattr(kernels, "behind", lambda *args: found.append(args[-1]) or behind(*args))
    cache = Cache(empty(GEMMA, 2, 16, F32), jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32))
    jax.eval_shape(partial(net.apply, method="extend"), {"params": params}, jnp.zeros((2, 1), jnp.int32), cache)
    assert found == [50, 0]


def test_unknown_texts_are_refused():
    with pytest.raises(ValueError, match="texts='rows': wanted one of trees, packed, alone"):
        init_params(tiny.net(texts="rows"), jax.random.key(0))


def test_the_key_is_checked_and_reaches_every_network():
    cfg = default()
    cfg.model.attention = "splash"
    assert stages.architecture(resolve(cfg), "base").attention == "splash"
    cfg.model.attention = "flash"
    with pytest.raises(ConfigError, match="--config.model.attention='flash': wanted one of auto, xla, cudnn, splash"):
        resolve(cfg)


# --- Rows -------------------------------------------------------------------------------------------------------------
ROWS = {  # three blocks of 128 tokens; the last row holds nothing
    "alone": np.repeat([[300, 0], [384, 384], [0, 0]], [300, 84], axis=1),
    "packed": np.repeat([[200, 331, 0], [384, 384, 384], [0, 0, 0]], [200, 131, 53], axis=1),
    # A beginning of 150 with three ends, the last of two branches, and padding; one with two ends, and a text of its own.
    "trees": np.repeat(
        [[320, 200, 260, 320, 300, 320, 0], [260, 200, 260, 384, 384, 384, 384], [0] * 7], [150, 50, 60, 20, 20, 20, 64], axis=1
    ),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Pallas kernels as plain operations; the names of those that were traced. They stay so: other tests take other shapes."""
    from jax.experimental import pallas

    names, plain = [], pallas.pallas_call

    def call(*args, **options):
        names.append(options.get("name") or "paged")
        return plain(*args, **options | {"interpret": True})

    monkeypatch.setattr(pallas, "pallas_call", call)
    return names


def normal(*shape, dtype=F32, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def attended(cfg, rows: Rows, q, k, v):
    """The outputs of real tokens. Padding's may be any numbers, but numbers: losses multiply them by zero."""
    at, ends_BT = jnp.arange(q.shape[1]), rows.ends_BT
    mask_BTT = packed_mask(ends_BT) & ((at[:, None] - at[None] < rows.window) | (rows.window == 0))[None]
    out = kernels.within(cfg, q, k, v, mask_BTT, rows)
    return jnp.where((ends_BT > 0)[:, :, None, None], out, out * 0)


def with_gradients(cfg, rows: Rows):
    """-> f(q, k, v): the outputs, and the gradients of a sum in which each of them counts differently."""

    def loss(*given):
        out = attended(cfg, rows, *given)
        return jnp.sum(jnp.sin(out.astype(F32) * 3)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    "texts, window, options",
    [
        ("packed", 50, {"attention_cap": 2.0}),
        ("alone", 0, {"query_scale": 0.6}),
        ("trees", 50, {"attention_cap": 2.0}),
    ],
)
def test_lesson_25_splash_is_the_reference_forward_and_backward(texts, window, options, interpreted):
    rows = Rows(texts, jnp.asarray(ROWS[texts], jnp.int32), window)
    cfg, given = replace(tiny.CFG, **options), (normal(3, 384, 4, 8), normal(3, 384, 2, 8), normal(3, 384, 2, 8, seed=1))
    found, wanted = (with_gradients(replace(cfg, attention=name), rows)(*given) for name in ("splash", "xla"))
    tiny.assert_close(found, wanted)
    assert {name.split("_")[2] for name in interpreted} == {"fwd", "dq", "dkv"}
    assert {"segmented" in name for name in interpreted} == {texts != "trees"}


def test_splash_on_eight_devices_is_the_reference(mesh8, interpreted):
    """Two rows or one key head would not split evenly: those go to the reference."""
    rows = Rows("trees", jnp.asarray(np.repeat([[128, 100, 128]] * 4, [50, 50, 28], axis=1), jnp.int32))
    given = normal(4, 128, 4, 8), normal(4, 128, 2, 8), normal(4, 128, 2, 8, seed=1)
    with jax.set_mesh(mesh8):
        found, wanted = (with_gradients(replace(tiny.CFG, attention=a), rows)(*given) for a in ("splash", "xla"))
    tiny.assert_close(found, wanted)
    traced = len(interpreted)
    assert traced
    for uneven in ((2, 2), (4, 1)):
        q, k = normal(uneven[0], 128, 4, 8), normal(uneven[0], 128, uneven[1], 8)
        fewer = rows._replace(ends_BT=rows.ends_BT[: len(q)])
        with jax.set_mesh(mesh8):
            jax.eval_shape(with_gradients(replace(tiny.CFG, attention="splash"), fewer), q, k, k)
    assert len(interpreted) == traced


@pytest.mark.parametrize("texts, window", [("alone", 0), ("alone", 50), ("packed", 50), ("trees", 0)])
def test_lesson_25_cudnn_is_asked_for_the_reference(texts, window, monkeypatch):
    """What is asked of it, of JAX's own attention. Weights are rounded to bfloat16 once, and so is their product with values:
    either may come out on the other side, off by 2 ** -8 of it."""
    rows = Rows(texts, jnp.asarray(ROWS[texts], jnp.int32), window)
    given = normal(3, 384, 4, 8, dtype=BF16), normal(3, 384, 2, 8, dtype=BF16), normal(3, 384, 2, 8, dtype=BF16, seed=1)
    asked, plain = [], jax.nn.dot_product_attention

    def here(*args, implementation, **options):
        asked.append((implementation, "mask" in options))
        with jax.numpy_dtype_promotion("standard"):
            return plain(*args, **options, implementation="xla")

    cfg = replace(tiny.CFG, query_scale=0.6)
    wanted = jax.jit(partial(attended, replace(cfg, attention="xla"), rows))(*given).astype(F32)
    monkeypatch.setattr(jax.nn, "dot_product_attention", here)
    found = jax.jit(partial(attended, replace(cfg, attention="cudnn"), rows))(*given).astype(F32)
    assert asked == [("cudnn", texts != "alone")]
    assert found.dtype == wanted.dtype and jnp.max(jnp.abs(found - wanted)) < 2**-7 * jnp.max(jnp.abs(given[2].astype(F32)))
    assert jnp.max(jnp.abs(wanted)) > 1


@pytest.mark.parametrize("texts", ["alone", "packed"])
def test_cudnn_gets_the_rows_and_heads_of_a_device(texts, mesh8, monkeypatch):
    rows = Rows(texts, jnp.asarray(np.resize(ROWS[texts], (4, 384)), jnp.int32), 0)
    given = normal(4, 384, 4, 8, dtype=BF16), normal(4, 384, 2, 8, dtype=BF16), normal(4, 384, 2, 8, dtype=BF16, seed=1)
    asked, plain = [], jax.nn.dot_product_attention

    def here(q, k, v, *, implementation, **options):
        asked.append((q.shape, k.shape))
        with jax.numpy_dtype_promotion("standard"):
            return plain(q, k, v, **options, implementation="xla")

    wanted = jax.jit(partial(attended, replace(tiny.CFG, attention="xla"), rows))(*given).astype(F32)
    monkeypatch.setattr(jax.nn, "dot_product_attention", here)
    with jax.set_mesh(mesh8):
        found = jax.jit(partial(attended, replace(tiny.CFG, attention="cudnn"), rows))(*given).astype(F32)
    assert asked == [((1, 384, 2, 8), (1, 384, 1, 8))]
    assert jnp.max(jnp.abs(found - wanted)) < 2**-7 * jnp.max(jnp.abs(given[2].astype(F32)))


@pytest.mark.parametrize("texts, window, call", [("alone", 50, "fmhaSoftmax"), ("trees", 0, "fmhaScaleBiasSoftmax")])
def test_cudnn_is_called_forward_and_backward(texts, window, call, monkeypatch):
    """Lowered for a GPU, which takes none."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    rows = Rows(texts, jnp.asarray(ROWS[texts], jnp.int32), window)
    q, k = (jax.ShapeDtypeStruct((3, 384, n, 64), BF16) for n in (4, 2))
    f = with_gradients(replace(tiny.CFG, attention="cudnn"), rows)
    text = f.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@__cudnn${call}(") == 1 and text.count(f"@__cudnn${call}Backward(") == 1
    assert text.count(f"\\22sliding_window_length\\22: {window}") == 2 and text.count(": \\22CAUSAL\\22") == 2


# --- Decode steps -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads, cap, eight", [(4, 0.0, False), (16, 2.0, True)])
def test_lesson_25_a_decode_step_over_pages_is_the_reference(heads, cap, eight, mesh1, mesh8, interpreted):
    """Rows that hold little, much, an edge of a page and, done, everything; what stands behind is junk."""
    cfg = replace(tiny.CFG, num_heads=heads, attention_cap=cap, query_scale=0.05)
    slots = {name: normal(4, 2, 768, 128, dtype=BF16, seed=i) for i, name in enumerate("kv")}
    filled_B, at = jnp.array([2, 255, 600, 768], jnp.int32), jnp.arange(768)
    junk_BS = at[None] > filled_B[:, None]
    slots = {name: jnp.where(junk_BS[:, None, :, None], jnp.asarray(300, BF16), x) for name, x in slots.items()}

    @partial(jax.jit, static_argnums=0)
    def step(cfg, q, slots):
        return kernels.behind(cfg, q, None, slots, ~junk_BS[:, None], filled_B)

    with jax.set_mesh(mesh8 if eight else mesh1):
        q = normal(4, 1, heads, 128)
        found, wanted = (step(replace(cfg, attention=name), q, slots) for name in ("splash", "xla"))
    tiny.assert_close(found, wanted)
    assert interpreted == ["paged"] and np.abs(wanted).max() < 5


def test_pages_are_for_single_tokens_without_a_prefix(interpreted):
    cfg, dtype = replace(tiny.CFG, attention="splash"), BF16
    slots, filled_B = dict.fromkeys("kv", normal(2, 2, 768, 128, dtype=dtype)), jnp.zeros(2, jnp.int32)
    prefix = dict.fromkeys("kv", normal(2, 16, 128, dtype=dtype))
    for T, before in ((2, None), (1, prefix)):
        q, S = normal(2, T, 4, 128, dtype=dtype), 768 + (16 if before else 0)
        jax.eval_shape(partial(kernels.behind, cfg), q, before, slots, jnp.ones((2, T, S), bool), filled_B)
    assert not interpreted


# --- For a TPU, which takes none --------------------------------------------------------------------------------------
LARGE = replace(tiny.CFG, width=256, num_heads=8, num_kv_heads=4, head_dim=128, max_length=1024, attention="splash")
SLOTS, BATCH_SIZE = 1024, 32


def laid_out(tree, specs, mesh):
    """Shapes with their places. specs: a function of an array's path and rank."""

    def one(path, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs(path_name(path), x.ndim)))

    return jax.tree_util.tree_map_with_path(one, tree)


def traced(mesh, cache="auto"):
    """-> what trains on trees and packed rows, and decodes, on a mesh of any devices."""
    net, shape = Transformer(LARGE, BF16), jax.ShapeDtypeStruct
    shapes = jax.eval_shape(lambda: cast_matrices(init_params(net, jax.random.key(0)), BF16))
    params = jax.tree.map(lambda x, s: shape(x.shape, x.dtype, sharding=s), shapes, shardings(shapes, mesh))
    ends = shape((8, 256), jnp.int32, sharding=NamedSharding(mesh, P(BATCH)))

    def loss(params, ends_BT):
        batch = {"tokens": ends_BT % 98, "positions": ends_BT % 7, "ends": ends_BT}
        both = (hidden_states(net, params, batch, texts) for texts in ("trees", "packed"))
        return sum(jnp.sum(x.astype(F32) ** 2) for x in both)

    served = laid_out(jax.eval_shape(partial(serving, net), params), lambda *_: P(), mesh)
    slots = jax.eval_shape(lambda: new(net, BATCH_SIZE, SLOTS, 32, cache))
    slots = laid_out(slots, lambda name, rank: P(BATCH, "model") if name.startswith("layers") else P(), mesh)
    rules = laid_out(Rules(shape((2,), jnp.int32), shape((2, 98), jnp.int8)), lambda *_: P(), mesh)
    unrolled, until = net.clone(unrolled=True), laid_out(shape((), jnp.int32), lambda *_: P(), mesh)
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).trace(params, ends), decode.trace(unrolled, served, None, slots, rules, until)


def test_splash_and_pages_lower_for_tpus_on_a_mesh(mesh8):
    """Layers share what stands in the program: a kernel forward, and backward by queries and by keys, for trees and for packed
    rows; and one in a decode step."""
    train, decoding = (x.lower(lowering_platforms=("tpu",)).as_text() for x in traced(mesh8))
    assert train.count("tpu_custom_call") == 6 and decoding.count("tpu_custom_call") == 1


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_decode_step_on_tpus_keeps_the_cache_where_it_is(cache, monkeypatch):
    """Compiled for eight where libtpu is installed: the cache goes in and out in one place, no step copies it, turns it or
    makes it wider, and a token is written in one operation: the loop over steps is the only one."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it uses no device that another process might use
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # nor one of a cloud
    devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
    train, decoding = traced(make_mesh((2, 2, 2), devices), cache)
    compiled = decoding.lower().compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    kept, size = ("bf16", 2) if cache == "auto" else ("s8", 1)
    assert memory.alias_size_in_bytes >= 4 * size * SLOTS * BATCH_SIZE * LARGE.num_kv_heads * LARGE.head_dim // 8
    made = re.findall(rf" = (\w+)\[(\d+),(\d+),{SLOTS},{LARGE.head_dim}\]\S* ([\w-]+)\(", text)
    assert {dtype for dtype, *_ in made} == {kept}
    assert max(int(rows) * int(heads) for _, rows, heads, _ in made) == BATCH_SIZE // 4 * LARGE.num_kv_heads // 2
    assert not {operation for *_, operation in made} & {"copy", "transpose", "convert", "select", "concatenate"}
    assert text.count(" while(") == 1
    assert text.count("tpu_custom_call") == (2 if cache == "auto" else 0)
    if cache == "auto":
        assert train.lower().compile().as_text().count("tpu_custom_call") >= 6


def test_kernels_are_told_no_less_than_what_rows_hold(monkeypatch):
    """On a CPU all is one; where a kernel runs, a tree taken for texts one after another would see what it must not."""
    told, plain = [], kernels.within
    monkeypatch.setattr(kernels, "within", lambda *args: (told.append(args[-1].texts), plain(*args))[1])
    net, params = tiny.net(), jax.tree.map(jnp.asarray, tiny.params())
    head = {"kernel": jnp.ones((32, 1)), "bias": jnp.zeros(1)}
    tokens, lengths = (jnp.asarray(x) for x in tiny.rows([8, 5], 8))
    rows = row_batch(tokens, lengths) | {"targets": tokens, "weights": jnp.ones((2, 8)), "next": tokens, "answer": tokens}
    pair = {"last": jnp.zeros((2, 1, 2), jnp.int32), "at": tokens * 0, "owner": tokens * 0}
    cases = {
        "packed": [
            lambda: language_model_loss(net)(params, rows, None),
            lambda: policy_and_value(net, {"policy": params, "value": {"head": head, "trunk": params}}, rows, 1.0),
        ],
        "alone": [lambda: reward_scores(net, {"trunk": params, "head": head}, tokens, lengths)],
        "trees": [
            lambda: reward.pair_scores(net, {"trunk": params, "head": head}, rows | pair),
            lambda: dpo.response_logprobs(net, params, rows | pair),
        ],
    }
    for texts, calls in cases.items():
        for call in calls:
            told.clear()
            jax.eval_shape(call)
            assert told and set(told) == {texts}
