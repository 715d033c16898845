"""Text and ids in four kinds of tokenizer: byte-level BPE, Unigram with ▁ (two spellings), WordPiece, the embedded one."""

from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cai_jax import tokenizer
from cai_jax.errors import InputError
from cai_jax.prompts import OPTIONS
from cai_jax.tokenizer import Tokenizer

BASE = Path(tokenizer.__file__).parent / "miniworld" / "base"
CORPUS = [
    "\n\nHuman: Which is better? Options:\n (A) yes\n (B) no\n\nThe answer is: (A)",
    "\n\nHuman: Which of these is worse?\n\nThe answer is: (B)\n\nAssistant: Hello there, no pad at the end.",
    "spelled: < p a d e n > dead-end",
]
CONTEXT = "\n\nHuman: Which is better? Options:\n (A) yes\n (B) no\n\nThe answer is:"
CONTROL = ["<pad>", "<end>", "[UNK]"]


def byte_level():
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(single="<end> $A <end>", special_tokens=[("<end>", 1)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return fast, trainers.BpeTrainer(vocab_size=400, special_tokens=CONTROL[:2], initial_alphabet=alphabet, show_progress=False)


def unigram():
    fast = Fast(models.Unigram())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast, trainers.UnigramTrainer(vocab_size=80, special_tokens=CONTROL, unk_token="[UNK]", show_progress=False)


def sentencepiece():
    """As converted from SentencePiece: a ▁ is put before every text, so an option encoded alone has one too many."""
    letters = sorted({c for text in CORPUS for c in text} - {" ", "(", "A", "B", ")"})
    vocab = [(c, 0.0) for c in CONTROL] + [("▁", -2.0), ("▁(", -3.0), ("A", -3.0), ("B", -3.0), (")", -3.0)]
    fast = Fast(models.Unigram(vocab + [(c, -5.0) for c in [*letters, "<", ">"]], unk_id=2))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return fast, None


def word_piece():
    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return fast, trainers.WordPieceTrainer(vocab_size=150, special_tokens=CONTROL, show_progress=False)


KINDS = {f.__name__: f for f in (byte_level, unigram, sentencepiece, word_piece)}


@cache
def made(name: str) -> Tokenizer:
    if name == "miniworld":
        return tokenizer.load(str(BASE))
    fast, trainer = KINDS[name]()
    if trainer:
        fast.train_from_iterator(CORPUS, trainer)
    unknown = {"unk_token": "[UNK]"} if fast.token_to_id("[UNK]") is not None else {}
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>", **unknown)
    return Tokenizer(hf, hf.eos_token_id, hf.pad_token_id)


each = pytest.mark.parametrize("name", [*KINDS, "miniworld"])


@each
def test_lesson_10_an_option_is_read_as_it_is_in_its_context(name):
    """Its log-prob is that of context + option only if the ids are those of context + option."""
    tok = made(name)
    context, options = tok.options(CONTEXT, OPTIONS)
    for ids, option in zip(options, OPTIONS, strict=True):
        assert context + ids == tok.encode(CONTEXT + option)
        assert tok.decode(ids).replace(" ", "") == option.replace(" ", "")
    assert options[0] != options[1] and context == tok.encode(CONTEXT)[: len(context)]


def test_lesson_10_the_tokenizers_differ_in_what_the_test_is_about():
    """One token or several, of like or unlike count, and not what the option alone would be."""
    lengths = {name: [len(ids) for ids in made(name).options(CONTEXT, OPTIONS)[1]] for name in (*KINDS, "miniworld")}
    assert lengths["miniworld"] == [1, 1] and lengths["byte_level"] == lengths["sentencepiece"] == [3, 3]
    assert len(set(lengths["unigram"])) == 2
    tok = made("sentencepiece")
    assert tok.encode(OPTIONS[0]) != tok.options(CONTEXT, OPTIONS)[1][0]


def test_lesson_10_a_token_over_the_border_goes_to_the_options():
    """': (' is one token here, so the context ends before the colon and every option starts with it."""
    vocab = {t: i for i, t in enumerate(["<pad>", "<end>", "a", ":", " ", "(", "A", ")", "B", ": (", " (", ": "])}
    fast = Fast(models.BPE(vocab=vocab, merges=[(":", " "), (": ", "(")]))
    tok = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>"), 1, 0)
    assert tok.encode("a:") == [2, 3]
    assert tok.options("a:", OPTIONS) == ([2], [[9, 6, 7], [9, 8, 7]])


def test_options_that_cannot_be_told_apart_are_an_error():
    """They would give every comparison the label 0.5."""
    vocab = {t: i for i, t in enumerate([*CONTROL, "is", ":", "(", ")"])}
    fast = Fast(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>", unk_token="[UNK]")
    tok = Tokenizer(hf, 1, 0)
    with pytest.raises(InputError, match="cannot tell the options .* apart"):
        tok.options("is:", OPTIONS)
    with pytest.raises(InputError, match="nothing in common"):
        tok.options("", OPTIONS)


@each
def test_lesson_26_control_tokens_spelled_in_a_text_stay_text(name):
    tok = made(name)
    control = set(tok.hf.all_special_ids) - {tok.hf.unk_token_id}
    assert {tok.eos_id, tok.pad_id} <= control
    for token in (tok.hf.eos_token, tok.hf.pad_token):
        for text in (f"yes {token} no", f"yes{token}no", token, token * 2):
            ids = tok.encode(text)
            assert ids and control.isdisjoint(ids), text
            read = tok.decode(ids).replace(" ", "")
            assert read == text.replace(" ", "") if name != "word_piece" else "yes" in read or "yes" not in text


def test_lesson_26_the_text_of_a_control_token_is_split_as_any_text():
    tok = made("byte_level")
    assert tok.hf.convert_ids_to_tokens(tok.encode("yes<end>yes")) == ["yes", "<", "end", ">", "yes"]


@each
def test_nothing_is_added_and_control_tokens_are_not_shown(name):
    tok = made(name)
    ids = tok.encode("Which is better")
    assert ids and not {tok.eos_id, tok.pad_id} & set(ids)
    assert tok.decode([*ids, tok.eos_id, tok.pad_id, tok.pad_id]).strip() == "Which is better"
    assert tok.encode("") in ([], tok.encode(" "))
    assert tok.vocab_size > max(ids)


@pytest.mark.parametrize("name", ["byte_level", "miniworld"])
def test_every_text_comes_back_as_it_was(name):
    tok = made(name)
    for text in (CONTEXT, " (A)", "  two  spaces , and .", "é 漢字 🙂 \u2028\t\r\n", "{braces} <b> %s"):
        assert tok.decode(tok.encode(text)) == text


# Folders


def saved(folder, **tokens) -> str:
    fast, trainer = byte_level()
    fast.train_from_iterator(CORPUS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, **tokens).save_pretrained(folder)
    return str(folder)


def test_a_folder_is_loaded_with_its_control_tokens(tmp_path):
    tok = tokenizer.load(saved(tmp_path, eos_token="<end>", pad_token="<pad>"))
    assert (tok.pad_id, tok.eos_id) == (0, 1)
    assert tok.encode(CONTEXT) == made("byte_level").encode(CONTEXT)


def test_lesson_05_without_a_pad_token_pad_is_the_end(tmp_path):
    tok = tokenizer.load(saved(tmp_path, eos_token="<end>"))
    assert tok.pad_id == tok.eos_id == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer at .*nowhere.*--config.model.path"):
        tokenizer.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="has no eos_token"):
        tokenizer.load(saved(tmp_path))


def test_lesson_26_control_tokens_that_only_the_vocabulary_lists_are_no_text():
    fast, trainer = unigram()
    trainer.special_tokens = [*CONTROL, "<tool>"]
    fast.train_from_iterator([*CORPUS, "tool"], trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<end>", unk_token="[UNK]")
    tok = Tokenizer(hf, hf.eos_token_id, hf.pad_token_id)
    number = hf.convert_tokens_to_ids("<tool>")
    assert number not in hf.all_special_ids and hf.added_tokens_decoder[number].special
    assert number not in tok.encode("a <tool> b")


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer.json", "version https://git-lfs", "cannot be read"),
        ("tokenizer_config.json", "[1]", "cannot be read"),
        ("generation_config.json", "[]", "wanted a JSON object, got list"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id holds '</s>'"),
        ("generation_config.json", '{"eos_token_id": [1, 99999999999]}', "eos_token_id holds 99999999999"),
    ],
)
def test_a_broken_tokenizer_folder_is_named(tmp_path, file, text, message):
    made("byte_level").hf.save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        tokenizer.load(str(tmp_path))
