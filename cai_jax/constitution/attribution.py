"""What each principle did in a run, from the run's records: how often it was drawn, how it changed texts, how it labelled."""

import difflib
import json
from collections.abc import Sequence

from cai_jax.intervals import wilson

HEADER = (
    "principle",
    "revisions",
    "changed",
    "words kept",
    "labels",
    "decided",
    "order flips",
    "with the others",
    "wins",
    "humans",
)
PANEL = ("judge", "constitution")  # keys of a judgement that name its place on a panel


def attribute(revisions: Sequence[dict], comparisons: Sequence[dict], humans: Sequence[dict] = ()) -> dict[str, dict]:
    """Principle -> its figures; None where there is nothing to count. Shares are of the counts before them. What a panel judged
    has its judge and its constitution beside the principle.

    drawn, changed, kept: rounds of critique and revision, the share that changed the text, and the words of it that stayed
      where it did (Ratcliff-Obershelp on words). Rounds after a text that was cut short count too.
    judged, decided, flips: its judgements, how far their mean is from a half, and how often the order of the responses changes
      the verdict.
    others, agrees: judgements beside at least one other, and the share on the side of the others' mean.
    disputes, wins: where it is on the other side, how often the record's label is on its own.
    humans, with_humans: judgements of pairs that humans have compared too, and the share on their side.
    """
    said = {_pair(h): (h["p_a"], h["response_a"]) for h in humans if h["p_a"] != 0.5}
    found: dict[str, dict[str, list]] = {}

    def note(principle: str, name: str, value: float) -> None:
        found.setdefault(principle, {}).setdefault(name, []).append(float(value))

    for record in revisions:
        before = record["response"]
        for turn in record["rounds"]:
            old, new = before.split(), turn["revision"].split()
            note(turn["principle"], "changed", old != new)
            if old != new:
                kept = sum(m.size for m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks())
                note(turn["principle"], "kept", kept / max(1, len(old)))
            before = turn["revision"]
    for record in comparisons:
        rows = record.get("judgements", ())
        human, first = said.get(_pair(record), (None, None))
        for n, row in enumerate(rows):
            id, a = " ".join([row["principle"], *(row[k][:8] for k in PANEL if k in row)]), row["p_a"] > 0.5
            note(id, "decided", abs(row["p_a"] - 0.5))
            note(id, "flips", (row["p_ab"] > 0.5) != (row["p_ba"] > 0.5))
            others = [other["p_a"] for m, other in enumerate(rows) if m != n]
            if others:
                same = (sum(others) / len(others) > 0.5) == a
                note(id, "agrees", same)
                if not same:
                    note(id, "wins", (record["p_a"] > 0.5) == a)
            if human is not None:
                note(id, "with_humans", ((human > 0.5) == (first == record["response_a"])) == a)
    return {id: _figures(of) for id, of in found.items()}


def _pair(record: dict) -> tuple:
    """What makes two comparisons the same, whichever response comes first."""
    return json.dumps(record["messages"], sort_keys=True), frozenset((record["response_a"], record["response_b"]))


def _figures(of: dict[str, list]) -> dict:
    counts = {"drawn": "changed", "judged": "flips", "others": "agrees", "disputes": "wins", "humans": "with_humans"}
    out = {count: len(of.get(share, ())) for count, share in counts.items()}
    names = (*counts.values(), "kept", "decided")
    out |= {name: sum(of[name]) / len(of[name]) if of.get(name) else None for name in names}
    return out | {f"{name}_interval": wilson(out[name], out[count]) for count, name in counts.items() if out[count]}


def cells(id: str, f: dict) -> list[str]:
    """A row under HEADER."""

    def share(name: str, n: int | None = None) -> str:
        text = "" if f[name] is None else f"{f[name]:.0%}"
        return text if n is None or not text else f"{text} of {n}"

    decided = "" if f["decided"] is None else f"{f['decided']:.2f}"
    row = [id, str(f["drawn"] or ""), share("changed"), share("kept"), str(f["judged"] or ""), decided, share("flips")]
    return [*row, share("agrees", f["others"]), share("wins", f["disputes"]), share("with_humans", f["humans"])]
