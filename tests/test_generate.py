"""The engine against the plain forward pass, and sampled texts that are a function of their record alone."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import generate as engine
from cai_jax.config import Sampling
from cai_jax.generate import Request, Sampled, generate, sample_texts
from cai_jax.records import Journal
from cai_jax.sampling import record_key_data, record_keys
from cai_jax.score import hidden_states, row_batch, target_logprobs
from cai_jax.sharding import put_batch
from cai_jax.workdir import InputError, Stopped

P, R = 16, 12
LENGTHS = (16, 1, 7, 12, 16, 3, 0, 9)  # full rows, short ones, and one row of padding
NO_STOP, STOP = (-1,) * 8, (5, 20, 33, 41, 58, 66, 79, 90)  # eight ends, so that many rows end and some do not
T = 0.7


def run(mesh, tokens, lengths, greedy=False, stop=NO_STOP, seed=0, names="abcdefgh", params=None) -> Sampled:
    """The engine's output as NumPy arrays. One program per mesh, greediness and width."""
    addresses = np.stack([record_key_data("test", n) for n in names])
    with jax.set_mesh(mesh):
        b = put_batch({"tokens": tokens, "lengths": lengths, "addresses": addresses}, mesh)
        keys, ends = record_keys(jax.random.key(seed), b["addresses"]), jnp.array(stop, jnp.int32)
        params = params or tiny.on(mesh)
        out = generate(tiny.net(), params, b["tokens"], b["lengths"], keys, ends, jnp.float32(T), max_new=R, greedy=greedy)
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


def test_noise_differs_from_step_to_step(mesh1):
    """A model whose every prediction is the same: with one noise for all steps, all tokens would be the same."""
    flat = jax.tree.map(jnp.zeros_like, tiny.on(mesh1))
    out = run(mesh1, *tiny.rows((4,) * 8, P), params=flat)
    assert all(len(set(row.tolist())) > 6 for row in out.tokens_BR)
    np.testing.assert_allclose(out.logp_BR, -np.log(98), rtol=1e-5)


# --- Texts ------------------------------------------------------------------------------------------------------------
LONG = ["z" * 33, "A longer question, in the next bucket", "One more of the long: " + "w" * 20]
CONTEXTS = ["Hi", "Who is there?", "x" * 31, "y" * 32, *LONG]
REQUESTS = [Request(f"record-{i}/{turn}", f"{c} {turn}") for i, c in enumerate(CONTEXTS) for turn in (0, 1)]
SAMPLING = Sampling(temperature=1.0, max_tokens=8, batch_size=8)


@contextmanager
def journal_in(folder):
    journal = Journal(folder / "journal.jsonl")
    try:
        yield journal
    finally:
        journal._file.close()


def texts(mesh, folder, requests=REQUESTS, batch_size=8, sampling=SAMPLING, seed=0, stage="critique"):
    """-> {key: record} of the requests, sampled with a journal in `folder`/`stage`."""
    with jax.set_mesh(mesh), journal_in(folder / stage) as journal:
        out = sample_texts(tiny.lm(mesh), requests, replace(sampling, batch_size=batch_size), seed, journal, mesh)
    assert [r["key"] for r in out] == [r.key for r in requests]
    return {r["key"]: r for r in out}


@pytest.fixture(scope="module")
def whole(mesh1, tmp_path_factory):
    """A run left alone: its folder and its records."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, texts(mesh1, folder)


def test_sampled_texts_are_those_of_the_engine(whole, mesh1):
    _, records = whole
    assert len({r["text"] for r in records.values()}) == len(REQUESTS)
    assert all(1 <= r["tokens"] <= 8 and len(r["text"]) <= r["tokens"] for r in records.values())
    request = REQUESTS[2]
    ids = tiny.tokenizer().encode(request.context)
    tokens = np.zeros((8, 32), np.int32)
    tokens[5, : len(ids)] = ids
    lengths, addresses = np.zeros(8, np.int32), np.zeros((8, 2), np.uint32)
    lengths[5], addresses[5] = len(ids), record_key_data("critique", request.key)
    with jax.set_mesh(mesh1):
        b = put_batch({"t": tokens, "l": lengths, "a": addresses}, mesh1)
        keys, ends = record_keys(jax.random.key(0), b["a"]), jnp.array([tiny.END], jnp.int32)
        options = {"max_new": 8, "top_p": 1.0, "greedy": False}  # as sample_texts gives them, so that its program is shared
        out = generate(tiny.net(), tiny.on(mesh1), b["t"], b["l"], keys, ends, jnp.float32(1.0), **options)
    sampled = out.tokens_BR[5, : out.lengths_B[5]].tolist()
    record = records[request.key]
    assert (record["text"], record["tokens"]) == (tiny.tokenizer().decode(sampled).strip(), len(sampled))
    assert record["finished"] == bool(out.finished_B[5])


@pytest.mark.parametrize("lines, cut", [(0, 9), (5, 0), (9, 25), (13, 40)])
def test_lesson_12_killed_and_resumed_with_another_batch_size_gives_the_same_records(whole, mesh1, tmp_path, lines, cut):
    """Killed after some records, in the middle of writing the next; resumed in another order and in batches of another size."""
    folder, wanted = whole
    written = (folder / "critique" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(written) == len(REQUESTS)
    journal = tmp_path / "critique" / "journal.jsonl"
    journal.parent.mkdir()
    journal.write_bytes(b"".join(written[:lines]) + written[lines][:cut])
    assert texts(mesh1, tmp_path, REQUESTS[::-1], batch_size=4) == wanted
    again = journal.read_bytes()
    assert again.startswith(b"".join(written[:lines]))  # what was done was not done again
    assert sorted(again.splitlines()) == sorted(line.rstrip(b"\n") for line in written)


def test_texts_do_not_depend_on_batch_size_order_company_or_mesh(whole, mesh1, mesh8, tmp_path):
    _, wanted = whole
    mixed = [REQUESTS[i] for i in np.random.default_rng(0).permutation(len(REQUESTS))]
    assert texts(mesh1, tmp_path / "a", mixed, batch_size=4) == wanted
    few = texts(mesh1, tmp_path / "b", REQUESTS[3:8])
    assert few == {k: wanted[k] for k in few}
    short = texts(mesh8, tmp_path / "c", REQUESTS[:5])
    assert short == {k: wanted[k] for k in short}


def test_texts_depend_on_seed_key_stage_and_temperature(whole, mesh1, tmp_path):
    _, wanted = whole
    other = texts(mesh1, tmp_path / "a", seed=1)
    assert sum(other[k]["text"] != wanted[k]["text"] for k in wanted) > 10
    renamed = texts(mesh1, tmp_path / "b", [Request("new/" + r.key, r.context) for r in REQUESTS])
    assert sum(renamed["new/" + k]["text"] != wanted[k]["text"] for k in wanted) > 10
    stage = texts(mesh1, tmp_path, stage="preferences")
    assert sum(stage[k]["text"] != wanted[k]["text"] for k in wanted) > 10


def test_what_must_not_be_lost_is_sampled_to_the_end_after_sigterm(mesh1, tmp_path, monkeypatch):
    """PPO watches its policy before it saves: a request to stop there waits."""

    def stop():
        raise Stopped("on request")

    monkeypatch.setattr("cai_jax.generate.raise_if_stopping", stop)
    with pytest.raises(Stopped):
        texts(mesh1, tmp_path / "a", REQUESTS[:3])
    with jax.set_mesh(mesh1), journal_in(tmp_path / "b") as journal:
        out = sample_texts(tiny.lm(mesh1), REQUESTS[:3], SAMPLING, 0, journal, mesh1, stoppable=False)
    assert len(out) == 3


def test_temperature_zero_is_greedy_whatever_the_seed(mesh1, tmp_path):
    greedy = Sampling(temperature=0.0, max_tokens=8, batch_size=8)
    a, b = (texts(mesh1, tmp_path / str(s), REQUESTS[:4], sampling=greedy, seed=s) for s in (0, 1))
    assert a == b
    ids = tiny.tokenizer().encode(REQUESTS[0].context)
    for _ in range(a[REQUESTS[0].key]["tokens"]):
        row = np.zeros((1, 48), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.asarray(tiny.logits(tiny.net(), tiny.params(), row, np.array([len(ids)])))[0, len(ids) - 1].argmax()))
    prompt = len(tiny.tokenizer().encode(REQUESTS[0].context))
    assert a[REQUESTS[0].key]["text"] == tiny.tokenizer().decode(ids[prompt:]).strip()


def test_a_prompt_too_long_for_the_model_names_record_and_flag(mesh1, tmp_path):
    with pytest.raises(InputError, match=r"'long/0'.* of 121 tokens and 8 new .* of 128.*--config.critique.*max_tokens"):
        texts(mesh1, tmp_path, [Request("long/0", "x" * 121)])


def test_a_text_ends_where_the_model_starts_another_turn(mesh1, tmp_path, monkeypatch):
    """The stop marker and what follows go; a text with a marker is finished, one cut off at max_tokens is not."""
    said = [" Yes.\n\nHuman: and you?", " Never", " No \n"]
    tok = tiny.tokenizer()

    def answer(net, params, tokens_BP, lengths_B, *_, max_new, **__):
        ids = [tok.encode(said[0])[:max_new], tok.encode(said[1]), [*tok.encode(said[2]), tiny.END]]
        tokens = np.zeros((8, max_new), np.int32)
        for row, x in zip(tokens, ids, strict=False):
            row[: len(x)] = x
        return Sampled(tokens, np.array([*map(len, ids), *[0] * 5]), np.arange(8) == 2, np.zeros((8, max_new)))

    monkeypatch.setattr(engine, "generate", answer)
    out = texts(mesh1, tmp_path, [Request(k, k) for k in "abc"], sampling=Sampling(max_tokens=24))
    assert [out[k]["text"] for k in "abc"] == ["Yes.", "Never", "No"]
    assert [out[k]["finished"] for k in "abc"] == [True, False, True]
    assert [out[k]["tokens"] for k in "abc"] == [22, 6, 6]


def test_a_stop_between_batches_keeps_what_is_done(whole, mesh1, tmp_path, monkeypatch):
    _, wanted = whole
    calls = itertools.count()

    def stop():
        if next(calls) == 1:
            raise Stopped("stopped on request")

    monkeypatch.setattr(engine, "raise_if_stopping", stop)
    with pytest.raises(Stopped):
        texts(mesh1, tmp_path)
    with journal_in(tmp_path / "critique") as journal:
        kept = journal.done
    assert 0 < len(kept) < len(REQUESTS) and kept == {k: wanted[k] for k in kept}
    assert texts(mesh1, tmp_path) == wanted
