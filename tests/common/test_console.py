"""What commands print fits the terminal."""

import gc
import sys

import pytest

from tritale.cli.main import main
from tritale.common.console import prepare_output


def test_at_a_terminal_an_error_is_broken_at_spaces_and_in_a_pipe_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    arguments = ["generate", "--model", str(tmp_path), "--prompt", "小兔", "--temperature", "-1"]
    with pytest.raises(SystemExit) as piped:
        main(arguments)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as shown:
        main(arguments)
    lines = str(shown.value).splitlines()
    assert "\n" not in str(piped.value) and len(lines) > 1
    assert max(map(len, lines)) <= 40 and " ".join(lines) == str(piped.value)


def test_the_parser_breaks_its_errors_at_spaces_too(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit):
        main(["generate", "--checkpoint", "x"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 40 and "did you mean --model?" in " ".join(lines)


def test_the_stream_that_lasting_output_replaces_stays_open(tmp_path, monkeypatch):
    with open(tmp_path / "out.txt", "w", encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdout", file)
        monkeypatch.setattr("sys.stderr", sys.stderr)  # undone too
        prepare_output(is_lasting=True)
        print("小兔")
        monkeypatch.undo()
        gc.collect()
        file.write("完")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "小兔\n完"
