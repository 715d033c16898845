"""Several processes as one: how they find each other, that they agree, and what the first of them does alone.

All of them run the same host code on the same records, so their jitted calls are the same, in number and in order, and what
decides lies whole on every device. Weights, batches and checkpoints are read and written in shares; records, metrics and
reports are written by the first process, which is also the one that talks to the person. A single process is the case of one.
"""

import faulthandler
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import count as numbers
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.errors import InputError, difference

JOIN_SECONDS = 60  # that a host has to come
HEARTBEAT_SECONDS = 60  # without a sign of life after which a process counts as dead
SAME_SECONDS = 3  # that the others have to see what the first one has seen
LEAVE_SECONDS = 30  # that the others have to end when one has
LOST_EXIT = 75  # exit code where another process did not come, or is gone: the same command goes on
BLOCK = 1 << 26  # bytes that are sent at once

patience = 3600  # seconds between two safe points, 0: any; compiling and reading a large model lie between some
_safe_points = numbers()


def join(coordinator: str, processes: int, process: int, seconds: int = JOIN_SECONDS) -> None:
    """Makes this process one of several: as the arguments say, or, without them, as SLURM or a TPU's metadata do, where one of
    them started it. Must come before anything touches a device. Raises InputError for arguments that cannot be; where the
    others have not come after `seconds`, the process ends."""
    given = {"--coordinator": bool(coordinator), "--processes": processes > 0, "--process": process >= 0}
    if any(given.values()) and not all(given.values()):
        missing = ", ".join(flag for flag, there in given.items() if not there)
        raise InputError(f"several processes want --coordinator=HOST:PORT, --processes=N and --process=I; missing: {missing}")
    if coordinator and not (coordinator.rpartition(":")[0] and coordinator.rpartition(":")[2].isdigit()):
        raise InputError(f"--coordinator={coordinator}: wanted HOST:PORT of the first process")
    if coordinator and process >= processes:
        raise InputError(f"--process={process} of --processes={processes}: they are numbered from 0")
    times = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": LEAVE_SECONDS}
    times["initialization_timeout"] = 2 * seconds  # after which JAX would abort with a stack of C++
    late = threading.Timer(seconds, _give_up, (coordinator, process, seconds))
    late.start()
    try:
        jax.distributed.initialize(*((coordinator, processes, process) if coordinator else ()), **times)
    except ValueError as e:
        if coordinator or "coordinator_address" not in str(e):
            raise InputError(f"jax.distributed.initialize: {e}") from e  # otherwise nobody started several
    finally:
        late.cancel()


def _give_up(coordinator: str, process: int, seconds: int) -> None:
    which, where = (f"process {process}", coordinator) if coordinator else ("a process", "the first one's host")
    print(
        f"error: {which} on {socket.gethostname()} waited {seconds} s at {where}, and not all of the others came. Look for the "
        "host that does not say this: each must run the same command and reach the first one through the network",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST_EXIT)


def count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes records and talks."""
    return count() == 1 or jax.process_index() == 0


def name() -> str:
    if count() == 1:
        return "this process"
    return f"process {jax.process_index()} of {count()} ({socket.gethostname()})"


def leave(code: int) -> None:
    """The end of this process. One that fails does not wait for the others, who would wait for it. The first one, with which
    all others end, gives them a moment to find what it has found."""
    if code and count() > 1:
        time.sleep(SAME_SECONDS if first() else 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def told(value):
    """The JSON value that the first process has, on all of them."""
    if count() == 1:
        return value
    data = json.dumps(value).encode() if first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    got = bytearray()
    for at in range(0, size, BLOCK):
        block = np.zeros(_padded(min(BLOCK, size - at)), np.uint8)
        mine = np.frombuffer(data[at : at + BLOCK], np.uint8)
        block[: len(mine)] = mine
        got += multihost_utils.broadcast_one_to_all(block).tobytes()[: size - at]
    return json.loads(bytes(got))


def heard(value) -> list:
    """The JSON values that all processes have, in their order, on all of them."""
    if count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    row = np.zeros(_padded(int(max(sizes))), np.uint8)
    row[: len(data)] = data
    return [json.loads(r.tobytes()[:n]) for r, n in zip(multihost_utils.process_allgather(row), sizes, strict=True)]


def _padded(size: int) -> int:
    """So that few sizes are compiled."""
    return max(4096, 1 << (size - 1).bit_length())


def once(f: Callable, *args):
    """f(*args) by the first process. -> its JSON value on all; what it raises is raised on all. They go on when it is done."""
    if count() == 1:
        return f(*args)
    raised, answer = None, None
    if first():
        try:
            answer = {"value": f(*args)}
        except Exception as e:
            raised, answer = e, {"error": str(e), "theirs": isinstance(e, InputError)}
    answer = told(answer)
    if raised is not None:
        raise raised
    if "error" in answer:
        raise (InputError if answer["theirs"] else RuntimeError)(answer["error"])
    return answer["value"]


def together(f: Callable, *args):
    """f(*args) by every process. -> its own value. What one of them refuses, all refuse, with the name of its host."""
    if count() == 1:
        return f(*args)
    value, fault = None, ""
    try:
        value = f(*args)
    except ValueError as e:  # InputError and what is like it
        fault = str(e)
    if faults := [f"{at}: {fault}" for at, fault in heard((name(), fault)) if fault]:
        raise InputError("\n".join(faults))
    return value


def agree(what: str, value: dict) -> None:
    """Raises InputError that names every host whose `value` differs from the first one's, and how."""
    of = heard({"host": socket.gethostname(), "value": value})
    changed = {f"process {i} ({x['host']})": difference(of[0]["value"], x["value"]) for i, x in enumerate(of)}
    if lines := [f"  {at}: {line}" for at, found in changed.items() for line in found]:
        raise InputError(
            f"{what}: not the same on all hosts (process 0 on {of[0]['host']} -> theirs):\n"
            + "\n".join(lines)
            + "\nstart all of them with the same command, code and data"
        )


def check(about: dict) -> str:
    """The start of a run. -> who runs it, in a line. Raises InputError that names the hosts whose code, devices or `about` are
    not those of the first."""
    if count() == 1:
        return "1 process"
    devices = Counter(d.process_index for d in jax.devices())
    if odd := [i for i, n in devices.items() if n != devices[0]]:
        raise InputError(f"process {odd[0]} has {devices[odd[0]]} devices, process 0 has {devices[0]}: all must have as many")
    kind = jax.local_devices()[0].device_kind
    agree("start", about | {"code": code(), "device": kind})
    return f"{count()} processes on {len(set(heard(socket.gethostname())))} host(s), {devices[0]} {kind} device(s) each"


def code() -> str:
    """What identifies the code of this package."""
    sha = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        sha.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return sha.hexdigest()[:16]


def asked_to_stop() -> bool:
    """Whether all processes are to stop here, because one of them got SIGTERM. All must ask equally often, and within
    `patience` seconds of the last time: one that hangs ends, with the stacks of its threads, or all would wait for it."""
    if not jax.distributed.is_initialized():
        return False
    if patience:
        faulthandler.dump_traceback_later(patience, exit=True)
    return multihost_utils.reached_preemption_sync_point(next(_safe_points))
