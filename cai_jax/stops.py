"""Stop strings as an automaton over tokens, so that a decoding loop on the device can end a row where its text will be cut.

Each token is taken through its own text, so a stop string is seen however a tokenizer splits it, also when it ends inside a
token. The decoded text (prompts.read_back) stays the authority; this only saves the work behind the end.
"""

import re
from functools import lru_cache

import numpy as np

from cai_jax.tokenizer import Tokenizer

# States: before any text; 1 to 7: within a character that is spelled in byte tokens, by what may follow; behind such bytes that
# are no text; in the middle of a text; then one for every beginning of a stop string; the last: found.
START, SPOILT, NOTHING = 0, 8, 9
# The bytes of characters behind ASCII, by the Unicode Standard's table 3-7: (state, from byte, to byte, next state).
UTF8 = [(START, 0xC2, 0xDF, 1), (START, 0xE0, 0xE0, 2), (START, 0xE1, 0xEC, 3), (START, 0xED, 0xED, 4), (START, 0xEE, 0xEF, 3)]
UTF8 += [(START, 0xF0, 0xF0, 5), (START, 0xF1, 0xF3, 6), (START, 0xF4, 0xF4, 7)]
UTF8 += [(1, 0x80, 0xBF, NOTHING), (2, 0xA0, 0xBF, 1), (3, 0x80, 0xBF, 1), (4, 0x80, 0x9F, 1)]
UTF8 += [(5, 0x90, 0xBF, 3), (6, 0x80, 0xBF, 3), (7, 0x80, 0x8F, 3)]
# The signs by which a byte-level vocabulary shows bytes (GPT-2's bytes_to_unicode).
SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in SHOWN} | {chr(0x100 + i): b for i, b in enumerate(sorted({*range(256)} - {*SHOWN}))}


@lru_cache(maxsize=8)  # a large vocabulary takes seconds, and every call of the sampler asks
def stop_table(tok: Tokenizer, strings: tuple[str, ...]) -> np.ndarray:
    """Where each token leads from each state: [states, V] of the smallest unsigned dtype, V = tok.vocab_size.

    A row starts in state 0. After `state_B = table[state_B, token_B]` for each of its tokens, a row in state `len(table) - 1`
    has a stop string in its decoded text. It stays there; without strings none gets there. Control tokens, which have no text,
    change nothing. Raises ValueError for an empty string.

    Holds for decoders that join what the tokens stand for, such as those of byte-level, Metaspace and SentencePiece
    vocabularies, whatever they strip at the start of a text. It never says so of a text without a stop string; one is missed
    only if SentencePiece spells a character of it, one behind ASCII, in byte tokens.
    """
    if not strings:
        return np.zeros((2, tok.vocab_size), np.uint8)
    step = _automaton([s.encode() for s in strings])
    first, inner, byte_V = _texts(tok)
    found = NOTHING + len(step) - 1
    table = np.empty((found + 1, len(inner)), np.min_scalar_type(found))
    table[START] = NOTHING + _run(step, [0], first)
    table[NOTHING:-1] = NOTHING + _run(step, range(len(step) - 1), inner)
    table[1:NOTHING] = table[NOTHING]  # a token of text ends the bytes before it, whether they were a character or not
    table[found] = found

    utf8 = np.full((NOTHING, 256), SPOILT)
    for state, low, high, then in UTF8:
        utf8[state, low : high + 1] = then
    byte_tokens, opening = np.flatnonzero(byte_V >= 0), np.flatnonzero(byte_V >= 0x80)
    table[1:NOTHING, byte_tokens] = utf8[1:, byte_V[byte_tokens]]
    table[START, opening] = table[NOTHING:-1, opening] = utf8[START, byte_V[opening]]

    silent = np.flatnonzero([not text for text in inner])
    table[:, silent] = np.arange(found + 1)[:, None]
    table.flags.writeable = False  # it is everybody's
    return table


def _automaton(stops: list[bytes]) -> np.ndarray:
    """The state behind each byte, [n + 1, 256]. State i < n is the longest end of the text so far that begins a stop (0: the
    empty one), state n a stop that was read. (Aho and Corasick 1975, by the definition of their failure links.)"""
    if not all(stops):
        raise ValueError("an empty stop string is in every text")
    begun = sorted({b"", *(s[:i] for s in stops for i in range(len(s)))}, key=len)
    number = {text: i for i, text in enumerate(begun)}
    step = np.zeros((len(begun) + 1, 256), np.int32)
    step[-1] = len(begun)
    for i, text in enumerate(begun):
        for byte in {*b"".join(stops)}:
            read = text + bytes([byte])
            longest = next(read[k:] for k in range(len(read) + 1) if read[k:] in number)
            step[i, byte] = len(begun) if read.endswith(tuple(stops)) else number[longest]
    return step


def _run(step: np.ndarray, states, texts: list[bytes]) -> np.ndarray:
    """The state behind each of V texts from each of the states. -> [len(states), V]."""
    length_V = np.array([len(text) for text in texts])
    joined, begin_V = np.frombuffer(b"".join(texts), np.uint8), np.cumsum(length_V) - length_V
    order = np.argsort(-length_V, kind="stable")  # the texts that go on at a byte stand together, in front
    out = np.repeat(np.array(states, step.dtype)[:, None], len(texts), axis=1)
    for i in range(length_V.max(initial=0)):
        live = np.count_nonzero(length_V > i)
        out[:, :live] = step[out[:, :live], joined[begin_V[order[:live]] + i]]
    return out[:, np.argsort(order)]


def _texts(tok: Tokenizer) -> tuple[list[bytes], list[bytes], np.ndarray]:
    """What each token writes at the start of a text and inside one, and the byte [V] that it stands for if it is one of
    SentencePiece's byte tokens, which are read together with those beside them, or -1."""

    def read(rows):
        return tok.hf.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ids = list(range(tok.vocab_size))
    pieces = [piece or "" for piece in tok.hf.convert_ids_to_tokens(ids)]  # an id may be free
    spelled = [re.fullmatch("<0x([0-9A-F]{2})>", piece) for piece in pieces]
    first = read([[i] for i in ids])
    # Some decoders strip a space at the start, so the text inside is read behind a word.
    word = next(i for i in ids if first[i].isascii() and first[i].isalnum())
    inner = [text.removeprefix(first[word]) for text in read([[word, i] for i in ids])]
    byte_V = np.array([int(m[1], 16) if m and m[0] != text else -1 for m, text in zip(spelled, inner, strict=True)])
    return [*map(_bytes, first, pieces)], [*map(_bytes, inner, pieces)], byte_V


def _bytes(text: str, piece: str) -> bytes:
    """A token's text; where a byte-level vocabulary cuts through a character, its bytes, which the text does not tell."""
    if "\ufffd" in text and BYTE_OF.keys() >= {*piece}:
        return bytes(BYTE_OF[sign] for sign in piece)
    return text.encode()
