"""Gemma 3, 4 B, with adapters: policy, value and reward model share one frozen base. For one GPU of 80 GB or a v5e-8.

    cai run --config=configs/gemma3_4b.py --workdir=runs/gemma3_4b

    cai export --workdir=runs/gemma3_4b --model=rl_cai --out=runs/gemma3_4b/adapter --adapter

Model: the text part of the instruct checkpoint in its own chat template; it declines much already (see configs/qwen3_0_6b.py).
Data: hh-rlhf (MIT), prompts of at most 256 tokens, comparisons of at most 512.

Estimated, not run: 91 k samples of up to 256 tokens, 1.6e18 floating-point operations, two hours on one H100 at 5 % of its
peak for sampling and 40 % for the rest. Frozen weights 8 GB in bfloat16, once; an adapter of rank 16 has 30 M parameters, 0.4
GB with Adam.
"""

from cai_jax.config import default

HH = "hub:Anthropic/hh-rlhf/"


def get_config():
    cfg = default()
    cfg.stages = ("critique", "sft", "preferences", "reward", "ppo", "report")  # the oracle knows the embedded world only
    cfg.mesh = (1, -1, 1)
    cfg.model.update(path="google/gemma-3-4b-it", format="chat", remat="full")
    cfg.lora.update(rank=16, alpha=32.0)
    cfg.data.update(redteam=HH + "red-team-attempts/red_team_attempts.jsonl.gz", helpful=HH + "helpful-base/train.jsonl.gz")
    cfg.data.update(comparisons=HH + "helpful-base/train.jsonl.gz", max_prompt=256, max_pair=512)
    cfg.data.update(max_redteam=8192, max_helpful=8192, max_comparisons=16384)
    cfg.constitution.path = "constitutions/harmless.toml"
    for sampling in (cfg.critique.sampling, cfg.preferences.sampling, cfg.preferences.thought, cfg.ppo.sampling):
        sampling.update(max_tokens=256, batch_size=64)
    cfg.preferences.score_batch = 64
    cfg.sft.update(epochs=1, rows=32, length=1024, microbatches=4)
    cfg.sft.optimizer.update(learning_rate=1e-4, warmup_steps=20)
    cfg.reward.update(epochs=1, batch_size=64, microbatches=4)
    cfg.reward.optimizer.update(learning_rate=1e-4, warmup_steps=20)
    cfg.dpo.update(microbatches=4)
    cfg.dpo.optimizer.update(learning_rate=2e-5, warmup_steps=20)
    cfg.ppo.update(iterations=100, batch_size=256, minibatches=16, kl_coef=0.05, evaluate_every=0, checkpoint_every=10)
    cfg.ppo.optimizer.update(learning_rate=2e-5)
    cfg.ppo.max_drift = 0.1  # nats per token: random bfloat16 models of 16 layers gave 0.05
    return cfg
