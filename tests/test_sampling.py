"""The distribution a token is drawn from, and the noise it is drawn with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax import sampling
from cai_jax.sampling import record_key_data

# Compiled once for all tests of a shape.
choose = jax.jit(sampling.choose, static_argnames=("top_p", "greedy"))
shape_logits = jax.jit(sampling.shape_logits, static_argnames="top_p")
nucleus_threshold = jax.jit(sampling.nucleus_threshold)
record_keys = jax.jit(sampling.record_keys)


def logits_of(probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probabilities, np.float32))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_logits(seed, *shape):
    return np.asarray(np.random.default_rng(seed).normal(size=shape) * 3, np.float32)


def keys(count, stage="test", seed=0):
    return record_keys(jax.random.key(seed), np.stack([record_key_data(stage, i) for i in range(count)]))


# The distribution


@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 2.5])
def test_lesson_03_logits_are_divided_by_the_temperature(temperature):
    logits = random_logits(0, 3, 11)
    np.testing.assert_allclose(shape_logits(logits, temperature), log_softmax(logits / temperature), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("greedy, top_p", [(True, 1.0), (False, 1.0), (False, 0.8)])
def test_lesson_03_the_log_prob_of_a_token_is_that_of_the_distribution_sampled_from(greedy, top_p):
    logits = random_logits(1, 64, 11)
    token, logp = choose(logits, keys(64), 3, 0.6, top_p, greedy)
    wanted = np.take_along_axis(np.asarray(shape_logits(logits, 0.6, top_p)), np.asarray(token)[:, None], axis=1)[:, 0]
    np.testing.assert_array_equal(logp, wanted)
    assert token.dtype == jnp.int32 and logp.dtype == jnp.float32
    plain = np.take_along_axis(log_softmax(logits), np.asarray(token)[:, None], axis=1)[:, 0]
    assert np.abs(np.asarray(logp) - plain).max() > 0.1  # not the distribution at temperature 1


def test_half_precision_logits_are_shaped_in_float32():
    logits = random_logits(2, 3, 11).astype(jnp.bfloat16)
    out = shape_logits(logits, 0.7)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, log_softmax(np.asarray(logits, np.float64) / 0.7), rtol=1e-5, atol=1e-5)


def nucleus_by_sorting(p, top_p):
    """The smallest set of most likely tokens that holds top_p; tokens as likely as the last one stay."""
    ordered = np.sort(p)[::-1]
    last = ordered[np.argmax(np.cumsum(ordered) >= top_p)]
    return p >= last


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_the_nucleus_is_that_of_the_sorted_definition(top_p):
    rng = np.random.default_rng(3)
    flat, sharp = rng.dirichlet(np.ones(50), 40), rng.dirichlet(np.full(50, 0.05), 40)
    p = np.maximum(np.concatenate([flat, sharp]), 1e-9)
    p = p / p.sum(-1, keepdims=True)
    logp = shape_logits(logits_of(p), 1.0, top_p)
    wanted = np.stack([nucleus_by_sorting(row, top_p) for row in p])
    np.testing.assert_array_equal(np.isfinite(logp), wanted)
    inside = np.where(wanted, p, 0)
    np.testing.assert_allclose(np.exp(logp), inside / inside.sum(-1, keepdims=True), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "p, top_p, kept",
    [
        ([0.3, 0.3, 0.2, 0.2], 0.25, [0, 1]),  # tied tokens stay together
        ([0.3, 0.3, 0.2, 0.2], 0.55, [0, 1]),
        ([0.2, 0.3, 0.2, 0.3], 0.7, [0, 1, 2, 3]),
        ([0.25, 0.25, 0.25, 0.25], 0.1, [0, 1, 2, 3]),
        ([0.97, 0.01, 0.01, 0.01], 0.5, [0]),
        ([1.0, 0.0, 0.0, 0.0], 0.999, [0]),
        ([0.1, 0.6, 0.1, 0.2], 1e-6, [1]),  # never empty
    ],
)
def test_the_nucleus_of_tied_and_extreme_distributions(p, top_p, kept):
    logp = shape_logits(logits_of(p), 1.0, top_p)
    assert np.flatnonzero(np.isfinite(logp)).tolist() == kept
    assert np.exp(logp).sum() == pytest.approx(1)


def test_the_nucleus_threshold_holds_enough_and_no_more():
    logp = log_softmax(random_logits(4, 30, 200)).astype(np.float32)
    for top_p in (0.2, 0.6, 0.95):
        p = np.exp(logp.astype(np.float64))
        inside = logp >= np.asarray(nucleus_threshold(logp, top_p))
        mass = (p * inside).sum(-1)
        least = np.where(inside, p, 1).min(-1)
        assert np.all(mass >= top_p - 1e-5) and np.all(mass - least < top_p + 1e-5)


def test_the_nucleus_is_taken_after_the_temperature():
    logits = logits_of([0.6, 0.3, 0.1])
    assert np.isfinite(shape_logits(logits, 1.0, 0.65)).sum() == 2
    assert np.isfinite(shape_logits(logits, 0.25, 0.65)).sum() == 1  # colder: the first token alone has 0.94


# The draw


def chi_square(tokens, p):
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(p))
    expected = counts.sum() * p
    assert not counts[p == 0].any()
    live = p > 0
    return np.sum((counts[live] - expected[live]) ** 2 / expected[live])


@partial(jax.jit, static_argnames="top_p")
def draws(logits_BV, row_keys, steps, temperature, top_p):
    return jax.vmap(lambda step: choose(logits_BV, row_keys, step, temperature, top_p, False)[0])(steps)


@pytest.mark.parametrize(
    "temperature, top_p, wanted",
    [
        (1.0, 1.0, [0.4, 0.3, 0.15, 0.1, 0.05]),
        (0.5, 1.0, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        (1.0, 0.8, [0.4, 0.3, 0.15, 0, 0]),
    ],
)
def test_samples_follow_the_distribution_over_rows_and_steps(temperature, top_p, wanted):
    p = np.array(wanted) / np.sum(wanted)
    logits = np.broadcast_to(logits_of([0.4, 0.3, 0.15, 0.1, 0.05]), (64, 5))
    tokens = draws(logits, keys(64), np.arange(128), temperature, top_p)
    assert chi_square(tokens, p) < 18.5  # 4 degrees of freedom: one seed in a thousand passes it, and the seed is fixed


def test_greedy_takes_the_most_likely_token_whatever_the_key():
    logits = random_logits(5, 64, 11)
    for step in range(3):
        token, _ = choose(logits, keys(64), step, 1.0, 1.0, True)
        np.testing.assert_array_equal(token, np.asarray(logits).argmax(-1))


def test_lesson_07_noise_differs_between_steps_and_repeats_between_runs():
    logits = np.zeros((64, 11), np.float32)

    def at(step, row_keys):
        return np.asarray(choose(logits, row_keys, step, 1.0, 1.0, False)[0])

    once = [at(step, keys(64)) for step in range(4)]
    again = [at(step, keys(64)) for step in range(4)]
    np.testing.assert_array_equal(once, again)
    for i in range(4):
        for j in range(i):
            assert np.mean(once[i] == once[j]) < 0.3  # 1 in 11 agrees by chance
    assert np.mean(at(0, keys(64, seed=1)) == once[0]) < 0.3
    assert np.mean(at(0, keys(64, "another stage")) == once[0]) < 0.3
    assert len(set(once[0].tolist())) > 8  # and between rows


def test_lesson_07_a_records_noise_does_not_depend_on_its_row_or_company():
    logits, address = random_logits(6, 64, 11), np.stack([record_key_data("test", i) for i in range(64)])

    def chosen(rows):
        return np.asarray(choose(logits[rows], record_keys(jax.random.key(0), address[rows]), 5, 1.0, 1.0, False)[0])

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
