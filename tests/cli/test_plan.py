"""`tritale plan` and `tritale lr-find` as a user types them."""

import subprocess
import sys

import pytest
from runs import TINY, train

from tritale.cli.main import main
from tritale.cli.plan import duration
from tritale.data.shards import write_split
from tritale.data.tokenizer import Tokenizer
from tritale.training import processes


@pytest.fixture(autouse=True)
def plain_heap(monkeypatch):
    monkeypatch.setattr(processes, "keep_heap", lambda: None)  # changes the whole process


def overrides(out_dir, **options) -> list[str]:
    options = TINY | {"out_dir": out_dir} | {k.replace("__", "."): v for k, v in options.items()}
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def test_plan_and_train_print_the_same_rows(tiny_run, capsys, tmp_path):
    main(["plan", "--no-measure", *overrides(tiny_run)])
    ours = capsys.readouterr().out
    theirs = train(tiny_run).stdout  # the run is complete: it validates and ends
    for row in ("model", "step", "run", "learning rate"):
        line = next(line for line in theirs.splitlines() if line.startswith(f"{row}  ") or line.startswith(f"{row} "))
        value = " ".join(line.removeprefix(row).split())
        assert value in " ".join(ours.split())
    assert "vLLM on a CPU does not take heads of 16" in ours and "vLLM on a CPU does not take heads of 16" in theirs


def test_a_measured_plan_prints_a_time(tiny_run):
    command = [sys.executable, "-m", "tritale.cli.main", "plan", *overrides(tiny_run)]
    out = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert "for 6 steps of" in " ".join(out.split()) and "tokens/s (measured now" in " ".join(out.split())


def test_data_can_be_given_by_numbers(tmp_path, capsys):
    main(["plan", "--no-measure", "--tokens", "1000000", "--vocab-size", "700", "--processes", "2", *overrides(tmp_path)])
    out = " ".join(capsys.readouterr().out.split())
    assert "1,000,000 tokens" in out and "vocabulary 700 (as given)" in out and "3,906 steps per epoch" in out and "2 ×" in out


def test_data_that_train_could_not_read_is_reported(tmp_path, capsys):
    plan = lambda source, *more: main(["plan", "--no-measure", *more, *overrides(tmp_path, data__source=source)])
    plan(tmp_path / "nowhere")
    out = capsys.readouterr().out
    assert f"warning: there is no prepared data at {tmp_path / 'nowhere'}" in out and "No warnings" not in out
    plan(tmp_path / "nowhere", "--tokens", "100000000")
    assert "there is no prepared data" not in capsys.readouterr().out

    texts = [f"第{i}天" for i in range(40)]
    tokenizer, data = Tokenizer.train(texts, 300), tmp_path / "data"
    tokenizer.save(data / "tokenizer")
    write_split(data / "train", texts, tokenizer)
    with pytest.raises(SystemExit, match=r"validation.index\.json is missing"):
        plan(data)
    write_split(data / "validation", texts, tokenizer)
    plan(data)
    assert "40 documents" in capsys.readouterr().out
    Tokenizer.train(texts, 270).save(data / "tokenizer")
    with pytest.raises(SystemExit, match="was made with another tokenizer"):
        plan(data)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--processes", "3"], r"processes \(3\) must divide"),
        (["--train.context", "100"], "longer than the model's"),
        (["--train.max_stepz", "3"], "did you mean 'train.max_steps'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model.vocab_size", "700", "--vocab-size", "600"], "set --model.vocab_size 600"),
    ],
)
def test_bad_input_ends_with_a_message(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as exit:
        main(["plan", "--no-measure", *overrides(tmp_path), *arguments])
    assert exit.value.code != 0


def test_an_unknown_argument_of_another_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--model", "x", "--train.max_steps", "3"])
    assert "--train.max_steps is not an option" in capsys.readouterr().err


def test_durations_are_readable():
    assert [duration(s) for s in (0.25, 70, 1800, 9000, 5 * 86400)] == ["0.25 s", "70 s", "30 minutes", "2.5 hours", "5.0 days"]


def test_the_range_test_makes_a_curve_and_a_suggestion(tiny_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    before = sorted(p.name for p in tiny_run.iterdir())
    options = overrides(tiny_run, optim__embedding_lr="0.004")
    main(["lr-find", "--steps", "40", "--lowest", "1e-4", "--highest", "3", "--out", str(tmp_path / "c.png"), *options])
    out = capsys.readouterr().out
    assert "--optim.lr 0." in out and "--optim.embedding_lr 0." in out and (tmp_path / "c.png").stat().st_size > 10_000
    assert sorted(p.name for p in tiny_run.iterdir()) == before


@pytest.mark.parametrize(
    "arguments", [["--steps", "3"], ["--lowest", "0"], ["--lowest", "1", "--highest", "0.1"], ["--lowest", "nan"], ["--highest", "inf"]]
)
def test_bad_ranges_are_refused(arguments, tmp_path):
    with pytest.raises(SystemExit, match="must be"):
        main(["lr-find", *overrides(tmp_path), *arguments])
