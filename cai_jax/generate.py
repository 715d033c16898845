"""The engine: prompts in, sampled continuations out, with explicit lengths and log-probs.

A cache of P + R slots: the prompt, right-padded to P, then R slots for the response. All rows write the same slot at a step and
attend to their own prompt and the response so far, so nothing is ever shifted and padding is never seen.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.config import Sampling
from cai_jax.data import bucket, pad_rows
from cai_jax.models import LM
from cai_jax.models.transformer import Transformer, cast_matrices, init_cache, unstack
from cai_jax.progress import Progress
from cai_jax.prompts import TEMPLATES, read_back, stops
from cai_jax.records import Journal
from cai_jax.sampling import choose, record_key_data, record_keys
from cai_jax.sharding import put_batch
from cai_jax.workdir import InputError, raise_if_stopping


class Sampled(NamedTuple):
    tokens_BR: jax.Array  # int32; 0 behind the end
    lengths_B: jax.Array  # int32; EOS counted
    finished_B: jax.Array  # bool; False: cut off at R tokens
    logp_BR: jax.Array  # float32, of the distribution sampled from; 0 behind the end


@partial(jax.jit, static_argnames=("net", "max_new", "top_p", "greedy"))
def generate(
    net: Transformer, params, tokens_BP, lengths_B, keys_B, stop_ids_E, temperature, *, max_new, top_p=1.0, greedy=False
):
    """Continues each row until one of stop_ids or max_new (R) tokens. Rows of length 0 are padding and yield nothing.

    net: a Transformer (it is run unrolled; params are stacked as stored). -> Sampled.
    """
    B, P = tokens_BP.shape
    S = P + max_new
    net = net.clone(unrolled=True, remat="none")
    params = unstack(cast_matrices(params, net.dtype), net.cfg.num_layers)
    slot_11S = jnp.arange(S)[None, None]
    prompt_B1S = slot_11S < lengths_B[:, None, None]

    at_1S = jnp.arange(S)[None]
    slots_BS = jnp.where(at_1S < P, at_1S, lengths_B[:, None] + at_1S - P)  # the position of what stands in each slot

    def run(tokens_BT, positions_BT, mask_BTS, cache, index):
        return net.apply({"params": params}, tokens_BT, positions_BT, mask_BTS, cache, index, slots_BS)

    def logits_of(x_BD):
        return net.apply({"params": params}, x_BD[:, None], method="logits")[:, 0]

    positions_BP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    causal_1PS = slot_11S <= jnp.arange(P)[None, :, None]
    x_BPD, cache = run(tokens_BP, positions_BP, prompt_B1S & causal_1PS, init_cache(net.cfg, B, S, net.dtype), 0)
    last_B = jnp.maximum(lengths_B - 1, 0)
    x_BD = jnp.take_along_axis(x_BPD, last_B[:, None, None], axis=1)[:, 0]

    def one(carry):
        t, cache, logits_BV, done_B, tokens_BR, logp_BR, count_B = carry
        token_B, logp_B = choose(logits_BV, keys_B, t, temperature, top_p, greedy)
        live_B = ~done_B
        tokens_BR = tokens_BR.at[:, t].set(jnp.where(live_B, token_B, 0))
        logp_BR = logp_BR.at[:, t].set(jnp.where(live_B, logp_B, 0.0))
        count_B = count_B + live_B.astype(jnp.int32)
        done_B = done_B | jnp.any(token_B[:, None] == stop_ids_E[None, :], axis=-1)
        mask_B1S = prompt_B1S | ((slot_11S >= P) & (slot_11S <= P + t))
        x_B1D, cache = run(token_B[:, None], (lengths_B + t)[:, None], mask_B1S, cache, P + t)
        return t + 1, cache, logits_of(x_B1D[:, 0]), done_B, tokens_BR, logp_BR, count_B

    def more(carry):
        return (carry[0] < max_new) & ~jnp.all(carry[3])

    empty = jnp.zeros((B, max_new))
    start = (jnp.int32(0), cache, logits_of(x_BD), lengths_B == 0)
    start += (empty.astype(jnp.int32), empty.astype(jnp.float32), jnp.zeros_like(lengths_B))
    _, _, _, done_B, tokens_BR, logp_BR, count_B = jax.lax.while_loop(more, one, start)
    return Sampled(tokens_BR, count_B, done_B, logp_BR)


class Request(NamedTuple):
    key: str  # of the journal, and of the noise: "<record id>/<turn>"
    context: str  # the text to continue


def fits(lm: LM, context: str, max_tokens: int) -> bool:
    """Whether the model's context holds this one and max_tokens more."""
    return len(lm.tok.prompt(context)) + max_tokens <= lm.cfg.max_length


def sample_texts(
    lm: LM,
    requests: list[Request],
    sampling: Sampling,
    seed: int,
    journal: Journal,
    mesh,
    templates=TEMPLATES,
    what: str = "responses",
    stoppable: bool = True,
) -> list[dict]:
    """Continues every context, in batches of like length. -> per request, in order: {"text", "tokens", "finished"}.

    What is in the journal is not done again; what is done is journalled batch by batch. A request's text is a function of
    (model, context, sampling, seed, journal folder's stage, key): not of batches, order or restarts. `finished` is False for
    a text cut off at max_tokens; one that goes on with a cue of `templates` ends before it.
    `stoppable`: after SIGTERM a batch is the last one, and Stopped is raised.
    """
    stage = journal.path.parent.name
    todo = [(lm.tok.prompt(r.context), r) for r in requests if r.key not in journal.done]
    for ids, r in todo:
        if len(ids) + sampling.max_tokens > lm.cfg.max_length:
            raise InputError(
                f"record {r.key!r}: its prompt of {len(ids)} tokens and {sampling.max_tokens} new ones pass the model's "
                f"context of {lm.cfg.max_length}; shorten the prompt or --config.{stage}.sampling.max_tokens"
            )
    todo.sort(key=lambda x: (bucket(len(x[0])), len(x[0]), x[1].key))
    done = len(requests) - len(todo)
    with Progress(f"{stage}: {what}", len(requests), done, "sample") as progress:
        while todo:
            if stoppable:
                raise_if_stopping()
            size = bucket(len(todo[0][0]))
            rows = [x for x in todo[: sampling.batch_size] if bucket(len(x[0])) == size]
            todo = todo[len(rows) :]
            journal.add(_sample_batch(lm, rows, size, sampling, seed, stage, mesh, templates))
            done += len(rows)
            progress.update(done)
    return [journal.done[r.key] for r in requests]


def _sample_batch(lm: LM, rows, size: int, sampling: Sampling, seed: int, stage: str, mesh, templates) -> list[dict]:
    tokens, lengths = pad_rows([ids for ids, _ in rows], size, sampling.batch_size)
    addresses = np.zeros((sampling.batch_size, 2), np.uint32)
    addresses[: len(rows)] = [record_key_data(stage, r.key) for _, r in rows]
    on_mesh = put_batch({"tokens": tokens, "lengths": lengths, "addresses": addresses}, mesh)
    greedy = sampling.temperature == 0
    out = generate(
        lm.net(),
        lm.params,
        on_mesh["tokens"],
        on_mesh["lengths"],
        record_keys(jax.random.key(seed), on_mesh["addresses"]),
        jnp.array(lm.tok.stop_ids, jnp.int32),
        jnp.float32(1.0 if greedy else sampling.temperature),
        max_new=sampling.max_tokens,
        top_p=sampling.top_p,
        greedy=greedy,
    )
    out = Sampled(*map(np.asarray, jax.device_get(out)))
    results = []
    for i, (_, r) in enumerate(rows):
        ids = out.tokens_BR[i, : out.lengths_B[i]].tolist()
        raw = lm.tok.decode(ids)
        finished = bool(out.finished_B[i]) or any(s in raw for s in stops(templates))
        results.append({"key": r.key, "text": read_back(raw, templates), "tokens": len(ids), "finished": finished})
    return results
