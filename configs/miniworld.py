"""The whole method on the embedded world.

    cai run --config=configs/miniworld.py --workdir=runs/quickstart

Cost: about four minutes on two CPU cores (critique 30 s, sft 45, preferences 12, reward 40, ppo 85, evaluate 40, report 3, on
cores shared with other work). Result, held-out prompts sampled at temperature 1, seed 0: harm rate 1.00 -> 0.39 (supervised)
-> 0.07 (PPO), helpfulness 0.99 -> 0.97 -> 0.95, over-refusal 0 -> 0.01 -> 0.03.
"""

from cai_jax.config import default


def get_config():
    cfg = default()
    cfg.model.remat = True  # faster on CPU: less memory traffic
    return cfg
