"""wandb, SwanLab and TensorBoard get the metrics of a run, with the real packages and without a network; a missing one is an error."""

import json
import sys
from typing import Any

import pytest
from made_runs import made_run

from tritale.common.errors import UserError
from tritale.training.config import parse
from tritale.training.trackers import Trackers

FEW: dict[str, Any] = {"train__max_steps": 200, "log__every": 50, "train__validate_every": 100, "optim__warmup_steps": 10}


def scalars(folder, tag: str) -> dict[int, float]:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def logged(out_dir, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def test_tensorboard_shows_the_values_of_metrics_jsonl_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    made_run(tmp_path / "run", until=150, end="killed", **FEW, log__tensorboard="true")
    made_run(tmp_path / "run", start=100, seed=5, **FEW, log__tensorboard="true")
    for key in ("loss", "lr", "val_loss"):
        shown = scalars(tmp_path / "run" / "tensorboard", key)
        assert shown == pytest.approx(logged(tmp_path / "run", key), rel=1e-6)
    assert len(scalars(tmp_path / "run" / "tensorboard", "loss")) == 4


def test_swanlab_offline_keeps_the_values_in_the_run_folder(tmp_path):
    pytest.importorskip("swanlab")
    made_run(tmp_path / "run", **FEW, log__swanlab="offline")
    run_id = (tmp_path / "run" / "swanlab-run-id").read_text(encoding="utf-8")
    (folder,) = (tmp_path / "run" / "swanlab").glob(f"run-*-{run_id}")
    content = (folder / f"run-{run_id}.swanlab").read_bytes()
    assert all(key.encode() in content for key in ("loss", "lr", "val_bits_per_char", "tokens_per_second"))
    assert "optim.lr" in (folder / "files" / "config.yaml").read_text(encoding="utf-8")


def test_swanlab_without_a_login_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    pytest.importorskip("swanlab")
    for name in ("HOME", "SWANLAB_SAVE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="run `swanlab login`, or set --log"):
        made_run(tmp_path / "run", **FEW, log__swanlab="online")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log.wandb", "offline"], "log.wandb is offline, but wandb is not installed: pip install wandb"),
        (["--log.swanlab", "online"], "log.swanlab is online, but swanlab is not installed: pip install swanlab"),
        (["--log.tensorboard", "true"], "log.tensorboard is true, but tensorboard is not installed: pip install tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named_with_its_command(tmp_path, monkeypatch, options, message):
    for package in ("wandb", "swanlab", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        Trackers(parse(options), tmp_path, 0, print)
    assert str(error.value) == message


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path):
    class Failing:
        def log(self, values, step):
            raise RuntimeError("disk of the server is full")

        def close(self):
            raise AssertionError("it was left out")

    class Working:
        seen: list = []  # noqa: RUF012

        def log(self, values, step):
            self.seen.append((step, values))

        def close(self):
            self.seen.append("closed")

    warnings, trackers = [], Trackers(parse([]), tmp_path, 0, lambda text: warnings.append(text))
    trackers._trackers = [Failing(), Working()]
    for step in (1, 2):
        trackers.log({"step": step, "loss": 2.0}, step)
    trackers.close()
    assert Working.seen == [(1, {"loss": 2.0}), (2, {"loss": 2.0}), "closed"]
    assert warnings == ["Failing failed (disk of the server is full) and is left out from here on; metrics.jsonl has all values"]
