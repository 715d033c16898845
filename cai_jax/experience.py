"""Rollouts to what PPO learns from: log-probs, values, rewards, advantages, and the loss on them.

Details are numbered as in "The N implementation details of RLHF with PPO".
"""

from functools import partial

import jax
import jax.numpy as jnp

from cai_jax import losses
from cai_jax.logprobs import target_logprobs
from cai_jax.models.heads import apply_head
from cai_jax.score import hidden_states, reward_scores, row_batch


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
    hidden = before_each(hidden_states(net, params["policy"], rows, "alone"), batch["lengths"], R)
    logp, entropy = target_logprobs(net, params["policy"], hidden, batch["response"], temperature)
    if "trunk" in params["value"]:
        hidden = before_each(hidden_states(net, params["value"]["trunk"], rows, "alone"), batch["lengths"], R)
    return logp, entropy, apply_head(params["value"]["head"], hidden)


@partial(jax.jit, static_argnames=("nets", "c"))
def experience(nets, c, weights, scale, kl_coef, batch, out, read=None):
    """What an iteration learns from. -> (rollout arrays [B, ...], metrics).

    nets and weights: of policy and value, of the reference, of the reward model. `read`: tokens and lengths of the rollouts for
    the reward model, where they are not the policy's.

    The score is the reward model's, centred and scaled by its scores of the compared responses, less a penalty where no
    EOS came (as TRL does; N 12 puts a constant in its place); it lands on the last token. The KL penalty is per token (N 15).
    """
    (net, ref_net, reward_net), (params, reference, reward) = nets, weights
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
    frozen_pair = {"policy": reference, "value": {"head": params["value"]["head"]}}
    ref_logp = mask * policy_and_value(ref_net, frozen_pair, rollout, c.sampling.temperature)[0]
    read = read or {"tokens": rollout["joined"], "lengths": batch["lengths"] + out.lengths_B}
    raw = reward_scores(reward_net, reward, read["tokens"], read["lengths"])
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
