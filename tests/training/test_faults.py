"""Runs that go wrong: two at once, a killed launcher, losses that are not finite, damaged files, terminals, a removed folder."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from runs import REPOSITORY, command, losses, metrics, run_here, train
from safetensors.torch import load_file, save_file

from tritale.cli.main import main as tritale
from tritale.common.errors import UserError
from tritale.common.files import locked, read_json_object
from tritale.model import checkpoint
from tritale.model.checkpoint import write_checksums
from tritale.training import processes, state
from tritale.training.step import TrainingStep


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copy")


def trainer_of(out_dir, step) -> dict:
    return json.loads((out_dir / f"step-{step:08d}" / "trainer" / "trainer.json").read_text(encoding="utf-8"))


def alter_state(out_dir, change, step=6) -> None:
    path = out_dir / f"step-{step:08d}" / "trainer" / "state.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    write_checksums(path.parent)


# ---- resuming ------------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_saves_its_own_config_and_can_resume_again(copy):
    run_here(copy, train__max_steps=9, optim__lr=0.005, resume="force")
    assert trainer_of(copy, 9)["config"]["train.max_steps"] == 9 and trainer_of(copy, 9)["config"]["optim.lr"] == 0.005
    run_here(copy, train__max_steps=9, optim__lr=0.005)  # the same config needs no force
    assert trainer_of(copy, 6)["config"]["train.max_steps"] == 6


def test_a_resumed_run_saves_its_own_gradient_scaler(copy, monkeypatch):
    scales = iter((512.0, 256.0))
    monkeypatch.setattr(torch.amp.GradScaler, "state_dict", lambda self: {"scale": next(scales)})
    monkeypatch.setattr(torch.amp.GradScaler, "load_state_dict", lambda self, values: None)
    run_here(copy, train__max_steps=12, resume="force")
    assert [trainer_of(copy, step)["grad_scaler"] for step in (9, 12)] == [{"scale": 512.0}, {"scale": 256.0}]


# ---- two at once, and killed launchers -----------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_free_after_the_other_process_is_killed(tmp_path):
    code = "import sys, time; from tritale.common.files import locked; from pathlib import Path\n"
    code += "with locked(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="in use by another training process; wait until it ends or stop it"):
            run_here(tmp_path / "run")
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path / "run", "x"), pytest.raises(UserError, match="in use by y"), locked(tmp_path / "run", "y"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ranks_end_when_torchrun_is_killed(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = dict(train__max_steps=1_000_000, train__checkpoint_every=1000, train__validate_every=1000)
    torchrun = subprocess.Popen([*launcher, *command(tmp_path / "run", **options)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 200
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and losses(tmp_path / "run")) and time.time() < deadline:
        time.sleep(0.1)
    ranks = psutil.Process(torchrun.pid).children()
    assert len(ranks) == 2
    torchrun.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(ranks, timeout=20)[1]
    with locked(tmp_path / "run", "a rank that is still there"):
        pass
    assert "the launcher has ended, so this process ends" in torchrun.communicate()[1]


def test_processes_with_other_options_are_named(tmp_path):
    """As on two machines: each process has a command line of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = []
    for rank in ("0", "1"):
        environment = {**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank}
        arguments = command(tmp_path / "run", optim__lr=f"0.0{int(rank) + 1}")
        started.append(subprocess.Popen([sys.executable, *arguments], env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True))
    for rank, process in enumerate(started):
        (line,) = process.communicate()[1].splitlines()
        assert process.returncode == 1 and f"train.py: the processes differ in optim.lr (process {rank}: 0.0{rank + 1}); start them" in line


@pytest.mark.parametrize("steps, message", [(9, "train.max_steps: 6 → 9"), (-1, "train.max_steps is -1")])
def test_several_processes_report_an_error_in_one_line(copy, steps, message):
    result = train(copy, processes=2, check=False, train__max_steps=steps)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and message in line


def is_pending(number: int, process: psutil.Process) -> bool:
    """Whether a stopped process has been sent a signal."""
    pending = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(pending[0], 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", ["Ctrl-C", "a rank is killed", "a rank is killed, and the other is ended before it notices"])
def test_several_processes_end_in_one_line(ending, tmp_path):
    flags = command(tmp_path / "run", train__max_steps=1_000_000, train__checkpoint_every=1000, train__validate_every=1000)[1:]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tritale", "train", "--processes", "2", *flags],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    deadline = time.time() + 200
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and losses(tmp_path / "run")) and time.time() < deadline:
        time.sleep(0.1)
    ranks = psutil.Process(launcher.pid).children()
    if ending == "Ctrl-C":
        os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does
        status, message = 130, "train.py: stopped, "
    else:
        is_slow = ending != "a rank is killed"
        if is_slow:
            ranks[0].suspend()
        ranks[1].kill()
        while is_slow and not is_pending(signal.SIGTERM, ranks[0]):
            time.sleep(0.1)
        ranks[0].resume()
        status, message = 1, "tritale train: process 1 was ended by signal 9 (9 is often a lack of memory); run the same command again"
    text = launcher.communicate(timeout=100)[1].strip()
    assert launcher.returncode == status and text.startswith(message) and "\n" not in text and not psutil.wait_procs(ranks, timeout=20)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_several_processes_that_are_stopped_while_they_start_end_without_an_error(number, status, tmp_path):
    program = [sys.executable, "-m", "tritale", "train", "--processes", "2", *command(tmp_path / "run")[1:]]
    launcher = subprocess.Popen(program, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    imports_torch = lambda p: any("libtorch" in library.path for library in p.memory_maps())
    while len(ranks := psutil.Process(launcher.pid).children()) < 2 or not all(map(imports_torch, ranks)):
        assert time.time() < deadline
    launcher.send_signal(number)
    text = launcher.communicate(timeout=100)[1]
    assert (launcher.returncode, text) == (status, "") and not psutil.wait_procs(ranks, timeout=20)[1]


# ---- memory ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, micro_batch, remedy",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 4, "add --train.micro_batch 2 "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."), 2, "add --train.micro_batch 1 "),
        (MemoryError(), 1, "lower model.context or model.width"),
    ],
)
@pytest.mark.parametrize("where", ["backward", "update"])
def test_a_lack_of_memory_names_the_setting_to_lower(error, micro_batch, remedy, where, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(TrainingStep, where, fail)
    with pytest.raises(UserError) as found:
        run_here(tmp_path / "run", train__micro_batch=micro_batch)
    assert str(found.value).startswith(f"out of memory with train.micro_batch {micro_batch}; {remedy}")


def test_another_runtime_error_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingStep, "update", lambda self: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        run_here(tmp_path / "run")


# ---- not finite ------------------------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The loss is computed before the update that spoils the weights, at a step that is saved."""
    update = TrainingStep.update

    def spoil(self):
        norm = update(self)
        if self.scaler is not None and next(iter(self.optimizers[0].state.values()))["step"] == 3:
            self.model.embedding.data[5, 5] = float("nan")
        return norm

    monkeypatch.setattr(TrainingStep, "update", spoil)
    with pytest.raises(
        FloatingPointError, match=r"step 3: a weight or the optimizer's state is not finite.*--optim.lr 0.003 .*--resume force"
    ):
        run_here(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*step*")) and all("val_loss" not in line for line in metrics(tmp_path / "run"))


def test_the_remedy_for_a_loss_that_is_not_finite_works(copy, monkeypatch):
    monkeypatch.setattr("train.validate", lambda *args, **options: (float("nan"), float("nan")))
    with pytest.raises(FloatingPointError) as error:
        run_here(copy, train__max_steps=9, resume="force")
    monkeypatch.undo()
    words = str(error.value).split("add ")[1].split(",")[0].split()
    options = {words[i].removeprefix("--").replace(".", "__"): words[i + 1] for i in range(0, len(words), 2)}
    assert options.keys() == {"optim__lr", "optim__embedding_lr", "resume"}
    run_here(copy, train__max_steps=9, **options)
    assert 9 in losses(copy)


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_is_not_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr("train.validate", lambda *args, **options: (float("nan"), float("nan")))
    with pytest.raises(FloatingPointError, match="step 3: validation loss is nan"):
        run_here(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*step*"))


# ---- damaged files -----------------------------------------------------------------------------------------------------------------------


def first(tensors, end):
    return next(name for name in sorted(tensors) if name.endswith(end))


CHANGES = {
    "a moment is missing": lambda t: t.pop(first(t, "exp_avg")),
    "a moment of another shape": lambda t: t.update({first(t, "exp_avg"): torch.zeros(3)}),
    "a momentum buffer of another shape": lambda t: t.update({first(t, "momentum_buffer"): torch.zeros(3)}),
    "another dtype": lambda t: t.update({first(t, "exp_avg"): t[first(t, "exp_avg")].double()}),
    "integers": lambda t: t.update({first(t, "exp_avg"): t[first(t, "exp_avg")].to(torch.int8)}),
    "not finite": lambda t: t[first(t, "exp_avg")].fill_(float("nan")),
    "a tensor too many": lambda t: t.update({"blocks.9.x/exp_avg": torch.zeros(3)}),
    "a name without a slash": lambda t: t.update({"surplus": torch.zeros(3)}),
    "no random state": lambda t: t.pop("rng.cpu"),
    "a random state of another size": lambda t: t.update({"rng.cpu": torch.zeros(3, dtype=torch.uint8)}),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_optimizer_state_is_refused(change, copy):
    alter_state(copy, CHANGES[change])
    with pytest.raises(UserError, match=r"step-00000006/trainer/state\.safetensors"):
        run_here(copy)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(copy):
    before = (copy / "metrics.jsonl").read_bytes()
    for step in (3, 6):
        (copy / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is complete; restore one, or move"):
        run_here(copy)
    assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "values",
    [{"step": "6"}, {"config": None}, {"seconds": []}, {"best_loss": "low"}, {"best_step": 1.5}, {"grad_scaler": 3}, {"step": None}],
)
def test_a_trainer_json_of_wrong_types_is_reported_and_the_checkpoint_before_it_used(values, copy, capsys):
    path = copy / "step-00000006" / "trainer" / "trainer.json"
    path.write_text(json.dumps(trainer_of(copy, 6) | values))
    write_checksums(path.parent)
    run_here(copy)
    out = capsys.readouterr().out
    assert f"trainer.json: {next(iter(values))} missing or of a wrong type" in out and "step-00000003" in out


@pytest.mark.parametrize("file, key", [("config.json", "tritale_format"), ("trainer/trainer.json", "format")])
def test_a_checkpoint_of_a_newer_format_is_not_resumed(file, key, copy):
    path = copy / "step-00000006" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 2}))
    write_checksums(path.parent)
    with pytest.raises(UserError, match=rf"step-00000006/{file} has format 2"):
        run_here(copy)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "trainer/state.safetensors", "trainer/trainer.json"]
)
def test_a_flipped_bit_is_reported_and_the_checkpoint_before_it_used(name, copy, capsys):
    path = copy / "step-00000006" / name
    data = bytearray(path.read_bytes())
    data[int(torch.randint(len(data), ()))] ^= 1 << int(torch.randint(8, ()))
    path.write_bytes(data)
    newest = state.newest_complete(copy, warn=print)
    assert newest == copy / "step-00000003" and "step-00000006 is damaged" in capsys.readouterr().out


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json is not valid JSON"):
        read_json_object(tmp_path / "deep.json", remedy="")


def test_damaged_lines_of_metrics_are_dropped(copy):
    path = copy / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": "six"}\n[1]\n\xff\xfe\n{"step": null}\n' + b"[" * 100_000)
    run_here(copy)
    assert metrics(copy) == [json.loads(line) for line in whole.splitlines()]


# ---- files and folders -------------------------------------------------------------------------------------------------------------------


def test_a_run_whose_folder_is_removed_ends_with_an_error(tmp_path, monkeypatch):
    out_dir, update = tmp_path / "run", TrainingStep.update

    def remove(self):
        shutil.rmtree(out_dir, ignore_errors=True)
        return update(self)

    monkeypatch.setattr(TrainingStep, "update", remove)
    with pytest.raises(OSError, match=r"metrics\.jsonl was removed or replaced during the run"):
        run_here(out_dir)
    assert not out_dir.exists()


@pytest.mark.parametrize("end", ["> /dev/full", ">&-", ">&- 2>&-", "| head -n 1", "2>&1 | head -n 1"])
def test_output_that_cannot_be_written_does_not_end_the_training(tmp_path, tiny_run, end):
    script, *flags = command(tmp_path / "run")
    line = f"{shlex.join([sys.executable, script, *flags])} {end}"
    done = subprocess.run(line, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "run" / "step-00000006").is_dir() and losses(tmp_path / "run") == losses(tiny_run)


def test_checkpoints_have_the_permissions_of_the_umask(tiny_run):
    umask = os.umask(0)
    os.umask(umask)
    files = [p for p in (tiny_run / "step-00000006").rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~umask}


def test_metrics_are_written_to_the_disk_at_the_end(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    run_here(tmp_path / "run")
    assert any(path.endswith("run/metrics.jsonl") for path in synced)


def test_a_full_disk_names_the_file_and_the_space_that_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_model", lambda *args, **options: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(
        OSError, match=r"step-00000006 could not be written .*No space left on device.*needs about \d+ kB: free some space"
    ) as error:
        run_here(tmp_path / "run")
    assert "keep_last" not in str(error.value)


# ---- terminals and systems ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_sample_does_not_end_the_run(encoding, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    arguments = command(tmp_path / "run", log__prompts='["小🐰"]', train__sample_every=2, train__max_steps=3)
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "step-00000003").is_dir() and b"?" in result.stdout


def test_output_to_a_pipe_has_a_line_for_each_log_step(tmp_path):
    lines = train(tmp_path / "run", train__compile="true").stdout.splitlines()
    assert "compiling (about a minute)" in lines and not any("nan" in line or "\x1b" in line for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("step ") and "tokens/s" in line] == [f"{i}/6" for i in range(1, 7)]


def test_mfu_is_at_most_one(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "matmul_flops", lambda device, precision: (1.0, "measured now"))
    run_here(tmp_path / "run")
    assert all(0 < line["mfu"] <= 1 for line in metrics(tmp_path / "run") if "mfu" in line)


def test_without_unix_modules_training_starts(tmp_path):
    for name in ("resource", "fcntl"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
    code = "import tritale.training.processes, tritale.training.state, tritale.common.files, train"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr


def test_a_model_that_cannot_fit_is_refused_before_it_is_built(tmp_path):
    with pytest.raises(UserError, match=r"the model needs .* TB for its weights.*are free; lower model.n_layer"):
        run_here(tmp_path / "run", model__width=65536, model__mlp_width=262144, model__n_layer=1000)


def test_the_plan_of_a_model_that_does_not_fit_is_not_measured(tiny_run, tmp_path, capsys):
    options = command(tmp_path / "run", model__width=65536, model__mlp_width=262144, model__n_layer=1000)[1:]
    tritale(["plan", *options])
    out = capsys.readouterr().out
    assert "largest micro-batch that fits: none" in out and "use a smaller model" in out and "tokens/s" not in out


def test_the_peak_of_the_memory_is_this_process_s_own():
    """ru_maxrss of a child begins with the size of the process that started it."""
    large = torch.ones(300_000_000)  # 1.2 GB
    code = "import torch; from tritale.training.processes import peak_memory_gib; print(peak_memory_gib(torch.device('cpu')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert 0.05 < float(found.stdout) < 0.9, large.sum()
