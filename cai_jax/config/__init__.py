"""Every configuration key once: its default, its unit, its meaning.

Each section is a frozen dataclass. `default()` turns the whole into a locked `ConfigDict` that files in `configs/` and
`--config.section.key=value` change; `section(cfg.sft, SFT)` turns a part of it back at a stage's edge, so that the code of a
stage reads plain, checked attributes.
"""

from dataclasses import dataclass

from ml_collections import ConfigDict

from cai_jax.config.measures import Attack, Benchmarks, Erosion, Evaluate, Harm, Study
from cai_jax.config.method import (
    DPO,
    PPO,
    SFT,
    ConstitutionFile,
    Critique,
    Data,
    Limits,
    People,
    Preferences,
    Pretrain,
    Reward,
)
from cai_jax.config.parts import Checkpoint, Lora, Model, Optimizer, Sampling
from cai_jax.sections import to_dict

__all__ = ["Checkpoint", "Config", "Limits", "MODELS", "Optimizer", "STAGES", "Sampling", "default"]

STAGES = (  # in the order in which they run
    *("pretrain", "critique", "sft", "preferences", "people", "reward", "referee", "harm", "dpo", "ppo", "evaluate"),
    *("attack", "erosion", "benchmarks", "report"),
)
# Name of a language model in results and configs -> the stage that makes it.
MODELS = {"base": None, "sl_cai": "sft", "dpo_cai": "dpo", "rl_cai": "ppo"}


@dataclass(frozen=True)
class Config:
    stages: tuple[str, ...] = ("critique", "sft", "preferences", "reward", "ppo", "evaluate", "report")  # in this order
    seed: int = 0  # of all sampling, shuffling and initialisation
    mesh: tuple[int, int, int] = (-1, 1, 1)  # devices along ("data", "fsdp", "model"); one may be -1: what is left
    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    constitution: ConstitutionFile = ConstitutionFile()
    pretrain: Pretrain = Pretrain()
    critique: Critique = Critique()
    sft: SFT = SFT()
    preferences: Preferences = Preferences()
    people: People = People()
    reward: Reward = Reward()
    dpo: DPO = DPO()
    harm: Harm = Harm()
    ppo: PPO = PPO()
    evaluate: Evaluate = Evaluate()
    attack: Attack = Attack()
    erosion: Erosion = Erosion()
    benchmarks: Benchmarks = Benchmarks()
    study: Study = Study()


def default() -> ConfigDict:
    """The default configuration as a ConfigDict; keys can be changed, none can be added."""
    return to_dict(Config()).lock()
