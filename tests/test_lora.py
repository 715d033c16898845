"""Adapters: beside the base and merged into it they are one function, and as a folder they are the one that peft computes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from test_families import CASES, SIZES
from test_sharding import ADAPTERS

from cai_jax.config import Lora
from cai_jax.errors import InputError
from cai_jax.files import read_json
from cai_jax.models import hf, lora, peft
from cai_jax.models.transformer import Transformer, cast_matrices, init_params
from cai_jax.sampling import record_key_data, record_keys
from cai_jax.score import reward_scores
from cai_jax.sharding import path_name, put, put_batch, shard_init
from cai_jax.slots import generate

LORA = Lora(rank=3, alpha=4.0)
CFG = lora.attach(tiny.CFG, LORA)
MATRICES = {*(f"attention/{name}" for name in "qkvo"), *(f"mlp/{name}" for name in ("gate", "up", "down"))}
TOKENS, LENGTHS = tiny.rows([8, 3, 5, 8, 1, 2, 7, 6], 8)
INSIDE = np.arange(8)[None] < LENGTHS[:, None]


def params(cfg=CFG):
    """Random everywhere, B included."""
    return jax.tree.map(jnp.asarray, tiny.params(cfg))


def names(tree) -> set[str]:
    return {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def adapted(cfg) -> set[str]:
    """Matrices of a layer with an adapter."""
    found = names(lora.split(jax.eval_shape(lambda: init_params(Transformer(cfg), jax.random.key(0))))[0])
    assert all(name.startswith("layers/") for name in found)
    matrices = {name.removeprefix("layers/").rpartition("/")[0] for name in found}
    assert found == {f"layers/{matrix}/{leaf}" for matrix in matrices for leaf in lora.LEAVES}
    return matrices


def with_b(params, b):
    """The parameters with b(B) for every B."""
    return jax.tree_util.tree_map_with_path(lambda path, x: b(x) if path_name(path).endswith("lora_b") else x, params)


# --- Trees ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "targets, wanted",
    [
        (Lora.targets, MATRICES),
        ("attention", {"attention/q", "attention/k", "attention/v", "attention/o"}),
        ("attention/[qv]", {"attention/q", "attention/v"}),
        ("attention/o|mlp/down", {"attention/o", "mlp/down"}),
        ("mlp/down", {"mlp/down"}),
        ("^mlp/up", {"mlp/up"}),  # of the name are the last two parts
        ("^up", set()),
        (".", MATRICES),  # never the embedding's, the unembedding's
    ],
)
def test_exactly_the_matrices_that_the_expression_finds_get_an_adapter(targets, wanted):
    cfg = replace(tiny.UNTIED, lora=replace(LORA, targets=targets))
    assert adapted(cfg) == wanted


def test_without_gates_and_rank_there_are_none():
    assert adapted(replace(CFG, gated=False)) == MATRICES - {"mlp/gate"}
    assert adapted(replace(CFG, lora=Lora(rank=0))) == adapted(tiny.CFG) == set()
    assert lora.init(replace(CFG, lora=Lora(rank=0)), jax.random.key(0)) == {}


def test_targets_that_find_nothing_are_refused_with_what_there_is():
    cfg = replace(CFG, gated=False, lora=replace(LORA, targets="mlp/gate"))
    there = "attention/k, attention/o, attention/q, attention/v, mlp/down, mlp/up"
    with pytest.raises(InputError, match=f"--config.lora.targets=mlp/gate: it finds none of {there}$"):
        lora.init(cfg, jax.random.key(0))


def test_a_model_with_adapters_has_the_models_parameters_and_theirs():
    with_them, without = (jax.eval_shape(partial(init_params, tiny.net(cfg)), jax.random.key(0)) for cfg in (CFG, tiny.CFG))
    adapter, frozen = lora.split(with_them)
    assert frozen == without
    assert jax.eval_shape(partial(lora.init, CFG), jax.random.key(0)) == adapter
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(adapter)}
    assert shapes["layers/attention/k/lora_a"] == (2, 32, 3) and shapes["layers/attention/k/lora_b"] == (2, 3, 2, 8)
    assert shapes["layers/attention/o/lora_a"] == (2, 4, 8, 3) and shapes["layers/attention/o/lora_b"] == (2, 3, 32)
    assert shapes["layers/mlp/down/lora_a"] == (2, 64, 3) and shapes["layers/mlp/down/lora_b"] == (2, 3, 32)
    assert lora.split(without) == ({}, without)


def test_what_is_split_can_be_joined():
    whole = {"trunk": params(), "head": {"kernel": jnp.ones((32, 1)), "bias": jnp.zeros(1)}}
    adapter, rest = lora.split(whole)
    assert names(adapter) | names(rest) == names(whole) and not names(adapter) & names(rest)
    assert set(adapter) == {"trunk"} and set(adapter["trunk"]) == {"layers"}  # no empty branch
    assert set(adapter["trunk"]["layers"]) == {"attention", "mlp"}
    assert tiny.same_bits(lora.join(adapter, rest), whole) and tiny.same_bits(lora.join(rest, adapter), whole)
    assert tiny.same_bits(lora.join({}, whole), whole) and tiny.same_bits(lora.join(whole, {}), whole)
    assert lora.join({}, {}) == {}


@pytest.mark.parametrize("other", [{"a": {"b": 1}}, {"a": 1}, {"a": {"b": {"c": 1}}}])
def test_what_overlaps_cannot_be_joined(other):
    with pytest.raises(ValueError, match="both trees have '[ab]'"):
        lora.join({"a": {"b": 1}}, other)


def test_adapters_stay_float32_beside_frozen_matrices():
    cast = cast_matrices(tiny.params(CFG), jnp.bfloat16)
    adapter, frozen = lora.split(cast)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    assert frozen["layers"]["attention"]["q"]["kernel"].dtype == jnp.bfloat16


# --- Where they start -------------------------------------------------------------------------------------------------
def test_adapters_start_at_zero_and_alike_on_every_mesh_as_the_rules_say(mesh1, mesh8):
    one, many = (shard_init(partial(lora.init, CFG), mesh, jax.random.key(1)) for mesh in (mesh1, mesh8))
    found = {path_name(path).removeprefix("layers/"): x for path, x in jax.tree_util.tree_leaves_with_path(many)}
    assert {name: x.sharding for name, x in found.items()} == {n: NamedSharding(mesh8, spec) for n, spec in ADAPTERS.items()}
    assert tiny.same_bits(many, one)
    for name, x in found.items():
        assert x.dtype == jnp.float32 and (name.endswith("lora_a") or not np.asarray(x).any())


def test_a_starts_with_the_deviation_of_its_inputs_and_by_its_path_alone():
    wide = replace(CFG, width=256, mlp_width=512, lora=replace(LORA, rank=16))
    adapter = lora.init(wide, jax.random.key(2))["layers"]
    for module, fan_in in (("attention/q", 256), ("attention/o", 32), ("mlp/up", 256), ("mlp/down", 512)):
        outer, inner = module.split("/")
        assert np.std(adapter[outer][inner]["lora_a"]) == pytest.approx(fan_in**-0.5, rel=0.05)
    few = replace(wide, lora=replace(wide.lora, targets="mlp/(up|gate)"))
    alone = lora.init(few, jax.random.key(2))["layers"]
    assert tiny.same_bits(alone["mlp"]["up"], adapter["mlp"]["up"])
    a, b = (np.asarray(alone["mlp"][name]["lora_a"]) for name in ("up", "gate"))
    assert a.shape == b.shape and np.abs(a - b).max() > 0.1
    assert not np.array_equal(a, lora.init(few, jax.random.key(3))["layers"]["mlp"]["up"]["lora_a"])


def test_no_parameter_of_the_base_is_drawn_for_them():
    """Asked of the program: what it computes is as large as the largest adapter at most."""
    cfg = replace(CFG, vocab_size=5000)
    jaxpr = jax.make_jaxpr(partial(lora.init, cfg))(jax.random.key(0)).jaxpr
    largest = max(x.size for x in jax.tree.leaves(jax.eval_shape(partial(lora.init, cfg), jax.random.key(0))))
    assert max(v.aval.size for e in tiny.equations(jaxpr) for v in e.outvars) <= largest


# --- One function -----------------------------------------------------------------------------------------------------
def logits(cfg, params, **options):
    return np.asarray(tiny.logits(tiny.net(cfg, **options), params, TOKENS, LENGTHS))


@pytest.mark.parametrize("unrolled", [False, True])
def test_with_b_at_zero_or_without_the_configuration_the_base_is_the_base_bit_for_bit(unrolled):
    random = params()
    base = logits(tiny.CFG, lora.split(random)[1], unrolled=unrolled)
    assert tiny.same_bits(logits(CFG, with_b(random, jnp.zeros_like), unrolled=unrolled), base)
    assert tiny.same_bits(logits(tiny.CFG, random, unrolled=unrolled), base)
    assert np.abs(logits(CFG, random, unrolled=unrolled) - base).max() > 0.1


FAMILIES = {
    "llama": CFG,
    "one kv head": replace(CFG, num_kv_heads=1),
    "some matrices": replace(CFG, lora=replace(LORA, targets="attention/[ko]|mlp/down")),
    "biases, no gate, parallel": replace(
        CFG, norm="layer", qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, parallel=True
    ),
}


WAYS = [*((name, {}) for name in FAMILIES), ("llama", {"unrolled": True}), ("llama", {"remat": "dots"})]


@pytest.mark.parametrize("name, options", WAYS, ids=str)
def test_adapters_are_the_merged_model(name, options):
    cfg = FAMILIES[name]
    tiny.assert_close(logits(cfg, params(cfg), **options), logits(replace(cfg, lora=None), lora.merge(params(cfg), cfg.lora)))


def test_a_merged_model_has_the_parameters_of_the_base_in_their_dtypes():
    merged = lora.merge(cast_matrices(params(), jnp.bfloat16), LORA)
    base = lora.split(cast_matrices(params(), jnp.bfloat16))[1]
    assert jax.tree.map(lambda x: (x.dtype, x.shape), merged) == jax.tree.map(lambda x: (x.dtype, x.shape), base)
    q = params()["layers"]["attention"]["q"]
    a, b, kernel = (np.asarray(q[k], np.float64) for k in ("lora_a", "lora_b", "kernel"))
    whole = kernel.astype(jnp.bfloat16).astype(np.float64) + 4 / 3 * np.einsum("ldr,lrnh->ldnh", a, b)
    found = np.asarray(merged["layers"]["attention"]["q"]["kernel"], np.float64)
    assert np.abs(found - whole).max() <= 2**-8 * np.abs(whole).max()  # rounded once, at the end
    one = jax.tree.map(lambda x: x[1], params()["layers"])
    tiny.assert_close(lora.merge(one, LORA), jax.tree.map(lambda x: x[1], lora.merge(params(), LORA)["layers"]))
    assert tiny.same_bits(lora.merge(tiny.params(), LORA), tiny.params())


def test_merging_multiplies_in_float32_on_every_machine():
    """Asked of the program: where float32 products are rounded by default, these are not."""
    jaxpr = jax.make_jaxpr(partial(lora.merge, lora=LORA))(cast_matrices(params(), jnp.bfloat16)).jaxpr
    found = [e for e in tiny.equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(found) == 7 and {v.aval.dtype for e in found for v in e.invars} == {jnp.dtype("float32")}
    assert {e.params["precision"] for e in found} == {(jax.lax.Precision.HIGHEST,) * 2}


def test_what_an_adapter_passes_on_is_laid_out_as_the_batch(mesh8):
    with jax.set_mesh(mesh8):
        jaxpr = jax.make_jaxpr(tiny.logits, static_argnums=0)(tiny.net(CFG), tiny.params(CFG), TOKENS, LENGTHS).jaxpr
    found = [
        e for e in tiny.equations(jaxpr) if e.primitive.name == "sharding_constraint" and e.outvars[0].aval.shape[2:] == (3,)
    ]
    assert [e.params["sharding"].spec for e in found] == [P(("data", "fsdp"), None, None)] * 7


def test_adapters_on_eight_devices_are_the_merged_model_on_one(mesh8):
    with jax.set_mesh(mesh8):
        batch = put_batch({"tokens": TOKENS, "lengths": LENGTHS}, mesh8)
        found = np.asarray(tiny.logits(tiny.net(CFG), put(tiny.params(CFG), mesh8), batch["tokens"], batch["lengths"]))
        merged = jax.jit(partial(lora.merge, lora=LORA))(put(tiny.params(CFG), mesh8))
    wanted = logits(tiny.CFG, lora.merge(params(), LORA))
    tiny.assert_close(found[INSIDE], wanted[INSIDE])
    tiny.assert_close(merged, lora.merge(params(), LORA))


def test_decoding_with_adapters_is_decoding_the_merged_model():
    keys = record_keys(jax.random.key(0), jnp.asarray(np.stack([record_key_data("sft", str(i)) for i in range(8)])))
    stop, one = jnp.array([tiny.END]), jnp.float32(1.0)

    def sample(cfg, params):
        return generate(tiny.net(cfg), params, TOKENS, LENGTHS, keys, stop, one, max_new=6)

    found, wanted = sample(CFG, params()), sample(tiny.CFG, lora.merge(params(), LORA))
    np.testing.assert_array_equal(found.tokens_BR, wanted.tokens_BR)
    tiny.assert_close(found.logp_BR, wanted.logp_BR)
    assert (np.asarray(sample(tiny.CFG, lora.split(params())[1]).tokens_BR) != found.tokens_BR).any()


def test_the_gradient_of_an_adapter_is_that_through_the_merged_model():
    adapter, frozen = lora.split(params())
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 98)), jnp.float32)

    def beside(adapter, **options):
        return jnp.sum(tiny.logits(tiny.net(CFG, **options), lora.join(frozen, adapter), TOKENS, LENGTHS) * weights)

    def merged(adapter):
        whole = lora.merge(lora.join(frozen, adapter), LORA)
        return jnp.sum(tiny.logits(tiny.net(), whole, TOKENS, LENGTHS) * weights)

    wanted = jax.jit(jax.grad(merged))(adapter)
    for options in ({}, {"unrolled": True, "remat": "dots"}):
        tiny.assert_close(jax.jit(jax.grad(partial(beside, **options)))(adapter), wanted, 3e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(wanted))


# --- As a folder ------------------------------------------------------------------------------------------------------
PEFT = {  # case of test_families -> targets
    "llama, odd sizes, biases": Lora.targets,
    "mistral, window": "mlp/down",
    "qwen2, tied, one kv head": "attention/[qv]",
    "qwen3": "attention/o|mlp/up",
    "gemma2": "mlp",
    "gemma3": Lora.targets,
    "olmo2, tied, grouped": Lora.targets,
    "pythia": Lora.targets,
    "neox, serial, half rotary": "attention/[qv]|mlp/up",
    "neox, odd sizes, no bias, tied": "attention/k",
}
TEXTS = (np.arange(30, 43, dtype=np.int32), np.array([5, 97, 6], np.int32))
PADDED = np.zeros((2, 13), np.int32)
for _row, _text in zip(PADDED, TEXTS, strict=True):
    _row[: len(_text)] = _text
SIZES_OF = np.array([len(text) for text in TEXTS], np.int32)
TOL = 2e-4
# peft asks for the name that transformers has replaced.
old_name = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning:transformers.modeling_utils"
)


@pytest.fixture(scope="module", params=PEFT)
def model(request, tmp_path_factory):
    """-> (cfg with adapters, parameters, model_type, a folder with those of the base)."""
    from transformers import AutoConfig

    kind, changes = CASES[request.param]
    fields = {k: v for k, v in (SIZES | changes).items() if v is not None}
    path = tmp_path_factory.mktemp("base")
    AutoConfig.for_model(kind, **fields, pad_token_id=0).save_pretrained(path)
    cfg = lora.attach(hf.read_config(str(path)), replace(LORA, targets=PEFT[request.param]))
    hf.save(str(path), lora.split(tiny.params(cfg))[1], cfg, jnp.float32, kind)
    return cfg, tiny.params(cfg), kind, str(path)


def loaded(kind, base, adapter, **options):
    import torch
    from peft import PeftModel

    base = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)
    return PeftModel.from_pretrained(base, adapter).eval()


def their_logits(model):
    import torch

    with torch.no_grad():
        return [model(torch.tensor(text[None], dtype=torch.long)).logits[0].numpy() for text in TEXTS]


def assert_near(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=TOL, rtol=1e-4)


@old_name
def test_the_logits_are_those_of_peft_and_so_are_the_merged_matrices(model, tmp_path):
    from transformers import AutoModelForCausalLM

    cfg, params, kind, base = model
    peft.save(str(tmp_path), lora.split(params)[0], cfg, kind, base)
    there = loaded(AutoModelForCausalLM, base, str(tmp_path))
    ours = [x[:n] for x, n in zip(np.asarray(tiny.logits(Transformer(cfg), params, PADDED, SIZES_OF)), SIZES_OF, strict=True)]
    assert_near(their_logits(there), ours)
    with there.disable_adapter():
        assert np.abs(their_logits(there)[0] - ours[0]).max() > 0.05
    merged = there.merge_and_unload()
    assert_near(their_logits(merged), ours)
    hf.save(str(tmp_path / "merged"), lora.merge(params, cfg.lora), cfg, jnp.float32, kind)
    state = merged.state_dict()
    for name, x in load_file(tmp_path / "merged" / "model.safetensors").items():
        if ".layers." in name:
            np.testing.assert_allclose(state[name].numpy(), x, atol=1e-5, err_msg=name)


@old_name
def test_the_reward_models_scores_are_those_of_peft(model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    cfg, params, kind, base = model
    kernel = np.random.default_rng(1).normal(size=(cfg.width, 1)).astype(np.float32)
    head = {"kernel": kernel, "bias": np.zeros(1, np.float32)}
    peft.save(str(tmp_path), lora.split(params)[0], cfg, kind, base, head)
    assert read_json(tmp_path / "adapter_config.json")["modules_to_save"] == ["score"]
    there = loaded(AutoModelForSequenceClassification, base, str(tmp_path), num_labels=1)
    scores = jax.jit(reward_scores, static_argnums=0)(Transformer(cfg), {"trunk": params, "head": head}, PADDED, SIZES_OF)
    assert_near([x[0] for x in their_logits(there)], np.asarray(scores))


@pytest.mark.parametrize(
    "kind, targets, modules, fused",
    [
        ("llama", "attention/q|mlp/down", ["down_proj", "q_proj"], {}),
        ("gpt_neox", "attention/q|mlp/down", ["dense_4h_to_h", "query_key_value"], {}),
        ("gpt_neox", "attention/[qvo]", ["dense", "query_key_value"], {"query_key_value": 2}),
    ],
)
def test_the_folder_names_what_it_targets_and_the_model_it_belongs_to(kind, targets, modules, fused, tmp_path):
    cfg = replace(CFG, num_kv_heads=4, lora=replace(LORA, targets=targets))
    peft.save(str(tmp_path), lora.split(tiny.params(cfg))[0], cfg, kind, "owner/name")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    found = read_json(tmp_path / "adapter_config.json")
    assert found["target_modules"] == modules and found["base_model_name_or_path"] == "owner/name"
    assert (found["r"], found["lora_alpha"], found["inference_mode"]) == (3, 4.0, True)
    assert found["rank_pattern"] == {name: 3 * n for name, n in fused.items()}
    assert found["alpha_pattern"] == {name: 4.0 * n for name, n in fused.items()}
    assert (found["task_type"], found["modules_to_save"]) == ("CAUSAL_LM", None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}
    assert {name.split(".")[-3] for name in tensors} == set(modules) and len(tensors) == 2 * 2 * 2


def test_a_fused_adapter_is_each_parts_own_and_zero_elsewhere(tmp_path):
    cfg = replace(CFG, num_kv_heads=4, lora=replace(LORA, targets="attention/[kv]"))
    adapter = lora.split(tiny.params(cfg))[0]
    peft.save(str(tmp_path), adapter, cfg, "gpt_neox", "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    module = "base_model.model.gpt_neox.layers.1.attention.query_key_value"
    a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    assert a.shape == (6, 32) and b.shape == (96, 6)
    b = b.reshape(4, 3, 8, 6)  # heads, three, size, rank
    k, v = (jax.tree.map(lambda x: x[1], adapter["layers"]["attention"][name]) for name in "kv")
    np.testing.assert_array_equal(a, np.concatenate([k["lora_a"], v["lora_a"]], axis=1).T)
    np.testing.assert_array_equal(b[:, 1, :, :3], k["lora_b"].transpose(1, 2, 0))
    np.testing.assert_array_equal(b[:, 2, :, 3:], v["lora_b"].transpose(1, 2, 0))
    assert not b[:, 0].any() and not b[:, 1, :, 3:].any() and not b[:, 2, :, :3].any()


def test_a_head_with_a_bias_is_refused_before_anything_is_written(tmp_path):
    head = {"kernel": np.ones((32, 1), np.float32), "bias": np.full(1, 0.25, np.float32)}
    with pytest.raises(InputError, match=r"the head's bias is 0.25, wanted 0"):
        peft.save(str(tmp_path / "out"), lora.split(tiny.params(CFG))[0], CFG, "llama", "base", head)
    assert not (tmp_path / "out").exists()
