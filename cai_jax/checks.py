"""A configuration is checked before anything runs: what each value may be, and what they may be together."""

import dataclasses
import math
import re

from cai_jax.config import MODELS, STAGES, Checkpoint, Config, Erosion, Limits, Preferences
from cai_jax.sections import section, walk

SAMPLINGS = tuple(f"{s}.sampling" for s in ("critique", "preferences", "ppo", "evaluate", "attack", "benchmarks"))
SAMPLINGS += ("preferences.thought", "attack.writing")
CHOICES = {
    "model.format": ("plain", "chat"),
    **{f"{part}.format": ("plain", "chat") for part in ("sft.model", "preferences.judge", "reward.model")},
    "model.compute_dtype": ("auto", "float32", "bfloat16"),
    "model.trained_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn", "splash"),
    "model.remat": ("none", "full", "dots"),
    "model.sequence": ("whole", "split"),
    "model.layers": ("scanned", "unrolled"),
    **{f"{s}.cache": ("auto", "bfloat16", "int8") for s in SAMPLINGS},
    "sft.revisions": ("last", "all"),
    "preferences.policy": ("sft", "base"),
    "preferences.labels": ("soft", "hard"),
    "dpo.loss": ("sigmoid", "ipo"),
    "people.choose": ("random", "undecided", "disputed", "failing"),
    "preferences.combine": ("mean", "median", "worst", "agreement", "priority"),
    "reward.init": ("sft", "base"),
    "ppo.init": ("sft", "base"),
    "erosion.model": tuple(MODELS),
    "erosion.recover": ("preferred", "revisions"),
    "ppo.value_network": ("separate", "shared"),
    "ppo.advantage": ("gae", "rloo", "grpo"),
}
AT_LEAST_ONE = "epochs rows length batch_size microbatches minibatches max_tokens checkpoint_every score_batch".split()
AT_LEAST_ONE += "principles pairs group kl_horizon num_layers num_heads num_kv_heads width mlp_width steps".split()
AT_LEAST_ONE += "thoughts prompts tries".split()
AT_LEAST_ONE += ("vocab_multiple",)
SHARES = ("share", "smoothing", "error", "helpful_share", "heldout_share", "top_p", "min_p", "discount", "gae_lambda", "near")
SHARES += tuple(f.name for f in dataclasses.fields(Limits))
ABOVE_ZERO = ("share", "top_p", "clip_norm", "kl_target", "alpha", "eps", "max_drift")
BELOW_ONE = ("b1", "b2", "human_share")
NOT_NEGATIVE = ("rounds", "temperature", "temperature_end", "learning_rate", "kl_coef", "clip", "beta", "iterations", "limit")
NOT_NEGATIVE += ("final_ratio", "value_clip", "value_coef", "entropy_coef", "missing_eos_penalty", "weight_decay", "target_kl")
NOT_NEGATIVE += ("seed", "max_redteam", "max_helpful", "max_comparisons", "helpful_responses", "warmup_steps", "evaluate_every")
NOT_NEGATIVE += ("rank", "max_prompt", "max_pair", "top_k", "minutes", "best_of", "max_attempts", "rapport", "shots", "words")
ADAPTING = ("sft", "reward", "dpo", "ppo")  # the stages that can train adapters


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the flag to change."""


def _require(good: bool, flag: str, got, wanted: str) -> None:
    if not good:
        raise ConfigError(f"--config.{flag}={got!r}: wanted {wanted}")


def resolve(config) -> Config:
    """ConfigDict -> Config, checked. Raises ConfigError that names the flag, what it got and what is wanted."""
    cfg = section(config, Config)
    for flag, name, value in walk(cfg):
        _require(value is not None, flag, value, "a value")
        _require(not isinstance(value, float) or math.isfinite(value), flag, value, "a finite number")
        if flag in CHOICES:
            _require(value in CHOICES[flag], flag, value, "one of " + ", ".join(CHOICES[flag]))
        if name in AT_LEAST_ONE:
            _require(value >= 1, flag, value, "a whole number of at least 1")
        if name in SHARES:
            _require(0 <= value <= 1, flag, value, "a share between 0 and 1")
        if name in ABOVE_ZERO:
            _require(value > 0, flag, value, "more than zero")
        if name in BELOW_ONE:
            _require(0 <= value < 1, flag, value, "zero or more, and less than 1")
        if name in NOT_NEGATIVE:
            _require(value >= 0, flag, value, "zero or more")
    _check_stages(cfg)
    _require(cfg.seed < 2**32, "seed", cfg.seed, "less than 2 ** 32")
    _check_study(cfg)
    _require(len(cfg.mesh) == 3 and all(isinstance(s, int) for s in cfg.mesh), "mesh", cfg.mesh, "three whole numbers")
    _check_erosion(cfg.erosion)
    _require(cfg.attack.shots or cfg.attack.words, "attack.shots", cfg.attack.shots, "at least 1, or --config.attack.words")
    for name in ("sft", "reward", "dpo", "harm"):
        part = getattr(cfg, name)
        rows = part.rows if name == "sft" else part.batch_size
        _require(rows % part.microbatches == 0, f"{name}.microbatches", part.microbatches, f"a divisor of the batch, {rows}")
    rows, parts = cfg.ppo.batch_size, cfg.ppo.minibatches
    _require(rows % parts == 0, "ppo.minibatches", parts, f"a divisor of the batch, {rows}")
    group, least = cfg.ppo.group, 1 if cfg.ppo.advantage == "gae" else 2
    _require(group >= least and rows % group == 0, "ppo.group", group, f"at least {least}, and a divisor of the batch, {rows}")
    helpful, groups = round(rows * cfg.ppo.helpful_share / group), rows // group
    both = cfg.ppo.helpful_share in (0, 1) or 0 < helpful < groups or group == 1
    _require(both, "ppo.group", group, f"so few that some of the {groups} groups are helpful prompts and some are not")
    try:
        re.compile(cfg.lora.targets)
    except re.error as error:
        raise ConfigError(f"--config.lora.targets={cfg.lora.targets!r}: wanted a regular expression; {error}") from error
    for flag, part in (
        ("sft.model", cfg.sft.model),
        ("preferences.judge", cfg.preferences.judge),
        ("reward.model", cfg.reward.model),
    ):
        for name in ("format", "system"):
            given, usual = getattr(part, name), getattr(Checkpoint(), name)
            _require(part.path or given == usual, f"{flag}.{name}", given, f"--config.{flag}.path too: it is about that model")
    adapting = set(cfg.lora.stages)
    _require(adapting <= set(ADAPTING), "lora.stages", cfg.lora.stages, "stages out of " + ", ".join(ADAPTING))
    _require(adapting or not cfg.lora.rank, "lora.stages", cfg.lora.stages, "at least one stage, or --config.lora.rank=0")
    _check_preferences(cfg.preferences)
    results, failing = cfg.people.results, cfg.people.choose == "failing"
    _require(bool(results) == failing, "people.results", results, "evaluate/results.json of a run, if choose=failing")
    heat = cfg.ppo.sampling.temperature
    _require(heat > 0, "ppo.sampling.temperature", heat, "more than zero: rollouts are sampled")
    for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        got = getattr(cfg.ppo.sampling, name)
        _require(got == off, f"ppo.sampling.{name}", got, f"{off}: rollouts are scored under the whole distribution")
    return cfg


def _check_study(cfg: Config) -> None:
    _require(cfg.study.seeds >= 1, "study.seeds", cfg.study.seeds, "a whole number of at least 1")
    _require(cfg.seed + cfg.study.seeds <= 2**32, "study.seeds", cfg.study.seeds, "no seed past 2 ** 32")
    _require("benchmarks" not in cfg.stages or cfg.benchmarks.sets, "benchmarks.sets", cfg.benchmarks.sets, "files of sets")
    for name in ("variants", "claims"):
        given = getattr(cfg.study, name)
        _require(all(isinstance(x, str) for x in given), f"study.{name}", given, "texts in quotes: ('a', 'b')")
    _require(not cfg.study.claims or cfg.study.variants, "study.claims", cfg.study.claims, "--config.study.variants too")


def _check_preferences(c: Preferences) -> None:
    good = len(c.clamp) == 2 and all(isinstance(x, int | float) for x in c.clamp) and 0 <= c.clamp[0] < c.clamp[1] <= 1
    _require(good, "preferences.clamp", c.clamp, "two bounds with 0 <= low < high <= 1")
    thinks, shown = c.chain_of_thought, c.few_shot
    _require(not (thinks and shown), "preferences.few_shot", shown, "none with chain_of_thought: the blocks hold no thoughts")
    _require(thinks or c.thoughts == 1, "preferences.thoughts", c.thoughts, "1, or --config.preferences.chain_of_thought=True")
    differ = c.thought.temperature > 0 or c.thoughts == 1
    _require(differ, "preferences.thoughts", c.thoughts, "1 at --config.preferences.thought.temperature=0: all are the same")
    for name in ("judges", "constitutions"):
        given = getattr(c, name)
        _require(all(isinstance(x, str) and x for x in given), f"preferences.{name}", given, "names in quotes: ('a', 'b')")
    most = round(max(abs(bound - 0.5) for bound in c.clamp), 9) if thinks and c.combine == "priority" else 0.5
    _require(0 <= c.decided <= most, "preferences.decided", c.decided, f"zero to {most:.3g}: no judgement goes farther")


def _check_erosion(c: Erosion) -> None:
    for name in ("after", "recovery"):
        given = getattr(c, name)
        good = all(isinstance(n, int) and n > 0 for n in given) and list(given) == sorted(set(given))
        wanted = "numbers of steps, each larger than the one before" + ", at least one" * (name == "after")
        _require(good and (given or name == "recovery"), f"erosion.{name}", given, wanted)
    _require(0 <= c.decided < 0.5, "erosion.decided", c.decided, "zero or more, and less than a half")


def _read_by_erosion(c: Erosion) -> tuple[str, ...]:
    labelled = ("preferences",) if c.recover == "preferred" else ()
    return (("critique", *labelled) if c.recovery else ()) + tuple(filter(None, (MODELS[c.model],)))


def _check_stages(cfg: Config) -> None:
    stages = cfg.stages
    for stage in stages:
        _require(stage in STAGES, "stages", stage, "stages out of " + ", ".join(STAGES))
    _require(len(set(stages)) == len(stages), "stages", stages, "each stage once")
    order = [STAGES.index(s) for s in stages]
    _require(order == sorted(order), "stages", stages, "the order " + ", ".join(STAGES))
    needs = {
        "sft": ("critique",),
        "preferences": ("sft",) if cfg.preferences.policy == "sft" else (),
        "people": ("preferences",),
        "reward": ("preferences",) + (("sft",) if cfg.reward.init == "sft" and not cfg.reward.model.path else ()),
        "referee": ("reward",),
        "evaluate": _read_by_evaluate(cfg),
        "erosion": _read_by_erosion(cfg.erosion),
        "dpo": ("preferences", "sft"),
        "ppo": ("reward",) + (("sft",) if cfg.ppo.init == "sft" else ()),
    }
    for stage in stages:
        for need in needs.get(stage, ()):
            _require(need in stages, "stages", stages, f"{need}, which {stage} reads (stages already done are skipped)")


def _read_by_evaluate(cfg: Config) -> tuple[str, ...]:
    best = (("reward",) + (("sft",) if cfg.ppo.init == "sft" else ())) if cfg.evaluate.best_of else ()
    return best + (("preferences",) if cfg.evaluate.judge else ())


def check_batches(cfg: Config, ways: int) -> None:
    """Raises ConfigError for a batch of a stage in `cfg.stages` that a mesh cannot split evenly over `ways` devices."""
    sampled = ("critique", "preferences", "evaluate", "attack", "benchmarks")
    parts = {  # rows that lie on the mesh together: flag -> (rows, how many parts they are taken in)
        **{f"{s}.sampling.batch_size": (getattr(cfg, s).sampling.batch_size, 1) for s in sampled},
        "preferences.score_batch": (cfg.preferences.score_batch, 1),
        "pretrain.rows": (cfg.pretrain.rows, 1),
        "sft.rows": (cfg.sft.rows, cfg.sft.microbatches),
        "reward.batch_size": (cfg.reward.batch_size, cfg.reward.microbatches),
        "dpo.batch_size": (cfg.dpo.batch_size, cfg.dpo.microbatches),
        "harm.batch_size": (cfg.harm.batch_size, cfg.harm.microbatches),
        "attack.writing.batch_size": (cfg.attack.writing.batch_size, 1),
        "erosion.rows": (cfg.erosion.rows, 1),
        "ppo.batch_size": (cfg.ppo.batch_size, 1),
    }
    if cfg.preferences.chain_of_thought:
        parts["preferences.thought.batch_size"] = (cfg.preferences.thought.batch_size, 1)
    if cfg.ppo.evaluate_every and "ppo" in cfg.stages or "erosion" in cfg.stages:  # which judge as evaluate does
        cfg = dataclasses.replace(cfg, stages=(*cfg.stages, "evaluate"))
    for flag, (rows, taken) in parts.items():
        wanted = f"a multiple of {ways * taken}: {ways} devices share the rows" + f" of each of {taken} parts" * (taken > 1)
        _require(flag.split(".")[0] not in cfg.stages or rows % (ways * taken) == 0, flag, rows, wanted)
