"""What a model makes of given texts: hidden states of packed rows, log-probs of whole options, scores of a reward model."""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.data import bucket, pad_rows
from cai_jax.errors import InputError
from cai_jax.logprobs import target_logprobs
from cai_jax.losses import preference_from_logprobs
from cai_jax.models import LM
from cai_jax.models.heads import apply_head
from cai_jax.models.transformer import Transformer, unstack
from cai_jax.pairs import Pairs, batches
from cai_jax.progress import Progress, say
from cai_jax.prompts import OPTIONS
from cai_jax.sharding import batch_ways, everywhere, put_batch, replicated
from cai_jax.slots import read_text, ready
from cai_jax.trees import WORTH, Tree, common, first_fit, lay, plant
from cai_jax.workdir import raise_if_stopping

LIMITS = (256, 512, 1024, 2048)  # tokens of a tree: a larger one shares more and compares more in vain
FIRST = 4096  # texts by which their size is chosen


def hidden_states(net: Transformer, params, batch, texts: str = "trees"):
    """Final hidden states [B, T, D] of a batch with tokens, positions and ends (see attention.packed_mask). Parameters are
    stacked, also for an unrolled network. `texts`: what a row holds, which kernels may ask (see kernels.TEXTS)."""
    net = net.clone(texts=texts)
    params = unstack(params, net.cfg.num_layers) if net.unrolled else params
    return net.apply({"params": params}, batch["tokens"], batch["positions"], batch["ends"])


def row_batch(tokens_BT, lengths_B):
    """Unpacked right-padded rows as a batch."""
    B, T = tokens_BT.shape
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    ends = jnp.where(positions < lengths_B[:, None], lengths_B[:, None], 0)
    return {"tokens": tokens_BT, "positions": positions, "ends": ends}


@partial(jax.jit, static_argnames="net")
def tree_logprobs(net: Transformer, params, prefix, offset, batch):
    """Log-probs of tokens that go on from places in packed trees (see trees.py). -> float32 [B, M].

    net: unrolled, with parameters as slots.serving makes them. batch: tokens, positions, ends [B, T]; `at` [B, M], the places;
    `next` [B, M], the tokens. `prefix`: None, or what all texts begin with, `offset` tokens of it.
    """
    rows = batch["tokens"], batch["positions"], batch["ends"]
    if prefix:
        hidden = net.apply({"params": params}, *rows, prefix, offset, method="beside")
    else:
        hidden = net.apply({"params": params}, *rows)
    x_BMD = jnp.take_along_axis(hidden, batch["at"][:, :, None], axis=1)
    return everywhere(target_logprobs(net, params, x_BMD, batch["next"])[0])


class Plan(NamedTuple):
    """Options behind contexts, as trees in rows."""

    before: list[int]  # what all contexts begin with
    texts: int
    rows: dict[str, np.ndarray]  # see tree_logprobs; a multiple of `batch_size`
    asked: list[list[tuple[int, int, int]]]  # of every row: (place, token, number of its text)
    batch_size: int
    whole: int  # tokens of all texts, each by itself
    read: int  # tokens that stand in the rows, and before


def plan(encoded: list[tuple[list[int], list[list[int]]]], width: int, batch_size: int, ways: int) -> Plan:
    """encoded: contexts with their options, see Tokenizer.options. Rows hold as many tokens at a time as `batch_size` of the
    longest texts."""
    before = common([ids for ids, _ in encoded])[: min(len(ids) for ids, _ in encoded) - 1]
    texts = [ids[len(before) :] + option[:-1] for ids, opts in encoded for option in opts]  # nothing follows a last token
    options = [option for _, opts in encoded for option in opts]
    trees, placed, count, length = cheapest(texts, width)
    asked = [[] for _ in range(count)]
    for tree, (row, at) in zip(trees, placed, strict=True):
        for n, path in tree.texts:
            asked[row] += [(at + place, token, n) for place, token in zip(path[-len(options[n]) :], options[n], strict=True)]
    batch_size = -(-min(max(1, batch_size * bucket(max(map(len, texts))) // length), count) // ways) * ways
    rows = lay(trees, placed, -(-count // batch_size) * batch_size, length)
    M = bucket(max(map(len, asked)))
    rows |= {"at": np.zeros((len(rows["tokens"]), M), np.int32), "next": np.zeros((len(rows["tokens"]), M), np.int32)}
    for row, wanted in enumerate(asked):
        rows["at"][row, : len(wanted)], rows["next"][row, : len(wanted)] = [w[0] for w in wanted], [w[1] for w in wanted]
    whole, read = sum(len(t) + len(before) for t in texts), sum(len(t.tokens) for t in trees) + len(before)
    return Plan(before, len(texts), rows, asked, batch_size, whole, read)


def option_logprobs(lm: LM, contexts: list[str], batch_size: int, mesh, name: str, options=OPTIONS) -> np.ndarray:
    """Log-prob of each of the same options after each context. -> float64 [N, C], in order; see `choice_logprobs`."""
    return np.array(choice_logprobs(lm, [(c, options) for c in contexts], batch_size, mesh, name)).reshape(-1, len(options))


def choice_logprobs(lm: LM, asked: list[tuple[str, tuple[str, ...]]], batch_size: int, mesh, name: str) -> list[np.ndarray]:
    """asked: contexts, each with its options. -> log-probs of each whole option string after its context, float64 [C] each.

    Contexts and options are packed as trees, in as many tokens at a time as `batch_size` of the longest have: what contexts
    have in common is computed once, so the options of a context, and the orders and principles of a comparison, cost what they
    add to it. `name`: of the bar, "" for none, where it is a part of work that has its own.
    Raises InputError for a context longer than the model's.
    """
    encoded = [lm.tok.options(*both) for both in asked]
    longest = max(len(ids) + max(map(len, opts)) for ids, opts in encoded)
    if longest > lm.cfg.max_length:
        raise InputError(f"{name}: a comparison of {longest} tokens passes the model's context of {lm.cfg.max_length}")
    p = plan(encoded, lm.cfg.width, batch_size, batch_ways(mesh))
    out, count, cells = np.zeros(p.texts), len(p.asked), len(p.asked) * p.rows["tokens"].shape[1]
    net, params = lm.net(unrolled=True), ready(lm, decoding=False).params
    prefix = read_text(net, params, p.before, mesh) if p.before else None
    with Progress(name, count, 0, "row") if name else nullcontext() as progress:
        for i in range(0, count, p.batch_size):
            raise_if_stopping()
            batch = put_batch({k: x[i : i + p.batch_size] for k, x in p.rows.items()}, mesh)
            logp = np.asarray(tree_logprobs(net, params, prefix, jnp.int32(len(p.before)), batch), np.float64)
            for row, wanted in enumerate(p.asked[i : i + p.batch_size]):
                np.add.at(out, [n for _, _, n in wanted], logp[row, : len(wanted)])
            if progress:
                progress.update(min(count, i + p.batch_size))
    if name:
        say(f"{name}: {p.texts:,} options: {p.read:,} tokens read of {p.whole:,}, in rows {p.read / cells:.0%} full")
    return np.split(out, np.cumsum([len(options) for _, options in asked])[:-1])


def cheapest(texts: list[list[int]], width: int) -> tuple[list[Tree], list[tuple[int, int]], int, int]:
    """Texts as trees in rows. -> (trees, where each lies, rows, tokens of a row): of some sizes of trees and rows, those that
    cost the first texts least, if what a token's attention to 3 x `width` others costs is as much as the rest of its work."""
    most = max(map(len, texts))

    def plan(texts, limit: int, times: int):
        trees = sorted(plant(texts, limit, WORTH), key=lambda tree: -len(tree.tokens))
        sizes = [len(tree.tokens) for tree in trees]
        length = bucket(times * max(sizes[0], most))
        placed = first_fit(sizes, length)
        return trees, placed, 1 + max(row for row, _ in placed), length

    def cost(size: tuple[int, int]):
        *_, count, length = plan(texts[:FIRST], *size)
        return count * length * (1 + length / (3 * width)), length

    return plan(texts, *min({(max(limit, most), times) for limit in LIMITS for times in (1, 2)}, key=cost))


def averaged_preference(logp_ab, logp_ba):
    """P(first response is better), averaged over both orders. logp_ab [..., 2]: option log-probs with the first response as
    (A); logp_ba [..., 2]: with the first response as (B)."""
    p_ab = preference_from_logprobs(logp_ab[..., 0], logp_ab[..., 1])
    p_ba = preference_from_logprobs(logp_ba[..., 1], logp_ba[..., 0])
    return (p_ab + p_ba) / 2


def pair_scores(net: Transformer, params, batch):
    """-> the scores of both responses of every comparison, read at their last tokens, float32 [R, M, 2] (see pairs.batches)."""
    hidden = hidden_states(net, params["trunk"], batch)
    R, M, _ = batch["last"].shape
    last = jnp.take_along_axis(hidden, batch["last"].reshape(R, 2 * M, 1), axis=1)
    return apply_head(params["head"], last).reshape(R, M, 2)


def all_pair_scores(net: Transformer, params, pairs: Pairs, batch_size: int, mesh) -> np.ndarray:
    """`pair_scores` of all comparisons. -> float64 [N, 2]."""
    batch_at, steps = batches(pairs, batch_size, 1, 0, "evaluation", batch_ways(mesh))
    scores = np.zeros((len(pairs.trees), 2))
    score = jax.jit(partial(pair_scores, net), out_shardings=replicated(mesh))
    for t in range(steps):
        batch = batch_at(t)
        real = batch["row_mask"] > 0
        scores[batch["index"][real]] = np.asarray(score(params, put_batch(batch, mesh)))[real]
    return scores


def reward_scores(net: Transformer, params, tokens_BT, lengths_B):
    """Scores of whole conversations, read at each row's last token. params {"trunk", "head"}. -> float32 [B]."""
    hidden = hidden_states(net, params["trunk"], row_batch(tokens_BT, lengths_B), "alone")
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return apply_head(params["head"], last)


def row_scores(lm: LM, rows: list[list[int]], batch_size: int, mesh, stoppable: bool = True) -> np.ndarray:
    """Scores of texts by a model with a head, params {"trunk", "head"}. rows: tokens. -> float64 [N]. `stoppable`: after
    SIGTERM Stopped is raised."""
    return _of_rows(text_scores, lm, rows, [0] * len(rows), batch_size, mesh, stoppable)


def row_logprobs(lm: LM, rows: list[tuple[list[int], int]], batch_size: int, mesh, stoppable: bool = True) -> np.ndarray:
    """Summed log-probs of texts behind their beginnings. rows: (tokens, how many of them are the beginning, at least one).
    -> float64 [N], nats."""
    return _of_rows(text_logprobs, lm, [ids for ids, _ in rows], [n for _, n in rows], batch_size, mesh, stoppable)


@partial(jax.jit, static_argnames="net")
def text_scores(net: Transformer, params, batch):
    """batch: tokens [B, T], lengths [B]. -> float32 [B], see reward_scores."""
    return everywhere(reward_scores(net, params, batch["tokens"], batch["lengths"]))


@partial(jax.jit, static_argnames="net")
def text_logprobs(net: Transformer, params, batch):
    """batch: tokens [B, T], lengths and `first`, tokens of the beginning, [B]. -> summed log-probs of the rest, float32 [B]."""
    hidden = hidden_states(net, params, row_batch(batch["tokens"], batch["lengths"]), "alone")
    place = jnp.arange(hidden.shape[1])[None]
    said = (place >= batch["first"][:, None] - 1) & (place < batch["lengths"][:, None] - 1)
    logp_BT = target_logprobs(net, params, hidden, jnp.roll(batch["tokens"], -1, axis=1), counts_BT=said)[0]
    return everywhere(jnp.sum(logp_BT, axis=1))


def _of_rows(f, lm: LM, rows: list[list[int]], first: list[int], batch_size: int, mesh, stoppable: bool = True) -> np.ndarray:
    """`f` of every text, those of about the same length together. Raises InputError for one longer than the model's context."""
    order, out = sorted(range(len(rows)), key=lambda n: -len(rows[n])), np.zeros(len(rows))
    if rows and len(rows[order[0]]) > lm.cfg.max_length:
        raise InputError(f"a text of {len(rows[order[0]])} tokens passes the model's context of {lm.cfg.max_length}")
    B = -(-batch_size // batch_ways(mesh)) * batch_ways(mesh)
    for i in range(0, len(rows), B):
        if stoppable:
            raise_if_stopping()
        index = order[i : i + B]
        some = [rows[n] for n in index] + [rows[index[-1]]] * (B - len(index))
        tokens, lengths = pad_rows(some, bucket(len(some[0])))
        starts = np.array([first[n] for n in index] + [1] * (B - len(index)), np.int32)
        batch = put_batch({"tokens": tokens, "lengths": lengths, "first": starts}, mesh)
        out[index] = np.asarray(f(lm.net(), lm.params, batch), np.float64)[: len(index)]
    return out
