"""Decoding in slots against the plain forward pass."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import slots
from cai_jax.ahead.cost import COLLECTIVES
from cai_jax.ahead.hlo import parse
from cai_jax.logprobs import target_logprobs
from cai_jax.sampling import record_key_data, record_keys
from cai_jax.score import hidden_states, row_batch
from cai_jax.sharding import put_batch
from cai_jax.slots import Sampled, generate

P, R = 16, 12
LENGTHS = (16, 1, 7, 12, 16, 3, 0, 9)  # full rows, short ones, and one row of padding
NO_STOP, STOP = (-1,) * 8, (5, 20, 33, 41, 58, 66, 79, 90)  # eight ends, so that many rows end and some do not
T = 0.7
CALLS = ("calls", "to_apply", "body", "condition", "branch_computations", "true_computation", "false_computation")


def run(mesh, tokens, lengths, greedy=False, stop=NO_STOP, seed=0, names="abcdefgh", params=None) -> Sampled:
    """The engine's output as NumPy arrays. One program per mesh, greediness and width."""
    addresses = np.stack([record_key_data("test", n) for n in names])
    with jax.set_mesh(mesh):
        b = put_batch({"tokens": tokens, "lengths": lengths, "addresses": addresses}, mesh)
        keys, ends = record_keys(jax.random.key(seed), b["addresses"]), jnp.array(stop, jnp.int32)
        params = params or tiny.on(mesh)
        out = generate(tiny.net(), params, b["tokens"], b["lengths"], keys, ends, jnp.float32(0 if greedy else T), max_new=R)
    return Sampled(*map(np.asarray, jax.device_get(out)))


def sample(mesh, lengths=LENGTHS, width=P, pad=tiny.PAD, **options) -> Sampled:
    """Continuations of random prompts."""
    tokens, lengths = tiny.rows(lengths, P, pad=pad)
    return run(mesh, np.pad(tokens, ((0, 0), (0, width - P)), constant_values=pad), lengths, **options)


def joined(out: Sampled, lengths=LENGTHS, pad=tiny.PAD):
    """Prompt and response contiguous: [B, P + R], and the lengths."""
    prompts, lengths = tiny.rows(lengths, P, pad=pad)
    whole = np.zeros((len(lengths), P + R), np.int32)
    for i, n in enumerate(lengths):
        whole[i, : n + R] = np.concatenate([prompts[i, :n], out.tokens_BR[i]])
    return whole, lengths + out.lengths_B


def teacher_forced(out: Sampled, lengths=LENGTHS):
    """Logits [B, R, V] that predict each response token, by one plain forward pass on one device."""
    whole, ends = joined(out, lengths)
    logits = np.asarray(tiny.logits(tiny.net(), tiny.params(), whole, ends))
    at = np.maximum(np.array(lengths), 1)[:, None] - 1 + np.arange(R)[None]
    return np.take_along_axis(logits, at[:, :, None], axis=1)


def inside(out: Sampled):
    return np.arange(R)[None] < out.lengths_B[:, None]


@pytest.fixture(params=["one device", "eight devices"])
def mesh(request, mesh1, mesh8):
    return mesh1 if request.param == "one device" else mesh8


def test_lesson_08_greedy_equals_teacher_forced_argmax(mesh):
    out = sample(mesh, greedy=True)
    assert out.lengths_B.tolist() == [0 if n == 0 else R for n in LENGTHS]
    wanted = teacher_forced(out).argmax(axis=-1)
    np.testing.assert_array_equal(out.tokens_BR[inside(out)], wanted[inside(out)])
    assert len(np.unique(out.tokens_BR)) > 15  # a model that repeats one token would prove nothing


def test_lesson_02_and_03_sampler_logprobs_are_the_scorers_at_the_same_temperature(mesh):
    """At a temperature of 0.7, on rows with and without padding, inside the prompt's padding and behind the end."""
    out = sample(mesh)
    whole, ends = joined(out)

    @jax.jit
    def score(params, tokens_BT, lengths_B):
        hidden = hidden_states(tiny.net(), params, row_batch(tokens_BT, lengths_B))
        return target_logprobs(tiny.net(), params, hidden[:, :-1], tokens_BT[:, 1:], T)[0]

    scored = np.asarray(score(tiny.params(), whole, ends))
    for i, n in enumerate(LENGTHS):
        if n:
            np.testing.assert_allclose(out.logp_BR[i], scored[i, n - 1 : n - 1 + R], atol=2e-5)
    by_hand = tiny.log_softmax(teacher_forced(out) / T)
    by_hand = np.take_along_axis(by_hand, out.tokens_BR[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(out.logp_BR[inside(out)], by_hand[inside(out)], atol=2e-5)
    assert out.logp_BR[inside(out)].min() < -2  # not only the likeliest tokens were drawn


def test_eight_devices_sample_what_one_device_samples(mesh1, mesh8):
    for greedy, stop in ((True, NO_STOP), (False, NO_STOP), (False, STOP)):
        a, b = sample(mesh1, greedy=greedy, stop=stop), sample(mesh8, greedy=greedy, stop=stop)
        for name in ("tokens_BR", "lengths_B", "finished_B"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.logp_BR, b.logp_BR, atol=1e-5)


def test_lesson_04_the_end_is_inside_the_length_has_a_logprob_and_nothing_follows(mesh):
    free, out = sample(mesh), sample(mesh, stop=STOP)
    real = np.array(LENGTHS) > 0
    ended = real & out.finished_B
    assert ended.sum() >= 2 and (~out.finished_B).sum() >= 2
    for i in np.flatnonzero(real):
        n, tokens = out.lengths_B[i], out.tokens_BR[i]
        assert bool(np.isin(tokens[n - 1], STOP)) == out.finished_B[i]
        assert not np.isin(tokens[: n - 1], STOP).any()
        assert out.finished_B[i] or n == R
        assert (tokens[n:] == 0).all() and (out.logp_BR[i, n:] == 0).all()
        assert (out.logp_BR[i, :n] < 0).all()
        np.testing.assert_array_equal(tokens[:n], free.tokens_BR[i, :n])  # ends cut, they do not change what came before


def test_an_end_in_the_last_place_is_finished_and_a_full_row_without_one_is_not(mesh1):
    free = sample(mesh1, greedy=True)
    i = next(i for i, n in enumerate(LENGTHS) if n and free.tokens_BR[i, -1] not in free.tokens_BR[i, :-1])
    out = sample(mesh1, greedy=True, stop=(int(free.tokens_BR[i, -1]),) + NO_STOP[1:])
    assert out.finished_B[i] and out.lengths_B[i] == R
    assert not free.finished_B[i] and free.lengths_B[i] == R


def test_lesson_05_rows_of_length_zero_yield_nothing(mesh):
    empty = LENGTHS.index(0)
    for out in (sample(mesh), sample(mesh, stop=STOP)):
        assert out.lengths_B[empty] == 0
        assert (out.tokens_BR[empty] == 0).all() and (out.logp_BR[empty] == 0).all()


def test_lesson_05_an_end_at_once_leaves_one_token(mesh1):
    free = sample(mesh1, greedy=True)
    first = np.unique(free.tokens_BR[:, 0])[:8].tolist()
    out = sample(mesh1, greedy=True, stop=tuple((first + [-1] * 8)[:8]))
    once = np.isin(free.tokens_BR[:, 0], first) & (np.array(LENGTHS) > 0)
    assert once.sum() >= 3 and (out.lengths_B[once] == 1).all() and out.finished_B[once].all()
    np.testing.assert_array_equal(out.tokens_BR[once, 0], free.tokens_BR[once, 0])


def test_lesson_05_the_pad_id_in_a_prompt_is_a_token_like_any_other(mesh1):
    """Rows that end in pad ids inside their length, with the end's id equal to the pad id as well."""
    tokens = np.zeros((8, P), np.int32)  # 0 is the pad id
    tokens[:, 0], tokens[4:, 1], tokens[2:, 3] = 7, 9, tiny.PAD
    lengths = np.array([4, 1, 4, 5, 6, 16, 2, 3], np.int32)
    out = run(mesh1, tokens, lengths, greedy=True, stop=(tiny.PAD,) + NO_STOP[1:])
    assert (out.lengths_B >= 1).all()
    whole = np.zeros((8, P + R), np.int32)
    for i, n in enumerate(lengths):
        whole[i, : n + R] = np.concatenate([tokens[i, :n], out.tokens_BR[i]])
    logits = np.asarray(tiny.logits(tiny.net(), tiny.params(), whole, lengths + out.lengths_B))
    wanted = np.take_along_axis(logits, (lengths[:, None] - 1 + np.arange(R)[None])[:, :, None], axis=1).argmax(axis=-1)
    np.testing.assert_array_equal(out.tokens_BR[inside(out)], wanted[inside(out)])
    assert (out.tokens_BR[0] != out.tokens_BR[1]).any()  # [7, 0, 0, 0] is not [7]


def test_padding_of_prompts_is_never_seen(mesh1):
    """Another width and other ids behind the prompts: the same tokens and the same log-probs."""
    a, b, c = sample(mesh1), sample(mesh1, pad=77), sample(mesh1, width=24)
    assert tiny.same_bits(a, b)
    np.testing.assert_array_equal(a.tokens_BR, c.tokens_BR)
    np.testing.assert_allclose(a.logp_BR, c.logp_BR, atol=1e-5)


def test_lesson_07_noise_has_an_address(mesh1):
    """The same in a second run; another for another seed, record and step."""
    a = sample(mesh1)
    assert tiny.same_bits(a, sample(mesh1))
    seed, names = sample(mesh1, seed=1), sample(mesh1, names="abcdefgX")
    assert (a.tokens_BR[0] != seed.tokens_BR[0]).any()
    np.testing.assert_array_equal(a.tokens_BR[:7], names.tokens_BR[:7])
    assert (a.tokens_BR[7] != names.tokens_BR[7]).any()
    alike = sample(mesh1, names="aaaaaaaa", lengths=(5,) * 8)  # the prompts differ, the noise does not
    assert len({tuple(row) for row in alike.tokens_BR}) == 8


def test_a_slot_holds_what_was_asked_in_whole_pages_where_there_are_any(monkeypatch):
    asked = range(1, 1200)
    for machine, step in (("cpu", 128), ("tpu", 256)):
        monkeypatch.setattr(slots, "machine", lambda machine=machine: machine)
        held = [slots.room(n) for n in asked]
        assert all(0 <= got - n < max(step, n) for got, n in zip(held, asked, strict=True)) and held == sorted(held)
        assert {got % step for got in held if got > 256} == {0}


def test_noise_differs_from_step_to_step(mesh1):
    """A model whose every prediction is the same: with one noise for all steps, all tokens would be the same."""
    flat = jax.tree.map(jnp.zeros_like, tiny.on(mesh1))
    out = run(mesh1, *tiny.rows((4,) * 8, P), params=flat)
    assert all(len(set(row.tolist())) > 6 for row in out.tokens_BR)
    np.testing.assert_allclose(out.logp_BR, -np.log(98), rtol=1e-5)


def messages_of_a_step(mesh, cfg, gather=True, **rules):
    """The shapes that devices send one another in each decoding step, by what sends them."""
    with jax.set_mesh(mesh):
        net = tiny.net(cfg, unrolled=True)
        params, empty = slots.serving(tiny.net(cfg), tiny.on(mesh, cfg), gather), slots.new(net, 16, 64, 8)
        ends = slots.Rules(jnp.array([1], jnp.int32), jnp.zeros((2, cfg.vocab_size), jnp.int8))
        text = slots.decode.lower(net, params, None, empty, ends, 4, gather=gather, **rules).compile().as_text()
    computations, _ = parse(text)
    loop = next(
        op
        for ops in computations.values()
        for op in ops.values()
        if op.kind == "while" and op.scope().endswith("decoding/while")
    )
    found, waiting = {}, {*loop.called("body")}
    seen = set()
    while waiting:
        seen.add(name := waiting.pop())
        for op in computations[name].values():
            waiting |= {n for how in CALLS for n in op.called(how)} - seen
            if op.kind.removesuffix("-start") in COLLECTIVES:
                found.setdefault(op.kind, []).extend(s.dims for s in op.shapes)
    return found


@pytest.mark.parametrize("rules", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}])
@pytest.mark.parametrize("cfg", [tiny.CFG, tiny.UNTIED], ids=["tied", "untied"])
def test_a_decoding_step_sends_no_logits_and_no_weights(cfg, rules, mesh8):
    """Hidden states of a device's rows at most, and what is found per row: nothing has an axis of the vocabulary, and the only
    thing that is gathered are the rows' tokens."""
    found = messages_of_a_step(mesh8, cfg, **rules)
    assert found.pop("all-gather") == [(2, 4, 1)]
    assert max(prod(shape) for shapes in found.values() for shape in shapes) == 4 * cfg.width
    assert not any(size % 7 == 0 for shapes in found.values() for shape in shapes for size in shape)


def test_a_choice_that_sorts_would_gather_the_logits(mesh8, monkeypatch):
    """What the test above would see."""

    def sorting(logits_BV, *_):
        order_BV = jnp.argsort(logits_BV, axis=1, descending=True)
        return order_BV[:, 0].astype(jnp.int32), logits_BV[:, 0]

    monkeypatch.setattr(slots, "choose", sorting)
    jax.clear_caches()
    found = messages_of_a_step(mesh8, tiny.CFG)
    assert any(size % 7 == 0 for shapes in found.values() for shape in shapes for size in shape), found
    jax.clear_caches()
