"""Every equation of the method: arrays in, arrays out, float32.

Shapes: B rows, T positions of the response. `mask` is 1.0 on response tokens (EOS included), 0.0 elsewhere. Sources: CAI
(2212.08073), HH (2204.05862), N = "The N implementation details of RLHF with PPO", Schulman's note on KL estimators.
"""

import jax
import jax.numpy as jnp


def masked_mean(x, mask):
    """Mean of x where mask is 1; 0 when the mask is empty."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def whiten(x, mask):
    """x to zero mean and unit (biased) variance over the mask; 0 outside it (N 16)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-8) * mask


def cross_entropy(logp, weights):
    """Mean negative log-prob of target tokens, weighted. logp, weights [B, T]."""
    return -masked_mean(logp, weights)


def soft_preference_loss(score_a, score_b, p_a, mask):
    """-[p log s(ra - rb) + (1 - p) log s(rb - ra)], mean over the comparisons [B] in the mask (CAI 4.1, HH 2.3)."""
    margin = score_a - score_b
    return masked_mean(-(p_a * jax.nn.log_sigmoid(margin) + (1 - p_a) * jax.nn.log_sigmoid(-margin)), mask)


def squared_error(x, wanted, mask):
    """Mean squared error over the mask: the L2 loss of the harm regressor (CAI 4.5)."""
    return masked_mean((x - wanted) ** 2, mask)


def preference_from_logprobs(logp_a, logp_b):
    """p(A) of two option log-probs: exp(la) / (exp(la) + exp(lb)) (CAI 4.1)."""
    return jax.nn.sigmoid(logp_a - logp_b)


def dpo_loss(logp_a, logp_b, ref_a, ref_b, p_a, mask, beta: float):
    """DPO (2305.18290, eq. 7) on soft labels: the implicit reward is beta x (log-prob - reference's). Sums over tokens, [B]."""
    return soft_preference_loss(beta * (logp_a - ref_a), beta * (logp_b - ref_b), p_a, mask)


def ipo_loss(ratio_a, ratio_b, p_a, mask, beta: float):
    """IPO (2310.12036, eq. 17) on soft labels, the mean of the loss over which response is preferred: the gap of the log-ratios
    to the reference, means over tokens (as its authors ran it, says TRL), goes to 1 / (2 beta) or its opposite. [B]."""
    gap, goal = ratio_a - ratio_b, 1 / (2 * beta)
    return masked_mean(p_a * (gap - goal) ** 2 + (1 - p_a) * (gap + goal) ** 2, mask)


def kl_k1(logp, ref_logp):
    """Per-token KL estimate on policy samples: unbiased, may be negative."""
    return logp - ref_logp


def kl_k3(logp, ref_logp):
    """Per-token KL estimate: unbiased and never negative."""
    log_ratio = ref_logp - logp
    return jnp.expm1(log_ratio) - log_ratio


def token_rewards(score_B, logp_BT, ref_logp_BT, lengths_B, kl_coef):
    """-kl_coef x k1 at every response token, and the score at its last one (N 15). -> float32 [B, T].

    Computed in the dtype of the log-probs: a reward of 0.73 stays 0.73.
    """
    position_1T = jnp.arange(logp_BT.shape[1])[None]
    mask_BT = (position_1T < lengths_B[:, None]).astype(logp_BT.dtype)
    last_BT = (position_1T == lengths_B[:, None] - 1).astype(logp_BT.dtype)
    return (score_B.astype(logp_BT.dtype)[:, None] * last_BT - kl_coef * kl_k1(logp_BT, ref_logp_BT)) * mask_BT


def gae(rewards_BT, values_BT, mask_BT, discount: float, lam: float):
    """Generalised advantage estimates (1506.02438, eq. 16) and returns. The response ends the episode: its last token
    bootstraps from nothing. -> (advantages [B, T], returns [B, T]), 0 outside the mask."""
    next_mask = jnp.pad(mask_BT[:, 1:], ((0, 0), (0, 1)))
    next_values = jnp.pad(values_BT[:, 1:], ((0, 0), (0, 1))) * next_mask
    delta_BT = (rewards_BT + discount * next_values - values_BT) * mask_BT

    def step(later_B, x):
        delta_B, alive_B = x
        now_B = delta_B + discount * lam * alive_B * later_B
        return now_B, now_B

    start = jnp.zeros_like(delta_BT[:, 0])
    _, reversed_TB = jax.lax.scan(step, start, (delta_BT.T[::-1], next_mask.T[::-1]))
    advantages = reversed_TB[::-1].T * mask_BT
    return advantages, (advantages + values_BT) * mask_BT


def leave_one_out(reward_B, group: int):
    """Advantages of RLOO (2402.14740, eq. 6): a response's reward less the mean of the others to its prompt; `group` rows in
    succession are of one prompt. -> [B]"""
    r = reward_B.reshape(-1, group)
    others = (jnp.sum(r, axis=1, keepdims=True) - r) / (group - 1)
    return (r - others).reshape(-1)


def group_normalised(reward_B, group: int):
    """Advantages of GRPO (2402.03300, 4.1.2): rewards to zero mean and unit deviation in the group of a prompt, see
    `leave_one_out`; unbiased, and 1e-4 added, as TRL has it. -> [B]"""
    r = reward_B.reshape(-1, group)
    return ((r - jnp.mean(r, axis=1, keepdims=True)) / (jnp.std(r, axis=1, keepdims=True, ddof=1) + 1e-4)).reshape(-1)


def ppo_policy_loss(logp, old_logp, advantages, mask, clip: float):
    """Clipped surrogate (1707.06347, eq. 7), to be minimised. -> (loss, share of tokens where the clip binds)."""
    log_ratio = jnp.where(mask > 0, logp - old_logp, 0.0)
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    return masked_mean(jnp.maximum(unclipped, clipped), mask), masked_mean((clipped > unclipped).astype(jnp.float32), mask)


def ppo_value_loss(values, old_values, returns, mask, clip: float):
    """0.5 x max(squared error, squared error of the clipped value) (N 17)."""
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * masked_mean(jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def adapt_kl_coef(coef, kl, target: float, horizon: int, rollouts: int):
    """The adaptive controller (N 19): coef x (1 + clip(kl / target - 1, -0.2, 0.2) x rollouts / horizon). kl: nats per
    response, mean over the batch."""
    return coef * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * rollouts / horizon)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the mask; 0 when the returns do not vary."""

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    total = variance(returns)
    return jnp.where(total > 0, 1 - variance(returns - values) / jnp.where(total > 0, total, 1.0), 0.0)
