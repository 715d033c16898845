"""`cai constitution`: what needs no model, and so no JAX, and what asks a judge.

cai constitution lint   FILE ... [--strict] [--json]          errors, and warnings with how to mend them; 1: there are errors
cai constitution diff   OLD NEW [--json]                      what was added, removed, reworded, moved, re-weighted
cai constitution import FILE ... --out=NEW.toml [--name=...]  from a public format (see exchange.py)
cai constitution export FILE --format=llm-swarm --out=F.json  into one
cai constitution commit FILE --reason=... [--author=...]      into FILE.log.jsonl, each entry with the hash of the one before
cai constitution log    FILE [--json]                         who changed what, and why
cai constitution verify FILE [--workdir=runs/a]               whether the log is whole; 1: it is not
cai constitution check FILE --judge=MODEL [--format=chat]     FILE.checks.toml by log-prob; 1: a case that was right is wrong
cai constitution distance OLD NEW --judge=MODEL --probes=FILE [--limit=200]   how differently a judge labels the same pairs
cai constitution ambiguity FILE --judge=MODEL --probes=FILE [--paraphrases=FILE] [--samples=5] [--limit=50] [--json]
                                                              whose labels move with how the principle is put, and where
cai constitution disputes --workdir=runs/a --out=FILE [--limit=50]            the comparisons that humans should label first
cai constitution attribute --workdir=runs/a [--humans=FILE] [--json]          what each principle did in a run

MODEL: a folder in Hugging Face format or owner/name of its hub; probes: comparisons as a run reads or writes them.
"""

import argparse
import getpass
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from cai_jax import files
from cai_jax.constitution import load, log, problems
from cai_jax.constitution.diff import Change, diff, one_line, shown
from cai_jax.constitution.exchange import foreign, load_foreign, toml
from cai_jax.constitution.lint import lint
from cai_jax.errors import InputError
from cai_jax.prompts import TEMPLATES
from cai_jax.terminal import exit_code, natural, say, written_out


def new_file(flag: str, text: str) -> Path:
    """A file that is not there yet."""
    if not Path(text).name or Path(text).exists():
        raise InputError(f"{flag}={text}: {'is there already; give another name, or remove it' if text else 'wanted a file'}")
    return Path(text)


def lint_command(args) -> int:
    found = {path: lint(path, TEMPLATES) for path in args.files}
    errors, all_ = (sum(f.level == "error" or every for fs in found.values() for f in fs) for every in (False, True))
    if args.json:
        say(json.dumps([{"file": path} | asdict(f) for path, fs in found.items() for f in fs], indent=1))
    else:
        for path, f in ((path, f) for path, fs in found.items() for f in fs):
            line, where = f"{f.line}:" * (f.line > 0), f"{f.where}: " * (f.level == "warning")
            say(f"{path}:{line} {f.level} ({f.rule}): {one_line(where + f.message)}")
        say(f"{len(found)} file(s): {errors} error(s), {all_ - errors} warning(s)")
    return int(bool(all_ if args.strict else errors))


def diff_command(args) -> int:
    changes = diff(load(args.old, templates=TEMPLATES), load(args.new, templates=TEMPLATES))
    if args.json:
        say(json.dumps([asdict(c) for c in changes], indent=1))
    elif changes:
        say("\n".join(map(shown, changes)))
    else:
        say("no difference")
    return 0


def import_command(args) -> int:
    out, read = new_file("--out", args.out), [load_foreign(path) for path in args.files]
    principles = [p for _, found in read for p in found]
    twice = [id for id, n in Counter(p.id for p in principles).items() if n > 1]
    if twice:
        raise InputError(f"{', '.join(args.files)}: both have {twice[0]!r}; import them apart")
    text = toml(args.name or out.stem, principles)
    for problem in problems(args.out, tomllib.loads(text), TEMPLATES):
        raise InputError(problem)
    files.put(out, text.encode("utf-8"))
    for (name, found), path in zip(read, args.files, strict=True):
        say(f"{path}: {name}, {len(found)} principles")
    say(f"{args.out}: what the format lacks was put in words of its own; look at it with: cai constitution lint {args.out}")
    return 0


def export_command(args) -> int:
    out, law = new_file("--out", args.out), load(args.file, templates=TEMPLATES)
    files.put(out, foreign(list(law.principles), args.format).encode("utf-8"))
    say(f"{args.out}: {len(law.principles)} principles as {args.format}, which has no place for categories, weights and more")
    return 0


def commit_command(args) -> int:
    from cai_jax.constitution.check import read_record  # which loads numpy

    def checked(fingerprint: str) -> dict | None:
        record = read_record(args.file)
        return record["summary"] if record.get("fingerprint") == fingerprint else None

    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        author = args.author or getpass.getuser()
    except (KeyError, OSError):
        raise InputError("--author=NAME is missing, and this machine has no name for its user") from None
    say(_entry(log.commit(args.file, author, args.reason, now, TEMPLATES, checked)))
    return 0


def log_command(args) -> int:
    entries = log.read(args.file)
    if args.json:
        say(json.dumps(entries, indent=1))
    else:
        say("\n".join(map(_entry, entries)) if entries else f"{log.place(args.file)}: no entry yet")
    for line in log.verify(args.file) if entries else ():
        print(written_out(f"{log.place(args.file)}: {line}"), file=sys.stderr)
    if entries and diff(log.constitution(entries[-1]), load(args.file, templates=TEMPLATES)):
        print(
            f"{args.file} has changes that are in no entry: cai constitution commit {args.file} --reason=...", file=sys.stderr
        )
    return 0


def verify_command(args) -> int:
    known, without = [], []
    for workdir in args.workdir:
        manifest = files.folder_of(workdir) / "manifest.json"
        if not manifest.exists():
            raise InputError(f"--workdir={workdir}: no run is there, it has no manifest.json")
        kept = files.read_json(manifest)
        kept = kept.get("constitution_entry") if isinstance(kept, dict) else None
        try:
            known.append((int(kept["entry"]), str(kept["hash"])))
        except (TypeError, KeyError, ValueError):
            without.append(f"the run in {workdir} kept no entry: its constitution was not committed when it began")
    broken = [*log.verify(args.file, known), *without]
    for line in broken:
        say(f"{log.place(args.file)}: {line}")
    if not broken:
        entries = log.read(args.file)
        say(f"{log.place(args.file)}: whole, {len(entries)} entries, the last {entries[-1]['hash']}")
    return int(bool(broken))


def check_command(args) -> int:
    from cai_jax import judge

    return judge.run_check(args.file, args.judge, args.format, args.system, args.suite, args.strict, say)


def distance_command(args) -> int:
    from cai_jax import judge

    where = args.old, args.new, args.judge, args.format, args.system, args.probes
    return judge.run_distance(*where, args.limit, new_file("--out", args.out) if args.out else None, say)


def ambiguity_command(args) -> int:
    from cai_jax import judge

    where = args.file, args.judge, args.format, args.system, args.probes, args.paraphrases
    return judge.run_ambiguity(*where, args.samples, args.limit, args.json, say)


def disputes_command(args) -> int:
    from cai_jax import panel, records

    out, place = new_file("--out", args.out), files.folder_of(args.workdir) / "preferences/comparisons.jsonl"
    judged = records.read(place, ("id", "messages", "response_a", "response_b", "p_a"))
    for r in judged:
        if not (isinstance(r["id"], str) and all(isinstance(r.get(k, 0.0), int | float) for k in ("p_a", "disagreement"))):
            raise InputError(f"{place}: record {r['id']!r}: wanted text as its id, and numbers as p_a and disagreement")
    if not any(r.get("disagreement") for r in judged):
        raise InputError(f"{place}: nothing that could disagree: each label is one judgement (--config.preferences.principles)")
    chosen = panel.disputed(judged, args.limit or len(judged))
    kept = "id", "messages", "response_a", "response_b", "disagreement"  # not the label, which would lead who reads it
    lines = (records.dumps({k: r[k] for k in kept if k in r}) for r in chosen)
    files.put(out, "".join(lines).encode("utf-8", "backslashreplace"))
    say(f"{args.out}: {len(chosen)} of {len(judged)} comparisons; give each a p_a from 0 (b is better) to 1 (a is)")
    return 0


def attribute_command(args) -> int:
    from cai_jax import data, records
    from cai_jax.constitution.attribution import HEADER, attribute, cells

    places = [files.folder_of(args.workdir) / name for name in ("critique/revisions.jsonl", "preferences/comparisons.jsonl")]
    if not any(p.exists() for p in places):
        raise InputError(f"--workdir={args.workdir}: no run with principles is there; wanted {' or '.join(map(str, places))}")
    keys = ("response", "rounds"), ("messages", "response_a", "response_b", "p_a")
    found = [records.read(p, wanted) if p.exists() else [] for p, wanted in zip(places, keys, strict=True)]
    humans = data.load_comparisons(args.humans, 0, "--humans") if args.humans else []
    figures = attribute(*found, humans)
    if args.json:
        say(json.dumps(figures, indent=1))
    else:
        say(_columns([HEADER, *(cells(id, figures[id]) for id in sorted(figures))]))
    return 0


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, the first column to the left; columns without a value are left out."""
    kept = [n for n in range(len(rows[0])) if any(row[n] for row in rows[1:])]
    widths = {n: max(len(row[n]) for row in rows) for n in kept}
    aligned = ((row[n].ljust(widths[n]) if n == 0 else row[n].rjust(widths[n]) for n in kept) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def _entry(e: dict) -> str:
    head = one_line(f"{e['entry']}  {e['hash'][:12]}  {e['time']}  {e['author']}: {e['reason']}")
    checked = f", {e['check']['right']} of {e['check']['cases']} cases right by {e['check']['judge']}" if e["check"] else ""
    about = f"   {e['name']} {e['version']}, fingerprint {e['fingerprint'][:12]}, {len(e['lint'])} warning(s){checked}"
    return "\n".join([head, about, *(f"   {shown(Change(**c))}" for c in e["changes"])])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("cai constitution", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, /, *words: str, **options) -> None:
        """Words: positional, those that end in "s" several; options: their default, ... for one that must be given."""
        p = commands.add_parser(name)
        p.set_defaults(run=run)
        for word in words:
            p.add_argument(word, nargs="+" if word == "files" else None)
        for option, default in options.items():
            if default is False:
                p.add_argument(f"--{option}", action="store_true")
            elif isinstance(default, list):
                p.add_argument(f"--{option}", action="append", default=default)
            elif isinstance(default, int):
                p.add_argument(f"--{option}", type=natural, default=default)
            else:
                p.add_argument(f"--{option}", required=default is ..., default=None if default is ... else default)

    command("lint", lint_command, "files", strict=False, json=False)
    command("diff", diff_command, "old", "new", json=False)
    command("import", import_command, "files", out=..., name="")
    command("export", export_command, "file", format=..., out=...)
    command("commit", commit_command, "file", reason=..., author="")
    command("log", log_command, "file", json=False)
    command("verify", verify_command, "file", workdir=[])
    judge = {"judge": ..., "format": "plain", "system": ""}
    command("check", check_command, "file", **judge, suite="", strict=False)
    command("attribute", attribute_command, workdir=..., humans="", json=False)
    command("ambiguity", ambiguity_command, "file", **judge, probes=..., paraphrases="", samples=0, limit=0, json=False)
    command("disputes", disputes_command, workdir=..., out=..., limit=0)
    command("distance", distance_command, "old", "new", **judge, probes=..., limit=0, out="")
    return top


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    return exit_code(args.run, args)
