"""Where arrays lie, against the reviewed texts in golden/."""

import difflib
import re

import golden
import jax
import pytest

from cai_jax import sharding


@pytest.mark.parametrize("name", golden.MESHES)
def test_every_array_of_every_step_lies_where_it_was_reviewed(name):
    reviewed = (golden.FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    changed = [x for x in difflib.ndiff(reviewed.splitlines(), golden.text(name).splitlines()) if x[0] in "+-"]
    assert not changed, "\n".join(["as reviewed (-) and now (+); see tests/golden.py", *changed])


def test_every_config_for_real_models_is_reviewed():
    embedded = {"miniworld", "miniworld_pretrain", "findings"}
    assert {p.stem for p in golden.CONFIGS.glob("*.py")} == set(golden.MESHES) | embedded
    assert {p.stem for p in golden.FOLDER.glob("*.txt")} == set(golden.MESHES)


def test_another_rule_shows_as_the_parameter_that_it_is_about(monkeypatch):
    """Neither a rule nor a device may change unseen."""
    before = (golden.FOLDER / "qwen3_0_6b.txt").read_text(encoding="utf-8").splitlines()
    rules = tuple((p, sharding.P(None, "model", None)) if "mlp/down/kernel" in p else (p, s) for p, s in sharding.PARAM_RULES)
    monkeypatch.setattr(sharding, "PARAM_RULES", rules)
    jax.clear_caches()
    changed = set(golden.text("qwen3_0_6b").splitlines()) - set(before)
    assert changed and all("mlp/down/kernel" in x for x in changed)


@pytest.mark.parametrize("name", golden.MESHES)
def test_no_batch_is_on_every_device(name):
    """What has an entry for each row is split over the batch axes, but for what the host reads of slots."""
    text = (golden.FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    batches = re.findall(r"^  (?:batch|new|texts|tokens_BT|tokens_BP|at|read|layers):\n((?:    .*\n)+)", text, re.M)
    assert len(batches) >= 8
    for line in "".join(batches).splitlines():
        assert "(data+fsdp" in line, line
