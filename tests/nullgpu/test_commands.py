"""Every command from start to end on seven cards, and two processes with a card each."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from runs import TINY

from tests.nullgpu.build import REPOSITORY, environment, run
from tritale.data import built_in

CARDS = {  # compute capability: SMs, GB
    75: (40, 16), 80: (108, 80), 86: (82, 24), 89: (128, 24), 90: (132, 80), 100: (148, 180), 120: (170, 32),
}  # fmt: skip


def options(out_dir: Path, **changes: object) -> list[str]:
    """The tiny config, compiled and in the card's own precision."""
    given = TINY | {"out_dir": out_dir, "train.compile": "true", "train.precision": "auto", "log.every": 3}
    given |= {"log.sample_tokens": 1}  # before the third step of a decoder, so that the graphs are those of training
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def results(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"command"')]


@pytest.fixture(params=CARDS)
def card(request) -> dict[str, int]:
    sms, memory = CARDS[request.param]
    return {"CC": request.param, "SMS": sms, "GB": memory}


def test_every_command_runs_from_start_to_end(card, tmp_path):
    run_dir, sampling = tmp_path / "run", ["--max-new-tokens", "6"]
    commands = [
        ["train", *options(run_dir, train__checkpoint_every=3)],
        ["train", *options(run_dir, train__checkpoint_every=3, train__max_steps=9, resume="force")],
        ["train", *options(tmp_path / "other", train__compile="false", data__document_mask="false", optim__matrices="adamw")],
        ["plan", *options(run_dir)],
        ["lr-find", *options(run_dir), "--steps", "20"],
        ["sweep", str(run_dir), "--samples", "1", "--validation-documents", "4", *sampling],
        ["average", str(run_dir), "--last", "2", "--validation-documents", "4"],
        *(["generate", str(run_dir), "--prompt", "小兔", "--samples", "2", "--dtype", d, *sampling] for d in ("float32", "float16")),
        ["generate", str(run_dir), "--prompt", "小兔", "--temperature", "0", "--repetition-penalty", "1.2", "--top-k", "5", *sampling],
        ["export", str(run_dir), "--to", "litgpt", "--out", str(tmp_path / "litgpt")],
        ["export", str(run_dir), "--to", "gguf", "--out", str(tmp_path / "model.gguf")],
    ]
    done = results(run("-m", "tests.nullgpu.commands", json.dumps(commands), **card).stdout)
    assert [result["command"] for result in done] == [command[0] for command in commands]
    assert not [f"{result['command']}: {result['faults']}" for result in done if result["faults"]]
    trained, resumed, eager = done[:3]
    assert trained["kinds"]["graph"] and resumed["kinds"]["graph"] and "graph" not in eager["kinds"]
    assert all(result["kinds"]["graph"] for result in done if result["command"] in ("sweep", "generate"))
    assert sorted(path.name for path in run_dir.glob("step-*")) == [f"step-{i:08d}" for i in (3, 6, 9)]


def test_the_server_answers(card, tmp_path):
    run("-m", "tritale", "train", *options(tmp_path / "run", train__compile="false"), **card)
    command = [sys.executable, "-m", "tritale", "serve", str(tmp_path / "run"), "--port", "0"]
    server = subprocess.Popen(command, env=environment(**card), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout
    try:
        url = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        body = json.dumps({"prompt": "小兔", "max_tokens": 5, "temperature": 0}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    finally:
        server.terminate()
        server.wait(30)
    assert answer["usage"]["completion_tokens"] == 5


@pytest.fixture
def data(tmp_path) -> Path:
    """Data that is written before two processes start: the barrier that the second waits at does nothing on the null GPU."""
    built_in.write_built_in(tmp_path / "data", seed=1, stories=60, validation_stories=8, vocab_size=600)
    return tmp_path / "data"


def test_two_processes_exchange_their_gradients_once_a_step(data, tmp_path):
    commands = json.dumps([["train", *options(tmp_path / "run", data__source=data)]])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.nullgpu.commands", commands]
    done = results(run(*torchrun, DEVICES=2).stdout)
    assert len(done) == 2 and not any(result["faults"] for result in done)
    # 6 steps, whose losses travel with the gradients, 2 validations, the barriers after the data is written and at the end, the comparison
    # of the processes' options, and before each of 2 checkpoints whether weights are finite and the sums of preference training.
    assert [result["collectives"]["all-reduce"] for result in done] == [6 + 2 + 2 + 1 + 2 * 2] * 2
    assert (tmp_path / "run" / "step-00000006").is_dir()


def test_tritale_train_starts_a_process_for_each_gpu(data, tmp_path):
    run("-m", "tritale", "train", "--processes", 2, *options(tmp_path / "run", data__source=data), DEVICES=2)
    assert (tmp_path / "run" / "step-00000006").is_dir()


def test_more_processes_than_gpus_are_refused_in_one_line(tmp_path):
    train = ["train.py", *options(tmp_path / "run")]
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", *train, check=False, DEVICES=2)
    assert done.returncode and "process 3 has no GPU: this machine has 2" in done.stderr
    done = run("-m", "tritale", "train", "--processes", 3, *train[1:], check=False, DEVICES=2)
    line = "tritale train: --processes is 3, and this machine has 2 GPUs; choose at most 2\n"
    assert done.returncode and done.stdout + done.stderr == line
