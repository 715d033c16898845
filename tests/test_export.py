"""`cai export`: what transformers reads and computes from the folder, reward model included, and what is refused."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from test_families import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from cai_jax import checkpoints, main
from cai_jax import export as exports
from cai_jax.config import Config, Model, as_dict
from cai_jax.models import hf
from cai_jax.score import reward_scores
from cai_jax.sharding import put
from cai_jax.workdir import InputError, finish, write_json

KINDS = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 6},
    "olmo2": {"head_dim": None},
    "gpt_neox": {"head_dim": None, "num_key_value_heads": None},
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory, mesh1):
    """-> (config, workdir with a supervised and a reward model of that family, their parameters)."""
    root = tmp_path_factory.mktemp("export")
    base, workdir = root / "base", root / "run"
    fields = {k: v for k, v in (SIZES | KINDS[request.param]).items() if v is not None}
    fields |= {"eos_token_id": tiny.END, "pad_token_id": tiny.PAD, "bos_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **fields)).save_pretrained(base)
    tiny.tokenizer().hf.save_pretrained(base)
    cfg = Config(model=Model(path=str(base)))
    write_json(workdir / "config.json", as_dict(cfg))
    rng = np.random.default_rng(1)
    start = jax.tree.map(np.asarray, hf.load(str(base), mesh1))
    trained = jax.tree.map(lambda x: x + rng.normal(0, 0.02, x.shape).astype(np.float32), start)
    head = {"kernel": rng.normal(0, 1, (SIZES["hidden_size"], 1)).astype(np.float32), "bias": np.zeros(1, np.float32)}
    checkpoints.save_model(workdir / "sft", put(trained, mesh1))
    checkpoints.save_model(workdir / "reward", put({"trunk": trained, "head": head}, mesh1))
    for stage in ("sft", "reward"):
        finish(stage, workdir, {}, {})
    return SimpleNamespace(cfg=cfg, workdir=workdir, trained=trained, head=head)


def test_lesson_14_a_model_of_a_run_is_a_folder_of_its_family(made, mesh1, tmp_path):
    out = tmp_path / "sl"
    exports.export(made.cfg, made.workdir, "sl_cai", out, mesh1, "float32")
    assert tiny.same_bits(hf.load(str(out), mesh1), made.trained)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32 and model.config.eos_token_id == tiny.END
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == tiny.tokenizer().encode("a b")
    assert model.generation_config.eos_token_id == tiny.END
    off, largest = exports.check(out, "sl_cai", mesh1)
    assert off < exports.TOLERANCE * max(1, largest) and largest > 0.1
    assert not list(tmp_path.glob(".*"))


def test_lesson_14_a_reward_model_gives_the_same_scalar_in_transformers(made, mesh1, tmp_path):
    out = tmp_path / "reward"
    exports.export(made.cfg, made.workdir, "reward", out, mesh1, "float32")
    model, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()) and model.num_labels == 1, report
    rows, lengths = tiny.rows([9, 5, 12, 1], 12, seed=3)  # padding behind, which transformers finds by the id
    with torch.no_grad():
        theirs = model(torch.tensor(rows, dtype=torch.long), attention_mask=torch.tensor(rows != tiny.PAD)).logits[:, 0].numpy()
    net = tiny.net(hf.read_config(str(made.cfg.model.path)))
    ours = reward_scores(net, {"trunk": made.trained, "head": made.head}, jnp.asarray(rows), jnp.asarray(lengths))
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-4)
    assert np.ptp(theirs) > 0.1
    again = hf.load(str(out), mesh1)
    assert tiny.same_bits(again["head"], made.head)
    off, largest = exports.check(out, "reward", mesh1)
    assert off < exports.TOLERANCE * max(1, largest)


def test_the_check_sees_a_tensor_that_is_wrong(made, mesh1, tmp_path, monkeypatch):
    out = tmp_path / "sl"
    exports.export(made.cfg, made.workdir, "sl_cai", out, mesh1, "float32")
    right = hf.load

    def wrong(*args, **options):
        params = right(*args, **options)
        return params | {"embed": {"embedding": params["embed"]["embedding"][::-1]}}

    monkeypatch.setattr(exports.hf, "load", wrong)
    off, largest = exports.check(out, "sl_cai", mesh1)
    assert off > 100 * exports.TOLERANCE * max(1, largest)


def test_what_cannot_be_exported_is_said(made, mesh1, tmp_path):
    def export(name="sl_cai", out=tmp_path / "new", dtype=""):
        exports.export(made.cfg, made.workdir, name, out, mesh1, dtype)

    with pytest.raises(InputError, match="--model=best: wanted one of base, sl_cai, dpo_cai, rl_cai, reward"):
        export("best")
    with pytest.raises(InputError, match="--out=.* exists; give another folder"):
        export(out=tmp_path)
    with pytest.raises(InputError, match="--dtype=int8: wanted float32 or bfloat16"):
        export(dtype="int8")
    with pytest.raises(InputError, match="no model at .*ppo.* has the stage 'ppo' finished"):
        export("rl_cai")
    assert not (tmp_path / "new").exists()


def test_the_command_exports_and_checks(made, tmp_path, monkeypatch, capsys):
    flags = {"WORKDIR": str(made.workdir), "MODEL": "base", "OUT": str(tmp_path / "base"), "DTYPE": "", "CHECK": True}
    for name, value in flags.items():
        monkeypatch.setattr(main, name, SimpleNamespace(value=value))
    main.main(["cai", "export"])
    assert "largest difference from transformers" in capsys.readouterr().err
    wanted = json.loads((tmp_path / "base" / "config.json").read_text())
    assert wanted["dtype"] == json.loads(open_text(made.cfg.model.path + "/config.json"))["dtype"]
    with pytest.raises(SystemExit) as e:
        main.main(["cai", "export"])
    assert e.value.code == 2 and "it exists" in capsys.readouterr().err


def open_text(path):
    with open(path) as f:
        return f.read()
