"""Numbers over time: metrics.jsonl holds what the computation determines, timing.jsonl what the clock says.

The two are apart so that a resumed run ends with the same metrics.jsonl, byte for byte.
"""

import json
import math
import time
from pathlib import Path

import jax

from cai_jax import hosts
from cai_jax.files import in_bucket
from cai_jax.records import dumps, read
from cai_jax.workdir import write_text

SECONDS = 30  # between two versions of a file in a bucket


class NotFinite(RuntimeError):
    """A loss or gradient became NaN or infinite; the last good checkpoint is kept."""


class Metrics:
    """Appends {"step": t, name: value, ...}. After a resume at step `start`, later lines of the earlier attempt go."""

    def __init__(self, folder: Path, start: int):
        self.path = folder / "metrics.jsonl"
        self.clock = folder / "timing.jsonl"
        self.whole = {self.path: [], self.clock: []}  # all lines of files in a bucket, which do not grow
        hosts.once(self._keep, start)
        self.last = self.saved = time.monotonic()

    def _keep(self, start: int) -> None:
        kept = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] < start]
        if kept or not in_bucket(self.path):
            write_text(self.path, "".join(kept))
        if in_bucket(self.path):
            self.whole[self.path] = kept
            self.whole[self.clock] = self.clock.read_text(encoding="utf-8").splitlines(True) if self.clock.exists() else []

    def add(self, step: int, values: dict, sizes: dict | None = None) -> dict:
        """Logs device scalars as Python floats. Raises NotFinite, after logging, if any is not finite."""
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        now = time.monotonic()
        written = {k: v if math.isfinite(v) else repr(v) for k, v in values.items()}
        self._write(self.path, {"step": step, **written})
        self._write(self.clock, {"step": step, "seconds": round(now - self.last, 4), **(sizes or {})})
        self.last = now
        if bad := [k for k, v in values.items() if not math.isfinite(v)]:
            self.save()
            raise NotFinite(
                f"{', '.join(bad)} is {values[bad[0]]} at step {step} of {self.path.parent}: stopped before it was saved; the "
                "last good checkpoint is kept. A lower learning_rate or clip_norm, or another seed, are the usual changes"
            )
        return values

    def save(self) -> None:
        """What a checkpoint relies on is in the files when this returns."""
        if in_bucket(self.path):
            for path, lines in self.whole.items():
                write_text(path, "".join(lines))
            self.saved = time.monotonic()

    def _write(self, path: Path, line: dict) -> None:
        if in_bucket(path):
            self.whole[path].append(dumps(line))
            if time.monotonic() - self.saved > SECONDS:
                self.save()
        elif hosts.first():
            with open(path, "a", encoding="utf-8") as f:
                f.write(dumps(line))


def load(folder: Path) -> list[dict]:
    """The metrics of a stage, [] when it logged none."""
    path = folder / "metrics.jsonl"
    return read(path, ("step",)) if path.exists() else []
