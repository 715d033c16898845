"""Bai et al. 2022 (2212.08073) with the paper's numbers, on open checkpoints of 70 B. Sized for 1,024 v5p chips.

    cai run --config=configs/bai2022.py --workdir=runs/bai2022

Such a slice has 256 hosts; launch/README.md starts the command on all of them. For less, override --config.model.path and
--config.mesh.

From the paper: 182,831 red-team prompts and four critiques and revisions of each by a helpful-only assistant, 135,296 helpful
prompts with two responses each, everything at temperature 1; a pretrained model tuned on the revisions of every round for one
epoch, about 1,024 sequences a step (768 packed rows), constant learning rate of half that of pretraining; one comparison per
prompt, judged by the pretrained model with worked examples and one of 16 principles, soft labels; 135,296 human helpfulness
comparisons; and from its predecessor (2204.05862) rates of a hundredth of pretraining's, KL coefficient 0.001, clip 0.2, no
discount, no entropy bonus, one pass over a response of up to 128 tokens.

Not from the paper: the models (52 B there, not published); the principles and examples, which are this project's own; data, of
which the public part is smaller (38,961 red-team transcripts, 43,835 helpful ones; the limits below cut nothing); one red-team
prompt per conversation, of at most 256 tokens; context, batches, PPO's minibatches, advantages and number of steps, which the
paper leaves open. Its KL coefficient is per unit of reward, as here, but rewards here are divided by their standard deviation.

Estimated, not run, at the paper's counts: 3.3 M samples (0.5 G tokens sampled, 4.6 G read), 1.5e21 floating-point operations.
The time is that of sampling: every token gathers the split weights, 35 GB a chip, so the 0.7 M steps of its batches take half
a day at the least. Weights and training state 20 GB of a chip's 95.
"""

from cai_jax.config import default

HH, PRETRAINED = "hub:Anthropic/hh-rlhf/", "meta-llama/Llama-3.1-70B"
PRETRAINING_RATE = 1.5e-4  # of the checkpoint (2407.21783, table 3)


def get_config():
    cfg = default()
    cfg.stages = ("critique", "sft", "preferences", "reward", "ppo", "report")  # the oracle knows the embedded world only
    cfg.mesh = (-1, 32, 4)
    cfg.model.update(path="meta-llama/Llama-3.1-70B-Instruct", format="chat", remat="full")  # in place of a helpful-only one
    cfg.sft.model.path = cfg.preferences.judge.path = cfg.reward.model.path = PRETRAINED
    cfg.data.update(redteam=HH + "red-team-attempts/red_team_attempts.jsonl.gz", helpful=HH + "helpful-base/train.jsonl.gz")
    cfg.data.update(comparisons=HH + "helpful-base/train.jsonl.gz", max_prompt=256, max_pair=1024)
    cfg.data.update(max_redteam=182_831, max_helpful=135_296, max_comparisons=135_296)
    cfg.constitution.path = "constitutions/harmless.toml"
    cfg.critique.update(rounds=4, few_shot="constitutions/few_shot.toml", helpful_responses=2)
    cfg.preferences.update(few_shot="constitutions/few_shot.toml", score_batch=512)
    for sampling in (cfg.critique.sampling, cfg.preferences.sampling, cfg.preferences.thought):
        sampling.update(max_tokens=256, batch_size=1024)
    cfg.sft.update(revisions="all", epochs=1, rows=768, length=512)
    cfg.sft.optimizer.update(learning_rate=0.5 * PRETRAINING_RATE, warmup_steps=0, final_ratio=1.0)
    cfg.reward.update(epochs=1, batch_size=512)
    cfg.reward.optimizer.update(learning_rate=0.01 * PRETRAINING_RATE)
    cfg.dpo.update(batch_size=512)
    cfg.dpo.optimizer.update(learning_rate=5e-7)
    cfg.ppo.update(
        iterations=1000, batch_size=1024, epochs=1, minibatches=4, kl_coef=0.001, gae_lambda=1.0, missing_eos_penalty=0.0
    )
    cfg.ppo.update(evaluate_every=0, checkpoint_every=20)
    cfg.ppo.sampling.update(max_tokens=128)
    cfg.ppo.optimizer.update(learning_rate=0.01 * PRETRAINING_RATE, final_ratio=1.0)
    cfg.ppo.max_drift = 0.1  # nats per token: random bfloat16 models of 16 layers gave 0.05
    return cfg
