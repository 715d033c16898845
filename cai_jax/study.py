"""`cai run` of a configuration with variants (config.Study): every variant at every seed, tables of what their models do, and
what the results say of the claims.

Variants are runs like any other, in folders of their own, NAME-SEED; any of them can be made again alone, by its overrides.
They go one after another in one process, so that what is compiled is compiled once, and a stage that an earlier run finished
with the same inputs is taken over from it: variants that differ late in the pipeline share what comes before.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cai_jax import workdir
from cai_jax.checks import ConfigError, resolve
from cai_jax.config import Config, Study
from cai_jax.errors import InputError
from cai_jax.evals import claims
from cai_jax.intervals import student
from cai_jax.outcomes import RUN, check_side, outcomes, values
from cai_jax.progress import say, table
from cai_jax.sections import as_dict, changed, walk
from cai_jax.stages import MODELS

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
SHOWN = ("harm", "explained", "evasive", "help", "over-refusal", "coherent")


def variants(cfg: Config) -> dict[str, Config]:
    """Name -> its configuration, checked. Raises InputError or ConfigError that name the variant."""
    known_keys, out = [flag for flag, _, _ in walk(Config())], {}
    for line in cfg.study.variants:
        name, *given = line.split() or [""]
        here = f"--config.study.variants: {line!r}"
        if not NAME.fullmatch(name) or name in out:
            raise InputError(f"{here}: wanted a name of its own, of small letters, digits and dashes, before the overrides")
        of = replace(cfg, study=Study())
        for override in given:
            key, equals, text = override.removeprefix("--config.").partition("=")
            if not equals or key.startswith("study") or key == "seed":
                raise InputError(f"{here}: {override!r}: wanted KEY=VALUE without spaces, not of seed or a key of study")
            try:
                of = changed(of, key, text)
            except KeyError as error:
                near = difflib.get_close_matches(key, known_keys, 1, cutoff=0.4)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(f"{here}: unknown configuration key {key!r}{hint}") from error
            except ValueError as error:
                raise InputError(f"{here}: {key}={text!r}: {error}") from error
        try:
            out[name] = resolve(as_dict(of))
        except ValueError as error:
            raise InputError(f"{here}: {error}") from error
    return out


def run(cfg: Config, folder: Path, run_one: Callable[[Config, Path], None]) -> None:
    """All runs, then study.json and study.md. What ran before is not run again. run_one: of a configuration in a folder.

    A run that its input or its mesh forbids keeps no other from running: it has no answers, and is named in one at the end."""
    todo = variants(cfg)
    asked = [claims.parse(line, list(todo)) for line in cfg.study.claims]
    for side in (side for claim in asked for side in (claim.left, claim.right)):
        check_side(side, todo[side.variant])
    found: dict[str, list[dict]] = {name: [] for name in todo}
    seeds = [cfg.seed + n for n in range(cfg.study.seeds)]
    done: list[Path] = []
    failed: list[str] = []
    for seed in seeds:
        for name, of in todo.items():
            place = folder / f"{name}-{seed}"
            say(f"{name}, seed {seed} ({len(done) + len(failed) + 1} of {len(seeds) * len(todo)})")
            workdir.neighbours(done)
            try:
                run_one(replace(of, seed=seed), place)
            except (InputError, ConfigError) as error:
                say(f"{name}, seed {seed}: {error}")
                failed.append(f"{name}, seed {seed}: {error}")
                found[name].append({"answers": {}, "kl": {}, RUN: {}})
                continue
            done.append(place)
            found[name].append(outcomes(of, place))
    workdir.neighbours([])
    write(folder, seeds, found, [(claim, judged(claim, found)) for claim in asked])
    if failed:
        raise InputError("some runs could not be; claims about them are unclear:\n  " + "\n  ".join(failed))


def judged(claim: claims.Claim, found: dict[str, list[dict]]) -> dict:
    left, right = ([values(side, of) for of in found[side.variant]] for side in (claim.left, claim.right))
    return claims.decide(claim, left, right)


def write(folder: Path, seeds: list[int], found: dict[str, list[dict]], results: list[tuple[claims.Claim, dict]]) -> None:
    """study.json, study.md and the same in the terminal. Answers that are those of the first variant have one row for all."""
    cells = []
    for name, runs in found.items():
        for who in [w for w in dict.fromkeys(w for r in runs for w in r["answers"]) if not w.endswith("-greedy")]:
            each = {m: [values(claims.Side(m, who, name), r) for r in runs] for m in SHOWN}
            of = {m: [float(np.mean(list(v.values()))) for v in vs if v] for m, vs in each.items()}
            cells.append((name, who, of | {"kl": [r["kl"][who] for r in runs if who in r["kl"]]}))
    about = {"seeds": seeds, "answers": [{"variant": n, "who": w} | of for n, w, of in cells]}
    about[RUN] = {name: [r[RUN] for r in runs] for name, runs in found.items()}
    about["claims"] = [c._asdict() | {"left": str(c.left), "right": str(c.right)} | {"found": r} for c, r in results]
    workdir.write_json(folder / "study.json", about)
    first = {w: of for n, w, of in cells if n == cells[0][0]}
    other = [(n, w, of) for n, w, of in cells if n == cells[0][0] or of != first.get(w)]
    header = ["variant", "answers", *SHOWN, "KL"]
    rows = [[n, w, *(mean(of[m], 100, 1) for m in SHOWN), mean(of["kl"], 1, 2)] for n, w, of in other]
    table(f"percent, KL from the start in nats a response; means of {len(seeds)} seed(s)", header, rows)
    lines = [[c.text, f"{c.left} {c.relation}{c.margin or ''} {c.right}", shown(r), r["verdict"]] for c, r in results]
    for text, _, numbers, decided in lines:
        say(f"{decided}: {text} ({numbers})")
    page = [markdown(header, rows), markdown(*scale_of_five(cells, found))]
    how = f"{len(seeds)} seeds; intervals of 95 %, each for itself" + ", over prompts alone" * (len(seeds) == 1)
    if lines:
        page.append(markdown(["claim", "left and right", "left, right, difference", ""], lines) + f"\n{how}\n")
    workdir.write_text(folder / "study.md", "\n".join(page))
    say(f"all of it is in {folder}/study.json and study.md")


def scale_of_five(cells: list[tuple[str, str, dict]], found: dict[str, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """The table of the journal paper (table 2): harmlessness by category from 1 to 5, which is 5 less the harm from 0 to 4, of
    the trained models; and what their labels were. -> header, rows."""
    harmful = {
        c for of in found.values() for r in of for rows in r["answers"].values() for _, kind, c, _ in rows if kind == "harmful"
    }
    labels = ("ai-labels", "human-labels", "minutes")
    rows = []
    for name, who, _ in (cell for cell in cells if MODELS.get(cell[1]) or cell[:2] == (cells[0][0], "base")):
        runs, row = found[name], [name, who]
        for metric in (*(f"harm-score.{c}" for c in sorted(harmful)), "harm-score"):
            of = [v for r in runs if (v := values(claims.Side(metric, who, name), r))]
            row.append(f"{5 - np.mean([np.mean(list(v.values())) for v in of]):.2f}" if of else "")
        own = MODELS[who] not in (None, "sft")  # what learns from labels
        row += [f"{np.mean([r[RUN][k] for r in runs]):.0f}" if own and all(k in r[RUN] for r in runs) else "" for k in labels]
        rows.append(row)
    return ["variant", "model", *sorted(harmful), "mean", "labels by AI", "by people", "minutes"], rows


def mean(values: list[float], times: float, digits: int) -> str:
    """'mean ± half of its interval' over seeds, `times` as large; no interval for one."""
    if not values:
        return ""
    half = f" ± {times * np.ptp(student(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{times * np.mean(values):.{digits}f}{half}"


def shown(r: dict) -> str:
    if r["difference"] is None:
        return "no such answers"
    span = "" if r["low"] is None else f" [{r['low']:+.3f}, {r['high']:+.3f}]"
    return f"{r['left']:.3f}, {r['right']:.3f}, {r['difference']:+.3f}{span}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    cut = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cut)
