"""Numbers of rounds to a table, and a table to its place in a Markdown file."""

from statistics import median

TOLERANCE = 1e-4  # relative; float32 sums differ in the last digits, other work gives other numbers


def ratios(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """(median, least, most) of their seconds / our seconds, round by round: a busy moment of the machine meets both."""
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    return median(each), min(each), max(each)


def agrees(a, b) -> bool:
    """Whether two checks are of the same work: equal lists of tokens, or numbers within TOLERANCE."""
    if isinstance(a, list) or isinstance(b, list):
        return a == b
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


def rows(rounds: list[dict[str, dict]]) -> list[list[str]]:
    """Rounds, each contender -> what its worker answered, as the rows of a table; "ours" is what the others are held to."""
    out = []
    for name, first in rounds[0].items():
        seconds = [r[name]["seconds"] for r in rounds]
        took, ours = median(seconds), rounds[0]["ours"]
        cells = [name, f"{took:.4g}", rate(first, took)]
        middle, low, high = ratios(seconds, [r["ours"]["seconds"] for r in rounds])
        cells.append("" if name == "ours" else f"**{middle:.2f}** ({low:.2f} to {high:.2f})")
        if "peak" in ours:
            cells.append(f"{median(r[name]['peak'] for r in rounds) / 1e6:.0f}")
        if "check" in ours:
            check = "check" in first and agrees(first["check"], ours["check"])
            cells.append("" if name == "ours" else "yes" if check else "no")
        out.append(cells)
    return out


def rate(answer: dict, seconds: float) -> str:
    """What was done in a second, by the unit that the worker counted."""
    for unit in ("tokens", "rows"):
        if unit in answer:
            return f"{answer[unit] / seconds:.4g} {unit}"
    return ""


def head(rounds: list[dict[str, dict]]) -> list[str]:
    ours = rounds[0]["ours"]
    names = ["", "seconds", "per second", "its seconds / ours"]
    return names + ["peak, MB"] * ("peak" in ours) + ["same result"] * ("check" in ours)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose columns line up, so that it is read as well in a terminal."""
    widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def replace_section(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers of section `name`, which are put at the end where they are missing."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{body.strip()}\n{end}"
    if begin not in text:
        return f"{text.rstrip()}\n\n{section}\n".lstrip()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{begin} has no {end} behind it")
    return before + section + after
