"""The journal paper of Mathew John with its numbers, on an open checkpoint of 8 B. Sized for a v5e-256.

    cai run --config=configs/mathewjohn2026.py --workdir=runs/mathewjohn2026

Such a slice has many hosts; launch/README.md starts the command on all of them. A machine with 8 accelerators of 80 GB takes
--config.mesh="(1,8,1)".

From the paper: 36 principles in four categories; 80,000 prompts, temperature falling from 0.9 to 0.4 over the loop, nucleus
0.92, greedy critiques; 8 % of the comparisons human; the reward model over two epochs; a KL coefficient of 0.03, which is
InstructGPT's (2203.02155) times 1.5, over 120,000 rollouts and about 8,000 updates (here 119,808 and 7,488); one epoch of
supervised training on the 80,000 revisions, and as many helpful responses beside them. From InstructGPT: batches of 512 in
minibatches of 64, Adam's 0.95, the reward model's rate and batch, constant rate, clip 0.2, no discount.

Not from the paper: the model, which it does not name; the wording of the principles, this project's own, one request each
where it draws from a bank of templates; two pairs of responses per prompt at temperature 1, which with the human ones make
174,000 of its 200,000; data, of which the public part is smaller (the limits below cut nothing). Otherwise than InstructGPT:
four passes over the rollouts, without which 120,000 are not 8,000 updates; a policy rate of 5e-6, for it saw rates above 8e-6
diverge; no pretraining gradients, averaged weights or warm-up.

Estimated, not run, at the paper's counts: 0.9 M samples of up to 512 tokens (0.3 G tokens sampled, 0.9 G read), 6.8e19
floating-point operations. The time is that of sampling: every token gathers the split weights, 4 GB a chip, so the 0.9 M steps
of its batches take five hours at the least on v5e.
"""

from cai_jax.config import default

HH = "hub:Anthropic/hh-rlhf/"


def get_config():
    cfg = default()
    cfg.stages = ("critique", "sft", "preferences", "reward", "ppo", "report")  # the oracle knows the embedded world only
    cfg.mesh = (-1, 16, 4)
    cfg.model.update(path="meta-llama/Llama-3.1-8B-Instruct", format="chat", remat="full")
    cfg.data.update(redteam=HH + "red-team-attempts/red_team_attempts.jsonl.gz", helpful=HH + "helpful-base/train.jsonl.gz")
    cfg.data.update(comparisons=HH + "helpful-base/train.jsonl.gz", max_prompt=512, max_pair=1024, human_share=0.08)
    cfg.data.update(max_redteam=80_000, max_helpful=80_000)
    cfg.constitution.path = "constitutions/principles36.toml"
    cfg.critique.update(rounds=2, temperature_end=0.4, greedy=True)
    cfg.critique.sampling.update(temperature=0.9, top_p=0.92)
    cfg.preferences.sampling.top_p = 0.92
    cfg.preferences.update(pairs=2, score_batch=512)
    for sampling in (cfg.critique.sampling, cfg.preferences.sampling, cfg.preferences.thought, cfg.ppo.sampling):
        sampling.update(max_tokens=512, batch_size=512)
    cfg.sft.update(epochs=1, rows=64, length=2048)
    cfg.sft.optimizer.update(learning_rate=9.65e-6, b2=0.95)
    cfg.reward.update(epochs=2, batch_size=64)
    cfg.reward.optimizer.update(learning_rate=9e-6, b2=0.95, warmup_steps=0)
    cfg.dpo.optimizer.update(learning_rate=5e-7)
    cfg.ppo.update(
        iterations=234,
        batch_size=512,
        epochs=4,
        minibatches=8,
        kl_coef=0.03,
        evaluate_every=0,
        checkpoint_every=13,
    )
    cfg.ppo.optimizer.update(learning_rate=5e-6, b2=0.95, final_ratio=1.0)
    cfg.ppo.max_drift = 0.1  # nats per token: random bfloat16 models of 16 layers gave 0.05
    return cfg
