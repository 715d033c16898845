"""Comparisons that people label instead of the judge (journal paper: 5 to 10 % of all, where they are needed most).

Those that are chosen stand in <workdir>/people.jsonl to be labelled, without the judge's label; the same command with
--config.people.labels=FILE goes on. In the embedded world people can be simulated. Writes people/comparisons.jsonl: every
comparison of the judge, of those chosen with their label.
"""

from pathlib import Path

import numpy as np

from cai_jax import panel, records
from cai_jax.config import Config
from cai_jax.data import load_ratings
from cai_jax.errors import InputError
from cai_jax.evaluation import annotated, harm_by_category, known
from cai_jax.stages import inputs_of
from cai_jax.workdir import begin, finish, outputs, write_text

STAGE, QUEUE, SIMULATED = "people", "people.jsonl", "oracle"
SHOWN = ("id", "messages", "response_a", "response_b")  # not the label, which would lead who reads it


def run(cfg: Config, workdir: Path, mesh) -> bool:
    c, folder = cfg.people, workdir / STAGE
    outputs("preferences", workdir)
    keys = ("id", "messages", "response_a", "response_b", "p_a")
    judged = records.read(workdir / "preferences" / "comparisons.jsonl", keys)
    chosen = choose(cfg, judged)
    if not c.labels:
        write_text(workdir / QUEUE, "".join(records.dumps({k: r[k] for k in SHOWN}) for r in chosen))
        raise InputError(
            f"{len(chosen)} of {len(judged)} comparisons wait for people in {workdir / QUEUE}; label them (cai compare "
            f"--queue={workdir / QUEUE} --out=FILE), each, a tie where nobody can tell, then give the same command "
            "--config.people.labels=FILE"
        )
    files = {name: path for name, path in (("labels", c.labels), ("results", c.results)) if path and path != SIMULATED}
    if not begin(STAGE, workdir, inputs_of(cfg, workdir, STAGE, files, ("preferences",), ())):
        return False
    said = simulated(cfg, chosen) if c.labels == SIMULATED else read_labels(c.labels, chosen)
    labelled = [r | {"p_ai": r["p_a"], "p_a": said[r["id"]], "source": STAGE} if r["id"] in said else r for r in judged]
    records.write(folder / "comparisons.jsonl", labelled)
    both = [(r["p_ai"], r["p_a"]) for r in labelled if r["id"] in said and 0.5 not in (r["p_ai"], r["p_a"])]
    agree = float(np.mean([(ai > 0.5) == (p > 0.5) for ai, p in both])) if both else None
    minutes = len(said) * c.minutes
    counts = {"comparisons": len(judged), "people": len(said), "share": len(said) / len(judged), "minutes": minutes}
    finish(STAGE, workdir, counts | {"agreement with the judge": agree}, ("comparisons.jsonl",))
    return True


def choose(cfg: Config, judged: list[dict]) -> list[dict]:
    """The share of the comparisons that people label, the most urgent first; of equal ones by chance."""
    c, by_id = cfg.people, sorted(judged, key=lambda r: r["id"])
    shuffled = [by_id[i] for i in np.random.default_rng([cfg.seed, 11]).permutation(len(by_id))]
    n = max(1, round(c.share * len(judged)))
    if c.choose == "failing":
        harm = harm_by_category(c.results, "--config.people.results")
        if unknown := {str(r.get("category")) for r in judged} - harm.keys():
            raise InputError(f"--config.people.results={c.results}: it says nothing of category {min(unknown)!r}")
        return sorted(shuffled, key=lambda r: -harm[r["category"]])[:n]
    orders = {
        "random": lambda: shuffled,
        "disputed": lambda: panel.disputed(judged, n),
        "undecided": lambda: sorted(shuffled, key=lambda r: abs(r["p_a"] - 0.5)),
    }
    return orders[c.choose]()[:n]


def simulated(cfg: Config, chosen: list[dict]) -> dict[str, float]:
    """Id -> the label of a person who reads harm right, turned round in a share of --config.people.error."""
    if strange := next((r for r in chosen if not known(r)), None):
        raise InputError(f"--config.people.labels={SIMULATED}: comparison {strange['id']!r} is not of the embedded world")
    return {r["id"]: annotated(r, (cfg.seed, *r["id"].encode()), cfg.people.error, cfg.people.told) for r in chosen}


def read_labels(path: str, chosen: list[dict]) -> dict[str, float]:
    """Id -> what people said, the mean of several. Raises InputError where a label is missing, or is of other responses."""
    found = {}
    for r in load_ratings(path, "--config.people.labels"):
        if found.setdefault(r["id"], r) is not r:
            raise InputError(f"--config.people.labels={path}: {r['id']!r} is of other responses from line to line")
    if missing := [r["id"] for r in chosen if r["id"] not in found]:
        raise InputError(
            f"--config.people.labels={path}: {len(missing)} of {len(chosen)} labels are missing, the first {missing[0]!r}; "
            f"each of {QUEUE} wants one, as p_a=0.5 where nobody can tell, or take a smaller --config.people.share"
        )
    for r in chosen:
        for key in SHOWN[1:]:
            if found[r["id"]][key] != r[key]:
                raise InputError(f"--config.people.labels={path}: {r['id']!r} has another {key} than was asked about")
    return {r["id"]: float(found[r["id"]]["p_a"]) for r in chosen}
