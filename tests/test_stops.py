"""The automaton of stop strings against the decoded text itself, in every kind of tokenizer."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_formats
import test_tokenizer
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cai_jax.prompts import stops
from cai_jax.stops import BYTE_OF, stop_table
from cai_jax.tokenizer import Tokenizer

OVERLAPPING = ("aa", "ana", "nab", " A", "n: n", "\n\n")


def byte_fallback(joined: bool = True):
    """As Llama 2's: a line break and most characters are byte tokens, and a text loses its first space."""
    letters = [*"▁anbsHumi:é", "an", "▁an", "▁A", "▁▁", "Human", "▁Human", ":▁", "ssistant", "人"]
    listed = ["<pad>", "<end>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    fast = Fast(models.BPE(vocab={t: i for i, t in enumerate(listed)}, merges=[], byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), *[decoders.ByteFallback()] * joined, decoders.Fuse(), strip])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>"), 1, 0)


@cache
def made(name: str) -> Tokenizer:
    if name == "byte_fallback":
        return byte_fallback()
    if name in test_formats.STYLES:
        return test_formats.made(name, "chatml")
    return test_tokenizer.made(name.removeprefix("their_"))


NAMES = [*test_formats.STYLES, "unigram", "their_sentencepiece", "word_piece", "miniworld", "byte_fallback"]
each = pytest.mark.parametrize("name", NAMES)


def walk(table, ids) -> list[bool]:
    """After each token: whether a stop string was found."""
    state, found = 0, []
    for i in ids:
        state = table[state, i]
        found.append(bool(state == len(table) - 1))
    return found


def holds(tok, ids, strings) -> list[bool]:
    """After each token: whether the decoded text holds a stop string, or did before. (Byte tokens can take text back.)"""
    held = [any(s in tok.decode(ids[: i + 1]) for s in strings) for i in range(len(ids))]
    return np.logical_or.accumulate(held).tolist()


def sequences(tok, strings, count: int, length: int, seed: int = 0):
    """Random tokens: most of them with nothing but characters of the stop strings, some parts of characters, some of any kind;
    and with the strings themselves, as the tokenizer splits them, in between."""
    rng, ids = np.random.default_rng(seed), np.arange(tok.vocab_size)
    texts = [tok.decode([i]) for i in ids]
    near = [i for i in ids if {*texts[i]} <= {*"".join(strings)}]
    parts = [i for i in ids if "\ufffd" in texts[i]] or near
    for _ in range(count):
        drawn = [int(rng.choice((near, parts, ids)[rng.choice(3, p=(0.75, 0.15, 0.1))])) for _ in range(length)]
        if rng.random() < 0.5:
            at, text = rng.integers(length), strings[rng.integers(len(strings))]
            drawn[at:at] = tok.encode(text if rng.random() < 0.5 else text[: rng.integers(1, len(text))])
        yield drawn


@each
@pytest.mark.parametrize("strings", [stops(), OVERLAPPING])
def test_a_stop_is_found_at_the_first_token_at_which_the_text_holds_one(name, strings):
    tok = made(name)
    table = stop_table(tok, strings)
    fired = 0
    for ids in sequences(tok, strings, 150, 9):
        wanted = holds(tok, ids, strings)
        assert walk(table, ids) == wanted, [tok.decode([i]) for i in ids]
        fired += wanted[-1]
    assert 5 <= fired <= 145 or name == "word_piece"  # which has no line breaks


@pytest.mark.parametrize("name", ["byte_level", "tiktoken", "miniworld", "sentencepiece", "byte_fallback"])
def test_stops_behind_ascii(name):
    """Found in a byte-level vocabulary however it cuts their characters; never found where there is none."""
    tok, strings = made(name), ("né", "人a", "é人", "\u0439")
    table = stop_table(tok, strings)
    spelled = {*"".join(strings).encode(), *"\ufffd".encode()}
    ids = [i for i in range(tok.vocab_size) if {*tok.decode([i]).encode()} <= spelled]
    rng, fired = np.random.default_rng(0), 0
    for _ in range(300):
        drawn = rng.choice(ids, 8).tolist()
        drawn[3:3] = tok.encode(strings[rng.integers(4)]) if rng.random() < 0.3 else []
        found, wanted = walk(table, drawn), holds(tok, drawn, strings)
        assert found == wanted or name in ("sentencepiece", "byte_fallback") and not np.any(np.greater(found, wanted))
        fired += found[-1]
    assert fired > 20 or name == "sentencepiece"  # which spells all of them in byte tokens


@each
def test_every_way_of_writing_a_stop_is_found(name):
    """As the tokenizer writes it, and character by character."""
    tok = made(name)
    if name == "word_piece":
        pytest.skip("it writes no line break")
    single = {tok.decode([0, i])[-1:]: i for i in range(tok.vocab_size) if len(tok.decode([i])) == 1}
    table = stop_table(tok, stops())
    for text in stops():
        written = [tok.encode("a" + text), tok.encode("a" + text + " What")]
        written += [[single[c] for c in "a" + text]] if {*"a" + text} <= single.keys() else []
        for ids in written:
            if text in tok.decode(ids):
                assert walk(table, ids)[-1] and not walk(table, ids)[0]
    assert walk(table, tok.encode("\n\nHuman: stop"))[-1]


def test_characters_in_byte_tokens_hide_no_stop_and_make_none():
    tok = made("byte_fallback")
    table = stop_table(tok, ("\n\nHuman:", " A"))
    of = tok.hf.convert_tokens_to_ids
    stop = [*of(["<0x0A>", "<0x0A>", "Human", ":"])]
    smile, broken = [of(f"<0x{b:02X}>") for b in "🙂".encode()], of("<0xC3>")
    assert walk(table, smile + stop)[-1] and tok.decode(smile + stop) == "🙂\n\nHuman:"
    for ids in (smile[:3] + stop, [broken, *stop], [stop[0], broken, *stop[1:]], [*stop[:2], broken, *stop[2:]]):
        assert not any(walk(table, ids)) and "\n" not in tok.decode(ids)
    assert walk(table, [broken, *of(["Human"]), *stop])[-1]  # a token of text between them: the line breaks are text again
    assert walk(table, [broken, tok.eos_id, *stop])[-1] is False and "\n" not in tok.decode([broken, tok.eos_id, *stop])
    rng = np.random.default_rng(0)
    leads = bytes.fromhex("41 7f 80 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")
    others = bytes.fromhex("7f 80 8f 90 9f a0 bf c0")
    told = []
    for _ in range(3000):  # UTF-8 and nothing else: the bytes at which its rules change
        drawn = [rng.choice([*leads]), *rng.choice([*others], rng.integers(4))]
        lead = [of(f"<0x{b:02X}>") for b in drawn]
        told.append("\n" in tok.decode(lead + stop))
        assert walk(table, lead + stop)[-1] == told[-1], tok.decode(lead)
    assert 30 < sum(told) < 2970
    for first in ([], [tok.eos_id], [tok.pad_id, tok.eos_id]):  # the first space of a text is no part of it
        assert walk(table, [*first, of("▁A")])[-1] is False and tok.decode([*first, of("▁A")]) == "A"
    assert walk(table, [of("▁"), of("▁A")])[-1] and tok.decode([of("▁"), of("▁A")]) == " A"


def test_what_looks_like_a_byte_token_is_text_where_the_decoder_says_so():
    tok = byte_fallback(joined=False)
    ids = tok.hf.convert_tokens_to_ids(["<0xC3>", "<0x0A>", "<0x0A>"])
    assert tok.decode(ids) == "<0xC3><0x0A><0x0A>"
    assert walk(stop_table(tok, ("\n\n", "C3><0")), ids) == [False, True, True]
    assert not any(walk(stop_table(tok, ("\n\n",)), ids))


def test_the_signs_of_bytes_are_those_of_byte_level_vocabularies():
    """Every byte that a text can hold, in a character."""
    leads = [0x800, *range(0x1000, 0xD800, 0x1000), 0xE000, 0xF000, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000]
    text, sign_of = "".join(map(chr, [*range(0x800), *leads])), {b: sign for sign, b in BYTE_OF.items()}
    assert BYTE_OF.keys() == {*pre_tokenizers.ByteLevel.alphabet()}
    assert decoders.ByteLevel().decode([sign_of[b] for b in text.encode()]) == text


@each
def test_the_table_is_small_and_its_last_state_is_kept(name):
    tok = made(name)
    table, none = stop_table(tok, OVERLAPPING), stop_table(tok, ())
    assert table.dtype == np.uint8 and table.shape[1] == none.shape[1] == tok.vocab_size
    assert (table[-1] == len(table) - 1).all() and (none[:-1] < len(none) - 1).all()
    for i in tok.hf.all_special_ids:
        if not tok.decode([i]):
            np.testing.assert_array_equal(table[:, i], np.arange(len(table)))
    many = stop_table(tok, tuple(f"\n\n{c} is a longer stop" for c in "abcdefghijklmnop"))
    assert many.dtype == np.uint16 and many.max() == len(many) - 1 > 255


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        stop_table(made("miniworld"), ("\n\nHuman:", ""))


def test_the_loop_of_the_docstring_runs_on_the_device():
    tok = made("miniworld")
    table = stop_table(tok, stops())
    rows = [tok.encode(text)[:8] for text in ("Yes.\n\nHuman: And then? I", "One two three, four five six.")]

    @jax.jit
    def loop(table, tokens_BT):
        def one(carry, token_B):
            state_B, done_B = carry
            state_B = table[state_B, token_B]
            done_B |= state_B == table.shape[0] - 1
            return (state_B, done_B), done_B

        start = jnp.zeros(len(tokens_BT), table.dtype), jnp.zeros(len(tokens_BT), bool)
        return jax.lax.scan(one, start, tokens_BT.T)[1].T

    found = loop(jnp.asarray(table), jnp.array(rows, jnp.int32))
    assert found.tolist() == [walk(table, ids) for ids in rows] and found[0, -1] and not found[1, -1]
