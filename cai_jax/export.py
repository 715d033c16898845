"""A model of a run as a Hugging Face folder, and the check that transformers computes the same with it.

cai export --workdir=runs/a --model=rl_cai --out=DIR [--dtype=float32] [--check]
"""

import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import tokenizer
from cai_jax.config import Config
from cai_jax.models import LM, families, hf
from cai_jax.models.transformer import Transformer
from cai_jax.score import hidden_states, reward_scores, row_batch
from cai_jax.sharding import put_batch
from cai_jax.stages import MODELS, load_lm, load_reward
from cai_jax.workdir import InputError, read_json, write_json

REWARD = "reward"
NAMES = (*MODELS, REWARD)
BESIDE = (  # the base's files that are true of every model made from it
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
ROWS, TOKENS = 4, 48  # of the check's random prompts
TOLERANCE = 2e-4  # of the largest value, or of 1: two float32 forwards that sum in other orders


def export(cfg: Config, workdir: Path, name: str, out: Path, mesh, dtype: str = "") -> None:
    """Writes `name` (see NAMES) of the run `cfg` in `workdir` into the new folder `out`.

    dtype: of the stored matrices; "": as the base's config.json has it. A reward model becomes a sequence classifier with one
    label, whose logit is the score. Raises InputError when `out` is there already or the stage has not finished.
    """
    if name not in NAMES:
        raise InputError(f"--model={name}: wanted one of {', '.join(NAMES)}")
    if out.exists():
        raise InputError(f"--out={out}: it exists; give another folder or remove it")
    base = Path(cfg.model.path)
    fields, kind = read_json(base / "config.json"), families.read_config(str(base))[1]
    dtype = dtype or fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={dtype}: wanted float32 or bfloat16")
    lm = load_lm(cfg, workdir, mesh, "base" if name == REWARD else name, trained=True)
    params, head = lm.params, None
    if name == REWARD:
        whole = load_reward(lm, workdir, mesh)
        params, head = {k: v for k, v in whole["trunk"].items() if k != "unembed"}, whole["head"]
        if float(jnp.abs(head["bias"]).max()):
            raise InputError(f"{workdir}/reward: its head has a bias, which a sequence classifier of transformers cannot hold")
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    hf.save(str(beside), params, lm.cfg, jnp.dtype(dtype), kind, head=head)
    write_json(beside / "config.json", fields | _changed(fields, lm, dtype, head))
    for file in BESIDE:
        if (base / file).is_file():
            shutil.copy(base / file, beside / file)
    if not (beside / "generation_config.json").exists():
        write_json(beside / "generation_config.json", {"eos_token_id": lm.tok.eos_id, "pad_token_id": lm.tok.pad_id})
    beside.rename(out)


def _changed(fields: dict, lm: LM, dtype: str, head) -> dict:
    """What config.json says of the exported model and not of the base."""
    changed = {"dtype": dtype, "eos_token_id": fields.get("eos_token_id", lm.tok.eos_id), "pad_token_id": lm.tok.pad_id}
    if "torch_dtype" in fields:
        changed["torch_dtype"] = dtype
    if head is not None:
        causal = fields["architectures"][0] if fields.get("architectures") else "LlamaForCausalLM"
        changed |= {"architectures": [causal.replace("ForCausalLM", "ForSequenceClassification")]}
        changed |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return changed


def check(out: Path, name: str, mesh) -> tuple[float, float]:
    """Random prompts through the folder, here and in transformers, both in float32. -> (the largest difference of a logit, or
    of a score; the largest of them all)."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    except ImportError as error:
        raise InputError("--check wants PyTorch beside transformers: pip install torch") from error
    tok, path = tokenizer.load(str(out)), str(out)
    cfg = hf.read_config(path)
    rng = np.random.default_rng(0)
    usable = np.setdiff1d(np.arange(tok.vocab_size), [tok.pad_id, tok.eos_id])
    length = min(TOKENS, cfg.max_length)
    tokens = rng.choice(usable, (ROWS, length)).astype(np.int32)
    kind = AutoModelForSequenceClassification if name == REWARD else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True, trust_remote_code=False).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = np.pad(tokens, ((0, -ROWS % ways), (0, 0)))
    batch = put_batch({"tokens": rows, "lengths": np.full(len(rows), length, np.int32)}, mesh)
    net = Transformer(cfg)
    if name == REWARD:
        ours = jax.jit(reward_scores, static_argnums=0)(net, hf.load(path, mesh), batch["tokens"], batch["lengths"])
        ours = np.asarray(ours)[:ROWS, None]
    else:
        ours = np.asarray(_logits(net, hf.load(path, mesh), batch["tokens"], batch["lengths"]))[:ROWS]
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


@partial(jax.jit, static_argnums=0)
def _logits(net, params, tokens, lengths):
    return net.apply({"params": params}, hidden_states(net, params, row_batch(tokens, lengths)), method="logits")
