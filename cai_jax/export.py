"""A model of a run as a Hugging Face folder, and the check that transformers computes the same with it.

cai export --workdir=runs/a --model=rl_cai --out=DIR [--dtype=float32] [--adapter] [--check]
"""

import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import tokenizer
from cai_jax.config import Config
from cai_jax.errors import InputError
from cai_jax.files import read_json
from cai_jax.models import LM, families, hf, lora, peft
from cai_jax.models.transformer import Transformer
from cai_jax.score import hidden_states, reward_scores, row_batch
from cai_jax.sharding import put_batch
from cai_jax.stages import MODELS, STAGE_OF, adapts, checkpoint, load_whole, require_same, root
from cai_jax.tokenizer import Tokenizer
from cai_jax.workdir import write_json

REWARD = "reward"
NAMES = (*MODELS, REWARD)
BESIDE = (  # the base's files that are true of every model made from it
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
NAME_PADDING = ("tokenizer_config.json", "special_tokens_map.json")
ROWS, TOKENS = 4, 48  # of the check's random prompts
TOLERANCE = 2e-4  # of the largest value, or of 1: two float32 forwards that sum in other orders


def export(cfg: Config, workdir: Path, name: str, out: Path, mesh, dtype: str = "", adapter: bool = False, base="") -> LM:
    """Writes `name` (see NAMES) of the run `cfg` in `workdir` into the new folder `out`. -> what it wrote, in float32.

    dtype: of the stored matrices; "": as the checkpoint's config.json has it. A reward model becomes a sequence classifier with
    one label, whose logit is the score. `adapter`: what the stage trained beside frozen weights, alone, as `peft` loads it on
    `base`, a folder or a name of the hub ("": where the checkpoint is); else adapters are merged into the weights. Raises
    InputError when `out` is there already or the stage has not finished.
    """
    if name not in NAMES:
        raise InputError(f"--model={name}: wanted one of {', '.join(NAMES)}")
    if out.exists() or out.is_symlink():
        raise InputError(f"--out={out}: it exists; give another folder or remove it")
    named, base = base, Path(checkpoint(cfg, name).path)
    require_same(cfg, workdir, name)
    fields, kind = families.text_fields(str(base)), families.read_config(str(base))[1]
    stored = fields.get("dtype") or fields.get("torch_dtype")
    dtype = dtype or (stored if stored in ("float32", "bfloat16") else "bfloat16")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={dtype}: wanted float32 or bfloat16")
    if adapter:
        _require_adapter(cfg, name)
    lm = load_whole(cfg, workdir, mesh, name, merged=not adapter)
    params, head = (lm.params["trunk"], lm.params["head"]) if name == REWARD else (lm.params, None)
    if head is not None and float(jnp.abs(head["bias"]).max()):
        raise InputError(f"{workdir}/reward: its head has a bias, which a sequence classifier of transformers cannot hold")
    pad_id = lm.tok.pad_id if head is None else padding(lm.tok, lm.cfg.vocab_size, base)
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    if adapter:
        weights = lora.split(params)[0]
        peft.save(str(beside), weights, lm.cfg, kind, named or str(base), head, families.part_of(str(base)))
    else:
        hf.save(str(beside), params, lm.cfg, jnp.dtype(dtype), kind, head=head)
        write_json(beside / "config.json", fields | _changed(fields, lm, dtype, head) | {"pad_token_id": pad_id})
    for file in BESIDE:
        if (base / file).is_file():
            shutil.copy(base / file, beside / file)
    for file in (beside / name for name in NAME_PADDING if pad_id != lm.tok.pad_id and (beside / name).is_file()):
        write_json(file, read_json(file) | {"pad_token": lm.tok.hf.convert_ids_to_tokens(pad_id)})
    if not (beside / "generation_config.json").exists():
        write_json(beside / "generation_config.json", {"eos_token_id": lm.tok.eos_id, "pad_token_id": lm.tok.pad_id})
    beside.rename(out)
    return lm


def _require_adapter(cfg: Config, name: str) -> None:
    """Raises InputError when a model has no adapter, or when the weights beside it are no checkpoint's but another model's."""
    if not adapts(cfg, STAGE_OF[name]):
        raise InputError(f"--adapter: {name} has no adapter (--config.lora.rank, --config.lora.stages); export it without")
    frozen, base = root(cfg, name), checkpoint(cfg, name).path
    if frozen != base:
        raise InputError(f"--adapter: that of {name} belongs to the weights of {frozen}, not of {base}; export it without")


def _changed(fields: dict, lm: LM, dtype: str, head) -> dict:
    """What config.json says of the exported model and not of the base."""
    changed = {"dtype": dtype, "eos_token_id": fields.get("eos_token_id", lm.tok.eos_id)}
    if "torch_dtype" in fields:
        changed["torch_dtype"] = dtype
    if head is not None:
        causal = fields["architectures"][0] if fields.get("architectures") else "LlamaForCausalLM"
        scorer = causal.replace("ForCausalLM", "ForSequenceClassification")
        changed |= {"architectures": [scorer.replace("Gemma3For", "Gemma3TextFor")]}
        changed |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return changed


def padding(tok: Tokenizer, vocab_size: int, base: Path) -> int:
    """The id that pads the rows of an exported reward model.

    transformers reads a score at the last token of a row that is not this id, and we at the token that ends the text. So where
    a checkpoint pads with a token that ends texts, this is another control token, which no text holds, or else BOS, which none
    ends with. Raises InputError when there is none.
    """
    if tok.pad_id not in tok.stop_ids:
        return tok.pad_id
    special = {i: str(token) for i, token in tok.hf.added_tokens_decoder.items() if token.special and i < vocab_size}
    used = {*tok.stop_ids, *tok.start, *tok.controls, tok.hf.bos_token_id, tok.hf.unk_token_id}
    free = [i for i, name in special.items() if i not in used and name not in str(tok.hf.chat_template)]
    free.sort(key=lambda i: ("pad" not in special[i].lower(), i))  # many have one that is meant for this and not set
    free += [i for i in special if i == tok.hf.bos_token_id and i not in tok.stop_ids]
    if not free:
        raise InputError(
            f"{base}: its padding {tok.hf.convert_ids_to_tokens(tok.pad_id)!r} also ends texts, and transformers reads no "
            "score at padding; name another special token as pad_token in its tokenizer_config.json"
        )
    return free[0]


def check(out: Path, name: str, mesh, lm: LM) -> tuple[float, float]:
    """Random prompts through the folder in transformers, and through what it holds here, both in float32: a whole model is read
    again, an adapter is the one in `lm`, what `export` gave. -> (the largest difference of a logit, or of a score; the largest
    of them all)."""
    tok, length = lm.tok, min(TOKENS, lm.cfg.max_length)
    usable = np.setdiff1d(np.arange(min(tok.vocab_size, lm.cfg.vocab_size)), [tok.pad_id, tok.eos_id])
    tokens = np.random.default_rng(0).choice(usable, (ROWS, length)).astype(np.int32)
    if name == REWARD:
        tokens[:, -1] = tok.eos_id  # where a score is read
    theirs = _theirs(out, name, tokens)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = np.pad(tokens, ((0, -ROWS % ways), (0, 0)))
    batch = put_batch({"tokens": rows, "lengths": np.full(len(rows), length, np.int32)}, mesh)
    whole = (out / "config.json").is_file()
    net, params = Transformer(hf.read_config(str(out)) if whole else lm.cfg), hf.load(str(out), mesh) if whole else lm.params
    compute = jax.jit(reward_scores, static_argnums=0) if name == REWARD else _logits
    ours = np.asarray(compute(net, params, batch["tokens"], batch["lengths"]))[:ROWS]
    ours = ours[:, None] if name == REWARD else ours[..., : theirs.shape[-1]]
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())


def _theirs(out: Path, name: str, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes with the folder, float32 [B, T, V], or [B, 1] of a reward model."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        kind, options = AutoModelForCausalLM, {}
        if name == REWARD:
            kind, options = AutoModelForSequenceClassification, {"num_labels": 1}
        options |= {"dtype": torch.float32, "trust_remote_code": False, "local_files_only": True}
        if (out / "config.json").is_file():
            model = kind.from_pretrained(str(out), **options)
        else:
            from peft import PeftModel

            config = read_json(out / "adapter_config.json")
            base = kind.from_pretrained(config["base_model_name_or_path"], revision=config["revision"], **options)
            base.config.pad_token_id = tokenizer.load(str(out)).pad_id
            model = PeftModel.from_pretrained(base, str(out))
    except ImportError as error:
        raise InputError(
            f"--check wants PyTorch beside transformers, and of an adapter peft: pip install torch peft ({error})"
        ) from error
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@partial(jax.jit, static_argnums=0)
def _logits(net, params, tokens, lengths):
    return net.apply({"params": params}, hidden_states(net, params, row_batch(tokens, lengths), "alone"), method="logits")
