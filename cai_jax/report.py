"""`cai report`: the figures of the CAI paper, and more, from the files of finished runs.

cai report --run=runs/a [--run=runs/b ...] --out=DIR

A run is a folder that `cai run` wrote, or one with several such, as a study's. Runs that differ in the seed alone are one line,
with intervals over the seeds. DIR gets every figure that the files allow, as PNG and as SVG, and a page with all of them, their
captions and tables: index.html. The same runs give the same bytes. Loads no model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cai_jax import canvas, gallery, markup
from cai_jax.errors import InputError
from cai_jax.files import put
from cai_jax.gallery import runs, tables
from cai_jax.markup import tag
from cai_jax.terminal import exit_code, say


def page(
    groups: Sequence[runs.Group], drawn: Sequence[tuple[gallery.Picture, bytes]], found: Sequence[tables.Table]
) -> markup.Html:
    """drawn: pictures with their PNGs."""
    of = [(g.name or "Run", ", ".join(f"{run.folder.name} (seed {run.cfg.seed})" for run in g.runs)) for g in groups]
    note = "Each figure lies beside this page, as PNG and as SVG. A caption ends with how it differs from what it follows."
    sections = [(p.key, p.title, markup.picture(data, round(100 * p.figure.get_figwidth()), p.caption)) for p, data in drawn]
    for n, t in enumerate(found, 1):
        sections.append((f"table-{n}", t.title, [markup.table(t.header, t.rows), tag("p", t.caption, class_="note")]))
    return markup.document("Constitutional AI: figures", [tag("p", note, class_="note"), markup.facts(of)], sections, None)


def run(args) -> int:
    """Writes the folder; raises InputError where nothing can be drawn. -> the exit code."""
    groups = runs.find(args.run)
    pictures, found = gallery.pictures(groups), tables.tables(groups)
    if not pictures:
        raise InputError(f"--run={','.join(args.run)}: there is nothing to draw; wanted runs that came to the stage evaluate")
    out, drawn = Path(args.out), [(p, canvas.png(p.figure)) for p in pictures]
    for p, data in drawn:
        put(out / f"{p.key}.png", data)
        put(out / f"{p.key}.svg", canvas.svg(p.figure))
    put(out / "index.html", page(groups, drawn, found).encode("utf-8"))
    for p in pictures:
        say(f"{out / p.key}.png, .svg: {p.title}")
    say(f"{out / 'index.html'}: {len(pictures)} figures and {len(found)} tables of {sum(len(g.runs) for g in groups)} run(s)")
    return 0


def main(argv: Sequence[str]) -> int:
    """-> the exit code."""
    p = argparse.ArgumentParser("cai report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", action="append", required=True)
    p.add_argument("--out", required=True)
    return exit_code(run, p.parse_args(argv))
