"""Sampled texts are a function of their record alone, whatever slots, caches and restarts do."""

import gc
import itertools
import weakref
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import generate as engine
from cai_jax.config import Sampling
from cai_jax.errors import InputError, Stopped
from cai_jax.generate import Request, sample_chains, sample_texts
from cai_jax.records import Journal
from cai_jax.sampling import record_key_data, record_keys
from cai_jax.score import option_logprobs
from cai_jax.sharding import put_batch
from cai_jax.slots import generate, ready

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
    return {r.key: said for r, said in zip(requests, out, strict=True)}


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
        out = generate(tiny.net(), tiny.on(mesh1), b["t"], b["l"], keys, ends, jnp.float32(1.0), max_new=8)
    sampled = out.tokens_BR[5, : out.lengths_B[5]].tolist()
    record = records[request.key]
    assert (record["text"], record["tokens"]) == (tiny.tokenizer().decode(sampled).strip(), len(sampled))
    assert record["finished"] == bool(out.finished_B[5])


def test_weights_and_cache_are_let_go_with_the_last_text(mesh1, tmp_path, monkeypatch):
    """At once, and not when Python next looks for cycles: the next stage wants the memory."""
    pools = []

    class Seen(engine.Pool):
        def __init__(self, *args):
            super().__init__(*args)
            pools.append(weakref.ref(self))

    monkeypatch.setattr(engine, "Pool", Seen)
    gc.disable()
    try:
        texts(mesh1, tmp_path, REQUESTS[:3])
        assert [pool() for pool in pools] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("lines, cut", [(0, 9), (3, 0), (6, 25), (8, 40)])
def test_lesson_12_killed_and_resumed_with_another_batch_size_gives_the_same_records(whole, mesh1, tmp_path, lines, cut):
    """Killed after some records, in the middle of writing the next; resumed in another order and in batches of another size."""
    folder, wanted = whole
    written = (folder / "critique" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(written) == len(REQUESTS) - 5  # texts with much in common share a chain
    journal = tmp_path / "critique" / "journal.jsonl"
    journal.parent.mkdir()
    journal.write_bytes(b"".join(written[:lines]) + written[lines][:cut])
    backwards = [r for i in range(len(REQUESTS) - 2, -1, -2) for r in REQUESTS[i : i + 2]]
    assert texts(mesh1, tmp_path, backwards, batch_size=4) == wanted
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


def test_a_model_made_ready_answers_as_it_did_and_is_not_laid_out_again(whole, mesh1, tmp_path, monkeypatch):
    with jax.set_mesh(mesh1), journal_in(tmp_path / "critique") as journal:
        lm = ready(tiny.lm(mesh1))
        assert ready(lm) is lm
        monkeypatch.setattr("cai_jax.slots._serving", None)
        out = sample_texts(lm, REQUESTS[:3], SAMPLING, 0, journal, mesh1)
        logp = option_logprobs(lm, CONTEXTS, 4, mesh1, "judge", ["(A", "(B"])
    assert out == [whole[1][r.key] for r in REQUESTS[:3]]
    with jax.set_mesh(mesh1):
        monkeypatch.undo()
        np.testing.assert_allclose(logp, option_logprobs(tiny.lm(mesh1), CONTEXTS, 4, mesh1, "judge", ["(A", "(B"]), rtol=1e-5)


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
    """Also the second of two that would share a slot: before anything is sampled."""
    with pytest.raises(InputError, match=r"'long/0'.* of 121 tokens and 8 new .* of 128.*--config.critique.*max_tokens"):
        texts(mesh1, tmp_path, [Request("short/0", "x" * 120), Request("long/0", "x" * 121)])
    assert (tmp_path / "critique" / "journal.jsonl").read_bytes() == b""


def test_a_text_ends_where_the_model_starts_another_turn(mesh1, tmp_path, monkeypatch):
    """The stop marker and what follows go; a text with a marker is finished, one cut off at max_tokens is not."""
    said = [" Yes.\n\nHuman: and you?", " Never", " No \n"]
    tok = tiny.tokenizer()

    def answer(net, params, prefix, slots, *_, **__):
        ids = [tok.encode(said[0])[:24], tok.encode(said[1]), [*tok.encode(said[2]), tiny.END]]
        tokens = np.zeros((8, 24), np.int32)
        for row, x in zip(tokens, ids, strict=False):
            row[: len(x)] = x
        count, done = np.array([*map(len, ids), *[0] * 5]), np.ones(8, bool)
        return slots._replace(tokens_BR=tokens, count_B=count, done_B=done, finished_B=np.arange(8) == 2)

    monkeypatch.setattr(engine, "decode", answer)
    out = texts(mesh1, tmp_path, [Request(k, k) for k in "abc"], sampling=Sampling(max_tokens=24, batch_size=8))
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
        kept = {k: said for keys, r in journal.done.items() for k, said in zip(keys.split(), r["result"], strict=True)}
    assert 0 < len(kept) < len(REQUESTS) and kept == {k: wanted[k] for k in kept}
    assert texts(mesh1, tmp_path) == wanted


# --- Chains -----------------------------------------------------------------------------------------------------------
EXAMPLES = "Worked examples stand first. "
ROOM = Sampling(temperature=1.0, max_tokens=8, batch_size=8)


def talk(i: int, alone: dict | None = None, examples=EXAMPLES):
    """Three texts, each context the one before and what was said; of `alone`, the requests are written down there."""
    context, said = f"{'q' * (3 * i + 2)}?", []
    for turn in range(3):
        start = examples if turn else ""
        r = Request(f"{i}/{turn}", start + context, [None, 0.7, 0.0][turn])
        if alone is not None:
            alone[r.key] = r
        answer = yield r
        if answer is None:
            return "no room"
        said.append(answer["text"])
        context += answer["text"] + f" Turn {turn}:"
    return said


def chains(mesh, folder, numbers=range(9), prefix=EXAMPLES, alone=None, sampling=ROOM, **options):
    """-> (what each chain returned, the counts of the engine)."""
    counts = []

    class Seen(engine.Pool):
        def summary(self):
            counts.append(dict(self.counts))
            return super().summary()

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh), journal_in(folder / "critique") as journal:
        patch.setattr(engine, "Pool", Seen)
        todo = {str(i): talk(i, alone, **options) for i in numbers}
        out = sample_chains(tiny.lm(mesh), todo, sampling, 0, journal, mesh, prefix=prefix)
    return out, counts[0] if counts else {}


@pytest.fixture(scope="module")
def talks(mesh1, tmp_path_factory):
    alone = {}
    out, counts = chains(mesh1, tmp_path_factory.mktemp("talks"), alone=alone)
    return out, counts, alone


def test_a_chain_says_what_each_of_its_requests_would_get_alone(talks, mesh1, tmp_path):
    """Texts that go on from a slot's own cache and from a shared beginning, against texts that read their whole contexts."""
    out, counts, alone = talks
    assert list(out) == [str(i) for i in range(9)] and len({x for said in out.values() for x in said}) > 20
    for turn, heat in ((0, 1.0), (1, 0.7), (2, 0.0)):
        asked = [r._replace(context=r.context) for r in alone.values() if r.key.endswith(f"/{turn}")]
        with jax.set_mesh(mesh1), journal_in(tmp_path / str(turn) / "critique") as journal:
            todo = {r.key: one(r) for r in asked}
            wanted = sample_chains(tiny.lm(mesh1), todo, replace(ROOM, temperature=heat), 0, journal, mesh1)
        assert [wanted[f"{i}/{turn}"]["text"] for i in range(9)] == [out[str(i)][turn] for i in range(9)]


def one(r: Request):
    return (yield r)


def test_what_is_read_and_what_is_found_in_a_cache_add_up_to_the_contexts(talks):
    _, counts, alone = talks
    prefix = len(tiny.tokenizer().prompt(EXAMPLES))
    total = sum(len(tiny.tokenizer().prompt(r.context)) for r in alone.values())
    assert counts["texts"] == len(alone) == 27
    assert counts["read"] - prefix + counts["kept"] + counts["shared"] == total
    assert counts["shared"] == 18 * prefix  # of the second and third turns
    # A third turn goes on from its second: of its own context all but " Turn 1:" was read or said there.
    assert counts["kept"] >= sum(len(alone[f"{i}/1"].context) - len(EXAMPLES) for i in range(9))


def test_a_chain_is_the_same_on_few_slots_on_long_ones_on_eight_devices_in_pieces_and_without_the_prefix(
    talks, mesh1, mesh8, tmp_path, monkeypatch
):
    out, counts, _ = talks
    few, found = chains(mesh1, tmp_path / "a", sampling=replace(ROOM, batch_size=2))
    assert few == out and found == counts
    spread, _ = chains(mesh8, tmp_path / "b")
    assert spread == out
    apart, found = chains(mesh1, tmp_path / "c", prefix="")
    assert apart == out and "shared" in found and found["shared"] == 0 and found["read"] > counts["read"]
    small, _ = chains(mesh1, tmp_path / "f", sampling=replace(ROOM, cache="int8"))
    monkeypatch.setattr(engine, "LONG", 0)
    alone, _ = chains(mesh8, tmp_path / "d")
    assert alone == out
    alone, _ = chains(mesh1, tmp_path / "g", sampling=replace(ROOM, cache="int8"))
    assert alone == small
    monkeypatch.setattr(engine, "PIECE", 32)
    pieces, found = chains(mesh1, tmp_path / "e", prefix="")
    assert pieces == out


def test_a_chain_without_room_is_told_so_and_the_others_go_on(talks, mesh1, tmp_path):
    """The tiny model's context is 128 tokens: with 30 more the examples outgrow it in some turn of some chains."""
    out, _, _ = talks
    found, _ = chains(mesh1, tmp_path, prefix="", numbers=range(30), examples=EXAMPLES)
    assert {i: x for i, x in found.items() if int(i) < 9} == out
    told = [int(i) for i, x in found.items() if x == "no room"]
    assert told and min(told) > 9 and told == list(range(min(told), 30))


def test_chains_resume_where_a_kill_left_the_journal(talks, mesh1, tmp_path):
    out, _, _ = talks
    assert chains(mesh1, tmp_path, numbers=(0, 4, 7))[0] == {i: out[i] for i in ("0", "4", "7")}
    again, counts = chains(mesh1, tmp_path)
    assert again == out and counts["texts"] == 18
    assert chains(mesh1, tmp_path) == (out, {})
