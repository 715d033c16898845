"""`cai constitution`: what needs no model, and so no JAX.

cai constitution lint   FILE ... [--strict] [--json]          errors, and warnings with how to mend them; 1: there are errors
cai constitution diff   OLD NEW [--json]                      what was added, removed, reworded, moved, re-weighted
cai constitution import FILE ... --out=NEW.toml [--name=...]  from a public format (see exchange.py)
cai constitution export FILE --format=llm-swarm --out=F.json  into one
cai constitution commit FILE --reason=... [--author=...]      into FILE.log.jsonl, each entry with the hash of the one before
cai constitution log    FILE [--json]                         who changed what, and why
cai constitution verify FILE [--workdir=runs/a]               whether the log is whole; 1: it is not
"""

import argparse
import getpass
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from cai_jax import files
from cai_jax.constitution import load, log
from cai_jax.constitution.diff import Change, diff, shown
from cai_jax.constitution.exchange import foreign, load_foreign, toml
from cai_jax.constitution.lint import lint
from cai_jax.errors import InputError
from cai_jax.prompts import TEMPLATES

UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def say(text: str) -> None:
    """A text on standard output; what would steer a terminal, or hide, is written out."""
    print(UNSEEN.sub(lambda m: ascii(m[0])[1:-1], text))


def lint_command(args) -> int:
    found = {path: lint(path, TEMPLATES) for path in args.files}
    errors, all_ = (sum(f.level == "error" or every for fs in found.values() for f in fs) for every in (False, True))
    if args.json:
        say(json.dumps([{"file": path} | asdict(f) for path, fs in found.items() for f in fs], indent=1))
    else:
        for path, f in ((path, f) for path, fs in found.items() for f in fs):
            line, where = f"{f.line}:" * (f.line > 0), f"{f.where}: " * (f.level == "warning")
            say(f"{path}:{line} {f.level} ({f.rule}): {where}{f.message}")
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
    read = [load_foreign(path) for path in args.files]
    principles = [p for _, found in read for p in found]
    if twice := {p.id for p in principles if [q.id for q in principles].count(p.id) > 1}:
        raise InputError(f"{', '.join(args.files)}: both have {sorted(twice)[0]!r}; import them apart")
    text = toml(args.name or Path(args.out).stem, principles)
    if Path(args.out).exists():
        raise InputError(f"--out={args.out}: the file is there already; give another name, or remove it")
    files.put(Path(args.out), text.encode("utf-8"))
    for (name, found), path in zip(read, args.files, strict=True):
        say(f"{path}: {name}, {len(found)} principles")
    say(f"{args.out}: what the format lacks was put in words of its own; look at it with: cai constitution lint {args.out}")
    return 0


def export_command(args) -> int:
    principles = list(load(args.file, templates=TEMPLATES).principles)
    files.put(Path(args.out), foreign(principles, args.format).encode("utf-8", "replace"))
    say(f"{args.out}: {len(principles)} principles as {args.format}")
    return 0


def commit_command(args) -> int:
    entry = log.commit(args.file, args.author, args.reason, datetime.now(UTC).isoformat(timespec="seconds"), TEMPLATES)
    say(_entry(entry))
    return 0


def log_command(args) -> int:
    entries = log.read(args.file)
    if args.json:
        say(json.dumps(entries, indent=1))
    else:
        say("\n".join(map(_entry, entries)) if entries else f"{log.place(args.file)}: no entry yet")
    if entries and log.entry_of(args.file, TEMPLATES) is None:
        print(
            f"{args.file} has changes that are in no entry: cai constitution commit {args.file} --reason=...", file=sys.stderr
        )
    return 0


def verify_command(args) -> int:
    known = []
    for workdir in args.workdir:
        kept = files.read_json(Path(workdir) / "manifest.json").get("constitution_entry")
        known += [(kept["entry"], kept["hash"])] if kept else []
    entries, broken = log.read(args.file), log.verify(args.file, known)
    for line in broken:
        say(f"{log.place(args.file)}: {line}")
    if not broken:
        end = f", the last {entries[-1]['hash']}" if entries else ""
        say(f"{log.place(args.file)}: whole, {len(entries)} entries{end}")
    return int(bool(broken))


def _entry(e: dict) -> str:
    head = f"{e['entry']}  {e['hash'][:12]}  {e['time']}  {e['author']}: {e['reason']}"
    about = f"   {e['name']} {e['version']}, fingerprint {e['fingerprint'][:12]}, {len(e['lint'])} warning(s)"
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
            else:
                p.add_argument(f"--{option}", required=default is ..., default=None if default is ... else default)

    command("lint", lint_command, "files", strict=False, json=False)
    command("diff", diff_command, "old", "new", json=False)
    command("import", import_command, "files", out=..., name="")
    command("export", export_command, "file", format=..., out=...)
    command("commit", commit_command, "file", reason=..., author=getpass.getuser())
    command("log", log_command, "file", json=False)
    command("verify", verify_command, "file", workdir=[])
    return top


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(UNSEEN.sub(lambda m: ascii(m[0])[1:-1], f"error: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads has seen enough
        return 0
