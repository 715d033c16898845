"""Several processes as one run: what they tell each other, how they disagree, and what happens when one goes."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import bucket
import kills
import pytest

from cai_jax import hosts, maintenance
from cai_jax.errors import InputError

ROOT = kills.ROOT
CONFIG = f"--config={ROOT}/configs/miniworld.py"
SHORT = (*kills.SMALL, "--config.stages=('critique','sft')", "--config.data.max_redteam=13", "--config.data.max_helpful=8")
SHORT += ("--config.sft.epochs=12",)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(commands, folders=None, devices=2, **environment):
    """A process for each command, with simulated devices (a number, or one for each)."""
    out = []
    for i, command in enumerate(commands):
        n = devices[i] if isinstance(devices, tuple) else devices
        flags = f"--xla_force_host_platform_device_count={n} --xla_backend_optimization_level=0"  # which compile faster
        own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        own |= {k: v[i] for k, v in environment.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        cwd = folders[i] if folders else ROOT
        out.append(subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=os.environ | own, **pipes))
    return out


def end(processes, timeout=120):
    """-> (exit code, standard output, standard error) of each."""
    try:
        texts = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def run_of(n, *arguments, each=lambda i: ()):
    """The commands of `cai run` by n processes."""
    port = free_port()
    several = [f"--coordinator=127.0.0.1:{port}", f"--processes={n}"]
    return [["-m", "cai_jax", "run", CONFIG, *several, f"--process={i}", *arguments, *each(i)] for i in range(n)]


@pytest.fixture
def metadata():
    """-> (the address of a metadata server, what it says and can be made to say)."""
    said = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            known = self.headers["Metadata-Flavor"] == "Google" and self.path == f"/computeMetadata/v1/instance/{name}"
            self.send_response(200 if known and name in said else 404)
            self.end_headers()
            self.wfile.write(said.get(name, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}", said
    server.shutdown()
    server.server_close()
    thread.join()


def test_two_processes_tell_and_hear(tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"key": "old", "result": 1}\n{"key": "cut')
    port = free_port()
    found = end(start([[ROOT / "tests" / "together.py", port, 2, i, tmp_path] for i in range(2)], devices=4))
    assert [code for code, *_ in found] == [0, 0], found
    a, b = (json.loads(out.splitlines()[-1]) for _, out, _ in found)  # behind what gloo says
    assert (a["first"], b["first"]) == (True, False) and a["count"] == b["count"] == 2
    assert b["name"] == f"process 1 of 2 ({socket.gethostname()})"
    for mine in (a, b):
        assert mine["told"] and mine["heard"] == [0, 1] and mine["once"] == ["by", 0] and mine["same"] == ""
        assert mine["refused"] == "only the first one sees this"
        assert mine["together"] == f"process 1 of 2 ({socket.gethostname()}): only the first one sees this"
        assert "process 1" in mine["agree"] and "rows.n: 0 -> 1" in mine["agree"] and "same" not in mine["agree"].split("\n")[1]
        assert mine["sum"] and mine["before"] == ["old"] and not mine["stop"]
    assert a["mine"] == [0, 4, 8, 12] and b["mine"] == [16, 20, 24, 28]  # each host puts its own rows
    lines = [json.loads(line)["key"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert lines == ["old", "new0"]  # one writer, and the line that a kill cut short is gone
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_one_process_is_the_simplest_case():
    assert hosts.first() and hosts.count() == 1 and hosts.told({"a": 1}) == {"a": 1} and hosts.heard(3) == [3]
    assert hosts.once(lambda x: x + 1, 2) == 3 and not hosts.asked_to_stop()
    assert hosts.check({"seed": 0}) == "1 process"


def test_sigterm_reaches_a_run_that_was_told_that_it_is_alone():
    """As SLURM or a TPU's metadata may say. JAX then hears the signal, and not one that came before it was asked to."""
    code = f"""
import os, signal, time
from cai_jax import hosts, workdir
workdir.stop_on_sigterm()
os.kill(os.getpid(), signal.SIGTERM)
hosts.join("127.0.0.1:{free_port()}", 1, 0)
workdir.hand_over()
while not workdir.stopping():
    time.sleep(0.05)
"""
    [(code, _, err)] = end(start([["-c", code]]), 30)
    assert code == 0, err


def test_a_process_that_hangs_ends_with_its_stack():
    code = f"""
import time
from cai_jax import hosts
hosts.join("127.0.0.1:{free_port()}", 1, 0)
hosts.patience = 1
hosts.asked_to_stop()
time.sleep(60)
"""
    [(code, _, err)] = end(start([["-c", code]]), 30)
    assert code not in (0, 2, 143) and "Timeout" in err and "line 7" in err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("", 2, 0), "missing: --coordinator"),
        (("host:1", 0, 0), "missing: --processes"),
        (("host:1", 2, -1), "missing: --process"),
        (("host", 2, 0), "wanted HOST:PORT"),
        (("host:1", 2, 2), "numbered from 0"),
    ],
)
def test_flags_that_cannot_be_are_refused(given, says):
    with pytest.raises(InputError, match=says):
        hosts.join(*given)


def test_a_host_that_never_joins_ends_the_others(tmp_path):
    code = f"from cai_jax import hosts; hosts.join('127.0.0.1:{free_port()}', 2, 0, 2)"
    [(code, _, err)] = end(start([["-c", code]]), 60)
    assert code == hosts.LOST_EXIT
    assert f"process 0 on {socket.gethostname()} waited 2 s" in err and "not all of the others came" in err


def test_other_configurations_code_or_devices_are_named(tmp_path):
    """Of three hosts, or of two with another number of devices."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "cai_jax", other / "cai_jax", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "cai_jax" / "losses.py", "a") as f:
        f.write("# a line more\n")
    workdir = f"--workdir={tmp_path}/run"
    three = run_of(3, workdir, each=lambda i: [f"--config.seed={i // 2}"])
    running = start(three, devices=1, PYTHONPATH=(str(ROOT), str(other), str(ROOT)), folders=[tmp_path] * 3)
    found = end(running + start(run_of(2, workdir), devices=(1, 2)))
    assert [code for code, *_ in found] == [2] * 5, found
    host = socket.gethostname()
    for *_, err in found[:3]:
        assert f"process 1 ({host}): code: " in err and f"process 2 ({host}): config.seed: 0 -> 1" in err
        assert "process 2 (" + host + "): code" not in err
    assert all("process 1 has 2 devices, process 0 has 1" in err for *_, err in found[3:])
    assert not (tmp_path / "run").exists()


def test_another_seed_and_a_workdir_that_not_all_see_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    seeds = start(run_of(2, f"--workdir={tmp_path}/run", each=lambda i: [f"--config.seed={i}"]))
    apart = start(run_of(2, "--workdir=run"), [tmp_path / "a", tmp_path / "b"])
    found = end(seeds + apart)
    assert [code for code, *_ in found] == [2] * 4, found
    assert all("process 1" in err and "config.seed: 0 -> 1" in err for *_, err in found[:2])
    assert all("is not seen by process 1 of 2" in err and "a folder that all hosts share" in err for *_, err in found[2:])


def wait_for(there, running, seconds=120):
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until and all(p.poll() is None for p in running), [p.communicate() for p in running]
        time.sleep(0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("hosts") / "whole"
    [(code, _, err)] = end(start([["-m", "cai_jax", "run", CONFIG, f"--workdir={workdir}", *SHORT]], devices=8))
    assert code == 0, err
    return workdir


def test_a_run_goes_on_with_another_number_of_processes(whole, tmp_path, metadata):
    """One of two machines announces its end, and one process ends the run."""
    (address, said), broken = metadata, tmp_path / "broken"
    two = start(run_of(2, f"--workdir={broken}", *SHORT), devices=4, GCE_METADATA_HOST=("127.0.0.1:1", address))
    wait_for((broken / "critique" / "journal.jsonl").exists, two)
    said["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    found = end(two)
    assert [code for code, *_ in found] == [143, 143], found
    assert "process 1 of 2" in found[1][2] and "this machine will end (maintenance-event" in found[1][2]
    assert "stopped on request" in found[0][2] and found[1][2].count("stopped on request") == 0  # the first one talks
    last = end(start([["-m", "cai_jax", "run", CONFIG, f"--workdir={broken}", *SHORT]], devices=8))
    assert last[0][0] == 0, last
    assert kills.differences(whole, broken, tolerance=kills.TOLERANCE) == []


def test_two_processes_in_a_bucket_of_which_one_is_killed_make_the_same_run(whole, tmp_path):
    server = bucket.Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = {name: (value, value) for name, value in bucket.environment(server.server_port).items()}
    two = start(run_of(2, "--workdir=gs://bucket/runs/a", *SHORT), devices=4, **there)
    wait_for(lambda: "runs/a/sft/checkpoints/2/commit_success.txt" in server.files, two)
    two[1].kill()
    found = end(two)
    assert found[0][0] not in (0, 2, 143), found  # it ends by itself, and a launcher starts it again
    again = ["-m", "cai_jax", "run", CONFIG, "--workdir=gs://bucket/runs/a", *SHORT]
    environment = os.environ | bucket.environment(server.server_port) | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = ["bash", ROOT / "launch" / "local_processes.sh", "2", "--devices=4", "--", sys.executable, *again]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    for name, (data, _) in server.files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    assert kills.differences(tmp_path / "runs" / "a", whole, tolerance=kills.TOLERANCE) == [".lock is only in one run"]


def test_a_machine_that_will_end_says_so(metadata, monkeypatch):
    (address, said), heard = metadata, []
    monkeypatch.setenv(maintenance.HOST, address)
    thread = maintenance.watch(heard.append, 0.01)
    time.sleep(0.1)
    assert heard == [] and thread.is_alive()
    said["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    thread.join(5)
    assert heard == ["maintenance-event: TERMINATE_ON_HOST_MAINTENANCE"]
    said |= {"maintenance-event": "NONE", "preempted": "TRUE"}
    maintenance.watch(heard.append, 0.01).join(5)
    assert heard[1:] == ["preempted: TRUE"]
    monkeypatch.setenv(maintenance.HOST, f"127.0.0.1:{free_port()}")
    none = maintenance.watch(heard.append, 0.01)  # as on a machine that is not Google's
    none.join(10)
    assert not none.is_alive() and len(heard) == 2
