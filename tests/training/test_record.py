"""run.json and samples.jsonl: what they hold, and that a resume continues them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_runs import made_run
from runs import REPOSITORY, run_here

from tritale.common.errors import UserError
from tritale.common.files import is_locked, locked
from tritale.data.shards import Split
from tritale.data.tokenizer import Tokenizer
from tritale.evaluation.run_facts import RunFacts
from tritale.training.profiling import profiled
from tritale.training.record import read_record, token_entropy


def samples(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_its_facts_samples_and_report(tmp_path):
    out_dir = tmp_path / "run"
    run_here(out_dir, train__sample_every=2, log__prompts='["小", "大"]')
    record = read_record(out_dir)
    assert record["plan"]["tokens_per_step"] == 256 and record["config"]["train.max_steps"] == 6
    assert record["device"]["precision"] == "fp32" and record["data"]["vocab_size"] == 600
    (start,) = record["starts"]
    assert (start["step"], start["logged"], start["pid"], start["end"]) == (0, 0, os.getpid(), "finished")
    assert [(s["step"], s["prompt"]) for s in samples(out_dir)] == [(s, p) for s in (2, 4, 6) for p in ("小", "大")]
    assert (out_dir / "report.html").read_text(encoding="utf-8").count("<details") == 4

    run_here(out_dir, train__sample_every=2, log__prompts='["小", "大"]')  # it is complete: only the last samples are printed again
    assert [s["step"] for s in samples(out_dir)] == [2, 2, 4, 4, 6, 6] and len(read_record(out_dir)["starts"]) == 2


def test_a_failed_run_records_its_error_and_the_resumed_one_drops_later_samples(tmp_path, monkeypatch):
    out_dir, options = tmp_path / "run", {"train__sample_every": 2, "log__prompts": '["小"]'}
    with monkeypatch.context() as patch:
        patch.setattr("train.validate", lambda *args, **other: (1.0, 1.0) if not samples(out_dir)[3:] else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(out_dir, train__max_steps=9, **options)
    assert [s["step"] for s in samples(out_dir)] == [2, 4, 6, 8]
    assert read_record(out_dir)["starts"][0]["end"] == "ZeroDivisionError: division by zero"
    assert "division by zero" in (out_dir / "report.html").read_text(encoding="utf-8")
    run_here(out_dir, train__max_steps=9, **options)
    assert [s["step"] for s in samples(out_dir)] == [2, 4, 6, 8, 9]
    starts = read_record(out_dir)["starts"]
    assert [(s["step"], s["logged"], s["changed"], s["end"]) for s in starts][1] == (6, 9, [], "finished")


def test_a_config_that_is_refused_leaves_the_record_as_it_is(tmp_path):
    run_here(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(UserError, match="holds a run with another config"):
        run_here(tmp_path / "run", optim__lr=0.5)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_damaged_record_does_not_stop_a_run(tmp_path):
    run_here(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"config": 3')
    run_here(tmp_path / "run")
    assert len(read_record(tmp_path / "run")["starts"]) == 1


def test_any_text_of_a_sample_survives_a_resume(tmp_path):
    texts = ("一\u2028二\x85三\x0b四\r五\n六", "\ufffd\x00", '"}')
    made_run(tmp_path / "run", until=100, end="killed", samples=texts)
    made_run(tmp_path / "run", start=100, until=150, end="killed")
    assert tuple(s["text"] for s in RunFacts.read(tmp_path / "run").samples) == texts


def test_the_entropy_of_tokens_is_the_loss_of_a_model_of_frequencies(tiny_run):
    split = Split.open(tiny_run / "data" / "train")
    tokens = np.concatenate([split.document(i) for i in range(split.n_documents)])
    frequency = np.bincount(tokens, minlength=Tokenizer.load(tiny_run / "data" / "tokenizer").vocab_size) / len(tokens)
    assert token_entropy(split) == pytest.approx(-np.log(frequency[tokens]).mean())


def test_a_lock_is_seen_without_taking_it(tmp_path):
    assert not is_locked(tmp_path)
    with locked(tmp_path, "x"):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    code = "import sys; from pathlib import Path; from tritale.common.files import is_locked\nwhile True: is_locked(Path(sys.argv[1]))"
    watcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    try:
        for _ in range(200):  # a process that looks all the time does not keep a run from starting
            with locked(tmp_path, "x"):
                pass
    finally:
        watcher.kill()
        watcher.wait()


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path):
    import gzip

    import torch

    said, x = [], torch.ones(8, 8)
    with profiled(2, tmp_path, 10, said.append) as step:
        for _ in range(8):
            (x @ x).sum()
            step()
    events = json.loads(gzip.open(tmp_path / "profile.json.gz").read())["traceEvents"]
    assert sum(e["name"] == "aten::mm" for e in events) == 2
    assert said == [f"profile of steps 14 to 15: {tmp_path}/profile.json.gz; open it at https://ui.perfetto.dev or chrome://tracing"]
    with profiled(3, tmp_path, 0, said.append) as step:
        step()
    assert said[1].startswith("no profile: the run ended before step 4")
