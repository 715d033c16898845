"""The decoder: who sees whom, each part against a plain reference, and every way of running it against the others."""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from cai_jax import slots
from cai_jax.config import Lora
from cai_jax.data import pack
from cai_jax.models import attention, layers
from cai_jax.models.attention import Rope, attend, packed_mask, rope_turns, rotate
from cai_jax.models.cache import Cache, empty
from cai_jax.models.transformer import REMAT, init_params, unstack
from cai_jax.records import Drops
from cai_jax.score import hidden_states, row_batch
from cai_jax.sharding import path_name, put_batch
from cai_jax.slots import serving

PACKED = {  # one row: five tokens, four tokens, three of padding; no token stands twice
    "tokens": np.arange(2, 14)[None].astype(np.int32),
    "positions": np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], np.int32),
    "ends": np.array([[5, 5, 5, 5, 5, 9, 9, 9, 9, 0, 0, 0]], np.int32),
}


@pytest.mark.parametrize("unrolled", [False, True])
def test_causality_by_gradient(unrolled):
    """What token t's state feels of token s: nothing of later tokens, other segments and padding, something of all the rest."""
    net, batch, params = tiny.net(unrolled=unrolled), PACKED, tiny.params()
    direction_D = jnp.linspace(-1.0, 2.0, 32) ** 3

    def felt(embedding_VD, t):
        hidden = hidden_states(net, params | {"embed": {"embedding": embedding_VD}}, batch)
        return jnp.sum(hidden[0, t] * direction_D)

    grads_TVD = jax.jit(jax.vmap(jax.grad(felt), in_axes=(None, 0)))(params["embed"]["embedding"], jnp.arange(12))
    influence_TT = np.abs(np.asarray(grads_TVD)).max(axis=-1)[:, batch["tokens"][0]]
    end = batch["ends"][0]
    allowed = (end[:, None] == end[None]) & (np.arange(12)[:, None] >= np.arange(12)[None])
    real = end > 0
    assert (influence_TT[real][:, :][~allowed[real]] == 0).all()
    assert (influence_TT[real][allowed[real]] > 1e-6).all()


def test_the_mask_of_packed_rows():
    mask = np.asarray(packed_mask(jnp.array([[2, 2, 3, 0]])))[0]
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_is_a_turn_of_complex_numbers(theta):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 50, 127], [3, 3, 0, 9, 100]], np.int32)
    turned = np.zeros(x.shape)
    for b in range(2):
        for t in range(5):
            for j in range(4):  # the pair (j, j + H / 2) is one complex number
                z = (x[b, t, :, j] + 1j * x[b, t, :, j + 4]) * np.exp(1j * positions[b, t] * theta ** (-2 * j / 8))
                turned[b, t, :, j], turned[b, t, :, j + 4] = z.real, z.imag
    np.testing.assert_allclose(rotate(x, rope_turns(Rope(theta), 8, positions)), turned, atol=5e-5)


def test_rope_makes_attention_a_function_of_the_distance():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 6, 1, 8)).astype(np.float32)
    scores = [
        np.asarray(jnp.einsum("btnh,bsnh->ts", *(rotate(x, rope_turns(Rope(), 8, at)) for x in (q, k))))
        for at in (np.arange(6)[None], np.arange(6)[None] + 70)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_lesson_25_grouped_query_attention_is_the_explicit_loop():
    rng = np.random.default_rng(2)
    B, T, S, P, N, K, H = 2, 3, 5, 2, 6, 2, 4  # the first P of what is attended to are the same for all rows
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    k[1, :, :P], v[1, :, :P] = k[0, :, :P], v[0, :, :P]
    mask = rng.random((B, T, S)) < 0.6
    mask[:, :, 0] = True
    wanted = np.zeros((B, T, N, H))
    for b in range(B):
        for t in range(T):
            for n in range(N):
                group = n // (N // K)
                seen = np.flatnonzero(mask[b, t])
                scores = np.array([q[b, t, n] @ k[b, group, s] / H**0.5 for s in seen], np.float64)
                weights = np.exp(scores - scores.max())
                wanted[b, t, n] = sum(w * v[b, group, s] for w, s in zip(weights / weights.sum(), seen, strict=True))
    np.testing.assert_allclose(attend(q, [{"k": k, "v": v}], mask), wanted, atol=1e-6)
    parts = [{"k": k[0, :, :P], "v": v[0, :, :P]}, {"k": k[:, :, P:], "v": v[:, :, P:]}]
    np.testing.assert_allclose(attend(q, parts, mask), wanted, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
def test_attention_by_blocks_of_queries_is_attention_at_once(monkeypatch, causal, prefix):
    """Values and gradients, of blocks that divide the tokens and of others. Not causal: some see what is behind them."""
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 12, 8)), jnp.float32) for n in (4, 2, 2))
    parts = [{"k": k[0, :, :prefix], "v": v[0, :, :prefix]}] * bool(prefix) + [{"k": k, "v": v}]
    seen = rng.random((2, 12, 12)) < 0.6
    seen = (np.tril(seen) if causal else seen) | np.eye(12, dtype=bool)
    mask = jnp.asarray(np.concatenate([np.ones((2, 12, prefix), bool), seen], axis=2))

    def run(q, parts):
        out = attend(q.swapaxes(1, 2), parts, mask, causal=causal)
        return jnp.sum(out * jnp.sin(out)), out

    wanted = jax.grad(run, argnums=(0, 1), has_aux=True)(q, parts)
    for size in (4, 5):
        monkeypatch.setattr(attention, "QUERIES", size)
        tiny.assert_close(jax.grad(run, argnums=(0, 1), has_aux=True)(q, parts), wanted, 1e-5)


def test_packed_rows_equal_separate_rows():
    rng = np.random.default_rng(3)
    texts = [rng.integers(2, 98, n).tolist() for n in (9, 5, 7)]
    batch = {k: v for k, v in pack([(ids, 1) for ids in texts], 24, Drops()).items() if k in PACKED}
    assert batch["tokens"].shape == (1, 24) and set(batch["ends"][0]) == {9, 14, 21, 0}
    hidden = jax.jit(hidden_states, static_argnums=0)
    together = np.asarray(hidden(tiny.net(), tiny.params(), batch))[0]
    rows = np.zeros((3, 24), np.int32)
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids)] = ids
    apart = np.asarray(hidden(tiny.net(), tiny.params(), row_batch(jnp.asarray(rows), jnp.array([9, 5, 7]))))
    np.testing.assert_allclose(together[:21], np.concatenate([apart[i, : len(ids)] for i, ids in enumerate(texts)]), atol=2e-6)


def some_loss(p, **options):
    hidden = hidden_states(tiny.net(**options), p, row_batch(*map(jnp.asarray, tiny.rows([6, 8], 8))))
    return jnp.sum(hidden * jnp.sin(jnp.arange(32.0))[None, None]), hidden


@pytest.fixture(scope="module")
def gradients():
    return jax.jit(jax.grad(some_loss, has_aux=True))(tiny.params())


WAYS = [(unrolled, remat) for unrolled in (False, True) for remat in REMAT]


@pytest.mark.parametrize("unrolled, remat", WAYS[1:])
def test_scanned_unrolled_and_recomputed_are_the_same_function_of_the_same_parameters(unrolled, remat, gradients):
    """Values, and gradients with the layers stacked."""
    found = jax.jit(jax.grad(partial(some_loss, unrolled=unrolled, remat=remat), has_aux=True))(tiny.params())
    assert jax.tree.structure(found) == jax.tree.structure(gradients)
    tiny.assert_close(found, gradients)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients[0]))


@pytest.mark.parametrize("unrolled", [False, True])
def test_what_is_not_kept_is_recomputed(unrolled):
    """Asked of the program. Products per layer: 7 with weights, 2 of attention, which have the batch in front. With `dots`
    only the two are done again, with `full` all but the last, whose result nothing asks for."""
    kept, products = {}, {}
    for remat in REMAT:
        f = partial(some_loss, unrolled=unrolled, remat=remat)
        residuals = jax.eval_shape(lambda p, f=f: jax.vjp(f, p, has_aux=True)[1], tiny.params())
        kept[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))
        found = tiny.equations(jax.make_jaxpr(jax.grad(f, has_aux=True))(tiny.params()).jaxpr)
        products[remat] = sum(e.primitive.name == "dot_general" for e in found)
    assert kept["none"] > kept["dots"] > kept["full"]
    bodies = 2 if unrolled else 1  # a scan's body is one for all layers
    assert products["none"] == 3 * 9 * bodies
    assert {remat: n - products["none"] for remat, n in products.items()} == {"none": 0, "dots": 2 * bodies, "full": 8 * bodies}


@pytest.mark.parametrize("remat", ["all", "", True, False])
def test_an_unknown_way_of_recomputing_is_refused(remat):
    with pytest.raises(ValueError, match="remat=.*: wanted one of none, full, dots"):
        init_params(tiny.net(remat=remat), jax.random.key(0))


def test_an_unrolled_model_has_the_parameters_of_a_scanned_one():
    shapes = [jax.eval_shape(partial(init_params, tiny.net(unrolled=u)), jax.random.key(0)) for u in (False, True)]
    assert shapes[0] == shapes[1]
    apart = unstack(tiny.params(), 2)
    assert set(apart) == {"embed", "final_norm", "layers_0", "layers_1"}
    for i in range(2):
        assert tiny.same_bits(apart[f"layers_{i}"], jax.tree.map(lambda x, i=i: x[i], tiny.params()["layers"]))


def test_the_gradient_of_unstacking_is_no_sum_of_stacks():
    """As many numbers are computed backward as there are parameters, at any depth."""
    params = {"layers": {"w": jnp.ones((16, 4))}}

    def f(p):
        return sum(jnp.sum(layer["w"] * layer["w"]) for layer in unstack(p, 16).values())

    jaxpr = jax.make_jaxpr(jax.grad(f))(params).jaxpr
    assert sum(v.aval.shape == (16, 4) for e in tiny.equations(jaxpr) for v in e.outvars) == 1


def test_lesson_25_decoding_with_a_cache_equals_the_full_forward_at_every_position():
    """Five tokens at once, then one by one, with a prefix and without; the slots behind the row are of no matter, nor what
    stands behind the prefix's part that a row begins with."""
    T, S, first = 12, 16, 5
    tokens, lengths = tiny.rows([T, T], T, seed=4)
    full = np.asarray(tiny.logits(tiny.net(), tiny.params(), tokens, lengths))
    net, params = tiny.net(unrolled=True), unstack(jax.tree.map(jnp.asarray, tiny.params()), 2)
    junk = jax.tree.map(lambda x: x + 1e4, empty(tiny.CFG, 2, S, jnp.float32))

    @jax.jit
    def step(tokens_BT, cache):
        x, layers = net.apply({"params": params}, tokens_BT, cache, method="extend")
        filled_B = cache.filled_B + tokens_BT.shape[1]
        return net.apply({"params": params}, x, method="logits"), cache._replace(layers=layers, filled_B=filled_B)

    def decoded(tokens_BT, cache):
        out, cache = step(tokens_BT[:, :first], cache)
        pieces = [out]
        for t in range(first, tokens_BT.shape[1]):
            out, cache = step(tokens_BT[:, t : t + 1], cache)
            pieces.append(out)
        return np.concatenate(pieces, axis=1), cache

    none = jnp.zeros(2, jnp.int32)
    out, cache = decoded(tokens, Cache(junk, none, none))
    np.testing.assert_allclose(out, full, atol=2e-5)
    prefix = jax.tree.map(
        lambda x: x[0], cache.layers
    )  # row 0's; row 1 begins with none of it, then row 0 with 4 of its tokens
    other = np.concatenate([tokens[:1, 4:], tokens[1:, : T - 4]])
    out, _ = decoded(other, Cache(junk, none, jnp.array([4, 0]), prefix))
    np.testing.assert_allclose(out[0], full[0, 4:], atol=2e-5)
    np.testing.assert_allclose(out[1], full[1, : T - 4], atol=2e-5)


def test_turned_matrices_are_the_same_function_for_few_rows_and_for_many(monkeypatch):
    """With biases, heads that share keys, and adapters. Six rows, to which a FEW of 6 are few and of 5 many."""
    monkeypatch.setattr(layers, "LARGE", 0)
    cfg = replace(tiny.UNTIED, qkv_bias=True, out_bias=True, mlp_bias=True, num_kv_heads=1, lora=Lora(rank=2))
    net, params = tiny.net(cfg, unrolled=True), unstack(tiny.params(cfg), 2)
    other = layers.turned(params)
    names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(other)}
    assert "unembed/turned" in names and not any(name.endswith("kernel") for name in names)
    batch = row_batch(*tiny.rows([3, 2], 3, seed=8))

    def run(params):
        return net.apply({"params": params}, *batch.values(), method="both")

    wanted, barriers = run(params), []
    for few in (6, 5):
        monkeypatch.setattr(layers, "FEW", few)
        program = jax.make_jaxpr(lambda params: run(params))(other).jaxpr  # a function of its own, for it is traced once
        barriers.append(sum(e.primitive.name == "optimization_barrier" for e in tiny.equations(program)))
        np.testing.assert_allclose(run(other), wanted, atol=1e-5)
    assert barriers[0] == barriers[1] + 15  # one for each product of few rows


def test_matrices_are_turned_for_decoding_on_one_cpu_alone(monkeypatch, mesh1, mesh8):
    monkeypatch.setattr(layers, "LARGE", 32 * 64)

    def made(mesh, **options):
        with jax.set_mesh(mesh):
            tree = jax.eval_shape(partial(serving, tiny.net(), **options), tiny.params())
        return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree) if "layers_0" in path_name(path)}

    turned = {name for name in made(mesh1) if name.endswith("turned")}
    assert turned == {f"layers_0/mlp/{name}/turned" for name in ("gate", "up", "down")}
    for names in (made(mesh8), made(mesh1, decoding=False)):
        assert not any(name.endswith("turned") for name in names)
    monkeypatch.setattr(slots, "machine", lambda: "tpu")
    assert not any(name.endswith("turned") for name in made(mesh1))


def test_padding_is_never_seen():
    """What stands behind a row's end changes nothing before it; a wider row changes nothing at all."""
    tokens, lengths = tiny.rows([3, 8, 5], 8, seed=5)
    other, _ = tiny.rows([3, 8, 5], 8, seed=5, pad=77)
    wide = np.pad(tokens, ((0, 0), (0, 8)), constant_values=55)
    inside = np.arange(8)[None] < lengths[:, None]
    a, b, c = (np.asarray(tiny.logits(tiny.net(), tiny.params(), x, lengths)) for x in (tokens, other, wide))
    np.testing.assert_array_equal(a[inside], b[inside])
    np.testing.assert_allclose(a[inside], c[:, :8][inside], atol=1e-5)


def test_logits_on_eight_devices_equal_those_on_one(mesh1, mesh8):
    tokens, lengths = tiny.rows([8, 3, 5, 8, 1, 2, 7, 6], 8, seed=6)
    out = []
    for mesh in (mesh1, mesh8):
        with jax.set_mesh(mesh):
            batch = put_batch({"tokens": tokens, "lengths": lengths}, mesh)
            out.append(tiny.logits(tiny.net(), tiny.on(mesh), batch["tokens"], batch["lengths"]))
    inside = np.arange(8)[None] < lengths[:, None]
    tiny.assert_close(np.asarray(out[1])[inside], np.asarray(out[0])[inside])


def test_activations_are_laid_out_by_name_at_every_block_and_for_the_logits(mesh8):
    """Asked of the program and not of its result: without constraints a compiler may copy the batch to every device."""
    tokens, lengths = tiny.rows([8] * 8, 8)
    with jax.set_mesh(mesh8):
        jaxpr = jax.make_jaxpr(tiny.logits, static_argnums=0)(tiny.net(), tiny.params(), tokens, lengths).jaxpr
    found = [e for e in tiny.equations(jaxpr) if e.primitive.name == "sharding_constraint"]
    batch = ("data", "fsdp")
    wanted = {  # one scanned body holds the blocks
        ((8, 8, 32), P(batch, None, None)): 2,  # the embedding, the block's end
        ((8, 8, 64), P(batch, None, "model")): 1,  # inside the MLP
        ((8, 8, 4, 8), P(batch, None, "model", None)): 1,  # queries
        ((8, 8, 2, 8), P(batch, None, "model", None)): 2,  # keys and values
        ((8, 8, 98), P(batch, None, "model")): 1,  # logits
    }
    assert Counter((e.outvars[0].aval.shape, e.params["sharding"].spec) for e in found) == wanted


def test_tokens_that_are_split_between_layers_give_the_same(mesh8):
    """Values and gradients, scanned or not; a row that does not divide stays whole, as in decoding."""
    tokens, lengths = tiny.rows([8, 3, 5, 8, 1, 2, 7, 6], 8, seed=6)
    weights = np.random.default_rng(0).normal(size=(8, 8, 98)).astype(np.float32)
    weights *= (np.arange(8)[None] < lengths[:, None])[:, :, None]

    def value(net, params):
        return jnp.sum(tiny.logits(net, params, tokens, lengths) * weights)

    with jax.set_mesh(mesh8):
        split = replace(tiny.CFG, sequence="split")
        of = jax.jit(jax.value_and_grad(value, 1), static_argnums=0)
        whole = of(tiny.net(), tiny.on(mesh8))
        for options in ({}, {"remat": "full"}):
            tiny.assert_close(of(tiny.net(split, **options), tiny.on(mesh8)), whole)
        for width, layout in ((8, P(("data", "fsdp"), "model", None)), (7, P(("data", "fsdp"), None, None))):
            args = tiny.net(split), tiny.params(), tokens[:, :width], lengths
            jaxpr = jax.make_jaxpr(tiny.logits, static_argnums=0)(*args).jaxpr
            found = [e for e in tiny.equations(jaxpr) if e.primitive.name == "sharding_constraint"]
            states = [e.params["sharding"].spec for e in found if e.outvars[0].aval.shape == (8, width, 32)]
            assert states == [layout] * 2


def test_parameters_are_float32_with_the_layers_in_front():
    for cfg in (tiny.CFG, tiny.UNTIED):
        shapes = jax.eval_shape(lambda k, cfg=cfg: init_params(tiny.net(cfg), k), jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        assert {x.shape[0] for x in jax.tree.leaves(shapes["layers"])} == {2}
        assert shapes["layers"]["attention"]["k"]["kernel"].shape == (2, 32, 2, 8)
        assert ("unembed" in shapes) != cfg.tied_embeddings


def test_bfloat16_compute_keeps_exponentials_norms_and_logits_in_float32():
    net = tiny.net().clone(dtype=jnp.bfloat16)
    tokens, lengths = tiny.rows([8, 8], 8)

    def logits(p):
        hidden = hidden_states(net, p, row_batch(tokens, lengths))
        assert hidden.dtype == jnp.bfloat16
        return net.apply({"params": p}, hidden, method="logits")

    jaxpr, out = jax.make_jaxpr(logits, return_shape=True)(tiny.params())
    assert out.dtype == jnp.float32
    found = [e for e in tiny.equations(jaxpr.jaxpr) if e.primitive.name in ("exp", "rsqrt", "cos", "sin")]
    assert len(found) >= 5 and {v.aval.dtype for e in found for v in e.invars} == {jnp.dtype("float32")}
    matrix = [e for e in tiny.equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert {v.aval.dtype for e in matrix for v in e.invars} == {jnp.dtype("bfloat16")}
