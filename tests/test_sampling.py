"""The distribution a token is drawn from, and the noise it is drawn with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from cai_jax import sampling
from cai_jax.sampling import record_key_data

FILTERS = ("top_p", "top_k", "min_p")
# Compiled once for all tests of a shape.
choose = jax.jit(sampling.choose, static_argnames=FILTERS)
shape_logits = jax.jit(sampling.shape_logits, static_argnames=FILTERS)
threshold = jax.jit(sampling.threshold)
record_keys = jax.jit(sampling.record_keys)

SETTINGS = [  # (temperature, filters)
    (1.0, {"top_p": 0.05}),
    (1.0, {"top_p": 0.9}),
    (0.7, {"top_p": 0.99}),
    (1.0, {"top_k": 1}),
    (1.3, {"top_k": 7}),
    (1.0, {"min_p": 0.1}),
    (0.5, {"top_k": 12, "top_p": 0.8}),
    (1.5, {"top_k": 20, "top_p": 0.7, "min_p": 0.15}),
    (1.0, {"top_p": 0.95, "min_p": 0.02}),
]
settings = pytest.mark.parametrize("temperature, filters", SETTINGS)
either = pytest.mark.parametrize("filters", [{}, {"top_p": 0.8, "top_k": 6}])


def logits_of(probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, np.float32))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_logits(seed, *shape):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * 3, np.float32)


def keys(count, stage="test", seed=0):
    return record_keys(jax.random.key(seed), np.stack([record_key_data(stage, i) for i in range(count)]))


def same(temperature, rows):
    """One temperature for all rows."""
    return np.full(rows, temperature, np.float32)


def at(logp_BV, token_B):
    return np.take_along_axis(np.asarray(logp_BV), np.asarray(token_B)[:, None], axis=1)[:, 0]


def close(found, wanted):
    """The same tokens are left, with the same log-probs."""
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
    np.testing.assert_allclose(np.exp(found), np.exp(wanted), rtol=1e-4, atol=1e-9)
    seen = np.isfinite(wanted)
    np.testing.assert_allclose(np.asarray(found)[seen], np.asarray(wanted)[seen], rtol=1e-5, atol=1e-5)


def by_sorting(logits, temperature, top_p=1.0, top_k=0, min_p=0.0):
    """Each filter by its definition on one row's sorted probabilities, in float64; tokens as likely as the last one stay."""
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    if top_k:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
    p = p / p.sum()
    ordered = np.sort(p)[::-1]
    held = np.cumsum(ordered) >= top_p - 1e-12
    if top_p < 1:
        p = np.where(p >= ordered[np.argmax(held)], p, 0)
    p = np.where(p >= min_p * p.max(), p, 0)
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())


def of_transformers(logits, temperature, top_p=1.0, top_k=0, min_p=0.0):
    """The library's own filters in its own order."""
    config = GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p or None)
    filters = GenerationMixin()._get_logits_processor(config)
    return torch.log_softmax(filters(None, torch.from_numpy(logits)), dim=-1).numpy()


# The distribution


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 2.5])
def test_lesson_03_logits_are_divided_by_the_temperature(temperature):
    logits = random_logits(0, 3, 11)
    np.testing.assert_allclose(shape_logits(logits, temperature), log_softmax(logits / temperature), rtol=1e-5, atol=1e-5)


def test_each_row_has_its_temperature():
    logits, temperature_B = random_logits(0, 4, 2, 11), np.array([0.25, 0.7, 1.0, 2.5], np.float32)
    out = np.asarray(shape_logits(logits, temperature_B[:, None, None], top_p=0.8))
    for i, t in enumerate(temperature_B):
        np.testing.assert_array_equal(out[i], shape_logits(logits[i], t, top_p=0.8))


@either
def test_lesson_03_the_log_prob_of_a_token_is_that_of_the_distribution_sampled_from(filters):
    logits, temperature_B = random_logits(1, 64, 11), np.linspace(0.3, 2.0, 64, dtype=np.float32)
    token, logp = choose(logits, keys(64), 3, temperature_B, **filters)
    np.testing.assert_array_equal(logp, at(shape_logits(logits, temperature_B[:, None], **filters), token))
    assert token.dtype == jnp.int32 and logp.dtype == jnp.float32 and np.isfinite(logp).all()
    assert np.abs(np.asarray(logp) - at(log_softmax(logits), token)).max() > 0.1  # not the plain distribution


def test_half_precision_logits_are_shaped_in_float32():
    logits = random_logits(2, 3, 11).astype(jnp.bfloat16)
    out = shape_logits(logits, 0.7)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, log_softmax(np.asarray(logits, np.float64) / 0.7), rtol=1e-5, atol=1e-5)


def rows_of_every_kind():
    """[120, 50]: random, nearly flat, sharp, and far apart, with the vocabulary's padding behind some of them."""
    rng = np.random.default_rng(3)
    kinds = [3 * rng.normal(size=(30, 50)), 0.01 * rng.normal(size=(30, 50))]
    kinds += [np.log(np.maximum(rng.dirichlet(np.full(50, 0.05), 30), 1e-9)), 12 * rng.normal(size=(30, 50))]
    logits = np.concatenate(kinds).astype(np.float32)
    logits[::3, 40:], logits[1::3, 45:] = -1e30, -np.inf
    return logits


@settings
def test_what_the_filters_leave_is_that_of_the_sorted_definitions(temperature, filters):
    logits = rows_of_every_kind()
    close(shape_logits(logits, temperature, **filters), np.stack([by_sorting(row, temperature, **filters) for row in logits]))


@settings
def test_what_the_filters_leave_is_that_of_transformers(temperature, filters):
    logits = rows_of_every_kind()
    close(shape_logits(logits, temperature, **filters), of_transformers(logits, temperature, **filters))


@pytest.mark.parametrize(
    "p, filters, kept",
    [
        ([0.3, 0.3, 0.2, 0.2], {"top_p": 0.25}, [0, 1]),  # tied tokens stay together
        ([0.3, 0.3, 0.2, 0.2], {"top_p": 0.55}, [0, 1]),
        ([0.2, 0.3, 0.2, 0.3], {"top_p": 0.7}, [0, 1, 2, 3]),
        ([0.25, 0.25, 0.25, 0.25], {"top_p": 0.1}, [0, 1, 2, 3]),
        ([0.97, 0.01, 0.01, 0.01], {"top_p": 0.5}, [0]),
        ([1.0, 0.0, 0.0, 0.0], {"top_p": 0.999}, [0]),
        ([0.1, 0.6, 0.1, 0.2], {"top_p": 1e-6}, [1]),  # never empty
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.5}, [0]),  # exactly the mass asked for
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.75}, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.7500001}, [0, 1, 2, 3]),
        ([0.2, 0.3, 0.2, 0.3], {"top_k": 1}, [1, 3]),
        ([0.2, 0.3, 0.2, 0.3], {"top_k": 3}, [0, 1, 2, 3]),
        ([0.1, 0.6, 0.1, 0.2], {"top_k": 2}, [1, 3]),
        ([0.1, 0.6, 0.1, 0.2], {"top_k": 9}, [0, 1, 2, 3]),  # more than there are
        ([0.5, 0.5, 0.0, 0.0], {"top_k": 3}, [0, 1]),  # nothing has no share
        ([0.5, 0.25, 0.125, 0.125], {"min_p": 0.25}, [0, 1, 2, 3]),  # exactly as likely as asked for
        ([0.5, 0.25, 0.125, 0.125], {"min_p": 0.2500001}, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], {"min_p": 1.0}, [0]),
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.5}, [0]),  # 4/7 of what top_k left
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 3, "top_p": 0.8}, [0, 1, 2]),  # 7/9 are not enough
        ([1.0], {"top_p": 0.5, "top_k": 1, "min_p": 0.5}, [0]),
    ],
)
def test_what_is_left_of_tied_and_extreme_distributions(p, filters, kept):
    logp = shape_logits(logits_of(p), 1.0, **filters)
    assert np.flatnonzero(np.isfinite(logp)).tolist() == kept
    wanted = np.asarray(p)[kept]
    np.testing.assert_allclose(np.exp(logp)[kept], wanted / wanted.sum(), rtol=1e-6)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}])
def test_huge_logits_and_one_token_alone_stay_numbers(filters):
    for logits in ([3e38, 1.0, -3e38], [-3e38, -3e38, -3e38], [200.0, 0.0, -200.0]):
        logp = np.asarray(shape_logits(np.array(logits, np.float32), 1.0, **filters))
        assert not np.isnan(logp).any() and np.exp(logp).sum() == pytest.approx(1)
        assert logp[0] == logp.max()
    np.testing.assert_array_equal(shape_logits(np.array([[2.0]], np.float32), 1.0, **filters), [[0.0]])


def test_a_threshold_is_exact_to_the_last_bit():
    half = np.float32(0.5)
    below = np.nextafter(half, np.float32(0))
    weight = np.array([below, 1, half], np.float32)
    found = [float(threshold(weight, np.ones(3, np.float32), wanted)[0]) for wanted in (1.0, 2.0, 3.0, 4.0)]
    assert found == [1, half, below, 0]


def test_the_nucleus_of_a_large_vocabulary_holds_enough_and_no_more():
    for seed, scale in enumerate((0.01, 1.0, 4.0)):
        weight = np.random.default_rng(seed).normal(size=(2, 50_000)) * scale
        weight = np.exp(weight - weight.max(-1, keepdims=True)).astype(np.float32)
        p = weight / weight.sum(-1, keepdims=True, dtype=np.float64)
        for top_p in (0.2, 0.6, 0.95):
            wanted = np.float32(top_p) * weight.sum(-1, keepdims=True)
            inside = weight >= np.asarray(threshold(weight, weight, wanted))
            mass, least = (p * inside).sum(-1), np.where(inside, p, 1).min(-1)
            assert np.all(mass >= top_p - 2e-5) and np.all(mass - least < top_p + 2e-5)
        counted = (weight >= np.asarray(threshold(weight, np.ones_like(weight), 40.0))).sum(-1)
        assert counted.tolist() == [40, 40]


def test_a_filter_that_is_off_costs_nothing_and_none_sorts():
    def ops(**filters):
        return str(jax.make_jaxpr(partial(sampling.shape_logits, **filters))(random_logits(0, 2, 11), 0.7))

    assert ops() == ops(top_p=1.0, top_k=0, min_p=0.0) and "scan" not in ops()
    assert [ops(**f).count("scan[") for f in ({"min_p": 0.1}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 5})] == [0, 1, 2]
    assert ops(top_p=0.9, top_k=11).count("scan[") == 1  # no token of 11 can be outside
    assert not {"sort", "top_k"} & set(ops(top_p=0.9, top_k=5, min_p=0.1).split())


# The draw


def chi_square(tokens, p):
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(p))
    expected = counts.sum() * p
    assert not counts[p == 0].any()
    live = p > 0
    return np.sum((counts[live] - expected[live]) ** 2 / expected[live])


@partial(jax.jit, static_argnames=FILTERS)
def draws(logits_BV, row_keys, steps, temperature_B, **filters):
    return jax.vmap(lambda step: choose(logits_BV, row_keys, step, temperature_B, **filters)[0])(steps)


@pytest.mark.parametrize(
    "temperature, filters, wanted",
    [
        (1.0, {}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        (0.5, {}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        (1.0, {"top_p": 0.8}, [0.4, 0.3, 0.15, 0, 0]),
        (1.0, {"top_k": 4, "min_p": 0.2}, [0.4, 0.3, 0.15, 0.1, 0]),
    ],
)
def test_samples_follow_the_distribution_over_rows_and_steps(temperature, filters, wanted):
    p = np.array(wanted) / np.sum(wanted)
    logits = np.broadcast_to(logits_of([0.4, 0.3, 0.15, 0.1, 0.05]), (64, 5))
    tokens = draws(logits, keys(64), np.arange(128, dtype=np.int32), same(temperature, 64), **filters)
    assert chi_square(tokens, p) < 18.5  # 4 degrees of freedom: one seed in a thousand passes it, and the seed is fixed


def test_the_noise_is_pinned():
    """Gumbel noise from (key, step): runs that are published are sampled again as they were."""
    logits, row_keys = random_logits(7, 64, 11), keys(64)
    token, _ = choose(logits, row_keys, 5, same(0.8, 64))
    for i in range(8):
        noise = jax.random.gumbel(jax.random.fold_in(row_keys[i], 5), (11,), jnp.float32)
        assert token[i] == np.argmax(np.asarray(shape_logits(logits, 0.8))[i] + np.asarray(noise))


@either
def test_temperature_0_takes_the_most_likely_token_whatever_the_key(filters):
    logits = random_logits(5, 64, 11)
    logits[::2, 3] = logits[::2, 8] = 99  # tied: the first
    for step in range(3):
        token, logp = choose(logits, keys(64), step, same(0.0, 64), **filters)
        np.testing.assert_array_equal(token, logits.argmax(-1))
        np.testing.assert_array_equal(logp, at(shape_logits(logits, 1.0, **filters), token))


@either
def test_rows_of_other_temperatures_are_what_they_are_alone(filters):
    """A greedy row beside sampled ones included."""
    logits, row_keys = random_logits(8, 64, 11), keys(64)
    temperature_B = np.tile(np.array([0.0, 0.5, 1.0, 2.0], np.float32), 16)
    token, logp = choose(logits, row_keys, 2, temperature_B, **filters)
    for t in (0.0, 0.5, 1.0, 2.0):
        rows = temperature_B == t
        alone = choose(logits, row_keys, 2, same(t, 64), **filters)
        np.testing.assert_array_equal(np.asarray(token)[rows], np.asarray(alone[0])[rows])
        np.testing.assert_array_equal(np.asarray(logp)[rows], np.asarray(alone[1])[rows])
    assert np.mean(np.asarray(token) == logits.argmax(-1)) < 0.9


def test_rows_at_other_steps_are_what_they_are_at_one_step():
    logits, row_keys, temperature_B = random_logits(9, 64, 11), keys(64), same(1.0, 64)
    step_B = np.arange(64, dtype=np.int32) % 5
    token, _ = choose(logits, row_keys, step_B, temperature_B)
    for step in range(5):
        alone, _ = choose(logits, row_keys, step, temperature_B)
        np.testing.assert_array_equal(np.asarray(token)[step_B == step], np.asarray(alone)[step_B == step])


def test_a_row_that_is_no_number_still_gives_a_token_of_the_vocabulary():
    """And its log-prob says what happened."""
    for temperature in (0.0, 1.0):
        token, logp = choose(np.full((64, 11), np.nan, np.float32), keys(64), 0, same(temperature, 64))
        assert np.all((np.asarray(token) >= 0) & (np.asarray(token) < 11)) and np.isnan(logp).all()


def test_lesson_07_noise_differs_between_steps_and_repeats_between_runs():
    logits = np.zeros((64, 11), np.float32)

    def chosen(step, row_keys):
        return np.asarray(choose(logits, row_keys, step, same(1.0, 64))[0])

    once = [chosen(step, keys(64)) for step in range(4)]
    again = [chosen(step, keys(64)) for step in range(4)]
    np.testing.assert_array_equal(once, again)
    for i in range(4):
        for j in range(i):
            assert np.mean(once[i] == once[j]) < 0.3  # 1 in 11 agrees by chance
    assert np.mean(chosen(0, keys(64, seed=1)) == once[0]) < 0.3
    assert np.mean(chosen(0, keys(64, "another stage")) == once[0]) < 0.3
    assert len(set(once[0].tolist())) > 8  # and between rows


def test_lesson_07_a_records_noise_does_not_depend_on_its_row_or_company():
    logits, address = random_logits(6, 64, 11), np.stack([record_key_data("test", i) for i in range(64)])

    def chosen(rows):
        row_keys = record_keys(jax.random.key(0), address[rows])
        return np.asarray(choose(logits[rows], row_keys, 5, same(1.0, len(rows)))[0])

    tokens, order = chosen(np.arange(64)), np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(chosen(order), tokens[order])
    np.testing.assert_array_equal(chosen(order[:3]), tokens[order[:3]])  # nor on the size of the batch


def test_lesson_07_keys_come_from_the_address_alone():
    address = np.stack([record_key_data("critique", f"r{i}/response") for i in range(6)])
    address[4:] = [[1, 2], [1, 3]]  # both words count: a key from one of them would repeat after some 2^16 records

    def data(rows):
        return np.asarray(jax.random.key_data(record_keys(jax.random.key(0), address[rows])))

    order = [4, 0, 3, 5, 2, 1]
    np.testing.assert_array_equal(data(order), data(slice(None))[order])
    assert len({row.tobytes() for row in data(order)}) == 6


def test_record_key_data_is_pinned_and_keeps_parts_apart():
    data = record_key_data("sft", "r1", 0)
    assert data.dtype == np.uint32 and data.tolist() == [1598631394, 1970893041]  # sha256("sft\x1fr1\x1f0")[:8]
    assert record_key_data("ab", "c").tolist() != record_key_data("a", "bc").tolist()
    assert record_key_data("a", 1).tolist() != record_key_data("a", 2).tolist()
