"""Log-probs and entropies of given tokens, from hidden states, without a large array over batch, tokens and vocabulary.

Logits exist for a block of tokens x vocabulary at a time. The forward pass keeps running sums under a running maximum
(1805.02867); the backward pass has its softmax from the saved sum and from logits that it computes again, unless they are few
and were kept (as 2411.09009, leaving nothing out). The vocabulary is the outer loop, so a pass casts and gathers each slice of
the matrix once and writes its gradient once. Tokens that count come first, and blocks without any are left out: prompts and
padding are not multiplied with the vocabulary.
On a mesh every device works on its own rows and its own part of the vocabulary.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.models.attention import soft_cap
from cai_jax.models.kernels import machine
from cai_jax.models.transformer import Transformer
from cai_jax.sharding import P, batch_ways, on_parts

BLOCK = 2**22  # logits that a device holds at a time: 16 MB in float32, in products that keep a large GPU busy; or less:
BLOCK_OF_WIDTH = 2**12  # so many for each of the width. Where the products are small, logits should stay in cache
SLICE = 2**11  # tokens of the vocabulary among them, at most: their rows of the matrix are copied
FINE = 4  # blocks at least where some tokens do not count
KEPT = 2**25  # logits that a device keeps at most, 128 MB in float32: the backward pass then has two products and not three
LANES = 128  # a slice is a multiple of what TPUs and tensor cores take at once
LOW = -1e30  # the logit of what does not count; finite, for 0 * inf is nan


def target_logprobs(net: Transformer, params, hidden_BTD, targets_BT, temperature=1.0, counts_BT=None):
    """Log-prob of each target and entropy of each prediction, in nats, at the sampler's temperature. -> float32 [B, T] each.

    targets: int32 in [0, vocab_size). temperature: > 0, a number or a scalar. counts: bool; where it is false both results are
    0. None: all count. Both results have gradients by the hidden states and the parameters (multiplied in the net's dtype,
    summed in float32), none by the temperature.
    """
    matrix = params["embed"]["embedding"] if net.cfg.tied_embeddings else params["unembed"]["kernel"]
    temperature = jnp.asarray(temperature, jnp.float32)
    return _logprobs(net, matrix, temperature, counts_BT, hidden_BTD.astype(net.dtype), targets_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(net, matrix, temperature, counts_BT, x_BTD, y_BT):
    return _on_mesh(_forward, net, matrix, temperature, counts_BT, None, x_BTD, y_BT)[:2]


def _save(net, matrix, temperature, counts_BT, *rows_BT):
    keeping = partial(_forward, keep=True)
    logp_BT, entropy_BT, lse_BT, kept = _on_mesh(keeping, net, matrix, temperature, counts_BT, None, *rows_BT)
    return (logp_BT, entropy_BT), (matrix, temperature, counts_BT, kept, *rows_BT, entropy_BT, lse_BT)


def _gradients(net, saved, given):
    d_matrix, d_x_BTD = _on_mesh(_backward, net, *saved, *given)
    return d_matrix, None, None, d_x_BTD, None


_logprobs.defvjp(_save, _gradients)


def _on_mesh(local, net, matrix, temperature, counts_BT, kept, *rows_BT):
    """`local` of every device's part of the matrix and its rows; rows that do not split evenly are on every device. kept: the
    logits that `_forward` kept, or None."""

    def run(axes, matrix, temperature, counts_BT, kept, *rows_BT):
        head = _Head(net, axes, matrix, temperature, counts_BT, rows_BT[0].shape[:2])
        return local(head, kept, *map(head.fold, rows_BT))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(((), (), ()), matrix, temperature, counts_BT, kept, *rows_BT)
    even = len(rows_BT[0]) % batch_ways(mesh) == 0
    data, fsdp, model = axes = ("data",) * even, ("fsdp",) * even, ("model",)
    rows, table = P(data + fsdp), P(model, fsdp) if net.cfg.tied_embeddings else P(fsdp, model)
    blocks = P(None, None, data + fsdp, model)
    specs = (table, P(), rows, blocks, *[rows] * len(rows_BT)), (table, rows) if local is _backward else (*[rows] * 3, blocks)
    return on_parts(partial(run, axes), *specs)(matrix, temperature, counts_BT, kept, *rows_BT)


def slice_length(vocabulary: int) -> int:
    """Tokens of a slice of a device's part of the vocabulary."""
    slices = -(-vocabulary // SLICE)
    return vocabulary if slices == 1 else -(-vocabulary // (slices * LANES)) * LANES


def block_count(tokens: int, vocabulary: int, width: int, fine: bool) -> int:
    """In how many blocks a device takes its tokens; `fine`: some of them do not count."""
    blocks = -(-tokens * slice_length(vocabulary) // min(BLOCK, BLOCK_OF_WIDTH * width))
    return max(blocks, min(FINE, tokens)) if fine else blocks


class _Head:
    """A device's part of the matrix ([V, D] when tied, else [D, V]) in slices, and its tokens in the blocks that those need."""

    def __init__(self, net, axes, matrix, temperature, counts_BT, batch: tuple[int, int]):
        self.cfg, self.dtype, self.matrix, self.temperature, self.batch = net.cfg, net.dtype, matrix, temperature, batch
        self.data, self.fsdp, self.model = axes  # names: the first two split the rows, fsdp the width, model the vocabulary
        self.dims = "vd" if net.cfg.tied_embeddings else "dv"
        self.axis = self.dims.index("v")
        size = matrix.shape[self.axis]
        self.length = slice_length(size)
        fresh = np.arange(0, size, self.length, dtype=np.int32)  # the first token that is new in a slice
        starts = np.minimum(fresh, size - self.length)  # the last slice begins inside the one before
        self.places = starts, fresh - starts
        self.first = jax.lax.axis_index(self.model) * size if self.model else 0
        tokens = prod(batch)
        self.blocks = self.used = block_count(tokens, size, net.cfg.width, counts_BT is not None)
        self.order = self.counts_KN1 = None
        if counts_BT is not None:
            self.order = jnp.argsort(~counts_BT.reshape(-1))
            self.used = -(-jnp.sum(counts_BT) // -(-tokens // self.blocks))
            self.counts_KN1 = self.fold(counts_BT)

    def fold(self, x_BT):
        """[B, T] or [B, T, D] -> [K, N, 1 or D]: K blocks of N tokens, those that count in the first, the last one filled up
        with zeros."""
        x = jnp.asarray(x_BT).reshape(prod(self.batch), -1)
        x = x if self.order is None else x[self.order]
        return jnp.pad(x, ((0, -len(x) % self.blocks), (0, 0))).reshape(self.blocks, -1, x.shape[1])

    def unfold(self, x_KN, *shape):
        x = x_KN.reshape(-1, x_KN.shape[2])[: prod(self.batch)]
        x = x if self.order is None else jnp.zeros_like(x).at[self.order].set(x, unique_indices=True)
        return x.reshape(*self.batch, *shape)

    def each_block(self, one, start):
        """`one` of every block in which tokens count."""
        with jax.named_scope("counted"):
            return jax.lax.fori_loop(0, self.used, one, start)

    def counted(self, x_KN1):
        """0 where a token does not count."""
        return x_KN1 if self.order is None else jnp.where(self.counts_KN1, x_KN1, 0.0)

    def slice(self, start, shared):
        """-> the matrix of a slice, whole in width, and its tokens [1, V]; -1: is counted elsewhere, or pads the vocabulary."""
        matrix = jax.lax.dynamic_slice_in_dim(self.matrix, start, self.length, self.axis).astype(self.dtype)
        matrix = jax.lax.all_gather(matrix, self.fsdp, axis=1 - self.axis, tiled=True) if self.fsdp else matrix
        place_1V = jnp.arange(self.length)[None]
        token_1V = self.first + start + place_1V
        return matrix, jnp.where((place_1V >= shared) & (token_1V < self.cfg.vocab_size), token_1V, -1)

    def logits(self, matrix, token_1V, x_ND):
        """-> logits [N, V] at the temperature."""
        z_NV = jnp.einsum(f"nd,{self.dims}->nv", x_ND, matrix, preferred_element_type=jnp.float32)
        z_NV = soft_cap(z_NV, self.cfg.logit_cap) / self.temperature
        masked = self.cfg.vocab_padding or self.places[1].any()
        return jnp.where(token_1V < 0, LOW, z_NV) if masked else z_NV

    def slope(self, z_NV):
        """The derivative of logits by the product of x and the matrix; of LOW it is 0 or multiplied with 0."""
        of_cap = jnp.maximum(z_NV * self.temperature / self.cfg.logit_cap, -1.0) if self.cfg.logit_cap else 0.0
        return (1 - jnp.square(of_cap)) / self.temperature


def _forward(head, _, x_KND, y_KN1, keep=False):
    """-> log-probs, entropies and log-sum-exps, float32 [B, T], and the logits, in blocks as they were computed, or None: there
    are too many, or they are not to be kept."""
    keep = keep and prod(head.batch) * head.matrix.shape[head.axis] <= KEPT
    kept_KNV = jnp.zeros((*y_KN1.shape[:2], head.length), jnp.float32) if keep else None

    def one_slice(sums_KN1, place):
        matrix, token_1V = head.slice(*place)

        def one_block(k, carry):
            sums_KN1, kept_KNV = carry
            x_ND, y_N1, top_N1, sum_N1, moment_N1, picked_N1 = (x[k] for x in (x_KND, y_KN1, *sums_KN1))
            z_NV = head.logits(matrix, token_1V, x_ND)
            new_N1 = jnp.maximum(top_N1, jnp.max(z_NV, axis=1, keepdims=True))
            below_NV = z_NV - new_N1
            exp_NV = jnp.exp(below_NV)
            sum_N1, moment_N1 = _lower(sum_N1, moment_N1, new_N1 - top_N1)
            sum_N1 += jnp.sum(exp_NV, axis=1, keepdims=True)
            moment_N1 += jnp.sum(exp_NV * below_NV, axis=1, keepdims=True)
            picked_N1 += _pick(z_NV, token_1V, y_N1, y_N1 - head.first - place[0])
            new = (new_N1, sum_N1, moment_N1, picked_N1), z_NV if keep else None
            return jax.tree.map(lambda x, new: _put(x, new, k), (sums_KN1, kept_KNV), new)

        return head.each_block(one_block, (sums_KN1, kept_KNV))

    zeros = jnp.zeros(y_KN1.shape, jnp.float32)
    (top, *sums, picked), kept_SKNV = jax.lax.scan(one_slice, (zeros + LOW, zeros, zeros, zeros), head.places)
    highest = jax.lax.pmax(top, head.model)
    total, moment, picked = jax.lax.psum((*_lower(*sums, highest - top), picked), head.model)
    log = jnp.log(total)
    logp, entropy = head.counted(picked - highest - log), head.counted(log - moment / total)
    return *map(head.unfold, (logp, entropy, highest + log)), kept_SKNV


def _pick(z_NV, token_1V, y_N1, at_N1):
    """The logit of each target [N, 1], 0 where it is of another slice. at: its place in this one, if it is."""
    if machine() != "cpu":  # one more sum in a loop that reads all logits anyway
        return jnp.sum(jnp.where(token_1V == y_N1, z_NV, 0.0), axis=1, keepdims=True)
    at_N1 = jnp.clip(at_N1, 0, z_NV.shape[1] - 1)  # a core reads one of each row: a loop over all is 4 % of the products' time
    return jnp.where(token_1V[0][at_N1] == y_N1, jnp.take_along_axis(z_NV, at_N1, axis=1), 0.0)


def _lower(total, moment, by):
    """The sums of e^a and of a e^a when every a sinks, as a logit's distance to the maximum does where the maximum rises."""
    return jnp.exp(-by) * total, jnp.exp(-by) * (moment - by * total)


def _put(x_K, new, k):
    return jax.lax.dynamic_update_index_in_dim(x_K, new, k, 0)


def _backward(head, kept_SKNV, x_KND, y_KN1, entropy_KN1, lse_KN1, *d_results):
    """-> gradients of the matrix and the hidden states. By a logit, d logp = onehot - p, d entropy = -p (log p + entropy)."""
    rows_KN1 = y_KN1, entropy_KN1, lse_KN1, *map(head.counted, d_results)

    def one_slice(gradients, place_and_kept):
        place, kept_KNV = place_and_kept
        matrix, token_1V = head.slice(*place)
        d_matrix, d_x_KND = gradients

        def one_block(k, gradients):
            d_slice, d_x_KND = gradients
            x_ND, y_N1, entropy_N1, lse_N1, d_logp_N1, d_entropy_N1 = (x[k] for x in (x_KND, *rows_KN1))
            z_NV = head.logits(matrix, token_1V, x_ND) if kept_KNV is None else kept_KNV[k]
            logp_NV = z_NV - lse_N1
            d_z_NV = jnp.where(token_1V == y_N1, d_logp_N1, 0.0)
            d_z_NV -= jnp.exp(logp_NV) * (d_logp_N1 + d_entropy_N1 * (logp_NV + entropy_N1))
            d_z_NV = (d_z_NV * head.slope(z_NV)).astype(matrix.dtype)
            d_slice += jnp.einsum(f"nv,nd->{head.dims}", d_z_NV, x_ND, preferred_element_type=jnp.float32)
            d_x_ND = jnp.einsum(f"nv,{head.dims}->nd", d_z_NV, matrix, preferred_element_type=jnp.float32)
            return d_slice, _put(d_x_KND, d_x_KND[k] + d_x_ND, k)

        start = jnp.zeros(matrix.shape, jnp.float32), d_x_KND
        d_slice, d_x_KND = head.each_block(one_block, start)
        d_slice = jax.lax.psum(d_slice, head.data)
        if head.fsdp:
            d_slice = jax.lax.psum_scatter(d_slice, head.fsdp, scatter_dimension=1 - head.axis, tiled=True)
        d_matrix = jax.lax.dynamic_update_slice_in_dim(d_matrix, d_slice.astype(d_matrix.dtype), place[0], head.axis)
        return (d_matrix, d_x_KND), None

    # The last slice goes first: of tokens that it shares its gradient is zero, which the one before overwrites.
    zeros = jnp.zeros_like(head.matrix), jnp.zeros(x_KND.shape, jnp.float32)
    (d_matrix, d_x_KND), _ = jax.lax.scan(one_slice, zeros, (head.places, kept_SKNV), reverse=True)
    return d_matrix, head.unfold(jax.lax.psum(d_x_KND, head.model).astype(x_KND.dtype), -1)
