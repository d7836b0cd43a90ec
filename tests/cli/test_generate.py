"""`tritale generate` as a user types it."""

import subprocess
import sys

import pytest

from tritale.cli.main import main


def test_a_story_is_printed_and_a_seed_repeats(tiny_run):
    folder = tiny_run / "step-00000006"
    arguments = ["generate", "--model", str(folder), "--prompt", "小兔子", "--seed", "3", "--max-new-tokens", "8", "--samples", "2"]
    command = [sys.executable, "-m", "tritale.cli.main", *arguments]
    outs = [subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout for _ in range(2)]
    assert outs[0] == outs[1] and outs[0].count("小兔子") >= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "nowhere is not a checkpoint"),
        (["--prompt", "小兔子" * 100], "shorten"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "temperature=0"),
    ],
)
def test_bad_input_ends_with_a_message(arguments, message, tiny_run):
    if "--model" not in arguments:
        arguments = ["--model", str(tiny_run / "step-00000006"), *arguments]
    with pytest.raises(SystemExit, match=message) as exit:
        main(["generate", *arguments])
    assert exit.value.code != 0
