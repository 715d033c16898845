"""tunix: its own sampler and PPO learner, on its Llama, both of which run on a CPU as they are.

Its sampler takes text, so the folder's tokenizer reads numbers as ids. It has no supervised scoring of options, no reward
trainer and no shared prefixes, so it stands in generation and PPO only.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import work
from flax import nnx
from model import THETA
from transformers import AutoTokenizer
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import rl_cluster
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from worker import Job, main

FOREVER = 10**6  # steps; the driver ends the process
NO_END = [-1]  # no token ends a text


def load(job: Job, mesh=None):
    s = job.sizes.shape
    sizes = {"num_layers": s.layers, "vocab_size": s.vocab, "embed_dim": s.width, "hidden_dim": s.mlp, "num_heads": s.heads}
    sizes |= {"head_dim": s.width // s.heads, "num_kv_heads": s.heads, "rope_theta": int(THETA), "norm_eps": 1e-5}
    config = llama.ModelConfig(**sizes, weight_tying=False)
    return create_model_from_safe_tensors(str(job.folder), config, mesh, jnp.float32)


class Capped(Sampler):
    """Ends a batch after `new` tokens without another compilation: buffers stay as long as the longest text may get."""

    new = None

    def init_sample_state(self, all_input_ids, *args, **options):
        state = super().init_sample_state(all_input_ids, *args, **options)
        return dataclasses.replace(state, total_sampling_steps=all_input_ids.shape[1] + self.new - 1)


def sampler(job: Job, room: int):
    """-> sample(rows, new, width) -> tokens of each row; and the greedy tokens by which contenders are compared."""
    model, tokenizer, s = load(job), AutoTokenizer.from_pretrained(job.folder), job.sizes
    sizes = {"num_layers": s.shape.layers, "num_kv_heads": s.shape.heads, "head_dim": s.shape.width // s.shape.heads}
    draw = Capped(model, tokenizer, CacheConfig(cache_size=room, **sizes))
    longest = room - s.prompts[1] if job.case == "mixed" else s.new

    def sample(rows, new: int, width: int, **options):
        draw.new = new
        options = options or {"temperature": 1.0, "top_p": s.top_p}
        out = draw(
            [work.text(row) for row in rows], longest, width, eos_tokens=NO_END, seed=np.random.randint(2**31), **options
        )
        return [row[:new] for row in out.tokens]

    check = sample(work.generate(s)[:1], 8, s.prompt, temperature=0.0)[0].tolist()
    return sample, {"check": check}


def generate(job: Job, turns):
    s, prompts = job.sizes, work.generate(job.sizes)
    sample, check = sampler(job, s.prompt + s.new)

    def run():
        return {"tokens": sum(map(len, sample(prompts, s.new, s.prompt)))} | check

    turns.repeat(run)


def mixed(job: Job, turns):
    """Batches as the records come, each until its longest row has ended."""
    s = job.sizes
    (prompts, lengths), (sample, check) = work.mixed(s), sampler(job, s.prompts[1] + s.cap)

    def run():
        made = 0
        for at in range(0, s.records, s.rows):
            ends = lengths[at : at + s.rows]
            rows = sample(prompts[at : at + s.rows], int(ends.max()), s.prompts[1])
            made += sum(min(int(n), len(row)) for n, row in zip(ends, rows, strict=True))
        return {"tokens": made} | check

    turns.repeat(run)


class Scored(nnx.Module):
    """A Llama whose output is the score that everybody's reward and value models start from; tunix brings such a module for
    Gemma only. It is given the segments beside the mask that says the same."""

    def __init__(self, job: Job, mesh):
        self.llama = load(job, mesh)
        self.llama.lm_head.w = nnx.Param(jnp.asarray(work.head(job.sizes))[:, None], sharding=("fsdp", None))

    def __call__(self, *args, segment_ids=None, **options):
        return self.llama(*args, **options)[0]


def ppo(job: Job, turns):
    s = job.sizes
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)  # under JAX's default it raises
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-9))
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=tx, critic_optimizer=tx, mini_batch_size=s.rows, eval_every_n_steps=FOREVER, max_steps=FOREVER
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=s.new,
        temperature=1.0,
        max_prompt_length=s.prompt,
        kv_cache_size=s.prompt + s.new,
        eos_tokens=NO_END,
    )
    roles = dict.fromkeys(rl_cluster.Role, mesh)
    cluster = rl_cluster.RLCluster(
        actor=load(job, mesh),
        reference=load(job, mesh),
        critic=Scored(job, mesh),
        reward=Scored(job, mesh),
        tokenizer=AutoTokenizer.from_pretrained(job.folder),
        cluster_config=rl_cluster.ClusterConfig(role_to_mesh=roles, training_config=training, rollout_config=rollout),
    )
    prompts = np.array([work.text(row) for row in work.generate(s)])

    def batches():
        for _ in range(2):  # both compile
            yield {"prompts": prompts}
        while True:  # asked for the next one, it has done with the last
            trained = [nnx.state(t.model) for t in (cluster.actor_trainer, cluster.critic_trainer)]
            jax.block_until_ready(trained)
            turns.turn(tokens=s.rows * s.new)
            yield {"prompts": prompts}

    PPOLearner(cluster, PPOConfig(num_iterations=s.epochs)).train(batches())


WORKLOADS = {"generate": generate, "mixed": mixed, "ppo-equal": ppo}

if __name__ == "__main__":
    main(WORKLOADS, "google-tunix", "jax", "flax")
