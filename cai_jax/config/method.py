"""The sections of what is read and of the stages that train."""

from dataclasses import dataclass

from cai_jax.config.parts import Checkpoint, Optimizer, Sampling


@dataclass(frozen=True)
class Data:
    redteam: str = "cai_jax/miniworld/data/redteam.jsonl"  # prompts that try to draw out harm: critique, preferences, ppo
    helpful: str = "cai_jax/miniworld/data/helpful.jsonl"  # prompts that only want help: critique, ppo
    comparisons: str = "cai_jax/miniworld/data/comparisons.jsonl"  # human helpfulness comparisons: reward, dpo
    max_redteam: int = 0  # use the first N prompts; 0: all
    max_helpful: int = 0  # likewise
    max_comparisons: int = 0  # likewise
    max_prompt: int = 0  # tokens; longer prompts are left out and counted; 0: a prompt that does not fit is an error
    max_pair: int = 0  # tokens of prompt and response; comparisons and attempts with more are left out, counted; 0: the context
    human_share: float = 0.0  # at most, of all comparisons; human ones beyond it are left out; 0: all of them are used


@dataclass(frozen=True)
class ConstitutionFile:
    path: str = "constitutions/miniworld.toml"
    exclude: tuple[str, ...] = ()  # principles that are left out, by category or id (ablation)
    corrupt: tuple[str, ...] = ()  # principles whose words are put in a meaningless order, likewise


@dataclass(frozen=True)
class Pretrain:
    """Only configs/miniworld_pretrain.py runs this stage: it makes the embedded base from nothing."""

    steps: int = 2600
    rows: int = 24  # per step
    length: int = 192  # tokens per packed row
    width: int = 128
    mlp_width: int = 352
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    checkpoint_every: int = 200
    optimizer: Optimizer = Optimizer(learning_rate=3e-3, warmup_steps=100, final_ratio=0.03, weight_decay=0.05)


@dataclass(frozen=True)
class Critique:
    rounds: int = 2  # critique-revision pairs per prompt; 0: the first response is the target
    temperature_end: float = 1.0  # of the last round, to which it goes linearly from sampling.temperature: set both
    greedy: bool = False  # critiques are greedy; responses and revisions keep their temperature
    direct: bool = False  # revise without a critique (paper, figure 7)
    use_principles: bool = True  # False: a request that names no principle
    few_shot: str = ""  # TOML of examples put before every critique and revision; empty: none
    helpful_responses: int = 1  # sampled per helpful prompt for the SFT mix
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class SFT:
    model: Checkpoint = Checkpoint()  # what is fine-tuned, and with it every later policy; none: the model that revised
    revisions: str = "last"  # last | all: which rounds' revisions are targets (the paper uses all)
    epochs: int = 4
    rows: int = 8  # packed rows per step
    length: int = 128  # tokens per row; longer examples are left out and counted
    microbatches: int = 1
    checkpoint_every: int = 100  # steps
    optimizer: Optimizer = Optimizer(learning_rate=3e-4, warmup_steps=10)


@dataclass(frozen=True)
class Limits:
    """What a figure of a judge may be, at worst, see evals/trust.py; the figure itself, not the end of its interval."""

    min_accuracy: float = 0.7  # RLAIF (2309.00267): labellers of 73.8 and 78 % were of use, one of 62.7 % of little
    min_kappa: float = 0.4  # the same where either side is right as often; "moderate" from there (Landis and Koch 1977)
    max_below_humans: float = 0.1  # less agreement with people than they have among themselves
    max_calibration_error: float = 0.1  # beyond what chance makes of so few rows
    max_flip_rate: float = 0.35  # RLAIF's labellers: 18, 21 and 56 %
    max_length_bias: float = 0.1  # either way, as is the next
    max_own_bias: float = 0.1


@dataclass(frozen=True)
class Preferences:
    judge: Checkpoint = Checkpoint()  # who compares; none: the base
    judges: tuple[str, ...] = ()  # who else does: more such folders or names, talked to as the first is
    constitutions: tuple[str, ...] = ()  # more files, beside constitution.path, about which every judge is asked
    gate: str = ""  # comparisons by people ("rater" tells several apart), on which every judge is tried first; none: it is not
    limits: Limits = Limits()  # of the gate
    despite: bool = False  # label also where a judge is beyond them
    policy: str = "sft"  # sft | base: whose responses are compared
    pairs: int = 1  # of responses, per prompt
    labels: str = "soft"  # soft | hard: p(A) as it is, or 0 / 1
    smoothing: float = 0.0  # how far labels move to their opposite: of 0.1, a label of 1 is 0.9
    principles: int = 1  # drawn of each constitution per comparison
    combine: str = "mean"  # of several judgements: mean | median | worst | agreement | priority (see panel.py)
    decided: float = 0.1  # for priority: distance from a half at which principles settle it, and those after them do not count
    chain_of_thought: bool = False
    clamp: tuple[float, float] = (0.4, 0.6)  # of chain-of-thought labels only (paper 4.1)
    few_shot: str = ""  # TOML of examples put before every comparison; empty: none
    score_batch: int = 128  # contexts scored together, where all are as long as the longest
    thoughts: int = 1  # chains of thought per judgement; the mean of their probabilities is what is clamped (paper 2: 5)
    thought: Sampling = Sampling(max_tokens=40)
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class People:
    """Of the comparisons of the stage preferences, those that people label instead of the judge."""

    share: float = 0.08  # of the comparisons; 1: all
    choose: str = "random"  # random | undecided: labels near a half | disputed: judgements differ | failing: see results
    results: str = ""  # for failing: evaluate/results.json of an earlier run, whose most harmful categories come first
    labels: str = ""  # JSONL of what they said; none: they are asked, the run waits | oracle: simulated, in the embedded world
    error: float = 0.05  # share of the simulated ones that are turned round
    told: bool = True  # the simulated were told to prefer, of equally harmless answers, what engages (paper 4.4); else chance
    minutes: float = 1.0  # of a person's time for one, in the accounts


@dataclass(frozen=True)
class Reward:
    model: Checkpoint = Checkpoint()  # what its trunk starts from, whatever `init` says; it may have a tokenizer of its own
    init: str = "sft"  # sft | base: what its trunk starts from
    epochs: int = 2
    batch_size: int = 32  # comparisons per step
    microbatches: int = 1
    heldout_share: float = 0.1  # share of the comparisons kept for accuracy and calibration
    checkpoint_every: int = 25
    optimizer: Optimizer = Optimizer(learning_rate=3e-4, warmup_steps=5)


@dataclass(frozen=True)
class PPO:
    init: str = "sft"  # sft | base: the policy's start and the KL reference
    iterations: int = 12
    batch_size: int = 128  # rollouts per iteration
    helpful_share: float = 0.5  # of the prompts of an iteration
    epochs: int = 2  # passes over the rollouts of an iteration
    minibatches: int = 4  # updates per pass
    advantage: str = "gae"  # gae: by a value function | rloo, grpo: by the other responses to a prompt, of `group`
    group: int = 1  # responses to each prompt of an iteration
    value_network: str = (
        "separate"  # separate: starts as the reward model, or as the policy if that reads others | shared: a head
    )
    kl_coef: float = 0.2  # reward per nat, paid at every token; 1 reward: a standard deviation of the reward model's scores
    kl_adaptive: bool = False  # move kl_coef so that the KL per response nears kl_target
    kl_target: float = 1.0  # nats per response
    kl_horizon: int = 10_000  # rollouts in which kl_coef may change by a fifth; larger is slower
    clip: float = 0.2  # of the probability ratio
    value_clip: float = 0.2  # of the change of a value, in rewards
    value_coef: float = 0.1  # weight of the value loss
    entropy_coef: float = 0.0
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True  # of gae
    missing_eos_penalty: float = 3.0  # rewards subtracted from the score of a response cut off at max_tokens
    target_kl: float = 0.0  # nats per token to the policy that sampled, after which an iteration makes no more passes; 0: any
    max_drift: float = 0.01  # largest mean |sampler - scorer| log-prob, nats per token, before the run stops
    evaluate_every: int = 4  # iterations; 0: never
    checkpoint_every: int = 4  # iterations
    sampling: Sampling = Sampling()
    optimizer: Optimizer = Optimizer(learning_rate=2e-4, final_ratio=0.2)


@dataclass(frozen=True)
class DPO:
    loss: str = "sigmoid"  # sigmoid: DPO | ipo: a squared loss, whose gap of rewards has a goal even where labels are certain
    beta: float = 0.1  # strength of the pull to the supervised model; larger stays closer
    epochs: int = 2
    batch_size: int = 64
    microbatches: int = 1
    checkpoint_every: int = 25
    optimizer: Optimizer = Optimizer(learning_rate=2e-4, warmup_steps=3)
