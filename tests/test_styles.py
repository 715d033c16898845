"""From text to numbers in three styles of tokenizer: a folder that transformers reads as we do, transcripts that survive."""

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
import torch
from test_formats import STYLES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cai_jax import checkpoints, prompts, records, sources, stages
from cai_jax import export as exports
from cai_jax.config import Config, Model
from cai_jax.models import hf
from cai_jax.models.heads import init_head
from cai_jax.pairs import encode_comparisons
from cai_jax.score import reward_scores
from cai_jax.sharding import put
from cai_jax.workdir import finish

TALK = "\n\nHuman: The sign said: Human: wait.\n\nAssistant: So: yes.\n\nHuman: And then? Äö 12\n\nAssistant:"
PAIRS = [(TALK + " No one knows.", TALK + " Ask: Human: him."), (TALK + " Yes.", TALK + "")]


@pytest.fixture(scope="module", params=STYLES)
def run(request, tmp_path_factory, mesh1):
    """-> (config, workdir with a supervised and a reward model made from a checkpoint with that tokenizer)."""
    root = tmp_path_factory.mktemp(request.param)
    cfg = Config(model=Model(path=miniature.write(root / "base", "llama", request.param)))
    rng, start = np.random.default_rng(1), jax.tree.map(np.asarray, hf.load(cfg.model.path, mesh1))
    trained = jax.tree.map(lambda x: x + rng.normal(0, 0.02, x.shape).astype(np.float32), start)
    head = jax.tree.map(np.asarray, init_head(jax.random.key(0), 32))
    checkpoints.save_model(root / "run" / "sft", put(trained, mesh1))
    checkpoints.save_model(root / "run" / "reward", put({"trunk": stages.trunk(trained), "head": head}, mesh1))
    for stage in ("sft", "reward"):
        finish(stage, root / "run", {}, {})
    return cfg, root / "run"


def test_lesson_14_a_text_has_the_logits_and_the_score_of_transformers(run, mesh1, tmp_path):
    cfg, workdir = run
    text = TALK + " No <|im_end|> one </s> knows."
    for name, kind in (("sl_cai", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        with jax.set_mesh(mesh1):
            lm = exports.export(cfg, workdir, name, tmp_path / name, mesh1, "float32")
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == lm.tok.prompt(text)
        ids = [*ids, lm.tok.eos_id]
        with torch.no_grad():
            wanted = kind.from_pretrained(tmp_path / name)(torch.tensor([ids])).logits[0].numpy()
        tokens, lengths = jnp.array([ids]), jnp.array([len(ids)])
        if name == "reward":
            found = reward_scores(lm.net(), lm.params, tokens, lengths)
        else:
            found = exports._logits(lm.net(), lm.params, tokens, lengths)[0]
        np.testing.assert_allclose(np.asarray(found), wanted, atol=2e-4)


def test_lesson_18_transcripts_survive_every_tokenizer(run, tmp_path):
    """'Human:' and ': ' inside a text stay there, and a row that is trained on reads as the transcript did."""
    cfg, _ = run
    tok, templates = stages.load_format(cfg)
    records.write(tmp_path / "pairs.jsonl", [{"chosen": a, "rejected": b} for a, b in PAIRS])
    found = sources.comparisons(str(tmp_path / "pairs.jsonl"))
    assert [r["response_a"] for r in found] == ["No one knows.", "Yes."] and [r["response_b"] for r in found] == [
        "Ask: Human: him.",
        "",
    ]
    out = encode_comparisons(tok, templates, [r | {"source": "human"} for r in found], 512, records.Drops())
    for i, pair in enumerate(PAIRS):
        for side in range(2):
            ids = [out.trees[i].tokens[place] for place in out.trees[i].texts[side][1]]
            assert ids[: len(tok.start)] == list(tok.start) and ids[-1] == tok.eos_id
            assert tok.decode(ids).rstrip() == pair[side].rstrip()
            assert out.starts[i] == len(tok.prompt(prompts.dialogue(found[i]["messages"], templates)))
