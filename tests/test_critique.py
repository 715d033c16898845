"""Critique and revision with a model that answers every turn by its name, so that each record shows what it was asked."""

from pathlib import Path

import pytest

from cai_jax import constitution as constitutions
from cai_jax import prompts
from cai_jax.config import Config, Critique
from cai_jax.constitution.few_shot import load_few_shot
from cai_jax.errors import InputError
from cai_jax.stages import critique

ROOT = Path(__file__).parent.parent
CONSTITUTION = constitutions.load(ROOT / "constitutions" / "miniworld.toml", templates=prompts.TEMPLATES)
BY_ID = {p.id: p for p in CONSTITUTION.principles}
FEW_SHOT = ROOT / "constitutions" / "few_shot.toml"
IDS = [f"p{i}" for i in range(12)]


def revised(said=str, room=lambda context: True, heat=(1.0, 1.0, 1.0), **settings):
    """-> (records, counts, what was asked: {key: (context, temperature)})."""
    asked, found = {}, []
    cfg = Config(critique=Critique(rounds=len(heat) - 1, **settings))
    for i in IDS:
        record = {"id": i, "messages": [{"role": "user", "content": f"Question {i}?"}]}
        chain = critique.revise(cfg, CONSTITUTION, record, critique.worked_examples(cfg, CONSTITUTION.templates), list(heat))
        try:
            r = next(chain)
            while True:
                fits = room(r.context)
                if fits:
                    asked[r.key] = r.context, r.temperature
                r = chain.send({"text": said(r.key), "finished": True} if fits else None)
        except StopIteration as end:
            found.append(end.value)
    out, counts = critique.whole(found, CONSTITUTION)
    return out, counts, asked


def test_a_round_starts_from_the_prompt_and_the_last_revision_alone():
    out, counts, asked = revised()
    assert counts == {"given": 12, "kept": 12, "dropped": {}} and [r["id"] for r in out] == IDS
    for r in out:
        i, (first, second) = r["id"], r["rounds"]
        message = [{"role": "user", "content": f"Question {i}?"}]
        assert asked[f"{i}/response"][0] == prompts.dialogue(message, prompts.TEMPLATES)
        for n, (step, before) in enumerate(((first, f"{i}/response"), (second, f"{i}/revision1")), 1):
            principle = BY_ID[step["principle"]]
            wanted = prompts.critique(message, before, principle.critique, prompts.TEMPLATES)
            assert asked[f"{i}/critique{n}"][0] == wanted
            wanted = prompts.revision(wanted, f"{i}/critique{n}", principle.revision, prompts.TEMPLATES)
            assert asked[f"{i}/revision{n}"][0] == wanted
            assert (step["critique"], step["revision"]) == (f"{i}/critique{n}", f"{i}/revision{n}")
            assert (step["critique_request"], step["revision_request"]) == (principle.critique, principle.revision)


def test_principles_are_drawn_anew_for_every_record_and_round():
    out, _, _ = revised()
    first, second = ([r["rounds"][n]["principle"] for r in out] for n in (0, 1))
    assert len(set(first)) > 4 and len(set(second)) > 4 and first != second
    without, _, _ = revised(use_principles=False)
    assert {step["principle"] for r in without for step in r["rounds"]} == {constitutions.GENERIC.id}


def test_each_round_has_its_temperature():
    heat = critique.temperatures(0.9, 0.4, 2)
    assert heat == pytest.approx([0.9, 0.65, 0.4])
    out, _, asked = revised(heat=heat)
    turns = ("response", "critique1", "revision1", "critique2", "revision2")
    assert [asked[f"p3/{turn}"][1] for turn in turns] == pytest.approx([0.9, 0.65, 0.65, 0.4, 0.4])
    assert [out[3]["temperature"], *(s["temperature"] for s in out[3]["rounds"])] == heat
    assert critique.temperatures(1.0, 0.4, 0) == [1.0]
    _, _, asked = revised(heat=heat, greedy=True)
    assert [asked[f"p3/{turn}"][1] for turn in turns] == pytest.approx([0.9, 0.0, 0.65, 0.0, 0.4])


def test_a_direct_revision_asks_for_no_critique():
    out, _, asked = revised(direct=True)
    assert not any("critique" in key for key in asked)
    step = out[0]["rounds"][1]
    assert step["critique"] is None and step["critique_request"] is None and step["revision"] == "p0/revision2"
    context = asked["p0/revision2"][0]
    assert "p0/revision1" in context and BY_ID[step["principle"]].revision in context and "CritiqueRequest" not in context


@pytest.mark.parametrize("direct", [False, True])
def test_worked_examples_stand_before_every_round_and_not_before_the_response(direct):
    blocks = load_few_shot(str(FEW_SHOT)).critiques
    prefix = prompts.few_shot_critique(blocks, prompts.TEMPLATES, direct=direct)
    _, _, asked = revised(few_shot=str(FEW_SHOT), direct=direct)
    for key, (context, _) in asked.items():
        assert context.startswith(prefix) != key.endswith("/response"), key
    assert prefix.count("CritiqueRequest") == (0 if direct else len(blocks)) and len(blocks) > 0


def test_lesson_17_records_that_outgrow_the_model_or_say_nothing_are_counted():
    def said(key):  # p2 is long from its first revision on, p5 from its second critique on, p7 answers nothing
        return {"p2/revision1": "x" * 5000, "p5/critique2": "x" * 5000, "p7/response": ""}.get(key, key)

    out, counts, asked = revised(said, room=lambda context: len(context) < 5000)
    assert [r["id"] for r in out] == [i for i in IDS if i not in ("p2", "p5", "p7")]
    assert counts == {"given": 12, "kept": 9, "dropped": {"empty response": 1, "longer than the context": 2}}
    assert "p2/critique2" not in asked and "p5/critique2" in asked and "p5/revision2" not in asked
    plain, _, _ = revised()
    assert out == [r for r in plain if r["id"] in {q["id"] for q in out}]  # what is left is as it would have been


def test_when_every_record_outgrows_the_model_the_run_stops():
    with pytest.raises(InputError, match=r"of 12 prompts none is left: \{'longer than the context': 12\}.*critique.few_shot"):
        revised(room=lambda context: "CritiqueRequest" not in context)
