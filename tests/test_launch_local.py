"""launch/restarts.sh and launch/local_processes.sh, with a small program for the command."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
# Notes its start, and does what PLAN has for its number: an exit code, "wait" for SIGTERM, or "deaf" to it.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
def stop(number, _):
    print("saved", flush=True)
    sys.exit(128 + number)
plan, me = json.loads(os.environ["PLAN"]), [a.split("=")[1] for a in sys.argv if a.startswith("--process=")]
me = me[0] if me else "0"
mine = plan.get(me, plan.get("*"))
signal.signal(signal.SIGTERM, signal.SIG_IGN if mine == "deaf" else stop)
signal.signal(signal.SIGINT, signal.SIG_IGN if mine == "deaf" else stop)
notes = Path(os.environ["NOTES"])
count = len(list(notes.glob(f"{me}-*")))
here = {"pid": os.getpid(), "argv": sys.argv[1:], "env": {k: os.environ.get(k) for k in ("JAX_PLATFORMS", "XLA_FLAGS")}}
print("started", flush=True)
(notes / f"new.{me}").write_text(json.dumps(here))
(notes / f"new.{me}").rename(notes / f"{me}-{count}")
if isinstance(mine, list):
    mine = mine[min(count, len(mine) - 1)]
if isinstance(mine, int):
    if mine:
        while len(list(notes.glob(f"*-{count}"))) < len(plan.get("all", [me])):
            time.sleep(0.01)
    sys.exit(mine)
time.sleep(60)
"""
# Runs a command that hears SIGINT, also where these tests run in the background of a shell that has made them deaf to it.
HEARING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"


@pytest.fixture
def start(tmp_path):
    """start(script, *words, plan, **env) -> a started process; none of what it started is left at the end of the test."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def start(script, *words, plan, **env):
        env = os.environ | {"NOTES": str(tmp_path / "notes"), "PLAN": json.dumps(plan), "PAUSE": "0", "GRACE": "20"} | env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", HEARING, "bash", str(LAUNCH / script), *words]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    until = time.monotonic() + 5  # what was killed may still be seen for a moment
    while (left := [note["pid"] for note in notes(tmp_path) if alive(note["pid"])]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def alive(pid):
    """Not so a process that has ended and whose end nobody has asked for."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc").exists()


def notes(folder, which="*"):
    return [json.loads(p.read_text()) for p in sorted((folder / "notes").glob(f"{which}-*"))]


def until(reached):
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ended(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


COMMAND = [sys.executable, "program.py"]


@pytest.mark.parametrize(
    "codes, restarts, starts, code",
    [
        ([0], 3, 1, 0),
        ([2], 3, 1, 2),
        ([143, 1, 0], 3, 3, 0),  # stopped by its machine, then a crash, then done
        ([134, 2], 3, 2, 2),
        ([7], 2, 3, 7),
        ([7], 0, 1, 7),
    ],
)
def test_restarts_after_what_can_go_on(start, tmp_path, codes, restarts, starts, code):
    got, out, err = ended(start("restarts.sh", str(restarts), *COMMAND, "a  b", "$x", plan={"*": codes}))
    assert got == code, err
    assert [n["argv"] for n in notes(tmp_path)] == [["a  b", "$x"]] * starts
    assert err.count("; restart ") == starts - 1 and out.count("started") == starts


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_restarts_passes_a_signal_on_and_ends(start, tmp_path, number, code):
    process = start("restarts.sh", "5", *COMMAND, plan={"*": "wait"})
    until(lambda: notes(tmp_path))
    process.send_signal(number)
    got, out, err = ended(process)
    assert got == code and "saved" in out and len(notes(tmp_path)) == 1
    assert "not started again" in err and "; restart" not in err


def test_restarts_can_be_stopped_between_two_starts(start, tmp_path):
    process = start("restarts.sh", "5", *COMMAND, plan={"*": 1}, PAUSE="60")
    assert "exit code 1; restart 1 of 5 in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    got, _, err = ended(process)
    assert got == 143 and len(notes(tmp_path)) == err.count("not started again") == 1


def test_restarts_pauses_a_little_longer_each_time(start, tmp_path):
    sleep = tmp_path / "bin" / "sleep"
    sleep.parent.mkdir()
    sleep.write_text('#!/bin/sh\necho "$1" >>slept\n')
    sleep.chmod(0o755)
    path = f"{sleep.parent}:{os.environ['PATH']}"
    assert ended(start("restarts.sh", "4", *COMMAND, plan={"*": 1}, PAUSE="", PATH=path))[0] == 1
    assert (tmp_path / "slept").read_text().split() == ["5", "10", "15", "15"]


@pytest.mark.parametrize("words", [[], ["3"], ["x", "true"], ["-1", "true"], ["3", "no-such-program"]])
def test_restarts_says_what_it_wants(start, words):
    got, _, err = ended(start("restarts.sh", *words, plan={}))
    assert got == 2 and ("wanted a number" in err or "no-such-program: no such command" in err)


def test_local_processes_get_their_arguments(start, tmp_path):
    words = ["3", "--devices=2", "--", *COMMAND, "a  b", "$x"]
    got, out, err = ended(start("local_processes.sh", *words, plan={"*": 0}, XLA_FLAGS="--before=1"))
    assert got == 0, err
    said = re.findall(r"(?:\[\d\] )?started", out)  # a line's end may come behind another's line
    assert sorted(said) == ["[1] started", "[2] started", "started"] and out.count("\n") == 3
    ports = set()
    for i, note in enumerate(notes(tmp_path)):
        assert note["argv"][:2] == ["a  b", "$x"] and note["argv"][3:] == ["--processes=3", f"--process={i}"]
        ports.add(re.fullmatch(r"--coordinator=127\.0\.0\.1:(\d+)", note["argv"][2])[1])
        flags = "--before=1 --xla_force_host_platform_device_count=2"
        assert note["env"] == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    assert len(ports) == 1 and len(notes(tmp_path)) == 3


def test_local_processes_without_devices_leave_the_environment_alone(start, tmp_path):
    here = {"XLA_FLAGS": "--mine", "JAX_PLATFORMS": "cuda"}
    assert ended(start("local_processes.sh", "1", "--", *COMMAND, plan={"*": 0}, **here))[0] == 0
    assert [n["env"] for n in notes(tmp_path)] == [{"JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--mine"}]


def test_local_processes_show_their_commands(start, tmp_path):
    words = ["2", "--devices=1", "--restarts=3", "--dry-run", "--", *COMMAND, "a  b"]
    got, out, _ = ended(start("local_processes.sh", *words, plan={"*": 0}, XLA_FLAGS=""))
    lines = [shlex.split(line) for line in out.splitlines()]
    assert got == 0 and not notes(tmp_path)
    for i, line in enumerate(lines):
        assert line[:3] == ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=1"]
        assert line[3:6] == [*COMMAND, "a  b"] and line[7:] == ["--processes=2", f"--process={i}"]
    assert len(lines) == 2


ALL = ["0", "1", "2"]  # a failure waits until so many have started


@pytest.mark.parametrize(
    "plan, code",
    [
        ({"1": 7, "*": "wait"}, 7),
        ({"0": 7, "*": "wait"}, 7),
        ({"2": 2, "*": "wait"}, 2),
        ({"1": 143, "*": "wait"}, 143),
        ({"1": 0, "2": 9, "0": "wait"}, 9),
    ],
)
def test_when_one_fails_the_others_are_stopped(start, tmp_path, plan, code):
    got, out, err = ended(start("local_processes.sh", "3", "--", *COMMAND, plan=plan | {"all": ALL}))
    assert got == code, err
    waiting = [i for i in ALL if plan.get(i, plan.get("*")) == "wait"]
    assert out.count("saved") == len(waiting) and len(notes(tmp_path)) == 3
    assert ("\nsaved" in f"\n{out}") == ("0" in waiting) and out.count("] saved") == len([i for i in waiting if i != "0"])


def test_a_failure_with_2_counts_before_one_that_came_first(start, tmp_path):
    slow = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(2)); open('up', 'w').close(); time.sleep(60)"
    (tmp_path / "slow.py").write_text(slow)
    script = 'if [[ "$*" == *--process=0 ]]; then exec "$P" slow.py; fi; until [[ -f up ]]; do sleep 0.05; done; exit 7'
    got, _, err = ended(start("local_processes.sh", "2", "--", "bash", "-c", script, "x", plan={}, P=sys.executable))
    assert got == 2 and "process 1 ended with exit code 7" in err


def test_what_does_not_end_in_time_is_killed(start, tmp_path):
    plan = {"1": 5, "*": "deaf", "all": ["0", "1"]}
    got, _, err = ended(start("local_processes.sh", "2", "--", *COMMAND, plan=plan, GRACE="1"))
    assert got == 5 and "is killed" in err


def test_nothing_is_left_of_what_they_started(start, tmp_path):
    plan = {"*": "deaf"}
    script = f"{shlex.join(COMMAND)} & until compgen -G 'notes/0-*' || [[ $SECONDS -gt 20 ]]; do sleep 0.05; done"
    assert ended(start("local_processes.sh", "1", "--", "bash", "-c", script, plan=plan, GRACE="1"))[0] == 0
    assert len(notes(tmp_path)) == 1  # and the fixture looks for it


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("more", [[], ["--restarts=3"]])
def test_a_signal_reaches_all_of_them(start, tmp_path, number, code, more):
    process = start("local_processes.sh", "2", *more, "--", *COMMAND, plan={"*": "wait"})
    until(lambda: len(notes(tmp_path)) == 2)
    process.send_signal(number)
    got, out, err = ended(process)
    assert got == code, err
    assert out.count("saved") == out.count("started") == 2 and "[1] saved" in out and len(notes(tmp_path)) == 2


@pytest.mark.parametrize("codes, restarts, rounds, code", [([7, 0], 3, 2, 0), ([7], 1, 2, 7), ([2], 3, 1, 2)])
def test_all_are_started_again_together(start, tmp_path, codes, restarts, rounds, code):
    plan = {"1": codes, "0": ["wait"] * (rounds - 1) + ([0] if code == 0 else ["wait"]), "all": ["0", "1"]}
    got, _, err = ended(start("local_processes.sh", "2", f"--restarts={restarts}", "--", *COMMAND, plan=plan))
    assert got == code, err
    assert len(notes(tmp_path, "0")) == len(notes(tmp_path, "1")) == rounds


@pytest.mark.parametrize(
    "words, hint",
    [
        ([], "N is ''"),
        (["0", "--", "true"], "N is '0'"),
        (["2", "--devices=x", "--", "true"], "--devices is 'x'"),
        (["2", "--restarts=-1", "--", "true"], "--restarts is '-1'"),
        (["2", "true"], "unknown argument 'true'"),
        (["2", "--"], "no command behind --"),
    ],
)
def test_local_processes_say_what_they_want(start, words, hint):
    got, _, err = ended(start("local_processes.sh", *words, plan={}))
    assert got == 2 and hint in err and "wanted: bash launch/local_processes.sh N" in err
