"""What the stages share: which models a run has, where they lie, and what a stage's result depends on.

A stage is a module with run(cfg, workdir, mesh) -> bool (False: it was done before). Stages meet only through files.
"""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp

from cai_jax import checkpoints, formats, prompts, sources, tokenizer
from cai_jax import constitution as constitutions
from cai_jax.config import Config, as_dict
from cai_jax.models import LM, compute_dtype, hf
from cai_jax.models.heads import init_head
from cai_jax.models.transformer import Transformer, cast_matrices, init_params
from cai_jax.train import abstract
from cai_jax.workdir import InputError, digest, outputs

# Name of a model in results and configs -> the stage that makes it.
MODELS = {"base": None, "sl_cai": "sft", "dpo_cai": "dpo", "rl_cai": "ppo"}
OF_INIT = {"base": "base", "sft": "sl_cai"}  # values of --config.*.init and .policy


def load_constitution(cfg: Config) -> constitutions.Constitution:
    templates = prompts.TEMPLATES if cfg.model.format == "plain" else load_format(cfg)[1]
    return constitutions.load(cfg.constitution.path, cfg.constitution.exclude, templates=templates)


def load_format(cfg: Config) -> tuple[tokenizer.Tokenizer, dict[str, str]]:
    """The base's tokenizer and the templates it is talked to with."""
    return formats.load(tokenizer.load(cfg.model.path), cfg.model.format, cfg.model.system)


def inputs_of(
    cfg: Config, workdir: Path, section: str, files: dict[str, str] | None = None, after: tuple[str, ...] = ()
) -> dict:
    """What a stage's result depends on: its section, the seed, the base model, files read and the outputs of earlier stages."""
    return {
        "config": as_dict(getattr(cfg, section)),
        "seed": cfg.seed,
        "compute_dtype": compute_dtype(cfg.model.compute_dtype).name,
        "model": digest(cfg.model.path),
        "format": [cfg.model.format, cfg.model.system],
        "files": {name: sources.digest(path) for name, path in (files or {}).items() if path},
        "stages": {stage: outputs(stage, workdir) for stage in after},
    }


def load_lm(cfg: Config, workdir: Path, mesh, name: str = "base", trained: bool = False) -> LM:
    """A model of the run by name (see MODELS). Parameters are float32 to be trained, of the compute dtype when frozen."""
    arch, tok = hf.padded(hf.read_config(cfg.model.path), cfg.model.vocab_multiple), load_format(cfg)[0]
    if tok.vocab_size > arch.vocab_size:
        raise InputError(f"{cfg.model.path}: the tokenizer has {tok.vocab_size} tokens, the model only {arch.vocab_size}")
    compute, stage = compute_dtype(cfg.model.compute_dtype), MODELS[name]
    dtype = jnp.dtype("float32") if trained else compute
    if stage is None:
        params = hf.load(cfg.model.path, mesh, dtype, cfg.model.vocab_multiple)
    else:
        params = cast_matrices(checkpoints.load_model(workdir / stage, abstract(_shapes(arch), mesh)), dtype)
    return LM(arch, compute, params, tok)


def load_reward(lm: LM, workdir: Path, mesh):
    """The reward model's parameters, {"trunk", "head"}."""
    shapes = {"trunk": _shapes(lm.cfg), "head": jax.eval_shape(lambda: init_head(jax.random.key(0), lm.cfg.width))}
    return checkpoints.load_model(workdir / "reward", abstract(shapes, mesh))


def _shapes(arch):
    return jax.eval_shape(lambda: init_params(Transformer(arch), jax.random.key(0)))


def stream(cfg: Config, name: str):
    """The key of a named random stream of the run."""
    return jax.random.fold_in(jax.random.key(cfg.seed), jnp.uint32(zlib.crc32(name.encode())))
