"""Folders in Hugging Face format: the same logits as transformers computes, both ways, and nothing ignored."""

import json
import sys
from dataclasses import replace
from fnmatch import fnmatch

import huggingface_hub
import jax
import jax.numpy as jnp
import measure_import
import numpy as np
import pytest
import tiny
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import LlamaConfig, LlamaForCausalLM

from cai_jax.errors import InputError
from cai_jax.models import hf
from cai_jax.models.attention import Rope
from cai_jax.models.heads import init_head
from cai_jax.models.transformer import TransformerConfig, cast_matrices
from cai_jax.sharding import shardings

CONFIGS = {
    "tied, kv groups": tiny.CFG,
    "untied, one kv head, theta, wide heads": TransformerConfig(
        vocab_size=98, num_layers=2, width=32, mlp_width=64, num_heads=4, num_kv_heads=1, head_dim=16, max_length=128,
        rope=Rope(500_000.0), norm_eps=1e-3, tied_embeddings=False,
    ),
    "untied, no groups": replace(tiny.UNTIED, num_kv_heads=4, rope=Rope(100.0)),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 98, (2, 24), np.int32)


@pytest.fixture
def mesh(mesh1):
    return mesh1


def ours(params, cfg):
    return np.asarray(tiny.logits(tiny.net(cfg), params, TOKENS, np.array([24, 24], np.int32)))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def write(path, cfg=tiny.CFG, dtype=jnp.float32):
    hf.save(str(path), tiny.params(cfg), cfg, dtype)
    hf.write_config(cfg, str(path), tiny.END, tiny.PAD)
    return str(path)


def change_config(path, **values):
    file = f"{path}/config.json"
    with open(file) as f:
        config = json.load(f)
    with open(file, "w") as f:
        json.dump({k: v for k, v in (config | values).items() if v != "(gone)"}, f)


def change_tensors(path, change):
    file = f"{path}/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("name", CONFIGS)
def test_lesson_14_transformers_reads_our_folder_and_computes_our_logits(name, tmp_path):
    cfg = CONFIGS[name]
    model, report = LlamaForCausalLM.from_pretrained(write(tmp_path, cfg), dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report  # no tensor missing, left over or of another shape
    assert model.config.eos_token_id == tiny.END and model.config.pad_token_id == tiny.PAD
    wanted = theirs(model)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(ours(tiny.params(cfg), cfg), wanted, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_lesson_14_we_read_the_folder_of_transformers_and_compute_its_logits(name, tmp_path, mesh):
    cfg = CONFIGS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, head_dim=cfg.head_dim,
        max_position_embeddings=cfg.max_length, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope.theta}, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in (p for n, p in model.named_parameters() if "norm" in n):
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path)
    assert hf.read_config(str(tmp_path)) == cfg
    wanted = theirs(model)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(ours(hf.load(str(tmp_path), mesh), cfg), wanted, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_comes_back_as_it_was_written(name, tmp_path):
    hf.write_config(CONFIGS[name], str(tmp_path), tiny.END, tiny.PAD)
    assert hf.read_config(str(tmp_path)) == CONFIGS[name]


def test_float32_parameters_come_back_bit_by_bit_where_the_rules_put_them(tmp_path, mesh8):
    params = hf.load(write(tmp_path, tiny.UNTIED), mesh8)
    assert tiny.same_bits(params, tiny.params(tiny.UNTIED))
    assert jax.tree.map(lambda x: x.sharding, params) == shardings(params, mesh8)


def test_bfloat16_is_rounded_once_and_then_stays_the_same_file(tmp_path, mesh):
    first = write(tmp_path / "first", dtype=jnp.bfloat16)
    params = hf.load(first, mesh)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), tiny.params())
    assert tiny.same_bits(params, rounded)
    assert tiny.same_bits(hf.load(first, mesh, jnp.bfloat16), cast_matrices(rounded, jnp.bfloat16))
    hf.save(str(tmp_path / "second"), params, tiny.CFG)  # bfloat16 is the default
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "second"))
    assert a == b
    assert [p.name for p in (tmp_path / "second").iterdir()] == ["model.safetensors"]  # nothing is left beside it


def test_a_tied_matrix_that_the_file_repeats_is_no_error(tmp_path, mesh):
    path = write(tmp_path)
    change_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert tiny.same_bits(hf.load(path, mesh), tiny.params())


def drop(t):
    del t["model.layers.1.mlp.up_proj.weight"]


def add(t):
    t["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def reshape(name):
    """The same numbers in another shape: a transposed matrix is not the matrix."""
    return lambda t: t.update({name: np.ascontiguousarray(t[name].T)})


def grow(t):
    t["model.norm.weight"] = np.ones(33, np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, "the tensor model.layers.1.mlp.up_proj.weight is missing"),
        (add, r"1 tensors are not part of the model.*model.layers.0.self_attn.q_proj.bias"),
        (lambda t: t.update({"lm_head.weight": np.zeros((98, 32), np.float32)}), "lm_head.weight"),
        (grow, r"model.norm.weight has shape \(33,\)"),
        (reshape("model.layers.0.mlp.gate_proj.weight"), r"model.layers.0.mlp.gate_proj.weight has shape \(32, 64\)"),
        (reshape("model.layers.1.self_attn.k_proj.weight"), r"model.layers.1.self_attn.k_proj.weight has shape \(32, 16\)"),
        (reshape("model.embed_tokens.weight"), r"model.embed_tokens.weight has shape \(32, 98\)"),
    ],
    ids=["missing", "extra", "untied beside tied", "wrong size", "transposed", "transposed heads", "transposed embedding"],
)
def test_every_tensor_of_a_file_is_accounted_for(tmp_path, mesh, change, message):
    path = write(tmp_path)
    change_tensors(path, change)
    with pytest.raises(InputError, match=message) as e:
        hf.load(path, mesh)
    assert path in str(e.value)


TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("name", [TENSOR, "model.norm.weight"])
@pytest.mark.parametrize("stored", ["int8", "uint8", "int64", "bool", "float8_e4m3fn", "float8_e5m2", "complex64"])
def test_numbers_that_are_no_weights_are_refused_by_name(tmp_path, mesh, stored, name):
    path = write(tmp_path)
    tensors = load_torch(tmp_path / "model.safetensors")
    save_torch(tensors | {name: tensors[name].to(getattr(torch, stored))}, tmp_path / "model.safetensors")
    code = {"f": "F8_E[45]M[23]", "b": "BOOL", "c": "C64"}.get(stored[0], stored[0].upper() + stored[-1])
    code = {"int64": "I64"}.get(stored, code)
    with pytest.raises(InputError, match=f"model.safetensors: {name} is stored as {code}, wanted F64, F32, F16, BF16; a quant"):
        hf.load(path, mesh)


@pytest.mark.parametrize("stored", [np.float16, np.float64])
def test_other_floating_numbers_are_weights(tmp_path, mesh, stored):
    path = write(tmp_path)
    change_tensors(path, lambda t: t.update({k: v.astype(stored) for k, v in t.items()}))
    wanted = jax.tree.map(lambda x: x.astype(stored).astype(np.float32), tiny.params())
    assert tiny.same_bits(hf.load(path, mesh), wanted)


def test_older_and_newer_places_of_the_rope_base_are_both_read(tmp_path):
    path = write(tmp_path)
    change_config(path, rope_theta=123.0)
    assert hf.read_config(path).rope.theta == 123.0
    change_config(path, rope_theta="(gone)", rope_parameters={"rope_type": "default", "rope_theta": 456.0})
    assert hf.read_config(path).rope.theta == 456.0
    change_config(path, rope_parameters="(gone)", num_key_value_heads="(gone)", head_dim="(gone)", tie_word_embeddings="(gone)")
    assert hf.read_config(path) == replace(tiny.CFG, num_kv_heads=4, tied_embeddings=False)  # what Llama's defaults are


def test_missing_files_are_named_with_the_flag(tmp_path, mesh):
    with pytest.raises(InputError, match="no model at .*nowhere.*--config.model.path"):
        hf.load(str(tmp_path / "nowhere"), mesh)
    path = write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights at .*model.safetensors.*--config.model.path"):
        hf.load(path, mesh)


def test_lesson_14_a_reward_model_is_not_saved_without_its_head(tmp_path):
    head = init_head(jax.random.key(0), 32)
    with pytest.raises(KeyError, match="head"):
        hf.save(str(tmp_path), {**tiny.params(), "head": head}, tiny.CFG)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_hub_id_without_network_is_said_and_a_folder_stays_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def unreachable(name, revision, **_):
        assert (name, revision) in {("owner/name", None), ("owner/name", "v1.0")}
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for path in ("owner/name", "owner/name@v1.0"):
        with pytest.raises(InputError, match=f"--config.model.path={path}: no such folder here.*cannot be reached"):
            hf.local(path)
    for path in (str(tmp_path), "a/b/c", "nowhere", "../there"):  # folders, there or not: the loader says which is missing
        assert hf.local(path) == path


def test_a_hub_id_is_fetched_without_code_or_pickles(monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or "/cache/it")
    assert hf.local("owner/name") == "/cache/it"
    assert not any(
        fnmatch(file, p) for file in ("model.py", "pytorch_model.bin", "x.pt", "x.pkl") for p in asked["allow_patterns"]
    )
    assert all(
        any(fnmatch(f, p) for p in asked["allow_patterns"]) for f in ("config.json", "model.safetensors", "tokenizer.model")
    )


def test_a_device_of_padding_only_has_zeros(tmp_path, mesh8):
    params = hf.load(write(tmp_path), mesh8, vocab_multiple=256)  # 98 rows over two devices of 128
    table = np.asarray(params["embed"]["embedding"])
    assert table.shape[0] == 256 and not table[98:].any()
    np.testing.assert_array_equal(table[:98], tiny.params()["embed"]["embedding"])


@pytest.mark.parametrize("cut", [4, 100, 20_000])
def test_a_truncated_file_is_named(tmp_path, mesh, cut):
    path = write(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:cut])
    with pytest.raises(InputError, match="model.safetensors: not a whole safetensors file .*fetch it again"):
        hf.load(path, mesh)


@pytest.mark.parametrize(
    "index, message",
    [
        ({}, "wanted a weight_map"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "wanted a weight_map of tensors to files beside it"),
        (
            {"weight_map": {"model.norm.weight": "gone.safetensors"}},
            "missing from its safetensors|gone.safetensors: not a whole",
        ),
    ],
)
def test_a_broken_index_is_named(tmp_path, mesh, index, message):
    path = write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        hf.load(path, mesh)


def test_no_device_reads_more_than_its_share_of_a_tensor(tmp_path, mesh8, monkeypatch):
    """Heads, widths and the vocabulary are cut while reading: no block is larger than a quarter, as (fsdp, model) is (2, 2)."""
    path, read, shares = write(tmp_path, tiny.UNTIED), hf.Folder.read, {}

    def watched(self, name, index):
        block = read(self, name, index)
        shares.setdefault(name, set()).add(block.size / np.prod(self.shape(name)))
        return block

    monkeypatch.setattr(hf.Folder, "read", watched)
    assert tiny.same_bits(hf.load(path, mesh8), tiny.params(tiny.UNTIED))
    assert {s for name, found in shares.items() for s in found if "norm" not in name} == {1 / 4}
    assert len(shares) == 2 * 9 + 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_a_checkpoint_is_loaded_with_little_beside_its_parameters(tmp_path):
    """Eight simulated devices, whose memory is the host's: the parameters are 1.0 of it. 1.19 was measured, 1.07 of 1.5 GB."""
    measure_import.write(tmp_path, gigabytes=0.06)
    m = measure_import.measure(tmp_path)
    assert m["file"] > 50e6 and len(list(tmp_path.glob("*.safetensors"))) > 4
    assert 1.0 < (m["peak"] - m["start"]) / m["file"] < 1.4


def test_an_index_that_names_what_its_file_has_not_is_refused(tmp_path, mesh):
    path = write(tmp_path)
    names = {name: "model.safetensors" for name in load_file(tmp_path / "model.safetensors")}
    moved = next(iter(names))
    save_file({"other": np.zeros(1, np.float32)}, tmp_path / "second.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names | {moved: "second.safetensors"}}))
    with pytest.raises(InputError, match=f"second.safetensors: the index says that {moved} is here"):
        hf.load(path, mesh)
    index.write_text("[]")
    with pytest.raises(InputError, match="wanted a weight_map"):
        hf.load(path, mesh)
