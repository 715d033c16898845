"""PPO against the reward model (HH 2204.05862; details numbered as in "The N implementation details of RLHF with PPO"), or RLOO
or GRPO, which compare responses to one prompt instead of learning a value function.

One iteration: roll out the policy; score the responses with the reward model; per-token KL to the frozen starting model; GAE;
some epochs of minibatches. An iteration is a pure function of (state, iteration), so a run killed anywhere inside one does
it again and gets the same bits.
"""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import checkpoints, losses, optim, prompts
from cai_jax.config import Config
from cai_jax.data import bucket, load_pool, pad_rows
from cai_jax.errors import InputError, Stopped
from cai_jax.experience import experience, layout, minibatch, packed, ppo_loss, scaled_head
from cai_jax.metrics import Metrics
from cai_jax.models import LM, compute_dtype, lora
from cai_jax.models.heads import init_head
from cai_jax.models.transformer import Transformer, cast_matrices
from cai_jax.progress import Progress
from cai_jax.sampling import record_keys
from cai_jax.sections import as_dict
from cai_jax.sharding import batch_ways, put, put_batch
from cai_jax.slots import generate
from cai_jax.stages import (
    Start,
    adapts,
    inputs_of,
    load_constitution,
    load_scorer,
    load_start,
    root,
    same_texts,
    start_of,
    stream,
    trunk,
)
from cai_jax.train import TrainState, init_state, make_train_step, put_parts, resumed
from cai_jax.watch import Watch, beside
from cai_jax.workdir import begin, finish, outputs, stopping

STAGE, NAME = "ppo", "rl_cai"


class Frozen(NamedTuple):
    """What every iteration reads and none changes."""

    net: Transformer  # of the policy and the value function
    params: dict  # what is not trained of both
    reference: LM  # where the policy starts
    reward: LM  # params {"trunk", "head"}
    templates: dict | None  # of the reward model, where it reads other tokens than the policy writes
    scale: dict  # mean and std of its scores


class PPOState(NamedTuple):
    train: TrainState  # params {"policy": ..., "value": {"head": ..., "trunk": ... when separate}, if it is learnt}
    kl_coef: jax.Array  # float32
    iteration: jax.Array  # int32, iterations done


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes ppo/checkpoints, ppo/model (the policy), ppo/metrics.jsonl and, where it is watched, ppo/watch and
    ppo/dynamics.json (see watch.py)."""
    folder, c = workdir / STAGE, cfg.ppo
    after = ("reward", *beside(cfg)) + (("sft",) if c.init == "sft" else ())
    files = {"redteam": cfg.data.redteam, "helpful": cfg.data.helpful}
    watched = {"watch": cfg.evaluate.redteam} if c.evaluate_every else {}
    inputs = inputs_of(cfg, workdir, STAGE, files | watched, after, (NAME, "reward", *beside(cfg)))
    inputs["watch"] = as_dict(cfg.evaluate.sampling) if c.evaluate_every else None
    if not begin(STAGE, workdir, inputs):
        return False
    start, key = load_start(cfg, workdir, mesh, NAME), stream(cfg, STAGE)
    pool = PromptPool(cfg, start.lm, load_constitution(cfg, NAME).templates)
    trained, frozen = models(cfg, workdir, mesh, start, key)
    if frozen.templates:
        pool.measure(frozen)
    del start  # its float32 weights, where the reference is of another dtype
    tx = optim.make(c.optimizer, c.iterations * c.epochs * c.minibatches)
    state = PPOState(init_state(trained, tx, mesh), jnp.float32(c.kl_coef), jnp.int32(0))
    step = make_train_step(ppo_loss(frozen.net, c), tx, mesh)
    watch = Watch(cfg, workdir, mesh, frozen.reward, frozen.reference) if c.evaluate_every else None
    state = iterate(cfg, folder, mesh, state, step, frozen, pool, watch, key)
    checkpoints.save_model(folder, state.train.params["policy"])
    counts = {"iterations": c.iterations, "rollouts": c.iterations * c.batch_size, "updates": int(state.train.step)}
    counts |= {"prompts": pool.counted} | ({"alarms": watch.summarise()} if watch else {})
    files = ("dynamics.json",) if watch else ()
    finish(STAGE, workdir, counts, files, model=checkpoints.fingerprint(state.train.params["policy"]))
    return True


def models(cfg: Config, workdir: Path, mesh, start: Start, key) -> tuple[dict, Frozen]:
    """-> (the parameters that are trained, {"policy", "value"}, without a value function only the first; what stays)."""
    own, dtype = not same_texts(cfg, "reward", NAME), compute_dtype(cfg.model.compute_dtype)
    adapter = adapts(cfg, STAGE)
    have = (root(cfg, NAME), start.frozen) if adapter else ()
    reward = load_scorer(cfg, workdir, mesh, "reward", dtype if own or adapter else jnp.dtype(cfg.model.trained_dtype), have)
    scale, head = outputs("reward", workdir)["scale"], put({"head": init_head(key, start.lm.cfg.width, 0.0)}, mesh)["head"]
    value, frozen = {"head": head}, {"policy": start.frozen}  # N 10: a head that starts at zero
    if cfg.ppo.advantage == "gae" and cfg.ppo.value_network == "separate":
        first = start  # N+: starts as the reward model, on the returns' scale
        if not own:
            first = start_of(cfg, reward._replace(params=reward.params["trunk"]), STAGE, mesh)
            value["head"] = scaled_head(reward.params["head"], scale)
        value["trunk"], frozen["value"] = trunk(first.trained), {"trunk": trunk(first.frozen)}
    trained = {"policy": start.trained} | ({"value": value} if cfg.ppo.advantage == "gae" else {})
    trained = jax.tree.map(jnp.copy, trained)  # steps donate what they are given
    reward = reward._replace(params=cast_matrices(reward.params, dtype))
    reference = start.lm._replace(params=cast_matrices(start.lm.params, dtype))
    templates = load_constitution(cfg, "reward").templates if own else None
    return trained, Frozen(start.net, frozen, reference, reward, templates, scale)


def iterate(cfg: Config, folder: Path, mesh, state: PPOState, step, frozen: Frozen, pool, watch, key) -> PPOState:
    """All iterations that are left, with checkpoints."""
    c = cfg.ppo
    saver = checkpoints.Saver(folder / "checkpoints")
    state = resumed(saver.folder, state, mesh)
    start = int(state.iteration)
    log = Metrics(folder, start)
    if watch and not watch.began():
        watch(frozen.reference, 0)
    with Progress(STAGE, c.iterations, start, "iteration") as progress:
        for t in range(start, c.iterations):
            state, metrics, seconds = iteration(cfg, mesh, state, step, frozen, pool, jax.random.fold_in(key, t), t)
            last = t + 1 == c.iterations
            if watch and watch.due(t + 1):
                params = lora.join(frozen.params["policy"], state.train.params["policy"])
                metrics |= watch(frozen.reference._replace(cfg=frozen.net.cfg, params=params), t + 1)
            progress.update(t + 1, log.add(t, metrics, seconds))
            stop = stopping()
            if last or stop or (t + 1) % c.checkpoint_every == 0:
                log.save()
                saver.save(t + 1, state)
            if stop and not last:
                saver.close()
                raise Stopped(
                    f"ppo stopped on request after iteration {t + 1} of {c.iterations}; the same command goes on from there"
                )
    saver.close()
    return state


def iteration(cfg: Config, mesh, state: PPOState, step, frozen: Frozen, pool, key, t: int) -> tuple[PPOState, dict, dict]:
    """Rollout, scoring, advantages, epochs. -> (state, metrics, seconds by phase)."""
    c = cfg.ppo
    net, reference = frozen.net, frozen.reference
    clock = [time.monotonic()]
    arrays, asked = pool.batch_at(t)
    batch, params = put_batch(arrays, mesh), lora.join(frozen.params, state.train.params)
    addresses = put_batch({"a": np.stack([np.arange(c.batch_size), np.full(c.batch_size, t)], 1).astype(np.uint32)}, mesh)["a"]
    out = generate(
        net,
        params["policy"],
        batch["tokens"],
        batch["lengths"],
        record_keys(key, addresses),
        jnp.array(reference.tok.stop_ids, jnp.int32),
        jnp.float32(c.sampling.temperature),
        max_new=c.sampling.max_tokens,
        gather=c.sampling.gather,
        cache=c.sampling.cache,
    )
    jax.block_until_ready(out)
    clock.append(time.monotonic())
    read = put_batch(again(frozen, asked, out, pool.reread), mesh) if frozen.templates else None
    nets = net, reference.net(), frozen.reward.net()
    weights = params, reference.params, frozen.reward.params
    pack = packer(c, arrays, out, mesh)
    texts, at = pack(range(c.batch_size))
    at = put_batch(at, mesh)
    rollout, metrics = experience(nets, c, weights, frozen.scale, state.kl_coef, batch["helpful"], out, texts, at, read)
    metrics = {k: float(v) for k, v in metrics.items()}
    if not metrics["drift"] <= c.max_drift:
        raise InputError(
            f"ppo iteration {t}: sampler and scorer disagree by {metrics['drift']:.4g} nats per token on the same tokens, "
            f"wanted at most {c.max_drift} (--config.ppo.max_drift); bfloat16 gives hundredths in deep models, float32 1e-5; "
            "more means that two forwards differ"
        )
    clock.append(time.monotonic())
    train, updates = state.train, []
    for epoch in range(c.epochs):
        order = np.random.default_rng([cfg.seed, t, epoch]).permutation(c.batch_size)
        for index in np.split(order, c.minibatches):
            train, values = step(train, frozen.params, minibatch(rollout, pack(index)[0]), key)
            updates.append(values)
        if c.target_kl and np.mean([float(u["approx_kl"]) for u in updates[-c.minibatches :]]) > c.target_kl:
            break
    updates = jax.device_get(updates)
    metrics |= {name: float(np.mean([u[name] for u in updates])) for name in updates[0]}
    metrics |= {"first_ratio_error": float(updates[0]["ratio_error"]), "updates": len(updates), "kl_coef": float(state.kl_coef)}
    metrics = {k: v for k, v in metrics.items() if k not in ("ratio_error", "weight")}
    coef = state.kl_coef
    if c.kl_adaptive:
        coef = losses.adapt_kl_coef(coef, jnp.float32(metrics["kl"]), c.kl_target, c.kl_horizon, c.batch_size).astype(
            jnp.float32
        )
    clock.append(time.monotonic())
    phases = dict(zip(("rollout", "score", "update"), np.round(np.diff(clock), 4).tolist(), strict=True))
    return PPOState(train, coef, state.iteration + 1), metrics, phases


def packer(c, arrays: dict, out, mesh):
    """-> f(index): those rollouts in parts on the mesh, and where things lie in them (see experience.packed). The size of parts
    goes by their number and by the longest texts there could be."""
    P, R = arrays["tokens"].shape[1], c.sampling.max_tokens
    said, lengths_B = jax.device_get((out.tokens_BR, out.lengths_B))
    both = zip(arrays["tokens"], arrays["lengths"], said, lengths_B, strict=True)
    rows = [np.concatenate([prompt[:n], response[:m]]) for prompt, n, response, m in both]

    def pack(index):
        texts, at = packed(rows, arrays["lengths"], index, layout(len(index), P + R, batch_ways(mesh)), R)
        return put_parts(texts, mesh), at

    return pack


def again(frozen: Frozen, asked: list[list[dict]], out, width: int = 0) -> dict:
    """The rollouts as another tokenizer reads them, for a reward model with a checkpoint of its own: the last tokens of its
    context. -> host arrays tokens [B, T], lengths [B]; T is at least `width`, to be the same in every iteration."""
    wrote, lm, rows = frozen.reference.tok, frozen.reward, []
    tokens, lengths, finished = jax.device_get((out.tokens_BR, out.lengths_B, out.finished_B))
    for messages, ids, n, whole in zip(asked, tokens, lengths, finished, strict=True):
        said = prompts.completion(wrote.decode(ids[:n]), frozen.templates)
        row = lm.tok.prompt(prompts.dialogue(messages, frozen.templates)) + lm.tok.encode(said)
        rows.append((row + [lm.tok.eos_id] if whole else row)[-lm.cfg.max_length :])
    tokens, lengths = pad_rows(rows, max(width, bucket(max(map(len, rows)))))
    return {"tokens": tokens, "lengths": lengths}


class PromptPool:
    """The prompts of an iteration: helpful_share of them helpful, in an order of their own per pass."""

    def __init__(self, cfg: Config, lm, templates):
        c = self.c = cfg.ppo
        self.seed = cfg.seed
        self.rows, self.counted = {}, {}
        for name in ("redteam", "helpful"):
            pool, self.counted[name] = load_pool(cfg.data, name, lm.tok, templates)
            self.rows[name] = [(lm.tok.prompt(prompts.dialogue(p["messages"], templates)), p["messages"]) for p in pool]
        longest = max(len(ids) for rows in self.rows.values() for ids, _ in rows)
        if longest + c.sampling.max_tokens > lm.cfg.max_length:
            raise InputError(
                f"ppo: the longest prompt has {longest} tokens; with --config.ppo.sampling.max_tokens={c.sampling.max_tokens} "
                f"it passes the model's context of {lm.cfg.max_length}; --config.data.max_prompt leaves long prompts out"
            )
        self.length, self.reread = bucket(longest), 0
        helpful = c.group * round(c.batch_size * c.helpful_share / c.group)
        self.counts = {"redteam": c.batch_size - helpful, "helpful": helpful}

    def measure(self, frozen: Frozen) -> None:
        """`reread`: room for every prompt in the reward model's tokens, and for twice as many of a response as the policy's."""
        lm, asked = frozen.reward, [messages for rows in self.rows.values() for _, messages in rows]
        longest = max(len(lm.tok.prompt(prompts.dialogue(messages, frozen.templates))) for messages in asked)
        self.reread = bucket(min(longest + 2 * self.c.sampling.max_tokens, lm.cfg.max_length))

    def batch_at(self, t: int) -> tuple[dict, list[list[dict]]]:
        """-> (host arrays, the conversations that they are)."""
        rows = []
        for name, count in self.counts.items():
            pool = self.rows[name]
            several = count // self.c.group
            for i in range(t * several, (t + 1) * several):
                order = np.random.default_rng([self.seed, *name.encode(), i // len(pool)]).permutation(len(pool))
                rows += [pool[order[i % len(pool)]]] * self.c.group
        tokens, lengths = pad_rows([ids for ids, _ in rows], self.length)
        helpful = np.repeat(np.array([0.0, 1.0], np.float32), [self.counts["redteam"], self.counts["helpful"]])
        return {"tokens": tokens, "lengths": lengths, "helpful": helpful}, [messages for _, messages in rows]
