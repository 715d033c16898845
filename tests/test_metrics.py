"""What a run logs, what a resume takes back, and how a run that went wrong ends."""

import json

import jax.numpy as jnp
import pytest

from cai_jax.metrics import Metrics, NotFinite, load


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_floats_by_step_and_the_clock_is_apart(tmp_path):
    log = Metrics(tmp_path, 0)
    assert log.add(0, {"loss": jnp.float32(0.73), "tokens": jnp.int32(5)}) == {"loss": pytest.approx(0.73), "tokens": 5.0}
    log.add(1, {"loss": 0.5}, {"rollout": 1.25})
    assert logged(tmp_path) == [{"step": 0, "loss": float(jnp.float32(0.73)), "tokens": 5.0}, {"step": 1, "loss": 0.5}]
    assert load(tmp_path) == logged(tmp_path)
    clock = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [c["step"] for c in clock] == [0, 1] and clock[1]["rollout"] == 1.25 and clock[0]["seconds"] >= 0


def test_a_stage_that_logged_nothing_has_no_metrics(tmp_path):
    assert load(tmp_path) == []


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path):
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    log = Metrics(tmp_path / "whole", 0)
    for t in range(6):
        log.add(t, {"loss": 1 / (t + 1)})
    log = Metrics(tmp_path / "resumed", 0)
    for t in range(5):
        log.add(t, {"loss": 1 / (t + 1)})
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # killed in the middle of a line, with a checkpoint of step 3
    log = Metrics(tmp_path / "resumed", 3)
    assert [r["step"] for r in logged(tmp_path / "resumed")] == [0, 1, 2]
    for t in range(3, 6):
        log.add(t, {"loss": 1 / (t + 1)})
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("bad, shown", [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, bad, shown):
    folder = tmp_path / "sft"
    folder.mkdir()
    log = Metrics(folder, 0)
    log.add(6, {"loss": 1.0})
    with pytest.raises(NotFinite) as e:
        log.add(7, {"entropy": 2.0, "loss": jnp.float32(bad), "gradient_norm": jnp.float32(bad)})
    message = str(e.value)
    assert f"gradient_norm, loss is {shown} at step 7" in message and "entropy" not in message
    assert str(folder) in message and "learning_rate" in message
    assert logged(folder)[-1] == {"step": 7, "entropy": 2.0, "loss": shown, "gradient_norm": shown}  # still JSON
    assert [r["step"] for r in load(folder)] == [6, 7]
    Metrics(folder, 7)  # a resume behind the last good step takes the bad line back
    assert [r["step"] for r in load(folder)] == [6]
