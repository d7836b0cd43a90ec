"""The command itself: help, version, errors in one line, output in any terminal, and what runs without Unix modules."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from runs import REPOSITORY, train

import tritale as package
from tritale.cli import evaluate
from tritale.cli.main import COMMANDS, main


def tritale(*arguments: object, cwd: Path = REPOSITORY, **variables: str) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([*([variables.pop("PYTHONPATH")] if "PYTHONPATH" in variables else []), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run([sys.executable, "-m", "tritale", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True)


def test_without_a_command_it_prints_help(capsys):
    main([])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: tritale") and all(f"    {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize(
    "command",
    ["prepare --input {text} --out {file}/x", "train --config {config} --out_dir {file}/x", "export {run} --to hf --out {file}",
     "evaluate {run} --out {file}/x", "instruct {run}/data --out {file}/x", "pairs {run} --data {run}/data --out {file}/x"],
)  # fmt: skip
def test_a_path_below_a_file_is_said_in_words(command, tiny_run, tmp_path):
    (tmp_path / "text.txt").write_text("从前有一只小兔子。\n" * 50, encoding="utf-8")
    (tmp_path / "file").touch()
    paths = {
        "text": tmp_path / "text.txt",
        "file": tmp_path / "file",
        "run": tiny_run,
        "tmp": tmp_path,
        "config": REPOSITORY / "configs" / "quickstart.yaml",
    }
    done = tritale(*command.format(**paths).split())
    printed = done.stderr.decode()
    assert done.returncode == 1 and "Errno" not in printed and "Traceback" not in printed
    assert re.search(r"file(/x)?\S* (exists|cannot be used)", printed.replace("\n", " ")), printed


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"tritale {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "x", "--max-tokens", "3"], "--max-tokens is not an option; did you mean --max-new-tokens?"),
        (["generate", "--checkpoint=x", "--model", "x"], "--checkpoint=x is not an option; did you mean --model?"),
        (["sweep", "x", "--evry", "3"], "--evry is not an option; did you mean --every?"),
        (["sweep", "x", "--validation_documents", "3"], "did you mean --validation-documents?"),
        (["average", "x", "--zzz"], "--zzz is not an option (see tritale average --help)"),
        (["sweep"], "DIR, the folder of a checkpoint or run, is missing"),
        (["sweep", "x", "--every", "a"], "invalid int value: 'a'"),
        (["--zzz"], "--zzz is not an option; give a command first: prepare, instruct, "),
        (["validate"], "invalid choice: 'validate'"),
    ],
)
def test_a_wrong_option_is_one_line_with_the_nearest_one(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("tritale")


@pytest.mark.parametrize("arguments", [["RUN"], ["--model", "RUN"], ["--model", "RUN/step-00000006"]])
def test_a_model_is_given_in_the_same_ways_to_each_command(tiny_run, tmp_path, capsys, arguments):
    folder = [argument.replace("RUN", str(tiny_run)) for argument in arguments]
    main(["generate", *folder, "--prompt", "小", "--max-new-tokens", "3", "--seed", "1"])
    text = capsys.readouterr().out
    main(["generate", str(tiny_run / "step-00000006"), "--prompt", "小", "--max-new-tokens", "3", "--seed", "1"])
    assert capsys.readouterr().out == text
    main(["export", *folder, "--to", "litgpt", "--out", str(tmp_path / "litgpt")])


def test_generate_reads_prompts_from_standard_input(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("小\n大\n".encode())))
    main(["generate", str(tiny_run), "--prompt", "-", "--max-new-tokens", "3", "--temperature", "0"])
    printed = capsys.readouterr().out
    assert printed.startswith("小") and "\n大" in printed
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(SystemExit, match="standard input is not UTF-8"):
        main(["generate", str(tiny_run), "--prompt", "-"])


def test_train_passes_its_options_to_train_py():
    done = tritale("train", "--train.max_steps", 0)
    assert done.returncode == 1 and done.stderr.decode().startswith("train.py: train.max_steps is 0; it must be")
    help_text = tritale("train", "--help").stdout.decode()
    assert "--train.max_steps" in help_text and "--optim.lr" in help_text


@pytest.mark.parametrize("output", ["print", "rich.console.Console().print"])
def test_output_that_a_pipe_no_longer_reads_ends_the_command_silently(output):
    code = (
        f"import rich.console; from tritale.cli import main, sweep; sweep.run = lambda args: [{output}('x' * 100) for _ in range(10_000)]; "
    )
    code += "main.main(['sweep', 'x'])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.skipif(os.name == "nt", reason="/dev/full and closed streams are Unix's")
def test_a_closed_output_is_dropped_and_a_full_disk_is_said_in_words(tiny_run):
    shell = lambda end: subprocess.run(
        f"{sys.executable} -m tritale status {tiny_run} {end}", shell=True, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (shell(">&-").returncode, shell(">&-").stderr) == (0, "")
    full = shell("> /dev/full")
    assert full.returncode == 1 and "does not fit: the disk is full; free some space" in full.stderr and "Errno" not in full.stderr


def test_brackets_in_names_of_folders_are_text_and_no_markup(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    run = shutil.copytree(tiny_run, tmp_path / "[b]run[" / "b]")  # [/b] alone would raise MarkupError
    out = tmp_path / "[red]out"
    commands = {
        "instruct": [run / "data", "--out", out, "--samples", "5", "--held-out", "2"],
        "average": [run, "--last", "2"],
        "sweep": [run, "--samples", "1", "--max-new-tokens", "4"],
        "plan": ["--no-measure", "--data.source", run / "data"],
        "report": [run],
        "verify": [run],
    }
    for name, arguments in commands.items():
        main([name, *map(str, arguments)])
        assert str(out if name == "instruct" else run) in capsys.readouterr().out, name
    train(run, train__max_steps=7, resume="force")  # resumes: its output names the folder
    models = [{"model": "[b]a[/b]", "is_asked": True}, {"model": "x[/y]", "is_asked": False}]
    monkeypatch.setattr("tritale.evaluation.instructions_page.figures", lambda report: [])
    Console(markup=False, width=120).print(evaluate.table({"models": models}))
    assert "[b]a[/b]" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "latin-1", "cp1252"])
def test_help_and_errors_are_printed_in_any_encoding(tmp_path, encoding):
    done = tritale("sweep", tmp_path / "小🐰", PYTHONIOENCODING=encoding)
    message = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == 1 and "is not a folder" in message and "Traceback" not in message
    for name in COMMANDS:
        assert tritale(name, "--help", PYTHONIOENCODING=encoding).returncode == 0


def test_commands_start_without_modules_that_only_unix_has(tmp_path):
    for module in ("resource", "fcntl", "readline", "pwd", "grp", "termios", "tty"):
        (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}', name='{module}')\n")
    for name in COMMANDS:
        done = tritale(name, "--help", PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr.decode()
