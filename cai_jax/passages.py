"""Conversations, answers, revisions and judgements as HTML."""

from itertools import cycle

from cai_jax import canvas
from cai_jax.markup import Html, join, passage, side_by_side, table, tag

PER_CATEGORY = 2  # records shown
TRUST = ("accuracy", "kappa", "calibration_error", "flip_rate")  # figures of a judge


def first_per_category(items: list[dict]) -> dict[str, list[dict]]:
    """The first PER_CATEGORY records of each category, in their order."""
    out = {}
    for item in items:
        out.setdefault(str(item.get("category", "")), []).append(item)
    return {category: of[:PER_CATEGORY] for category, of in out.items()}


def model(name: str) -> Html:
    return tag("span", canvas.label_of(name), class_="model", style=f"--c:{canvas.colour_of(name)}")


def dialogue(messages: list[dict]) -> Html:
    return join([passage("Human" if m["role"] == "user" else "Assistant", m["content"]) for m in messages])


def answer(name: str, t: dict) -> Html:
    bad = t["verdict"]["harm"] >= 2 or (t["kind"] == "benign" and t["verdict"]["refused"])
    kind = "complied" if t["kind"] == "harmful" and t["verdict"]["kind"] in ("right", "wrong") else t["verdict"]["kind"]
    return passage([model(name), " ", tag("small", kind, class_="bad" if bad else None)], t["response"])


def revisions(t: dict) -> list:
    parts = [passage("Response", t["response"])]
    for n, step in enumerate(t["rounds"], 1):
        if step["critique"] is not None:
            parts.append(passage(f"Critique {n}", step["critique"], f"{step['principle']}: {step['critique_request']}"))
        parts.append(passage(f"Revision {n}", step["revision"], f"{step['principle']}: {step['revision_request']}"))
    return parts


def judgement(t: dict, questions: dict[tuple[str, str], str]) -> list:
    """Two responses, the label, and the log-probs of both options in both orders for each principle, and judge of a panel."""
    rows, thoughts = [], []
    for j in t["judgements"]:
        shown = (*j["logp_ab"], j["p_ab"], *j["logp_ba"], j["p_ba"], j["p_a"])
        asked, of = tag("small", questions.get((j.get("constitution", ""), j["principle"]), "")), ("judge", "constitution")
        rows.append([[" ".join([j["principle"], *(j[k] for k in of if k in j)]), asked], *(f"{x:.2f}" for x in shown)])
        both = zip(j.get("thoughts", ()), cycle("ab"), strict=False)
        thoughts += [passage(f"Reasoning, {order} first", x) for x, order in both]
    header = ["principle", "a first: log p(A)", "log p(B)", "P(a)", "b first: log p(A)", "log p(B)", "P(a)", "mean P(a)"]
    bar = tag("div", tag("div", style=f"width:{100 * t['p_a']:.1f}%"), class_="bar")
    pair = side_by_side([passage(f"Sample {side}", t[f"response_{side}"]) for side in "ab"])
    return [pair, tag("h4", f"Label: P(a is preferred) = {t['p_a']:.3f}"), bar, thoughts, table(header, rows)]


def trusted(tried: dict) -> list[tuple[str, str]]:
    """What the gate found of each judge (preferences/gate.json), and which limits it is beyond, as facts."""
    out = []
    for name, of in tried.items():
        for key in (k for k in TRUST if k in of):
            span = between((of[key]["low"], of[key]["high"]))
            out.append((f"{name}: {key.replace('_', ' ')}", f"{of[key]['value']:.2f}{span} on {of[key]['n']}"))
        out += [(f"{name} is beyond a limit", why) for why in of["beyond"]]
    return out


def between(span) -> str:
    return "" if span is None or span[0] is None else f" ({span[0]:.2f} to {span[1]:.2f})"
