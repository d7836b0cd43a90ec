"""`tritale serve` as a user types it."""

import re
import shutil
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from tests.serve.servers import reciting, train_tokenizer, write_checkpoint
from tritale.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("serve") / "run", train_tokenizer()
    for step in (1, 2):
        write_checkpoint(folder / f"step-{step:08d}", tokenizer, reciting(tokenizer, "从前有一只小兔"))
    return folder


def test_it_serves_on_the_loopback_address_until_ctrl_c(run):
    command = [sys.executable, "-m", "tritale.cli.main", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        url = re.match(r"(http://127\.0\.0\.1:\d+)  2 checkpoints of .*, newest step-00000002; Ctrl-C ends", line)
        assert url, line + process.stderr.read()
        with httpx.Client(base_url=url[1], timeout=120) as client:
            answer = client.post("/v1/completions", json={"prompt": "", "temperature": 0}).json()
            assert answer["choices"][0]["text"] == "从前有一只小兔"
            assert "讲个故事" in client.get("/").text
        port = url[1].rpartition(":")[2]
        with pytest.raises(SystemExit, match=f"port {port} of 127.0.0.1 is taken.*--port") as exit:  # two servers on one port
            main(["serve", str(run), "--port", port])
        assert exit.value.code != 0
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], "is neither a checkpoint"),
        (["RUN", "--port", "70000"], "--port is 70000"),
        (["RUN", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["RUN", "--slots", "0"], "--slots is 0"),
        (["RUN", "--queue", "3"], "--queue is 3"),
        (["RUN", "--max-tokens", "0"], "--max-tokens is 0"),
        (["RUN", "--device", "tpu"], "device 'tpu' is not available"),
    ],
)
def test_bad_input_ends_with_a_message(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(run) if a == "RUN" else a for a in arguments]
    with pytest.raises(SystemExit, match=message) as exit:
        main(["serve", *(arguments if "--port" in arguments else [*arguments, "--port", "0"])])
    assert exit.value.code != 0


def test_a_checkpoint_being_written_or_damaged_is_named(run, tmp_path):
    unfinished = shutil.copytree(run / "step-00000001", tmp_path / ".step-00000003.0123abcd.tmp")
    with pytest.raises(SystemExit, match="is being written or was left"):
        main(["serve", str(unfinished), "--port", "0"])
    damaged = shutil.copytree(run / "step-00000001", tmp_path / "step-00000003")
    (damaged / "model.safetensors").write_bytes(b"0")
    with pytest.raises(SystemExit, match=r"step-00000003 cannot be loaded: .* use another step"):
        main(["serve", str(tmp_path), "--port", "0"])


def test_missing_packages_are_named(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="fastapi and uvicorn not found; run: pip install fastapi uvicorn"):
        main(["serve", str(run)])


def test_a_taken_port_of_all_addresses_is_an_error(run):
    with socket.create_server(("0.0.0.0", 0)) as taken, pytest.raises(SystemExit, match="is taken"):
        main(["serve", str(run), "--host", "0.0.0.0", "--port", str(taken.getsockname()[1])])
