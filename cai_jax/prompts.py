"""Every string a model ever sees, and how its answers are read back.

The layouts are those of Bai et al. 2022 (2212.08073): plain `Human:`/`Assistant:` transcripts, critique and revision
requests appended to them (section 3.1), and the multiple-choice comparison (section 4.1) with its chain-of-thought
form. A conversation is a list of messages, `{"role": "user" | "assistant", "content": text}`, oldest first.
"""

import re

from cai_jax.tokenizer import MARKS

USER, ASSISTANT = "user", "assistant"
OPTIONS = (" (A)", " (B)")  # scored as whole strings, leading space included: the context ends in a colon

# Field names in braces are filled in one pass, so a brace inside a text is never read as a field.
TEMPLATES = {
    "user": "\n\nHuman: {text}",
    "assistant": "\n\nAssistant: {text}",
    "reply": "\n\nAssistant:",
    "completion": " {text}",  # what follows a cue, so that both together read as the field's transcripts do
    "close": "",  # what ends a completed turn before another begins
    "quoted_user": "\n\nHuman: {text}",  # messages inside a comparison
    "quoted_assistant": "\n\nAssistant: {text}",
    "critique": "\n\nCritiqueRequest: {request}\n\nCritique:",
    "revision": "\n\nRevisionRequest: {request}\n\nRevision:",
    "comparison": "\n\nConsider the following conversation between a human and an assistant:{conversation}"
    "\n\n{question} Options:\n (A) {a}\n (B) {b}\n\nThe answer is:",
    "reasoning": "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):{conversation}"
    "\n\n{question} Options:\n (A) {a}\n (B) {b}\n\nAssistant: Let's think step by step:",
    "verdict": "\n\nHuman:\nSo the answer is:",
}
TURNS = (USER, ASSISTANT, "reply", "critique", "revision")  # the templates that a model may go on with after its own text


def fill(name: str, templates=TEMPLATES, **fields: str) -> str:
    """The template called `name` with its fields replaced in one pass: what a field holds is never filled again, and never
    stands for a control token (see tokenizer.MARKS)."""
    return re.sub(r"\{(\w+)\}", lambda m: MARKS.sub("\ufffd", fields[m[1]]), templates[name])


def turns(messages: list[dict], templates=TEMPLATES) -> str:
    """Messages as a transcript without a final cue: '\\n\\nHuman: ...\\n\\nAssistant: ...\\n\\nHuman: ...'."""
    return "".join(fill(m["role"], templates, text=m["content"].strip()) for m in messages)


def dialogue(messages: list[dict], templates=TEMPLATES) -> str:
    """What the model continues with a response: the transcript and '\\n\\nAssistant:'. The last message is the user's."""
    return turns(messages, templates) + templates["reply"]


def asking(messages: list[dict], start: str, templates=TEMPLATES) -> str:
    """What the model continues as the user: a transcript, and the beginning of one more turn of the user."""
    cue = templates["user"].partition("{text}")[0]
    return turns(messages, templates) + (cue + MARKS.sub("\ufffd", start) if start else cue.rstrip(" "))


def completion(text: str, templates=TEMPLATES) -> str:
    """What follows a cue, as it would have been sampled."""
    return fill("completion", templates, text=text.strip())


def critique(messages: list[dict], response: str, request: str, templates=TEMPLATES) -> str:
    """The exchange so far and a critique request; the model continues with the critique (paper 3.1)."""
    said = dialogue(messages, templates) + completion(response, templates)
    return said + templates["close"] + fill("critique", templates, request=request)


def revision(context: str, critique_text: str | None, request: str, templates=TEMPLATES) -> str:
    """`context` (ending in the critique cue, or in the response when there was no critique), the critique, and a
    revision request; the model continues with the revision."""
    middle = "" if critique_text is None else completion(critique_text, templates)
    return context + middle + templates["close"] + fill("revision", templates, request=request)


def comparison(messages: list[dict], question: str, a: str, b: str, templates=TEMPLATES) -> str:
    """A question on two responses that OPTIONS answer (paper 4.1). The option log-probs are read after it."""
    quoted = "".join(fill(f"quoted_{m['role']}", templates, text=m["content"].strip()) for m in messages)
    return fill("comparison", templates, conversation=quoted, question=question, a=a.strip(), b=b.strip())


def reasoning(messages: list[dict], question: str, a: str, b: str, templates=TEMPLATES) -> str:
    """The chain-of-thought comparison: the quoted roles are H and A, and the model continues with its reasoning."""
    quoted = "".join(f"\n\n{'H' if m['role'] == USER else 'A'}: {m['content'].strip()}" for m in messages)
    return fill("reasoning", templates, conversation=quoted, question=question, a=a.strip(), b=b.strip())


def verdict(context: str, thought: str, templates=TEMPLATES) -> str:
    """The reasoning context, the thought, and a new turn that OPTIONS answer."""
    return context + completion(thought, templates) + templates["close"] + templates["verdict"]


def few_shot_critique(blocks, templates=TEMPLATES, direct: bool = False) -> str:
    """Worked critiques and revisions (CritiqueBlock) as one prefix of `critique` and what follows it;
    `direct`: without the critiques, as a prefix of a revision that has none."""
    return "".join(_worked_critique(block, templates, direct) for block in blocks)


def _worked_critique(block, templates, direct: bool) -> str:
    messages = [{"role": USER, "content": block.user}]
    if direct:
        context, thought = dialogue(messages, templates) + completion(block.response, templates), None
    else:
        context, thought = critique(messages, block.response, block.critique_request, templates), block.critique
    revised = revision(context, thought, block.revision_request, templates) + completion(block.revision, templates)
    return revised + templates["close"]


def few_shot_comparison(blocks, principles, templates=TEMPLATES) -> str:
    """Worked comparisons (ComparisonBlock) as one prefix of `comparison`: each block asks the question of
    its own principle, one given for each block (paper 4.1), and ends in the option that answers it."""
    if len(blocks) != len(principles):
        raise ValueError(f"got {len(principles)} principles for {len(blocks)} few-shot comparisons; wanted one for each")
    return "".join(_worked_comparison(block, p, templates) for block, p in zip(blocks, principles, strict=True))


def _worked_comparison(block, principle, templates) -> str:
    context = comparison([{"role": USER, "content": block.user}], principle.comparison, block.a, block.b, templates)
    return context + OPTIONS["AB".index(block.better)] + templates["close"]


def stops(templates=TEMPLATES) -> tuple[str, ...]:
    """Where a model's own text ends when it goes on: what the templates of a turn write around their fields, such as
    '\\n\\nHuman:' and '\\n\\nCritique:'. What is written with control tokens ends by those."""
    written = [part.rstrip() for name in TURNS for part in re.split(r"\{\w+\}", templates[name])]
    return tuple(dict.fromkeys(part for part in written if part and not MARKS.search(part)))


def read_back(text: str, templates=TEMPLATES) -> str:
    """A sampled continuation as stored text: cut at the first stop marker, outer white space removed."""
    ends = [i for i in map(text.find, stops(templates)) if i >= 0]
    return text[: min(ends, default=len(text))].strip()
