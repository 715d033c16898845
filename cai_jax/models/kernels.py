"""Attention by fused kernels, cuDNN's on GPUs and Pallas' on TPUs, where they fit; elsewhere by the reference.

A kernel gives what attention.attend gives for every token that sees something; padding may come out otherwise.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cai_jax.models.attention import attend
from cai_jax.sharding import BATCH, P, batch_ways, on_parts

BLOCKS = (512, 256, 128)  # tokens that a TPU kernel takes at once: the first that divides a row
LANES = 128  # of a TPU's registers
TEXTS = ("trees", "packed", "alone")  # what a row holds: texts with beginnings in common (see trees.py), texts one after
# another, or one text and padding behind it; each is a case of the one before


class Rows(NamedTuple):
    """What is known of rows beside what their mask says."""

    texts: str = "trees"
    ends_BT: jax.Array | None = None  # see attention.packed_mask
    window: int = 0  # tokens that each sees at most, its own included; 0: all


def machine() -> str:
    """What kernels can run on: "cpu", "tpu", "gpu", or "cudnn" for a GPU with flash attention (Nvidia's from Ampere on). It is
    that of the mesh in scope, which may be compiled for elsewhere."""
    aimed = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = aimed.platform if aimed else jax.default_backend()
    capability = str(getattr(jax.devices()[0], "compute_capability", "")) if name == "gpu" else ""  # AMD's is a name
    return "cudnn" if re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8 else name


def choose(wanted: str, found: str, texts: str, dtype, head_dim: int, cap: float, length: int, even: bool = True) -> str:
    """Who attends within rows of `length` tokens: "xla" (the reference), "cudnn" or "splash".

    wanted: --config.model.attention. found: see `machine`. texts: see TEXTS. even: whether the mesh splits rows and key heads
    evenly. A mask goes to cuDNN only on request: JAX asks for its gradient too, which costs, and not every cuDNN gives it.
    """
    plain = texts == "alone" or wanted == "cudnn"
    if wanted == "auto":
        wanted = {"cudnn": "cudnn", "tpu": "splash"}.get(found, "xla")
    halves = jnp.dtype(dtype).itemsize == 2
    fits = {
        "cudnn": plain and halves and not cap and head_dim % 8 == 0 and head_dim <= 128 and length % 2 == 0,
        "splash": length % BLOCKS[-1] == 0,
    }
    return wanted if even and fits.get(wanted) else "xla"


def paged(wanted: str, found: str, dtype, head_dim: int, slots: int, window: int, even: bool = True) -> bool:
    """Whether a decode step over `slots` of a cache of its own reads only those that are filled. The kernel multiplies in
    bfloat16 and has no window; the slots of one block are all read anyway."""
    kernel = wanted == "splash" or (wanted == "auto" and found == "tpu")
    fits = jnp.dtype(dtype) == jnp.bfloat16 and head_dim % LANES == 0 and slots % BLOCKS[1] == 0 and slots > BLOCKS[0]
    return kernel and even and fits and not 0 < window < slots


def within(cfg, q_BTNH, k_BTKH, v_BTKH, mask_BTT, rows: Rows):
    """Attention of whole texts to themselves. cfg: a TransformerConfig. What tokens see, `mask` says, and `rows` in less where
    those are not trees."""
    B, T, _, H = q_BTNH.shape
    by = choose(cfg.attention, machine(), rows.texts, q_BTNH.dtype, H, cfg.attention_cap, T, _even(B, k_BTKH.shape[2]))
    scale = cfg.query_scale or H**-0.5
    if by == "cudnn":
        return _cudnn(q_BTNH, k_BTKH, v_BTKH, mask_BTT, rows, scale)
    if by == "splash":
        return _splash(q_BTNH * scale, k_BTKH, v_BTKH, mask_BTT, rows, cfg.attention_cap)
    own = {"k": k_BTKH.swapaxes(1, 2), "v": v_BTKH.swapaxes(1, 2)}
    return attend(q_BTNH, [own], mask_BTT, scale, cfg.attention_cap, causal=True)


def behind(cfg, q_BTNH, prefix, layer, mask_BTS, filled_B, window: int = 0):
    """Attention of new tokens to a prefix, or None, and to the slots of `layer`, where they stand from `filled` on; None: the
    layer holds them alone."""
    B, T, _, H = q_BTNH.shape
    _, K, S, _ = layer["k"].shape
    dtype = layer["k"].dtype
    if T == 1 and not prefix and paged(cfg.attention, machine(), dtype, H, S, window, _even(B, K)):
        scale = cfg.query_scale or H**-0.5
        return _paged(q_BTNH * scale, layer["k"], layer["v"], jnp.minimum(filled_B + 1, S), cfg.attention_cap)
    parts = [*([prefix] if prefix else []), layer]
    return attend(q_BTNH, parts, mask_BTS, cfg.query_scale, cfg.attention_cap, causal=filled_B is None)


def _even(rows: int, heads: int) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or (rows % batch_ways(mesh) == 0 and heads % mesh.shape["model"] == 0)


def _seeing_itself(mask_BTT):
    """A softmax over nothing is no number in a fused kernel, so padding sees itself; all others do."""
    return mask_BTT | jnp.eye(mask_BTT.shape[1], dtype=bool)[None]


def _cudnn(q_BTNH, k_BTKH, v_BTKH, mask_BTT, rows: Rows, scale):
    """Padding behind a text is seen by nothing of it, so a text alone needs no mask. One is added to the scores, half of which
    no mask shows."""
    options, masks = {"scale": scale, "is_causal": True, "implementation": "cudnn"}, ()
    if rows.texts == "alone":
        options |= {"local_window_size": (rows.window - 1, 0)} if rows.window else {}
    else:
        masks = (_seeing_itself(mask_BTT)[:, None],)

    def part(q_BTNH, k_BTKH, v_BTKH, *masks):
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, **options, **dict(zip(["mask"], masks, strict=False)))

    heads = P(BATCH, None, "model")
    return on_parts(part, (heads, heads, heads, *[P(BATCH)] * len(masks)), heads)(q_BTNH, k_BTKH, v_BTKH, *masks)


def _splash(q_BTNH, k_BTKH, v_BTKH, mask_BTT, rows: Rows, cap: float):
    """Blocks of keys that no query of a block sees are skipped: for trees they are found in the mask, else known beforehand."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = q_BTNH.shape[1]
    block = next(size for size in BLOCKS if T % size == 0)
    names = [f"block_{x}" for x in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")]
    sizes = kernels.BlockSizes(**dict.fromkeys(names, block))

    def kernel(mask_NTT):
        return kernels.make_splash_mha(
            mask_NTT, head_shards=1, q_seq_shards=1, block_sizes=sizes, attn_logits_soft_cap=cap or None
        )

    def packed(q_NTH, k_KTH, v_KTH, ends_T):
        near = masks.LocalMask((T, T), (rows.window - 1, 0), 0) if 0 < rows.window < T else masks.CausalMask((T, T))
        return kernel(masks.MultiHeadMask([near] * len(q_NTH)))(q_NTH, k_KTH, v_KTH, kernels.SegmentIds(ends_T, ends_T))

    def masked(q_NTH, k_KTH, v_KTH, mask_TT):
        ready = kernel(mask_TT[None])
        ready.fwd_mask_info = ready.fwd_mask_info._replace(is_dynamic_mask=True)  # it was traced, and is asked for its truth
        return ready(q_NTH, k_KTH, v_KTH)

    def part(q_BTNH, k_BTKH, v_BTKH, seen):
        one = masked if rows.texts == "trees" else packed
        return jax.vmap(one)(*(x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH)), seen).swapaxes(1, 2)

    seen, heads = _seeing_itself(mask_BTT) if rows.texts == "trees" else rows.ends_BT, P(BATCH, None, "model")
    return on_parts(part, (heads, heads, heads, P(BATCH)), heads)(q_BTNH, k_BTKH, v_BTKH, seen)


def _paged(q_B1NH, k_BKSH, v_BKSH, lengths_B, cap: float):
    """A head's slots lie side by side, so a cache is a heap of pages as it is: each row and key head is a text of one head."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    def part(q_B1NH, k_BKSH, v_BKSH, lengths_B):
        B, K, S, H = k_BKSH.shape
        size = next(size for size in BLOCKS if S % size == 0)
        pages = jnp.arange(B * K * S // size, dtype=jnp.int32).reshape(B * K, S // size)
        heaps = (x.reshape(1, -1, size, H) for x in (k_BKSH, v_BKSH))
        with jax.numpy_dtype_promotion("standard"):  # the kernel's own products need it
            out = paged_attention(
                q_B1NH.reshape(B * K, -1, H),
                *heaps,
                jnp.repeat(lengths_B, K),
                pages,
                pages_per_compute_block=1,
                attn_logits_soft_cap=cap or None,
            )
        return out.reshape(q_B1NH.shape)

    heads, slots = P(BATCH, None, "model"), P(BATCH, "model")
    return on_parts(part, (heads, slots, slots, P(BATCH)), heads)(q_B1NH, k_BKSH, v_BKSH, lengths_B)
