"""Every family of checkpoints: the logits of transformers from its folder, both ways, with padding, a cache and a mesh."""

import json
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cai_jax.generate import generate
from cai_jax.models import families, hf
from cai_jax.models.transformer import Transformer
from cai_jax.sampling import record_key_data, record_keys
from cai_jax.sharding import put_batch
from cai_jax.workdir import InputError

TOL = 2e-4
SIZES = {"vocab_size": 98, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}
ODD = {"hidden_size": 42, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
NEOX = {"num_key_value_heads": None, "head_dim": None}  # it has neither
CASES = {
    "llama": ("llama", {}),
    "llama 3.1, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, odd sizes, biases": ("llama", ODD | {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, odd sizes, window of one": ("mistral", ODD | {"sliding_window": 1}),
    "qwen2": ("qwen2", {"head_dim": None}),
    "qwen2, tied, one kv head": ("qwen2", {"head_dim": None, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"head_dim": None, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied, odd sizes": ("qwen3", ODD | {"tie_word_embeddings": True}),
    "qwen3, biases, scaled rope": ("qwen3", {"attention_bias": True, "rope_parameters": LINEAR}),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 24}),
    "gemma2, low caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "num_key_value_heads": 1}),
    "gemma2, odd sizes, no caps": ("gemma2", ODD | {"attn_logit_softcapping": None,
        "final_logit_softcapping": None, "sliding_window": 3}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "sliding_window_pattern": 2}),
    "gemma3, scaled rope": ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    "gemma3, odd sizes, final cap": ("gemma3_text", ODD | {"final_logit_softcapping": 3.0,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 5}),
    "olmo2": ("olmo2", {"head_dim": None}),
    "olmo2, tied, grouped": ("olmo2", {"head_dim": None, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "olmo2, biases, other base": ("olmo2", {"head_dim": None, "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "pythia": ("gpt_neox", NEOX),
    "neox, serial, half rotary": ("gpt_neox", NEOX | {"use_parallel_residual": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "neox, odd sizes, no bias, tied": ("gpt_neox", NEOX | {"hidden_size": 60, "intermediate_size": 100,
        "num_attention_heads": 5, "attention_bias": False, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 98, (3, 24), np.int32)
LENGTHS = np.array([24, 17, 3], np.int32)
INSIDE = np.arange(24)[None] < LENGTHS[:, None]


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    """-> (a folder that transformers wrote with random weights, logits of TOKENS, rows padded on the left)."""
    kind, changes = CASES[request.param]
    torch.manual_seed(0)
    fields = {
        k: v
        for k, v in (SIZES | changes).items()
        if v is not None or k in changes and k not in ("head_dim", "num_key_value_heads")
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), attn_implementation="eager").eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if "weight" in name else torch.nn.init.normal_(parameter, 0.0, 0.3)
    path = tmp_path_factory.mktemp("family")
    model.save_pretrained(path)
    left = np.zeros_like(TOKENS)  # the other side's padding: positions and mask say where the text is
    for row, tokens, n in zip(left, TOKENS, LENGTHS, strict=True):
        row[24 - n :] = tokens[:n]
    mask = torch.tensor(INSIDE[:, ::-1].copy(), dtype=torch.long)
    with torch.no_grad():
        out = model(torch.tensor(left, dtype=torch.long), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0))
    logits = np.zeros((*TOKENS.shape, 98), np.float32)
    for row, found, n in zip(logits, out.logits.numpy(), LENGTHS, strict=True):
        row[:n] = found[24 - n :]
    assert logits[INSIDE].std() > 0.3
    return str(path), logits


def ours(path, mesh, multiple=1, **options):
    cfg = hf.padded(hf.read_config(path), multiple)
    return Transformer(cfg, jnp.float32, **options), hf.load(path, mesh, vocab_multiple=multiple)


def test_lesson_14_the_logits_are_those_of_transformers(folder, mesh1):
    path, wanted = folder
    net, params = ours(path, mesh1)
    np.testing.assert_allclose(
        np.asarray(tiny.logits(net, params, TOKENS, LENGTHS))[INSIDE], wanted[INSIDE], atol=TOL, rtol=1e-4
    )


def test_lesson_08_decoding_with_a_cache_gives_the_logits_of_transformers(folder, mesh1):
    """What the engine samples greedily has the log-prob that transformers' logits of the same text give it."""
    path, _ = folder
    net, params = ours(path, mesh1)
    prompts, lengths = TOKENS[:, :12], np.array([12, 7, 3], np.int32)
    keys = record_keys(jax.random.key(0), np.stack([record_key_data("test", n) for n in "abc"]))
    out = generate(net, params, prompts, lengths, keys, jnp.array([-1]), jnp.float32(1.0), max_new=8, greedy=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for b, n in enumerate(lengths):
        said = np.asarray(out.tokens_BR)[b]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompts[b, :n], *said]], dtype=torch.long)).logits[0, n - 1 : -1].double()
        logp = torch.log_softmax(logits, -1).numpy()
        np.testing.assert_array_equal(logp.argmax(-1), said)
        np.testing.assert_allclose(np.asarray(out.logp_BR)[b], logp.max(-1), atol=TOL)


def test_a_mesh_and_a_padded_vocabulary_change_nothing(folder, mesh1, mesh8):
    path, _ = folder
    net, params = ours(path, mesh1)
    wanted = np.asarray(tiny.logits(net, params, TOKENS, LENGTHS))
    cfg = net.cfg
    if cfg.num_kv_heads % 2 or cfg.num_heads % 2:
        return  # these sizes fit no mesh of eight, which make_mesh and the rules say
    with jax.set_mesh(mesh8):
        wide, sharded = ours(path, mesh8, multiple=64)
        rows = put_batch({"tokens": np.pad(TOKENS, ((0, 5), (0, 0))), "lengths": np.pad(LENGTHS, (0, 5))}, mesh8)
        found = np.asarray(tiny.logits(wide, sharded, rows["tokens"], rows["lengths"]))[:3]
    assert found.shape[-1] == 128 and (found[INSIDE][:, 98:] < -1e29).all()
    np.testing.assert_allclose(found[INSIDE][:, :98], wanted[INSIDE], atol=2e-5 * max(1, np.abs(wanted).max()))


def test_export_and_import_are_bit_equal_and_transformers_reads_the_folder(folder, mesh1, tmp_path):
    path, wanted = folder
    cfg, kind = families.read_config(path)
    params = hf.load(path, mesh1)
    hf.save(str(tmp_path), params, cfg, jnp.float32, kind, shard_bytes=20_000)
    shutil.copy(f"{path}/config.json", tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert tiny.same_bits(hf.load(str(tmp_path), mesh1), params)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found = model(torch.tensor(TOKENS[:1], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found[0], wanted[0], atol=TOL, rtol=1e-4)


@cache
def written(kind):
    changes = next(c for k, c in CASES.values() if k == kind)
    fields = {k: v for k, v in (SIZES | changes).items() if v is not None}
    return json.loads(AutoConfig.for_model(kind, **fields).to_json_string())


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba' is not implemented; implemented: llama, mistral"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": "(gone)", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type='yarn'"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("qwen3", {"layer_types": ["full_attention", "full_attention", "linear_attention"]}, "linear_attention"),
        ("gpt_neox", {"hidden_size": 7}, "hidden size"),
        ("qwen2", {"hidden_size": "(gone)"}, "hidden_size is missing"),
    ],
)
def test_what_the_decoder_does_not_implement_is_named(kind, changes, message, tmp_path):
    config = {k: v for k, v in (written(kind) | changes).items() if v != "(gone)"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        hf.read_config(str(tmp_path))
