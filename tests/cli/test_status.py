"""tritale status: the state of runs, in text of 80 columns and as JSON."""

import json
import subprocess
import sys
import time

import pytest
from made_runs import made_run
from runs import REPOSITORY

from tritale.cli.main import main as tritale
from tritale.common.files import locked


def status(out_dir, capsys) -> tuple[dict, str]:
    capsys.readouterr()
    tritale(["status", str(out_dir), "--json"])
    as_json = json.loads(capsys.readouterr().out)
    tritale(["status", str(out_dir)])
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines()), text
    return as_json, text


def test_a_finished_run(tiny_run, capsys):
    found, text = status(tiny_run, capsys)
    assert (found["state"], found["step"], found["seconds_left"], found["end"]) == ("finished", 6, 0, "finished")
    assert found["checkpoint_step"] == 6 and len(found["losses"]) == 5 and found["val_bits_per_char"] > 1
    assert "[#########################] 100.0%, step 6 of 6" in text and "bad steps" not in text


def test_a_running_run_while_a_process_holds_its_lock(tmp_path, capsys):
    out_dir = made_run(tmp_path / "run", until=5000, end="killed", columns={"bad_steps": lambda step: step // 2500})
    with locked(out_dir, "x"):
        found, text = status(out_dir, capsys)
    assert (found["state"], found["bad_steps"], found["is_silent"]) == ("running", 2, False)
    assert found["seconds_left"] == pytest.approx(15_000 * 2) and "25.0%, step 5,000 of 20,000" in text
    assert "about 8.3 hours left" in text and f"running, process {found['pid']} on " in text
    assert "2.31 GiB at most; 24.0 GiB were free at the start" in text


def test_a_process_that_makes_no_steps(tmp_path, capsys):
    import os

    out_dir = made_run(tmp_path / "run", until=500, end="killed")
    old = time.time() - 7200
    os.utime(out_dir / "metrics.jsonl", (old, old))
    with locked(out_dir, "x"):
        found, text = status(out_dir, capsys)
        assert found["is_silent"] and "nothing was logged for 2.0 hours: it may hang" in text
        tritale(["doctor", str(out_dir)])
    assert capsys.readouterr().out.startswith("the process lives but makes no steps\n")


def test_killed_interrupted_and_failed_runs(tmp_path, capsys):
    ends = {
        "killed": ("stopped", "stopped (killed: it left no message)\n             run the same command again to resume"),
        KeyboardInterrupt(): ("stopped", "stopped (interrupted)"),
        "finished": ("stopped", "stopped (it ended before its last step)"),
        FloatingPointError("step 50: loss is nan; " + "lower the learning rate " * 30): ("failed", "failed: FloatingPointError: step 50"),
    }
    for i, (end, (state, words)) in enumerate(ends.items()):
        found, text = status(made_run(tmp_path / str(i), until=50, end=end), capsys)
        assert found["state"] == state and words in text


def test_a_run_that_has_logged_nothing_yet(tmp_path, capsys):
    out_dir = made_run(tmp_path / "run", until=1, end="killed", train__max_steps=11_444_091)
    with locked(out_dir, "x"):
        found, text = status(out_dir, capsys)
    assert found["losses"] == [] and found["seconds_left"] is None and "nothing logged yet" in text and "none yet" in text


@pytest.mark.parametrize("command", ["status", "report", "doctor"])
def test_a_folder_that_is_not_a_run_is_an_error(tmp_path, command):
    for folder, message in ((tmp_path, "has no metrics.jsonl and no run.json"), (tmp_path / "x", "is not a folder")):
        with pytest.raises(SystemExit, match=message):
            tritale([command, str(folder)])


def test_status_does_not_import_torch(tiny_run):
    code = "import sys; from tritale.cli.main import main; main(['status', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tiny_run)], cwd=REPOSITORY, capture_output=True).returncode == 0


def test_doctor_prints_json(tmp_path, capsys):
    out_dir = made_run(tmp_path / "run", train__compile="false")
    tritale(["doctor", str(out_dir), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "slow_compile" and found["remedy"] == "train.compile: true"
