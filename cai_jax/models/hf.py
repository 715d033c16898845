"""Hugging Face folders <-> parameter trees, tensor by tensor and shard by shard.

Every tensor of a folder is accounted for, every shape is checked, and no more than one device's share of one parameter is
held beside the parameters themselves. `families` says which fields and which names.
"""

import dataclasses
import math
import re
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from cai_jax.errors import InputError
from cai_jax.models import families
from cai_jax.models.folder import Folder
from cai_jax.models.transformer import Transformer, TransformerConfig, init_params
from cai_jax.progress import Progress
from cai_jax.sharding import path_name, put, shardings
from cai_jax.workdir import write_json

# Kind -> (our axes, their axes, the third of a fused tensor). Kernels are [in, out] here and [out, in] there, and what is one
# axis there, in brackets of a space, may be several here. "v" is padded here, "3" is only there.
KINDS = {
    "vector": ("d", "d", None),
    "matrix": ("io", "o i", None),
    "vocabulary": ("vd", "v d", None),
    "vocabulary_out": ("dv", "v d", None),
    "heads": ("nh", "nh", None),
    "heads_out": ("dnh", "nh d", None),
    "heads_in": ("nhd", "d nh", None),
    **{f"fused_{name}": ("dnh", "n3h d", part) for part, name in enumerate("qkv")},
    **{f"fused_{name}_bias": ("nh", "n3h", part) for part, name in enumerate("qkv")},
}
SCORE = "score.weight"  # of a reward model: transformers' sequence classifier with one label
MATRICES = ("kernel", "embedding")  # the leaves that take the dtype asked for; norms and biases stay float32
FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of a folder, those that anything here reads
SHOWN = 500  # millions of weights from which reading them is worth a bar
SHARD_BYTES = 2 * 1024**3  # of a file that `save` writes


def local(path: str, flag: str = "model") -> str:
    """A folder as it is; "owner/name" or "owner/name@revision" of the Hugging Face hub from its cache, fetched if need be.

    Raises InputError when it is neither. Only weights, tokenizer and configuration are fetched, no code and no pickles.
    """
    if Path(path).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?", path):
        return path
    from huggingface_hub import snapshot_download

    name, _, revision = path.partition("@")
    wanted = [f"*{suffix}" for suffix in FILES]
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"])
    except (OSError, ValueError, RuntimeError) as error:  # the hub's errors are kinds of these
        why = " ".join(str(error).split())
        raise InputError(f"--config.{flag}.path={path}: no such folder here, and the hub does not give it: {why}") from error


def read_config(path: str) -> TransformerConfig:
    """The config.json of a folder. Raises InputError on a missing file or on what the decoder does not implement."""
    return families.read_config(path)[0]


def write_config(cfg: TransformerConfig, path: str, eos_id: int, pad_id: int, dtype=jnp.bfloat16) -> None:
    """config.json of a model made here, a Llama, whose weights are stored in `dtype` (as `save` does)."""
    values = {theirs: getattr(cfg, ours) for theirs, ours in families.FIELDS.items()}
    values = {k: v for k, v in values.items() if k not in ("layer_norm_eps", "use_parallel_residual")}
    values |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "rope_theta": cfg.rope.theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": jnp.dtype(dtype).name,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    write_json(Path(path) / "config.json", values)


def their_shape(kind: str, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The shape there of a parameter with our `shape`."""
    ours, theirs, _ = KINDS[kind]
    size = dict(zip(ours, shape, strict=True)) | {"3": 3}
    size |= {"v": vocab_size} if "v" in size else {}
    return tuple(math.prod(size[axis] for axis in group) for group in theirs.split())


def read_block(read, kind: str, shape: tuple[int, ...], index: tuple[slice, ...], vocab_size: int) -> np.ndarray:
    """The block `index` of a parameter of our `shape`, out of `read(their index)`; rows that pad the vocabulary are zero."""
    ours, theirs, part = KINDS[kind]
    size = dict(zip(ours, shape, strict=True)) | {"3": 3}
    at = {axis: range(*i.indices(size[axis])) for axis, i in zip(ours, index, strict=True)}
    block_shape = [len(at[axis]) for axis in ours]
    at |= {"3": range(part, part + 1)} if part is not None else {}
    if "v" in at:
        at["v"] = range(at["v"].start, min(at["v"].stop, vocab_size))
        if not at["v"]:  # a device of padding only
            return np.zeros(block_shape, np.float32)
    outer, view, inner = [], [], []
    for group in theirs.split():  # the first axis of a group is cut while reading, the others after it
        step = math.prod(size[axis] for axis in group[1:])
        outer.append(slice(at[group[0]].start * step, at[group[0]].stop * step))
        view += [len(at[group[0]]), *(size[axis] for axis in group[1:])]
        inner += [slice(None), *(slice(at[axis].start, at[axis].stop) for axis in group[1:])]
    letters = theirs.replace(" ", "")
    block = read(tuple(outer)).reshape(view)[tuple(inner)]
    if "3" in letters:
        block, letters = block.squeeze(letters.index("3")), letters.replace("3", "")
    block = block.transpose([letters.index(axis) for axis in ours])
    behind = [(0, want - got) for want, got in zip(block_shape, block.shape, strict=True)]
    return np.pad(block, behind) if any(b for _, b in behind) else block


def to_theirs(kind: str, parts: list[np.ndarray], vocab_size: int) -> np.ndarray:
    """A whole parameter of a layer, or the three of a fused tensor in order, as their array."""
    ours, theirs, part = KINDS[kind]
    letters = theirs.replace(" ", "").replace("3", "")
    turned = [p.transpose([ours.index(axis) for axis in letters]) for p in parts]
    x = turned[0] if part is None else np.stack(turned, axis=theirs.index("3"))
    if "v" in letters:
        x = x[:vocab_size]
    return np.ascontiguousarray(x.reshape(their_shape(kind, parts[0].shape, vocab_size)))


def load(path: str, mesh, dtype=jnp.float32, vocab_multiple: int = 1):
    """Parameters of a folder, read straight to where the mesh wants them. -> nested dicts, sharded by the rules; matrices of
    `dtype`, norms and biases float32 (see transformer.cast_matrices). Of a sequence classifier with one label, a reward model,
    {"trunk", "head"}.

    Raises InputError when a tensor is missing, left over or of another shape.
    """
    cfg, model_type = families.read_config(path)
    cfg = padded(cfg, vocab_multiple)
    wanted = jax.eval_shape(lambda: init_params(Transformer(cfg), jax.random.key(0)))
    folder = Folder(path)
    names, aside = families.tensors_in(model_type, folder.file)
    folder.left -= aside
    scored = SCORE in folder.file
    if scored:
        wanted = {k: v for k, v in wanted.items() if k != "unembed"}

    def one(key_path, want, sharding):
        ours = path_name(key_path)
        to = dtype if ours.endswith(MATRICES) else jnp.float32
        return _parameter(folder, cfg, *names[ours], ours.startswith("layers/"), want.shape, to, sharding)

    done = accumulate(x.size >> 20 for x in jax.tree.leaves(wanted))  # in millions, or so
    total = sum(x.size >> 20 for x in jax.tree.leaves(wanted))
    with Progress(f"reading {Path(path).name}", total, 0, "M weights") if total > SHOWN else nullcontext() as bar:

        def shown(*leaf):
            out = one(*leaf)
            if bar:
                bar.update(next(done))
            return out

        params = jax.tree_util.tree_map_with_path(shown, wanted, shardings(wanted, mesh))
    if scored:
        if (shape := folder.shape(SCORE)) != (1, cfg.width):
            raise InputError(f"{path}: {SCORE} has shape {shape}, wanted one label: {(1, cfg.width)}")
        kernel = folder.read(SCORE, (slice(None), slice(None))).astype(np.float32).T
        params = {"trunk": params} | put({"head": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}, mesh)
    _account(folder, cfg, names)
    return params


def _parameter(folder: Folder, cfg: TransformerConfig, theirs: str, kind: str, stacked: bool, shape, dtype, sharding):
    """One parameter of ours, of `shape`, from their tensor or, `stacked`, from that of every layer."""
    layer_shape = shape[1:] if stacked else shape
    names = [theirs.replace("{i}", str(i)) for i in range(shape[0])] if stacked else [theirs]
    for name in names:
        if (found := folder.shape(name)) != (wanted := their_shape(kind, layer_shape, cfg.vocab_size)):
            raise InputError(f"{folder.path}: {name} has shape {found}, config.json wants {wanted}")

    def read(name, index):
        return read_block(lambda at: folder.read(name, at), kind, layer_shape, index, cfg.vocab_size)

    def block(index):
        if not stacked:
            return read(theirs, index).astype(dtype, copy=False)
        inside, out = names[index[0]], None
        for n, name in enumerate(inside):
            layer = read(name, index[1:])
            out = np.empty((len(inside), *layer.shape), dtype) if out is None else out
            out[n] = layer
        return out

    # One block at a time: jax.make_array_from_callback would hold the whole parameter twice.
    places, shards = {}, []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        places.setdefault(str(index), (index, []))[1].append(device)
    for index, devices in places.values():
        data = block(index)
        shards += [jax.block_until_ready(jax.device_put(data, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _account(folder: Folder, cfg: TransformerConfig, names) -> None:
    """Raises InputError for tensors that nothing has asked for."""
    embedding, unembedding = names["embed/embedding"][0], names["unembed/kernel"][0]
    if cfg.tied_embeddings and unembedding in folder.left:  # some files repeat the tied matrix
        same = folder.shape(unembedding) == folder.shape(embedding)
        everything = (slice(None), slice(None))
        if not same or not np.array_equal(folder.read(unembedding, everything), folder.read(embedding, everything)):
            raise InputError(f"{folder.path}: {unembedding} differs from the embedding, but tie_word_embeddings is true")
    if folder.left:
        raise InputError(
            f"{folder.path}: {len(folder.left)} tensors are not part of the model that config.json describes: "
            f"{sorted(folder.left)[:3]}"
        )


def padded(cfg: TransformerConfig, multiple: int) -> TransformerConfig:
    """With the vocabulary padded to a multiple, for meshes that would not divide it."""
    return dataclasses.replace(cfg, vocab_padding=-cfg.vocab_size % multiple)


def save(
    path: str, params, cfg: TransformerConfig, dtype=jnp.bfloat16, model_type: str = "llama", head=None, shard_bytes=SHARD_BYTES
) -> None:
    """Parameters as safetensors, one file or several with an index, each written beside and renamed. With a `head`, a reward
    model's.

    Raises KeyError for a parameter that the family has no name for.
    """
    folder, dtype = Path(path), np.dtype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(params, cfg, dtype, families.tensors(model_type))
    if head is not None:
        tensors[SCORE] = (head["kernel"].size * dtype.itemsize, lambda: np.asarray(head["kernel"].astype(dtype)).T.copy())
    files, room = [[]], shard_bytes
    for name, (size, _) in tensors.items():
        if size > room and files[-1]:
            files.append([])
            room = shard_bytes
        files[-1].append(name)
        room -= size
    index = {}
    for n, inside in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{n:05d}-of-{len(files):05d}.safetensors"
        beside = folder / f".{file}.tmp"
        save_file({name: tensors[name][1]() for name in inside}, beside, metadata={"format": "pt"})
        beside.replace(folder / file)
        index |= dict.fromkeys(inside, file)
    if len(files) > 1:
        total = sum(size for size, _ in tensors.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _tensors(params, cfg: TransformerConfig, dtype, names) -> dict:
    """Their name -> (bytes, a function that fetches the array): nothing is fetched before its file is written."""
    parts = {}
    for key_path, value in jax.tree_util.tree_flatten_with_path(params)[0]:
        theirs, kind = names[path_name(key_path)]
        for i in range(value.shape[0]) if "{i}" in theirs else [None]:
            parts.setdefault(theirs.replace("{i}", str(i)), []).append((KINDS[kind][2] or 0, kind, value, i))
    out = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])  # the three of a fused tensor in order
        kind, shape = found[0][1], found[0][2].shape[0 if found[0][3] is None else 1 :]
        size = math.prod(their_shape(kind, shape, cfg.vocab_size)) * dtype.itemsize

        def fetch(found=found, kind=kind):
            arrays = [np.asarray((value if i is None else value[i]).astype(dtype)) for _, _, value, i in found]
            return to_theirs(kind, arrays, cfg.vocab_size)

        out[name] = (size, fetch)
    return out
