"""What of the data goes in: each prompt and comparison once, none too long, none held out, and every other one counted."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

from cai_jax import prompts, records
from cai_jax.config import Config, Critique, Data, Evaluate
from cai_jax.data import load_human, load_pool
from cai_jax.errors import InputError
from cai_jax.pairs import encode_comparisons
from cai_jax.stages import evaluate
from cai_jax.stages.reward import held_out


def user(text):
    return [{"role": "user", "content": text}]


def file(tmp_path, name, texts):
    records.write(tmp_path / name, [{"id": f"{name}-{i}", "messages": user(x)} for i, x in enumerate(texts)])
    return str(tmp_path / name)


def pool(data, name):
    return load_pool(data, name, tiny.tokenizer(), prompts.TEMPLATES)


def texts(found):
    return [r["messages"][-1]["content"] for r in found]


def test_lesson_17_a_prompt_goes_in_once_and_helpful_ones_are_no_red_team_prompts(tmp_path):
    redteam = file(tmp_path, "r", ["Why?", " Why? ", "How?\n", "How ?", "What?"])
    data = Data(redteam=redteam, helpful=file(tmp_path, "h", ["Who?", "How?", "Who?", "What?"]))
    found, counts = pool(data, "redteam")
    assert texts(found) == ["Why?", "How?\n", "How ?", "What?"]
    assert counts == {"given": 5, "kept": 4, "dropped": {"the same prompt again": 1}}
    found, counts = pool(data, "helpful")
    assert texts(found) == ["Who?"]
    assert counts == {"given": 4, "kept": 1, "dropped": {"a red-team prompt too": 2, "the same prompt again": 1}}
    found, _ = pool(Data(redteam=redteam, helpful=data.helpful, max_redteam=1), "helpful")
    assert texts(found) == ["Who?", "How?", "What?"]  # only against what is used


def test_prompts_longer_than_max_prompt_tokens_are_counted(tmp_path):
    redteam = file(tmp_path, "r", ["a" * 10, "a" * 11, "a"])
    size = len(tiny.tokenizer().prompt(prompts.dialogue(user("a" * 10), prompts.TEMPLATES)))
    found, counts = pool(Data(redteam=redteam, max_prompt=size), "redteam")
    assert texts(found) == ["a" * 10, "a"] and counts["dropped"] == {f"longer than {size} tokens": 1}
    with pytest.raises(InputError, match=r"no prompt is left: \{'longer than 3 tokens': 3\} \(--config.data.redteam\)"):
        pool(Data(redteam=redteam, max_prompt=3), "redteam")


def test_lesson_18_a_transcript_that_is_no_dialogue_is_counted(tmp_path):
    good = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Really?\n\nAssistant:"
    rows = [
        (good + " Yes.", good + " No."),
        (good.replace(" So.", "") + " Yes.", good.replace(" So.", "") + " No."),
        ("a", "b"),
    ]
    records.write(tmp_path / "c.jsonl", [{"chosen": c, "rejected": r} for c, r in rows])
    data = Data(redteam=str(tmp_path / "c.jsonl"), comparisons=str(tmp_path / "c.jsonl"))
    found, counts = pool(data, "redteam")
    assert len(found) == 1 and counts == {"given": 3, "kept": 1, "dropped": {"a transcript that is no dialogue": 2}}
    drops = records.Drops()
    found, given = load_human(data, 0, drops)
    assert len(found) == 1 and drops.counts(given, 1)["dropped"] == {"a transcript that is no dialogue": 2}


def comparisons(tmp_path, rows):
    records.write(
        tmp_path / "c.jsonl",
        [
            {"id": str(i), "messages": user(q), "response_a": a, "response_b": b, "p_a": p}
            for i, (q, a, b, p) in enumerate(rows)
        ],
    )
    return str(tmp_path / "c.jsonl")


def test_lesson_17_a_comparison_goes_in_once_and_says_something(tmp_path):
    rows = [
        ("Why?", "a", "b", 1.0),
        ("Why?", "b", " a", 0.0),
        ("Why?", "a", "b", 0.0),
        ("How?", "a", "b", 1.0),
        ("Why?", "a", " ", 1.0),
    ]
    drops = records.Drops()
    found, given = load_human(Data(comparisons=comparisons(tmp_path, rows)), 0, drops)
    assert [r["id"] for r in found] == ["0", "2", "3"] and given == 5  # people may disagree
    assert drops.counts(5, 3)["dropped"] == {"empty response": 1, "the same comparison again": 1}


@pytest.mark.parametrize("share, ai, kept", [(0.0, 90, 30), (0.08, 92, 8), (0.5, 10, 10), (0.9, 90, 30)])
def test_the_human_share_is_reached_by_leaving_out(tmp_path, share, ai, kept):
    data = Data(comparisons=comparisons(tmp_path, [(f"Why {i}?", "a", "b", 1.0) for i in range(30)]), human_share=share)
    drops = records.Drops()
    found, given = load_human(data, ai, drops)
    assert (len(found), given) == (kept, 30) and drops.reasons.total() == 30 - kept
    assert all(g < 30 / kept + 1 for g in np.diff([int(r["id"]) for r in found]))  # all over the file


def test_the_held_out_comparisons_share_no_prompt_with_the_others(tmp_path):
    pairs = [
        {"messages": user(f"Why {i % 40}?"), "response_a": "a", "response_b": "b", "p_a": 1.0, "source": "ai"}
        for i in range(90)
    ]
    prompt = encode_comparisons(tiny.tokenizer(), prompts.TEMPLATES, pairs, 128, records.Drops()).prompt
    assert prompt.tolist() == [i % 40 for i in range(90)]
    held = held_out(prompt, 0.3, 0)
    assert not set(prompt[held]) & set(prompt[~held]) and 10 < held.sum() < 45
    assert (held_out(prompt, 0.3, 0) == held).all() and (held_out(prompt, 0.3, 1) != held).any()


def test_a_held_out_prompt_that_the_pipeline_reads_is_not_evaluated(tmp_path):
    data = Data(
        redteam=file(tmp_path, "r", ["Why?", "How?"]),
        helpful=file(tmp_path, "h", ["Who?"]),
        comparisons=comparisons(tmp_path, [("What?", "a", "b", 1.0)]),
    )
    heldout = [{"messages": user(x)} for x in ("Where?", "how?", " How?", "Who?", "What?")]
    kept, counts = evaluate.unseen(Config(data=data), heldout)
    assert texts(kept) == ["Where?"]
    found = {f"in --config.data.{n}": k for n, k in (("redteam", 2), ("helpful", 1), ("comparisons", 1))}
    assert counts["dropped"] == found
    long = [*user("Why so?"), {"role": "assistant", "content": "So."}, *user("Really?")]
    records.write(tmp_path / "d.jsonl", [{"id": "d", "messages": long}])
    shown = Critique(few_shot=str(tmp_path / "few.toml"))
    fields = ("user", "response", "critique_request", "critique", "revision_request", "revision")
    blocks = [("critique", fields), ("comparison", ("user", "a", "b", "better"))]
    text = "\n".join(
        f"[[{kind}]]\n" + "\n".join(f'{k} = "{"A" if k == "better" else k}"' for k in keys) for kind, keys in blocks
    )
    (tmp_path / "few.toml").write_text(text)
    cfg = Config(data=replace(data, redteam=str(tmp_path / "d.jsonl")), critique=shown)
    kept, counts = evaluate.unseen(cfg, [{"messages": user(x)} for x in ("Why so?", "Really?", "user")])
    assert texts(kept) == ["Really?"]  # a conversation that begins so gives its beginning away
    assert counts["dropped"] == {"in --config.data.redteam": 1, "in --config.critique.few_shot": 1}
    with pytest.raises(InputError, match="evaluate.heldout=x.jsonl: the models were trained on all of it"):
        evaluate.unseen(Config(data=data, evaluate=Evaluate(heldout="x.jsonl")), [{"messages": user("Who?")}])
