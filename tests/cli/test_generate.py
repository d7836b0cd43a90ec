"""`tritale generate` as a user types it."""

import os
import re
import subprocess
import sys

import pytest

from tritale.cli.main import main
from tritale.inference import LLM


def run(folder, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tritale.cli.main", "generate", "--model", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)


def test_a_seed_repeats_and_speed_and_memory_are_reported(tiny_run, seed):
    folder = tiny_run / "step-00000006"
    one = run(folder, "--prompt", "小兔子", "--seed", str(seed % 1000), "--max-new-tokens", "8")
    three = run(folder, "--prompt", "小兔子", "--seed", str(seed % 1000), "--max-new-tokens", "8", "--samples", "3")
    assert three.stdout.startswith(one.stdout) and three.stdout.count("小兔子") >= 3  # a sample does not depend on the others
    text = one.stdout.removesuffix("\n")
    assert text == "小兔子" + LLM.load(folder).generate("小兔子", seed=seed % 1000, max_new_tokens=8)
    for result in (one, three):
        pattern = r"(\d+) tokens in [\d.]+ s, \d+ tokens/s\nmemory (\d+) MiB at its peak \(weights (\d+)\), and (\d+) MiB of Python"
        report = re.search(pattern, result.stderr)
        assert report, result.stderr
        n_tokens, peak, _, runtime = map(int, report.groups())
        assert 1 <= n_tokens <= 24 and 0 < peak < 300 and 50 < runtime < 2000


def test_a_terminal_is_interactive(tiny_run):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tritale.cli.main", "generate", "--model", str(tiny_run / "step-00000006"), "--max-new-tokens", "5"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        for typed in ("小兔\n".encode(), "小猫".encode() * 100 + b"\n", "小狗\n".encode(), b"\x04"):
            while not shown.endswith(b"> "):
                shown += os.read(ours, 1)
            shown += b"|"
            os.write(ours, typed)
        while chunk := os.read(ours, 1000):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait(60) == 0
    text = shown.decode(errors="replace")
    assert text.count("小兔") >= 2 and "context 64" in text and text.count("小狗") >= 2 and "tokens/s" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "nowhere is not a folder"),
        (["--prompt", "小兔子" * 100], "shorten"),
        (["--prompt", "\udcff\udcfe"], "not valid Unicode"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "-0.1"], "top_p is -0.1"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--min-p", "2"], "min_p is 2"),
        (["--stop", ""], "none of them empty"),
        (["--samples", "0"], "--samples is 0"),
        (["--device", "tpu"], "device 'tpu' is not available"),
    ],
)
def test_bad_input_ends_with_a_message(arguments, message, tiny_run):
    if "--model" not in arguments:
        arguments = ["--model", str(tiny_run / "step-00000006"), *arguments]
    with pytest.raises(SystemExit, match=message) as exit:
        main(["generate", *arguments])
    assert exit.value.code != 0
