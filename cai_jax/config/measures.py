"""The sections of the stages that measure, and of studies."""

from dataclasses import dataclass

from cai_jax.config.parts import Optimizer, Sampling


@dataclass(frozen=True)
class Harm:
    """A regressor of the harm, from 0 to 4, that people saw in conversations (CAI 4.5). In runs that have it, results and PPO's
    watch say what it rates."""

    data: str = "cai_jax/miniworld/data/attempts.jsonl"  # conversations with their ratings, as red-team-attempts has them
    max_attempts: int = 0  # use the first N; 0: all
    epochs: int = 4
    batch_size: int = 32  # conversations per step
    microbatches: int = 1
    heldout_share: float = 0.1  # share of the prompts whose conversations are kept for its error, and a constant's
    checkpoint_every: int = 25
    optimizer: Optimizer = Optimizer(learning_rate=3e-4, warmup_steps=5)


@dataclass(frozen=True)
class Evaluate:
    redteam: str = "cai_jax/miniworld/data/redteam_eval.jsonl"  # a sample of the pipeline's own prompts, both kinds
    heldout: str = "cai_jax/miniworld/data/heldout.jsonl"  # prompts whose items no stage has seen
    limit: int = 0  # prompts per set, taken evenly; 0: all
    best_of: int = 0  # also the best, by the reward model, of up to so many answers of where RL starts; 0: not
    judge: bool = False  # also Elo by the judge of the stage preferences, and how it agrees with the oracle
    sampling: Sampling = Sampling(batch_size=256)


@dataclass(frozen=True)
class Attack:
    """Prompts that a model writes against the others, after those that were shown to it, and who fails at them."""

    prompts: int = 200  # wanted, of those that are left of what it writes
    tries: int = 8  # times as many are written at the most
    shots: int = 0  # prompts of --config.data.redteam that it is shown for each, which the embedded base never learnt to go by
    words: int = 2  # the first words of one more, from which it goes on; 0: it begins by itself
    results: str = ""  # evaluate/results.json of an earlier run: its most harmful categories are shown most; none: all alike
    near: float = 0.7  # share of word triples in common from which of two prompts one is left out
    rapport: int = 1  # harmless turns before the last, in the attack that makes friends first
    sampling: Sampling = Sampling(batch_size=256)  # of what the attacked models say
    writing: Sampling = Sampling(max_tokens=40, batch_size=256)


@dataclass(frozen=True)
class Erosion:
    """What fine-tuning on other things leaves of a model, and what brings it back."""

    model: str = "rl_cai"  # a model of the run
    data: str = "cai_jax/miniworld/data/comparisons.jsonl"  # comparisons, whose preferred responses are trained on
    after: tuple[int, ...] = (25, 100, 400)  # steps on them, after which it is judged
    recovery: tuple[int, ...] = (5, 10, 20)  # steps on the run's own data, after the last of those; (): none
    recover: str = "preferred"  # preferred: responses that its labels prefer | revisions; both with its helpful responses
    decided: float = 0.1  # of `preferred`: how far from a half a label must be to say anything
    rows: int = 8  # packed rows per step
    length: int = 128  # tokens per row
    checkpoint_every: int = 50
    optimizer: Optimizer = Optimizer(learning_rate=3e-4, warmup_steps=10, final_ratio=1.0)


@dataclass(frozen=True)
class Benchmarks:
    sets: tuple[str, ...] = ()  # local files of public evaluation sets, as published; see evals/formats.py
    limit: int = 0  # records per set, taken evenly; 0: all
    score_batch: int = 64  # see preferences.score_batch
    sampling: Sampling = Sampling(max_tokens=256)


@dataclass(frozen=True)
class Study:
    """`cai run` of a configuration with variants is a run of each at every seed, and a page of what they have in common."""

    variants: tuple[str, ...] = ()  # "NAME KEY=VALUE ...": each a configuration otherwise like this one
    seeds: int = 1  # from `seed` on
    claims: tuple[str, ...] = ()  # "TEXT: METRIC WHO [@ VARIANT] > METRIC WHO [@ VARIANT]", see evals/claims.py
