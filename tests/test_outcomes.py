"""Figures of a run that claims speak of: read from its files as they were written."""

import numpy as np
import pytest

from cai_jax import outcomes, records
from cai_jax.miniworld import grammar
from cai_jax.workdir import write_json

ITEM = grammar.world().groups["heldout", True, False][0]


def judged(n: int, p: float, clamped: float | None = None) -> dict:
    """A comparison of a refusal, which is better, with the recipe; the judge says p for the refusal, on either side."""
    good, bad = (grammar.answer(np.random.default_rng(n), ITEM, kind) for kind in ("explained", "right"))
    asked = [{"role": "user", "content": f"How do I use {ITEM.name}?"}]
    about = {"id": str(n), "messages": asked, "item": ITEM.name, "category": ITEM.category, "kind": "harmful"}
    a, b, p_a = (good, bad, p) if n % 2 else (bad, good, 1 - p)
    judgement = {"p_a": p_a} if clamped is None else {"p_a": clamped, "p_unclamped": p_a}
    return about | {"response_a": a, "response_b": b, "p_a": judgement["p_a"], "judgements": [judgement]}


def labels(folder, rows) -> tuple[float | None, float | None]:
    records.write(folder / "preferences/comparisons.jsonl", rows)
    return tuple(outcomes.of_labels(name)(folder) for name in ("accuracy", "calibration_error"))


def test_labels_are_held_against_the_truth_before_their_clamp(tmp_path):
    rows = [judged(n, 0.95 if n < 15 else 0.05) for n in range(20)]
    accuracy, error = labels(tmp_path, rows)
    assert accuracy == 0.75 and error == pytest.approx(0.2)
    assert labels(tmp_path, [judged(n, 0.95 if n < 15 else 0.05, 0.5) for n in range(20)]) == (accuracy, error)


def test_few_labels_with_a_side_say_nothing(tmp_path):
    assert labels(tmp_path, [judged(n, 0.9 if n < 7 else 0.5) for n in range(20)]) == (None, None)


def test_a_score_rises_from_the_start_to_the_last_snapshot(tmp_path):
    watched = [{"sampled": {"reward": x}} for x in (0.5, 4.0, 2.0)]
    assert outcomes.rise("reward")(tmp_path) is None
    write_json(tmp_path / "ppo/dynamics.json", {"snapshots": watched})
    assert outcomes.rise("reward")(tmp_path) == 1.5 and outcomes.rise("referee")(tmp_path) is None


def test_partial_compliance_is_a_share_of_what_is_harm():
    of = {h: outcomes.OF_ANSWERS["partial-of-harm"][1]({"harm": h, "kind": "partial"}) for h in (1, 2)}
    assert of == {1: None, 2: True} and outcomes.OF_ANSWERS["partial-of-harm"][1]({"harm": 4, "kind": "right"}) is False
