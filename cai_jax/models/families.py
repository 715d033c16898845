"""What each family of checkpoints sets in the decoder, and what it calls its tensors.

transformers fills in a config.json (older spellings, defaults of the family); this file says what the values mean. A field
that it does not know, or a value that the decoder does not implement, is refused by name.
"""

import dataclasses
from pathlib import Path

from cai_jax.errors import InputError
from cai_jax.files import read_json
from cai_jax.models.attention import Rope
from cai_jax.models.transformer import TransformerConfig

GEMMA = {"norm": "rms_plus_one", "norm_outputs": True}
# model_type -> what the family always sets beside what its config.json says.
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"qk_norm": "head"},
    "olmo2": {"norm_inputs": False, "norm_outputs": True, "qk_norm": "all"},
    "gpt_neox": {"norm": "layer", "gated": False, "mlp_bias": True},
}
FIELDS = {  # of config.json -> of TransformerConfig, taken as they are
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
    "mlp_bias": "mlp_bias",
    "use_parallel_residual": "parallel",
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
READ = {  # the others that from_fields or transformers reads
    *("hidden_act", "hidden_activation", "head_dim", "num_key_value_heads", "attention_bias", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping", "layer_types", "sliding_window", "use_sliding_window"),
    *("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "rope_parameters", "rope_scaling"),
    *("rope_theta", "rope_local_base_freq", "rotary_pct", "rotary_emb_base", "model_type"),
}
ONLY = {  # fields with one implemented meaning
    "pretraining_tp": (1, None),
    "use_bidirectional_attention": (False, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HARMLESS = {  # nothing that a forward pass computes
    *("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "sep_token_id"),
    *(*IDS, "_name_or_path", "attention_dropout", "hidden_dropout"),
    *("classifier_dropout", "cache_implementation", "_attn_implementation", "_attn_implementation_autoset", "id2label"),
    *("label2id", "num_labels", "problem_type", "output_attentions", "output_hidden_states", "return_dict", "tokenizer_class"),
    "chunk_size_feed_forward",
}
# A checkpoint of several parts -> of its language model the family, the class, and what transformers calls it in the whole.
TEXT_OF = {"gemma3": ("gemma3_text", "Gemma3ForCausalLM", "language_model")}
SHARED = (*IDS, "tie_word_embeddings", "dtype", "torch_dtype")  # fields of the whole that hold for its language model
OTHER_PARTS = {"text_config", "vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index"}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
ROPE = {  # rope_type -> what it needs, all of it implemented
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Our path -> (their name, kind). "{i}" is the layer; a kind is a way to lay their array out as ours (hf.KINDS).
ATTENTION = {
    f"layers/attention/{name}/{ours}": (f"model.layers.{{i}}.self_attn.{name}_proj.{theirs}", kind)
    for name in "qkvo"
    for ours, theirs, kind in (
        ("kernel", "weight", "heads_in" if name == "o" else "heads_out"),
        ("bias", "bias", "vector" if name == "o" else "heads"),
    )
}
MLP = {
    f"layers/mlp/{name}/{ours}": (f"model.layers.{{i}}.mlp.{name}_proj.{theirs}", kind)
    for name in ("gate", "up", "down")
    for ours, theirs, kind in (("kernel", "weight", "matrix"), ("bias", "bias", "vector"))
}
LLAMA = {
    "embed/embedding": ("model.embed_tokens.weight", "vocabulary"),
    "unembed/kernel": ("lm_head.weight", "vocabulary_out"),
    "final_norm/scale": ("model.norm.weight", "vector"),
    "layers/attention_norm/scale": ("model.layers.{i}.input_layernorm.weight", "vector"),
    "layers/mlp_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "vector"),
    "layers/attention/q_norm/scale": ("model.layers.{i}.self_attn.q_norm.weight", "vector"),
    "layers/attention/k_norm/scale": ("model.layers.{i}.self_attn.k_norm.weight", "vector"),
    **ATTENTION,
    **MLP,
}
OUTPUT_NORMS = LLAMA | {
    "layers/attention_out_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "vector"),
    "layers/mlp_norm/scale": ("model.layers.{i}.pre_feedforward_layernorm.weight", "vector"),
    "layers/mlp_out_norm/scale": ("model.layers.{i}.post_feedforward_layernorm.weight", "vector"),
}
NEOX = {
    "embed/embedding": ("gpt_neox.embed_in.weight", "vocabulary"),
    "unembed/kernel": ("embed_out.weight", "vocabulary_out"),
}
for _ours, _theirs in (
    ("final_norm", "final_layer_norm"),
    ("layers/attention_norm", "layers.{i}.input_layernorm"),
    ("layers/mlp_norm", "layers.{i}.post_attention_layernorm"),
):
    NEOX[f"{_ours}/scale"] = (f"gpt_neox.{_theirs}.weight", "vector")
    NEOX[f"{_ours}/bias"] = (f"gpt_neox.{_theirs}.bias", "vector")
for _name in "qkv":  # one tensor holds all three, a head at a time
    NEOX[f"layers/attention/{_name}/kernel"] = ("gpt_neox.layers.{i}.attention.query_key_value.weight", f"fused_{_name}")
    NEOX[f"layers/attention/{_name}/bias"] = ("gpt_neox.layers.{i}.attention.query_key_value.bias", f"fused_{_name}_bias")
for _ours, _theirs, _kind in (
    ("attention/o", "attention.dense", "heads_in"),
    ("mlp/up", "mlp.dense_h_to_4h", "matrix"),
    ("mlp/down", "mlp.dense_4h_to_h", "matrix"),
):
    NEOX[f"layers/{_ours}/kernel"] = (f"gpt_neox.layers.{{i}}.{_theirs}.weight", _kind)
    NEOX[f"layers/{_ours}/bias"] = (f"gpt_neox.layers.{{i}}.{_theirs}.bias", "vector")
TENSORS = {"gemma2": OUTPUT_NORMS, "gemma3_text": OUTPUT_NORMS, "olmo2": OUTPUT_NORMS, "gpt_neox": NEOX}
# Where the language model is a part of the checkpoint: the first words of its names there, and what the other parts begin with.
SPELLINGS = {
    "gemma3_text": (
        (
            {"model": "language_model.model", "lm_head": "language_model.lm_head"},  # the hub's, and transformers writes it
            ("vision_tower.", "multi_modal_projector."),
        ),
        (
            {"model": "model.language_model", "lm_head": "lm_head"},  # as transformers has it in memory since 4.52
            ("model.vision_tower.", "model.multi_modal_projector."),
        ),
    )
}


def tensors(model_type: str) -> dict[str, tuple[str, str]]:
    """Our path -> (their name, kind)."""
    return TENSORS.get(model_type, LLAMA)


def tensors_in(model_type: str, found) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """-> `tensors` as the names `found` in a folder spell them, and those of the parts that are left on purpose."""
    names = tensors(model_type)
    for places, others in SPELLINGS.get(model_type, ()):
        spelled = {}
        for ours, (theirs, kind) in names.items():
            first, rest = theirs.split(".", 1)
            spelled[ours] = (f"{places[first]}.{rest}", kind)
        if spelled["embed/embedding"][0] in found:
            return spelled, {name for name in found if name.startswith(others)}
    return names, set()


def text_fields(path: str) -> dict:
    """The fields of a folder's config.json; of a checkpoint of several parts those that its language model alone would have."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InputError(f"no model at {path}: wanted a folder with config.json and safetensors (--config.model.path)")
    raw = read_json(file)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise InputError(f"{file}: wanted a JSON object with a model_type; fetch it again")
    if raw["model_type"] not in TEXT_OF:
        return raw
    _check_known(file, raw, HARMLESS | OTHER_PARTS | {"model_type", *SHARED, *ONLY})
    kind, architecture, _ = TEXT_OF[raw["model_type"]]
    text = raw.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", kind) != kind:
        raise InputError(f"{file}: text_config is not one of a {kind}, which a {raw['model_type']} holds; fetch it again")
    own = {"model_type": kind, "architectures": [architecture]}
    # Such files leave out what is the family's default. What the file says itself stays in its own, perhaps older, spelling.
    defaults = {k: v for k, v in _filled(file, text | own).items() if k in IDS or k not in HARMLESS}
    return defaults | text | {name: raw[name] for name in SHARED if name in raw} | own


def part_of(path: str) -> str:
    """What transformers calls the language model of a folder inside the whole; "" where it is the whole."""
    return TEXT_OF.get(read_json(Path(path) / "config.json").get("model_type"), ("", "", ""))[2]


def read_config(path: str) -> tuple[TransformerConfig, str]:
    """-> the config.json of a folder as the decoder's configuration, and its model_type (that of the part that is read)."""
    file, raw = Path(path) / "config.json", text_fields(path)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{file}: model_type={kind!r} is not implemented; implemented: {', '.join((*FAMILIES, *TEXT_OF))}")
    _check_known(file, raw, READ | HARMLESS | set(FIELDS) | set(ONLY))
    if missing := [name for name in NEEDED if name not in raw]:
        raise InputError(f"{file}: the field {missing[0]} is missing")
    filled = _filled(file, raw)
    try:
        cfg = from_fields(filled, file)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: a field has a value that it cannot have ({type(error).__name__}: {error})") from error
    _check_sizes(file, cfg)
    return cfg, kind


def _check_sizes(file: Path, cfg: TransformerConfig) -> None:
    ropes = [r for r in (cfg.rope, cfg.sliding_rope) if r]
    for name in ("vocab_size", "num_layers", "width", "mlp_width", "num_heads", "num_kv_heads", "head_dim", "max_length"):
        if not isinstance(size := getattr(cfg, name), int) or size < 1:
            raise InputError(f"{file}: {name} is {size!r}, wanted a whole number of at least 1")
    if cfg.num_heads % cfg.num_kv_heads:
        raise InputError(f"{file}: {cfg.num_heads} attention heads cannot share {cfg.num_kv_heads} key-value heads evenly")
    if any(r.theta <= 0 or r.factor <= 0 or not 0 < r.fraction <= 1 for r in ropes):
        raise InputError(f"{file}: the rotary embedding is {ropes}; wanted theta and factor above 0, a share of at most 1")


def _check_known(file: Path, raw: dict, names: set[str]) -> None:
    for name, value in raw.items():
        if name in ONLY and value not in ONLY[name]:
            raise InputError(f"{file}: {name}={value!r} is not implemented; implemented: {ONLY[name]}")
        if name not in names:
            raise InputError(
                f"{file}: {name}={value!r} is not implemented; if it changes nothing in the forward pass, remove it"
            )


def _filled(file: Path, raw: dict) -> dict:
    """config.json with older spellings and the family's defaults worked out by transformers."""
    from transformers import AutoConfig

    values = {k: v for k, v in raw.items() if k not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(raw["model_type"], **values).to_dict()
    except Exception as error:  # its validation raises many kinds
        raise InputError(f"{file}: {' '.join(str(error).split())}") from error


def from_fields(c: dict, file: Path) -> TransformerConfig:
    """A filled-in config.json -> TransformerConfig. Raises InputError for a value that is not implemented."""
    values = {ours: c[theirs] for theirs, ours in FIELDS.items() if c.get(theirs) is not None}
    act = c.get("hidden_activation") or c.get("hidden_act")
    if act not in ACTIVATIONS:
        raise InputError(f"{file}: hidden_act={act!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}")
    values["activation"] = ACTIVATIONS[act]
    values["num_kv_heads"] = c.get("num_key_value_heads") or c["num_attention_heads"]
    values["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    if "attention_bias" in c:
        values["qkv_bias"] = values["out_bias"] = bool(c["attention_bias"])
    if c["model_type"] in ("gemma2", "gemma3_text"):
        values["embed_scale"] = c["hidden_size"] ** 0.5
        values["query_scale"] = c["query_pre_attn_scalar"] ** -0.5
        values["logit_cap"] = c["final_logit_softcapping"] or 0.0
        values["attention_cap"] = c["attn_logit_softcapping"] or 0.0
        if c["model_type"] == "gemma3_text" and values["attention_cap"]:
            raise InputError(f"{file}: attn_logit_softcapping={values['attention_cap']} is not implemented for gemma3_text")
    kinds = c.get("layer_types") or ["sliding_attention"] * c["num_hidden_layers"]
    if strange := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise InputError(f"{file}: layer_types holds {strange[0]!r}, which is not implemented")
    if c.get("sliding_window") and "sliding_attention" in kinds:
        values |= {"window": c["sliding_window"], "sliding": tuple(k == "sliding_attention" for k in kinds)}
    ropes = c["rope_parameters"]
    if "full_attention" in ropes:
        values["rope"], near = (_rope(ropes[k], file) for k in ("full_attention", "sliding_attention"))
        values["sliding_rope"] = near if near != values["rope"] else None
    else:
        values["rope"] = _rope(ropes, file)
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**{k: v for k, v in (values | FAMILIES[c["model_type"]]).items() if k in known})


def _rope(c: dict, file: Path) -> Rope:
    kind = c.get("rope_type", "default")
    if kind not in ROPE:
        raise InputError(f"{file}: rope_type={kind!r} is not implemented; implemented: {', '.join(ROPE)}")
    if missing := [name for name in ROPE[kind] if name not in c]:
        raise InputError(f"{file}: rope_type={kind!r} lacks {missing[0]}")
    bands = tuple(float(c[name]) for name in ROPE[kind][1:]) or None
    factor = float(c["factor"]) if kind != "default" else 1.0
    return Rope(float(c["rope_theta"]), float(c.get("partial_rotary_factor", 1.0)), factor, bands)
