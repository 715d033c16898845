"""A second reward model, which nothing optimises: what it says of a policy beside the first shows when that one is
over-optimised (2210.10760; HH 2204.05862, 4.2, has two of two halves likewise).

Each learns from the comparisons on one half of the prompts, from the same start and by the same section of the configuration.
Both are tried on the same held-out comparisons.
"""

from pathlib import Path

from cai_jax.config import Config
from cai_jax.stages import reward

STAGE = "referee"


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes referee/, as stages.reward does."""
    return reward.run(cfg, workdir, mesh, STAGE)
