"""AI preference labels (paper 4.1): two samples per prompt, judged by the base, or another model, through option log-probs.

Both orders are averaged, which removes a preference for a position, and so is what several chains of thought come to (paper 2);
the label stays soft. Several judges, constitutions and principles are a panel (see panel.py), whose judges go one after another
over all pairs. Every judgement of every principle is kept in the record. Writes preferences/comparisons.jsonl.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cai_jax import constitution as constitutions
from cai_jax import gate, panel, prompts, records
from cai_jax.config import Config
from cai_jax.constitution import Constitution
from cai_jax.constitution.few_shot import load_few_shot
from cai_jax.data import load_pool
from cai_jax.errors import InputError
from cai_jax.files import read_json
from cai_jax.generate import Request, fits, sample_texts
from cai_jax.losses import preference_from_logprobs
from cai_jax.score import averaged_preference, option_logprobs
from cai_jax.slots import ready
from cai_jax.stages import OF_INIT, checkpoint, identity, inputs_of, load_constitution, load_lm, same_texts
from cai_jax.workdir import begin, finish, write_json

STAGE = "preferences"
OPTION_TOKENS = 8  # room for an option in any tokenizer
MARK = 16  # digits of a fingerprint that name a constitution
FIRST = "judge 1"  # seat, whose thoughts have the keys they had before there were others


class Seat(NamedTuple):
    """A judge with a constitution."""

    judge: str  # its name, see panel.judges
    number: int  # of the constitution, from 1, see panel.laws
    constitution: Constitution  # in the templates of the judge
    named: dict[str, str]  # what tells its judgements from those of others; {}: there are no others

    @property
    def key(self) -> str:
        """In the journal."""
        return f"{self.judge} {self.number}"

    @property
    def templates(self) -> dict[str, str]:
        return self.constitution.templates

    def drawn(self, cfg: Config, id: str, *what, k: int = 1) -> tuple[constitutions.Principle, ...]:
        """Principles for a record: the same for every judge, and of a constitution whatever others there are."""
        further = (f"constitution{self.number}",) if self.number > 1 else ()
        return constitutions.sample(self.constitution, cfg.seed, STAGE, id, *further, *what, k=k)


def seats_of(judges: dict[str, Config]) -> list[Seat]:
    """Every judge with every constitution, in their order; see panel.judges."""
    laws = {name: [load_constitution(law, "judge") for law in panel.laws(alone)] for name, alone in judges.items()}
    marks = [law.fingerprint[:MARK] for law in laws["judge"]]  # of one file for all judges, whatever their templates
    named = {"judge": len(judges) > 1, "constitution": len(marks) > 1}
    return [
        Seat(name, n, law, {k: v for k, v in (("judge", name), ("constitution", marks[n - 1])) if named[k]})
        for name, own in laws.items()
        for n, law in enumerate(own, 1)
    ]


def run(cfg: Config, workdir: Path, mesh) -> bool:
    folder, c, writer = workdir / STAGE, cfg.preferences, OF_INIT[cfg.preferences.policy]
    judges = panel.judges(cfg, checkpoint(cfg, "judge"))
    seats = seats_of(judges)
    if not begin(STAGE, workdir, _inputs(cfg, workdir, judges, seats)):
        for name, of in read_json(folder / "gate.json").items() if c.gate else ():
            gate.admitted(c, name, of)  # by today's limits
        return False
    journal = records.Journal(folder / "journal.jsonl")
    tried = {}
    for name, alone in judges.items() if c.gate else ():  # before anything is sampled, so that another judge may be given
        lm = ready(load_lm(alone, workdir, mesh, "judge"), c.thought.gather, decoding=c.chain_of_thought)
        own = {"judge"} | ({"base"} if same_texts(alone, "base", "judge") else set())
        tried[name] = tried_out(cfg, lm, next(s for s in seats if s.judge == name), own, journal, mesh)
        del lm
    if tried:
        write_json(folder / "gate.json", tried)
    policy = ready(load_lm(cfg, workdir, mesh, writer), c.sampling.gather)
    templates = load_constitution(cfg, writer).templates
    pool, counted = load_pool(cfg.data, "redteam", policy.tok, templates)
    todo = [p | {"id": f"{p['id']}+{n}" if n else p["id"]} for n in range(c.pairs) for p in pool]
    if len({p["id"] for p in todo}) < len(todo):
        raise InputError(f"{cfg.data.redteam}: ids end in '+1' and the like, as those of further pairs do; give others")
    asked = [Request(f"{p['id']}/{side}", prompts.dialogue(p["messages"], templates)) for p in todo for side in "ab"]
    samples = sample_texts(policy, asked, c.sampling, cfg.seed, journal, mesh, templates)
    del policy  # before the judge is loaded
    drops, pairs = records.Drops(), []
    for p, a, b in zip(todo, samples[0::2], samples[1::2], strict=True):
        whole, said = a["finished"] and b["finished"], a["text"] and b["text"]  # what is cut off must not be taught as an end
        if (
            drops.keep(whole, "cut off")
            and drops.keep(bool(said), "empty response")
            and drops.keep(a["text"] != b["text"], "identical responses")
        ):
            pairs.append(p | {"response_a": a["text"], "response_b": b["text"]})
    judged = asked_all(cfg, workdir, mesh, pairs, drops, journal)
    if not judged:
        raise InputError(
            f"preferences: of {len(todo)} prompts none gave two different responses to judge: {dict(drops.reasons)}"
        )
    records.write(folder / "comparisons.jsonl", judged)
    counts = drops.counts(len(todo), len(judged)) | label_statistics(judged) | panel.statistics(judged)
    if several := {s.named["constitution"]: s.constitution.name for s in seats if "constitution" in s.named}:
        counts["constitutions"] = several
    counts["prompts"] = {"redteam": counted}
    if beyond := {name: of["beyond"] for name, of in tried.items() if of["beyond"]}:
        counts["beyond the limits"] = beyond
    finish(STAGE, workdir, counts, ("comparisons.jsonl",))
    journal.remove()
    return True


def asked_all(cfg: Config, workdir: Path, mesh, pairs: list[dict], drops: records.Drops, journal) -> list[dict]:
    """The pairs, labelled by all of the panel, see `labelled`. Those that a judge's context cannot hold are dropped."""
    c, judges, found = cfg.preferences, panel.judges(cfg, checkpoint(cfg, "judge")), []
    seats = seats_of(judges)
    for name, alone in judges.items() if pairs else ():
        lm = ready(load_lm(alone, workdir, mesh, "judge"), c.thought.gather, decoding=c.chain_of_thought)
        for seat in (s for s in seats if s.judge == name):
            found.append(judge(cfg, lm, seat, pairs, journal, mesh))
            pairs = [p for p in pairs if drops.keep(p["id"] in found[-1], "longer than the judge's context")]
        del lm  # before the next one is loaded
    return labelled(cfg, seats, pairs, found)


def _inputs(cfg: Config, workdir: Path, judges: dict[str, Config], seats: list[Seat]) -> dict:
    """See inputs_of. What a panel adds is there for a panel alone: without one they are as before there were any."""
    c = cfg.preferences
    after, files = ("sft",) if c.policy == "sft" else (), {"redteam": cfg.data.redteam, "few_shot": c.few_shot, "gate": c.gate}
    inputs = inputs_of(cfg, workdir, STAGE, files, after, (OF_INIT[c.policy], "judge"))
    inputs["models"] |= {name: identity(alone, "judge") for name, alone in judges.items()}
    inputs["constitution"] = seats[0].constitution.fingerprint
    if len(seats) > 1:
        inputs["constitutions"] = {s.key: s.constitution.fingerprint for s in seats}
    said = {"judges": True, "constitutions": True, "smoothing": not c.smoothing, "thoughts": c.thoughts == 1}
    said |= dict.fromkeys(("gate", "limits", "despite"), True)  # whom the gate refuses may be let through, and goes on
    said |= {"combine": c.combine == "mean", "decided": c.combine != "priority"}
    inputs["config"] = {k: v for k, v in inputs["config"].items() if not said.get(k)}  # said above, or without effect
    return inputs


def tried_out(cfg: Config, lm, seat: Seat, own: set[str], journal, mesh) -> dict:
    """What a judge's labels of the comparisons of --config.preferences.gate are worth, under the first constitution, see
    gate.summary; and `beyond`, see gate.admitted."""
    known = gate.comparisons(cfg.preferences.gate)
    found = judge(cfg, lm, seat._replace(judge=f"{seat.judge}, gate"), known, journal, mesh)
    of = gate.summary(cfg.preferences.gate, known, found, own)
    try:
        return of | {"beyond": gate.admitted(cfg.preferences, seat.judge, of)}
    except InputError:
        journal.remove()  # so that nothing is there and the stage may be begun with another judge
        raise


def judge(cfg: Config, lm, seat: Seat, pairs: list[dict], journal, mesh) -> dict[str, list[dict]]:
    """Id of a pair -> a judge's judgements under a constitution, one per principle drawn. Pairs that the judge's context cannot
    hold are not in it."""
    if done := journal.done.get(seat.key):
        return done["judgements"]
    c, templates = cfg.preferences, seat.templates
    blocks = load_few_shot(c.few_shot).comparisons if c.few_shot else ()
    layout = prompts.reasoning if c.chain_of_thought else prompts.comparison

    def in_both_orders(p: dict, principle) -> list[str]:
        drawn = [seat.drawn(cfg, p["id"], "few-shot", i)[0] for i in range(len(blocks))]
        prefix = prompts.few_shot_comparison(blocks, drawn, templates) if blocks else ""
        a, b = p["response_a"], p["response_b"]
        return [prefix + layout(p["messages"], principle.comparison, *order, templates) for order in ((a, b), (b, a))]

    def room(context: str) -> bool:
        if c.chain_of_thought:
            return fits(lm, prompts.verdict(context, "", templates), c.thought.max_tokens + OPTION_TOKENS)
        return fits(lm, context, OPTION_TOKENS)

    asked = []  # (record, principle, its context in both orders), k in a row for every record that there is room for
    for p in pairs:
        rows = [(p, q, in_both_orders(p, q)) for q in seat.drawn(cfg, p["id"], k=c.principles)]
        asked += rows if all(room(x) for *_, both in rows for x in both) else []
    if not asked:
        return {}
    contexts = [x for *_, both in asked for x in both for _ in range(c.thoughts)]
    shape, thoughts = (len(asked), 2, c.thoughts), [None] * len(asked)
    if c.chain_of_thought:
        last = "" if seat.key == FIRST else f"/{seat.key}"
        more = [f"+{n}" if n else "" for n in range(c.thoughts)]  # the first is the one there is alone
        keys = [f"{p['id']}/{q.id}/{order}{last}{n}" for p, q, _ in asked for order in ("ab", "ba") for n in more]
        requests = [Request(k, x) for k, x in zip(keys, contexts, strict=True)]
        said = sample_texts(lm, requests, c.thought, cfg.seed, journal, mesh, templates, "thoughts")
        contexts = [prompts.verdict(x, s["text"], templates) for x, s in zip(contexts, said, strict=True)]
        thoughts = [of.T.ravel().tolist() for of in np.array([s["text"] for s in said], object).reshape(shape)]
    logp = option_logprobs(lm, contexts, c.score_batch, mesh, seat.judge).reshape(*shape, 2)
    out = {p["id"]: [] for p, *_ in asked}
    for (p, q, _), logp_2K2, said in zip(asked, logp, thoughts, strict=True):
        out[p["id"]].append(seat.named | _judgement(q, logp_2K2, said, c))
    journal.add([{"key": seat.key, "judgements": out}])
    return out


def labelled(cfg: Config, seats: list[Seat], pairs: list[dict], found: list[dict[str, list[dict]]]) -> list[dict]:
    """Comparison records: `pairs` with p_a in [0, 1] and the judgements behind it, of every seat (see `judge`); of several also
    how much they differ."""
    c, out = cfg.preferences, []
    ranks = [{q.id: constitutions.rank(s.constitution, q) for q in s.constitution.principles} for s in seats]
    for p in pairs:
        rows = [(j, rank[j["principle"]]) for of, rank in zip(found, ranks, strict=True) for j in of[p["id"]]]
        judgements, p_M = [j for j, _ in rows], [j["p_a"] for j, _ in rows]
        soft = panel.combined(p_M, [rank for _, rank in rows], c.combine, c.decided)
        p_a = soft if c.labels == "soft" else float(soft > 0.5) if soft != 0.5 else 0.5
        p_a = p_a + c.smoothing * (1 - 2 * p_a)
        label = {"p_a": p_a, "source": "ai"} | ({"disagreement": panel.disagreement(p_M)} if len(rows) > 1 else {})
        out.append(p | label | {"judgements": judgements, "constitution": seats[0].constitution.fingerprint})
    return out


def _judgement(principle, logp_2K2, thoughts, c) -> dict:
    """One principle's verdict. logp_2K2: in the orders (a, b) and (b, a), after each of K thoughts, of the options (A) and (B);
    K is 1 without thoughts. thoughts: their texts in both orders, one after the other: ab, ba, ab, ba, ...

    p_ab, p_ba and p_a are means over the thoughts (2212.08073, 2); logp_ab and logp_ba the logs of the options' mean
    probabilities, so that for K > 1 they do not give p_ab and p_ba.
    """
    ab_K2, ba_K2 = logp_2K2
    p_ab_K = preference_from_logprobs(ab_K2[:, 0], ab_K2[:, 1])
    p_ba_K = preference_from_logprobs(ba_K2[:, 1], ba_K2[:, 0])
    raw_K = averaged_preference(ab_K2, ba_K2)
    p_ab, p_ba, raw = (float(np.asarray(p_K, np.float64).mean()) for p_K in (p_ab_K, p_ba_K, raw_K))
    logp_22 = np.logaddexp.reduce(logp_2K2, axis=1) - np.log(logp_2K2.shape[1])
    judgement = {"principle": principle.id, "logp_ab": logp_22[0].tolist(), "logp_ba": logp_22[1].tolist()}
    judgement |= {"p_ab": p_ab, "p_ba": p_ba, "p_a": raw}
    if thoughts is not None:
        judgement |= {"p_a": float(np.clip(raw, *c.clamp)), "p_unclamped": raw, "thoughts": thoughts}
    return judgement


def label_statistics(judged: list[dict]) -> dict:
    """Of a judge: how often the order of the responses changes its verdict, its lean to (A), how decided its labels are."""
    rows = [r for record in judged for r in record["judgements"]]
    if not rows:
        return {"flip_rate": 0.0, "position_lean": 0.0, "decidedness": 0.0}
    p_ab, p_ba = np.array([r["p_ab"] for r in rows]), np.array([r["p_ba"] for r in rows])
    return {
        "flip_rate": float(np.mean((p_ab > 0.5) != (p_ba > 0.5))),
        "position_lean": float(np.mean(p_ab - p_ba) / 2),
        "decidedness": float(np.mean(np.abs([r["p_a"] - 0.5 for r in judged]))),
    }
