"""Finished runs as they lie in folders: found, put together where only seeds differ, and their files pooled over the seeds."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cai_jax.config import Config
from cai_jax.errors import InputError
from cai_jax.files import folder_of, read_json
from cai_jax.intervals import student
from cai_jax.sections import as_dict, section


class Run(NamedTuple):
    folder: Path
    cfg: Config

    def read(self, path: str, read: Callable = read_json):
        """A stage's file, STAGE/NAME; None when the stage is not part of the run or made no such file."""
        there = path.split("/")[0] in self.cfg.stages and (self.folder / path).exists()
        return read(self.folder / path) if there else None

    def made(self, stage: str) -> str:
        """What identifies the outputs of a stage; "" when it is not done."""
        return json.dumps((self.read(f"{stage}/done.json") or {"outputs": ""})["outputs"], sort_keys=True)


class Group(NamedTuple):
    """Runs of one configuration at several seeds, or one of them. name: "" when there is only one group."""

    name: str
    runs: tuple[Run, ...]

    @property
    def cfg(self) -> Config:
        return self.runs[0].cfg

    def each(self, path: str, read: Callable = read_json) -> list:
        """A stage's file of each run that has it."""
        return [found for run in self.runs if (found := run.read(path, read)) is not None]

    def pool(self, path: str, shape: Callable = lambda tree: tree):
        """The same, pooled, after `shape`; None when no run has it."""
        return pooled([*map(shape, found)]) if (found := self.each(path)) else None

    def made(self, stage: str) -> tuple[str, ...]:
        return tuple(run.made(stage) for run in self.runs)


def find(places: Sequence[str]) -> list[Group]:
    """The runs in folders, each of a run or of several, such as a study's. Raises InputError where there is none."""
    folders: dict[Path, Config] = {}
    for text in places:
        try:
            place = folder_of(text)
        except InputError as error:
            raise InputError(str(error).replace("--workdir", "--run")) from error
        inside = [place] if (place / "config.json").exists() else sorted(p.parent for p in place.glob("*/config.json"))
        if not inside:
            raise InputError(f"--run={text}: there is no run; wanted a folder with its config.json, or one with several such")
        folders |= {folder: _config(folder) for folder in _in_order(place, inside)}
    return _grouped(folders)


def _config(folder: Path) -> Config:
    said = read_json(folder / "config.json")
    if isinstance(said, dict) and isinstance(said.get("stages"), list) and isinstance(said.get("seed"), int):
        try:
            return section(said, Config)
        except (TypeError, AttributeError):  # of a part of it
            pass
    raise InputError(f"{folder}/config.json: this is no configuration of a run; give another --run")


def _in_order(place: Path, folders: list[Path]) -> list[Path]:
    """As the study that lies there has its variants, if one does."""
    path = place / "study.json"
    rows = read_json(path).get("answers", []) if path.exists() else []
    rank = {name: n for n, name in enumerate(dict.fromkeys(r["variant"] for r in rows))}
    return sorted(folders, key=lambda f: rank.get(f.name.rpartition("-")[0], len(rank)))


def _grouped(folders: dict[Path, Config]) -> list[Group]:
    found: dict[tuple[str, str], dict[int, Run]] = {}
    for folder, cfg in folders.items():
        name, rest = folder.name.removesuffix(f"-{cfg.seed}"), as_dict(cfg) | {"seed": None}
        of = found.setdefault((name, json.dumps(rest, sort_keys=True)), {})
        if cfg.seed in of:
            raise InputError(f"--run: {of[cfg.seed].folder} and {folder} are the same run; give one of them")
        of[cfg.seed] = Run(folder, cfg)
    names = [name for name, _ in found]
    if len(found) == 1:
        return [Group("", tuple(of.values())) for of in found.values()]
    return [
        Group(name if names.count(name) == 1 else str(next(iter(of.values())).folder), tuple(of.values()))
        for (name, _), of in found.items()
    ]


def pooled(trees: Sequence):
    """One tree of those of several seeds: numbers are their means, and an interval that belongs to one is Student's over the
    seeds. What is in one tree only is left out, and what is no number is as in the first."""
    first = trees[0]
    if len(trees) == 1 or not isinstance(first, dict | list):
        same = all(t == first for t in trees)
        return first if same or not all(map(_number, trees)) else sum(trees) / len(trees)
    if isinstance(first, list):
        return [pooled(of) for of in zip(*trees, strict=False)]
    out = {k: pooled([t[k] for t in trees]) for k in first if all(k in t for t in trees)}
    if isinstance(out.get("interval"), dict):  # of several figures that stand beside it
        out["interval"] = {k: _spans([t[k] for t in trees]) for k in out["interval"] if k in out}
    for value, interval in (
        ("mean", "interval"),
        ("failure", "interval"),
        ("harm_rate", "interval"),
        ("score", "score_interval"),
    ):
        if value in out and isinstance(out.get(interval), list):
            out[interval] = _spans([t[value] for t in trees])
    for value in {"elo", "value"} & out.keys() if "low" in out else ():
        out["low"], out["high"] = _spans([t[value] for t in trees])
    return out


def _spans(values: Sequence) -> list:
    """The interval of a mean over seeds; of lists, at each place."""
    if all(isinstance(v, list) for v in values):
        return [_spans(of) for of in zip(*values, strict=False)]
    return student(values) if all(map(_number, values)) else [None, None]


def _number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def by_model(report: dict) -> dict:
    """Scale -> model -> row of Elo reports, whose own order is that of strength."""
    return {scale: {row["model"]: row for row in of["models"]} for scale, of in report.items()}


def distinct(groups: Sequence[Group], stage: str, path: str) -> list[Group]:
    """Those that have a file, but for the ones that share what the stage made with one before: variants may."""
    found: dict = {}
    for g in groups:
        if g.each(path, lambda p: p):
            found.setdefault(g.made(stage), g)
    return list(found.values())


@contextmanager
def understood(groups: Sequence[Group]) -> Iterator[None]:
    """Where files of runs are taken to be as this version writes them. Raises InputError where they are not."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        places = ", ".join(str(run.folder) for g in groups for run in g.runs)
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{places}: there are files that are not as this version writes them ({what}); give other runs"
        ) from error
