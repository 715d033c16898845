"""Llama 3.1, 8 B: the pretrained model is aligned, its instruct sibling judges. Sized for a v5e-256 or a v6e-64.

    cai run --config=configs/llama3_8b.py --workdir=runs/llama3_8b

Such slices have many hosts; launch/README.md starts the command on all of them. A machine with 8 accelerators of 80 GB takes
--config.mesh="(1,8,1)".

Model: the pretrained checkpoint in plain transcripts, led by worked examples; the judge is the instruct checkpoint in its chat
template, without examples. Data: hh-rlhf (MIT), prompts of at most 384 tokens, comparisons of at most 768. The mesh splits
weights 64 ways and takes what is left for data: 4 x 64 on 256 chips, 1 x 64 on 64.

Estimated, not run: 0.5 M samples of up to 256 tokens (76 M tokens sampled, 620 M read, most of them the worked examples),
2.1e19 floating-point operations. The time is that of sampling: every token reads the weights, which `cai compile` puts at 13
ms on v5e, so the 150,000 steps of its batches take half an hour at the least. Compiled for
v5e:16x16, one and two of them, v6e:8x8 and v5p:4x4x4: no step needs more than 9.2 GiB of a v5e chip's 16, 12.2 of a v6e's 32 or
13.2 of a v5p's 95.
"""

from cai_jax.config import default

HH = "hub:Anthropic/hh-rlhf/"


def get_config():
    cfg = default()
    cfg.stages = ("critique", "sft", "preferences", "reward", "ppo", "report")  # the oracle knows the embedded world only
    cfg.mesh = (-1, 32, 2)
    cfg.model.update(path="meta-llama/Llama-3.1-8B", remat="full")
    cfg.data.update(redteam=HH + "red-team-attempts/red_team_attempts.jsonl.gz", helpful=HH + "helpful-base/train.jsonl.gz")
    cfg.data.update(comparisons=HH + "helpful-base/train.jsonl.gz", max_prompt=384, max_pair=768)
    cfg.data.update(max_redteam=32768, max_helpful=32768, max_comparisons=32768)
    cfg.constitution.path = "constitutions/harmless.toml"
    cfg.critique.update(rounds=4, few_shot="constitutions/few_shot.toml")
    cfg.preferences.judge.update(path="meta-llama/Llama-3.1-8B-Instruct", format="chat")
    cfg.preferences.score_batch = 512
    for sampling in (cfg.critique.sampling, cfg.preferences.sampling, cfg.preferences.thought, cfg.ppo.sampling):
        sampling.update(max_tokens=256, batch_size=1024)
    cfg.sft.update(revisions="all", epochs=1, rows=256, length=2048)
    cfg.sft.optimizer.update(learning_rate=1e-5, warmup_steps=20)
    cfg.reward.update(epochs=1, batch_size=256)
    cfg.reward.optimizer.update(learning_rate=5e-6, warmup_steps=20)
    cfg.dpo.update(batch_size=256)
    cfg.dpo.optimizer.update(learning_rate=5e-7, warmup_steps=20)
    cfg.ppo.update(iterations=200, batch_size=1024, minibatches=8, kl_coef=0.05, evaluate_every=0, checkpoint_every=10)
    cfg.ppo.optimizer.update(learning_rate=1e-6)
    cfg.ppo.max_drift = 0.1  # nats per token: random bfloat16 models of 16 layers gave 0.05
    return cfg
