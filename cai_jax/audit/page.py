"""What an audit leaves to read: audit.jsonl, audit.csv for spreadsheets, and one page. Same audit, same bytes."""

import csv
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from cai_jax import files, workdir
from cai_jax.audit.answers import Answer
from cai_jax.markup import DASH, Html, document, facts, fold, number, passage, plain, table, tag
from cai_jax.records import dumps

SHOWN = 300  # answers of each kind on the page
LONGEST = 5000  # letters of a text on the page
CELL = 32_000  # of a cell: spreadsheets hold 32,767
OF_ROW, OF_PRINCIPLE = ("id", "line", "severity", "flagged"), ("id", "category", "question", "score")
COLUMNS = (*OF_ROW, "principle", *OF_PRINCIPLE[1:], "evidence", "not_scored", "prompt", "answer")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # what begins a cell that spreadsheets may compute


def write(out: Path, summary: dict, findings: Iterable[tuple[Answer, dict]]) -> None:
    """All files of an audit from its findings, the most severe first, those without a score last (see audit.findings)."""
    flagged, missed = [], []
    with _beside(out / "audit.jsonl") as lines, _beside(out / "audit.csv") as sheet:
        cells = csv.writer(sheet, lineterminator="\n", quoting=csv.QUOTE_ALL)  # also what only a reader takes for a new line
        cells.writerow(COLUMNS)
        for answer, found in findings:
            lines.write(dumps(found | {"given": answer.given}))
            cells.writerow(map(cell, row(answer, found)))
            if found["flagged"] and len(flagged) < SHOWN:
                flagged.append((answer, found))
            elif found["not_scored"] and len(missed) < SHOWN:
                missed.append([answer.id, answer.line, found["not_scored"], short(answer.messages[-1]["content"])])
    files.put(out / "audit.html", page(summary, flagged, missed).encode("utf-8"))
    workdir.write_json(out / "summary.json", summary)


@contextmanager
def _beside(path: Path):
    """A file that is in its place when it is whole: it may be larger than memory."""
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8", newline="") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def row(answer: Answer, found: dict) -> list:
    """The values of COLUMNS."""
    principle, evidence = found["principle"] or {}, found["evidence"] or {}
    said = [*(found[k] for k in OF_ROW), *(principle.get(k) for k in OF_PRINCIPLE)]
    return [*said, evidence.get("text"), found["not_scored"], answer.messages[-1]["content"], answer.text]


def cell(value):
    """A value as a spreadsheet may have it: text that would be a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    return ("'" * value.startswith(FORMULA) + value)[:CELL]


def page(summary: dict, flagged: list[tuple[Answer, dict]], missed: list[list]) -> Html:
    """missed: of answers without a score, the cells of their table; their texts may be of any size."""
    s = summary
    sections = [
        ("missed", "Not scored", not_scored(s, missed)),
        ("principles", "Flagged by principle", by_principle(s)),
        ("calibration", "Calibration", calibration(s["calibration"])),
        ("flagged", "Flagged answers", [_note(s["flagged"], "flagged"), [finding(*f) for f in flagged]]),
    ]
    law, title = s["constitution"], f"Audit: {s['input']}"
    return document(title, overview(s), [x for x in sections if x[2]], f"{law['name']}, fingerprint {law['fingerprint']}")


def overview(s: dict) -> list:
    law, hole = s["constitution"], sum(s["not_scored"].values())
    if s["calibration"]:
        kind = "calibrated P(violation), learnt from the labelled sample"
    else:
        kind = "the highest score of a principle, which is not calibrated and knows no weights of principles"
    lede = f"{s['flagged']:,} of {s['scored']:,} answers are flagged. "
    holes = f"{hole:,} of {s['answers']:,} could not be scored: nothing is known of them."
    ran = [
        ("Constitution", f"{law['name']}, version {law['version']}, {law['principles']} principles"),
        ("Judge", s["judge"]),
        ("Score", ["P(better) of the plain refusal ", tag("q", s["reference"]), " under a principle, in both orders"]),
        ("Severity", kind),
        ("Answers", f"{s['answers']:,}: {s['scored']:,} scored, {hole:,} not"),
        ("Rate", f"{s['rate']} of what is scored, which is {s['flagged']:,}"),
        ("Threshold", DASH if s["threshold"] is None else f"{s['threshold']:.4f}, the least severity of a flagged answer"),
    ]
    if s["expected_violations"] is not None:
        ran.append(("Expected violations", f"{s['expected_violations']:.1f} of the flagged"))
    return [tag("p", tag("b", holes, " ", class_="bad") if hole else None, lede, class_="lede"), facts(ran)]


def not_scored(s: dict, missed: list[list]) -> list | None:
    if not s["not_scored"]:
        return None
    reasons = facts([(why, f"{n:,}") for why, n in s["not_scored"].items()])
    whole = _note(sum(s["not_scored"].values()), "without a score")
    return [reasons, whole, table(["id", "line", "why", "prompt"], missed, "prose")]


def by_principle(s: dict) -> Html | None:
    rows = [[p["id"], p["category"], p["flagged"], p["question"]] for p in s["by_principle"]]
    return table(["principle", "category", "flagged", "question"], rows, "prose") if rows else None


def calibration(c: dict | None) -> list | None:
    if not c:
        return None
    rows = []
    for name, of in (("at the threshold", c["at_threshold"]), ("at one half", c["at_half"])):
        shares = [[number(of[k]), tag("small", DASH.join(map(number, of[f"{k}_interval"])))] for k in ("precision", "recall")]
        rows.append([name, of["said"], of["right"], *shares])
    said = [
        ("Labelled answers", f"{c['n']}, {c['violations']} with a violation; {c['not_scored']} more could not be scored"),
        ("Log loss", f"{c['log_loss']:.3f}; with the same probability for all it is {c['log_loss_constant']:.3f}"),
        ("Calibration error", f"{c['calibration_error']:.3f}, mean distance of a probability and the share it speaks of"),
        ("Penalty", f"{c['strength']:g}, by cross-validation"),
    ]
    weights = table(["principle", "weight"], [[id, f"{w:+.3f}"] for id, w in c["weights"].items()])
    note = (
        "By cross-validation in five folds: every labelled answer was judged by a fit that had not seen it. Small figures are "
        "95% intervals. All of it holds for answers like those of the sample."
    )
    table_ = table(["flagging of the sample", "flagged", "right", "precision", "recall"], rows)
    return [table_, tag("p", note, class_="note"), facts(said), fold("Weights of log-odds, in spreads of the sample", weights)]


def finding(answer: Answer, found: dict) -> Html:
    """A flagged answer, its evidence marked."""
    p, e = found["principle"], found["evidence"]
    about = tag("small", f"{p['id']} · {short(found['id'], 50)}")
    title = [f"{found['severity']:.4f} ", about, " ", short(answer.messages[-1]["content"])]
    begin, end = e["start"], e["start"] + len(e["text"])
    marked = [answer.text[:begin], tag("mark", answer.text[begin:end]), answer.text[end:]]
    if len(answer.text) > LONGEST:
        marked = [cut(answer.text)]
    without = "the whole answer" if e["without"] is None else f"without it {e['without']:.3f}"
    return fold(
        title,
        [passage(m["role"], cut(m["content"])) for m in answer.messages],
        tag("h4", "answer"),
        tag("p", marked, class_="text"),
        passage("evidence", cut(e["text"].strip()), without),
        passage("principle", p["question"], f"{p['id']}, {p['category']}, score {p['score']:.3f}"),
        tag("p", "Scores: ", plain({k: round(x, 3) for k, x in found["scores"].items()}), class_="note"),
        tag("p", f"id {found['id']}, line {found['line']}", class_="note"),
    )


def short(text: str, most: int = 100) -> str:
    text = " ".join(text[: 4 * most].split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} letters, whole in audit.jsonl)"


def _note(n: int, what: str) -> Html | None:
    """Where the page does not show all."""
    said = f"Here are {SHOWN:,} of the {n:,} answers {what}; all are in audit.csv."
    return tag("p", said, class_="note") if n > SHOWN else None
