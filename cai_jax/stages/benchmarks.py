"""Public evaluation sets, from local files as they are published: every model of the run on each of them.

What is to be chosen is scored by log-prob, what is to be answered is answered and, where the set wants a judge, graded by one;
pairs go to the reward model. Writes benchmarks/results.json and benchmarks/answers.jsonl.
"""

from pathlib import Path

import numpy as np

from cai_jax import prompts, records
from cai_jax.config import Config
from cai_jax.errors import InputError
from cai_jax.evals import grading, scores, sets
from cai_jax.evals.formats import FORMATS
from cai_jax.evals.items import Choice, Open, Pair, asked
from cai_jax.evals.shares import HEADER, rows_of
from cai_jax.generate import Request, fits, sample_texts
from cai_jax.pairs import encode_comparisons
from cai_jax.progress import table
from cai_jax.score import all_pair_scores, choice_logprobs
from cai_jax.slots import ready
from cai_jax.stages import MODELS, inputs_of, load_constitution, load_lm, load_scorer
from cai_jax.workdir import begin, finish, write_json

STAGE, REWARD = "benchmarks", "reward"
SCORES = {f.name: f.scores for f in FORMATS}


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c = workdir / STAGE, cfg.benchmarks
    models = [m for m, stage in MODELS.items() if stage is None or stage in cfg.stages]
    after = tuple(s for s in (*filter(None, MODELS.values()), REWARD) if s in cfg.stages)
    read = {name_of(path): sets.read(path, c.limit) for path in c.sets}
    if len(read) < len(c.sets):
        raise InputError(f"--config.benchmarks.sets={c.sets}: two files have the same name; rename one")
    files = {f"set {n}": path for n, path in enumerate(c.sets)}
    if not begin(STAGE, workdir, inputs_of(cfg, workdir, STAGE, files, after, (*models, "judge"))):
        return False
    journal = records.Journal(folder / "journal.jsonl")
    of = {name: found.items for name, found in read.items()}
    outcomes: dict[tuple[str, str], dict] = {}  # (model, set) -> id of an item -> what scores.score wants of it
    for model in models:
        lm = ready(load_lm(cfg, workdir, mesh, model), c.sampling.gather)
        templates = load_constitution(cfg, model).templates
        for name, items in of.items():
            found = outcomes[model, name] = chosen(cfg, lm, templates, items, journal, mesh, f"{model}/{name}")
            found |= answered(cfg, lm, templates, items, journal, mesh, f"{model}/{name}")
        del lm  # before the next is loaded
    said = [
        {"model": m, "set": name, "id": i.id, "messages": i.messages, "answer": outcomes[m, name][i.id]}
        for m, name in outcomes
        for i in of[name]
        if isinstance(i, Open) and i.id in outcomes[m, name]
    ]
    graded(cfg, workdir, mesh, {name: found.format for name, found in read.items()}, of, outcomes, journal)
    if REWARD in cfg.stages:
        for name, items in of.items():
            outcomes[REWARD, name] = compared(cfg, workdir, mesh, items)
    results = figures(read, of, outcomes)
    write_json(folder / "results.json", results)
    records.write(folder / "answers.jsonl", said)
    left_out = {name: found.left_out for name, found in read.items() if found.left_out}
    counts = {"items": {name: len(items) for name, items in of.items()}, "left out": left_out}
    finish(STAGE, workdir, counts, ("results.json",))
    journal.remove()
    show(results)
    return True


def name_of(path: str) -> str:
    return Path(path).name.partition(".")[0]


def chosen(cfg: Config, lm, templates, items, journal, mesh, key: str) -> dict[str, np.ndarray]:
    """Id of a Choice -> the log-probs of its choices [C]; those that the model's context cannot hold are not in it."""
    if key in journal.done:
        return {id: np.array(x) for id, x in journal.done[key]["logp"].items()}
    todo = [(i, asked(i, templates)) for i in items if isinstance(i, Choice)]
    todo = [(i, both) for i, both in todo if all(fits(lm, both[0] + option, 1) for option in both[1])]
    if not todo:
        return {}
    logp = choice_logprobs(lm, [both for _, both in todo], cfg.benchmarks.score_batch, mesh, key)
    found = {i.id: x for (i, _), x in zip(todo, logp, strict=True)}
    journal.add([{"key": key, "logp": {id: x.tolist() for id, x in found.items()}}])
    return found


def answered(cfg: Config, lm, templates, items, journal, mesh, key: str) -> dict[str, str]:
    """Id of an Open -> the model's answer; prompts that its context cannot hold with one are not in it."""
    c = cfg.benchmarks
    todo = [(i, prompts.dialogue(i.messages, templates)) for i in items if isinstance(i, Open)]
    todo = [(i, context) for i, context in todo if fits(lm, context, c.sampling.max_tokens)]
    if not todo:
        return {}
    requests = [Request(f"{key}/{i.id}", context) for i, context in todo]
    texts = sample_texts(lm, requests, c.sampling, cfg.seed, journal, mesh, templates, key)
    return {i.id: x["text"] for (i, _), x in zip(todo, texts, strict=True)}


def graded(cfg: Config, workdir: Path, mesh, formats: dict[str, str], of, outcomes, journal) -> None:
    """Puts a judge's grades in the place of answers where the score of a set is made of them. What the judge's context cannot
    hold has none."""
    wanted = {name: SCORES[format].get(Open) for name, format in formats.items()}
    wanted = {name: score for name, score in wanted.items() if score in grading.ASKED}
    if not wanted:
        return
    lm = ready(load_lm(cfg, workdir, mesh, "judge"), cfg.preferences.thought.gather, decoding=False)
    templates = load_constitution(cfg, "judge").templates
    for (model, name), found in outcomes.items():
        if not (score := wanted.get(name)):
            continue
        items = [i for i in of[name] if i.id in found]
        several = {i.id: [asked(q, templates) for q in grading.questions(i, found[i.id], score)] for i in items}
        held = [id for id, qs in several.items() if all(fits(lm, c + option, 1) for c, options in qs for option in options)]
        key, flat = f"grades/{model}/{name}", [q for id in held for q in several[id]]
        if key in journal.done:
            logp = [np.array(x) for x in journal.done[key]["logp"]]
        else:
            logp = choice_logprobs(lm, flat, cfg.benchmarks.score_batch, mesh, key) if flat else []
            journal.add([{"key": key, "logp": [x.tolist() for x in logp]}])
        k = 2 * len(grading.ASKED[score])  # in both orders
        grades = {id: grading.outcome(score, logp[n * k : (n + 1) * k]) for n, id in enumerate(held)}
        outcomes[model, name] = {i.id: grades.get(i.id) for i in items}


def compared(cfg: Config, workdir: Path, mesh, items) -> dict[str, np.ndarray]:
    """Id of a Pair -> the reward model's scores of the chosen answer and the other [2], of those that its context holds."""
    pairs = [i for i in items if isinstance(i, Pair)]
    if not pairs:
        return {}
    lm, templates = load_scorer(cfg, workdir, mesh, "reward"), load_constitution(cfg, REWARD).templates

    def held(item: Pair) -> bool:
        answers = (lm.tok.encode(prompts.completion(text, templates)) for text in (item.chosen, item.rejected))
        return len(lm.tok.prompt(prompts.dialogue(item.messages, templates))) + max(map(len, answers)) < lm.cfg.max_length

    todo = [i for i in pairs if held(i)]
    if not todo:
        return {}
    label = {"p_a": 1.0, "source": "ai"}  # which nothing reads
    rows = [{"messages": i.messages, "response_a": i.chosen, "response_b": i.rejected} | label for i in todo]
    encoded = encode_comparisons(lm.tok, templates, rows, lm.cfg.max_length, records.Drops())
    found = all_pair_scores(lm.net(), lm.params, encoded, cfg.reward.batch_size, mesh)
    return {i.id: x for i, x in zip(todo, found, strict=True)}


def figures(read: dict[str, sets.Evaluation], of: dict[str, list], outcomes) -> dict:
    """{set: {"format", "models": {model: {"missing", score: figures}}}}; missing: items that a context could not hold."""
    out = {name: {"format": found.format, "models": {}} for name, found in read.items()}
    for (model, name), found in outcomes.items():
        kinds = (Pair,) if model == REWARD else (Choice, Open)
        items = [i for i in of[name] if isinstance(i, kinds)]
        here = [i for i in items if i.id in found]
        if here:
            made = scores.score(read[name].format, here, [found[i.id] for i in here])
            out[name]["models"][model] = {"missing": len(items) - len(here)} | made
    return out


def show(results: dict) -> None:
    """The stage table in the terminal."""
    table("public evaluation sets", HEADER, rows_of(results))
