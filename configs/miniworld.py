"""The whole method on the embedded world.

cai run --config=configs/miniworld.py --workdir=runs/quickstart
"""

from cai_jax.config import default


def get_config():
    cfg = default()
    cfg.model.remat = True  # faster on CPU: less memory traffic
    return cfg
