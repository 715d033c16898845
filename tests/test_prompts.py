"""Every layout, byte for byte, and how a continuation is read back."""

import re

import pytest

from cai_jax import constitution, prompts
from cai_jax.constitution import Principle
from cai_jax.constitution.few_shot import ComparisonBlock, CritiqueBlock
from cai_jax.errors import InputError

FIELDS = {name: constitution.placeholders(text) for name, text in prompts.TEMPLATES.items()}
ONE = [{"role": "user", "content": "Hello?"}]
TWO = [
    {"role": "user", "content": " Hello?\n"},
    {"role": "assistant", "content": " Hi. "},
    {"role": "user", "content": "And now?"},
]


def test_turns_and_dialogue():
    assert prompts.turns(TWO) == "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: And now?"
    assert prompts.dialogue(TWO) == "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: And now?\n\nAssistant:"
    assert prompts.completion("  Well.\n") == " Well."


def test_critique_and_revision():
    context = prompts.critique(TWO, "Go away. ", "What is wrong?")
    assert context == (
        "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: And now?\n\nAssistant: Go away."
        "\n\nCritiqueRequest: What is wrong?\n\nCritique:"
    )
    assert prompts.revision(context, "It is rude.", "Please mend it.") == (
        "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: And now?\n\nAssistant: Go away."
        "\n\nCritiqueRequest: What is wrong?\n\nCritique: It is rude."
        "\n\nRevisionRequest: Please mend it.\n\nRevision:"
    )


def test_direct_revision_has_no_critique():
    context = prompts.dialogue(ONE) + prompts.completion("Go away.")
    assert prompts.revision(context, None, "Please mend it.") == (
        "\n\nHuman: Hello?\n\nAssistant: Go away.\n\nRevisionRequest: Please mend it.\n\nRevision:"
    )


def test_comparison():
    assert prompts.comparison(TWO, "Which is kinder?", " Go away.", "Stay. ") == (
        "\n\nConsider the following conversation between a human and an assistant:"
        "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: And now?"
        "\n\nWhich is kinder? Options:\n (A) Go away.\n (B) Stay."
        "\n\nThe answer is:"
    )
    assert prompts.OPTIONS == (" (A)", " (B)")


def test_reasoning_and_verdict():
    context = prompts.reasoning(TWO, "Which is kinder?", "Go away.", "Stay.")
    assert context == (
        "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):"
        "\n\nH: Hello?\n\nA: Hi.\n\nH: And now?"
        "\n\nWhich is kinder? Options:\n (A) Go away.\n (B) Stay."
        "\n\nAssistant: Let's think step by step:"
    )
    assert prompts.verdict(context, " One is rude. ") == context + " One is rude.\n\nHuman:\nSo the answer is:"


def test_few_shot_critiques_are_whole_exchanges_one_after_the_other():
    blocks = [CritiqueBlock("Q1", "A1", "CR1", "C1", "RR1", "R1"), CritiqueBlock("Q2", "A2", "CR2", "C2", "RR2", "R2")]
    assert prompts.few_shot_critique(blocks) == (
        "\n\nHuman: Q1\n\nAssistant: A1\n\nCritiqueRequest: CR1\n\nCritique: C1\n\nRevisionRequest: RR1\n\nRevision: R1"
        "\n\nHuman: Q2\n\nAssistant: A2\n\nCritiqueRequest: CR2\n\nCritique: C2\n\nRevisionRequest: RR2\n\nRevision: R2"
    )
    assert prompts.few_shot_critique(blocks[:1], direct=True) == (
        "\n\nHuman: Q1\n\nAssistant: A1\n\nRevisionRequest: RR1\n\nRevision: R1"
    )
    assert prompts.few_shot_critique([]) == ""


def test_few_shot_comparisons_ask_the_question_of_their_own_principle():
    blocks = [ComparisonBlock("Q1", "x1", "y1", "A"), ComparisonBlock("Q2", "x2", "y2", "B")]
    principles = [Principle("p", "c", "C", "R", "Which is safer?"), Principle("q", "c", "C", "R", "Which is truer?")]
    assert prompts.few_shot_comparison(blocks, principles) == (
        "\n\nConsider the following conversation between a human and an assistant:\n\nHuman: Q1"
        "\n\nWhich is safer? Options:\n (A) x1\n (B) y1\n\nThe answer is: (A)"
        "\n\nConsider the following conversation between a human and an assistant:\n\nHuman: Q2"
        "\n\nWhich is truer? Options:\n (A) x2\n (B) y2\n\nThe answer is: (B)"
    )
    with pytest.raises(ValueError, match="^got 1 principles for 2 few-shot comparisons; wanted one for each$"):
        prompts.few_shot_comparison(blocks, principles[:1])


def test_templates_of_a_constitution_are_used_everywhere():
    own = {name: f"<{name}>" + "".join(f"{{{field}}}" for field in sorted(fields)) for name, fields in FIELDS.items()}
    block, principle = CritiqueBlock("q", "r", "cr", "c", "rr", "v"), Principle("p", "c", "C", "R", "?")
    assert prompts.dialogue(TWO, own) == "<user>Hello?<assistant>Hi.<user>And now?<reply>"
    assert prompts.critique(ONE, "r", "cr", own) == "<user>Hello?<reply><completion>r<close><critique>cr"
    assert prompts.revision("x", "c", "rr", own) == "x<completion>c<close><revision>rr"
    assert prompts.comparison(ONE, "?", "x", "y", own) == "<comparison>xy<quoted_user>Hello??"
    assert prompts.reasoning(ONE, "?", "x", "y", own) == "<reasoning>xy\n\nH: Hello??"
    assert prompts.verdict("x", "t", own) == "x<completion>t<close><verdict>"
    start, end = "<user>q<reply><completion>r<close>", "<revision>rr<completion>v<close>"
    assert prompts.few_shot_critique([block], own) == start + "<critique>cr<completion>c<close>" + end
    assert prompts.few_shot_critique([block], own, direct=True) == start + end
    worked = prompts.few_shot_comparison([ComparisonBlock("q", "x", "y", "B")], [principle], own)
    assert worked == "<comparison>xy<quoted_user>q? (B)<close>"


BRACES = r"{request} {text} {a} {} {0} \1 \g<0> %s {question!r}"


def test_text_is_never_a_template():
    messages = [{"role": "user", "content": BRACES}]
    assert prompts.dialogue(messages) == f"\n\nHuman: {BRACES}\n\nAssistant:"
    got = prompts.critique(messages, BRACES, "What is wrong?")
    assert got == f"\n\nHuman: {BRACES}\n\nAssistant: {BRACES}\n\nCritiqueRequest: What is wrong?\n\nCritique:"
    assert prompts.revision(got, BRACES, "Mend {it}.") == got + f" {BRACES}\n\nRevisionRequest: Mend {{it}}.\n\nRevision:"
    for layout in (prompts.comparison, prompts.reasoning):
        text = layout(messages, BRACES, BRACES, BRACES)
        assert text.count(BRACES) == 4 and f"{BRACES} Options:\n (A) {BRACES}\n (B) {BRACES}\n" in text


def test_a_template_may_hold_other_braces():
    own = prompts.TEMPLATES | {"user": '\n{ "said": "{text}", {} }'}
    assert prompts.turns(ONE, own) == '\n{ "said": "Hello?", {} }'


@pytest.mark.parametrize(
    "sampled, text",
    [
        (" A plain answer.", "A plain answer."),
        (" Two\n\nparagraphs.\n\nHuman: More", "Two\n\nparagraphs."),
        (" Yes.\n\nAssistant: Yes again.\n\nHuman: More", "Yes."),
        (" Wrong.\n\nRevisionRequest: Mend it.\n\nRevision: Right.", "Wrong."),
        (" Wrong.\n\nRevision: Right.", "Wrong."),
        (" Fine.\n\nCritiqueRequest: Why?\n\nCritique: So.", "Fine."),
        (" Fine.\n\nCritique: So.", "Fine."),
        (" Fine.\n\nHuman:", "Fine."),
        ("\n\nHuman: x", ""),
        ("  \n", ""),
        ("", ""),
        (" The Human: word inside.\nHuman: too.", "The Human: word inside.\nHuman: too."),
    ],
)
def test_read_back_cuts_at_the_first_marker_and_strips(sampled, text):
    assert prompts.read_back(sampled) == text


def test_every_cue_that_a_model_may_go_on_with_is_a_stop():
    """A transcript in the default layouts never holds a cue that read_back would let through into a stored text."""
    whole = prompts.revision(prompts.critique(ONE, "r", "cr"), "c", "rr") + " v" + prompts.turns(TWO)
    assert set(re.findall(r"\n\n\w+:", whole)) == set(prompts.stops())


def test_stops_follow_the_templates_of_a_constitution():
    """A constitution may write its own layouts: their cues end a text, and those of the default ones no longer do."""
    own = prompts.TEMPLATES | {"user": "\n\nUser: {text}\n", "critique": "\n\n## Review {request}\n\nReview says:"}
    assert set(prompts.stops(own)) >= {"\n\nUser:", "\n\n## Review", "\n\nReview says:", "\n\nRevision:"}
    assert "\n" not in prompts.stops(own) and "" not in prompts.stops(own)
    assert prompts.read_back(" Yes.\n\nUser: next", own) == "Yes."
    assert prompts.read_back(" Yes.\n\nHuman: next", own) == "Yes.\n\nHuman: next"


def test_stored_text_comes_back_from_its_prompt():
    for text in ("One line.", "Two\n\nparagraphs, and a colon: here."):
        assert prompts.read_back(prompts.completion(text) + "\n\nHuman: next") == text


def test_check_template():
    for name, text in prompts.TEMPLATES.items():
        constitution.check_template(name, text, FIELDS)
    constitution.check_template("user", "\n\nPerson says {text}, {text}.", FIELDS)
    bad = {
        ("user", "{txt} {text}"): "template 'user' has the unknown placeholder {txt}; it may use {text}",
        ("user", "{} {text}"): "template 'user' has the unknown placeholder {}; it may use {text}",
        ("reply", "{text}"): "template 'reply' has the unknown placeholder {text}; it may use none",
        ("critique", "Critique:"): "template 'critique' lacks the placeholder {request}; it needs {request}",
        ("human", "{text}"): "unknown template 'human'; templates are " + ", ".join(prompts.TEMPLATES),
    }
    for (name, text), message in bad.items():
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            constitution.check_template(name, text, FIELDS)
