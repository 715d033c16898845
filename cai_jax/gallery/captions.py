"""Titles and captions: what a figure or table shows and rests on, and how it differs from the one that it follows."""

# Key -> (title, what it shows; {n} is what it rests on and {of} what it is of, the difference).
CAPTIONS = {
    "figure-2": (
        "Figure 2: harmlessness against helpfulness",
        "Sampled answers to the same {n}, compared by the oracle; zero is the base of each run, through which alone "
        "runs meet: where a model wins every time, how far it gets depends on who else is in its run.",
        "In the paper people compare whole conversations, points are snapshots of RL, and models have 52 B parameters.",
    ),
    "figure-3": (
        "Figure 3: Elo by model",
        "As figure 2, from {n}.",
        "In the paper people compare, and models stand side by side by their size.",
    ),
    "figure-4": (
        "Figure 4: who finds the better answer",
        "Comparisons on which judge and people both have a side ({n}).",
        "In the paper: 438 comparisons of helpfulness, honesty and harmlessness, by size of the model.",
    ),
    "figure-5": (
        "Figure 5: by number of revisions",
        "First responses (0) and revisions, {n}; a reward model is the run's own.",
        "In the paper one of 52 B parameters scores, for harmlessness, helpfulness and both; there is no oracle.",
    ),
    "figure-6": (
        "Figure 6: by number of principles",
        "Last revisions, {n}; diversity is the share of different beginnings of four words, without an interval for one seed.",
        "In the paper, from 1 to 16 principles, a reward model scores them; its mean is flat, and diversity is said to grow.",
    ),
    "figure-7": (
        "Figure 7: revisions with and without a critique",
        "First responses (0) and revisions, {n}.",
        "In the paper a reward model scores, and critique helps small models more.",
    ),
    "figure-8": (
        "Figure 8: Elo along RL",
        "Snapshots of the policy, their sampled answers to {n}, compared by the oracle; zero is where RL starts.",
        "In the paper people compare, and the axis is training sequences.",
    ),
    "figure-9": (
        "Figure 9: calibration of the labels",
        "Labels before any clamp, in ten bins, against {of} ({n}); the area of a point is its number, bars are Wilson's 95 %.",
        "In the paper: comparisons of helpfulness, honesty and harmlessness.",
    ),
    "figure-10": (
        "Figure 10: absolute harm along RL",
        "Answers at T = 1 (solid) and greedy ones (dashed) to the harmful of {n}.",
        "In the paper a regressor of people's ratings says it, of 64 prompts with 256 answers each; the oracle is ours.",
    ),
    "overoptimisation": (
        "Over-optimisation",
        "Snapshots of the policy{of} on {n}: what PPO climbs, a referee that learnt from other comparisons, and the oracle.",
        "After figure 1 of 2210.10760, where a larger reward model is the truth.",
    ),
    "frontier": (
        "Harm and help by distance from the start",
        "Answers to {n} at T = 1; KL by their mean log-ratio, of best-of-n at most log n - (n - 1) / n. Dotted: the start.",
        "After figure 1 of 2204.05862 and 2210.10760; not in the paper.",
    ),
    "erosion": (
        "Erosion and recovery",
        "{of} after steps of fine-tuning on benign comparisons alone, then on the run's own data (shaded); {n}.",
        "Mathew John 2026 names 8 to 14 % after 5,000 steps; not in the paper.",
    ),
    "attacks": (
        "Attacks",
        "Prompts that the base wrote, put to the models{of} in several ways, {n} for a bar. Hatched: complies in part.",
        "Mathew John 2026 names 4.7 % failures; the paper's attacks are people's.",
    ),
    "table-1": (
        "Table 1: scale",
        "What the stages were given, at the first seed; tokens are those that are learnt, where they are counted.",
        "After table 1 of Mathew John 2026.",
    ),
    "table-2": (
        "Table 2: harmlessness by category",
        "From 1 to 5, higher is better: 5 less the oracle's mean harm of sampled answers to {n}.",
        "After table 2 of Mathew John 2026, where people rate 4,200 prompts.",
    ),
    "table-3": (
        "Elo by who compares",
        "Sampled answers to held-out prompts, harmful ones for harmlessness and benign ones for helpfulness; the base has 0.",
        "In the paper people compare; it has no value at equal length.",
    ),
}


def sure(seeds: list[int]) -> str:
    """What the intervals are of. seeds: how many each group of runs has."""
    if set(seeds) == {1}:
        return "Intervals are of 95 %, over prompts; another seed may do otherwise."
    several = " or ".join(str(n) for n in sorted({*seeds} - {1}))
    return f"Intervals are of 95 %, Student's over {several} seeds" + ", over prompts where there is one" * (1 in seeds) + "."


def caption(key: str, n: str, of: str = "", seeds: list[int] | None = None) -> str:
    """seeds: as `sure` wants them; none: nothing has an interval."""
    _, shows, differs = CAPTIONS[key]
    return " ".join(filter(None, (shows.format(n=n, of=of), sure(seeds) if seeds else "", differs)))
