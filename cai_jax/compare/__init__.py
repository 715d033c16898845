"""`cai compare`: a page on this machine, on which people say which of two answers is better, and do not see whose it is.

cai compare --run=runs/a --models=sl_cai,rl_cai --out=ratings.jsonl [--set=heldout|redteam] [--mode=sampled|greedy]
cai compare --queue=label-these.jsonl --out=labels.jsonl
            [--scale=helpfulness|harmlessness] [--rater=NAME] [--limit=N] [--seed=0] [--host=127.0.0.1] [--port=0] [--open]

The first compares models of a run that has evaluated them, of more than two one pair for each prompt, in rotation; the second
has comparisons labelled, as `cai constitution disputes` writes them. --scale is what the page asks. Order and sides are drawn
from --seed; --limit shows the first so many, and the others after them when it is raised.

--out gets a line for each rating, a comparison record with p_a 1, 0.5 or 0 that a run can learn from
(--config.data.comparisons). OUT.log.jsonl beside it gets all that happened, what was skipped and undone too. After a kill the
same command goes on. From another machine: --port=8000 here, ssh -L 8000:127.0.0.1:8000 HOST there.
"""

import argparse
import signal
import threading
import webbrowser
from collections import Counter
from collections.abc import Iterable, Sequence
from queue import SimpleQueue

from cai_jax.compare import matches, page
from cai_jax.compare.matches import Match, Ratings
from cai_jax.compare.server import Desk, Server
from cai_jax.constitution.distance import FEWEST
from cai_jax.errors import InputError
from cai_jax.evals import elo
from cai_jax.intervals import wilson
from cai_jax.terminal import STOPPED_EXIT, exit_code, natural, say

PRIOR = 0.5  # of Elo: half a match won and half a match lost against an unseen model, as one of these may never lose
POLL = 0.1  # seconds after which it sees that it shall end
SETS, MODES = ("heldout", "redteam"), ("sampled", "greedy")


def wins(rated: Iterable[dict]) -> dict[str, Counter]:
    """Of each model, or of a and b where there are none: how often it won, lost and tied."""
    found: dict[str, Counter] = {}
    for r in rated:
        a, b = (r.get(f"model_{x}", x) for x in "ab")
        for name, p in ((a, r["p_a"]), (b, 1 - r["p_a"])):
            found.setdefault(name, Counter())[{1: "won", 0: "lost"}.get(p, "tied")] += 1
    return found


def summary(standing: Sequence[dict], total: int) -> list[str]:
    """What a person reads at the end. With two models, ties are left out of how often one is better."""
    rated = [r for r in standing if not r["skipped"]]
    ties = Counter(r["tie"] for r in rated if r["p_a"] == 0.5)
    out = [f"{len(rated)} of {total} rated, {len(standing) - len(rated)} skipped"]
    if rated:
        kinds = ", ".join(f"{n} both {kind}" for kind, n in sorted(ties.items()))
        out.append(f"ties: {ties.total()} of {len(rated)}, {ties.total() / len(rated):.0%}" + f" ({kinds})" * bool(kinds))
    found = wins(rated)
    for name, n in found.items():
        out.append(f"{name}: better {n['won']}, worse {n['lost']}, tied {n['tied']}")
    if len(found) == 2 and (decided := len(rated) - ties.total()):
        name, n = next(iter(found.items()))
        low, high = wilson(n["won"] / decided, decided)
        out.append(
            f"{name} is better in {n['won'] / decided:.0%} of the {decided} that are no ties, 95 % [{low:.0%}, {high:.0%}]"
        )
    return out + ratings_of(rated)


def ratings_of(rated: Sequence[dict]) -> list[str]:
    """Elo of the models, the strongest first, see evals.elo.report; none of a queue, or of few ratings."""
    if len(rated) < FEWEST or not all("model_a" in r for r in rated):
        return []
    met = [elo.Match(r["model_a"], r["model_b"], r["p_a"], r["id"]) for r in rated]
    found = elo.report(met, prior=PRIOR)["models"]
    return [f"Elo of {r['model']}: {r['elo']:+.0f}, 95 % [{r['low']:+.0f}, {r['high']:+.0f}] (prior {PRIOR})" for r in found]


def compared(args) -> tuple[list[Match], dict]:
    """-> (what is compared, in the order in which it is shown; what tells it from other comparisons)."""
    drawn = {"seed": args.seed, "scale": args.scale}
    if args.queue:
        if args.models or args.set or args.mode:
            raise InputError("--queue holds its answers itself; leave --models, --set and --mode out")
        found, about = matches.of_queue(args.queue, args.seed), {}
    else:
        about = {
            "models": [m.strip() for m in args.models.split(",")],
            "set": args.set or SETS[0],
            "mode": args.mode or MODES[0],
        }
        found = matches.of_run(args.run, *about.values(), args.seed)
    shown = matches.worth_showing(found)
    if not shown:
        raise InputError(
            f"{args.queue or args.run}: nothing to compare: the two answers are the same every time ({len(found)})"
        )
    if len(shown) < len(found):
        say(f"{len(found) - len(shown)} of {len(found)} are not shown: their two answers are the same")
    return shown, about | drawn | {"texts": matches.fingerprint(shown)}


def run(args) -> int:
    """-> the exit code."""
    found, about = compared(args)
    ratings = Ratings(args.out, about)
    try:
        todo = found[: args.limit or None]
        if beyond := len(ratings.standing.keys() - {m.id for m in todo}):
            raise InputError(f"--limit={args.limit}: {args.out} has ratings of {beyond} other prompt(s); raise the limit")
        told = {key: about[key] for key in ("set", "mode", "scale") if key in about} | {"rater": args.rater}
        desk = Desk(todo, ratings, told)
        with Server(args.host, args.port, desk, page.document(args.scale)) as server:
            say(f"{len(todo)} comparisons, {len(ratings.standing)} of them done; ratings go to {args.out}")
            which = served(server, args.open)
            desk.lock.acquire()  # what is being saved is saved, and nothing begins
        say("\n".join(summary([*ratings.standing.values()], len(todo))))
        return STOPPED_EXIT if which == signal.SIGTERM else 0
    finally:
        ratings.close()


def served(server: Server, opened: bool) -> int:
    """Until a signal. -> its number."""
    heard: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda which, _: heard.put(which))
    threading.Thread(target=server.serve_forever, args=(POLL,), daemon=True).start()
    print(f"open {server.url} in a browser on this machine; Ctrl-C ends", flush=True)
    if opened:
        webbrowser.open(server.url)
    which = heard.get()
    server.shutdown()
    return which


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("cai compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--run")
    what.add_argument("--queue")
    p.add_argument("--out", required=True)
    for name, default in {"models": "", "rater": "", "host": "127.0.0.1"}.items():
        p.add_argument(f"--{name}", default=default)
    for name, choices in {"set": SETS, "mode": MODES}.items():
        p.add_argument(f"--{name}", choices=choices)
    p.add_argument("--scale", choices=tuple(page.SCALES), default="helpfulness")
    for name in ("limit", "seed", "port"):
        p.add_argument(f"--{name}", type=natural, default=0)
    p.add_argument("--open", action="store_true")
    return p


def main(argv: Sequence[str]) -> int:
    """-> the exit code."""
    return exit_code(run, parser().parse_args(argv))
