"""PPO against the reward model (HH 2204.05862; details numbered as in "The N implementation details of RLHF with PPO").

One iteration: roll out the policy; score the responses with the reward model; per-token KL to the frozen starting model; GAE;
some epochs of minibatches. An iteration is a pure function of (state, iteration), so a run killed anywhere inside one does
it again and gets the same bits.
"""

import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import checkpoints, losses, optim, prompts
from cai_jax.config import Config, as_dict
from cai_jax.data import bucket, load_prompts, pad_rows
from cai_jax.evaluation import Watch
from cai_jax.generate import generate
from cai_jax.metrics import Metrics
from cai_jax.models import LM
from cai_jax.models.heads import apply_head, init_head
from cai_jax.models.transformer import Transformer, cast_matrices
from cai_jax.progress import Progress
from cai_jax.sampling import record_keys
from cai_jax.score import hidden_states, reward_scores, row_batch, target_logprobs
from cai_jax.sharding import put, put_batch
from cai_jax.stages import OF_INIT, inputs_of, load_constitution, load_lm, load_reward, stream
from cai_jax.train import TrainState, abstract, init_state, make_train_step
from cai_jax.workdir import InputError, Stopped, begin, finish, outputs, stopping

STAGE = "ppo"


class Frozen(NamedTuple):
    """What every iteration reads and none changes."""

    net: Transformer
    reference: LM  # where the policy starts
    reward: dict  # params {"trunk", "head"}
    scale: dict  # mean and std of its scores


class PPOState(NamedTuple):
    train: TrainState  # params {"policy": ..., "value": {"head": ..., "trunk": ... when separate}}
    kl_coef: jax.Array  # float32
    iteration: jax.Array  # int32, iterations done


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes ppo/checkpoints, ppo/model (the policy) and ppo/metrics.jsonl."""
    folder, c = workdir / STAGE, cfg.ppo
    after = ("reward",) + (("sft",) if c.init == "sft" else ())
    files = {"redteam": cfg.data.redteam, "helpful": cfg.data.helpful, "watch": cfg.evaluate.redteam}
    inputs = inputs_of(cfg, workdir, STAGE, files, after) | {"limits": [cfg.data.max_redteam, cfg.data.max_helpful]}
    inputs["watch"] = as_dict(cfg.evaluate.sampling)
    if not begin(STAGE, workdir, inputs):
        return False
    start = load_lm(cfg, workdir, mesh, OF_INIT[c.init], trained=True)
    reference = start._replace(params=cast_matrices(start.params, start.dtype))
    reward, scale = load_reward(start, workdir, mesh), outputs("reward", workdir)["scale"]
    pool = PromptPool(cfg, reference, load_constitution(cfg).templates)
    net, key = reference.net(remat=cfg.model.remat), stream(cfg, STAGE)
    if c.value_network == "separate":
        value = reward | {"head": scaled_head(reward["head"], scale)}  # N+: starts as the reward model, on the returns' scale
    else:
        value = put({"head": init_head(key, reference.cfg.width, 0.0)}, mesh)  # N 10: a head that starts at zero
    params = jax.tree.map(jnp.copy, {"policy": start.params, "value": value})  # steps donate what they are given
    reward = cast_matrices(reward, start.dtype)
    tx = optim.make(c.optimizer, c.iterations * c.epochs * c.minibatches)
    state = PPOState(init_state(params, tx, mesh), jnp.float32(c.kl_coef), jnp.int32(0))
    step = make_train_step(ppo_loss(net, c), tx, mesh)
    watch = Watch(cfg, folder, mesh) if c.evaluate_every else None
    state = iterate(cfg, folder, mesh, state, step, Frozen(net, reference, reward, scale), pool, watch, key)
    checkpoints.save_model(folder, state.train.params["policy"])
    counts = {"iterations": c.iterations, "rollouts": c.iterations * c.batch_size, "updates": int(state.train.step)}
    finish(STAGE, workdir, {"model": checkpoints.fingerprint(state.train.params["policy"])}, counts)
    return True


def iterate(cfg: Config, folder: Path, mesh, state: PPOState, step, frozen: Frozen, pool, watch, key) -> PPOState:
    """All iterations that are left, with checkpoints."""
    c = cfg.ppo
    saver = checkpoints.Saver(folder / "checkpoints")
    if checkpoints.steps(saver.folder):
        state = checkpoints.restore(saver.folder, abstract(state, mesh))
    start = int(state.iteration)
    log = Metrics(folder, start)
    with Progress(STAGE, c.iterations, start, "iteration") as progress:
        for t in range(start, c.iterations):
            state, metrics, seconds = iteration(cfg, mesh, state, step, frozen, pool, jax.random.fold_in(key, t), t)
            last = t + 1 == c.iterations
            if watch and ((t + 1) % c.evaluate_every == 0 or last):
                metrics |= watch(frozen.reference._replace(params=state.train.params["policy"]), t)
            progress.update(t + 1, log.add(t, metrics, seconds))
            stop = stopping()
            if last or stop or (t + 1) % c.checkpoint_every == 0:
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
    net, reference, reward, scale = frozen
    clock = [time.monotonic()]
    batch = put_batch(pool.batch_at(t), mesh)
    addresses = put_batch({"a": np.stack([np.arange(c.batch_size), np.full(c.batch_size, t)], 1).astype(np.uint32)}, mesh)["a"]
    out = generate(
        net,
        state.train.params["policy"],
        batch["tokens"],
        batch["lengths"],
        record_keys(key, addresses),
        jnp.array(reference.tok.stop_ids, jnp.int32),
        jnp.float32(c.sampling.temperature),
        max_new=c.sampling.max_tokens,
    )
    jax.block_until_ready(out)
    clock.append(time.monotonic())
    rollout, metrics = experience(net, c, state.train.params, reference.params, reward, scale, state.kl_coef, batch, out)
    metrics = {k: float(v) for k, v in metrics.items()}
    if not metrics["drift"] <= c.max_drift:
        raise InputError(
            f"ppo iteration {t}: sampler and scorer disagree by {metrics['drift']:.4g} nats per token on the same tokens, "
            f"wanted at most {c.max_drift} (--config.ppo.max_drift); with bfloat16 a few thousandths are usual, more means "
            "that two forwards differ"
        )
    clock.append(time.monotonic())
    train, updates = state.train, []
    size = c.batch_size // c.minibatches
    for epoch in range(c.epochs):
        order = np.random.default_rng([cfg.seed, t, epoch]).permutation(c.batch_size)
        for m in range(c.minibatches):
            train, values = step(train, take(rollout, jnp.asarray(order[m * size : (m + 1) * size])), key)
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


def scaled_head(head, scale):
    """A reward head whose output is centred and scaled as the scores that PPO learns from are."""
    return {"kernel": head["kernel"] / scale["std"], "bias": (head["bias"] - scale["mean"]) / scale["std"]}


@jax.jit
def take(rollout, index):
    """Rows of every array, as a batch on the mesh."""
    return jax.tree.map(lambda x: x[index], rollout)


def join(tokens_BP, lengths_B, response_BR):
    """Prompt and response contiguous in each row: [B, P + R]."""
    P, R = tokens_BP.shape[1], response_BR.shape[1]
    at = jnp.arange(P + R)[None]
    source = jnp.where(at < lengths_B[:, None], at, jnp.clip(at - lengths_B[:, None] + P, 0, P + R - 1))
    return jnp.take_along_axis(jnp.concatenate([tokens_BP, response_BR], axis=1), source, axis=1)


def before_each(hidden_BTD, lengths_B, R: int):
    """Hidden states that predict the R response positions: those one place earlier. -> [B, R, D]."""
    at = lengths_B[:, None] - 1 + jnp.arange(R)[None]
    return jnp.take_along_axis(hidden_BTD, jnp.clip(at, 0, hidden_BTD.shape[1] - 1)[:, :, None], axis=1)


def policy_and_value(net, params, batch, temperature: float):
    """Log-probs, entropies and values of the response positions, each [B, R] in float32."""
    R = batch["response"].shape[1]
    rows = row_batch(batch["joined"], batch["lengths"] + batch["response_lengths"])
    hidden = before_each(hidden_states(net, params["policy"], rows), batch["lengths"], R)
    logp, entropy = target_logprobs(net, params["policy"], hidden, batch["response"], temperature)
    if "trunk" in params["value"]:
        hidden = before_each(hidden_states(net, params["value"]["trunk"], rows), batch["lengths"], R)
    return logp, entropy, apply_head(params["value"]["head"], hidden)


@partial(jax.jit, static_argnames=("net", "c"))
def experience(net, c, params, reference, reward, scale, kl_coef, batch, out):
    """What an iteration learns from. -> (rollout arrays [B, ...], metrics).

    The score is the reward model's, centred and scaled by the red-team responses it was held out on, less a penalty where no
    EOS came (as TRL does; N 12 puts a constant in its place); it lands on the last token. The KL penalty is per token (N 15).
    """
    B, R = out.tokens_BR.shape
    mask = (jnp.arange(R)[None] < out.lengths_B[:, None]).astype(jnp.float32)
    rollout = {
        "joined": join(batch["tokens"], batch["lengths"], out.tokens_BR),
        "lengths": batch["lengths"],
        "response": out.tokens_BR,
        "response_lengths": out.lengths_B,
        "mask": mask,
    }
    logp, _, values = (x * mask for x in policy_and_value(net, params, rollout, c.sampling.temperature))
    frozen_pair = {"policy": reference, "value": {"head": reward["head"]}}
    ref_logp = mask * policy_and_value(net, frozen_pair, rollout, c.sampling.temperature)[0]
    raw = reward_scores(net, reward, rollout["joined"], batch["lengths"] + out.lengths_B)
    score = (raw - scale["mean"]) / scale["std"] - c.missing_eos_penalty * (~out.finished_B).astype(jnp.float32)
    rewards = losses.token_rewards(score, logp, ref_logp, out.lengths_B, kl_coef)
    advantages, returns = losses.gae(rewards, values, mask, c.discount, c.gae_lambda)
    helpful = batch["helpful"]
    metrics = {
        "reward": jnp.mean(jnp.sum(rewards, axis=1)),
        "score": jnp.mean(score),
        "score_redteam": losses.masked_mean(score, 1 - helpful),
        "score_helpful": losses.masked_mean(score, helpful),
        "kl": jnp.mean(jnp.sum(losses.kl_k1(logp, ref_logp) * mask, axis=1)),
        "kl_k3": jnp.mean(jnp.sum(losses.kl_k3(logp, ref_logp) * mask, axis=1)),
        "response_length": jnp.mean(out.lengths_B.astype(jnp.float32)),
        "eos_rate": jnp.mean(out.finished_B.astype(jnp.float32)),
        "drift": losses.masked_mean(jnp.abs(logp - out.logp_BR), mask),
        "explained_variance": losses.explained_variance(values, returns, mask),
    }
    if c.whiten_advantages:
        advantages = losses.whiten(advantages, mask)
    rollout |= {"old_logp": logp, "old_values": values, "advantages": advantages, "returns": returns}
    return rollout, metrics


def ppo_loss(net, c):
    """loss_fn(params, minibatch, key): clipped policy and value losses on the rollout of `experience`."""

    def loss_fn(params, batch, key):
        logp, entropy, values = policy_and_value(net, params, batch, c.sampling.temperature)
        mask = batch["mask"]
        policy, clipped = losses.ppo_policy_loss(logp, batch["old_logp"], batch["advantages"], mask, c.clip)
        value = losses.ppo_value_loss(values, batch["old_values"], batch["returns"], mask, c.value_clip)
        entropy = losses.masked_mean(entropy, mask)
        log_ratio = (logp - batch["old_logp"]) * mask
        metrics = {
            "policy_loss": policy,
            "value_loss": value,
            "entropy": entropy,
            "clip_fraction": clipped,
            "approx_kl": losses.masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
            "weight": jnp.sum(mask),
            "ratio_error": jnp.max(jnp.abs(jnp.expm1(log_ratio))),
        }
        return policy + c.value_coef * value - c.entropy_coef * entropy, metrics

    return loss_fn


class PromptPool:
    """The prompts of an iteration: helpful_share of them helpful, in an order of their own per pass."""

    def __init__(self, cfg: Config, lm, templates):
        c = self.c = cfg.ppo
        self.seed = cfg.seed
        files = (("redteam", cfg.data.redteam, cfg.data.max_redteam), ("helpful", cfg.data.helpful, cfg.data.max_helpful))
        self.rows = {
            name: [lm.tok.prompt(prompts.dialogue(p["messages"], templates)) for p in load_prompts(path, limit, f"data.{name}")]
            for name, path, limit in files
        }
        longest = max(len(r) for rows in self.rows.values() for r in rows)
        if longest + c.sampling.max_tokens > lm.cfg.max_length:
            raise InputError(
                f"ppo: the longest prompt has {longest} tokens; with --config.ppo.sampling.max_tokens={c.sampling.max_tokens} "
                f"it passes the model's context of {lm.cfg.max_length}"
            )
        self.length = bucket(longest)
        helpful = round(c.batch_size * c.helpful_share)
        self.counts = {"redteam": c.batch_size - helpful, "helpful": helpful}

    def batch_at(self, t: int) -> dict:
        rows = []
        for name, count in self.counts.items():
            pool = self.rows[name]
            for i in range(t * count, (t + 1) * count):
                order = np.random.default_rng([self.seed, *name.encode(), i // len(pool)]).permutation(len(pool))
                rows.append(pool[order[i % len(pool)]])
        tokens, lengths = pad_rows(rows, self.length)
        helpful = np.repeat(np.array([0.0, 1.0], np.float32), [self.counts["redteam"], self.counts["helpful"]])
        return {"tokens": tokens, "lengths": lengths, "helpful": helpful}
