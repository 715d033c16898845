"""The second reward model: what it learns from, and that it is another model than the first."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cai_jax import stages
from cai_jax.config import Config, Data, Lora, Model, Optimizer, Reward
from cai_jax.files import read_json
from cai_jax.models import hf
from cai_jax.records import write
from cai_jax.stages import referee, reward
from cai_jax.workdir import finish, outputs

BOTH = ("preferences", "reward", "referee")


def comparison(n: int, source: str) -> dict:
    """Two of each prompt of a source."""
    asked = [{"role": "user", "content": f"{source} {n // 2}?"}]
    return {
        "id": f"{source}{n}",
        "messages": asked,
        "response_a": "Yes.",
        "response_b": "No.",
        "p_a": n % 3 / 2,
        "source": source,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, mesh1):
    """-> (config, workdir with both reward models, the numbers of the prompts that each learnt from)."""
    root = tmp_path_factory.mktemp("referee")
    base, workdir = str(root / "base"), root / "run"
    hf.save(base, tiny.params(tiny.UNTIED), tiny.UNTIED, jnp.float32)
    hf.write_config(tiny.UNTIED, base, tiny.END, tiny.PAD, jnp.float32)
    tiny.tokenizer().hf.save_pretrained(base)
    write(workdir / "preferences" / "comparisons.jsonl", [comparison(n, "ai") for n in range(40)])
    write(root / "human.jsonl", [comparison(n, "human") for n in range(20)])
    finish("preferences", workdir, {})
    c = Reward(init="base", epochs=1, batch_size=8, heldout_share=0.3, optimizer=Optimizer(learning_rate=1e-2))
    cfg = Config(stages=BOTH, model=Model(path=base), data=Data(comparisons=str(root / "human.jsonl")), reward=c)
    learnt, real = {}, reward.batches
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh1):
        patch.setattr(
            reward, "load_constitution", lambda *_: dataclasses.make_dataclass("C", ["templates"])(stages.prompts.TEMPLATES)
        )
        patch.setattr(reward, "batches", lambda p, *a: learnt.setdefault(a[3], p) and real(p, *a))
        assert reward.run(cfg, workdir, mesh1) and referee.run(cfg, workdir, mesh1)
    return cfg, workdir, {stage: pairs.prompt for stage, pairs in learnt.items()}


def test_each_learns_from_its_half_of_the_prompts_and_both_are_tried_on_the_same_others(made):
    _, workdir, learnt = made
    first, second = (set(learnt[stage].tolist()) for stage in ("reward", "referee"))
    counts = {stage: read_json(workdir / stage / "done.json")["counts"] for stage in learnt}
    assert not first & second and {c["kept"] for c in counts.values()} == {60}
    assert all(counts[stage]["half"] == len(prompts) for stage, prompts in learnt.items())
    assert sum(map(len, learnt.values())) + counts["reward"]["heldout"] == 60 and counts["reward"]["heldout"] > 0
    assert all(np.bincount(prompts)[list(set(prompts))].tolist() == [2] * len(set(prompts)) for prompts in learnt.values())
    tried = [{k: read_json(workdir / stage / "evaluation.json")[k]["n"] for k in ("ai", "human")} for stage in learnt]
    assert tried[0] == tried[1] and sum(tried[0].values()) == counts["reward"]["heldout"]


def test_prompts_are_halved_evenly_by_the_seed():
    prompt = np.repeat(np.arange(101), 3)
    half = reward.half_of(prompt, 0)
    assert np.bincount(half).tolist() in ([150, 153], [153, 150]) and (half.reshape(-1, 3) == half[::3, None]).all()
    assert (reward.half_of(prompt, 0) == half).all() and (reward.half_of(prompt, 1) != half).any()
    assert 0.2 < half[: 101 * 3 // 2].mean() < 0.8  # not the first of them against the last


def test_it_is_another_model_with_a_scale_of_its_own(made, mesh1):
    cfg, workdir, _ = made
    scales = [outputs(stage, workdir)["scale"] for stage in ("reward", "referee")]
    assert scales[0] != scales[1] and all(s["std"] > 0 for s in scales)
    with jax.set_mesh(mesh1):
        one, other = (stages.load_scorer(cfg, workdir, mesh1, name).params for name in ("reward", "referee"))
    assert jax.tree.structure(one) == jax.tree.structure(other) and not tiny.same_bits(one, other)


def test_a_run_without_one_has_the_inputs_that_it_had(made, tmp_path, monkeypatch):
    cfg, _, _ = made
    seen = []
    monkeypatch.setattr(reward, "begin", lambda stage, workdir, inputs: seen.append((stage, inputs)))
    monkeypatch.setattr(reward, "inputs_of", lambda *a: {"of": a[2], "models": a[5]})
    for stages_, run in ((BOTH, reward.run), (BOTH, referee.run), (BOTH[:2], reward.run)):
        assert not run(dataclasses.replace(cfg, stages=stages_), tmp_path, None)
    assert json.loads(json.dumps(seen)) == [
        ["reward", {"of": "reward", "models": ["reward"], "half": 0}],
        ["referee", {"of": "reward", "models": ["referee"], "half": 1}],
        ["reward", {"of": "reward", "models": ["reward"]}],
    ]


def test_it_adapts_where_the_reward_model_does():
    cfg = Config(lora=Lora(rank=2))
    assert stages.adapts(cfg, "referee") and not stages.adapts(Config(lora=Lora(rank=2, stages=("ppo",))), "referee")
    assert not stages.adapts(cfg, "harm") and stages.root(cfg, "referee") == stages.root(cfg, "reward")
