"""Makes the embedded base model again, from nothing: world, tokenizer, documents, weights.

    cai run --config=configs/miniworld_pretrain.py --workdir=runs/pretrain

Cost: 2,600 steps of 24 x 192 packed tokens, 12 M tokens, 25 to 30 minutes on two CPU cores. Result: a model of 1 M parameters
that complies with every request (harm rate 1.00 on harmful prompts, 1.00 of the steps right on benign ones, held-out items
included, sampled at temperature 1) and whose critic, reading its harmful answers to plain red-team prompts, finds the harm with
a principle of the category, a general one, one of another category and none in 97, 86, 50 and 12 of 100 cases.
"""

from cai_jax.config import default


def get_config():
    cfg = default()
    cfg.stages = ("pretrain",)
    cfg.model.remat = "full"  # faster on CPU: less memory traffic
    return cfg
