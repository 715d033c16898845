"""A run's folder in a bucket, where files appear whole and do not grow."""

import os
import threading

import bucket
import jax.numpy as jnp
import pytest

from cai_jax import checkpoints, files, workdir
from cai_jax.errors import InputError
from cai_jax.metrics import Metrics, load
from cai_jax.records import Journal, read, write


@pytest.fixture(scope="module")
def server():
    before, made = dict(os.environ), bucket.Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    os.environ |= bucket.environment(made.server_port)
    yield made
    os.environ.clear()
    os.environ.update(before)
    made.shutdown()
    made.server_close()


@pytest.fixture
def folder(server, request):
    return files.folder_of(f"gs://bucket/runs/{request.node.name}")


def inside(server, folder):
    """Names of the files of a folder."""
    start = str(folder).removeprefix("gs://bucket/") + "/"
    return sorted(name.removeprefix(start) for name in server.files if name.startswith(start))


def test_stages_begin_and_end_there(server, folder):
    assert workdir.begin("sft", folder, {"x": 1}) and workdir.begin("sft", folder, {"x": 2})  # nothing was done yet
    write(folder / "sft" / "lines.jsonl", [{"a": "é"}])
    assert read(folder / "sft" / "lines.jsonl") == [{"a": "é"}]
    with pytest.raises(InputError, match="x: 2 -> 3"):
        workdir.begin("sft", folder, {"x": 3})
    workdir.finish("sft", folder, {"n": 1}, ("lines.jsonl",), model="abc")
    assert not workdir.begin("sft", folder, {"x": 2})
    made = workdir.outputs("sft", folder)
    assert made == {"lines.jsonl": files.digest(folder / "sft" / "lines.jsonl"), "model": "abc"}
    with pytest.raises(InputError, match="missing file: gs://bucket/"):
        read(folder / "sft" / "none.jsonl")


def test_a_journal_is_a_file_for_each_addition(server, folder):
    journal = Journal(folder / "journal.jsonl")
    journal.add([{"key": "a", "result": "é"}, {"key": "b", "result": None}])
    journal.add([])
    journal.add([{"key": "c", "result": 3}])
    assert inside(server, folder) == ["journal.jsonl.000000000", "journal.jsonl.000000002"]
    again = Journal(folder / "journal.jsonl")
    assert again.done == journal.done and list(again.done) == ["a", "b", "c"]
    again.add([{"key": "d", "result": 4}])
    assert list(Journal(folder / "journal.jsonl").done) == ["a", "b", "c", "d"]
    again.remove()
    assert inside(server, folder) == [] and Journal(folder / "journal.jsonl").done == {}


def test_metrics_are_there_when_a_checkpoint_is(server, folder):
    log = Metrics(folder, 0)
    for step in range(3):
        log.add(step, {"loss": jnp.float32(step)})
    assert load(folder) == []
    log.save()
    assert [r["loss"] for r in load(folder)] == [0.0, 1.0, 2.0]
    again = Metrics(folder, 2)  # from the checkpoint of two steps
    assert [r["step"] for r in load(folder)] == [0, 1]
    again.add(2, {"loss": jnp.float32(7)})
    again.save()
    assert [r["loss"] for r in load(folder)] == [0.0, 1.0, 7.0]


def test_the_newest_whole_checkpoint_is_kept(server, folder):
    state = {"w": jnp.arange(10.0)}
    saver = checkpoints.Saver(folder / "checkpoints")
    saver.save(3, state)
    saver.save(6, {"w": state["w"] * 2})
    saver.close()
    assert checkpoints.steps(folder / "checkpoints") == [6]
    cut = str(folder / "checkpoints" / "9" / "state").removeprefix("gs://bucket/")
    server.files[cut] = (b"", 1)  # a write that a kill cut short: the file that says it is whole is not there
    assert checkpoints.steps(folder / "checkpoints") == [6]
    found = checkpoints.restore(folder / "checkpoints", {"w": jnp.zeros(10)})
    assert found["w"].tolist() == (state["w"] * 2).tolist()
    checkpoints.Saver(folder / "checkpoints")
    assert cut not in server.files


def test_a_bucket_that_cannot_be_is_refused(server, monkeypatch):
    with pytest.raises(InputError, match="wanted a folder, or gs://BUCKET/FOLDER"):
        files.folder_of("s3://bucket/runs")
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -e '.\[gcs\]'"):
        files.folder_of("gs://bucket/runs")


def test_a_bucket_that_may_not_be_written_says_what_to_do(server, monkeypatch):
    def refused(*_):
        raise OSError("Forbidden")

    place = files.folder_of("gs://bucket/runs/closed")
    monkeypatch.setattr(type(place), "write_bytes", refused)
    with pytest.raises(InputError, match="gs://bucket/runs/closed: cannot be written .Forbidden.; log in"):
        workdir.open_run(place)


def test_a_run_begins_without_a_right_to_the_bucket_itself(server, monkeypatch):
    """Which making a folder would ask for, in an empty bucket, with gcsfs as it is on a TPU VM."""

    def refused(*_, **__):
        raise FileNotFoundError("Bucket does not exist: bucket")

    place = files.folder_of("gs://bucket/runs/first")
    monkeypatch.setattr(type(place), "mkdir", refused)
    workdir.open_run(place)
    workdir.begin_run(place, {"seed": 0}, None)
    assert inside(server, place) == ["config.json", "manifest.json"]
