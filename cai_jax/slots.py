"""Continuous batching on the device: a fixed number of slots, each with a text of its own.

`read` puts tokens into some slots, behind what those keep of an earlier text; `decode` samples in all of them until enough are
done, and the host fills those again. Both are compiled for shapes that do not depend on which texts lie where. Rows write their
own place in the cache and attend to what they hold, so nothing is ever shifted and padding is never seen.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.data import BUCKETS, bucket
from cai_jax.models import LM
from cai_jax.models.cache import Cache, empty
from cai_jax.models.kernels import machine
from cai_jax.models.layers import turned
from cai_jax.models.transformer import Transformer, cast_matrices, unstack
from cai_jax.sampling import choose, record_keys
from cai_jax.sharding import batch_ways, by_part, constrain, everywhere, gather_split, put_batch

ROOM = 128  # a long slot has a multiple of so many tokens
PIECE = 512  # tokens of a text read at once: bounds the attention scores of a long one, and the number of compiled lengths


class Slots(NamedTuple):
    layers: Any  # of the cache
    filled_B: jax.Array  # int32, tokens that a slot holds
    offset_B: jax.Array  # int32, tokens of the prefix that stand before them
    x_BD: jax.Array  # hidden state that predicts the next token
    keys_B: jax.Array  # of the noise
    temperature_B: jax.Array  # float32; 0: greedy
    limit_B: jax.Array  # int32, tokens to sample at most
    tokens_BR: jax.Array  # int32, sampled; 0 behind the end
    logp_BR: jax.Array  # float32, of the distribution sampled from; 0 behind the end
    count_B: jax.Array  # int32, sampled tokens, the end's counted
    stop_B: jax.Array  # int32, state of the automaton of stop strings (see stops.py)
    done_B: jax.Array  # bool; also for a slot that was given nothing
    finished_B: jax.Array  # bool; done by an end, not by the limit
    steps: jax.Array  # int32, decode steps so far


class Sampled(NamedTuple):
    tokens_BR: jax.Array  # int32; 0 behind the end
    lengths_B: jax.Array  # int32; EOS counted
    finished_B: jax.Array  # bool; False: cut off at R tokens
    logp_BR: jax.Array  # float32, of the distribution sampled from; 0 behind the end


class Rules(NamedTuple):
    """What is the same for every row of a call."""

    ends_E: jax.Array  # int32, ids that end a text
    stops_CV: jax.Array  # see stops.stop_table


def serving(net: Transformer, params, gather: bool = True, decoding: bool = True):
    """Parameters as `read` and `decode` take them: matrices in the compute dtype, layers apart. `gather`: what is split along
    fsdp is put together, once instead of at every token; a device must hold that. `decoding`: most products will have few
    rows, for which a CPU takes turned matrices."""
    params = unstack(cast_matrices(params, net.dtype), net.cfg.num_layers)
    params = gather_split(params) if gather else params
    return turned(params) if decoding and machine() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1 else params


_serving = jax.jit(serving, static_argnames=("net", "gather", "decoding"))


def ready(lm: LM, gather: bool = True, decoding: bool = True) -> LM:
    """The model with its parameters as `serving` makes them, for all calls to come; one that is ready is returned as it is."""
    return lm._replace(params=_serving(lm.net(), lm.params, gather, decoding)) if "layers" in lm.params else lm


def room(tokens: int) -> int:
    """How long a slot for so many tokens is. Each step reads all of it, but on a TPU, whose pages are as large as buckets."""
    return bucket(tokens) if tokens <= BUCKETS[-1] or machine() == "tpu" else -(-tokens // ROOM) * ROOM


def needed(tokens: int, kept: int, max_new: int) -> int:
    """How long a slot for so many tokens and those to be sampled must be. All but those kept are read, and what is read has
    padding behind it."""
    rest = (tokens - kept) % PIECE
    return room(max(tokens - rest + bucket(rest), tokens + max_new))


@partial(jax.jit, static_argnames=("net", "rows", "slots", "max_new", "cache"))
def new(net: Transformer, rows: int, slots: int, max_new: int, cache: str = "auto") -> Slots:
    """B = `rows` slots that hold nothing, for S = `slots` tokens each, of which R = `max_new` may be sampled. `cache`: how they
    are kept (see config.Sampling)."""
    zero_B, zeros_BR = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, max_new), jnp.int32)
    false_B, keys_B = zero_B > 0, jax.vmap(jax.random.key)(zero_B)
    x_BD = jnp.zeros((rows, net.cfg.width), net.dtype)
    asked = (keys_B, zero_B.astype(jnp.float32), zero_B)
    sampled = (zeros_BR, zeros_BR.astype(jnp.float32), zero_B)
    layers = empty(net.cfg, rows, slots, net.dtype if cache == "auto" else cache)
    return _laid_out(Slots(layers, zero_B, zero_B, x_BD, *asked, *sampled, zero_B, ~false_B, false_B, jnp.int32(0)))


@partial(jax.jit, static_argnames="slots")
def grow(old: Slots, slots: int) -> Slots:
    """The same with more room."""
    pad = lambda x: jnp.pad(x, [(0, slots - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)])  # noqa: E731
    return _laid_out(old._replace(layers=jax.tree.map(pad, old.layers)))


def _laid_out(s: Slots) -> Slots:
    """What the host reads lies whole on every device, so that all processes decide alike."""
    layers = jax.tree.map(lambda x: constrain(x, "batch", "model", *[None] * (x.ndim - 2)), s.layers)
    named = {name: everywhere(getattr(s, name)) for name in ("tokens_BR", "logp_BR", "count_B", "done_B", "finished_B")}
    return s._replace(layers=layers, x_BD=constrain(s.x_BD, "batch", None), **named)


class Reading(NamedTuple):
    """M texts to be read, each into a slot. Those of one part of the batch axes stand together, M = W x m."""

    rows_Wm: jax.Array  # int32, the slot's number in its part; all of a part differ, also those of which nothing is read
    tokens_MT: jax.Array
    lengths_M: jax.Array  # 0: nothing
    filled_M: jax.Array  # tokens of the slot that are kept
    offset_M: jax.Array
    addresses_M2: jax.Array  # uint32, of the noise
    temperature_M: jax.Array
    limit_M: jax.Array


@partial(jax.jit, static_argnames=("net", "fresh"), donate_argnames="slots")
def read(net: Transformer, params, prefix, slots: Slots, seed_key, new: Reading, fresh: bool = False) -> Slots:
    """Reads texts into slots, which are then ready to sample. `fresh`: nothing of these slots is kept, so the texts attend to
    themselves and the prefix alone."""
    own = (slice(None), slice(new.tokens_MT.shape[1] if fresh else None))  # of a slot's cache

    def pick(x, inside=()):
        return by_part(lambda x, rows_1m: x[(rows_1m[0], *inside)])(x, new.rows_Wm)

    def place(x, value, inside=()):
        old = pick(x, inside)  # what nothing is read into stays as it is
        nothing = (new.lengths_M == 0).reshape(-1, *[1] * (x.ndim - 1))
        put = by_part(lambda x, rows_1m, value: x.at[(rows_1m[0], *inside)].set(value, unique_indices=True))
        return put(x, new.rows_Wm, jnp.where(nothing, old, value))

    cache = Cache(jax.tree.map(partial(pick, inside=own), slots.layers), new.filled_M, new.offset_M, prefix)
    x_MTD, layers = net.apply({"params": params}, new.tokens_MT, cache, method="extend")
    x_MD = jnp.take_along_axis(x_MTD, jnp.maximum(new.lengths_M - 1, 0)[:, None, None], axis=1)[:, 0]
    values = {
        "filled_B": new.filled_M + new.lengths_M,
        "offset_B": new.offset_M,
        "x_BD": x_MD,
        "temperature_B": new.temperature_M,
        "limit_B": new.limit_M,
        "keys_B": record_keys(seed_key, new.addresses_M2),
        **dict.fromkeys(("tokens_BR", "count_B", "stop_B"), jnp.int32(0)),
        "logp_BR": jnp.float32(0),
        **dict.fromkeys(("done_B", "finished_B"), jnp.array(False)),
    }
    placed = {name: place(getattr(slots, name), value) for name, value in values.items()}
    return _laid_out(slots._replace(layers=jax.tree.map(partial(place, inside=own), slots.layers, layers), **placed))


@partial(jax.jit, static_argnames=("net", "slots", "cache"))
def read_prefix(net: Transformer, params, tokens_BT, layers, filled, slots: int = 0, cache: str = "auto"):
    """One more piece of a text that rows will share, behind the `filled` tokens of it in `layers`, or as the first of `slots`.
    Rows are copies of one another, one for each part of the batch axes."""
    B = tokens_BT.shape[0]
    layers = empty(net.cfg, B, slots, net.dtype if cache == "auto" else cache) if layers is None else layers
    filled_B = jnp.broadcast_to(filled, (B,))
    return net.apply({"params": params}, tokens_BT, Cache(layers, filled_B, jnp.zeros_like(filled_B)), method="extend")[1]


def prefix_room(tokens: int) -> int:
    """Slots of a text that rows share."""
    return tokens - tokens % PIECE + (bucket(tokens % PIECE) if tokens % PIECE else 0)


def read_text(net: Transformer, params, ids: list[int], mesh, cache: str = "auto"):
    """The keys and values of a text that rows share, as `Cache.prefix` has them."""
    layers, slots = None, prefix_room(len(ids))
    for at in range(0, len(ids), PIECE):
        piece = ids[at : at + PIECE]
        tokens = np.zeros((batch_ways(mesh), bucket(len(piece))), np.int32)
        tokens[:, : len(piece)] = piece
        layers = read_prefix(net, params, put_batch({"x": tokens}, mesh)["x"], layers, jnp.int32(at), slots, cache)
    return first_row(layers)


@jax.jit
def first_row(layers):
    """A prefix as every row attends to it, [K, P, H]."""
    return jax.tree.map(lambda x: constrain(x[0], "model", *[None] * (x.ndim - 2)), layers)


@partial(jax.jit, static_argnames=("net", "gather", "top_p", "top_k", "min_p"), donate_argnames="slots")
def decode(
    net: Transformer, params, prefix, slots: Slots, rules: Rules, until, *, gather=True, top_p=1.0, top_k=0, min_p=0.0
) -> Slots:
    """Samples until `until` slots are done. `gather`: as `serving` made the parameters."""
    return _laid_out(_decode(net, params, prefix, slots, rules, until, gather, top_p, top_k, min_p))


def _decode(net, held, prefix, slots: Slots, rules: Rules, until, gather, top_p, top_k, min_p) -> Slots:
    R = slots.tokens_BR.shape[1]

    at_1R = jnp.arange(R)[None]

    def one(s: Slots) -> Slots:
        # Said again inside the loop: XLA would split a tied embedding for looking up, and gather it at every step for logits.
        params = held | gather_split({"embed": held["embed"]}) if gather else held
        logits_BV = net.apply({"params": params}, s.x_BD[:, None], method="logits")[:, 0]
        token_B, logp_B = choose(logits_BV, s.keys_B, s.count_B, s.temperature_B, top_p, top_k, min_p)
        live_B = ~s.done_B
        stop_B = rules.stops_CV[s.stop_B, token_B].astype(jnp.int32)
        end_B = jnp.any(token_B[:, None] == rules.ends_E[None], axis=-1) | (stop_B == rules.stops_CV.shape[0] - 1)
        count_B = s.count_B + live_B.astype(jnp.int32)
        here_BR = (at_1R == s.count_B[:, None]) & live_B[:, None]
        cache = Cache(s.layers, s.filled_B, s.offset_B, prefix)
        x_B1D, layers = net.apply({"params": params}, token_B[:, None], cache, method="extend")
        return s._replace(
            layers=layers,
            filled_B=s.filled_B + live_B.astype(jnp.int32),
            x_BD=x_B1D[:, 0],
            tokens_BR=jnp.where(here_BR, token_B[:, None], s.tokens_BR),
            logp_BR=jnp.where(here_BR, logp_B[:, None], s.logp_BR),
            count_B=count_B,
            stop_B=jnp.where(live_B, stop_B, s.stop_B),
            done_B=s.done_B | end_B | (count_B >= s.limit_B),
            finished_B=s.finished_B | (live_B & end_B),
            steps=s.steps + 1,
        )

    with jax.named_scope("decoding"):
        return jax.lax.while_loop(lambda s: jnp.sum(s.done_B) < until, one, slots)


@partial(jax.jit, static_argnames=("net", "max_new", "gather", "cache"))
def generate(
    net: Transformer, params, tokens_BP, lengths_B, keys_B, ends_E, temperature, *, max_new, gather=True, cache="auto"
) -> Sampled:
    """Continues each row until one of `ends` or max_new (R) tokens, in one program: what PPO rolls out. Rows of length 0 are
    padding and yield nothing. net: a Transformer (it is run unrolled; params are stacked as stored); temperature 0: greedy."""
    B, P = tokens_BP.shape
    net, zero_B = net.clone(unrolled=True, remat="none"), jnp.zeros(B, jnp.int32)
    params = serving(net, params, gather)
    slots = new(net, B, P + max_new, max_new, cache)
    x_BPD, layers = net.apply({"params": params}, tokens_BP, Cache(slots.layers, zero_B, zero_B), method="extend")
    slots = slots._replace(
        layers=layers,
        filled_B=lengths_B,
        x_BD=jnp.take_along_axis(x_BPD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0],
        keys_B=keys_B,
        temperature_B=jnp.broadcast_to(temperature, (B,)),
        limit_B=jnp.full(B, max_new),
        done_B=lengths_B == 0,
    )
    rules = Rules(ends_E, jnp.zeros((2, 1), jnp.int8))
    out = _laid_out(_decode(net, params, None, slots, rules, B, gather, 1.0, 0, 0.0))
    return Sampled(out.tokens_BR, out.count_B, out.finished_B, out.logp_BR)
