"""train.py end to end on a tiny model: its files, resuming, and bad input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from runs import REPOSITORY, command, losses, metrics, run_here, train
from safetensors.torch import load_file

from tritale.inference import LLM
from tritale.model.checkpoint import write_checksums
from tritale.training.config import RunConfig, parse


def weights(out_dir, step=6) -> dict[str, torch.Tensor]:
    return load_file(out_dir / f"step-{step:08d}" / "model.safetensors")


def test_a_run_writes_metrics_and_checkpoints(tiny_run):
    lines = metrics(tiny_run)
    trained = [line for line in lines if "loss" in line]
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gib", "data_share", "seconds"}
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6] and all(set(line) == keys for line in trained)
    validated = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validated] == [3, 6] and all(0 < line["val_bits_per_char"] < 15 for line in validated)
    assert trained[-1]["loss"] < trained[0]["loss"] and trained[-1]["lr"] == 0
    files = [".lock", "data", "metrics.jsonl", "report.html", "run.json", "samples.jsonl", "step-00000003", "step-00000006"]
    assert sorted(p.name for p in tiny_run.iterdir()) == files
    folder = tiny_run / "step-00000006"
    assert {p.name for p in folder.iterdir()} == {
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer",
    }
    assert LLM.load(folder).generate("小猫", seed=1, max_new_tokens=5)


def test_a_checkpoint_is_a_hugging_face_model(tiny_run):
    transformers = pytest.importorskip("transformers")
    folder = tiny_run / "step-00000006"
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    llm = LLM.load(folder, device="cpu")
    ids = tokenizer("汤姆和杰瑞是好朋友，", return_tensors="pt").input_ids
    assert ids[0].tolist() == llm.tokenizer.encode("汤姆和杰瑞是好朋友，", bos=True)
    torch.testing.assert_close(llm.model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    out = theirs.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
    (written,) = llm.complete(["汤姆和杰瑞是好朋友，"], temperature=0, max_new_tokens=20)
    assert [i for i in out if i != llm.tokenizer.eot_id] == written.tokens


def test_validation_bits_are_those_of_single_documents(tiny_run):
    """The reported figure compared with the model's loss on one document at a time."""
    from tritale.data.built_in import open_data

    llm = LLM.load(tiny_run / "step-00000006", device="cpu")
    _, _, split = open_data(tiny_run / "data")
    nats = 0.0
    for i in range(split.n_documents):
        ids = torch.tensor([*split.document(i).tolist(), llm.tokenizer.eot_id])
        for start in range(0, len(ids) - 1, 64):  # the tiny model's context
            piece = ids[start : start + 65][None]
            nats += torch.nn.functional.cross_entropy(llm.model(piece[:, :-1])[0], piece[0, 1:], reduction="sum").item()
    reported = [line for line in metrics(tiny_run) if "val_loss" in line][-1]["val_bits_per_char"]
    assert nats / 0.6931471805599453 / split.characters == pytest.approx(reported, rel=1e-5)


def test_a_killed_run_resumes_bit_for_bit(tiny_run, tmp_path):
    out_dir = tmp_path / "run"
    killed = subprocess.Popen([sys.executable, *command(out_dir)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while not (out_dir / "step-00000003").exists() and time.time() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (out_dir / "step-00000003").exists()
    shutil.rmtree(out_dir / "step-00000006", ignore_errors=True)  # it may have been fast enough to write it
    result = train(out_dir)
    assert "resuming from" in result.stdout
    assert losses(out_dir) == losses(tiny_run)
    before, after = weights(tiny_run), weights(out_dir)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_processes_make_the_same_steps(tiny_run, tmp_path):
    train(tmp_path / "two", processes=2)
    ours, theirs = losses(tmp_path / "two"), losses(tiny_run)
    assert ours.keys() == theirs.keys()
    assert all(ours[step] == pytest.approx(theirs[step], rel=1e-4) for step in ours)


@pytest.mark.parametrize("parallel, matrices", [("ddp", "muon"), ("fsdp", "muon"), ("fsdp", "adamw")])
def test_a_run_goes_on_with_another_number_of_processes(parallel, matrices, tmp_path):
    """Two, one and two processes have the losses of one; after each part the checkpoints from its second on are removed, so that the next
    part resumes from its first. 599 rows of the embedding cannot be divided evenly."""
    options: dict = dict(train__checkpoint_every=2, train__ema=0.9, optim__matrices=matrices, data__vocab_size=599)
    out_dir, one = tmp_path / "run", tmp_path / "one"
    run_here(one, **options)
    for processes, kept in ((2, 2), (1, 4), (2, 6)):
        result = train(out_dir, processes=processes, train__parallel=parallel, **options)
        assert ("resuming from" in result.stdout) == (kept > 2)
        for step in range(kept + 2, 7, 2):
            shutil.rmtree(out_dir / f"step-{step:08d}")
    assert losses(out_dir) == pytest.approx(losses(one), rel=1e-4)
    for name in ("model.safetensors", "ema.safetensors", "trainer/state.safetensors"):
        ours, theirs = (load_file(folder / "step-00000006" / name) for folder in (out_dir, one))
        assert ours.keys() == theirs.keys() and all(t.shape == theirs[key].shape for key, t in ours.items())
    last, expected = ([line for line in metrics(folder) if "val_loss" in line][-1] for folder in (out_dir, one))
    assert all(last[name] == pytest.approx(expected[name], rel=1e-4) for name in ("val_loss", "ema_val_loss"))


def test_torchrun_restarts_the_processes_when_one_is_killed(tmp_path):
    options: dict = {"train__max_steps": 24, "train__checkpoint_every": 4, "train__validate_every": 24}
    run_here(tmp_path / "one", **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/scaling.md
    arguments = [*torchrun, *command(tmp_path / "run", **options)]
    launcher = subprocess.Popen(arguments, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "step-00000004").is_dir() and launcher.poll() is None:
        time.sleep(0.02)
    psutil.Process(launcher.pid).children()[1].kill()
    assert "resuming from" in launcher.communicate(timeout=200)[0] and launcher.returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_accumulating_micro_batches_does_not_change_the_steps(tmp_path):
    """Without a document mask: with one, the end of a micro-batch also limits attention."""
    for size in (1, 4):
        run_here(tmp_path / str(size), train__micro_batch=size, data__document_mask="false")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-4)


@pytest.mark.parametrize("options", [{"optim__matrices": "adamw"}, {"optim__schedule": "wsd"}, {"data__document_mask": "false"}])
def test_other_configs_train_too(options, tmp_path):
    run_here(tmp_path / "run", **options)
    assert losses(tmp_path / "run")[6] < losses(tmp_path / "run")[1]


def test_bf16_on_a_cpu_stays_near_fp32(tiny_run, tmp_path):
    run_here(tmp_path / "run", train__precision="bf16")
    assert losses(tmp_path / "run") == pytest.approx(losses(tiny_run), rel=0.01)
    assert losses(tmp_path / "run") != losses(tiny_run)


def test_torch_compile_gives_the_losses_of_eager(tiny_run, tmp_path):
    run_here(tmp_path / "run", train__compile="true")
    assert losses(tmp_path / "run") == pytest.approx(losses(tiny_run), rel=1e-4)


def test_without_a_compiler_it_warns_and_trains(tmp_path):
    environment = {**os.environ, "CXX": "/nowhere/g++", "PATH": os.path.dirname(sys.executable)}
    environment["PATH"] = os.path.dirname(sys.executable)
    arguments = command(tmp_path / "run", train__compile="true", train__max_steps=3)
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "torch.compile is off" in result.stdout


def test_keep_last_keeps_the_best_too(tmp_path, monkeypatch):
    values = iter((3.0, 2.0, 5.0, 4.0))  # of the validations after steps 3, 6, 9 and 12
    monkeypatch.setattr("train.validate", lambda *args, **options: (next(values), 1.0))
    run_here(tmp_path / "run", train__max_steps=12, train__checkpoint_every=3, train__keep_last=1)
    trainer = json.loads((tmp_path / "run" / "step-00000012" / "trainer" / "trainer.json").read_text())
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "run").glob("step-*"))
    assert kept == [trainer["best_step"], 12] == [6, 12]


def test_wandb_offline_needs_no_account(tmp_path):
    pytest.importorskip("wandb")
    train(tmp_path / "run", log__wandb="offline", train__max_steps=3)
    run_id = (tmp_path / "run" / "wandb-run-id").read_text()
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))


def test_wandb_without_a_login_is_an_error_with_a_remedy(tmp_path):
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"} | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    arguments = command(tmp_path / "run", log__wandb="online", train__max_steps=3)
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 1 and "wandb login" in result.stderr and "Traceback" not in result.stderr


# ---- bad input ---------------------------------------------------------------------------------------------------------------------------


def test_a_bad_config_writes_nothing(tmp_path):
    with pytest.raises(SystemExit, match=r"did you mean 'train\.max_steps'"):
        run_here(tmp_path / "run", train__max_step=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model__vocab_size": 700}, "model.vocab_size is 700, but the data has a vocabulary of 600"),
        ({"train__context": 65}, "--model.context 65"),
        ({"train__global_batch": 2000, "train__micro_batch": 2000}, "add stories"),
        ({"data__source": "nowhere"}, "nowhere"),
        ({"log__prompts": '["' + "小猫" * 99 + '"]'}, "log.prompts contains .* longer"),
        ({"train__precision": "fp16"}, "needs a GPU"),
    ],
)
def test_configs_that_do_not_fit_the_data_or_device_are_refused(options, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here(tmp_path / "run", **options)


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "copy")


def test_another_config_is_refused_and_force_resumes(copy):
    with pytest.raises(ValueError, match=r"train.max_steps: 6 → 9.*--resume force"):
        run_here(copy, train__max_steps=9)
    run_here(copy, train__max_steps=9, resume="force")
    assert list(losses(copy)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data__stories": 50}, "data.stories: 60 → 50"),
        ({"optim__matrices": "adamw", "resume": "force"}, "optim.matrices: muon → adamw"),
        ({"train__max_steps": 5, "resume": "force"}, r"beyond train.max_steps \(5\)"),
    ],
)
def test_a_refused_config_leaves_the_run_unchanged(options, message, copy):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    with pytest.raises(ValueError, match=message):
        run_here(copy, **options)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


def test_an_altered_shard_is_refused(copy):
    shard = copy / "data" / "train" / "tokens-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin"):
        run_here(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "checksums.json", "trainer/state.safetensors", "trainer/trainer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(name, damage, tiny_run, copy, capsys):
    path = copy / "step-00000006" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    run_here(copy)
    out = capsys.readouterr().out
    assert "step-00000006 is damaged" in out and "resuming from" in out and "step-00000003" in out
    assert [line["step"] for line in metrics(copy) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert losses(copy) == losses(tiny_run)


def test_temporary_folders_of_a_killed_process_are_removed(copy):
    (copy / ".step-00000009.0123abcd.tmp" / "trainer").mkdir(parents=True)
    (copy / ".step-notes").mkdir()  # the user's
    run_here(copy)
    assert sorted(p.name for p in copy.glob(".*")) == [".lock", ".step-notes"]


def test_temporary_folders_of_the_data_are_removed(tmp_path):
    (tmp_path / ".data.0123abcd.tmp" / "train").mkdir(parents=True)
    (tmp_path / ".data.notes").mkdir()  # the user's
    run_here(tmp_path, train__max_steps=1, optim__warmup_steps=0)
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".data.notes", ".lock"]


def test_a_foreign_folder_at_the_place_of_the_data_is_not_overwritten(tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="does not hold built-in stories"):
        run_here(tmp_path / "run")
    assert (tmp_path / "run" / "data" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("key", ["data__source", "data__replay"])
def test_a_folder_without_data_is_named_with_the_command_that_makes_it(tmp_path, key):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        message = f"{tmp_path / name} holds no training data .*; make it with tritale prepare --input FILE --out {tmp_path / name}"
        with pytest.raises(FileNotFoundError, match=message):
            run_here(tmp_path / "run", **{key: tmp_path / name})


def test_a_resumed_run_may_save_at_other_steps(copy):
    run_here(copy, train__checkpoint_every=2, train__validate_every=2)


def test_a_full_disk_leaves_the_earlier_checkpoint_complete(tmp_path):
    """A limit on the size of files takes the place of a full disk: the same call fails."""
    out_dir = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run_here(out_dir, train__max_steps=3)
    before = weights(out_dir, 3)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(OSError, match="earlier checkpoints are complete"):
            run_here(out_dir, resume="force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in out_dir.glob("*step*")] == ["step-00000003"]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(out_dir, 3).values(), strict=True))
    run_here(out_dir, resume="force")
    assert (out_dir / "step-00000006").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: .*--optim\.lr 3e\+01 .*--resume force"):
        run_here(tmp_path / "run", optim__lr=100, optim__warmup_steps=0, train__z_loss=1, train__max_steps=60)


def test_a_checkpoint_of_a_newer_format_is_refused_and_an_old_one_is_read(copy):
    path = copy / "step-00000006" / "trainer" / "trainer.json"
    trainer = json.loads(path.read_text())
    assert trainer.pop("format") == 1
    path.write_text(json.dumps(trainer))
    for folder in (path.parent, path.parent.parent):
        (folder / "checksums.json").unlink()
    run_here(copy)  # files of earlier versions have neither a format nor checksums
    path.write_text(json.dumps(trainer | {"format": 2}))
    for folder in (path.parent, path.parent.parent):
        write_checksums(folder)
    with pytest.raises(ValueError, match=r"trainer\.json has format 2, this version of tritale reads format 1"):
        run_here(copy)


def test_every_config_file_can_be_read():
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert isinstance(parse(["--config", str(path)]), RunConfig)
