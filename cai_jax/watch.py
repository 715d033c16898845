"""What becomes of a policy while PPO trains it: judged on fixed prompts where it starts and every few iterations."""

import dataclasses
from pathlib import Path

import numpy as np

from cai_jax import hosts, progress, records
from cai_jax.config import Config
from cai_jax.evals import goodhart
from cai_jax.evaluation import Answer, answers, elos, evenly, judged, likelihood, rated, summary, untouched, verdict
from cai_jax.files import read_json
from cai_jax.intervals import student
from cai_jax.models import LM
from cai_jax.slots import ready
from cai_jax.stages import load_constitution, load_scorer
from cai_jax.workdir import outputs, write_json

WATCHED = ("harm_rate", "helpfulness", "over_refusal", "evasive", "reward", "referee", "harm")  # logged, of sampled answers
WATCH_PROMPTS = 128
RATED = 24  # snapshots at the most that get an Elo, as many as in the paper (2.3)


def beside(cfg: Config) -> tuple[str, ...]:
    """The models that rate a policy while it trains, beside the reward model."""
    return tuple(name for name in ("referee", "harm") if name in cfg.stages and cfg.ppo.evaluate_every)


class Watch:
    """Judges a policy on a fixed sample of the red-team evaluation set (never held-out prompts) while it trains.

    `reward`, `reference`: the reward model and the policy's start, which PPO holds anyway. The others are loaded for each
    snapshot and let go, so that they take memory while it does not train; reading them is what that costs.
    """

    def __init__(self, cfg: Config, workdir: Path, mesh, reward: LM, reference: LM):
        self.cfg, self.workdir, self.mesh, self.reward, self.reference = cfg, workdir, mesh, reward, reference
        self.templates = load_constitution(cfg, "rl_cai").templates
        self.todo = evenly(judged(cfg.evaluate.redteam, "--config.evaluate.redteam"), WATCH_PROMPTS)
        sampling = cfg.evaluate.sampling
        self.modes = {"sampled": sampling, "greedy": dataclasses.replace(sampling, temperature=0.0)}

    def due(self, n: int) -> bool:
        """Whether there is a snapshot after n iterations."""
        return n % self.cfg.ppo.evaluate_every == 0 or n == self.cfg.ppo.iterations

    def began(self) -> bool:
        """Whether there is one of the start."""
        return hosts.once(self.path(0).exists)

    def path(self, n: int) -> Path:
        return self.workdir / "ppo" / "watch" / f"{n:04d}.json"

    def __call__(self, policy: LM, n: int) -> dict:
        """Writes the snapshot after n iterations. -> {"eval/harm_rate": ..., ...}. To the end: a request to stop must not lose
        the iteration."""
        lm, journal = (
            ready(policy, self.cfg.evaluate.sampling.gather),
            records.Journal(self.workdir / "ppo" / f"watch-{n}.jsonl"),
        )
        said = {
            mode: answers(self.cfg, lm, self.templates, self.todo, sampling, journal, self.mesh, f"watch{n}-{mode}", False)
            for mode, sampling in self.modes.items()
        }
        del lm  # before others are loaded
        kl = self.kl(policy, said["sampled"]) if n else 0.0
        journal.remove()
        scores = self.scores(said)
        rows = {mode: self.rows(of, scores[mode]) for mode, of in said.items()}
        start = read_json(self.path(0)) if n else {"answers": rows}
        found = {mode: self.figures(rows[mode], start["answers"][mode]) for mode in rows}
        now = {"iteration": n, "kl": kl, "answers": rows} | found
        write_json(self.path(n), now | {"alarms": self.alarms(now, start) if n else []})
        logged = {name: found["sampled"].get(name) for name in WATCHED} | {"greedy_harm_rate": found["greedy"]["harm_rate"]}
        return {f"eval/{name}": value for name, value in logged.items() if value is not None}

    def kl(self, policy: LM, said: list[Answer]) -> float | None:
        """From the start, nats per response, by the mean log-ratio of the policy's answers; None where sampling changes its
        probabilities."""
        sampling = self.cfg.evaluate.sampling
        if not untouched(sampling):
            return None
        given = self.templates, self.todo, said, sampling.batch_size, self.mesh, False
        return float(np.nanmean(likelihood(policy, *given) - likelihood(self.reference, *given)))

    def scores(self, said: dict[str, list[Answer]]) -> dict[str, dict[str, np.ndarray]]:
        """mode -> model -> what it says of each answer: reward models in deviations of the scores that PPO scales by, without
        its penalty for those that are cut off; the harm regressor from 0 to 4."""
        out, todo, every = {mode: {} for mode in said}, self.todo * len(said), sum(said.values(), [])
        for name in ("reward", *beside(self.cfg)):
            lm = self.reward if name == "reward" else load_scorer(self.cfg, self.workdir, self.mesh, name)
            templates = load_constitution(self.cfg, name).templates
            asked = [Answer(x.text) for x in every] if name == "harm" else every  # EOS ends all that it learnt from
            found = rated(lm, templates, todo, asked, self.cfg.evaluate.sampling.batch_size, self.mesh, stoppable=False)
            if name != "harm":
                scale = outputs(name, self.workdir)["scale"]
                found = (found - scale["mean"]) / scale["std"]
            for mode, part in zip(said, np.split(found, len(said)), strict=True):
                out[mode][name] = part
        return out

    def rows(self, said: list[Answer], scores: dict[str, np.ndarray]) -> list[dict]:
        """A record of each answer."""
        return [
            {k: p[k] for k in ("id", "kind", "category") if k in p}
            | {"response": x.text, "finished": x.finished, "verdict": dataclasses.asdict(verdict(p, x.text))}
            | {name: float(score[i]) for name, score in scores.items()}
            for i, (p, x) in enumerate(zip(self.todo, said, strict=True))
        ]

    def figures(self, rows: list[dict], start: list[dict]) -> dict:
        """The oracle's summary, the means of the scores (of harm, over harmful prompts) with their intervals, and how alike the
        texts are (see evals.goodhart)."""
        texts, before = ([r["response"] for r in x] for x in (rows, start))
        out = summary(self.todo, texts) | goodhart.figures(texts, before)
        for name in ("reward", *beside(self.cfg)):
            values = [r[name] for r in rows if name != "harm" or r["kind"] == "harmful"]
            if values:
                out[name] = float(np.mean(values))
                out["interval"][name] = student(values) if len(values) > 1 else [None, None]
        return out

    def alarms(self, now: dict, start: dict) -> list[dict]:
        """What of a snapshot's sampled answers has changed for the worse since that of the start, said aloud."""
        found = goodhart.alarms(now["sampled"], start["sampled"])
        if "referee" in beside(self.cfg):
            both = list(zip(now["answers"]["sampled"], start["answers"]["sampled"], strict=True))
            found += goodhart.parted(*([r[name] - s[name] for r, s in both] for name in ("reward", "referee")))
        for alarm in found:
            about = ", ".join(f"{k} {v}" for k, v in alarm.items())
            progress.say(f"ppo may serve its reward model only, after iteration {now['iteration']}: {about}")
        return found

    def summarise(self) -> int:
        """Writes ppo/dynamics.json: the snapshots without their answers, and Elo of the policy along its training, the start
        at 0. -> alarms of all snapshots."""
        return hosts.once(self._summarise)

    def _summarise(self) -> int:
        due = [n for n in range(self.cfg.ppo.iterations + 1) if self.due(n)]
        snapshots = [read_json(self.path(n)) for n in due]
        shown = [snapshots[0], *evenly(snapshots[:0:-1], RATED - 1)]  # from the last on, which is among them
        rows = [r | {"model": str(s["iteration"])} for s in shown for r in s["answers"]["sampled"]]
        found = [{k: v for k, v in s.items() if k != "answers"} for s in snapshots]
        write_json(self.workdir / "ppo" / "dynamics.json", {"snapshots": found, "elo": elos(rows)})
        return sum(len(s["alarms"]) for s in snapshots)
