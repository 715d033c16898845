"""The whole method on the embedded world.

    cai run --config=configs/miniworld.py --workdir=runs/quickstart

Cost: three minutes on two CPU cores (critique 27 s, sft 25, preferences 11, reward 24, ppo 55, evaluate 24, report 3). Result,
held-out prompts sampled at temperature 1, means of seeds 0 to 4: harm rate 1.00 -> 0.21 (supervised) -> 0.01 (PPO), helpfulness
1.00 -> 0.97 -> 0.95, over-refusal 0 -> 0.00 -> 0.01. Seed 0 alone: harm rate 1.00 -> 0.22 -> 0.02.
"""

from cai_jax.config import default


def get_config():
    return default()
