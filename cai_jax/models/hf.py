"""Hugging Face folders <-> parameter trees: config.json, model.safetensors, tokenizer files.

Every tensor of the file is accounted for and every field of config.json that would change the computation is either
implemented or refused by name.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from cai_jax.models.transformer import Transformer, TransformerConfig, init_params
from cai_jax.sharding import path_name, shardings
from cai_jax.workdir import InputError, read_json, write_json

# Our path -> (their name, axes of their array regrouped as ours). Kernels are stored [out, in] there, [in, out] here; heads
# are split off the out axis. "{i}" is the layer.
TENSORS = {
    "embed/embedding": ("model.embed_tokens.weight", "vd"),
    "final_norm/scale": ("model.norm.weight", "d"),
    "unembed/kernel": ("lm_head.weight", "matrix"),
    "layers/attention_norm/scale": ("model.layers.{i}.input_layernorm.weight", "d"),
    "layers/mlp_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "d"),
    "layers/attention/q/kernel": ("model.layers.{i}.self_attn.q_proj.weight", "heads_out"),
    "layers/attention/k/kernel": ("model.layers.{i}.self_attn.k_proj.weight", "heads_out"),
    "layers/attention/v/kernel": ("model.layers.{i}.self_attn.v_proj.weight", "heads_out"),
    "layers/attention/o/kernel": ("model.layers.{i}.self_attn.o_proj.weight", "heads_in"),
    "layers/mlp/gate/kernel": ("model.layers.{i}.mlp.gate_proj.weight", "matrix"),
    "layers/mlp/up/kernel": ("model.layers.{i}.mlp.up_proj.weight", "matrix"),
    "layers/mlp/down/kernel": ("model.layers.{i}.mlp.down_proj.weight", "matrix"),
}
TO_OURS = {
    "vd": lambda w, shape: w,
    "d": lambda w, shape: w,
    "matrix": lambda w, shape: w.T,
    "heads_out": lambda w, shape: w.T.reshape(shape),  # [N H, D] -> [D, N, H]
    "heads_in": lambda w, shape: w.T.reshape(shape),  # [D, N H] -> [N, H, D]
}
TO_THEIRS = {
    "vd": lambda w: w,
    "d": lambda w: w,
    "matrix": lambda w: w.T,
    "heads_out": lambda w: w.reshape(w.shape[0], -1).T,
    "heads_in": lambda w: w.reshape(-1, w.shape[-1]).T,
}

# config.json fields that change the computation and the only values the decoder implements.
IMPLEMENTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, 0.0, None),
}
REQUIRED = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def read_config(path: str) -> TransformerConfig:
    """The config.json of a folder. Raises InputError on a missing file or on a field the decoder does not implement."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InputError(f"no model at {path}: wanted a folder with config.json and model.safetensors (--config.model.path)")
    c = read_json(file)
    for name, allowed in IMPLEMENTED.items():
        if c.get(name) not in allowed and name in c:
            raise InputError(f"{file}: {name}={c[name]!r} is not implemented; implemented: {allowed}")
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{file}: rope_type={rope['rope_type']!r} is not implemented; implemented: 'default'")
    if missing := [name for name in REQUIRED if name not in c]:
        raise InputError(f"{file}: the field {missing[0]} is missing")
    heads = c["num_attention_heads"]
    return TransformerConfig(
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        mlp_width=c["intermediate_size"],
        num_heads=heads,
        num_kv_heads=c.get("num_key_value_heads", heads),
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        max_length=c["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 10_000.0))),
        norm_eps=c["rms_norm_eps"],
        tied_embeddings=c.get("tie_word_embeddings", False),
    )


def write_config(cfg: TransformerConfig, path: str, eos_id: int, pad_id: int, dtype=jnp.bfloat16) -> None:
    """config.json of a folder whose weights are stored in `dtype` (as `save` does)."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_length,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": jnp.dtype(dtype).name,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    write_json(Path(path) / "config.json", values)


def load(path: str, mesh, dtype=jnp.float32):
    """Parameters of a folder, read tensor by tensor onto the mesh. -> nested dicts, sharded by the rules; matrices of `dtype`,
    norm scales float32 (see transformer.cast_matrices).

    Raises InputError when a tensor is missing, left over or of another shape.
    """
    cfg = read_config(path)
    wanted = jax.eval_shape(lambda: init_params(Transformer(cfg), jax.random.key(0)))
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise InputError(f"no weights at {file}: wanted one safetensors file (--config.model.path)")
    with safe_open(file, framework="numpy") as f:
        left = set(f.keys())

        def read(name: str, kind: str, shape):
            if name not in left:
                raise InputError(f"{file}: the tensor {name} is missing or used twice")
            left.remove(name)
            raw = f.get_tensor(name)
            want = jax.eval_shape(TO_THEIRS[kind], jax.ShapeDtypeStruct(shape, dtype)).shape
            if raw.shape != want:
                raise InputError(f"{file}: {name} has shape {raw.shape}, config.json wants {want}")
            return TO_OURS[kind](raw, shape).astype(jnp.float32 if kind == "d" else dtype)

        def one(key_path, want, sharding):
            ours = path_name(key_path)
            theirs, kind = TENSORS[ours]
            if not ours.startswith("layers/"):
                return jax.device_put(read(theirs, kind, want.shape), sharding)
            stack = [read(theirs.replace("{i}", str(i)), kind, want.shape[1:]) for i in range(cfg.num_layers)]
            return jax.device_put(np.stack(stack), sharding)

        params = jax.tree_util.tree_map_with_path(one, wanted, shardings(wanted, mesh))
        if cfg.tied_embeddings and "lm_head.weight" in left:  # some files repeat the tied matrix
            left.remove("lm_head.weight")
            if not np.array_equal(f.get_tensor("lm_head.weight"), f.get_tensor("model.embed_tokens.weight")):
                raise InputError(f"{file}: lm_head.weight differs from the embedding, but tie_word_embeddings is true")
    if left:
        raise InputError(f"{file}: {len(left)} tensors are not part of the model config.json describes: {sorted(left)[:3]}")
    return params


def save(path: str, params, cfg: TransformerConfig, dtype=jnp.bfloat16) -> None:
    """Parameters as model.safetensors (written beside and renamed)."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key_path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        theirs, kind = TENSORS[path_name(key_path)]
        value = np.asarray(value.astype(dtype))
        if "{i}" in theirs:
            for i, layer in enumerate(value):
                tensors[theirs.replace("{i}", str(i))] = np.ascontiguousarray(TO_THEIRS[kind](layer))
        else:
            tensors[theirs] = np.ascontiguousarray(TO_THEIRS[kind](value))
    beside = folder / ".model.safetensors.tmp"
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.replace(folder / "model.safetensors")
