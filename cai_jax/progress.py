"""What a person sees while a run works: one bar per stage with rate and remaining time; plain lines when nobody watches."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


class Progress:
    """with Progress("sft", 100) as p: p.update(done, {"loss": 1.2}). Without a terminal: about ten lines in all."""

    def __init__(self, name: str, total: int, start: int = 0, unit: str = "record"):
        self.name, self.total, self.start, self.unit = name, total, start, unit
        self.began, self.shown, self.bars = time.monotonic(), start, None

    def __enter__(self):
        if sys.stderr.isatty() and self.total:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bars = Bars(*columns, TextColumn("{task.fields[note]}", markup=False), console=console, transient=True)
            self.bars.start()
            self.task = self.bars.add_task(self.name, total=self.total, completed=self.start, note="")
        return self

    def update(self, done: int, values: dict | None = None) -> None:
        elapsed = max(time.monotonic() - self.began, 1e-9)
        rate = (done - self.start) / elapsed
        note = f"{rate:.1f} {self.unit}/s  " + "  ".join(f"{k} {v:.4g}" for k, v in list((values or {}).items())[:4])
        if self.bars:
            self.bars.update(self.task, completed=done, note=note)
        elif done == self.total or done - self.shown >= max(self.total // 10, 1):
            left = (self.total - done) / rate if rate else float("nan")
            console.print(f"{self.name}: {done}/{self.total}  {left:.0f} s left  {note}")
            self.shown = done

    def __exit__(self, *_):
        if self.bars:
            self.bars.stop()


def say(text: str) -> None:
    """One line to the person at the terminal."""
    console.print(text)


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table at the end of something."""
    t = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        t.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        t.add_row(*row)
    console.print(t)
