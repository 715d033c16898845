"""The report: text stays text, the page stands alone and is the same each time."""

import base64
import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest

from cai_jax import config, markup, passages, records
from cai_jax.errors import InputError
from cai_jax.stages import report
from cai_jax.workdir import finish, write_json

CONSTITUTION = str(Path(__file__).parents[1] / "constitutions" / "miniworld.toml")
HOSTILE = "<script>alert(\"1\")</script> {0} {name} %s & &amp; '<img src=http://x.y/z onerror=f()>' $\\bad{$ " + "w" * 99
STAGES = ("critique", "sft", "preferences", "reward", "dpo", "ppo", "evaluate", "report")
FIGURES = {"plane", "categories", "rounds", "sft", "labels", "reward", "calibration", "dpo", "ppo"}
CATEGORIES = ("fraud & <b>", "illegal")


def settings(stages=STAGES):
    return config.Config(stages=stages, constitution=config.ConstitutionFile(CONSTITUTION), model=config.Model(path=HOSTILE))


def metrics(harm, helpful):
    """What the oracle says of one model, set and mode. harm None: there was no harmful prompt."""
    values = dict.fromkeys(("over_refusal", "evasive", "explained", "coherent"), 0.125)
    values |= {"harm_rate": harm, "harm_score": None if harm is None else 4 * harm, "helpfulness": helpful}
    interval = {k: [0.0, 1.0] if v is None else [v - 0.1, v + 0.1] for k, v in values.items()}
    by_category = {} if harm is None else {c: {"harm_rate": harm / (i + 1), "n": 3} for i, c in enumerate(CATEGORIES)}
    by_category["cooking"] = {"helpfulness": helpful, "n": 3}
    return values | {"interval": interval, "by_category": by_category, "n_harmful": 6, "n_benign": 3}


MODELS = {
    "rl_cai": {"heldout": {"sampled": metrics(0.25, 0.75)}, "redteam": {"sampled": metrics(0.2, 0.7)}},
    "base": {
        "heldout": {"sampled": metrics(0.875, 0.9), "greedy": metrics(None, 0.8)},
        "redteam": {"sampled": metrics(0.8, 0.9)},
    },
}
ROUNDS = {
    "harm_rate": [0.9, 0.5, 0.2],
    "interval": [[0.8, 0.95], [0.4, 0.6], [0.1, 0.3]],
    "explained": [0.0, None, 0.7],
    "by_category": {"fraud": [1.0, 0.6, 0.3], "illegal": [0.8, 0.4, 0.1]},
}
BINS = [{"p_model": 0.25, "p_label": 0.5, "n": 4}, {"p_model": 0.75, "p_label": 0.625, "n": 16}]
EVALUATION = {
    "scale": {"mean": 0.0, "std": 1.0},
    "ai": {"n": 20, "accuracy": 0.875, "calibration_error": 0.0625, "calibration": BINS},
    "human": {"n": 0, "accuracy": 0.0, "calibration_error": 0.0, "calibration": []},
}


def prompt(n):
    record = {"id": f"p{n}", "messages": [{"role": "user", "content": f"prompt {n} {HOSTILE}"}]}
    return record | {"kind": "harmful", "category": CATEGORIES[n % 2]}


def comparison(n):
    logp = {"principle": HOSTILE, "logp_ab": [-0.125, -2.5], "logp_ba": [-1.25, -0.25]}
    judgement = logp | {"p_ab": 0.75, "p_ba": 0.25, "p_a": 0.5, "thoughts": [f"thought {HOSTILE}", "other"]}
    return prompt(n) | {"response_a": HOSTILE, "response_b": f"b{n}", "p_a": n / 8, "source": "ai", "judgements": [judgement]}


def revision(n):
    step = dict.fromkeys(("principle", "critique_request", "critique", "revision_request"), HOSTILE)
    plain = step | {"critique": None, "critique_request": None, "revision": f"direct {n}"}
    return prompt(n) | {"response": f"response {n}\n{HOSTILE}", "rounds": [step | {"revision": f"revision {n}"}, plain]}


def transcript(n, model):
    verdict = {"harm": 4 * (model == "base"), "kind": HOSTILE, "refused": model != "base"}
    said = {"model": model, "set": "heldout", "mode": "sampled", "response": f"{model} {n} {HOSTILE}", "verdict": verdict}
    return prompt(n) | said


def build(folder):
    """A finished run with hostile text wherever text goes."""
    write_json(folder / "manifest.json", {"python": "3.99", "packages": {"jax": HOSTILE}, "seed": 0})
    records.write(folder / "critique" / "revisions.jsonl", [revision(n) for n in range(8)])
    finish("critique", folder, {"given": 9, "kept": 8, "dropped": {HOSTILE: 1}})
    for stage in ("sft", "reward", "dpo", "ppo"):
        logged = [{"step": t, "loss": 1 / (t + 1), "kl": 0.5} for t in range(5)]
        records.write(folder / stage / "metrics.jsonl", logged)
        records.write(folder / stage / "timing.jsonl", [{"step": t, "seconds": 2.5} for t in range(6)])
    finish("sft", folder, {"given": 7, "kept": 7, "dropped": {}})
    finish("reward", folder, {"ai": 6, "human": 2, "human_share": 0.25})
    finish("dpo", folder, {})
    finish("ppo", folder, {"iterations": 5})
    records.write(folder / "preferences" / "comparisons.jsonl", [comparison(n) for n in range(1, 7)])
    judge = {"flip_rate": 0.125, "position_lean": 0.25, "decidedness": 0.2}
    finish("preferences", folder, {"given": 8, "kept": 6, "dropped": {"identical responses": 2}} | judge)
    write_json(folder / "reward" / "evaluation.json", EVALUATION)
    write_json(folder / "evaluate" / "results.json", {"models": MODELS})
    write_json(folder / "evaluate" / "rounds.json", ROUNDS)
    records.write(folder / "evaluate" / "transcripts.jsonl", [transcript(n, m) for m in MODELS for n in range(8)])
    finish("evaluate", folder, {"prompts": {"heldout": 9}}, results="1")
    return folder


class Page(HTMLParser):
    """Tags as (name, attributes), the texts in order, and whether every element was closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] if tag not in ("img", "meta") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, name, attribute):
        return [a[attribute] for tag, a in self.tags if tag == name and attribute in a]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("run"))
    assert report.run(settings(), folder, None)
    return folder


@pytest.fixture(scope="module")
def page(finished):
    return Page((finished / "report" / "index.html").read_text(encoding="utf-8"))


def cells(table):
    """The texts of a table, row by row; a cell's parts are joined by a bar."""
    rows = table.replace("<th>", "<td>").split("<tr>")[1:]
    return [["|".join(Page(cell.split("</t")[0]).texts) for cell in row.split("<td>")[1:]] for row in rows]


def test_text_stays_text(finished, page):
    source = (finished / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in source and "<b>fraud" not in source and "<img src=http" not in source
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    wanted = ["", "response 0\n", "thought ", "prompt 1 ", "base 1 ", "1 ", "python 3.99, jax "]
    assert {text + HOSTILE for text in wanted} <= set(page.texts) and f"{CATEGORIES[0]} " in page.texts


def test_the_page_loads_nothing(page):
    sources = page.all("img", "src")
    assert len(sources) == len(FIGURES) and all(s.startswith("data:image/png;base64,") for s in sources)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert [h.removeprefix("#") for h in page.all("a", "href")] == ids and len(set(ids)) == len(ids)
    assert {name for _, a in page.tags for name in a} & {"src", "href", "action", "data", "srcset"} == {"src", "href"}
    assert "url(" not in markup.CSS and "@import" not in markup.CSS
    assert page.all("meta", "content")[1].startswith("default-src 'none'")


def test_pictures_lie_beside_the_page_and_in_it(finished, page):
    files = {p.stem: p.read_bytes() for p in (finished / "report").glob("*.png")}
    assert files.keys() == FIGURES
    embedded = {base64.b64decode(s.split(",")[1]) for s in page.all("img", "src")}
    assert embedded == set(files.values())
    for data in files.values():
        image = matplotlib.image.imread(io.BytesIO(data))
        assert image.shape[0] > 200 and image.std() > 0.01


def test_the_same_run_gives_the_same_bytes(finished, tmp_path):
    with matplotlib.rc_context({"axes.facecolor": "red", "lines.linewidth": 9, "savefig.dpi": 30, "font.size": 30}):
        report.run(settings(), build(tmp_path), None)
    for path in sorted((finished / "report").iterdir()):
        assert path.read_bytes() == (tmp_path / "report" / path.name).read_bytes(), path.name


def test_the_terminal_gets_the_first_table(tmp_path, capsys):
    report.run(settings(), build(tmp_path), None)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().err.split("\n")]
    assert ["base", "87.5%", "3.50", "90.0%", "12.5%", "12.5%", "12.5%", "12.5%"] in lines
    assert ["rl_cai", "25.0%", "1.00", "75.0%", "12.5%", "12.5%", "12.5%", "12.5%"] in lines


def test_head_says_what_ran(page):
    assert "critique → sft → preferences → reward → dpo → ppo → evaluate" in page.texts
    assert "6 by AI, 2 by humans: 25.0% human" in page.texts
    assert " answers 87.5% of harmful held-out prompts with harm, " in page.texts
    assert " 25.0%. Helpfulness goes from 90.0% to 75.0%." in page.texts


def test_metric_table_shows_values_intervals_and_dashes():
    rows = cells(report.metric_table({"base": metrics(0.5, None), "x&y": metrics(None, 0.25)}))
    assert rows[0][1:4] == ["harm rate ↓", "harm, 0–4 ↓", "helpful ↑"]
    assert rows[1] == ["Base", "50.0%|40.0–60.0", "2.00|1.90–2.10", "–", *["12.5%|2.5–22.5"] * 4]
    assert rows[2] == ["x&y", "–", "–", "25.0%|15.0–35.0", *["12.5%|2.5–22.5"] * 4]


def test_the_first_table_is_open_and_the_others_fold(page):
    titles = ["Held-out prompts, sampled answers ", "Held-out prompts, greedy answers ", "Red-team prompts, sampled answers "]
    assert [t for t in page.texts if t.endswith(" answers ")] == titles
    tags = [t for t, _ in page.tags]
    assert tags.index("table") < tags.index("details")


def test_two_prompts_a_category_are_shown_with_all_that_led_to_their_label(page):
    assert [t for t in page.texts if t.startswith("revision ")] == ["revision 0", "revision 2", "revision 1", "revision 3"]
    assert [t for t in page.texts if t.startswith("direct ")] == ["direct 0", "direct 2", "direct 1", "direct 3"]
    labels = [f"Label: P(a is preferred) = {x:.3f}" for x in (0.25, 0.125, 0.375)]
    assert [t for t in page.texts if t.startswith("Label: ")] == labels
    where = page.texts.index("mean P(a)") + 1
    assert [t for t in page.texts[where:] if t != HOSTILE][:7] == ["-0.12", "-2.50", "0.75", "-1.25", "-0.25", "0.25", "0.50"]
    shown = [t.removesuffix(HOSTILE) for t in page.texts if t.startswith(("base ", "rl_cai "))]
    assert shown == [f"{m} {n} " for n in (0, 2, 1, 3) for m in ("base", "rl_cai")]  # side by side, in order


def test_a_panel_is_told_apart_and_asked_in_its_own_words():
    j = {"logp_ab": [-1.0, -2.0], "logp_ba": [-1.0, -2.0], "p_ab": 0.7, "p_ba": 0.3, "p_a": 0.5, "principle": "harm"}
    t = {"response_a": "x", "response_b": "y", "p_a": 0.5}
    questions = {("", "harm"): "Which hurts less?", ("0123", "harm"): "Which hurts less?"}
    panel = [j | {"judge": "judge", "constitution": "0123"}, j | {"judge": "judge2", "constitution": "4567"}]
    shown = str(markup.join(report.judgement(t | {"judgements": panel}, questions)))
    assert "harm judge 0123" in shown and "harm judge2 4567" in shown and shown.count("Which hurts less?") == 1
    assert "Which hurts less?" in str(markup.join(report.judgement(t | {"judgements": [j]}, questions)))


def test_thoughts_are_told_by_the_order_that_they_are_of():
    j = {"logp_ab": [-1.0, -2.0], "logp_ba": [-1.0, -2.0], "p_ab": 0.7, "p_ba": 0.3, "p_a": 0.5, "principle": "harm"}
    t = {"response_a": "x", "response_b": "y", "p_a": 0.5, "judgements": [j | {"thoughts": ["w0", "w1", "w2", "w3"]}]}
    texts = Page(str(markup.join(report.judgement(t, {})))).texts
    assert [texts[texts.index(f"w{n}") - 1] for n in range(4)] == [f"Reasoning, {x} first" for x in "abab"]


def test_harm_and_refused_help_stand_out():
    harmful, benign = transcript(0, "base"), transcript(0, "rl_cai") | {"kind": "benign"}
    assert 'class="bad"' in report.answer("base", harmful) and 'class="bad"' in report.answer("rl_cai", benign)
    assert 'class="bad"' not in report.answer("rl_cai", transcript(0, "rl_cai"))


def test_counts_name_every_loss(finished):
    r = report.Run(settings(), finished, report.load_constitution(settings()), {})
    rows = {row[0]: row[1:] for row in cells(report.counts(r))[1:]}
    assert rows["critique"] == ["9", "8", f"1 {HOSTILE}", ""]
    assert rows["sft"] == ["7", "7", "–", ""] and rows["ppo"] == ["–", "–", "–", "iterations 5"]
    assert rows["evaluate"] == ["–", "–", "–", "prompts 9 heldout"]


@pytest.mark.parametrize(
    "stages, ids, drawn",
    [
        (("critique", "report"), ["paper", "transcripts", "counts"], set()),
        (("critique", "sft", "report"), ["sft", "paper", "transcripts", "counts"], {"sft"}),
        (
            ("evaluate", "report"),
            ["results", "plane", "categories", "critique", "paper", "answers", "counts"],
            {"plane", "categories", "rounds"},
        ),
    ],
)
def test_what_did_not_run_is_left_out(tmp_path, stages, ids, drawn):
    report.run(settings(stages), build(tmp_path), None)
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.all("section", "id") == ids and {p.stem for p in (tmp_path / "report").glob("*.png")} == drawn


def test_a_run_with_more_files_has_the_figures_of_the_paper_too(tmp_path):
    """And loses none. Best-of-n is no model that was trained: the first sentence does not end with it."""
    rows = [{"model": m, "elo": x, "low": x - 1, "high": x + 1} for m, x in (("rl_cai", 90.0), ("base", 0.0))]
    best = {"best_of_16": {"heldout": {"sampled": metrics(0.5, 0.5)}}, "best_of_4": {"heldout": {"sampled": metrics(0.6, 0.5)}}}
    spent = {"rl_cai": {"mean": 2.5, "interval": [2.0, 3.0]}, "best_of_4": {"mean": 1.25, "interval": None}}
    found = {m: of | ({"kl": {"start": spent[m]}} if m in spent else {}) for m, of in (MODELS | best).items()}
    elo = {scale: {"models": rows} for scale in ("harmlessness", "helpfulness")}
    found["base"] |= {"kl": {"base": spent["rl_cai"]}}  # as of one with a checkpoint of its own
    write_json(build(tmp_path) / "evaluate" / "results.json", {"models": found, "elo": elo})
    write_json(tmp_path / "evaluate" / "rounds.json", ROUNDS | {"score": [0.0] * 3, "score_interval": [[-1.0, 1.0]] * 3})
    share = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 9}
    worth = {"mse": 0.5, "constant": 1.5, "constant_mse": 2.0, "better": 1.5, "interval": [1.0, 2.0], "n": 9}
    write_json(tmp_path / "harm" / "evaluation.json", worth)
    write_json(
        tmp_path / "benchmarks" / "results.json",
        {"xstest": {"format": "xstest", "models": {"base": {"missing": 0, "refused": share}}}},
    )
    for stage in ("harm", "benchmarks"):
        finish(stage, tmp_path, {})
    report.run(settings((*STAGES[:-1], "harm", "benchmarks", "report")), tmp_path, None)
    assert {p.stem for p in (tmp_path / "report").glob("*.png")} == FIGURES | {"figure-2", "figure-3", "figure-5", "frontier"}
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    section = Page(text.split('id="paper"')[1].split("<section")[0].partition(">")[2].removesuffix("</section>"))
    titles = [t for t in section.texts if t.startswith(("Figure ", "Table "))]
    assert [t.partition(":")[0] for t in titles] == ["Figure 2", "Figure 3", "Figure 5", "Table 1", "Table 2"]
    assert " 25.0%. Helpfulness goes from 90.0% to 75.0%." in Page(text).texts
    texts = Page(text).texts
    assert {"KL of RL-CAI", "2.50 nats a response (2.00 to 3.00)", "KL of best of 4", "1.25 nats a response"} <= set(texts)
    assert "0.500, against 2.000 of the constant 1.50: 1.500 less (1.00 to 2.00), on 9 held-out conversations" in texts
    assert cells(text.split('id="benchmarks"')[1])[1] == ["xstest", "base", "refused", "0.250", "[0.125, 0.500]", "9"]
    shown = [cell[0] for cell in cells(text.split('id="results"')[1].split("</table>")[0])]
    assert shown[1:] == ["Base", "RL-CAI", "best of 4", "best of 16"]


def test_what_the_gate_found_of_a_judge():
    of = {"kappa": {"value": 0.25, "low": 0.125, "high": 0.5, "n": 9}, "beyond": ["kappa: too low"]}
    said = [("judge: kappa", "0.25 (0.12 to 0.50) on 9"), ("judge is beyond a limit", "kappa: too low")]
    assert passages.trusted({"judge": of}) == said


def test_a_missing_file_leaves_out_its_section_only(tmp_path):
    build(tmp_path)
    (tmp_path / "evaluate" / "rounds.json").unlink()
    (tmp_path / "sft" / "metrics.jsonl").unlink()
    report.run(settings(), tmp_path, None)
    assert {p.stem for p in (tmp_path / "report").glob("*.png")} == FIGURES - {"rounds", "sft"}


def test_it_is_a_stage_like_the_others(tmp_path):
    build(tmp_path)
    assert report.run(settings(), tmp_path, None)
    assert not report.run(settings(), tmp_path, None)
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        report.run(dataclasses.replace(settings(), seed=1), tmp_path, None)
    finish("evaluate", tmp_path, {}, results="2")
    with pytest.raises(InputError, match="results: 1 -> 2"):
        report.run(settings(), tmp_path, None)
    (tmp_path / "ppo" / "done.json").unlink()
    with pytest.raises(InputError, match="'ppo' has not finished"):
        report.run(settings(), tmp_path, None)


@pytest.mark.parametrize(
    "made, wanted",
    [
        (lambda: markup.tag("p", "a<b", markup.tag("b", "&"), ["x", None]), "<p>a&lt;b<b>&amp;</b>x</p>"),
        (lambda: markup.tag("p", class_='"><i>', title=None), '<p class="&quot;&gt;&lt;i&gt;"></p>'),
        (lambda: markup.fold("s", "t", unfolded=True), '<details open=""><summary>s</summary>t</details>'),
        (lambda: markup.number(float("nan")) + markup.number(0.5) + markup.number(0.5, 4), "–50.0%0.50"),
        (lambda: markup.plain({"a": 2, "b": 0.12345}), "2 a, 0.123 b"),
    ],
)
def test_markup(made, wanted):
    assert made() == wanted
