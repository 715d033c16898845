"""Adapters as a folder that Hugging Face's `peft` loads on top of the base: adapter_config.json and adapter_model.safetensors.

A is a kernel whose outputs are the rank and B one whose inputs are, so `hf` lays both out as it lays out kernels.
"""

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from cai_jax.errors import InputError
from cai_jax.models import families
from cai_jax.models.hf import KINDS, SCORE, to_theirs
from cai_jax.models.transformer import TransformerConfig
from cai_jax.sharding import path_name
from cai_jax.workdir import write_json

PREFIX = "base_model.model."  # peft's wrappers around the model
WEIGHTS = "adapter_model.safetensors"
# Kind of a kernel (hf.KINDS) -> that of its A and that of its B, where it is not "matrix".
OF_A = {"heads_in": "heads_in"}
OF_B = {"heads_out": "heads_out", **{f"fused_{name}": f"fused_{name}" for name in "qkv"}}


def save(path: str, adapter, cfg: TransformerConfig, model_type: str, base_path: str, head=None, part: str = "") -> None:
    """Adapters of cfg.lora (lora.split) as float32, each file written beside and renamed. base_path: the model they belong to,
    a folder or "owner/name@revision" of the hub; `part`: what is adapted of it (families.part_of). With a `head` {"kernel"
    [D, 1], "bias" [1]}, a reward model's: a sequence classifier with one label, whose head peft stores beside the adapters.

    Raises InputError for a head with a bias, KeyError for a matrix that the family has no name for.
    """
    if head is not None and (bias := float(head["bias"][0])):
        raise InputError(f"{path}: the head's bias is {bias}, wanted 0: a sequence classifier of transformers has none")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    modules, tensors = _modules(adapter, families.tensors(model_type)), {}
    if part:
        modules = {module.replace("model.", f"model.{part}.", 1): parts for module, parts in modules.items()}
    for module, parts in modules.items():
        for i in range(cfg.num_layers):
            a, b = _theirs(parts, i, cfg)
            name = PREFIX + module.replace("{i}", str(i))
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if head is not None:
        tensors[PREFIX + SCORE] = np.asarray(head["kernel"], np.float32).T.copy()
    beside = folder / f".{WEIGHTS}.tmp"
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.replace(folder / WEIGHTS)
    write_json(folder / "adapter_config.json", _config(modules, cfg, base_path, head is not None, part))


def _modules(adapter, names) -> dict[str, list]:
    """Their module -> (place in a fused tensor, kind, A, B) of each of our matrices in it, in order; layers are stacked."""
    matrices, modules = {}, {}
    for key_path, value in jax.tree_util.tree_flatten_with_path(adapter)[0]:
        matrix, _, leaf = path_name(key_path).rpartition("/")
        matrices.setdefault(matrix, {})[leaf] = np.asarray(value, np.float32)
    for matrix, leaves in matrices.items():
        theirs, kind = names[f"{matrix}/kernel"]
        part = (KINDS[kind][2] or 0, kind, leaves["lora_a"], leaves["lora_b"])
        modules.setdefault(theirs.removesuffix(".weight"), []).append(part)
    return {module: sorted(parts, key=lambda part: part[0]) for module, parts in modules.items()}


def _theirs(parts, i: int, cfg: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
    """lora_A [R, in] and lora_B [out, R] of layer i. R is the rank times the parts of a fused tensor: each reads its own rows
    of A, and the rows of B that are another's are zero."""
    kind, r = parts[0][1], parts[0][2].shape[-1]
    a = np.concatenate([a[i] for _, _, a, _ in parts], axis=-1)
    bs = [b[i] for _, _, _, b in parts]
    if KINDS[kind][2] is not None:
        placed = [np.zeros((r * len(parts), *bs[0].shape[1:]), np.float32) for _ in "qkv"]
        for n, ((place, *_), b) in enumerate(zip(parts, bs, strict=True)):
            placed[place][n * r : (n + 1) * r] = b
        bs = placed
    return tuple(to_theirs(of.get(kind, "matrix"), x, cfg.vocab_size) for of, x in ((OF_A, [a]), (OF_B, bs)))


def _config(modules, cfg: TransformerConfig, base_path: str, scores: bool, part: str) -> dict:
    """adapter_config.json, with every field that peft would guess. It finds modules by the ends of their names, or by an
    expression, since the other parts of a model may have modules of the same names."""
    name, _, revision = (base_path, "", "") if Path(base_path).exists() else base_path.partition("@")
    ends = sorted({module.rpartition(".")[2] for module in modules})
    fused = {module.rpartition(".")[2]: len(parts) for module, parts in modules.items() if len(parts) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "target_modules": rf"(.*\.)?{part}\..*\.({'|'.join(ends)})" if part else ends,
        # A scale is alpha / r of the module.
        "rank_pattern": {name: n * cfg.lora.rank for name, n in fused.items()},
        "alpha_pattern": {name: n * cfg.lora.alpha for name, n in fused.items()},
        "modules_to_save": ["score"] if scores else None,
        "lora_dropout": 0.0,
        "bias": "none",
    }
