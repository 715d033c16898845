"""Text <-> token ids. The only file that imports transformers' tokenizers."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_jax.errors import InputError
from cai_jax.files import read_json

# Control tokens in a string: noncharacters of Unicode, which no text for interchange holds. Number i stands for controls[i].
MARKS = re.compile(r"[\ufdd0-\ufdef]")


def mark(i: int) -> str:
    """The character that stands for control token `i` of a tokenizer's `controls`."""
    return chr(0xFDD0 + i)


@dataclass(frozen=True)
class Tokenizer:
    """`hf` is the underlying tokenizer; pad and EOS ids always differ in meaning, even where a checkpoint shares one id:
    lengths are data in this project, so nothing is ever found by comparing ids with pad."""

    hf: Any
    eos_id: int
    pad_id: int
    start: tuple[int, ...] = ()  # what every prompt begins with: BOS, a system prompt
    controls: tuple[int, ...] = ()  # control tokens that templates may write, by their marks
    also_end: tuple[int, ...] = ()  # tokens besides EOS that end a text

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_id, *(i for i in self.also_end if i != self.eos_id))

    @property
    def vocab_size(self) -> int:
        return len(self.hf)

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of control tokens, those that only the vocabulary marks as such included."""
        return frozenset(self.hf.all_special_ids) | {i for i, t in self.hf.added_tokens_decoder.items() if t.special}

    @property
    def rows(self) -> int:
        """Of an embedding that holds every token that a text, a template or an end can need. A tokenizer may list more: control
        tokens of a larger sibling, which nothing here writes."""
        written = {*self.start, *self.controls, self.eos_id}
        return 1 + max(i for i in range(len(self.hf)) if i not in self.special or i in written)

    def prompt(self, text: str) -> list[int]:
        """Ids of a whole context: `start` and the text."""
        return [*self.start, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Ids of text. A control token spelled out in it stays text, its mark does not; nothing is added."""
        ids = []
        for part in re.split(f"({MARKS.pattern})", text) if self.controls else [text]:
            at = ord(part) - ord(mark(0)) if MARKS.fullmatch(part) else len(self.controls)
            ids += [self.controls[at]] if at < len(self.controls) else self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        ids = self.hf(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        control = self.special - {self.hf.unk_token_id} | {self.eos_id, self.pad_id}
        if control.isdisjoint(ids):
            return ids
        # A Unigram vocabulary lists its control tokens as pieces, and they win: spelled by characters they stay text.
        spelled = [self.hf.convert_tokens_to_ids(list(self.hf.convert_ids_to_tokens(i))) if i in control else [i] for i in ids]
        return [i for part in spelled for i in part if i is not None]

    def decode(self, ids) -> str:
        """Text of ids, control tokens left out."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def options(self, context: str, options: tuple[str, ...]) -> tuple[list[int], list[list[int]]]:
        """A context and the ids of each option as the tokenizer splits context + option.

        A tokenizer may join the end of the context with the start of an option; the context given back is the part that
        all encodings share, and each option is what follows it, so log-probs of whole options can be compared.
        """
        context_ids = self.prompt(context)
        full = [self.prompt(context + o) for o in options]
        shared = len(context_ids)
        while shared and any(ids[:shared] != context_ids[:shared] for ids in full):
            shared -= 1
        if not shared:
            raise InputError(f"the tokenizer leaves nothing in common between the context and the options {options}")
        out = [ids[shared:] for ids in full]
        if len({tuple(ids) for ids in out}) < len(options) or not all(out):
            raise InputError(f"the tokenizer cannot tell the options {options} apart: it reads them as the ids {out}")
        return context_ids[:shared], out


def load(path: str) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face format. Raises InputError when it is missing or has no EOS."""
    from transformers import AutoTokenizer

    if not (Path(path) / "tokenizer_config.json").is_file():
        raise InputError(f"no tokenizer at {path}: wanted a folder with tokenizer_config.json (--config.model.path)")
    try:
        hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each fault of a file is of a kind of its own
        why = " ".join(str(error).split())
        raise InputError(
            f"the tokenizer at {path} cannot be read ({why:.300}); fetch it again (--config.model.path)"
        ) from error
    if hf.eos_token_id is None:
        raise InputError(f"the tokenizer at {path} has no eos_token, so no response could end")
    pad = hf.pad_token_id if hf.pad_token_id is not None else hf.eos_token_id
    first = hf("a")["input_ids"][:1]
    start = tuple(first) if hf.bos_token_id is not None and first == [hf.bos_token_id] else ()
    ends = _ends(Path(path) / "generation_config.json")
    if strange := [i for i in ends if not isinstance(i, int) or not 0 <= i < len(hf)]:
        raise InputError(
            f"{path}/generation_config.json: eos_token_id holds {strange[0]!r}, wanted ids of its {len(hf)} tokens"
        )
    return Tokenizer(hf, hf.eos_token_id, pad, start, also_end=ends)


def _ends(file: Path) -> tuple[int, ...]:
    """The ids that end a text by a checkpoint's generation_config.json, which may list several."""
    fields = read_json(file) if file.is_file() else {}
    if not isinstance(fields, dict):
        raise InputError(f"{file}: wanted a JSON object, got {type(fields).__name__}")
    ends = fields.get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
