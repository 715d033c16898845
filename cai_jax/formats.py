"""How a checkpoint wants to be talked to: plain transcripts, or its own chat template, taken apart into our templates.

A chat template is a Jinja program of the checkpoint, run in transformers' sandbox on messages of known words. What it writes
around them becomes templates like those of plain transcripts, with control tokens as marks (tokenizer.MARKS), and nothing
else in the project needs to know. A program that is not a sequence of turns is refused.
"""

import dataclasses
import re
from typing import NamedTuple

from cai_jax.errors import InputError
from cai_jax.prompts import ASSISTANT, TEMPLATES, USER
from cai_jax.tokenizer import MARKS, Tokenizer, mark

FLAG = "--config.model.format=chat"
WORDS = ("qzero", "qone", "qtwo", "qthree", "qfour")  # stand for the messages; no template holds them
DATE = "26 Jul 2024"  # else a template could write today's, and a resumed run another than its first part
FIXED = {"enable_thinking": False, "date_string": DATE}
NOW = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"
SYSTEM = "qsystem"  # stands for the system prompt


class Turns(NamedTuple):
    """What a chat template writes, in the order of a conversation."""

    start: str
    user_open: str
    user_close: str
    reply: str  # opens the turn that is to be generated
    open: str  # opens an assistant's turn that is given
    close: str


def load(tok: Tokenizer, kind: str, system: str = "") -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer and templates of --config.model.format `kind`, "plain" or "chat", with a system prompt or none.

    Raises InputError when the checkpoint has no chat template, or one that cannot be taken apart.
    """
    if kind == "plain":
        return dataclasses.replace(tok, start=(*tok.start, *tok.encode(system.strip()))), dict(TEMPLATES)
    if not tok.hf.chat_template:
        raise InputError(f"{FLAG}: the tokenizer has no chat template; use plain, or an instruct checkpoint")
    controls, texts = marked(tok, taken_apart(tok, system))
    t = Turns(*(text.replace(SYSTEM, MARKS.sub("\ufffd", system.strip())) for text in texts))
    ends = [controls[i] for i in range(len(controls)) if mark(i) in t.close]
    if not ends:
        raise InputError(f"{FLAG}: no control token ends a turn of the assistant in the chat template; use plain")
    tok = dataclasses.replace(tok, controls=controls, eos_id=ends[0], also_end=(tok.eos_id, *tok.also_end))
    tok = dataclasses.replace(tok, start=tuple(tok.encode(t.start)))

    def asked(text: str) -> str:
        return t.user_open + text + t.user_close + t.reply

    question = TEMPLATES["comparison"].removesuffix("\n\nThe answer is:").strip()
    return tok, TEMPLATES | {
        "user": t.user_open + "{text}" + t.user_close,
        "assistant": t.open + "{text}" + t.close,
        "reply": t.reply,
        "completion": (t.open.removeprefix(t.reply) if t.open.startswith(t.reply) else "") + "{text}",
        "close": t.close,
        "critique": asked("{request}"),
        "revision": asked("{request}"),
        "comparison": asked(question) + "The answer is:",
        "reasoning": asked(question) + "Let's think step by step:",
        "verdict": asked("So what is the answer?") + "The answer is:",
    }


def taken_apart(tok: Tokenizer, system: str) -> Turns:
    """The pieces of a chat template, found by rendering conversations; those of a longer one must give its rendering."""

    def render(count: int, reply: bool) -> list[str]:
        """What stands before, between and behind the first `count` words, said in turn."""
        said = [{"role": (USER, ASSISTANT)[i % 2], "content": word} for i, word in enumerate(WORDS[:count])]
        said = [{"role": "system", "content": SYSTEM}] * bool(system) + said
        try:
            program = tok.hf.get_chat_template()
            program = NOW + program if "strftime_now" in program else program
            text = tok.hf.apply_chat_template(said, chat_template=program, tokenize=False, add_generation_prompt=reply, **FIXED)
        except Exception as error:  # whatever a checkpoint's program raises
            raise InputError(f"{FLAG}: the chat template cannot be rendered: {' '.join(str(error).split())}") from error
        parts = re.split("|".join(WORDS[:count]), text)
        if len(parts) != count + 1 or any(word not in text for word in WORDS[:count]) or (system and SYSTEM not in text):
            raise InputError(f"{FLAG}: the chat template does not write every message once, as it is; use plain")
        return parts

    def ending(text: str, end: str) -> str:
        if not text.endswith(end):
            raise InputError(f"{FLAG}: the chat template is not a sequence of turns: {end!r} does not end {text!r}; use plain")
        return text.removesuffix(end)

    def beginning(text: str, begin: str) -> str:
        if not text.startswith(begin):
            raise InputError(
                f"{FLAG}: the chat template is not a sequence of turns: {begin!r} does not begin {text!r}; use plain"
            )
        return text.removeprefix(begin)

    user_close = render(1, False)[-1]
    reply = beginning(render(1, True)[-1], user_close)
    given = beginning(render(3, True)[1], user_close)
    close = render(2, False)[-1]
    user_open = beginning(render(3, True)[2], close)
    turns = Turns(ending(render(1, True)[0], user_open), user_open, user_close, reply, given, close)
    whole = [
        turns.start + user_open,
        user_close + given,
        close + user_open,
        user_close + given,
        close + user_open,
        user_close + reply,
    ]
    if held := next((text for text in turns if re.search(r"\{\w+\}", text)), None):
        raise InputError(f"{FLAG}: the chat template writes braces, {held!r}, which stand for fields here; use plain")
    if render(5, True) != whole:
        raise InputError(f"{FLAG}: the chat template writes other words in longer conversations; use plain")
    return turns


def marked(tok: Tokenizer, texts) -> tuple[tuple[int, ...], list[str]]:
    """`texts` with every control token as its mark. -> (the ids by mark, the texts)."""
    ids = {str(token): i for i, token in tok.hf.added_tokens_decoder.items() if token.special}
    found = sorted((name for name in ids if any(name in text for text in texts)), key=len, reverse=True)
    if not found:
        return (), list(texts)
    order = {name: mark(i) for i, name in enumerate(found)}
    pattern = "|".join(map(re.escape, found))
    return tuple(ids[name] for name in found), [re.sub(pattern, lambda m: order[m[0]], text) for text in texts]
