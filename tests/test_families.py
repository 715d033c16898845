"""Every family of checkpoints: the logits of transformers from its folder, both ways, with padding, a cache and a mesh."""

import json
import shutil
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from cai_jax import prompts
from cai_jax.config import Sampling
from cai_jax.errors import InputError
from cai_jax.generate import Request, sample_chains
from cai_jax.models import LM, families, hf
from cai_jax.models.transformer import Transformer
from cai_jax.records import Journal
from cai_jax.sampling import record_key_data, record_keys
from cai_jax.sharding import put_batch
from cai_jax.slots import generate
from cai_jax.tokenizer import Tokenizer, mark

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


def random_model(name, seed=0, **more):
    """A model of transformers with random weights, norms and biases included."""
    kind, changes = CASES[name]
    torch.manual_seed(seed)
    fields = {
        k: v
        for k, v in (SIZES | more | changes).items()
        if v is not None or k in changes and k not in ("head_dim", "num_key_value_heads")
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), attn_implementation="eager").eval().float()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            weight = "weight" in parameter_name
            torch.nn.init.uniform_(parameter, 0.5, 1.5) if weight else torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    """-> (a folder that transformers wrote with random weights, logits of TOKENS, rows padded on the left)."""
    model = random_model(request.param)
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
    out = generate(net, params, prompts, lengths, keys, jnp.array([-1]), jnp.float32(0.0), max_new=8)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    for b, n in enumerate(lengths):
        said = np.asarray(out.tokens_BR)[b]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompts[b, :n], *said]], dtype=torch.long)).logits[0, n - 1 : -1].double()
        logp = torch.log_softmax(logits, -1).numpy()
        np.testing.assert_array_equal(logp.argmax(-1), said)
        np.testing.assert_allclose(np.asarray(out.logp_BR)[b], logp.max(-1), atol=TOL)


class Numbers(Tokenizer):
    """Its texts are the numbers of the tokens."""

    def prompt(self, text):
        return [int(x) for x in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


NO_TURNS = dict.fromkeys(prompts.TURNS, mark(0))  # templates after which no text ends a turn


def greedy(model, context, ends=None):
    """What transformers says next, 24 tokens or up to one of `ends`."""
    ids = torch.tensor([context], dtype=torch.long)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(context) :].tolist()


@pytest.mark.parametrize("name, seeds", [("llama", 4), ("gemma3", 3), ("pythia", 3)])
def test_lesson_08_greedy_texts_are_those_of_transformers_token_for_token(name, seeds, mesh1, tmp_path):
    """Ten random models. Eight records on three slots, each of two texts that go on from one another, all behind the same forty
    tokens; four tokens that some texts hold are ends."""
    rng = np.random.default_rng(5)
    prefix = rng.integers(0, 98, 40).tolist()
    own = [rng.integers(0, 98, rng.integers(1, 20)).tolist() for _ in range(8)]
    for seed in range(seeds):
        model, path, written = random_model(name, seed), tmp_path / str(seed), {}
        model.save_pretrained(path)
        net, params = ours(path, mesh1)
        held = Counter(i for x in own for i in {*greedy(model, [*prefix, *x])})
        ends = sorted(held, key=lambda i: (abs(held[i] - 2), i))[:4]  # in two of the eight, or about
        tok = Numbers(range(98), ends[0], 0, also_end=tuple(ends[1:]))

        def chain(i, tok=tok, written=written):
            context = [*prefix, *own[i]]
            for turn in range(2):
                said = yield Request(f"{i}/{turn}", tok.decode(context))
                written[i, turn] = context, tok.prompt(said["text"]), said["finished"]
                context = [*context, *written[i, turn][1], *own[i][:3], turn]

        sampling = Sampling(temperature=0.0, max_tokens=24, batch_size=3)
        journal, chains = Journal(path / "journal.jsonl"), {str(i): chain(i) for i in range(8)}
        with jax.set_mesh(mesh1):
            lm = LM(net.cfg, net.dtype, params, tok)
            sample_chains(lm, chains, sampling, 0, journal, mesh1, NO_TURNS, prefix=tok.decode(prefix))
        journal.remove()
        for context, said, finished in written.values():
            wanted = greedy(model, context, ends)
            assert said == wanted and finished == (wanted[-1] in ends)
        assert len(written) == 16 and 0 < sum(finished for *_, finished in written.values()) < 16


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


# bfloat16's unit roundoff is 2^-8: a number is rounded by no more than that part of itself. On its way to a logit it is rounded
# at most 35 times in a layer: 21 in attention (input norm; of q and k each the kernel, product, bias, norm, turn; of v the
# kernel, product, bias; weights; their sum; of o the kernel, product, bias; output norm; residual) and 14 in the MLP (norm; of
# gate and up each the kernel, product, bias; activation; gate times up; of down the kernel, product, bias; output norm;
# residual). And 5 times outside: embedding, its scale, final norm, unembedding, logit. The roundings are taken as independent,
# so that their squares add, each as one of the whole signal, of which a branch is a part, and as passed on in proportion. So a
# logit's standard error is at most 2^-8 sqrt(35 L + 5) rms(logits), and 4 of it hold the largest error of 7056 logits.
# The error of a score passes the softmax times the score: this is for scores of 1 or less, so for weights of 0.05. With the 0.3
# of the other tests scores are 5 and more, and the measure is only how transformers fares.
# Measured: the largest error is 0.13 (GPT-NeoX) to 0.70 (Gemma 3) of its bound, and in rms 0.65 to 1.04 of transformers' error.
ROUNDOFF, IN_A_LAYER, OUTSIDE, SIGMAS = 2.0**-8, 35, 5, 4.0


@pytest.mark.parametrize("weights", [0.3, 0.05])
@pytest.mark.parametrize("name", CASES)
def test_lesson_14_bfloat16_is_off_by_its_roundings_and_no_more_than_in_transformers(name, weights, mesh1, tmp_path):
    model = random_model(name, initializer_range=weights)
    model.save_pretrained(tmp_path)
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        exact = model(tokens).logits.numpy()
        theirs = model.to(torch.bfloat16)(tokens).logits.float().numpy() - exact
    cfg = hf.read_config(str(tmp_path))
    net, params = Transformer(cfg, jnp.bfloat16), hf.load(str(tmp_path), mesh1)
    ours = np.asarray(tiny.logits(net, params, TOKENS, np.full(3, 24, np.int32))) - exact
    assert rms(ours) < 1.25 * rms(theirs)
    if weights == 0.05:
        error = ROUNDOFF * (IN_A_LAYER * cfg.num_layers + OUTSIDE) ** 0.5 * rms(exact)
        assert rms(ours) < error and np.abs(ours).max() < SIGMAS * error
    assert rms(ours) > ROUNDOFF * rms(exact)  # it is bfloat16


def rms(x):
    return float(np.sqrt(np.square(x).mean()))


TEXT = {k: v for k, v in (SIZES | CASES["gemma3, scaled rope"][1]).items() if k not in ("rope_theta", "rope_local_base_freq")}
VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14}  # fmt: skip


def multimodal(path, as_stored=True, **options):
    """A tiny Gemma 3 with eyes, written by transformers. `as_stored`: with the names of the hub, else with those in memory.
    -> the logits of TOKENS below 97, which is its token of an image."""
    torch.manual_seed(0)
    options |= {"mm_tokens_per_image": 1, "image_token_index": 97, "initializer_range": 0.3}
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, **options)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name and "language_model" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path, save_original_format=as_stored)
    with torch.no_grad():
        return model(torch.tensor(TOKENS % 97, dtype=torch.long)).logits.numpy()


def change_text(path, change):
    file = path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"text_config": change(config["text_config"])}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("as_stored, first", [(True, "language_model.model.embed"), (False, "model.language_model.embed")])
def test_of_a_multimodal_checkpoint_the_language_model_is_read(as_stored, first, tied, mesh1, tmp_path):
    wanted = multimodal(tmp_path, as_stored, tie_word_embeddings=tied)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith(first) for name in stored) and any("vision_tower.encoder" in name for name in stored)
    assert families.read_config(str(tmp_path))[1] == "gemma3_text"
    net, params = ours(str(tmp_path), mesh1)
    assert ("unembed" in params) is not tied
    found = tiny.logits(net, params, TOKENS % 97, np.full(3, 24, np.int32))
    np.testing.assert_allclose(np.asarray(found), wanted, atol=TOL, rtol=1e-4)
    assert wanted.std() > 0.3


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "model.language_model.norm.weight",  # the other spelling of one that is there
        "model.vision_tower.post_layernorm.weight",  # the other spelling of one that is left
        "audio_tower.weight",
        "model.norm.weight",
        "vision_tower_2.weight",
    ],
)
def test_of_a_multimodal_checkpoint_only_its_eyes_are_left(name, mesh1, tmp_path):
    multimodal(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: np.zeros(48, np.float32)}, file)
    with pytest.raises(InputError, match=f"1 tensors are not part of the model.*'{name}'"):
        hf.load(str(tmp_path), mesh1)


def test_a_text_config_says_what_is_not_the_default_as_on_the_hub(tmp_path):
    """Of the fields of google/gemma-3-4b-it's text_config; transformers is asked what the rest is."""
    multimodal(tmp_path)
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    change_text(tmp_path, lambda _: text)
    whole = AutoConfig.from_pretrained(tmp_path).text_config
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(whole.to_dict()))
    cfg, kind = families.read_config(str(tmp_path))
    assert (cfg, kind) == families.read_config(str(tmp_path / "plain"))
    assert (cfg.vocab_size, cfg.num_heads, cfg.window, cfg.rope.factor, sum(cfg.sliding)) == (262_208, 8, 1024, 8.0, 29)
    assert AutoConfig.for_model(**families.text_fields(str(tmp_path))).rope_parameters == whole.rope_parameters


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"text_config": None}, "text_config is not one of a gemma3_text, which a gemma3 holds"),
        ({"text_config": {"model_type": "llama"}}, "text_config is not one of a gemma3_text"),
        ({"text_config": TEXT | {"use_bidirectional_attention": True}}, "use_bidirectional_attention=True"),
        ({"text_config": TEXT | {"memory": 3}}, "memory=3"),
        ({"text_config": TEXT | {"hidden_size": 7}}, "hidden size"),
    ],
)
def test_what_is_not_implemented_of_a_multimodal_checkpoint_is_named(change, message, tmp_path):
    config = json.loads(Gemma3Config(text_config=TEXT, vision_config=VISION).to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        hf.read_config(str(tmp_path))


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
        ("llama", {"num_hidden_layers": 0}, "num_layers is 0, wanted a whole number of at least 1"),
        ("llama", {"vocab_size": -1}, "vocab_size is -1"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "abc"}}, "rope_theta|a field has a value"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}}, "factor"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "a field has a value that it cannot have"),
    ],
)
def test_what_the_decoder_does_not_implement_is_named(kind, changes, message, tmp_path):
    config = {k: v for k, v in (written(kind) | changes).items() if v != "(gone)"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        hf.read_config(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", "null", '"x"', '{"model_type": []}', "{}"])
def test_a_config_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json: wanted a JSON object with a model_type"):
        hf.read_config(str(tmp_path))
