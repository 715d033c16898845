"""The models of a run: what each starts from, whose tokenizer it has, what is trained of it and what stays."""

import copy
import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
import tiny

from cai_jax import checkpoints, prompts, records, stages
from cai_jax.config import PPO, SFT, Checkpoint, Config, Data, Lora, Model, Preferences, Reward
from cai_jax.errors import InputError
from cai_jax.models import hf, lora
from cai_jax.models.heads import init_head
from cai_jax.sharding import put
from cai_jax.stages.ppo import models
from cai_jax.workdir import finish

TOKENS, LENGTHS = tiny.rows([9, 12], 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """-> makes a checkpoint of a seed, untied, with a tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")

    def write(seed):
        path = root / str(seed)
        if not path.exists():
            hf.save(str(path), tiny.params(tiny.UNTIED, seed), tiny.UNTIED, jnp.float32)
            hf.write_config(tiny.UNTIED, str(path), tiny.END, tiny.PAD, jnp.float32)
            tiny.tokenizer().hf.save_pretrained(path)
        return str(path)

    return write


def noisy(tree, seed, scale=0.05):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, scale, x.shape).astype(np.float32), tree)


def logits(lm):
    return np.asarray(tiny.logits(lm.net(), lm.params, TOKENS, LENGTHS))


def save(workdir, stage, params, mesh):
    checkpoints.save_model(workdir / stage, put(params, mesh))
    finish(stage, workdir, {}, scale={"mean": 0.0, "std": 1.0})


def test_the_table_of_origins():
    cfg = Config(model=Model(path="base"))
    assert [stages.origin(cfg, m) for m in ("base", "judge", "sl_cai", "dpo_cai", "rl_cai", *stages.SCORERS)] == [
        *(None, None, None, "sl_cai", "sl_cai", "sl_cai", "sl_cai", "base")
    ]
    cfg = replace(cfg, sft=SFT(model=Checkpoint("raw")), preferences=Preferences(judge=Checkpoint("judge", "chat", "Be fair.")))
    roots = {m: stages.checkpoint(cfg, m) for m in stages.STAGE_OF}
    assert {m: c.path for m, c in roots.items()} == {
        "base": "base", "judge": "judge", "sl_cai": "raw", "dpo_cai": "raw", "rl_cai": "raw", "reward": "raw", "referee": "raw",
        "harm": "base"
    }  # fmt: skip
    assert roots["judge"] == Checkpoint("judge", "chat", "Be fair.")
    cfg = replace(cfg, reward=Reward(model=Checkpoint("other")), ppo=PPO(init="base"))
    assert stages.origin(cfg, "reward") is None and stages.checkpoint(cfg, "reward").path == "other"
    assert stages.origin(cfg, "rl_cai") == "base" and stages.checkpoint(cfg, "rl_cai").path == "base"


def test_the_frozen_weights_of_an_adapter_are_those_of_the_model_before_it():
    full = Config(model=Model(path="base"))
    assert [stages.root(full, m) for m in ("base", "sl_cai", "rl_cai", "reward")] == ["base", "sl_cai", "rl_cai", "reward"]
    every = replace(full, lora=Lora(rank=2))
    assert {m: stages.root(every, m) for m in stages.STAGE_OF} == dict.fromkeys(stages.STAGE_OF, "base") | {"harm": "harm"}
    late = replace(full, lora=Lora(rank=2, stages=("reward", "ppo")))
    assert [stages.root(late, m) for m in ("sl_cai", "rl_cai", "reward", "referee")] == ["sl_cai"] * 4


def test_adapters_on_a_tuned_model_have_it_as_their_reference(folder, tmp_path, mesh1):
    """The reference is the base with the adapter off, and policy, value and reward model share one frozen base."""
    cfg = Config(model=Model(path=folder(0)), lora=Lora(rank=2, stages=("reward", "ppo")))
    tuned = noisy(tiny.params(tiny.UNTIED), 1)
    arch = lora.attach(tiny.UNTIED, cfg.lora)
    adapter = noisy(lora.init(arch, jax.random.key(0)), 2, 0.2)
    head = jax.tree.map(np.asarray, init_head(jax.random.key(1), tiny.CFG.width))
    with jax.set_mesh(mesh1):
        save(tmp_path, "sft", tuned, mesh1)
        save(tmp_path, "reward", {"trunk": adapter, "head": head}, mesh1)
        start = stages.load_start(cfg, tmp_path, mesh1, "rl_cai")
        trained, frozen = models(cfg, tmp_path, mesh1, start, jax.random.key(0))
        assert frozen.reference.cfg.lora is None and tiny.same_bits(frozen.reference.params, put(tuned, mesh1))
        assert set(lora.split(trained["policy"])[1]) == set() and set(lora.split(trained["value"]["trunk"])[1]) == set()
        policy = start.lm._replace(cfg=frozen.net.cfg, params=lora.join(frozen.params["policy"], trained["policy"]))
        np.testing.assert_array_equal(logits(policy), logits(start.lm))  # an adapter starts as nothing
        shared = frozen.params["policy"]["layers"]["mlp"]["up"]["kernel"]
        for other in (frozen.params["value"]["trunk"], frozen.reward.params["trunk"], frozen.reference.params):
            assert other["layers"]["mlp"]["up"]["kernel"] is shared
        assert tiny.same_bits(trained["value"]["trunk"], put(adapter, mesh1))  # the value network starts as the reward model
        assert "unembed" not in frozen.reward.params["trunk"] and "unembed" not in frozen.params["value"]["trunk"]
        wanted = lora.merge(lora.join({k: v for k, v in tuned.items() if k != "unembed"}, adapter), cfg.lora)
        merged = lora.merge(frozen.reward.params["trunk"], cfg.lora)
        tiny.assert_close(merged, wanted, 1e-6)


def test_an_adapter_goes_on_from_the_adapter_before_it(folder, tmp_path, mesh1):
    cfg = Config(model=Model(path=folder(0)), lora=Lora(rank=2))
    adapter = noisy(lora.init(lora.attach(tiny.UNTIED, cfg.lora), jax.random.key(0)), 2, 0.2)
    with jax.set_mesh(mesh1):
        save(tmp_path, "sft", adapter, mesh1)
        sl, start = stages.load_lm(cfg, tmp_path, mesh1, "sl_cai"), stages.load_start(cfg, tmp_path, mesh1, "rl_cai")
        assert tiny.same_bits(start.trained, put(adapter, mesh1)) and sl.cfg.lora == cfg.lora
        np.testing.assert_array_equal(logits(start.lm), logits(sl))
        assert np.abs(logits(sl) - logits(stages.load_lm(cfg, tmp_path, mesh1))).max() > 0.1
        whole = stages.load_start(replace(cfg, lora=Lora(rank=2, stages=("sft",))), tmp_path, mesh1, "dpo_cai")
        assert whole.frozen == {} and whole.net.cfg.lora is None and not lora.split(whole.trained)[0]
        np.testing.assert_allclose(logits(whole.lm), logits(sl), atol=1e-4)  # all weights go on from the merged ones


def test_a_model_with_a_checkpoint_of_its_own(folder, tmp_path, mesh1):
    cfg = Config(model=Model(path=folder(0)), reward=Reward(model=Checkpoint(folder(1))), sft=SFT(model=Checkpoint(folder(2))))
    with jax.set_mesh(mesh1):
        for name, seed in (("base", 0), ("judge", 0)):
            assert tiny.same_bits(stages.load_lm(cfg, tmp_path, mesh1, name).params, put(tiny.params(tiny.UNTIED, seed), mesh1))
        start = stages.load_start(cfg, tmp_path, mesh1, "reward")
        assert "unembed" not in start.trained
        assert tiny.same_bits(start.trained, stages.trunk(put(tiny.params(tiny.UNTIED, 1), mesh1)))
        assert tiny.same_bits(
            stages.load_start(cfg, tmp_path, mesh1, "sl_cai").trained, put(tiny.params(tiny.UNTIED, 2), mesh1)
        )


def test_a_tokenizer_larger_than_the_embedding(tmp_path, mesh1):
    """Control tokens that nothing writes may lie beyond it, as in small models with the tokenizer of large ones."""
    path, arch = str(tmp_path / "m"), replace(tiny.UNTIED, vocab_size=97)
    hf.save(path, tiny.params(arch), arch, jnp.float32)
    hf.write_config(arch, path, tiny.END, tiny.PAD, jnp.float32)
    own = copy.deepcopy(tiny.tokenizer().hf)
    own.save_pretrained(path)
    cfg = Config(model=Model(path=path))
    with jax.set_mesh(mesh1):
        with pytest.raises(InputError, match="m: the tokenizer has 98 tokens, the model only 97"):
            stages.load_lm(cfg, tmp_path, mesh1)
        own.add_special_tokens({"additional_special_tokens": ["~", "<eye>"]})  # the last one of 98 is a sign no longer
        own.save_pretrained(path)
        assert stages.load_lm(cfg, tmp_path, mesh1).tok.vocab_size == 99
        own.add_tokens(["word"])
        own.save_pretrained(path)
        with pytest.raises(InputError, match="the tokenizer has 100 tokens"):
            stages.load_lm(cfg, tmp_path, mesh1)


def test_a_reward_checkpoint_is_no_language_model(folder, tmp_path, mesh1):
    path, head = str(tmp_path / "scores"), init_head(jax.random.key(1), tiny.CFG.width)
    hf.save(path, stages.trunk(tiny.params(tiny.UNTIED)), tiny.UNTIED, jnp.float32, head=head)
    hf.write_config(tiny.UNTIED, path, tiny.END, tiny.PAD, jnp.float32)
    tiny.tokenizer().hf.save_pretrained(path)
    with jax.set_mesh(mesh1):
        with pytest.raises(InputError, match="scores: it is a sequence classifier, base wants a language model"):
            stages.load_lm(Config(model=Model(path=path)), tmp_path, mesh1)
        cfg = Config(model=Model(path=folder(0)), reward=Reward(model=Checkpoint(path)))
        start = stages.load_start(cfg, tmp_path, mesh1, "reward")  # its trunk is a start
    assert tiny.same_bits(start.trained, stages.trunk(put(tiny.params(tiny.UNTIED), mesh1)))


def test_frozen_weights_are_of_the_compute_dtype_and_trained_ones_as_asked(folder, tmp_path, mesh1):
    cfg = Config(model=Model(path=folder(0), compute_dtype="bfloat16"), lora=Lora(rank=2, stages=("ppo",)))
    with jax.set_mesh(mesh1):
        dtypes = {k: x.dtype.name for k, x in stages.load_start(cfg, tmp_path, mesh1, "sl_cai").trained["embed"].items()}
        assert dtypes == {"embedding": "float32"}
        small = replace(cfg, model=replace(cfg.model, trained_dtype="bfloat16"))
        assert stages.load_start(small, tmp_path, mesh1, "sl_cai").trained["embed"]["embedding"].dtype == jnp.bfloat16
        save(tmp_path, "sft", tiny.params(tiny.UNTIED), mesh1)
        start = stages.load_start(cfg, tmp_path, mesh1, "rl_cai")
        assert {x.dtype.name for x in jax.tree.leaves(start.trained)} == {"float32"}
        assert start.frozen["embed"]["embedding"].dtype == jnp.bfloat16
        assert start.frozen["final_norm"]["scale"].dtype == jnp.float32


class Seen(Exception):
    """Carries what a stage was about to use."""


ROLES = {"base": "headers", "judge": "model", "reward": "chatml", "policy": ""}  # whose chat template; "": plain transcripts


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """-> (config with a checkpoint of its own for every role, a workdir whose early stages are done)."""
    root, seed = tmp_path_factory.mktemp("several"), 0
    for role, template in ROLES.items():
        seed += 1
        miniature.write(root / role, "llama", "tiktoken", template, seed=seed)
    cfg = Config(
        model=Model(path=str(root / "base"), format="chat"),
        sft=SFT(model=Checkpoint(str(root / "policy"))),
        preferences=Preferences(judge=Checkpoint(str(root / "judge"), "chat")),
        reward=Reward(model=Checkpoint(str(root / "reward"), "chat")),
    )
    workdir, message = root / "run", [{"role": "user", "content": "Why?"}]
    pair = {"id": "a", "messages": message, "response_a": "One.", "response_b": "Two.", "p_a": 0.7, "source": "ai"}
    revision = {"id": "a", "messages": message, "response": "One.", "rounds": [{"revision": "Two.", "finished": True}]}
    records.write(workdir / "critique" / "revisions.jsonl", [revision])
    records.write(workdir / "critique" / "helpful.jsonl", [revision | {"finished": True}])
    records.write(workdir / "preferences" / "comparisons.jsonl", [pair])
    for stage in ("critique", "sft", "preferences", "reward"):
        finish(stage, workdir, {}, scale={"mean": 0.0, "std": 1.0})
    return cfg, workdir


@pytest.mark.parametrize(
    "stage, name, role, take",
    [
        ("critique", "sample_chains", "base", lambda lm, chains, *_: (lm.tok, next(next(iter(chains.values()))).context)),
        ("sft", "pack_pairs", "policy", lambda pairs, tok, templates, *_: (tok, templates["user"])),
        ("preferences", "sample_texts", "policy", lambda lm, asked, *_: (lm.tok, asked[0].context)),
        ("preferences", "judge", "judge", lambda cfg, lm, constitution, *_: (lm.tok, constitution.templates["user"])),
        ("reward", "encode_comparisons", "reward", lambda tok, templates, *_: (tok, templates["user"])),
        ("dpo", "encode_comparisons", "policy", lambda tok, templates, *_: (tok, templates["user"])),
        ("ppo", "models", "policy", lambda cfg, workdir, mesh, start, *_: (start.lm.tok, None)),
        ("ppo", "PromptPool", "policy", lambda cfg, lm, templates: (lm.tok, templates["user"])),
    ],
)
def test_each_stage_talks_to_its_model_in_that_models_format(stage, name, role, take, several, mesh1, monkeypatch):
    cfg, workdir = several
    module = importlib.import_module(f"cai_jax.stages.{stage}")

    def seen(*args, **_):
        raise Seen(*take(*args))

    monkeypatch.chdir(miniature.ROOT)
    if name == "judge":
        monkeypatch.setattr(module, "sample_texts", lambda lm, asked, *_: [{"text": r.key, "finished": True} for r in asked])
    monkeypatch.setattr(module, name, seen)
    monkeypatch.setattr(records, "Journal", lambda path: None)
    monkeypatch.setattr(stages, "_params", lambda *a, **_: hf.load(stages.checkpoint(cfg, a[3]).path, mesh1, a[4]))
    (workdir / stage / "inputs.json").unlink(missing_ok=True)
    done = workdir / stage / "done.json"
    kept = done.read_text() if done.exists() else None
    done.unlink(missing_ok=True)
    try:
        with jax.set_mesh(mesh1), pytest.raises(Seen) as found:
            module.run(cfg, workdir, mesh1)
    finally:
        if kept:
            done.write_text(kept)
    tok, text = found.value.args
    wanted, templates = stages.load_format(cfg, {"policy": "sl_cai"}.get(role, role))
    if tok is not None:
        assert (tok.start, tok.controls, tok.eos_id) == (wanted.start, wanted.controls, wanted.eos_id)
    opening = templates["user"].partition("{text}")[0]
    if isinstance(text, list):  # ids of a row
        assert text[: len(wanted.prompt(opening)) - 1] == wanted.prompt(opening)[:-1]
    elif text is not None and "{text}" in text:
        assert text == templates["user"]
    elif text is not None:
        assert text.startswith(opening) and text.endswith(templates["reply"])


def test_the_formats_of_the_roles_differ_in_what_the_test_is_about(several):
    users = {role: stages.load_format(several[0], {"policy": "sl_cai"}.get(role, role))[1]["user"] for role in ROLES}
    assert all(users[role] != users["base"] for role in ("judge", "reward", "policy")), users


BASE_INPUTS = ("critique", "sft", "preferences", "reward", "dpo", "ppo")


@pytest.mark.parametrize(
    "change, affected",
    [
        ({"lora": {"rank": 2}}, {"sft", "reward", "dpo", "ppo"}),
        ({"lora": {"rank": 2, "stages": ("ppo",)}}, {"ppo"}),
        ({"lora": {"stages": ("ppo",)}}, set()),
        ({"model": {"trained_dtype": "bfloat16"}}, {"sft", "reward", "dpo", "ppo"}),
        ({"model": {"remat": "full", "layers": "unrolled"}}, set()),
        ({"model": {"format": "chat"}}, set(BASE_INPUTS)),
        ({"preferences": {"judge": 1}}, {"preferences"}),
        ({"reward": {"model": 1}}, {"reward", "ppo"}),
        ({"sft": {"model": 1}}, {"sft", "preferences", "reward", "dpo", "ppo"}),
        ({"data": {"max_pair": 9}}, {"reward", "dpo"}),
        ({"data": {"human_share": 0.1}}, {"reward", "dpo"}),
        ({"data": {"max_prompt": 9}}, {"critique", "preferences", "ppo"}),
        ({"data": {"max_redteam": 9}}, {"critique", "preferences", "ppo"}),
        ({"data": {"max_comparisons": 9}}, {"reward", "dpo"}),
    ],
)
def test_a_changed_key_is_seen_by_the_stages_that_it_changes(change, affected, folder, tmp_path):
    """What a result depends on is in the inputs, and nothing else: a harmless change must not refuse a finished stage."""
    before = Config(model=Model(path=folder(0)))
    after = before
    for section, values in change.items():
        values = {k: Checkpoint(folder(v)) if k in ("judge", "model") else v for k, v in values.items()}
        after = replace(after, **{section: replace(getattr(after, section), **values)})
    assert {s for s in BASE_INPUTS if inputs(before, s, tmp_path) != inputs(after, s, tmp_path)} == affected


def test_a_stage_that_no_longer_adapts_leaves_the_others_alone(folder, tmp_path):
    every = Config(model=Model(path=folder(0)), lora=Lora(rank=2))
    fewer = replace(every, lora=Lora(rank=2, stages=("sft", "reward", "dpo")))
    assert {s for s in BASE_INPUTS if inputs(every, s, tmp_path) != inputs(fewer, s, tmp_path)} == {"ppo"}


def inputs(cfg, stage, workdir):
    """What `stage` records before it begins."""
    for earlier in BASE_INPUTS:
        finish(earlier, workdir, {}, scale={})
    module, found = importlib.import_module(f"cai_jax.stages.{stage}"), []

    def begin(stage, workdir, inputs):
        found.append(inputs)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(miniature.ROOT)
        patch.setattr(module, "begin", begin)
        if cfg.model.format == "chat":
            patch.setattr(stages, "load_format", lambda *_: (None, prompts.TEMPLATES))
        assert not module.run(cfg, workdir, None)
    return found[0]


def test_every_checkpoint_is_looked_at_before_anything_runs(folder, tmp_path):
    cfg = Config(model=Model(path=folder(0)))
    stages.check_models(cfg)
    for flag, changes in (
        ("preferences.judge", {"preferences": Preferences(judge=Checkpoint(str(tmp_path / "no")))}),
        ("reward.model", {"reward": Reward(model=Checkpoint(str(tmp_path / "no")))}),
        ("sft.model", {"sft": SFT(model=Checkpoint(str(tmp_path / "no")))}),
    ):
        with pytest.raises(InputError, match=rf"--config.{flag}.path"):
            stages.check_models(replace(cfg, **changes))
    stages.check_models(replace(cfg, stages=("critique",), reward=Reward(model=Checkpoint("no"))))  # it is not wanted
    for stage in ("sft", "reward", "dpo", "ppo"):
        late = replace(cfg, stages=(stage,), lora=Lora(rank=2, targets="nothing", stages=(stage,)))
        with pytest.raises(InputError, match="lora.targets"):
            stages.check_models(late)


def test_every_source_is_read_before_anything_runs(monkeypatch):
    monkeypatch.chdir(miniature.ROOT)
    stages.check_data(Config())
    for name in ("redteam", "helpful", "comparisons"):
        cfg = Config(data=Data(**{name: "/nope.jsonl"}))
        with pytest.raises(InputError, match=rf"missing file: /nope.jsonl.*--config.data.{name}"):
            stages.check_data(cfg)
        stages.check_data(replace(cfg, stages=("sft", "report")))  # which read none
