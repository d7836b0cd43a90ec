"""Runs of days: signals, saves in the background, a full disk, bad steps, the EMA, `tritale verify`."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from runs import REPOSITORY, command, losses, metrics, run_here, train
from safetensors.torch import load_file

from tests.disturbed import disturbed
from tritale.cli.main import main as tritale
from tritale.common.run_folder import step_folder, step_folders
from tritale.data.batches import Batches
from tritale.inference import LLM
from tritale.model import checkpoint
from tritale.training import state
from tritale.training.health import Health
from tritale.training.step import TrainingStep

unix = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")


def weights(out_dir, step, name="model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(out_dir / f"step-{step:08d}" / name)


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copy")


# ---- signals -------------------------------------------------------------------------------------------------------------------------


@unix
@pytest.mark.parametrize("sent, processes", [("SIGKILL", 1), ("SIGTERM", 1), ("SIGINT", 1), ("SIGHUP", 1), ("SIGKILL", 2), ("SIGTERM", 2)])
def test_a_run_that_gets_signals_is_the_undisturbed_one(sent, processes, tmp_path, request):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and a run would do the same
    try:
        disturbed(tmp_path, signal.Signals[sent], request.config.getoption("--signals"), processes)
    finally:
        signal.signal(signal.SIGHUP, before)


@unix
def test_a_second_interrupt_ends_a_run_that_is_in_a_step(tmp_path, monkeypatch):
    code = "import time, train, sys; from tritale.training.step import TrainingStep; from tritale.training.config import parse\n"
    code += "TrainingStep.update = lambda self: (print('in a step', flush=True), time.sleep(600)); train.main(parse(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, *command(tmp_path / "run")[1:]]
    run = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert run.stdout and any(line == "in a step\n" for line in run.stdout)
    run.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(1)  # the step is not finished
    run.send_signal(signal.SIGINT)
    assert run.wait(5) == -signal.SIGINT
    train(tmp_path / "run")


# ---- saves in the background ---------------------------------------------------------------------------------------------------------


def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(tiny_run, tmp_path, monkeypatch):
    save, run, fifth = checkpoint.save_model, TrainingStep.run, threading.Event()

    def wait(*args, **options):
        assert fifth.wait(60)
        save(*args, **options)

    def count(self, batches, factor, step=0, **options):
        if step == 4:
            fifth.set()
        return run(self, batches, factor, step, **options)

    monkeypatch.setattr(checkpoint, "save_model", wait)
    monkeypatch.setattr(TrainingStep, "run", count)
    run_here(tmp_path / "run")
    for name in ("model.safetensors", "trainer/state.safetensors"):
        assert are_equal(weights(tmp_path / "run", 3, name), weights(tiny_run, 3, name))


def test_an_unexpected_error_of_the_writing_thread_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_model", lambda *args, **options: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        run_here(tmp_path / "run")


def test_a_run_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, monkeypatch, capsys):
    save, failures = checkpoint.save_model, iter([True, False])

    def fail(*args, **options):
        if next(failures):
            raise OSError(28, "No space left on device")
        save(*args, **options)

    monkeypatch.setattr(checkpoint, "save_model", fail)
    run_here(tmp_path / "run")
    assert "step-00000003 could not be written ([Errno 28] No space left on device)" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").glob("*step*")] == ["step-00000006"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_checkpoints_that_fill_a_disk_stop_the_saves_and_not_the_run(tiny_run, small_disk, capsys):
    """All checkpoints are kept. The earlier ones stay whole, and with more room the same command resumes from the last."""
    out_dir = small_disk / "run"
    options: dict[str, Any] = dict(
        data__source=tiny_run / "data", train__max_steps=60, train__checkpoint_every=1, train__validate_every=1000
    )
    result = train(out_dir, check=False, train__keep_last=0, **options)
    folders = step_folders(out_dir)
    last = folders[max(folders)]
    assert result.returncode == 1 and "step 60/60" in result.stdout
    assert list(folders) == list(range(1, len(folders) + 1)) and 60 not in folders
    told = result.stdout[result.stdout.index(f"the checkpoint {step_folder(out_dir, len(folders) + 1)} could not be written") :]
    assert "No space left" in told and "earlier checkpoints are complete" in told and "free some space. The run goes on" in told
    assert result.stderr.startswith(f"train.py: the checkpoint {step_folder(out_dir, 60)} could not be written")
    tritale(["verify", str(out_dir)])
    assert capsys.readouterr().out.count(": whole, 7 files\n") == len(folders) and not list(out_dir.glob(".step-*"))
    for folder in list(folders.values())[:-1]:
        shutil.rmtree(folder)
    assert f"resuming from {last}" in train(out_dir, resume="force", train__keep_last=1, **options).stdout
    assert list(step_folders(out_dir)) == [60] and list(losses(out_dir)) == list(range(1, 61))


def test_a_full_disk_stops_the_saves_and_not_the_run(tiny_run, small_disk):
    """The log cannot be written either. When there is room again, the next checkpoint is written and no line is missing."""
    out_dir, filler = small_disk / "run", small_disk / "filler"
    options = dict(data__source=tiny_run / "data", train__max_steps=300, train__checkpoint_every=20, train__validate_every=1000)
    arguments = [sys.executable, *command(out_dir, **options)]
    run = subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    told, steps_after = [], 0
    assert run.stdout
    for line in run.stdout:
        if not told and not filler.exists() and (out_dir / "step-00000020").exists():
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))
        told += [line] if "could not be written" in line else []
        steps_after += "tokens/s" in line and len(told) >= 2
        if steps_after == 20:
            assert state.newest_complete(out_dir, warn=pytest.fail)
            filler.unlink(missing_ok=True)
    assert run.wait() == 0 and steps_after > 20
    assert any("step-000" in line and "tries again" in line for line in told) and any("metrics.jsonl" in line for line in told)
    assert state.newest_complete(out_dir, warn=pytest.fail) == out_dir / "step-00000300"
    assert list(losses(out_dir)) == list(range(1, 301))


def test_old_checkpoints_are_removed_only_before_the_one_that_is_complete(copy):
    """Steps 3 and 6 are whole, 9 and 12 damaged; the run has resumed from 6 and written 7."""
    for step in (7, 9, 12):
        shutil.copytree(copy / "step-00000006", copy / f"step-{step:08d}")
    state.remove_old(copy, newest=7, keep_last=2, best_step=None)
    assert sorted(path.name[-2:] for path in copy.glob("step-*")) == ["06", "07", "09", "12"]


# ---- bad steps -----------------------------------------------------------------------------------------------------------------------


def poisoned(monkeypatch, is_poisoned) -> list[int]:
    """Make the loss of each step of the data for which `is_poisoned` is true NaN. Returns the steps of the data in the order they came."""
    came, step_of, backward = [], Batches.step, TrainingStep.backward

    def step(self, i):
        came.append(i)
        return step_of(self, i)

    def spoil(self, batch):
        backward(self, batch)
        if is_poisoned(came[-1]):
            self.loss.fill_(float("nan"))
            self.grads[3].fill_(float("inf"))

    monkeypatch.setattr(Batches, "step", step)
    monkeypatch.setattr(TrainingStep, "backward", spoil)
    return came


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_a_bad_step_changes_nothing_and_is_counted(matrices, tmp_path, monkeypatch):
    options = {"optim__matrices": matrices, "train__checkpoint_every": 1}
    poisoned(monkeypatch, lambda i: i == 3)
    run_here(tmp_path / "run", **options)
    for name in ("model.safetensors", "trainer/state.safetensors"):
        before, after = weights(tmp_path / "run", 3, name), weights(tmp_path / "run", 5, name)
        assert not are_equal(before, after)
    assert not (tmp_path / "run" / "step-00000004").exists()  # the run may have to go back to before it
    lines = metrics(tmp_path / "run")
    assert [line.get("bad_steps", 0) for line in lines if "tokens" in line] == [0, 0, 0, 1, 1, 1]
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 5, 6]


def test_a_bad_step_with_a_finite_loss_shows_it(tiny_run, tmp_path, monkeypatch, capsys):
    backward, came = TrainingStep.backward, []

    def spoil(self, batch):
        backward(self, batch)
        came.append(batch)
        if len(came) == 4 * 2:  # the last micro-batch of step 4
            self.grads[3].fill_(float("inf"))

    monkeypatch.setattr(TrainingStep, "backward", spoil)
    run_here(tmp_path / "run")
    (line,) = (line for line in metrics(tmp_path / "run") if line["step"] == 4)
    assert line["loss"] == losses(tiny_run)[4] and line["bad_steps"] == 1 and "grad_norm" not in line
    assert f"step 4/6  loss {line['loss']:.3f} " in capsys.readouterr().out
    assert ["grad_norm" in line for line in metrics(tmp_path / "run") if "tokens" in line] == [True] * 3 + [False] + [True] * 2


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_after_bad_steps_the_run_goes_back_and_passes_over_their_batches(matrices, tmp_path, monkeypatch, capsys):
    options = dict(optim__matrices=matrices, train__max_bad_steps=3, train__max_steps=12, train__ema=0.9)
    came = poisoned(monkeypatch, lambda i: i in (4, 5, 6))
    run_here(tmp_path / "run", **options)
    assert came == [0, 1, 2, 3, 4, 5, 6, 3, 7, 8, 9, 10, 11, 12, 13, 14]
    out = capsys.readouterr().out
    assert "step 7: the loss or the gradient was not finite in the last 3 steps" in out and "Back to" in out and "step-00000003" in out
    assert [line["step"] for line in metrics(tmp_path / "run") if "tokens" in line] == list(range(1, 13))
    assert metrics(tmp_path / "run")[-2]["bad_steps"] == 3
    tritale(["status", str(tmp_path / "run")])
    assert "3 skipped" in capsys.readouterr().out
    monkeypatch.undo()

    without, step_of = tmp_path / "without", Batches.step
    monkeypatch.setattr(Batches, "step", lambda self, i: step_of(self, i if i < 4 else i + 3))
    run_here(without, **options)
    for name in ("model.safetensors", "ema.safetensors", "trainer/state.safetensors"):
        assert are_equal(weights(tmp_path / "run", 12, name), weights(without, 12, name))
    monkeypatch.undo()

    shutil.rmtree(tmp_path / "run" / "step-00000012")  # a resumed run passes over them too
    came = poisoned(monkeypatch, lambda i: False)
    run_here(tmp_path / "run", **options)
    assert came == [12, 13, 14]


def test_bad_steps_that_go_on_after_going_back_end_the_run(tmp_path, monkeypatch):
    came = poisoned(monkeypatch, lambda i: i >= 4)
    with pytest.raises(FloatingPointError, match=r"step 7: the loss .* in the last 3 steps.*already gone back to.*--resume force"):
        run_here(tmp_path / "run", train__max_bad_steps=3, train__max_steps=12)
    assert came == [0, 1, 2, 3, 4, 5, 6, 3, 7, 8, 9]


def test_bad_steps_before_the_first_checkpoint_end_the_run(tmp_path, monkeypatch):
    poisoned(monkeypatch, lambda i: True)
    with pytest.raises(FloatingPointError, match="there is no checkpoint to go back to"):
        run_here(tmp_path / "run", train__max_bad_steps=2)


def test_passed_over_steps_of_the_data_add_up():
    progress = state.Progress()
    progress.pass_over(4, 6)
    assert [progress.batch(i) for i in range(6)] == [0, 1, 2, 3, 7, 8]
    progress.pass_over(4, 4)  # batch 7
    progress.pass_over(1, 1)
    assert [progress.batch(i) for i in range(6)] == [0, 2, 3, 8, 9, 10]
    progress.pass_over(1, 3)  # batches 2 to 8, around those that were passed over before
    assert [progress.batch(i) for i in range(4)] == [0, 9, 10, 11]


def test_a_spike_is_reported_and_a_falling_noisy_loss_is_not():
    health, noise = Health(), 0.05 * torch.randn(2000)
    for i in range(2000):
        health.add(float(2 + 5 * 0.99**i + noise[i]) + (1.0 if i in (1500, 1502) else 0.0), 1.0, threshold=6.0)
    first, second = health.reports
    assert first.startswith("step 1501: a spike, the loss of ") and second.startswith("step 1503") and health.spikes == 2
    assert health.mean == pytest.approx(2, abs=0.1) and health.values(2.0)["spikes"] == 2


def test_health_is_the_same_after_a_resume(copy, tmp_path):
    shutil.rmtree(copy / "step-00000006")
    run_here(copy)
    run_here(tmp_path / "run")
    now, then = (
        json.loads((folder / "step-00000006/trainer/trainer.json").read_text(encoding="utf-8"))["health"]
        for folder in (copy, tmp_path / "run")
    )
    assert now == then and now["steps"] == now["good_steps"] == 6


# ---- the EMA -------------------------------------------------------------------------------------------------------------------------


def test_the_ema_is_the_running_mean_of_the_weights_and_exact_after_a_resume(tmp_path, capsys):
    out_dir = tmp_path / "run"
    run_here(out_dir, train__ema=0.3 + 0.4, train__checkpoint_every=1)
    expected = None
    for step in range(1, 7):
        decay = min(0.7, step / (9 + step))
        now = weights(out_dir, step)
        start = now if expected is None else expected
        if step > 1:
            expected = {name: decay * start[name] + (1 - decay) * now[name] for name in now}
            theirs = weights(out_dir, step, "ema.safetensors")
            assert all(torch.allclose(theirs[name], expected[name], atol=1e-6) for name in now)
        else:  # the initial weights are not in a checkpoint
            expected = weights(out_dir, 1, "ema.safetensors")
    assert metrics(out_dir)[-1]["ema_val_loss"] != metrics(out_dir)[-1]["val_loss"]

    last = weights(out_dir, 6, "ema.safetensors")
    for step in (4, 5, 6):
        shutil.rmtree(out_dir / f"step-{step:08d}")
    run_here(out_dir, train__ema=0.7, train__checkpoint_every=1)
    assert are_equal(weights(out_dir, 6, "ema.safetensors"), last)
    assert torch.equal(LLM.load(out_dir, ema=True).model.embedding, last["model.embed_tokens.weight"])


def test_commands_take_the_ema_on_request(tiny_run, tmp_path, capsys):
    out_dir = tmp_path / "run"
    run_here(out_dir, train__ema=0.9)
    texts = []
    for options in ([], ["--ema"]):
        tritale(["generate", str(out_dir), "--prompt", "小", "--seed", "1", "--max-new-tokens", "40", *options])
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    tritale(["export", str(out_dir), "--to", "hf", "--out", str(tmp_path / "hf"), "--ema"])
    assert are_equal(load_file(tmp_path / "hf" / "model.safetensors"), weights(out_dir, 6, "ema.safetensors"))
    assert not (tmp_path / "hf" / "ema.safetensors").exists()
    with pytest.raises(SystemExit, match=r"has no ema\.safetensors; train with --train\.ema"):
        tritale(["generate", str(tiny_run), "--prompt", "小", "--ema"])


# ---- verify --------------------------------------------------------------------------------------------------------------------------


def test_verify_finds_what_has_changed(copy, capsys):
    tritale(["verify", str(copy)])
    out = capsys.readouterr().out
    assert out.count(": whole, ") == 4  # two checkpoints and two splits
    for name in ("step-00000003/model.safetensors", "step-00000006/trainer/state.safetensors", "data/train/tokens-00000.bin"):
        path = copy / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(SystemExit, match="3 of 4 are damaged"):
        tritale(["verify", str(copy)])
    with pytest.raises(SystemExit, match="1 of 1 are damaged"):
        tritale(["verify", str(copy / "step-00000006")])
    (copy / "step-00000006" / "trainer" / checkpoint.CHECKSUMS).unlink()
    with pytest.raises(SystemExit, match="1 of 1 are damaged"):
        tritale(["verify", str(copy / "step-00000006")])
    with pytest.raises(SystemExit, match="1 of 2 are damaged"):
        tritale(["verify", str(copy / "data")])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="has no checkpoint and no prepared data"):
        tritale(["verify", str(copy / "data" / "tokenizer")])
