"""Numbers over time: metrics.jsonl holds what the computation determines, timing.jsonl what the clock says.

The two are apart so that a resumed run ends with the same metrics.jsonl, byte for byte.
"""

import json
import math
import time
from pathlib import Path

import jax

from cai_jax.records import dumps, read
from cai_jax.workdir import write_text


class NotFinite(RuntimeError):
    """A loss or gradient became NaN or infinite; the last good checkpoint is kept."""


class Metrics:
    """Appends {"step": t, name: value, ...}. After a resume at step `start`, later lines of the earlier attempt go."""

    def __init__(self, folder: Path, start: int):
        self.path = folder / "metrics.jsonl"
        self.clock = folder / "timing.jsonl"
        kept = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            kept = [line for line in lines if json.loads(line)["step"] < start]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self.last = time.monotonic()

    def add(self, step: int, values: dict, sizes: dict | None = None) -> dict:
        """Logs device scalars as Python floats. Raises NotFinite, after logging, if any is not finite."""
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        now = time.monotonic()
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(dumps({"step": step, **{k: v if math.isfinite(v) else repr(v) for k, v in values.items()}}))
        with open(self.clock, "a", encoding="utf-8") as f:
            f.write(dumps({"step": step, "seconds": round(now - self.last, 4), **(sizes or {})}))
        self.last = now
        if bad := [k for k, v in values.items() if not math.isfinite(v)]:
            raise NotFinite(
                f"{', '.join(bad)} is {values[bad[0]]} at step {step} of {self.path.parent}: stopped before it was saved; the "
                "last good checkpoint is kept. A lower learning_rate or clip_norm, or another seed, are the usual changes"
            )
        return values


def load(folder: Path) -> list[dict]:
    """The metrics of a stage, [] when it logged none."""
    path = folder / "metrics.jsonl"
    return read(path, ("step",)) if path.exists() else []
