"""What a person sees while a run works: one bar per piece of work, plain lines when nobody watches, tables at the end."""

import os
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from cai_jax import hosts

QUIET_SECONDS = 10  # between two lines of one piece of work, without a terminal
ANNOUNCED = 0.05  # seconds of lowering from which a program is worth a line

_width = None if sys.stderr.isatty() else int(os.environ.get("COLUMNS", "120"))
console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False, width=_width)
compiled: Counter[str] = Counter()  # programs by function, of this process
compile_seconds = 0.0


class Progress:
    """with Progress("sft", 100) as p: p.update(done, {"loss": 1.2}). Shows the rate and the time that is left."""

    def __init__(self, name: str, total: int, start: int = 0, unit: str = "record"):
        self.name, self.total, self.start, self.unit = name, total, start, unit
        self.began = self.shown = time.monotonic()
        self.bars = None

    def __enter__(self):
        if sys.stderr.isatty() and self.total and hosts.first():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bars = Bars(*columns, TextColumn("{task.fields[note]}", markup=False), console=console, transient=True)
            self.bars.start()
            self.task = self.bars.add_task(self.name, total=self.total, completed=self.start, note="")
        return self

    def update(self, done: int, values: dict | None = None) -> None:
        now = time.monotonic()
        rate = (done - self.start) / max(now - self.began, 1e-9)
        note = f"{rate:.1f} {self.unit}/s  " + "  ".join(f"{k} {v:.4g}" for k, v in list((values or {}).items())[:4])
        if self.bars:
            self.bars.update(self.task, completed=done, note=note)
        elif done == self.total or now - self.shown >= QUIET_SECONDS:
            left = (self.total - done) / rate if rate else float("nan")
            say(f"{self.name}: {done}/{self.total}  {left:.0f} s left  {note}")
            self.shown = now

    def __exit__(self, *_):
        if self.bars:
            self.bars.stop()


def say(text: str) -> None:
    """One line to the person at the terminal; of several processes the first speaks."""
    if hosts.first():
        console.print(text)


def cry(text: str) -> None:
    """A line from whichever process has something to say."""
    console.print(f"{hosts.name()}: {text}" if hosts.count() > 1 else text)


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table at the end of something."""
    t = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        t.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        t.add_row(*row)
    if hosts.first():
        console.print(t)


def watch_compiles() -> None:
    """From now on compiling is announced, and programs and their seconds are counted in `compiled`, `compile_seconds`."""
    from jax import monitoring

    def on(event: str, seconds: float, **about) -> None:
        global compile_seconds
        name = str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event.endswith("jaxpr_to_mlir_module_duration") and seconds >= ANNOUNCED:
            compiled[name] += 1
            say(f"compiling {name} (program {compiled[name]} of it)")
        elif event.endswith("backend_compile_duration"):
            compile_seconds += seconds

    monitoring.register_event_duration_secs_listener(on)
