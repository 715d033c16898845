"""Log-probs and entropies by blocks against plain softmaxes, with all gradients, and what is in memory on the way."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import logprobs
from cai_jax.logprobs import target_logprobs
from cai_jax.models.transformer import Transformer
from cai_jax.sharding import put, put_batch

ROWS, T, D = 8, 14, tiny.CFG.width
CAPPED = replace(tiny.CFG, logit_cap=3.0, vocab_padding=6)
F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


@pytest.fixture(params=[0, logprobs.KEPT], ids=["computed again", "kept"])
def small(monkeypatch, request):
    """Blocks of ten tokens by slices of 32: 0-31, 32-63, 64-95, 66-97; of the 52 tokens of one of two devices 0-31, 20-51."""
    monkeypatch.setattr(logprobs, "KEPT", request.param)
    monkeypatch.setattr(logprobs, "SLICE", 32)
    monkeypatch.setattr(logprobs, "LANES", 8)
    monkeypatch.setattr(logprobs, "BLOCK", 320)


def given(cfg, rows=ROWS, dtype=F32):
    """Parameters of the head, and a batch: hidden states, targets (all tokens if there is room), weights of both results."""
    rng = np.random.default_rng(0)
    table = rng.normal(0.0, 0.4, (cfg.vocab_size + cfg.vocab_padding, D)).astype(dtype)
    params = {"embed": {"embedding": table}} if cfg.tied_embeddings else {"unembed": {"kernel": table.T.copy()}}
    x = rng.normal(size=(rows, T, D)).astype(dtype)
    y = rng.permutation(np.arange(rows * T) % cfg.vocab_size).reshape(rows, T).astype(np.int32)
    return params, {"x": x, "y": y, "w": rng.normal(size=(rows, T, 2)).astype(F32)}


def plain_logits(cfg, params, x_BTD):
    table = params["embed"]["embedding"] if cfg.tied_embeddings else params["unembed"]["kernel"].T
    return jnp.einsum("btd,vd->btv", x_BTD, table[: cfg.vocab_size])


def plain(net, params, x_BTD, y_BT, temperature, logits=plain_logits):
    z_BTV, cap = logits(net.cfg, params, x_BTD), net.cfg.logit_cap
    logp_BTV = jax.nn.log_softmax((cap * jnp.tanh(z_BTV / cap) if cap else z_BTV) / temperature, axis=-1)
    logp_BT = jnp.take_along_axis(logp_BTV, y_BT[:, :, None], axis=-1)[:, :, 0]
    return logp_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


def loss(score, net, params, x_BTD, batch, temperature=0.7):
    """Both results, each with weights of its own; beside the loss themselves."""
    results = score(net, params, x_BTD, batch["y"], temperature)
    return jnp.sum(batch["w"] * jnp.stack(results, axis=-1)), results


def run(score, net):
    """(params, x, batch[, temperature]) -> gradients by params and x, and the results."""
    return jax.jit(jax.grad(partial(loss, score, net), (0, 1), has_aux=True))


@cache
def reference(cfg):
    return run(plain, tiny.net(cfg))


# --- Values and gradients ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cfg", [tiny.CFG, replace(CAPPED, tied_embeddings=False)], ids=["tied", "untied, capped, padded"])
@pytest.mark.parametrize("picks", ["cpu", "tpu"])  # a target's logit: read from its place, or a sum over all
def test_values_and_gradients_are_those_of_a_plain_softmax(small, monkeypatch, cfg, picks):
    """All tokens are targets: those at the edges of the slices, and those that two slices share."""
    monkeypatch.setattr(logprobs, "machine", lambda: picks)
    params, batch = given(cfg)
    assert set(batch["y"].flat) == set(range(98))
    by_blocks = run(target_logprobs, tiny.net(cfg))
    for temperature in (1.0, 0.7):
        found = by_blocks(params, batch["x"], batch, temperature)
        tiny.assert_close(found, reference(cfg)(params, batch["x"], batch, temperature))
        assert all(result.dtype == F32 for result in found[1])


@pytest.mark.parametrize("kept", [BF16, F32], ids=str)
def test_bfloat16_products_are_summed_in_float32(small, kept):
    """Products of bfloat16 are exact in float32, so the results are as close as float32's. In the gradients each derivative by
    a logit is rounded, and the sum again where it is handed on in bfloat16: by up to 2^-8 each."""
    params, batch = given(CAPPED, dtype=BF16)
    wide, x_BTD = jax.tree.map(lambda a: a.astype(F32), (params, batch["x"]))
    params["embed"]["embedding"] = params["embed"]["embedding"].astype(kept)
    (d_params, d_x), results = run(target_logprobs, Transformer(CAPPED, BF16))(params, batch["x"], batch)
    (d_wide, d_x_BTD), wanted = reference(CAPPED)(wide, x_BTD, batch, 0.7)
    tiny.assert_close(results, wanted)

    table_VD = wide["embed"]["embedding"][:98]
    by_logits = jax.grad(lambda z_BTV: loss(partial(plain, logits=lambda *_: z_BTV), tiny.net(CAPPED), None, None, batch)[0])
    d_z_BTV = np.abs(jax.jit(by_logits)(np.einsum("btd,vd->btv", x_BTD, table_VD)))
    largest = np.pad(np.einsum("btv,btd->vd", d_z_BTV, np.abs(x_BTD)), ((0, 6), (0, 0)))
    assert_rounded(d_params["embed"]["embedding"], d_wide["embed"]["embedding"], largest, kept)
    assert_rounded(d_x, d_x_BTD, np.einsum("btv,vd->btd", d_z_BTV, np.abs(table_VD)), BF16)


def assert_rounded(found, wanted, largest, dtype):
    """`largest`: the sum of the absolute products; 1e-5 of it is for float32."""
    assert found.dtype == dtype
    bound = (2**-8 * (1 + (dtype == BF16)) + 1e-5) * largest
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= bound).all()


def test_large_logits_neither_overflow_nor_blur(small):
    """Logits of 10,000 for the first and the last token and -10,000 for the others, on every row."""
    table = np.full((98, D), -1.0, F32)
    table[[0, 97]] = 1.0
    batch = given(tiny.CFG)[1] | {"x": np.full((ROWS, T, D), 1e4 / D, F32)}
    params = {"embed": {"embedding": table}}
    (_, d_x), (logp, entropy) = run(target_logprobs, tiny.net())(params, batch["x"], batch, 1.0)
    likely = np.isin(batch["y"], (0, 97))
    np.testing.assert_allclose(logp, np.where(likely, 0.0, -2e4) - np.log(2), rtol=1e-6)
    np.testing.assert_allclose(entropy, np.full((ROWS, T), np.log(2)), rtol=1e-6)
    # The derivative of a log-prob is that of its logit less the mean, so 0 or -2. The log-sum-exp is saved to 2^-11.
    wanted = np.where(likely, 0.0, -2.0) * batch["w"][:, :, 0]
    np.testing.assert_allclose(d_x, np.broadcast_to(wanted[:, :, None], d_x.shape), atol=2**-10 * np.abs(batch["w"]).max())


@pytest.mark.parametrize("cfg", [tiny.CFG, replace(CAPPED, tied_embeddings=False)], ids=["tied", "untied, capped, padded"])
@pytest.mark.parametrize("count", [0, 1, 30, 37, ROWS * T])
def test_tokens_that_do_not_count_have_no_result_and_no_part_in_gradients(small, cfg, count):
    """Also not by what their results are multiplied with."""
    params, batch = given(cfg)
    counts = np.random.default_rng(count).permutation(np.arange(ROWS * T) < count).reshape(ROWS, T)
    found = run(partial(target_logprobs, counts_BT=counts), tiny.net(cfg))(params, batch["x"], batch, 0.7)
    gradients, results = reference(cfg)(params, batch["x"], batch | {"w": batch["w"] * counts[:, :, None]}, 0.7)
    tiny.assert_close(found, (gradients, tuple(np.where(counts, x, 0.0) for x in results)))


def test_blocks_of_tokens_that_do_not_count_are_not_computed(small):
    """Three blocks of ten count; what is not a number elsewhere is never read."""
    params, batch = given(tiny.CFG)
    counts = np.random.default_rng(0).permutation(np.arange(ROWS * T) < 30).reshape(ROWS, T)
    wanted = run(partial(target_logprobs, counts_BT=counts), tiny.net())(params, batch["x"], batch, 0.7)
    x_BTD = np.where(counts[:, :, None], batch["x"], np.nan)
    found = run(partial(target_logprobs, counts_BT=counts), tiny.net())(params, x_BTD, batch, 0.7)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(wanted))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# --- Under transformations and on meshes ------------------------------------------------------------------------------
def test_gradients_accumulated_in_a_scan_of_checkpointed_losses_are_those_of_the_whole(small):
    params, batch = given(CAPPED)
    part_loss = jax.checkpoint(lambda params, part: loss(target_logprobs, tiny.net(CAPPED), params, part["x"], part)[0])

    @jax.jit
    def accumulate(params, parts):
        def one(total, part):
            return jax.tree.map(jnp.add, total, jax.grad(part_loss)(params, part)), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), parts)[0]

    parts = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), batch)
    tiny.assert_close(accumulate(params, parts), reference(CAPPED)(params, batch["x"], batch, 0.7)[0][0])


SPLITS = {
    "tied": (CAPPED, ROWS),
    "untied, one device's vocabulary all padding": (replace(tiny.UNTIED, vocab_size=40, vocab_padding=64), ROWS),
    "rows that do not split": (CAPPED, 3),
}


@pytest.mark.parametrize("cfg, rows", SPLITS.values(), ids=SPLITS)
def test_a_mesh_changes_nothing_and_gradients_lie_as_what_they_are_of(small, mesh8, cfg, rows):
    params, batch = given(cfg, rows)
    even = rows == ROWS
    with jax.set_mesh(mesh8):
        lying = put(params, mesh8), put_batch({"x": batch["x"]}, mesh8)["x"] if even else batch["x"]
        found = run(target_logprobs, tiny.net(cfg))(*lying, put_batch(batch, mesh8) if even else batch)
        some = np.arange(rows * T).reshape(rows, T) % (2 + np.arange(rows)[:, None]) == 0  # most on the first device
        fewer = put_batch({"some": some}, mesh8)["some"] if even else some
        counted = run(partial(target_logprobs, counts_BT=fewer), tiny.net(cfg))(*lying, batch)
    tiny.assert_close(found, reference(cfg)(params, batch["x"], batch, 0.7))
    gradients, results = reference(cfg)(params, batch["x"], batch | {"w": batch["w"] * some[:, :, None]}, 0.7)
    tiny.assert_close(counted, (gradients, tuple(np.where(some, x, 0.0) for x in results)))
    if even:
        for gradient, of in zip(jax.tree.leaves(found[0]), jax.tree.leaves(lying), strict=True):
            assert gradient.sharding.is_equivalent_to(of.sharding, of.ndim)


# --- Memory -----------------------------------------------------------------------------------------------------------
def traced(score, cfg, rows, tokens):
    """Both passes of a bfloat16 net over float32 parameters; (primitive, its parameters, result) of all that they compute."""
    shapes = {"embed": {"embedding": (cfg.vocab_size, cfg.width)}, "unembed": {"kernel": (cfg.width, cfg.vocab_size)}}
    name = "embed" if cfg.tied_embeddings else "unembed"
    params = {name: {key: jax.ShapeDtypeStruct(shape, F32) for key, shape in shapes[name].items()}}
    batch = {"y": jax.ShapeDtypeStruct((rows, tokens), jnp.int32), "w": jax.ShapeDtypeStruct((rows, tokens, 2), F32)}
    passes = run(score, Transformer(cfg, BF16)).trace(params, jax.ShapeDtypeStruct((rows, tokens, cfg.width), BF16), batch)
    equations = tiny.equations(passes.jaxpr.jaxpr)
    return passes, [(e.primitive.name, e.params, v.aval) for e in equations for v in e.outvars]


def by_logits(net, params, x_BTD, y_BT, temperature):
    return plain(net, params, x_BTD, y_BT, temperature, lambda *_: net.apply({"params": params}, x_BTD, method="logits"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_nothing_over_tokens_and_vocabulary_exists_and_the_matrix_is_never_copied(tied):
    cfg = replace(tiny.CFG, vocab_size=128_000, width=768, tied_embeddings=tied)
    _, computed = traced(target_logprobs, cfg, 8, 255)
    matrix = (128_000, 768) if tied else (768, 128_000)
    assert {a.shape for _, _, a in computed if a.size > 2**22} == {matrix}
    # Its gradient, and once: made as zeros, written slice by slice and handed on by the loop.
    makers = [name for name, _, a in computed if a.shape == matrix and name != "jit"]
    assert sorted(makers) == ["broadcast_in_dim", "dynamic_update_slice", "scan"]
    products = [a for name, _, a in computed if name == "dot_general"]
    assert all(a.dtype == F32 for a in products) and len(products) == 4
    assert products[0].shape == (1020, 2048)  # large enough to be fast
    assert (8, 255, 128_000) in {a.shape for _, _, a in traced(by_logits, cfg, 8, 255)[1]}  # where it exists it is seen


def test_compiled_it_takes_a_small_part_of_the_memory_of_logits():
    passes, _ = traced(target_logprobs, replace(tiny.CFG, vocab_size=32_001, width=256), 8, 256)
    assert passes.lower().compile().memory_analysis().temp_size_in_bytes < 4 * 8 * 256 * 32_001 / 8


@pytest.mark.parametrize("kept, products", [(8 * 63 * 98, 3), (8 * 63 * 98 - 1, 4)])
def test_logits_that_are_few_are_computed_once(monkeypatch, kept, products):
    monkeypatch.setattr(logprobs, "KEPT", kept)
    _, computed = traced(target_logprobs, tiny.CFG, 8, 63)
    assert sum(name == "dot_general" for name, _, _ in computed) == products


def test_what_is_small_is_one_block_and_is_not_filled_up():
    _, computed = traced(target_logprobs, tiny.CFG, 8, 63)
    assert {params["length"] for name, params, _ in computed if name == "scan"} == {1}
    assert max(a.size for _, _, a in computed) == 8 * 63 * 98
