"""Our side, through what the stages call: text in and out of the engine, batches of data.py and pairs.py, train.py's step."""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import work
from worker import Job, main

from cai_jax import generate as generate_texts
from cai_jax import optim, records, slots, tokenizer, train
from cai_jax.config import PPO, Optimizer, Sampling
from cai_jax.data import pack, pad_rows
from cai_jax.experience import ppo_loss
from cai_jax.generate import Chain, Request, sample_chains, sample_texts
from cai_jax.logprobs import target_logprobs
from cai_jax.models import LM, hf
from cai_jax.pairs import Pairs, batches, fork
from cai_jax.score import hidden_states, option_logprobs, row_batch
from cai_jax.sharding import batch_ways, make_mesh, put_batch
from cai_jax.slots import ready
from cai_jax.stages import dpo, ppo, reward

LAYERS = {"unrolled": False}  # of training, as --config.model.layers=scanned
RATE = Optimizer(learning_rate=1e-9, final_ratio=1.0)  # no weight moves, so that everybody's losses stay comparable


class Endless(tokenizer.Tokenizer):
    """No token ends a text, for everybody's texts have the lengths of work.py."""

    stop_ids = ()


def load(job: Job) -> tuple[jax.sharding.Mesh, LM]:
    """The mesh is in scope from here on."""
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    jax.set_mesh(mesh)
    path, tok = str(job.folder), tokenizer.load(str(job.folder))
    return mesh, LM(hf.read_config(path), jnp.dtype("float32"), hf.load(path, mesh), Endless(tok.hf, tok.eos_id, tok.pad_id))


class Engine:
    """generate.py's functions with the settings of the benchmarks; every run is a stage of its own."""

    def __init__(self, job: Job, new: int):
        self.mesh, lm = load(job)
        self.lm = ready(lm)  # as the stages do, once for all calls
        self.sampling = Sampling(top_p=job.sizes.top_p, max_tokens=new, batch_size=job.sizes.rows)
        self.folder, self.runs = Path(tempfile.mkdtemp()), itertools.count()
        first = Request("greedy", work.text(work.generate(job.sizes)[0]), temperature=0.0, max_tokens=8)
        self.check = {"check": [int(word) for word in self.texts([first])[0]["text"].split()]}

    def run(self, f, asked, **options):
        n = next(self.runs)
        journal = records.Journal(self.folder / f"run{n}" / "journal.jsonl")
        return f(self.lm, asked, self.sampling, n, journal, self.mesh, stoppable=False, **options)

    def texts(self, requests: list[Request]) -> list[dict]:
        return self.run(sample_texts, requests)


def generate(job: Job, turns):
    s, prompts = job.sizes, map(work.text, work.generate(job.sizes))
    engine, requests = Engine(job, s.new), [Request(f"{i}", text) for i, text in enumerate(prompts)]
    turns.repeat(lambda: {"tokens": sum(said["tokens"] for said in engine.texts(requests))} | engine.check)


def mixed(job: Job, turns):
    s, (prompts, lengths) = job.sizes, work.mixed(job.sizes)
    engine = Engine(job, s.cap)
    asked = zip(prompts, lengths.tolist(), strict=True)
    requests = [Request(f"{i}", work.text(ids), max_tokens=n) for i, (ids, n) in enumerate(asked)]
    turns.repeat(lambda: {"tokens": sum(said["tokens"] for said in engine.texts(requests))} | engine.check)


def critique(job: Job, turns):
    s, engine = job.sizes, Engine(job, job.sizes.turn)
    prefix, dialogues, requests = work.critique(s)
    examples = work.text(prefix)

    def revise(i: int) -> Chain:
        context = f"{examples} {work.text(dialogues[i])}"
        said = yield Request(f"{i}/critique", context)
        revised = yield Request(f"{i}/revision", f"{context} {said['text']} {work.text(requests[i])}")
        return said["tokens"] + revised["tokens"]

    def run():
        made = engine.run(sample_chains, {f"{i}": revise(i) for i in range(s.critiques)}, prefix=examples)
        return {"tokens": sum(made.values())} | engine.check

    turns.repeat(run)


def apart(job: Job, turns):
    """The same texts with nothing shared: every context is read whole, all critiques and then all revisions."""
    s, engine = job.sizes, Engine(job, job.sizes.turn)
    prefix, dialogues, requests = work.critique(s)
    generate_texts.common = lambda texts: []

    def said(kind: str, contexts: list[str]) -> list[dict]:
        return engine.texts([Request(f"{i}/{kind}", context) for i, context in enumerate(contexts)])

    def run():
        contexts = [f"{work.text(prefix)} {work.text(ids)}" for ids in dialogues]
        first = said("critique", contexts)
        asked = zip(contexts, first, requests, strict=True)
        then = said("revision", [f"{context} {x['text']} {work.text(ids)}" for context, x, ids in asked])
        return {"tokens": sum(x["tokens"] for x in first + then)} | engine.check

    turns.repeat(run)


def decode(job: Job, turns):
    s, engine, prompts = job.sizes, Engine(job, job.sizes.new), [work.text(ids) for ids in work.generate(job.sizes)]

    def sample(new: int):
        engine.texts([Request(f"{i}", text, max_tokens=new) for i, text in enumerate(prompts)])

    turns.repeat(lambda: work.step_of(sample, s) | engine.check)


def step_products(job: Job, turns):
    """What XLA takes for the products of a decoding step, laid out as models.layers.turned lays them."""
    shapes, rows = work.decode_matrices(job.sizes), job.sizes.rows
    draw = jax.jit(jax.random.uniform, static_argnums=1)
    matrices = [draw(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    inputs = {n: draw(jax.random.key(n), (n, rows)) for _, n in shapes}
    multiply = jax.jit(lambda matrices, inputs: [matrix @ inputs[matrix.shape[1]] for matrix in matrices])
    turns.repeat(lambda: work.products_alone(lambda: jax.block_until_ready(multiply(matrices, inputs))))


def options(job: Job, turns):
    (mesh, lm), s = load(job), job.sizes
    contexts = [work.text(ids) for ids in work.option_contexts(s)]
    two = tuple(f" {work.text(ids)}" for ids in work.options(s)[3])

    def run():
        logp = option_logprobs(lm, contexts, s.rows, mesh, "options", two)
        return {"rows": logp.size, "check": float(logp.sum())}

    turns.repeat(run)


def logprobs(job: Job, turns):
    (_, lm), tokens = load(job), work.logprobs(job.sizes)
    turns.loaded()
    net, full = lm.net(**LAYERS), np.full(*tokens.shape[1:], np.int32)

    @jax.jit
    def score(params, tokens, lengths):
        hidden = hidden_states(net, params, row_batch(tokens, lengths))
        return target_logprobs(net, params, hidden[:, :-1], tokens[:, 1:])[0]

    def run():
        check = sum(float(np.asarray(score(lm.params, rows, full)).sum()) for rows in tokens)
        return {"tokens": tokens.size, "check": check}

    turns.repeat(run)


def steps(turns, mesh, loss_fn, params, data: list[dict], tokens: int):
    """A run is one step for each batch of `data`."""
    tx = optim.make(RATE, 1000)
    step, state, key = train.make_train_step(loss_fn, tx, mesh), train.init_state(params, tx, mesh), jax.random.key(0)

    def run():
        nonlocal state
        losses, weights = [], []
        for batch in data:
            state, metrics = step(state, {}, put_batch(batch, mesh), key)
            losses.append(metrics["loss"])
            weights.append(metrics["weight"])
        losses, weights = jax.device_get((losses, weights))
        return {"tokens": tokens, "steps": len(data), "check": float(np.average(losses, weights=weights))}

    turns.repeat(run)


def sft(job: Job, turns):
    (mesh, lm), s, texts = load(job), job.sizes, work.examples(job.sizes, job.case)
    length, rows = s.train_length, s.train_rows
    if job.case.endswith("mixed"):  # as many tokens a step
        length, rows = s.train_cap, rows * length // s.train_cap
    arrays = pack([(ids, 1) for ids in texts], length, records.Drops())
    fill = -len(arrays["tokens"]) % rows
    arrays = {k: np.concatenate([x, np.zeros((fill, *x.shape[1:]), x.dtype)]) for k, x in arrays.items()}
    data = [{k: x[i : i + rows] for k, x in arrays.items()} for i in range(0, len(arrays["tokens"]), rows)]
    steps(turns, mesh, train.language_model_loss(lm.net(**LAYERS)), lm.params, data, sum(map(len, texts)))


def encoded(job: Job) -> tuple[Pairs, int]:
    """Pairs as trees, and how many tokens they are as rows."""
    found = work.pairs(job.sizes, job.case)
    N = len(found)
    columns = {name: np.ones(N, np.float32) for name in ("p_a", "human")}
    starts = np.array([len(prompt) for prompt, *_ in found], np.int32)
    pairs = Pairs([fork(*pair) for pair in found], starts, columns, np.arange(N, dtype=np.int32), np.ones(N, bool))
    return pairs, sum(len(prompt + said) for prompt, *two in found for said in two)


def a_pass(pairs: Pairs, job: Job, mesh) -> list[dict]:
    batch_at, count = batches(pairs, job.sizes.train_rows // 2, 1, 0, job.case, batch_ways(mesh))
    return [batch_at(t) for t in range(count)]


def trunk_and_head(job: Job, params) -> dict:
    head = {"kernel": jnp.asarray(work.head(job.sizes))[:, None], "bias": jnp.zeros(1)}
    return {"trunk": {k: v for k, v in params.items() if k != "unembed"}, "head": head}


def reward_steps(job: Job, turns):
    (mesh, lm), (pairs, tokens) = load(job), encoded(job)
    params = trunk_and_head(job, lm.params)
    steps(turns, mesh, reward.reward_loss(lm.net(**LAYERS)), params, a_pass(pairs, job, mesh), tokens)


def dpo_steps(job: Job, turns):
    (mesh, lm), (pairs, tokens) = load(job), encoded(job)
    ahead = dpo.reference_logprobs(lm.net(), lm.params, pairs, job.sizes.train_rows // 2, mesh)
    pairs.columns.update(reference_a=ahead[:, 0], reference_b=ahead[:, 1])
    steps(turns, mesh, dpo.preference_loss(lm.net(**LAYERS), 0.1), lm.params, a_pass(pairs, job, mesh), tokens)


def of_lengths(counts):
    """The rollouts of slots.generate, as if row i had ended after counts[i] tokens: they end with the longest."""
    longest = int(counts.max())
    live = np.arange(longest)[None] < counts[:, None]

    def generate(*args, max_new, **options):
        out = slots.generate(*args, max_new=longest, **options)
        tokens, logp = (jnp.pad(jnp.where(live, x, 0), ((0, 0), (0, max_new - longest))) for x in (out.tokens_BR, out.logp_BR))
        return slots.Sampled(tokens, jnp.asarray(counts), out.finished_B | True, logp)

    return generate


def ppo_iteration(job: Job, turns):
    (mesh, lm), s = load(job), job.sizes
    c = PPO(batch_size=s.rows, epochs=s.epochs, minibatches=1, missing_eos_penalty=0.0, optimizer=RATE)
    c = replace(c, sampling=Sampling(max_tokens=s.cap if job.case == "ppo-mixed" else s.new, batch_size=s.rows))
    net, scored = lm.net(unrolled=True), trunk_and_head(job, lm.params)  # --config.model.layers=unrolled, faster for parts
    frozen = ppo.Frozen(net, {}, lm, lm._replace(params=scored), None, {"mean": 0.0, "std": 1.0})
    prompts, counts = work.rollouts(s, job.case)
    tokens, lengths = pad_rows(prompts, None if job.case == "ppo-mixed" else s.prompt)
    batch = {"tokens": tokens, "lengths": lengths, "helpful": np.ones(s.rows, np.float32)}
    if job.case == "ppo-mixed":
        ppo.generate = of_lengths(counts)
    pool, cfg = SimpleNamespace(batch_at=lambda t: (batch, None)), SimpleNamespace(seed=0, ppo=c)
    tx = optim.make(RATE, 1000)
    trained = jax.tree.map(jnp.copy, {"policy": lm.params, "value": scored})  # steps donate what they are given
    state = ppo.PPOState(train.init_state(trained, tx, mesh), jnp.float32(c.kl_coef), jnp.int32(0))
    step = train.make_train_step(ppo_loss(net, c), tx, mesh)

    def run():
        nonlocal state
        t = int(state.iteration)
        state, _, seconds = ppo.iteration(cfg, mesh, state, step, frozen, pool, jax.random.key(t), t)
        return {"tokens": int(counts.sum())} | seconds

    turns.repeat(run)


TRAINING = {"sft": sft, "reward": reward_steps, "dpo": dpo_steps}
WORKLOADS = {"generate": generate, "mixed": mixed, "critique": critique, "options": options, "logprobs": logprobs}
WORKLOADS |= {f"{kind}-{data}": f for data in ("equal", "mixed") for kind, f in TRAINING.items()}
WORKLOADS |= {"ppo-equal": ppo_iteration, "ppo-mixed": ppo_iteration, "critique:apart": apart}
WORKLOADS |= {"decode": decode, "decode:products": step_products}

if __name__ == "__main__":
    main(WORKLOADS, "jax", "flax", "optax")
