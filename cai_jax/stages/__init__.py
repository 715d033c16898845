"""What the stages share: which models a run has, where they lie, and what a stage's result depends on.

A stage is a module with run(cfg, workdir, mesh) -> bool (False: it was done before). Stages meet only through files.

Every model is a checkpoint, or what a stage made of another model: all its weights anew, or an adapter beside weights that stay
frozen. So the models of a run are a tree, and `origin` is its table.
"""

import json
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cai_jax import checkpoints, formats, panel, prompts, records, sources, tokenizer
from cai_jax import constitution as constitutions
from cai_jax.config import MODELS, Checkpoint, Config
from cai_jax.data import load_attempts, load_comparisons, load_prompts
from cai_jax.errors import InputError, difference
from cai_jax.files import digest, read_json
from cai_jax.models import LM, compute_dtype, hf, lora
from cai_jax.models.heads import init_head
from cai_jax.models.transformer import Transformer, TransformerConfig, cast_matrices, init_params
from cai_jax.sections import as_dict
from cai_jax.sharding import shard_init
from cai_jax.train import abstract
from cai_jax.workdir import outputs

SCORERS = ("reward", "referee", "harm")  # which end in a number; stages of their own names make them
STAGE_OF = MODELS | {"judge": None} | {name: name for name in SCORERS}
READERS = {  # source of config.data -> the stages that read it, and how
    "redteam": (("critique", "preferences", "ppo"), load_prompts),
    "helpful": (("critique", "ppo"), load_prompts),
    "comparisons": (("reward", "referee", "dpo"), load_comparisons),
}
OF_INIT = {"base": "base", "sft": "sl_cai"}  # values of --config.*.init and .policy


def origin(cfg: Config, name: str) -> str | None:
    """The model that `name` starts from; None: its checkpoint."""
    reward = None if cfg.reward.model.path else OF_INIT[cfg.reward.init]
    starts = {"dpo_cai": "sl_cai", "rl_cai": OF_INIT[cfg.ppo.init], "reward": reward, "referee": reward, "harm": "base"}
    return starts.get(name)


def checkpoint(cfg: Config, name: str) -> Checkpoint:
    """The checkpoint at the root of `name`: its weights, its tokenizer, its format."""
    of = {"sl_cai": cfg.sft, "reward": cfg.reward, "referee": cfg.reward}
    own = cfg.preferences.judge if name == "judge" else of[name].model if name in of else Checkpoint()
    if own.path:
        return own
    before = origin(cfg, name)
    return checkpoint(cfg, before) if before else Checkpoint(cfg.model.path, cfg.model.format, cfg.model.system)


def load_format(cfg: Config, name: str = "base") -> tuple[tokenizer.Tokenizer, dict[str, str]]:
    """A model's tokenizer and the templates it is talked to with."""
    c = checkpoint(cfg, name)
    return formats.load(tokenizer.load(c.path), c.format, c.system)


def load_constitution(cfg: Config, name: str = "base") -> constitutions.Constitution:
    """The constitution, in the templates of a model."""
    templates = prompts.TEMPLATES if checkpoint(cfg, name).format == "plain" else load_format(cfg, name)[1]
    c = cfg.constitution
    found = constitutions.load(c.path, c.exclude, c.corrupt, templates=templates)
    if own := [k for k, text in found.templates.items() if text != templates[k] and tokenizer.MARKS.search(text)]:
        raise InputError(f"{c.path}: the template {own[0]!r} holds a noncharacter of Unicode; remove it")
    return found


def inputs_of(
    cfg: Config, workdir: Path, section: str, files: dict[str, str] | None = None, after: tuple = (), models: tuple = ("base",)
) -> dict:
    """What a stage's result depends on: its section, the seed, the checkpoints of its models, files read and the outputs of
    earlier stages."""
    inputs = {
        "config": as_dict(getattr(cfg, section)),
        "seed": cfg.seed,
        "compute_dtype": compute_dtype(cfg.model.compute_dtype).name,
        "models": {m: identity(cfg, m) for m in models},
        "files": {name: sources.digest(path) for name, path in (files or {}).items() if path},
        "stages": {stage: outputs(stage, workdir) for stage in after},
    }
    for part in inputs["config"].values():  # where a folder lies changes nothing
        if isinstance(part, dict):
            part.pop("path", None)
    used = {f"max_{name}" for name in files or {}} | ({"max_prompt"} if "redteam" in (files or {}) else set())
    used |= {"human_share", "max_pair"} if "comparisons" in (files or {}) else set()
    inputs["data"] = {k: v for k, v in as_dict(cfg.data).items() if k in used}
    if section in STAGE_OF.values():
        inputs["trained"] = _trained(cfg, section)
    return inputs


def _trained(cfg: Config, stage: str):
    """How a stage trains: its adapter, or the dtype of its weights."""
    adapter = {k: v for k, v in as_dict(cfg.lora).items() if k != "stages"}
    return adapter if adapts(cfg, stage) else cfg.model.trained_dtype


def identity(cfg: Config, name: str) -> dict:
    """What a model's checkpoint is, wherever it lies."""
    c = checkpoint(cfg, name)
    return as_dict(c) | {"path": _content(c.path)}


def same_texts(cfg: Config, a: str, b: str) -> bool:
    """Whether two models read the same tokens in the same templates."""
    return identity(cfg, a) == identity(cfg, b)


@cache  # weights are gigabytes, and every stage asks
def _content(path: str) -> dict[str, str]:
    """The files of a checkpoint that are read, by their digests."""
    found = [p for p in sorted(Path(path).glob("*")) if p.suffix in hf.FILES and p.is_file()]
    return {p.name: digest(p) for p in found} or {"": digest(path)}


def adapts(cfg: Config, stage: str | None) -> bool:
    """Whether a stage trains an adapter instead of every weight; the referee is trained as the reward model is."""
    return cfg.lora.rank > 0 and {"referee": "reward"}.get(stage, stage) in cfg.lora.stages


def load_lm(cfg: Config, workdir: Path, mesh, name: str = "base") -> LM:
    """A model of the run by name (see STAGE_OF), frozen: matrices of the compute dtype, adapters float32."""
    return _lm(cfg, name, _params(cfg, workdir, mesh, name, compute_dtype(cfg.model.compute_dtype)))


class Start(NamedTuple):
    """What a stage starts from. `lm` is the model before, as it stays; in training, its arrays are also those of `trained`."""

    lm: LM
    net: Transformer  # of the model that is trained
    trained: Any  # parameters, float32 or as --config.model.trained_dtype says
    frozen: Any  # parameters, of the compute dtype; {}: none


def load_start(cfg: Config, workdir: Path, mesh, name: str) -> Start:
    """The model that the stage of `name` starts from, split into what it trains and what stays."""
    adapter = adapts(cfg, STAGE_OF[name])
    dtype = compute_dtype(cfg.model.compute_dtype) if adapter else jnp.dtype(cfg.model.trained_dtype)
    params = _start(cfg, workdir, mesh, name, dtype)
    return start_of(cfg, _lm(cfg, name, trunk(params) if name in SCORERS else params), STAGE_OF[name], mesh)


def start_of(cfg: Config, lm: LM, stage: str, mesh) -> Start:
    """`lm`, of a dtype to be trained, as the start of a stage."""
    adapter, frozen = lora.split(lm.params)
    if adapts(cfg, stage):
        arch = lm.cfg if adapter else lora.attach(lm.cfg, cfg.lora)
        if not adapter:
            adapter = shard_init(lambda key: lora.init(arch, key), mesh, stream(cfg, f"{stage}/adapter"))
    else:
        if adapter:
            lm = LM(lora.attach(lm.cfg, None), lm.dtype, jax.jit(lambda p: lora.merge(p, cfg.lora))(lm.params), lm.tok)
        arch, adapter, frozen = lm.cfg, lm.params, {}
    unrolled = cfg.model.layers == "unrolled"
    return Start(lm, Transformer(arch, lm.dtype, remat=cfg.model.remat, unrolled=unrolled), adapter, frozen)


def load_scorer(cfg: Config, workdir: Path, mesh, name: str, dtype=None, have=()) -> LM:
    """One of SCORERS, params {"trunk", "head"}, frozen, or of `dtype`. `have`: (root, parameters) of a model whose frozen
    parameters are these too if its root is (see `root`)."""
    params = _params(cfg, workdir, mesh, name, dtype or compute_dtype(cfg.model.compute_dtype), have)
    lm = _lm(cfg, name, params["trunk"])
    return lm._replace(params=params)


def require_same(cfg: Config, workdir: Path, name: str) -> None:
    """Raises InputError, with the difference, when the stages that made `name` had other checkpoints or adapters than `cfg`."""
    while name:
        record = workdir / (STAGE_OF[name] or "") / "inputs.json"
        if STAGE_OF[name] and record.exists():
            was = {k: v for k, v in read_json(record).items() if k in ("models", "trained")}
            models = {m: identity(cfg, m) for m in was["models"]}
            now = {"models": models, "trained": _trained(cfg, STAGE_OF[name])}
            if changed := difference(was, json.loads(json.dumps(now))):
                raise InputError(
                    f"stage {STAGE_OF[name]!r} of {workdir} was made with other models or adapters (was -> is): "
                    f"{'; '.join(changed)}; restore them, or {workdir}/config.json"
                )
        name = origin(cfg, name)


def check_data(cfg: Config) -> None:
    """Reads every source that the stages will want, before the first begins. Raises InputError that names its flag."""
    for name, (readers, load) in READERS.items():
        if set(readers) & set(cfg.stages):
            load(getattr(cfg.data, name), getattr(cfg.data, f"max_{name}"), f"--config.data.{name}", records.Drops())
    if "harm" in cfg.stages:
        load_attempts(cfg.harm.data, cfg.harm.max_attempts, "--config.harm.data", records.Drops())


def check_models(cfg: Config) -> None:
    """Looks at every checkpoint that the stages will want, before the first begins: its configuration and its tokenizer; and at
    who is on a panel. Raises InputError that names its flag."""
    places = {"judge": "preferences.judge"} | dict.fromkeys(("reward", "referee"), "reward.model")  # others are sft.model's
    judges = panel.judges(cfg, checkpoint(cfg, "judge")) if "preferences" in cfg.stages else {}
    wanted = [(name, cfg) for name in ("base", *(name for name, stage in STAGE_OF.items() if stage in cfg.stages))]
    for name, one in wanted + [("judge", one) for one in judges.values()]:
        try:
            tok, templates = load_format(one, name)
            arch = _fitting(one, name, tok)
            if adapts(cfg, STAGE_OF[name]):
                lora.init(lora.attach(arch, cfg.lora), jax.random.key(0))
            if name == "judge":
                panel.check_options(checkpoint(one, name).path, tok, templates)
        except InputError as error:
            flag = places.get(name, "sft.model") if checkpoint(cfg, name) != checkpoint(cfg, "base") else "model"
            said = str(error) if one is cfg else str(error).replace("--config.model.path", "--config.preferences.judges")
            raise InputError(said.replace("--config.model.", f"--config.{flag}.")) from error
    if judges and (cfg.preferences.judges or cfg.preferences.constitutions):
        panel.check(cfg, judges, [load_constitution(law, "judge") for law in panel.laws(cfg)])


def load_whole(cfg: Config, workdir: Path, mesh, name: str, merged: bool = True) -> LM:
    """A model of the run in float32, its adapter merged or beside its weights; params {"trunk", "head"} of the reward model."""
    params = _params(cfg, workdir, mesh, name, jnp.dtype("float32"))
    if merged and adapts(cfg, STAGE_OF[name]):
        params = jax.jit(lambda p: lora.merge(p, cfg.lora))(params)
    if name in SCORERS:
        return _lm(cfg, name, params["trunk"])._replace(params=params)
    return _lm(cfg, name, params)


def _lm(cfg: Config, name: str, params) -> LM:
    """Parameters as a model; whether they have an adapter says whether its network does."""
    tok = load_format(cfg, name)[0]
    arch = _fitting(cfg, name, tok)
    if lora.split(params)[0]:
        arch = lora.attach(arch, cfg.lora)
    return LM(arch, compute_dtype(cfg.model.compute_dtype), params, tok)


def _fitting(cfg: Config, name: str, tok) -> TransformerConfig:
    arch = architecture(cfg, name)
    if tok.rows > arch.vocab_size:
        path = checkpoint(cfg, name).path
        raise InputError(f"{path}: the tokenizer has {tok.rows} tokens, the model only {arch.vocab_size} (--config.model.path)")
    return arch


def architecture(cfg: Config, name: str) -> TransformerConfig:
    """The decoder of a model of the run, by the config.json of its checkpoint; its adapters are not in it."""
    arch = hf.padded(hf.read_config(checkpoint(cfg, name).path), cfg.model.vocab_multiple)
    return replace(arch, attention=cfg.model.attention, sequence=cfg.model.sequence)


def root(cfg: Config, name: str) -> str:
    """What names the frozen parameters of a model: the nearest model or checkpoint before it that is not an adapter."""
    if not adapts(cfg, STAGE_OF[name]):
        return name if STAGE_OF[name] else checkpoint(cfg, name).path
    before = origin(cfg, name)
    return root(cfg, before) if before else checkpoint(cfg, name).path


def trunk(params):
    """A language model's parameters without what makes logits of them."""
    return {k: v for k, v in params.items() if k != "unembed"}


def _start(cfg: Config, workdir: Path, mesh, name: str, dtype):
    """Parameters that the stage of `name` starts from, matrices of `dtype`."""
    before, path = origin(cfg, name), checkpoint(cfg, name).path
    if before:
        return _params(cfg, workdir, mesh, before, dtype)
    params = hf.load(path, mesh, dtype, cfg.model.vocab_multiple)
    if "head" in params and name not in SCORERS:
        raise InputError(f"{path}: it is a sequence classifier, {name} wants a language model")
    return params.get("trunk", params)  # a new head is trained


def _params(cfg: Config, workdir: Path, mesh, name: str, dtype, have=()):
    stage = STAGE_OF[name]
    if stage is None:
        return _start(cfg, workdir, mesh, name, dtype)
    arch, key, adapter = architecture(cfg, name), jax.random.key(0), adapts(cfg, stage)
    if adapter:
        shapes = jax.eval_shape(lambda: lora.init(lora.attach(arch, cfg.lora), key))
    else:
        shapes = jax.eval_shape(lambda: cast_matrices(init_params(Transformer(arch), key), dtype))
    if name in SCORERS:
        shapes = {"trunk": trunk(shapes), "head": jax.eval_shape(lambda: init_head(key, arch.width))}
    params = checkpoints.load_model(workdir / stage, abstract(shapes, mesh))
    if not adapter:
        return params
    kept = have and have[0] == root(cfg, name)
    frozen = have[1] if kept else lora.split(_start(cfg, workdir, mesh, name, dtype))[1]
    return lora.join({"trunk": trunk(frozen)} if name in SCORERS else frozen, params)


def stream(cfg: Config, name: str):
    """The key of a named random stream of the run."""
    return jax.random.fold_in(jax.random.key(cfg.seed), jnp.uint32(zlib.crc32(name.encode())))
