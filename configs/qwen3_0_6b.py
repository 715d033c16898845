"""Qwen 3, 0.6 B, through the whole method on one GPU or a v5e-8: the smallest run on a real model.

    cai run --config=configs/qwen3_0_6b.py --workdir=runs/qwen3_0_6b

Model: the instruct checkpoint in its own chat template; it declines much already, so what CAI adds shows in how it declines.
Give a helpful-only one with --config.model.path to start from harm. Data: hh-rlhf (MIT), prompts of at most 256 tokens,
comparisons of at most 512.

Estimated, not run: 91 k samples of up to 256 tokens (14 M tokens sampled, 34 M read), 2.5e17 floating-point operations. At 5 %
of an H100's peak for sampling and 40 % for the rest that is half an hour; a v5e-8 gathers its split weights at every sampled
token and may take longer. Training state 20 GB in float32 with Adam and gradients (policy and value), split over the devices.
The judge of this size is weak: read the flip rate in preferences/done.json before the rest.
"""

from cai_jax.config import default

HH = "hub:Anthropic/hh-rlhf/"


def get_config():
    cfg = default()
    cfg.stages = ("critique", "sft", "preferences", "reward", "ppo", "report")  # the oracle knows the embedded world only
    cfg.mesh = (1, -1, 1)
    cfg.model.update(path="Qwen/Qwen3-0.6B", format="chat", remat="full")
    cfg.data.update(redteam=HH + "red-team-attempts/red_team_attempts.jsonl.gz", helpful=HH + "helpful-base/train.jsonl.gz")
    cfg.data.update(comparisons=HH + "helpful-base/train.jsonl.gz", max_prompt=256, max_pair=512)
    cfg.data.update(max_redteam=8192, max_helpful=8192, max_comparisons=16384)
    cfg.constitution.path = "constitutions/harmless.toml"
    for sampling in (cfg.critique.sampling, cfg.preferences.sampling, cfg.preferences.thought, cfg.ppo.sampling):
        sampling.update(max_tokens=256, batch_size=128)
    cfg.sft.update(epochs=1, rows=32, length=1024, microbatches=4)
    cfg.sft.optimizer.update(learning_rate=1e-5, warmup_steps=20)
    cfg.reward.update(epochs=1, batch_size=64, microbatches=4)
    cfg.reward.optimizer.update(learning_rate=1e-5, warmup_steps=20)
    cfg.dpo.update(batch_size=64, microbatches=4)
    cfg.dpo.optimizer.update(learning_rate=5e-7, warmup_steps=20)
    cfg.ppo.update(iterations=100, batch_size=256, minibatches=8, kl_coef=0.05, evaluate_every=0, checkpoint_every=10)
    cfg.ppo.optimizer.update(learning_rate=1e-6)
    cfg.ppo.max_drift = 0.1  # nats per token: random bfloat16 models of 16 layers gave 0.05
    return cfg
