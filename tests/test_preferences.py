"""Labels by a judge of known quality and bias, and what the reward model makes of comparisons."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cai_jax import constitution as constitutions
from cai_jax import prompts, records
from cai_jax.config import Config, Data, Model, Preferences
from cai_jax.files import read_json
from cai_jax.stages import preferences, reward

ROOT = Path(__file__).parent.parent
CONSTITUTION = constitutions.load(ROOT / "constitutions" / "miniworld.toml", templates=prompts.TEMPLATES)
PRINCIPLE = CONSTITUTION.principles[0]
SEAT = preferences.Seat("judge", 1, CONSTITUTION, {})


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def message(text):
    return [{"role": "user", "content": text}]


def pair(i, a, b, **extras):
    responses = {"response_a": f"answer {a}", "response_b": f"answer {b}"}
    return {"id": f"r{i}", "messages": message(f"Question {i}?")} | responses | extras


PAIRS = [pair(0, 1.5, -0.5, category="theft"), pair(1, -1.0, 1.2), pair(2, 0.3, 0.1), pair(3, 0.0, 0.0), pair(4, -0.2, 0.4)]
MARGIN = np.array([2.0, -2.2, 0.2, 0.0, -0.6])  # of a over b


class Judge:
    """Takes the place of the judge's log-probs: a response is worth the number in it, and option (A) gets `lean` on top."""

    def __init__(self, lean=0.0, of=lambda context: 1.0):
        self.lean, self.of, self.contexts = lean, of, []

    def __call__(self, lm, contexts, batch_size, mesh, name):
        self.contexts += contexts
        out = []
        for context in contexts:
            worth = [float(x) for x in re.findall(r"\([AB]\) answer (\S+)", context)[-2:]]
            out.append([self.of(context) * worth[0] + self.lean - 40, self.of(context) * worth[1] - 40])
        return np.array(out)


def judged(monkeypatch, judge, pairs=PAIRS, said=None, drops=None, **settings):
    monkeypatch.setattr(preferences, "option_logprobs", judge)
    monkeypatch.setattr(preferences, "fits", lambda lm, context, max_tokens: len(context) + max_tokens < 10_000)
    if said:
        monkeypatch.setattr(preferences, "sample_texts", lambda lm, asked, *_: [{"text": said(r)} for r in asked])
    cfg = Config(preferences=Preferences(**settings))
    journal = SimpleNamespace(done={}, add=lambda items: None)
    found = preferences.judge(cfg, None, SEAT, pairs, journal, None)
    kept = [p for p in pairs if (drops or records.Drops()).keep(p["id"] in found, "longer than the judge's context")]
    return preferences.labelled(cfg, [SEAT], kept, [found])


def labels(out):
    return np.array([r["p_a"] for r in out])


# The label


def test_an_unbiased_judge_gives_the_softmax_of_the_options(monkeypatch):
    out = judged(monkeypatch, Judge())
    np.testing.assert_allclose(labels(out), sigmoid(MARGIN), rtol=1e-5)
    statistics = preferences.label_statistics(out)
    assert statistics["flip_rate"] == 0 and statistics["position_lean"] == pytest.approx(0, abs=1e-6)
    assert statistics["decidedness"] == pytest.approx(np.mean(np.abs(sigmoid(MARGIN) - 0.5)), rel=1e-5)


@pytest.mark.parametrize("lean", [0.5, -1.0, 3.0])
def test_lesson_09_the_label_does_not_depend_on_the_order_of_the_responses(monkeypatch, lean):
    turned = [p | {"response_a": p["response_b"], "response_b": p["response_a"]} for p in PAIRS]
    one, other = judged(monkeypatch, Judge(lean)), judged(monkeypatch, Judge(lean), turned)
    np.testing.assert_allclose(labels(one), 1 - labels(other), atol=1e-6)
    np.testing.assert_allclose(labels(one), (sigmoid(MARGIN + lean) + sigmoid(MARGIN - lean)) / 2, rtol=1e-5)
    assert labels(one)[3] == pytest.approx(0.5)  # equal responses: no lean is left
    p_ab = np.array([r["judgements"][0]["p_ab"] for r in one])
    assert np.abs(p_ab - labels(one)).max() > 0.05  # one order alone does depend on it


def test_lesson_09_flip_rate_and_lean_are_measured(monkeypatch):
    for lean, flips in ((0.3, 2), (1.0, 3), (5.0, 5), (-1.0, 3)):
        statistics = preferences.label_statistics(judged(monkeypatch, Judge(lean)))
        assert statistics["flip_rate"] == flips / 5  # those whose margin is within the lean
        wanted = np.mean(sigmoid(MARGIN + lean) - sigmoid(MARGIN - lean)) / 2
        assert statistics["position_lean"] == pytest.approx(wanted, rel=1e-4)
    assert preferences.label_statistics([]) == {"flip_rate": 0.0, "position_lean": 0.0, "decidedness": 0.0}


def test_lesson_23_a_label_does_not_depend_on_the_other_records(monkeypatch):
    whole = {r["id"]: r for r in judged(monkeypatch, Judge(0.4), principles=2)}
    for r in judged(monkeypatch, Judge(0.4), PAIRS[::-1][:3], principles=2):
        assert r == whole[r["id"]]


def test_hard_labels_are_the_side_of_a_half(monkeypatch):
    assert labels(judged(monkeypatch, Judge(0.7), labels="hard")).tolist() == [1.0, 0.0, 1.0, 0.5, 0.0]


def test_principles_are_drawn_per_record_and_averaged(monkeypatch):
    """A judge whose certainty depends on the question it is asked."""
    factor = {p.comparison: 0.2 * i for i, p in enumerate(CONSTITUTION.principles)}

    def of(context):
        return next(factor[q] for q in sorted(factor, key=len, reverse=True) if q in context)

    out = judged(monkeypatch, Judge(of=of), principles=3)
    for record, margin in zip(out, MARGIN, strict=True):
        drawn = constitutions.sample(CONSTITUTION, 0, "preferences", record["id"], k=3)
        assert [j["principle"] for j in record["judgements"]] == [p.id for p in drawn]
        wanted = [sigmoid(factor[p.comparison] * margin) for p in drawn]
        np.testing.assert_allclose([j["p_a"] for j in record["judgements"]], wanted, rtol=1e-5)
        assert record["p_a"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert len({j["principle"] for r in out for j in r["judgements"]}) > 3


def test_a_record_keeps_what_it_came_from(monkeypatch):
    judge = Judge(0.3)
    first = judged(monkeypatch, judge)[0]
    assert first["id"] == "r0" and first["category"] == "theft" and first["messages"] == message("Question 0?")
    assert (first["source"], first["constitution"]) == ("ai", CONSTITUTION.fingerprint)
    verdict = first["judgements"][0]
    np.testing.assert_allclose(verdict["logp_ab"], [1.5 + 0.3 - 40, -0.5 - 40])
    np.testing.assert_allclose(verdict["logp_ba"], [-0.5 + 0.3 - 40, 1.5 - 40])
    assert "thoughts" not in verdict and "p_unclamped" not in verdict
    assert json.loads(json.dumps(first)) == first
    question = constitutions.sample(CONSTITUTION, 0, "preferences", "r0")[0].comparison
    assert judge.contexts[0] == prompts.comparison(message("Question 0?"), question, "answer 1.5", "answer -0.5")
    assert judge.contexts[1] == prompts.comparison(message("Question 0?"), question, "answer -0.5", "answer 1.5")


def test_few_shot_examples_stand_before_both_orders_alike(monkeypatch):
    plain, few = Judge(), Judge()
    judged(monkeypatch, plain)
    out = judged(monkeypatch, few, few_shot=str(ROOT / "constitutions" / "few_shot.toml"))
    heads = []
    for context, wanted in zip(few.contexts, plain.contexts, strict=True):
        assert context.endswith(wanted) and len(context) > len(wanted)
        heads.append(context[: -len(wanted)])
    assert heads[0::2] == heads[1::2]
    np.testing.assert_allclose(labels(out), sigmoid(MARGIN), rtol=1e-5)


# Chain of thought


def test_lesson_21_the_clamp_touches_chain_of_thought_labels_only(monkeypatch):
    settings = {"clamp": (0.4, 0.6)}
    np.testing.assert_allclose(labels(judged(monkeypatch, Judge(), **settings)), sigmoid(MARGIN), rtol=1e-5)
    out = judged(monkeypatch, Judge(), said=lambda r: "Well.", chain_of_thought=True, **settings)
    np.testing.assert_allclose(labels(out), np.clip(sigmoid(MARGIN), 0.4, 0.6), rtol=1e-5)
    assert set(np.round(labels(out), 6)) >= {0.4, 0.6}
    unclamped = [r["judgements"][0]["p_unclamped"] for r in out]
    np.testing.assert_allclose(unclamped, sigmoid(MARGIN), rtol=1e-5)


def test_a_thought_stays_with_its_record_principle_and_order(monkeypatch):
    judge = Judge()
    out = judged(monkeypatch, judge, said=lambda r: f"Thought of {r.key}.", chain_of_thought=True, principles=2)
    contexts = iter(judge.contexts)
    for record in out:
        for verdict in record["judgements"]:
            keys = [f"{record['id']}/{verdict['principle']}/{order}" for order in ("ab", "ba")]
            assert verdict["thoughts"] == [f"Thought of {k}." for k in keys]
            question = next(p.comparison for p in CONSTITUTION.principles if p.id == verdict["principle"])
            a, b = record["response_a"], record["response_b"]
            for key, (first, second) in zip(keys, ((a, b), (b, a)), strict=True):
                asked = prompts.reasoning(record["messages"], question, first, second)
                assert next(contexts) == prompts.verdict(asked, f"Thought of {key}.")


@pytest.mark.parametrize("clamp, wanted", [((0.4, 0.6), 0.6), ((0.1, 0.9), 0.8807971), ((0.45, 0.5), 0.5)])
def test_lesson_21_one_judgement_with_and_without_thoughts(clamp, wanted):
    logp = np.array([[[-1.0, -3.0]], [[-5.0, -3.0]]])
    plain = preferences._judgement(PRINCIPLE, logp, None, Preferences(clamp=clamp))
    assert plain["p_a"] == plain["p_ab"] == plain["p_ba"] == pytest.approx(sigmoid(2))
    thought = preferences._judgement(PRINCIPLE, logp, ["x", "y"], Preferences(clamp=clamp))
    assert thought["p_a"] == pytest.approx(wanted) and thought["p_unclamped"] == plain["p_a"]
    assert thought["principle"] == PRINCIPLE.id and thought["thoughts"] == ["x", "y"]
    assert plain["logp_ab"] == [-1.0, -3.0] and plain["logp_ba"] == [-5.0, -3.0]


@pytest.mark.parametrize("clamp, wanted", [((0.0, 1.0), (0.9 + 0.2 + 0.6 + 0.7) / 4), ((0.4, 0.58), 0.58)])
def test_probabilities_after_several_thoughts_are_averaged_and_then_clamped(clamp, wanted):
    p = np.array([[0.9, 0.2], [0.4, 0.3]])  # of (A), after two thoughts in each order: of b in the second
    logp = np.log(np.stack([p, 1 - p], axis=-1)) - [[0.0], [3.0]]  # the second time the judge would rather say something else
    found = preferences._judgement(PRINCIPLE, logp, ["x", "y", "z", "u"], Preferences(clamp=clamp))
    assert found["p_ab"] == pytest.approx(0.55) and found["p_ba"] == pytest.approx(0.65)
    assert found["p_a"] == pytest.approx(wanted) and found["p_unclamped"] == pytest.approx(0.6)
    low = np.exp(-3)
    np.testing.assert_allclose(np.exp(found["logp_ab"]), [(0.9 + 0.2 * low) / 2, (0.1 + 0.8 * low) / 2])
    np.testing.assert_allclose(np.exp(found["logp_ba"]), [(0.4 + 0.3 * low) / 2, (0.6 + 0.7 * low) / 2])


def test_further_thoughts_have_keys_of_their_own_and_leave_the_first_ones_alone(monkeypatch):
    """A thought says how far the judge leans to (A) after it, each its own."""
    leans, asked = {}, []

    def said(r):
        asked.append(r.key)
        return f"Lean {leans.setdefault(r.key, round(0.7 * len(leans) % 3 - 1.5, 1))} to"

    class Led(Judge):
        def __call__(self, lm, contexts, *rest):
            lean = [float(re.findall(r"Lean (\S+) to", context)[-1]) for context in contexts]
            return super().__call__(lm, contexts, *rest) + np.stack([lean, np.zeros(len(lean))], axis=1)

    one = judged(monkeypatch, Led(), said=said, chain_of_thought=True, principles=2)
    first, asked[:] = asked[:], []
    out = judged(monkeypatch, Led(), said=said, chain_of_thought=True, principles=2, thoughts=3, clamp=(0.0, 1.0))
    assert asked == [k + n for k in first for n in ("", "+1", "+2")]
    for record, alone, margin in zip(out, one, MARGIN, strict=True):
        for j, before in zip(record["judgements"], alone["judgements"], strict=True):
            keys = [f"{record['id']}/{j['principle']}/{order}{n}" for n in ("", "+1", "+2") for order in ("ab", "ba")]
            assert j["thoughts"] == [f"Lean {leans[k]} to" for k in keys] and j["thoughts"][:2] == before["thoughts"]
            lean = np.array([leans[k] for k in keys])
            assert j["p_ab"] == pytest.approx(np.mean(sigmoid(margin + lean[0::2])), rel=1e-5)
            assert j["p_ba"] == pytest.approx(np.mean(sigmoid(margin - lean[1::2])), rel=1e-5)
            assert j["p_a"] == j["p_unclamped"] == pytest.approx((j["p_ab"] + j["p_ba"]) / 2, rel=1e-6)
        assert record["p_a"] == pytest.approx(np.mean([j["p_a"] for j in record["judgements"]]), rel=1e-6)


# The stage


def test_lesson_17_pairs_without_two_different_responses_are_counted(monkeypatch, tmp_path):
    said = {"p0/a": "answer 1", "p0/b": "answer 0", "p1/a": "", "p1/b": "answer 0"}
    said |= {"p2/a": "answer 2", "p2/b": "answer 2", "p3/a": "", "p3/b": "", "p4/a": "answer 0", "p4/b": "and then"}
    file = tmp_path / "prompts.jsonl"
    records.write(file, [{"id": f"p{i}", "messages": message(f"Well, {i}?")} for i in range(5)])
    cfg = Config(preferences=Preferences(policy="base"), data=Data(redteam=str(file)), model=Model(path=str(file)))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(preferences, "load_lm", lambda *_: SimpleNamespace(tok=BYTES, params={}))
    monkeypatch.setattr(preferences, "option_logprobs", Judge())
    monkeypatch.setattr(preferences, "fits", lambda lm, context, max_tokens: True)

    def sampled(lm, asked, *_):
        return [{"text": said[r.key], "finished": r.key != "p4/b"} for r in asked]

    monkeypatch.setattr(preferences, "sample_texts", sampled)
    assert preferences.run(cfg, tmp_path / "run", None)
    counts = read_json(tmp_path / "run" / "preferences" / "done.json")["counts"]
    assert counts["given"] == 5 and counts["kept"] == 1
    assert counts["dropped"] == {"empty response": 2, "identical responses": 1, "cut off": 1}
    assert [r["id"] for r in records.read(tmp_path / "run" / "preferences" / "comparisons.jsonl")] == ["p0"]
    assert not preferences.run(cfg, tmp_path / "run", None)  # done


@pytest.mark.parametrize("thinks", [False, True])
def test_lesson_17_pairs_that_outgrow_the_judge_are_counted(monkeypatch, thinks):
    long, drops = pair(5, 1.0, 2.0) | {"response_a": "answer 1.0 " + "x" * 10_000}, records.Drops()
    settings = {"said": lambda r: "so it goes", "chain_of_thought": True} if thinks else {}
    out = judged(monkeypatch, Judge(), [PAIRS[0], long, PAIRS[1]], drops=drops, principles=2, **settings)
    assert [r["id"] for r in out] == ["r0", "r1"]
    assert drops.counts(3, 2)["dropped"] == {"longer than the judge's context": 1}
    apart = judged(monkeypatch, Judge(), PAIRS[:2], principles=2, **settings)
    assert out == apart  # the others keep their own principles and verdicts


BYTES = SimpleNamespace(encode=lambda text: list(text.encode()), prompt=lambda x: list(x.encode()), eos_id=0, pad_id=0)


# Agreement


def test_agreement_by_hand():
    out = reward.agreement(np.array([0.95, 1.0, 0.62, 0.68, 0.0, 0.04]), np.array([1.0, 0.8, 0.4, 0.5, 0.0, 1.0]))
    assert out["n"] == 6
    assert out["accuracy"] == pytest.approx(3 / 5)  # right, right, wrong, not counted, right, wrong
    assert [(b["n"], b["p_model"], b["p_label"]) for b in out["calibration"]] == [
        (2, pytest.approx(0.02), pytest.approx(0.5)),
        (2, pytest.approx(0.65), pytest.approx(0.45)),
        (2, pytest.approx(0.975), pytest.approx(0.9)),  # 1.0 lies in the last bin
    ]
    assert out["calibration_error"] == pytest.approx((0.48 + 0.2 + 0.075) / 3)


def test_lesson_20_a_calibrated_judge_has_no_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    drawn = (rng.uniform(size=len(p)) < p).astype(float)
    assert reward.agreement(p, drawn)["calibration_error"] < 0.02
    assert reward.agreement(p, p)["calibration_error"] == pytest.approx(0, abs=1e-12)
    overconfident = sigmoid(3 * np.log(p / (1 - p)))
    assert reward.agreement(overconfident, drawn)["calibration_error"] > 0.08
    assert reward.agreement(1 - p, p)["accuracy"] == 0


def test_agreement_with_nothing_to_compare():
    nothing = {"n": 0, "accuracy": 0.0, "calibration_error": 0.0, "calibration": []}
    assert reward.agreement(np.array([]), np.array([])) == nothing
    undecided = reward.agreement(np.array([0.9, 0.1]), np.array([0.5, 0.5]))
    assert undecided["accuracy"] == 0.0 and undecided["calibration_error"] == pytest.approx(0.4)
