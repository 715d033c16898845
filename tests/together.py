"""What each of several processes does in test_hosts.py: python together.py PORT N I FOLDER. Prints one line of JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from cai_jax import hosts, metrics, records
from cai_jax.errors import InputError
from cai_jax.sharding import make_mesh, put_batch, replicated


def refused(f, *args) -> str:
    try:
        f(*args)
    except InputError as e:
        return str(e)
    return ""


def fail():
    raise InputError("only the first one sees this")


def main(port: str, n: int, me: int, folder: Path) -> dict:
    hosts.join(f"127.0.0.1:{port}", n, me)
    found = {"first": hosts.first(), "count": hosts.count(), "name": hosts.name()}
    large = "é" * 70_000  # passes a block's least size, in bytes that are not characters
    found["told"] = hosts.told([me, large]) == [0, large]
    found["heard"] = [x["me"] for x in hosts.heard({"me": me, "text": large[: 10_000 * me]})]
    found["once"] = hosts.once(lambda: ["by", me])
    found["refused"] = refused(hosts.once, fail)
    found["together"] = refused(hosts.together, lambda: fail() if me else None)
    found["agree"] = refused(hosts.agree, "a table", {"same": 1, "rows": {"n": me}})
    found["same"] = refused(hosts.agree, "a table", {"same": (1, 2)})
    with jax.set_mesh(mesh := make_mesh((2, -1, 1))):
        x = np.arange(4 * 8 * 3, dtype=np.float32).reshape(4 * 8, 3)
        placed = put_batch({"x": x}, mesh)["x"]
        found["mine"] = sorted({s.index[0].start or 0 for s in placed.addressable_shards})
        total = jax.jit(lambda x: (x * 2).sum(axis=1), out_shardings=replicated(mesh))(placed)
        found["sum"] = bool(np.array_equal(np.asarray(total), (x * 2).sum(axis=1)))
    journal = records.Journal(folder / "journal.jsonl")
    found["before"] = sorted(journal.done)
    journal.add([{"key": f"new{me}", "result": me}])
    found["after"] = sorted(journal.done)
    log = metrics.Metrics(folder, 0)
    log.add(0, {"loss": jax.numpy.float32(1.5)})
    found["stop"] = hosts.asked_to_stop()
    hosts.told(None)
    return found


if __name__ == "__main__":
    port, n, me, folder = sys.argv[1:]
    print(json.dumps(main(port, int(n), int(me), Path(folder))))
