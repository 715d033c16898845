"""Tables of finished runs: how large each stage was, harmlessness by category, and Elo by whoever compares."""

from collections.abc import Sequence
from typing import NamedTuple

from cai_jax import canvas, metrics
from cai_jax.gallery.captions import CAPTIONS, caption
from cai_jax.gallery.runs import Group, Run, by_model, understood
from cai_jax.markup import DASH, number
from cai_jax.stages import MODELS

SCALE = (  # stage, what it is given, which of its counts that is, which its steps are, the section of its epochs
    ("critique", "red-team prompts", "kept", "", ""),
    ("sft", "revisions and helpful answers", "kept", "steps", "sft"),
    ("preferences", "comparisons by AI", "kept", "", ""),
    ("people", "comparisons by people", "people", "", ""),
    ("reward", "comparisons", "kept", "steps", "reward"),
    ("referee", "comparisons", "kept", "steps", "reward"),
    ("harm", "rated conversations", "kept", "steps", "harm"),
    ("dpo", "comparisons", "kept", "steps", "dpo"),
    ("ppo", "rollouts", "rollouts", "updates", "ppo"),
)


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str


def tables(groups: Sequence[Group]) -> list[Table]:
    """Those that the runs have files for. Raises InputError for files of another form."""
    with understood(groups):
        found = {"table-1": scale(groups), "table-2": of_five(groups), "table-3": elo(groups)}
    return [Table(CAPTIONS[key][0], header, rows, caption(key, n)) for key, (header, rows, n) in found.items() if rows]


def scale(groups: Sequence[Group]) -> tuple[list[str], list[list[str]], str]:
    """How much each stage was given, once where groups share it."""
    rows, seen = [], set()
    for run, name in ((g.runs[0], g.name) for g in groups):
        for stage, what, examples, steps, section in SCALE:
            counts = (run.read(f"{stage}/done.json") or {"counts": {}})["counts"]
            if examples in counts and (stage, run.made(stage)) not in seen:
                epochs = getattr(run.cfg, section).epochs if section else None
                cells = (counts.get("half", counts[examples]), tokens(run, stage, counts), epochs, counts.get(steps))
                rows.append([stage, name, what, *(DASH if x is None else f"{x:,.0f}" for x in cells)])
                seen.add((stage, run.made(stage)))
    return *_named(["stage", "run", "given", "examples", "tokens", "epochs", "updates"], rows, groups), ""


def tokens(run: Run, stage: str, counts: dict) -> float | None:
    """That are learnt in a stage, in all its epochs; None where they are not counted."""
    if stage == "ppo":
        logged = metrics.load(run.folder / stage)
        return run.cfg.ppo.epochs * sum(float(r["response_length"]) for r in logged) * counts["rollouts"] / max(1, len(logged))
    return counts["target_tokens"] * run.cfg.sft.epochs if "target_tokens" in counts else None


def of_five(groups: Sequence[Group]) -> tuple[list[str], list[list[str]], str]:
    """5 less the harm from 0 to 4, by category, of sampled answers to held-out prompts."""
    found, seen, sizes = [], set(), set()
    for g in groups:
        models = (g.pool("evaluate/results.json") or {"models": {}})["models"]
        for model in canvas.ordered(models):
            of, stage = models[model]["heldout"]["sampled"], MODELS.get(model)
            mark = model, g.made(stage or "evaluate") if stage or model != "base" else g.cfg.model.path
            if of["harm_score"] is not None and mark not in seen:
                each = {c: x["harm_score"] for c, x in of["by_category"].items() if "harm_score" in x}
                found.append((canvas.label_of(model), g.name if stage else "", each | {"mean": of["harm_score"]}))
                sizes.add(of["n_harmful"])
                seen.add(mark)
    kinds = [*dict.fromkeys(c for _, _, each in found for c in each if c != "mean"), "mean"]
    rows = [[label, name, *(number(5 - each[c], 5) if c in each else DASH for c in kinds)] for label, name, each in found]
    n = f"{' or '.join(f'{k:.0f}' for k in sorted(sizes))} harmful held-out prompts"
    return *_named(["model", "run", *kinds], rows, groups), n


def elo(groups: Sequence[Group]) -> tuple[list[str], list[list[str]], str]:
    """Of sampled answers to held-out prompts, as they are and as if they were equally long."""
    rows = []
    for g in groups:
        whole = g.pool("evaluate/results.json") or {}
        for who, tree in (("oracle", whole), ("judge", whole.get("by_judge", {}))):
            equal = by_model(tree.get("elo_at_equal_length", {}))
            for scale, of in by_model(tree.get("elo", {})).items():
                for model in canvas.ordered(of):
                    span, other = f" ({of[model]['low']:+.0f} to {of[model]['high']:+.0f})", equal.get(scale, {}).get(model)
                    cells = f"{of[model]['elo']:+.0f}{span}", f"{other['elo']:+.0f}" if other else DASH
                    rows.append([canvas.label_of(model), g.name, scale, who, *cells])
    return *_named(["model", "run", "scale", "by", "Elo (95 %)", "at equal length"], rows, groups), ""


def _named(header: list[str], rows: list[list[str]], groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """With the second column, of the groups' names, where there are several."""
    header, *rows = [[row[0], *row[1 + (len(groups) == 1) :]] for row in (header, *rows)]
    return header, rows
