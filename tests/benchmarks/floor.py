"""The floor: the same work as somebody would write it in JAX in an afternoon. One plain Llama, static batches padded on the
left, nothing shared, nothing sharded, everything jitted. And what the machine can do, for `roofline`.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import work
from model import THETA
from safetensors.numpy import load_file
from worker import Job, main

RATE = 1e-9  # no weight moves, so that everybody's losses stay comparable


def load(job: Job):
    """-> (parameters as nested dicts, matrices [in, out]; the shape)."""
    w = {k: jnp.asarray(v.T) for k, v in load_file(job.folder / "model.safetensors").items()}
    shape = job.sizes.shape_of(job.case)
    at = "model.layers.{}.{}.weight"
    parts = {x: f"self_attn.{x}_proj" for x in "qkvo"} | {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    parts |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    layers = [{ours: w[at.format(i, theirs)] for ours, theirs in parts.items()} for i in range(shape.layers)]
    norm, unembed = w["model.norm.weight"], w["lm_head.weight"]
    return {"embed": w["model.embed_tokens.weight"].T, "layers": layers, "norm": norm, "unembed": unembed}, shape


def norm(scale, x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def rotate(x_BTNH, positions_BT):
    half = x_BTNH.shape[-1] // 2
    angle = positions_BT[:, :, None, None] * THETA ** (-jnp.arange(half) / half)
    a, b = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def forward(params, heads: int, tokens_BT, positions_BT, mask_BTS, cache=None, slot=0):
    """Hidden states [B, T, D], and the cache, a list of (k, v) [B, S, N, H], with these tokens from `slot` on."""
    x = params["embed"][tokens_BT]
    B, T, D = x.shape
    after = []
    for i, p in enumerate(params["layers"]):
        y = norm(p["norm1"], x)
        q, k, v = ((y @ p[n]).reshape(B, T, heads, -1) for n in "qkv")
        q, k = rotate(q, positions_BT), rotate(k, positions_BT)
        if cache is not None:
            k, v = (jax.lax.dynamic_update_slice_in_dim(old, new, slot, 1) for old, new in zip(cache[i], (k, v), strict=True))
            after.append((k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(D // heads)
        weights = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores, -1e30), axis=-1)
        x = x + jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(B, T, D) @ p["o"]
        y = norm(p["norm2"], x)
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    return norm(params["norm"], x), after


def nucleus(logits_BV, key, top_p: float):
    """One token a row, by a sort of the whole vocabulary."""
    sorted_BV = jnp.sort(logits_BV, axis=-1)[:, ::-1]
    p = jax.nn.softmax(sorted_BV, axis=-1)
    least = jnp.min(jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits_BV >= least, logits_BV, -jnp.inf))


@partial(jax.jit, static_argnames=("heads", "room", "top_p"))
def generate(params, heads: int, tokens_BP, lengths_B, key, new, room: int, top_p: float | None):
    """`new` tokens, at most `room`, behind every row, padded on the left. top_p None: greedy. -> [B, room]."""
    B, P = tokens_BP.shape
    slot_S, start_B = jnp.arange(P + room), P - lengths_B
    seen_B1S = (slot_S >= start_B[:, None])[:, None]
    empty = jnp.zeros((B, P + room, heads, params["embed"].shape[1] // heads))

    def choose(x_BD, t):
        logits = x_BD @ params["unembed"]
        token = jnp.argmax(logits, -1) if top_p is None else nucleus(logits, jax.random.fold_in(key, t), top_p)
        return token.astype(jnp.int32)

    def one(carry):
        t, token_B, out_BR, cache = carry
        out_BR = out_BR.at[:, t].set(token_B)
        mask = seen_B1S & (slot_S <= P + t)
        x, cache = forward(params, heads, token_B[:, None], (lengths_B + t)[:, None], mask, cache, P + t)
        return t + 1, choose(x[:, 0], t + 1), out_BR, cache

    positions_BP = jnp.maximum(jnp.arange(P) - start_B[:, None], 0)
    causal = seen_B1S & (slot_S <= jnp.arange(P)[:, None])
    x, cache = forward(params, heads, tokens_BP, positions_BP, causal, [(empty, empty)] * len(params["layers"]))
    start = (jnp.int32(0), choose(x[:, -1], 0), jnp.zeros((B, room), jnp.int32), cache)
    return jax.lax.while_loop(lambda carry: carry[0] < new, one, start)[2]


def left_padded(rows, width: int):
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
    return tokens, np.array([len(row) for row in rows])


def sampler(job: Job):
    """-> sample(rows, new, room, width) -> [B, room]; and the greedy tokens by which contenders are compared."""
    params, shape = load(job)
    keys = iter(lambda: jax.random.key(np.random.randint(2**31)), None)

    def sample(rows, new: int, room: int, width: int, top_p=job.sizes.top_p):
        return np.asarray(generate(params, shape.heads, *left_padded(rows, width), next(keys), new, room, top_p))

    check = sample(work.generate(job.sizes)[:1], 8, 8, job.sizes.prompt, None)[0].tolist()
    return sample, {"check": check}


def generate_rows(job: Job, turns):
    (sample, check), s, prompts = sampler(job), job.sizes, work.generate(job.sizes)

    def run():
        sample(prompts, s.new, s.new, s.prompt)
        return {"tokens": s.rows * s.new} | check

    turns.repeat(run)


def mixed(job: Job, turns):
    (sample, check), s = sampler(job), job.sizes
    prompts, lengths = work.mixed(s)

    def run():
        for i in range(0, s.records, s.rows):
            sample(prompts[i : i + s.rows], int(lengths[i : i + s.rows].max()), s.cap, s.prompts[1])
        return {"tokens": int(lengths.sum())} | check

    turns.repeat(run)


def critique(job: Job, turns):
    (sample, check), s = sampler(job), job.sizes
    prefix, dialogues, requests = work.critique(s)

    def run():
        for i in range(0, s.critiques, 4):
            rows = [np.concatenate([prefix, d]) for d in dialogues[i : i + 4]]
            said = sample(rows, s.turn, s.turn, len(rows[0]))
            rows = [np.concatenate(parts) for parts in zip(rows, said, requests[i : i + 4], strict=True)]
            sample(rows, s.turn, s.turn, len(rows[0]))
        return {"tokens": 2 * s.critiques * s.turn} | check

    turns.repeat(run)


def decode(job: Job, turns):
    (sample, check), s, prompts = sampler(job), job.sizes, work.generate(job.sizes)
    turns.repeat(lambda: work.step_of(lambda new: sample(prompts, new, s.new, s.prompt), s) | check)


@partial(jax.jit, static_argnames="heads")
def token_logprobs(params, heads: int, tokens_BT):
    """Log-probs [B, T - 1] of the tokens behind the first, through logits [B, T, V]. Padding is on the right."""
    B, T = tokens_BT.shape
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    x, _ = forward(params, heads, tokens_BT, jnp.broadcast_to(jnp.arange(T), (B, T)), mask)
    logp = jax.nn.log_softmax(x @ params["unembed"], axis=-1)
    return jnp.take_along_axis(logp[:, :-1], tokens_BT[:, 1:, None], axis=-1)[:, :, 0]


def options(job: Job, turns):
    (params, shape), s, rows = load(job), job.sizes, work.option_rows(job.sizes)

    def run():
        parts = [rows[i : i + s.rows] for i in range(0, len(rows), s.rows)]
        scores = [np.asarray(token_logprobs(params, shape.heads, part))[:, -s.option :] for part in parts]
        return {"rows": len(rows), "check": float(np.concatenate(scores).sum())}

    turns.repeat(run)


def logprobs(job: Job, turns):
    (params, shape), tokens = load(job), work.logprobs(job.sizes)
    turns.loaded()

    def run():
        check = sum(float(np.asarray(token_logprobs(params, shape.heads, rows)).sum()) for rows in tokens)
        return {"tokens": tokens.size, "check": check}

    turns.repeat(run)


def right_padded(rows, width: int):
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, np.array([len(row) for row in rows])


def logps_of(params, heads, tokens, lengths, starts):
    """Summed log-probs [B] from `starts` on."""
    at = np.arange(1, tokens.shape[1])
    inside = (at >= starts[:, None]) & (at < lengths[:, None])
    return jnp.sum(jnp.where(inside, token_logprobs(params, heads, tokens), 0.0), axis=1)


def sft_loss(params, heads, b):
    return -logps_of(params, heads, b["tokens"], b["lengths"], b["starts"]).sum() / (b["lengths"] - 1).sum()


def reward_loss(params, heads, b):
    B, T = b["tokens"].shape
    mask = jnp.tril(jnp.ones((1, T, T), bool))
    x, _ = forward(params["trunk"], heads, b["tokens"], jnp.broadcast_to(jnp.arange(T), (B, T)), mask)
    score = x[jnp.arange(B), b["lengths"] - 1] @ params["head"]
    return -jnp.mean(jax.nn.log_sigmoid(score[::2] - score[1::2]))


def dpo_loss(params, heads, b):
    ratio = logps_of(params, heads, b["tokens"], b["lengths"], b["starts"]) - b["reference"]
    return -jnp.mean(jax.nn.log_sigmoid(0.1 * (ratio[::2] - ratio[1::2])))


def train(job: Job, turns, loss):
    """Steps of padded rows; two rows in a row are a pair."""
    (params, shape), s = load(job), job.sizes
    if job.case.startswith("sft"):
        rows = [(row, 1) for row in work.examples(s, job.case)]
    else:
        rows = [(prompt + said, len(prompt)) for prompt, *two in work.pairs(s, job.case) for said in two]
    width = s.train_length if job.case.endswith("equal") else s.train_cap
    batches = []
    for i in range(0, len(rows), s.train_rows):
        part = rows[i : i + s.train_rows]
        tokens, lengths = right_padded([row for row, _ in part], width)
        batches.append({"tokens": tokens, "lengths": lengths, "starts": np.array([start for _, start in part])})
        if loss is dpo_loss:
            of = jax.jit(logps_of, static_argnums=1)
            batches[-1]["reference"] = np.asarray(of(params, shape.heads, tokens, lengths, batches[-1]["starts"]))
    if loss is reward_loss:
        params = {"trunk": params, "head": jnp.asarray(work.head(s))}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, b):
        value, grads = jax.value_and_grad(loss)(params, shape.heads, b)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    counts = [(b["lengths"] - 1).sum() if loss is sft_loss else len(b["lengths"]) for b in batches]

    def run():
        nonlocal params, state
        losses = []
        for b in batches:
            params, state, value = step(params, state, b)
            losses.append(value)
        tokens = int(sum(b["lengths"].sum() for b in batches))
        check = np.average(jax.device_get(losses), weights=counts)
        return {"tokens": tokens, "steps": len(batches), "check": float(check)}

    turns.repeat(run)


def copy(job: Job, turns):
    """Every core copies an array of its own."""
    cores = work.cores()
    size = 1 << (20 if job.sizes is work.SMALL else 28)
    pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:

        def run():
            list(pool.map(lambda pair: np.copyto(*pair), pairs * 4))
            return {"bytes": 2 * 4 * cores * size}

        turns.repeat(run)


def products(job: Job, turns):
    n = 256 if job.sizes is work.SMALL else 4096
    a, multiply = jnp.ones((n, n), jnp.float32), jax.jit(jnp.matmul)

    def run():
        jax.block_until_ready(multiply(a, a))
        return {"operations": 2 * n**3}

    turns.repeat(run)


WORKLOADS = {"generate": generate_rows, "mixed": mixed, "critique": critique, "options": options, "logprobs": logprobs}
WORKLOADS |= {f"{kind}-{data}": partial(train, loss=loss) for data in ("equal", "mixed") for kind, loss in
              {"sft": sft_loss, "reward": reward_loss, "dpo": dpo_loss}.items()}  # fmt: skip
WORKLOADS |= {"copy": copy, "products": products, "decode": decode}

if __name__ == "__main__":
    main(WORKLOADS, "jax", "optax")
