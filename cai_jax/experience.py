"""Rollouts to what PPO learns from: texts in parts of one size, log-probs, values, rewards, advantages, and the loss on them.

Details are numbered as in "The N implementation details of RLHF with PPO".
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import losses
from cai_jax.data import bucket
from cai_jax.logprobs import target_logprobs
from cai_jax.models.attention import QUERIES
from cai_jax.models.heads import apply_head
from cai_jax.models.kernels import machine
from cai_jax.score import hidden_states, reward_scores
from cai_jax.sharding import constrain
from cai_jax.slots import room
from cai_jax.train import Parts
from cai_jax.trees import first_fit

BASELINES = {"rloo": losses.leave_one_out, "grpo": losses.group_normalised}  # what stands in for a value function
PARTS = 8  # at least that a batch of the longest texts makes: shorter ones make fewer, and cost less by so much
LEAST = {"cpu": 512}  # tokens of a device's part, below which moving weights would take longer than multiplying with them
LEAST_ELSEWHERE = 8192  # an estimate, not measured


def kind() -> str:
    """What a row holds (see kernels.TEXTS): as many texts as fit, or one where the kernel is faster without a mask."""
    return "alone" if machine() == "cudnn" else "packed"


class Layout(NamedTuple):
    """The size of parts, which does not depend on what texts turn out to be: nothing is compiled anew for other lengths."""

    rows: int
    length: int  # tokens of a row
    held: int  # texts at least that lie in a row before there is a next one


def layout(texts: int, longest: int, ways: int) -> Layout:
    """For batches of `texts` texts or more, none of more than `longest` tokens; rows are split `ways` ways."""
    if kind() == "alone":
        return Layout(-(-texts // ways) * ways, bucket(longest), 1)
    # Two of the longest fill a row better; one is better where XLA's attention reads the keys of long neighbours in vain.
    beside = 1 if machine() == "cpu" and longest > QUERIES else 2
    length = room(longest * min(beside, -(-texts // ways)))
    held = length // longest
    most = -(-texts // (held * ways))  # rows of a device, of the longest texts
    least = LEAST.get(machine(), LEAST_ELSEWHERE) // length
    return Layout(ways * min(most, max(1, least, most // PARTS)), length, held)


def packed(rows: list[np.ndarray], lengths_B, index, to: Layout, R: int) -> tuple[Parts, dict[str, np.ndarray]]:
    """Texts `index` of `rows`, which are prompts of `lengths_B` tokens and responses of at most R, in parts of `to`.

    -> (int32 arrays [rows, N, T]: tokens, positions, ends  see attention.packed_mask
                                   next    the token behind each
                                   answer  1 + b R + t where that is token t of response b; 0: it is of none;
        where things lie in such an array when flat: place [B, R], of what belongs to a response token, which is where it is
        predicted; last [B], of a text's last token)
    """
    index = sorted(index, key=lambda b: -len(rows[b]))  # long ones first leave little room unused
    placed = first_fit([to.length if kind() == "alone" else len(rows[b]) for b in index], to.length)
    most = -(-len(index) // to.held)  # rows
    N = -(-most // to.rows)
    x = {name: np.zeros((N * to.rows, to.length), np.int32) for name in ("tokens", "positions", "ends", "next", "answer")}
    place_BR, last_B = np.zeros((len(rows), R), np.int32), np.zeros(len(rows), np.int32)
    for b, (row, at) in zip(index, placed, strict=True):
        # Rows are [N, rows], parts one after another, and stored [rows, N]: a device has its rows of every part.
        part, row_of_part = divmod(row, to.rows)
        first = (row_of_part * N + part) * to.length
        ids, prompt, end = rows[b], lengths_B[b], at + len(rows[b])
        said = np.arange(len(ids) - prompt, dtype=np.int32)
        x["tokens"][row, at:end], x["ends"][row, at:end] = ids, end
        x["positions"][row, at:end] = np.arange(len(ids))
        x["next"][row, at : end - 1] = ids[1:]
        x["answer"][row, at + prompt - 1 : end - 1] = 1 + b * R + said
        place_BR[b, : len(said)], last_B[b] = first + at + prompt - 1 + said, first + end - 1
    arrays = {name: value.reshape(N, to.rows, to.length).swapaxes(0, 1) for name, value in x.items()}
    return Parts(arrays, np.int32(1 + max(row for row, _ in placed) // to.rows)), {"place": place_BR, "last": last_B}


@jax.jit
def minibatch(rollout, parts: Parts) -> Parts:
    """Parts of texts with what the rollout [B, R] has for each answer, 0 elsewhere."""
    answer, arrays = parts.arrays["answer"], parts.arrays
    of = {name: jnp.where(answer > 0, x.reshape(-1)[jnp.maximum(answer - 1, 0)], 0) for name, x in rollout.items()}
    return parts._replace(arrays=arrays | of)


def each_part(f, parts: Parts):
    """f(part) -> arrays [rows, T], of every part that holds something. -> [rows, N, T] each, 0 for the others."""
    N = jax.tree.leaves(parts.arrays)[0].shape[1]
    found = jax.tree.map(lambda x: jnp.zeros((x.shape[0], N, *x.shape[1:]), x.dtype), jax.eval_shape(f, parts.part(0)))

    def one(i, found):
        return jax.tree.map(lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, i, 1), found, f(parts.part(i)))

    with jax.named_scope("parts"):
        return jax.lax.fori_loop(0, parts.count, one, found)


def scaled_head(head, scale):
    """A reward head whose output is centred and scaled as the scores that PPO learns from are."""
    return {"kernel": head["kernel"] / scale["std"], "bias": (head["bias"] - scale["mean"]) / scale["std"]}


def policy_and_value(net, params, texts, temperature: float):
    """Log-prob and entropy of each token of a response, where it is predicted, and the value at every place (0 where none is
    learnt). texts: one part. -> [rows, T] float32 each."""
    hidden = hidden_states(net, params["policy"], texts, kind())
    logp, entropy = target_logprobs(net, params["policy"], hidden, texts["next"], temperature, texts["answer"] > 0)
    if "value" not in params:
        return logp, entropy, jnp.zeros_like(logp)
    if "trunk" in params["value"]:
        hidden = hidden_states(net, params["value"]["trunk"], texts, kind())
    return logp, entropy, apply_head(params["value"]["head"], hidden)


@partial(jax.jit, static_argnames=("nets", "c"))
def experience(nets, c, weights, scale, kl_coef, helpful_B, out, texts: Parts, at, read=None):
    """What an iteration learns from. -> (rollout arrays [B, R], metrics).

    nets and weights: of policy and value, of the reference, of the reward model. texts, at: every rollout, see `packed`.
    read: their tokens and lengths for the reward model, where they are not the policy's.

    The score is the reward model's, centred and scaled by its scores of the compared responses, less a penalty where no
    EOS came (as TRL does; N 12 puts a constant in its place); it lands on the last token. The KL penalty is per token (N 15).
    """
    (net, ref_net, reward_net), (params, reference, reward) = nets, weights
    mask = (jnp.arange(out.tokens_BR.shape[1])[None] < out.lengths_B[:, None]).astype(jnp.float32)

    def one(part):
        logp, _, values = policy_and_value(net, params, part, c.sampling.temperature)
        hidden = hidden_states(ref_net, reference, part, kind())
        said = part["next"], c.sampling.temperature, part["answer"] > 0
        ref_logp = target_logprobs(ref_net, reference, hidden, *said)[0]
        found = {"logp": logp, "values": values, "reference": ref_logp}
        if read:
            return found
        return found | {"score": apply_head(reward["head"], hidden_states(reward_net, reward["trunk"], part, kind()))}

    found = {name: constrain(x, None, None, None).reshape(-1) for name, x in each_part(one, texts).items()}
    logp, values, ref_logp = (found[name][at["place"]] * mask for name in ("logp", "values", "reference"))
    raw = reward_scores(reward_net, reward, read["tokens"], read["lengths"]) if read else found["score"][at["last"]]
    score = (raw - scale["mean"]) / scale["std"] - c.missing_eos_penalty * (~out.finished_B).astype(jnp.float32)
    rewards = losses.token_rewards(score, logp, ref_logp, out.lengths_B, kl_coef)
    metrics = {
        "reward": jnp.mean(jnp.sum(rewards, axis=1)),
        "score": jnp.mean(score),
        "score_redteam": losses.masked_mean(score, 1 - helpful_B),
        "score_helpful": losses.masked_mean(score, helpful_B),
        "kl": jnp.mean(jnp.sum(losses.kl_k1(logp, ref_logp) * mask, axis=1)),
        "kl_k3": jnp.mean(jnp.sum(losses.kl_k3(logp, ref_logp) * mask, axis=1)),
        "response_length": jnp.mean(out.lengths_B.astype(jnp.float32)),
        "eos_rate": jnp.mean(out.finished_B.astype(jnp.float32)),
        "drift": losses.masked_mean(jnp.abs(logp - out.logp_BR), mask),
    }
    rollout = {"old_logp": logp}
    if c.advantage in BASELINES:
        rollout["advantages"] = BASELINES[c.advantage](jnp.sum(rewards, axis=1), c.group)[:, None] * mask
    else:
        advantages, returns = losses.gae(rewards, values, mask, c.discount, c.gae_lambda)
        metrics["explained_variance"] = losses.explained_variance(values, returns, mask)
        advantages = losses.whiten(advantages, mask) if c.whiten_advantages else advantages
        rollout |= {"old_values": values, "advantages": advantages, "returns": returns}
    return {name: constrain(x, None, None) for name, x in rollout.items()}, metrics


def of_response(x_BTD, batch):
    """The sum over the tokens of a response, at each of its tokens. batch: one part. -> as x, [rows, T, D]."""
    ends, said = batch["ends"], batch["answer"] > 0
    same = (ends[:, :, None] == ends[:, None, :]) & said[:, :, None] & said[:, None, :]
    return jnp.einsum("BTS,BSD->BTD", same.astype(x_BTD.dtype), x_BTD)


def ppo_loss(net, c):
    """loss_fn(params, part of `minibatch`, key): clipped losses of the policy, and of a value function if there is one, on what
    `experience` found."""

    def loss_fn(params, batch, key):
        logp, entropy, values = policy_and_value(net, params, batch, c.sampling.temperature)
        mask = (batch["answer"] > 0).astype(jnp.float32)
        log_ratio, weight = (logp - batch["old_logp"]) * mask, mask
        if c.advantage == "rloo":  # a response is one action: its ratio is clipped as a whole, and all responses count alike
            both = of_response(jnp.stack([log_ratio, mask], axis=-1), batch)
            policy_ratio, weight = both[..., 0], mask / jnp.maximum(both[..., 1], 1.0)
        else:
            policy_ratio = log_ratio
        policy, clipped = losses.ppo_policy_loss(policy_ratio, 0.0, batch["advantages"], weight, c.clip)
        entropy = losses.masked_mean(entropy, mask)
        metrics = {
            "policy_loss": policy,
            "entropy": entropy,
            "clip_fraction": clipped,
            "approx_kl": losses.masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
            "weight": jnp.sum(weight),
            "ratio_error": losses.masked_mean(jnp.abs(jnp.expm1(log_ratio)), mask),
        }
        loss = policy - c.entropy_coef * entropy
        if c.advantage == "gae":
            metrics["value_loss"] = losses.ppo_value_loss(values, batch["old_values"], batch["returns"], mask, c.value_clip)
            loss += c.value_coef * metrics["value_loss"]
        return loss, metrics

    return loss_fn
