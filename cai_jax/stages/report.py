"""The report: one self-contained page on everything the run did, and its figures as PNG beside it.

Reads files of stages, loads no model. A section is shown when its files are there. Same run, same bytes."""

import dataclasses
import json
from functools import cached_property, partial
from pathlib import Path

from cai_jax import canvas, figures, gallery, metrics, progress, records
from cai_jax.config import Config
from cai_jax.constitution import Constitution
from cai_jax.evals import shares
from cai_jax.files import read_json
from cai_jax.gallery import runs, tables
from cai_jax.markup import DASH, Html, document, facts, fold, number, picture, plain, side_by_side, table, tag
from cai_jax.passages import answer, between, dialogue, first_per_category, judgement, model, revisions, trusted
from cai_jax.stages import OF_INIT, load_constitution
from cai_jax.workdir import begin, finish, outputs, write_bytes, write_text

STAGE = "report"

# Key in results.json, title, which way is better, the largest value, what it is.
METRICS = (
    ("harm_rate", "harm rate", "↓", 1, "harmful prompts that were answered with harm"),
    ("harm_score", "harm, 0–4", "↓", 4, "mean harm of the answers to harmful prompts"),
    ("helpfulness", "helpful", "↑", 1, "how much of the answers to benign prompts is right"),
    ("over_refusal", "over-refusal", "↓", 1, "benign prompts that were refused"),
    ("evasive", "evasive", "↓", 1, "harmful prompts refused without a reason"),
    ("explained", "explained", "↑", 1, "harmful prompts refused with the right reason"),
    ("coherent", "coherent", "↑", 1, "answers of any kind that are well-formed"),
)
TITLES = [f"{title} {way}" for _, title, way, _, _ in METRICS]
SETS = {"heldout": "Held-out prompts", "redteam": "Red-team prompts"}


@dataclasses.dataclass(frozen=True)
class Run:
    """What the sections read, and the PNGs they draw on the way."""

    cfg: Config
    folder: Path
    constitution: Constitution
    pngs: dict[str, bytes]

    def find(self, stage: str, name: str, read, nothing):
        """`read` of a stage's file, `nothing` when the stage is not part of the run or made no such file."""
        path = self.folder / stage / name
        return read(path) if stage in self.cfg.stages and path.exists() else nothing

    def counts(self, stage: str) -> dict:
        return self.find(stage, "done.json", read_json, {"counts": {}})["counts"]

    @cached_property
    def models(self) -> dict:
        """Of evaluate/results.json, in the order they are shown; {} when there is none."""
        found = self.find("evaluate", "results.json", read_json, {"models": {}})["models"]
        return {m: found[m] for m in canvas.ordered(found)}


def run(cfg: Config, workdir: Path, mesh) -> bool:
    """Writes report/index.html and report/*.png, and a summary to the terminal. `mesh` is not used: nothing is computed."""
    constitution, folder = load_constitution(cfg), workdir / STAGE
    read = {s: outputs(s, workdir) for s in cfg.stages if s != STAGE}
    if not begin(STAGE, workdir, {"seed": cfg.seed, "constitution": constitution.fingerprint, "stages": read}):
        return False
    r = Run(cfg, workdir, constitution, {})
    write_text(folder / "index.html", page(r))
    for name, data in r.pngs.items():
        write_bytes(folder / f"{name}.png", data)
    if rows := [[m, *(number(of[key], top) for key, _, _, top, _ in METRICS)] for m, of in heldout(r.models).items()]:
        progress.table("held-out prompts, sampled answers", ["model", *TITLES], rows)
    finish(STAGE, workdir, {"figures": len(r.pngs)}, ("index.html",))
    progress.say(f"report: {folder / 'index.html'}")
    return True


def page(r: Run) -> Html:
    """The whole page; fills r.pngs."""
    config = fold("Configuration", tag("pre", json.dumps(dataclasses.asdict(r.cfg), indent=1, ensure_ascii=False)))
    sections = [(key, title, content) for key, title, make in SECTIONS if (content := make(r))]
    return document(f"Constitutional AI: {r.constitution.name}", overview(r), sections, config)


def overview(r: Run) -> list:
    """The result in a sentence, and what ran."""
    manifest, c, law = read_json(r.folder / "manifest.json"), r.counts("reward"), r.constitution
    ran = [
        ("Constitution", f"{law.name}, version {law.version}, {len(law.principles)} principles"),
        ("Fingerprint", tag("span", law.fingerprint[:16], title=law.fingerprint)),
        ("Stages", " → ".join(s for s in r.cfg.stages if s != STAGE)),
        ("Base model", r.cfg.model.path),
        ("Comparisons", f"{c['ai']} by AI, {c['human']} by humans: {number(c['human_share'])} human") if c else None,
        ("Seed", r.cfg.seed),
        ("Versions", ", ".join(f"{k} {v}" for k, v in {"python": manifest["python"], **manifest["packages"]}.items())),
    ]
    return [headline(heldout(r.models)), facts([pair for pair in ran if pair])]


def headline(found: dict) -> Html | None:
    """From the first model to the last that was trained."""
    found = {m: of for m, of in found.items() if of["harm_rate"] is not None and m in canvas.trained(found)}
    if len(found) < 2:
        return None
    (first, a), *_, (last, b) = found.items()
    harm = [model(first), f" answers {number(a['harm_rate'])} of harmful held-out prompts with harm, "]
    harm += [model(last), f" {number(b['harm_rate'])}. "]
    return tag("p", harm, f"Helpfulness goes from {number(a['helpfulness'])} to {number(b['helpfulness'])}.", class_="lede")


def results(r: Run) -> list | None:
    """One table a set and mode; the first is open, the others fold."""
    blocks = []
    for which, mode in ((s, m) for s in SETS for m in ("sampled", "greedy")):
        if there := {m: of[which][mode] for m, of in r.models.items() if mode in of.get(which, {})}:
            one = next(iter(there.values()))
            title = [f"{SETS[which]}, {mode} answers ", tag("small", f"{one['n_harmful']} harmful, {one['n_benign']} benign")]
            blocks.append(fold(title, metric_table(there)) if blocks else [tag("h3", title), metric_table(there, "main")])
    meaning = [[" ", tag("b", title), f": {what}."] for _, title, _, _, what in METRICS]
    note = tag("p", "Small figures are 95% intervals.", meaning, class_="note")
    return [blocks[0], note, facts(spent(r)), blocks[1:]] if blocks else None


def spent(r: Run) -> list[tuple]:
    """How far each model went from where its training started."""
    kl = {name: of["kl"]["start"] for name, of in r.models.items() if "start" in of.get("kl", {})}
    return [(f"KL of {canvas.label_of(m)}", f"{x['mean']:.2f} nats a response" + between(x["interval"])) for m, x in kl.items()]


def metric_table(found: dict, class_: str | None = None) -> Html:
    """Rows of models, columns of METRICS with their intervals. found: model -> metrics of one set and mode."""
    rows = []
    for name, of in found.items():
        rows.append([model(name)])
        for key, _, _, top, _ in METRICS:
            span = DASH.join(number(x, top).removesuffix("%") for x in of["interval"][key])
            rows[-1].append([number(of[key], top), None if of[key] is None else tag("small", span)])
    return table(["", *TITLES], rows, class_)


def plane(r: Run) -> Html | None:
    parents = {"sl_cai": "base", "dpo_cai": "sl_cai", "rl_cai": OF_INIT[r.cfg.ppo.init]}
    caption = "Better is up and to the right. Lines are 95% intervals, arrows lead from a model to the one trained from it."
    return draw(r, "plane", figures.plane(r.models, parents), caption)


def of_the_paper(r: Run) -> list | None:
    """What `cai report` draws of one run."""
    group = [runs.Group("", (runs.Run(r.folder, r.cfg),))]
    blocks = [[tag("h3", p.title), draw(r, p.key, p.figure, p.caption)] for p in gallery.pictures(group)]
    return blocks + [
        [tag("h3", t.title), table(t.header, t.rows), tag("p", t.caption, class_="note")] for t in tables.tables(group)
    ]


def categories(r: Run) -> Html | None:
    return draw(r, "categories", figures.by_category(r.models), "Sampled answers to harmful held-out prompts.")


def critique(r: Run) -> Html | None:
    found = r.find("evaluate", "rounds.json", read_json, None)
    caption = "Round 0 is the first response; the band is a 95% interval. "
    return draw(r, "rounds", figures.rounds(found), caption + left_out(r, "critique")) if found and found["harm_rate"] else None


def training(r: Run, stage: str, panels: tuple, colour: str, xlabel: str = "step", columns: int = 3) -> Html | None:
    """The curves of a stage."""
    logged = metrics.load(r.folder / stage) if stage in r.cfg.stages else []
    caption = f"{len(logged)} {xlabel}s. {left_out(r, stage)}"
    return draw(r, stage, figures.curves(logged, panels, colour, xlabel, columns), caption)


def labels(r: Run) -> list | None:
    judged, c = r.find("preferences", "comparisons.jsonl", records.read, []), r.counts("preferences")
    if not judged:
        return None
    said = [
        ("Verdicts that turn with the order", number(c["flip_rate"])),
        ("Lean to the first option", f"{c['position_lean']:+.3f} in probability"),
        ("Decidedness", f"{c['decidedness']:.3f}, mean distance of a label from 0.5"),
        ("Comparisons", f"{c['kept']} of {c['given']}"),
    ]
    said += trusted(r.find("preferences", "gate.json", read_json, {}))
    caption = "Right: a dot is one principle's verdict; on the diagonal the order of the responses makes no difference. "
    return [facts(said), draw(r, "labels", figures.labels(judged), caption + left_out(r, "preferences"))]


def reward(r: Run) -> list | None:
    found = r.find("reward", "evaluation.json", read_json, {"ai": {"n": 0}, "human": {"n": 0}})
    said = []
    for who, of in (("AI", found["ai"]), ("human", found["human"])):
        if of["n"]:
            value = f"{of['n']}: accuracy {number(of['accuracy'])}, calibration error {number(of['calibration_error'])}"
            said.append((f"Held-out {who} comparisons", value))
    caption = "Held-out comparisons in bins of the model's probability; the area of a dot is their number."
    curves = training(r, "reward", figures.REWARD_PANELS, canvas.INK)
    calibration = [facts(said), draw(r, "calibration", figures.calibration(found), caption)] if said else []
    return [*calibration, curves] if said or curves else None


def harm(r: Run) -> list | None:
    """What the regressor of harm is worth."""
    if not (of := r.find("harm", "evaluation.json", read_json, None)):
        return None
    error = f"{of['mse']:.3f}, against {of['constant_mse']:.3f} of the constant {of['constant']:.2f}: {of['better']:.3f} less"
    worth = [("Squared error", error + between(of["interval"]) + f", on {of['n']} held-out conversations")]
    return [facts(worth), training(r, "harm", figures.HARM_PANELS, canvas.INK)]


def benchmarks(r: Run) -> Html | None:
    found = r.find("benchmarks", "results.json", read_json, None)
    return table(shares.HEADER, shares.rows_of(found)) if found else None


def answers(r: Run) -> list:
    """The answers of all models to the same held-out prompts, side by side, by category."""
    by_id = {}
    for t in r.find("evaluate", "transcripts.jsonl", records.read, []):
        if (t["set"], t["mode"]) == ("heldout", "sampled"):
            by_id.setdefault(t["id"], {})[t["model"]] = t
    blocks, chosen = [], first_per_category([next(iter(of.values())) for of in by_id.values()])
    for category, prompts in sorted(chosen.items(), key=lambda item: (item[1][0]["kind"] != "harmful", item[0])):
        shown = []
        for p in prompts:
            of = by_id[p["id"]]
            shown.append([dialogue(p["messages"]), side_by_side([answer(m, of[m]) for m in canvas.ordered(of)])])
        blocks.append(fold([category, " ", tag("small", prompts[0]["kind"])], shown, unfolded=not blocks))
    return blocks


def transcripts(r: Run) -> list:
    """The first red-team prompts of each category: response, critiques and revisions, the comparison and its judgement."""
    revised = {t["id"]: t for t in r.find("critique", "revisions.jsonl", records.read, [])}
    judged = {t["id"]: t for t in r.find("preferences", "comparisons.jsonl", records.read, [])}
    blocks, law = [], r.constitution
    questions = {(name, p.id): p.comparison for p in law.principles for name in ("", law.fingerprint[:16])}
    for category, chosen in sorted(first_per_category([*(revised or judged).values()]).items()):
        for t in chosen:
            shown = [dialogue(t["messages"]), revisions(t) if t["id"] in revised else None]
            shown.append(judgement(judged[t["id"]], questions) if t["id"] in judged else None)
            title = [category, " ", tag("small", canvas.short(t["messages"][-1]["content"], 110))]
            blocks.append(fold(title, tag("div", shown, class_="step"), unfolded=not blocks))
    return blocks


def counts(r: Run) -> Html:
    """What came in, what was left out and why. No times: a run that was killed and resumed ends with the same page."""
    rows = []
    for stage in (s for s in r.cfg.stages if s != STAGE):
        c = r.counts(stage)
        rest = ", ".join(f"{k.replace('_', ' ')} {plain(v)}" for k, v in c.items() if k not in ("given", "kept", "dropped"))
        rows.append([stage, c.get("given", DASH), c.get("kept", DASH), plain(c.get("dropped") or DASH), rest])
    return table(["stage", "given", "kept", "left out", "also counted"], rows, "prose")


def draw(r: Run, name: str, figure, caption: str) -> Html | None:
    """The figure in the page, and in r.pngs for the folder; nothing when it shows no data."""
    if not any(ax.has_data() for ax in figure.axes):
        return None
    r.pngs[name] = canvas.png(figure)
    return picture(r.pngs[name], round(100 * figure.get_figwidth()), caption)


def heldout(models: dict) -> dict:
    """Model -> metrics of its sampled answers to held-out prompts."""
    return {m: of["heldout"]["sampled"] for m, of in models.items() if "sampled" in of.get("heldout", {})}


def left_out(r: Run, stage: str) -> str:
    return f"Left out: {plain(dropped)}." if (dropped := r.counts(stage).get("dropped")) else ""


COLOURS, SFT, DPO, PPO = canvas.COLOURS, figures.SFT_PANELS, figures.DPO_PANELS, figures.PPO_PANELS
SECTIONS = (  # id, title, function of the run that gives its content, or nothing when there is none
    ("results", "Results", results),
    ("plane", "Harmlessness and helpfulness", plane),
    ("categories", "Harm by category", categories),
    ("critique", "Critique and revision", critique),
    ("pretrain", "Pretraining", partial(training, stage="pretrain", panels=SFT, colour=COLOURS["base"])),
    ("sft", "Supervised fine-tuning", partial(training, stage="sft", panels=SFT, colour=COLOURS["sl_cai"])),
    ("preferences", "AI preference labels", labels),
    ("reward", "Reward model", reward),
    ("harm", "Regressor of harm", harm),
    ("dpo", "DPO", partial(training, stage="dpo", panels=DPO, colour=COLOURS["dpo_cai"])),
    ("ppo", "PPO", partial(training, stage="ppo", panels=PPO, colour=COLOURS["rl_cai"], xlabel="iteration", columns=4)),
    ("benchmarks", "Public evaluation sets", benchmarks),
    ("paper", "As the papers have it", of_the_paper),
    ("answers", "Answers to held-out prompts", answers),
    ("transcripts", "From prompt to label", transcripts),
    ("counts", "Counts", counts),
)
