"""Log-probs of given text: token by token for training and PPO, of whole options for judging.

Logits are taken a chunk of tokens at a time and recomputed in the backward pass, so no B x T x V array ever exists.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.data import bucket, pad_rows
from cai_jax.losses import preference_from_logprobs
from cai_jax.models import LM
from cai_jax.models.attention import causal_mask
from cai_jax.models.heads import apply_head
from cai_jax.models.transformer import Transformer, unstack
from cai_jax.progress import Progress
from cai_jax.prompts import OPTIONS
from cai_jax.sampling import shape_logits
from cai_jax.sharding import put_batch
from cai_jax.workdir import InputError, raise_if_stopping

CHUNK = 64  # tokens of a row whose logits exist at once


def hidden_states(net: Transformer, params, batch):
    """Final hidden states [B, T, D] of a batch with tokens, positions and segments (0: padding). Parameters are stacked, also
    for an unrolled network."""
    params = unstack(params, net.cfg.num_layers) if net.unrolled else params
    return net.apply({"params": params}, batch["tokens"], batch["positions"], causal_mask(batch["segments"]))[0]


def target_logprobs(net: Transformer, params, hidden_BTD, targets_BT, temperature: float = 1.0):
    """Log-prob of each target and the entropy of each prediction, at the sampler's temperature. -> ([B, T], [B, T]) float32."""
    B, T, D = hidden_BTD.shape
    chunk = min(CHUNK, T)
    pad = -T % chunk
    x = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, chunk, D).swapaxes(0, 1)
    y = jnp.pad(targets_BT, ((0, 0), (0, pad))).reshape(B, -1, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one(x_BCD, y_BC):
        logp = shape_logits(net.apply({"params": params}, x_BCD, method="logits"), temperature)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return jnp.take_along_axis(logp, y_BC[:, :, None], axis=-1)[:, :, 0], entropy

    logp, entropy = jax.lax.map(lambda args: one(*args), (x, y))
    join = lambda a: a.swapaxes(0, 1).reshape(B, -1)[:, :T]  # noqa: E731
    return join(logp), join(entropy)


def row_batch(tokens_BT, lengths_B):
    """Unpacked right-padded rows as a batch: positions count up, segment 1 covers the row's length."""
    B, T = tokens_BT.shape
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    return {"tokens": tokens_BT, "positions": positions, "segments": (positions < lengths_B[:, None]).astype(jnp.int32)}


@partial(jax.jit, static_argnames="net")
def next_token_logprobs(net: Transformer, params, tokens_BT, lengths_B):
    """Log-probs [B, V] of what follows each row."""
    hidden = hidden_states(net, params, row_batch(tokens_BT, lengths_B))
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
    return jax.nn.log_softmax(net.apply({"params": params}, last, method="logits")[:, 0], axis=-1)


@partial(jax.jit, static_argnames="net")
def row_logprobs(net: Transformer, params, tokens_BT, lengths_B, from_B):
    """Summed log-prob of each row's tokens from index `from_B` on. -> float32 [B]."""
    hidden = hidden_states(net, params, row_batch(tokens_BT, lengths_B))
    logp_BT, _ = target_logprobs(net, params, hidden[:, :-1], tokens_BT[:, 1:])
    at = jnp.arange(1, tokens_BT.shape[1])[None]
    inside = (at >= from_B[:, None]) & (at < lengths_B[:, None])
    return jnp.sum(jnp.where(inside, logp_BT, 0.0), axis=-1)


def option_logprobs(lm: LM, contexts: list[str], batch_size: int, mesh, name: str, options=OPTIONS) -> np.ndarray:
    """Log-prob of each whole option string after each context. -> float64 [N, C], in order.

    When all options are one token, one forward of the context gives them all; else each option is a row of its own.
    Raises InputError for a context longer than the model's.
    """
    encoded = [lm.tok.options(c, options) for c in contexts]
    longest = max(len(ids) + max(map(len, opts)) for ids, opts in encoded)
    if longest > lm.cfg.max_length:
        raise InputError(f"{name}: a comparison of {longest} tokens passes the model's context of {lm.cfg.max_length}")
    single = all(len(o) == 1 for _, opts in encoded for o in opts)
    if single:
        rows = [(ids, len(ids), i, [o[0] for o in opts]) for i, (ids, opts) in enumerate(encoded)]
    else:
        rows = [(ids + o, len(ids), i, c) for i, (ids, opts) in enumerate(encoded) for c, o in enumerate(opts)]
    rows.sort(key=lambda r: (bucket(len(r[0])), r[2]))
    out = np.zeros((len(contexts), len(options)))
    done = 0
    with Progress(name, len(rows), 0, "score") as progress:
        while done < len(rows):
            raise_if_stopping()
            size = bucket(len(rows[done][0]))
            part = [r for r in rows[done : done + batch_size] if bucket(len(r[0])) == size]
            tokens, lengths = pad_rows([r[0] for r in part], size, batch_size)
            starts = np.zeros_like(lengths)
            starts[: len(part)] = [r[1] for r in part]
            b = put_batch({"tokens": tokens, "lengths": lengths, "starts": starts}, mesh)
            if single:
                logp = np.asarray(next_token_logprobs(lm.net(), lm.params, b["tokens"], b["lengths"]))
                for i, (_, _, at, ids) in enumerate(part):
                    out[at] = logp[i, ids]
            else:
                logp = np.asarray(row_logprobs(lm.net(), lm.params, b["tokens"], b["lengths"], b["starts"]))
                for i, (_, _, at, c) in enumerate(part):
                    out[at, c] = logp[i]
            done += len(part)
            progress.update(done)
    return out


def averaged_preference(logp_ab, logp_ba):
    """P(first response is better), averaged over both orders. logp_ab [..., 2]: option log-probs with the first response as
    (A); logp_ba [..., 2]: with the first response as (B)."""
    p_ab = preference_from_logprobs(logp_ab[..., 0], logp_ab[..., 1])
    p_ba = preference_from_logprobs(logp_ba[..., 1], logp_ba[..., 0])
    return (p_ab + p_ba) / 2


def reward_scores(net: Transformer, params, tokens_BT, lengths_B):
    """Scores of whole conversations, read at each row's last token. params {"trunk", "head"}. -> float32 [B]."""
    hidden = hidden_states(net, params["trunk"], row_batch(tokens_BT, lengths_B))
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return apply_head(params["head"], last)
