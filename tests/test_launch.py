"""The launch scripts for clusters, with stand-ins for the programs of Google Cloud, SLURM and Kubernetes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
STAND_IN = """#!PYTHON -SE
import json, os, shutil, subprocess, sys
from pathlib import Path
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "python3" and args[0] == "-c":
    os.execv(sys.executable, [sys.executable, *args])
log = Path(os.environ["LOG"])
before = log.read_text().splitlines() if log.exists() else []
with log.open("a") as f:
    f.write(json.dumps([name, *args]) + "\\n")
if args[:3] == ["-m", "uv", "venv"]:
    shutil.copytree(os.environ["VENV"], args[-1])
for words, *answers in json.loads(os.environ.get("ANSWERS", "[]")):  # the n-th call with these words gets the n-th answer
    if words in " ".join([name, *args]):
        seen = sum(words in " ".join(json.loads(line)) for line in before)
        code, out, err = answers[min(seen, len(answers) - 1)]
        print(out, end="")
        print(err, end="", file=sys.stderr)
        sys.exit(code)
if name == "sbatch":
    at = next(i for i, a in enumerate(args) if not a.startswith("-"))
    sys.exit(subprocess.call(["bash", *args[at:]]))
if name == "gcloud" and "WORKERS" in os.environ:
    homes = sorted(Path(os.environ["WORKERS"]).iterdir())
    flags = dict(a.split("=", 1) for a in args if a.startswith("--") and "=" in a)
    if args[3] == "scp":
        [shutil.copy(args[4], home / args[5].split(":")[1]) for home in homes]
    if args[3] == "ssh":
        homes = homes if flags["--worker"] == "all" else [homes[int(flags["--worker"])]]
        codes = [subprocess.call(["bash", "-c", flags["--command"]], cwd=h, env=os.environ | {"HOME": str(h)}) for h in homes]
        sys.exit(max(codes))
"""
CAI = """#!PYTHON -SE
import json, os, signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
with open("argv.json", "w") as f:
    json.dump([os.environ.get("VIRTUAL_ENV"), *sys.argv[1:]], f)
print("working", flush=True)
while os.path.exists("../busy"):
    time.sleep(0.02)
"""
ACTIVATE = 'export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"\n'
HARD = ["--config.mesh=(1,8,1)", "a  b", "$HOME", "it's", '"', "&", "\\&", "*", "x;y", "#", "", "ä\nö"]


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("PYTHON", sys.executable))
    path.chmod(0o755)


class Place:
    """A git checkout of the launch scripts, with stand-ins for what they call."""

    def __init__(self, folder, repository):
        self.folder, self.log = folder / "repository", folder / "log"
        shutil.copytree(repository, self.folder)
        for name in ("gcloud", "sbatch", "srun", "scontrol", "kubectl", "xpk", "cai", "python3", "ssh-agent", "ssh-add"):
            program(folder / "bin" / name, STAND_IN)
        venv = folder / "venv"
        program(venv / "bin" / "python", STAND_IN)
        program(venv / "bin" / "cai", CAI)
        (venv / "bin" / "activate").write_text(ACTIVATE)
        here = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV" and not k.startswith("SLURM")}
        self.env = here | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOG": str(self.log), "VENV": str(venv)}
        self.env |= {"POLL": "0", "PAUSE": "0"}

    def run(self, *words, answers=(), **env):
        """-> the finished process, and what was called."""
        self.log.unlink(missing_ok=True)
        env = self.env | {"ANSWERS": json.dumps(answers)} | env
        done = subprocess.run(words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return done, [json.loads(line) for line in calls]

    def tpu(self, *words, **more):
        return self.run("bash", "launch/tpu_vm.sh", *words, **more)


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("committed")
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "setup.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all of it")
    return folder


@pytest.fixture
def place(tmp_path, repository):
    return Place(tmp_path, repository)


def shown(done):
    return [shlex.split(line) for line in done.stdout.splitlines()]


NONE = [1, "", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'projects/p/nodes/pod' was not found"]
VM, QUEUE = ["gcloud", "compute", "tpus", "tpu-vm"], ["gcloud", "compute", "tpus", "queued-resources"]
CREATED = [
    ("--type=v5litepod-256", ["--accelerator-type=v5litepod-256", "--version=v2-alpha-tpuv5-lite"]),
    ("--type=v5p-8 --spot", ["--accelerator-type=v5p-8", "--version=v2-alpha-tpuv5", "--spot"]),
    ("--type=v6e-64", ["--accelerator-type=v6e-64", "--version=v2-alpha-tpuv6e"]),
    ("--type=v4-8", ["--accelerator-type=v4-8", "--version=tpu-ubuntu2204-base"]),
    ("--type=v9-8 --version=mine", ["--accelerator-type=v9-8", "--version=mine"]),
]


@pytest.mark.parametrize("given, wanted", CREATED)
def test_create_asks_for_a_tpu_vm(place, given, wanted):
    words = ["create", "pod", "--zone=z", *given.split(), "--project=p"]
    where = ["--zone=z", "--project=p"]
    done, calls = place.tpu(*words, answers=[["describe", NONE]])
    assert done.returncode == 0, done.stderr
    assert calls == [[*VM, "describe", "pod", *where, "--format=value(state)"], [*VM, "create", "pod", *where, *wanted]]
    dry, none = place.tpu(*words, "--dry-run")
    assert shown(dry) == calls and none == []


def test_create_waits_in_the_queue(place):
    words = ["create", "pod", "--zone=z", "--type=v5litepod-16", "--queued", "--spot"]
    states = [NONE, [0, "WAITING_FOR_RESOURCES\n", ""], [0, "ACTIVE\n", ""]]
    done, calls = place.tpu(*words, answers=[["describe", *states]])
    described = [*QUEUE, "describe", "pod", "--zone=z", "--format=value(state.state)"]
    asked = [*QUEUE, "create", "pod", "--node-id=pod", "--zone=z", "--accelerator-type=v5litepod-16"]
    asked += ["--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert done.returncode == 0 and calls == [described, asked, described, described]
    assert "pod is WAITING_FOR_RESOURCES" in done.stderr and "pod is ready" in done.stderr
    assert shown(place.tpu(*words, "--dry-run")[0]) == [described, asked, described]
    done, calls = place.tpu(*words, "--", "--network=lab", "--reserved", answers=[["describe", *states]])
    assert done.returncode == 0 and calls[1] == [*asked, "--network=lab", "--reserved"]
    done, calls = place.tpu(*words, answers=[["describe", [0, "SUSPENDED", ""]]])
    assert done.returncode == 1 and "'SUSPENDED'" in done.stderr and "delete pod --zone=z --queued" in done.stderr
    assert asked not in calls


def test_create_uses_what_is_ready_and_nothing_else(place):
    words = ["create", "pod", "--zone=z", "--type=v6e-8"]
    done, calls = place.tpu(*words, answers=[["describe", [0, "READY\n", ""]]])
    assert done.returncode == 0 and len(calls) == 1 and "is there already" in done.stderr
    for state, hint in (("PREEMPTED", "delete pod --zone=z"), ("CREATING", "try again")):
        done, calls = place.tpu(*words, answers=[["describe", [0, state, ""]]])
        assert done.returncode == 1 and len(calls) == 1 and state in done.stderr and hint in done.stderr
    done, calls = place.tpu(*words, answers=[["describe", [1, "", "ERROR: you are not logged in"]]])
    assert done.returncode == 1 and len(calls) == 1 and "you are not logged in" in done.stderr


@pytest.mark.parametrize(
    "message, code",
    [
        ("Quota limit 'TPUV5sPreemptible' has been exceeded. Limit: 0 in region us-east5.", 3),
        ("{'code': 8, 'status': 'RESOURCE_EXHAUSTED'}", 3),
        ('There is no more capacity in the zone "z"; you can try in another zone', 3),
        ("API requires a quota project, which is not set by default", 7),
    ],
)
def test_a_refusal_for_quota_says_what_to_change(place, message, code):
    answers = [["describe", NONE], [" create ", [7, "", message + "\n"]]]
    done, _ = place.tpu("create", "pod", "--zone=z", "--type=v5litepod-8", answers=answers)
    assert done.returncode == code and message in done.stderr
    assert ("--queued" in done.stderr and "v5litepod-8" in done.stderr and " z " in done.stderr) == (code == 3)
    assert "is ready" not in done.stderr


@pytest.mark.parametrize(
    "words, hint",
    [
        ("creat pod", "'creat'"),
        ("create --zone=z", "name"),
        ("create pod --type=v6e-8", "--zone"),
        ("create pod --zone=z", "--type"),
        ("create pod --zone=z --type=h100-8", "--version=RUNTIME"),
        ("run pod --zone=z", "behind --"),
        ("run pod --zone=z --restarts=x -- cai", "--restarts=x"),
        ("logs pod --zone=z --workers=all", "--workers=all"),
        ("logs pod --zone=z --worker=0,1", "--worker=0,1"),
        ("logs pod --zone=z --slices=0", "--slices=0"),
        ("logs pod --zone=z -- x", "nothing behind --"),
        ("run pod --zone=z cai run", "'cai'"),
        ("run pod --zone=z -- cai run --dry-run", "before --"),
        ("create pod --zone=z --type=v5e-8", "v5litepod-8"),
        ("fetch pod --zone=z", "workdir"),
    ],
)
def test_what_is_wrong_is_said(place, words, hint):
    done, calls = place.tpu(*words.split())
    assert done.returncode == 1 and hint in done.stderr and calls == []


def test_the_smaller_commands(place):
    def both(*words):
        done, calls = place.tpu(*words)
        assert done.returncode == 0, done.stderr
        dry, none = place.tpu(words[0], words[1], "--dry-run", *words[2:])
        assert shown(dry) == shown(done) and none == []
        return calls

    tail = "tail -n 100 -F cai_jax/run.log"
    assert both("logs", "pod", "--zone=z") == [[*VM, "ssh", "pod", "--zone=z", f"--command={tail}", "--worker=0"]]
    (every,) = both("logs", "pod", "--zone=z", "--worker=all")
    assert every[-1] == "--worker=all" and every[-2].startswith(f"--command={tail} | sed")
    copy = [*VM, "scp", "--recurse"]
    assert both("fetch", "pod", "--zone=z", "/mnt/a b") == [[*copy, "pod:/mnt/a b", "runs", "--zone=z", "--worker=0"]]
    assert both("fetch", "pod", "--zone=z", "runs/c", "x") == [[*copy, "pod:cai_jax/runs/c", "x", "--zone=z", "--worker=0"]]
    sync = ["gcloud", "storage", "rsync", "--recursive", "gs://b/runs/a", "runs/a"]
    assert both("fetch", "pod", "--zone=z", "gs://b/runs/a", "--project=p") == [[*sync, "--project=p"]]
    assert both("delete", "pod", "--zone=z") == [[*VM, "delete", "pod", "--zone=z"]]
    assert both("delete", "pod", "--zone=z", "--queued") == [[*QUEUE, "delete", "pod", "--zone=z", "--force"]]


def test_several_slices_are_a_request_of_the_queue_and_are_reached_one_by_one(place):
    pod = ["pod", "--zone=z", "--slices=2"]
    done, calls = place.tpu("create", *pod, "--type=v5p-8", answers=[["describe", NONE, [0, "ACTIVE", ""]]])
    asked = [*QUEUE, "create", "pod", "--node-count=2", "--zone=z", "--accelerator-type=v5p-8"]
    asked += ["--runtime-version=v2-alpha-tpuv5"]
    assert done.returncode == 0 and calls[1] == asked and "run pod --zone=z --slices=2 -- cai" in done.stderr

    done, calls = place.tpu("run", *pod, "--", "cai", "run", "a b")
    sent = [c for c in calls if c[0] == "gcloud"]
    assert done.returncode == 0 and [c[4] for c in sent] == ["ssh", "ssh", "scp", "scp", "ssh", "ssh", "ssh", "ssh"]
    for one, other in zip(sent[::2], sent[1::2], strict=True):  # the same for both, at the same time
        assert one[:4] == QUEUE and one[:-1] == other[:-1] and one[-2] == "--worker=all"
        assert {one[-1], other[-1]} == {"--node=0", "--node=1"}
    assert "logs pod --zone=z --slices=2" in done.stderr

    done, calls = place.tpu("run", *pod, "--", "cai", answers=[["--node=1", [4, "", ""]]])
    assert done.returncode == 4 and "a run is in progress" in done.stderr and len(calls) == 2
    done, calls = place.tpu("run", *pod, "--", "cai", answers=[["scp", [1, "", ""]]])
    assert done.returncode == 1 and [c[4] for c in calls if c[0] == "gcloud"] == ["ssh", "ssh", "scp", "scp"]

    (logs,), (fetched,) = place.tpu("logs", *pod)[1], place.tpu("fetch", *pod, "runs/c")[1]
    assert logs[:6] == [*QUEUE, "ssh", "pod"] and logs[-2:] == ["--worker=0", "--node=0"]
    assert fetched == [*QUEUE, "scp", "--recurse", "pod:cai_jax/runs/c", "runs", "--zone=z", "--worker=0", "--node=0"]
    assert {c[-1] for c in place.tpu("stop", *pod)[1]} == {"--node=0", "--node=1"}
    assert place.tpu("delete", *pod)[1] == [[*QUEUE, "delete", "pod", "--zone=z", "--force"]]


def until(reached):
    end = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(not shutil.which("flock"), reason="workers are Linux machines, with flock and setsid")
def test_a_run_on_two_workers_from_start_to_stop(place, tmp_path):
    homes = [tmp_path / "workers" / i for i in "01"]
    for home in homes:
        home.mkdir(parents=True)
        (home / "busy").touch()
    words = ["run", "pod", "--zone=z", "--restarts=3", "--", "cai", "run", *HARD]
    there = {"WORKERS": str(tmp_path / "workers")}
    (place.folder / "notes").touch()
    done, calls = place.tpu(*words, **there)
    try:
        assert done.returncode == 0, done.stderr
        assert "not committed" in done.stderr
        for home in homes:
            until(lambda home=home: "working" in (home / "cai_jax/run.log").read_text())
            seen = json.loads((home / "cai_jax/argv.json").read_text())
            assert seen == [str(home / "cai_jax/.venv"), "run", *HARD]  # every character, through two shells
            loop = int((home / "cai_jax/run.pid").read_text())
            assert os.getsid(loop) == loop  # so that it outlives the connection
            assert (home / "cai_jax/launch/restarts.sh").exists() and not (home / "cai_jax/notes").exists()
        assert ["python3", "-m", "uv", "venv", "--quiet", "--seed", "--python=3.12", ".venv"] in calls
        assert sum(c[:4] == ["python", "-m", "pip", "install"] and c[-1] == ".[tpu,gcs]" for c in calls) == 2
        dry, _ = place.tpu(*words[:3], "--dry-run", *words[3:], **there)
        ours = [c for c in calls if c[0] == "gcloud"]
        assert [c for c in shown(dry) if c[0] == "gcloud"] == ours and len(ours) == 4

        again, calls = place.tpu(*words, **there)  # a second run, while the first is there
        assert again.returncode == 4 and "a run is in progress on pod" in again.stderr and len(calls) == 1
        stopped, _ = place.tpu("stop", "pod", "--zone=z", **there)
        assert stopped.returncode == 0, stopped.stderr
    finally:
        for home in homes:
            (home / "busy").unlink()
    for home in homes:
        log = (home / "cai_jax/run.log").read_text()
        assert log.count("working") == 1 and "saved" in log and "exit code 143; not started again" in log
    stopped, _ = place.tpu("stop", "pod", "--zone=z", **there)
    assert stopped.stdout.count("no run is in progress") == 2

    (place.folder / "launch" / "venv.sh").rename(place.folder / "launch" / "other.sh")  # what is gone here goes there too
    git(place.folder, "commit", "-q", "-a", "-m", "less")
    assert place.tpu(*words, **there)[0].returncode != 0  # and without it nothing can be installed
    assert not (homes[0] / "cai_jax/launch/venv.sh").exists() and (homes[0] / "cai_jax/run.log").exists()


def test_ssh_runs_a_command_on_the_workers_it_is_told(place, tmp_path):
    for i in "012":
        (tmp_path / "workers" / i).mkdir(parents=True)
    words = ["ssh", "pod", "--zone=z", "--", "bash", "-c", 'echo "$0 $HOME" >here; exit 5', "a  b"]
    done, _ = place.tpu(*words, WORKERS=str(tmp_path / "workers"))
    assert done.returncode == 5
    assert [(tmp_path / "workers" / i / "here").read_text() for i in "012"] == [f"a  b {tmp_path}/workers/{i}\n" for i in "012"]
    done, calls = place.tpu(*words[:3], "--worker=1", *words[3:])
    assert "--worker=1" in calls[0]


STEP = ["srun", "--kill-on-bad-exit=0", "--wait=300", "--gpu-bind=none", "--cpus-per-task=8", "cai", "run"]
GIVEN = ["--config=c.py", "--workdir=/s/a b", "--config.mesh=(1,8,1)"]


def test_slurm_runs_one_step_and_shows_it(place):
    done, calls = place.run("bash", "launch/slurm.sbatch", *GIVEN, SLURM_JOB_ID="7")
    assert done.returncode == 0 and calls == [[*STEP, *GIVEN]]
    dry, none = place.run("bash", "launch/slurm.sbatch", "--dry-run", *GIVEN)
    assert shown(dry) == calls and none == []
    done, calls = place.run("bash", "launch/slurm.sbatch", SLURM_JOB_ID="7")
    assert done.returncode == 2 and calls == [] and "--workdir=DIR" in done.stderr
    asked = re.findall(r"^#SBATCH (.*)$", (ROOT / "launch/slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--signal=TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=8", "--gpus-per-node=8"} <= set(asked)
    assert not [a for a in asked if "gpus-per-task" in a or "gpu-bind" in a]  # JAX counts the GPUs of the node


@pytest.mark.parametrize(
    "code, before, again",
    [(0, 0, False), (2, 0, False), (143, 0, True), (134, 0, True), (1, 4, True), (143, 5, False), (1, 6, False)],
)
def test_slurm_goes_back_into_the_queue_unless_it_is_no_use(place, code, before, again):
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(before), "RESTARTS": "5", "SLURM_SUBMIT_DIR": str(place.folder)}
    done, calls = place.run("bash", "launch/slurm.sbatch", *GIVEN, answers=[["srun", [code, "", ""]]], **env)
    assert done.returncode == code
    assert calls[1:] == ([["scontrol", "requeue", "7"]] if again else [])


def test_gke_starts_all_pods_again_but_not_after_bad_input():
    text = (ROOT / "launch/gke.yaml").read_text()
    jobs = yaml.safe_load(text)
    assert (jobs["apiVersion"], jobs["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobs["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 20
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    (slices,) = jobs["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]}}
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    a, b = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == int(a) * int(b) // chips
    assert container["command"] == ["cai", "run"]
    config, workdir = container["args"]
    assert (ROOT / config.removeprefix("--config=")).is_file()
    (mount,) = container["volumeMounts"]
    assert workdir.startswith(f"--workdir={mount['mountPath']}/")
    assert [v["name"] for v in pod["volumes"]] == [mount["name"]]
    changes = [line.split(":")[0].strip(" -") for line in text.splitlines() if "CHANGE" in line and line.lstrip()[0] != "#"]
    labels = ["cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"]
    assert changes == ["parallelism", "completions", *labels, "image", "args", "google.com/tpu", "claimName"]
    spot = [line.replace("# ", "", 1) for line in text.splitlines() if "gke-spot" in line or "# tolerations" in line]
    assert len(spot) == 3  # as comments, which are YAML when they are none
    assert yaml.safe_load("\n".join(spot[1:]))["tolerations"][0]["key"] == "cloud.google.com/gke-spot"


def commands():
    """The commands of the README."""
    blocks = (ROOT / "launch/README.md").read_text().split("```")[1::2]
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_works(place, line):
    program(place.folder / ".venv" / "bin" / "pip", STAND_IN)
    answers = [["tpu-vm describe", NONE], ["queued-resources describe", NONE, [0, "ACTIVE", ""]], ["-m venv", [0, "", ""]]]
    done, calls = place.run("bash", "-c", line, answers=answers)
    assert done.returncode == 0, done.stderr
    assert calls, "it does nothing"
    for file in re.findall(r"(?:--config=|\s)((?:launch|configs)/[\w.]+)", line):
        assert (ROOT / file).is_file(), file


def test_the_readme_has_its_commands():
    text = "\n".join(commands())
    for word in ("create", "run", "logs", "stop", "fetch", "delete", "ssh"):
        assert re.search(rf"tpu_vm\.sh {word}\s", text), word
    for name in ("slurm.sbatch", "gke.yaml", "local_processes.sh", "restarts.sh"):
        assert f"launch/{name}" in text
    for script in (*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
