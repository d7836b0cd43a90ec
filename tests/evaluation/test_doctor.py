"""Runs that are broken on purpose, each named rightly and nothing else said about it, and good runs, about which nothing is said.

Real runs are trained here, on tiny models. Made runs have metrics that the real Log wrote from given curves (tests/made_runs.py).
"""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import made_run, usual_loss
from runs import run_here

from tritale.cli.main import main as tritale
from tritale.common.errors import UserError
from tritale.data.built_in import write_built_in
from tritale.data.shards import Split, write_split
from tritale.data.tokenizer import Tokenizer
from tritale.evaluation.doctor import RULES, diagnose
from tritale.evaluation.run_facts import RunFacts
from tritale.training.step import TrainingStep

GOOD_STORY = "从前有一只小兔，它住在森林里。一天早上，小兔遇见了小熊，他们一起去河边采花，玩得很开心。"


def names(out_dir: Path) -> list[str]:
    return [d.name for d in diagnose(RunFacts.read(out_dir))]


def check(out_dir: Path, name: str, *words: str) -> None:
    """The run has one diagnosis, with this name, and these words are in its evidence and remedy."""
    (found, *others) = diagnose(RunFacts.read(out_dir))
    assert not others
    assert found.name == name
    for word in words:
        assert word in found.evidence + found.remedy, found


# ---- real runs -----------------------------------------------------------------------------------------------------------------------

REAL: dict[str, Any] = {
    "model__n_layer": 3, "optim__embedding_lr": "null", "optim__lr": 0.01, "train__validate_every": 1000, "train__checkpoint_every": 1000,
    "log__prompts": '["小"]',
}  # fmt: skip
LARGE_STEPS: dict[str, Any] = {"train__max_steps": 52, "train__global_batch": 32, "train__micro_batch": 32}  # of 2,048 tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "stories"
    write_built_in(folder, seed=1, stories=200, validation_stories=8, vocab_size=600)
    return folder


def other_texts(data: Path, folder: Path, texts: list[str]) -> Path:
    """Data with these texts and the tokenizer of `data`."""
    tokenizer = Tokenizer.load(data / "tokenizer")
    tokenizer.save(folder / "tokenizer")
    for split in ("train", "validation"):
        write_split(folder / split, texts if split == "train" else texts[:4], tokenizer)
    return folder


def test_a_real_run_with_a_rate_that_is_too_low(data, tmp_path):
    run_here(tmp_path / "run", **REAL | {"optim__lr": 1e-6}, data__source=data, train__max_steps=60)
    check(tmp_path / "run", "rate_too_low", "rates of these steps add up to", "optim.lr: 0.002")


def test_a_real_run_with_a_rate_that_is_too_high(data, tmp_path):
    run_here(tmp_path / "run", **REAL | LARGE_STEPS | {"optim__lr": 3}, data__source=data)
    check(tmp_path / "run", "rate_too_high", "optim.lr: 0.004")


def test_a_real_run_that_becomes_nan(data, tmp_path, monkeypatch):
    update, calls = TrainingStep.update, itertools.count()

    def burst(self):
        if next(calls) >= 56:
            self.model.embedding.grad.fill_(float("inf"))
        return update(self)

    monkeypatch.setattr(TrainingStep, "update", burst)
    run_here(tmp_path / "run", **REAL, data__source=data, train__max_steps=60)
    check(tmp_path / "run", "not_finite", "4 of 60 steps were skipped", "optim.lr: 0.0033")


def test_a_real_run_on_shuffled_text_learns_only_frequencies(data, tmp_path):
    split, tokenizer = Split.open(data / "train"), Tokenizer.load(data / "tokenizer")
    text = "".join(tokenizer.decode(split.document(i).tolist()) for i in range(split.n_documents))
    whole = {c for c in set(text) if len(tokenizer.encode(c)) == 1}  # the bytes of the others could be learned
    text = [c for c in text if c in whole]
    random.Random(1).shuffle(text)
    shuffled = other_texts(data, tmp_path / "shuffled", ["".join(text[i : i + 200]) for i in range(0, len(text), 200)])
    run_here(tmp_path / "run", **REAL | LARGE_STEPS, data__source=shuffled)
    check(tmp_path / "run", "only_frequencies", "since half of the run", "shuffled")


def test_a_real_run_on_repeated_text_repeats_itself(data, tmp_path):
    loops = other_texts(data, tmp_path / "loops", [f"小{animal}" + "送给小熊一个皮球，" * 20 for animal in "兔猫狗鸟羊马" * 10])
    run_here(tmp_path / "run", **REAL, data__source=loops, train__max_steps=60, log__sample_tokens=60)
    check(tmp_path / "run", "repetition", "4-grams", "--repetition-penalty")


def test_a_real_run_whose_vocabulary_takes_most_of_the_parameters(tmp_path, data):
    run_here(tmp_path / "run", **REAL | {"model__n_layer": 2, "model__mlp_width": 32}, data__source=data)
    check(tmp_path / "run", "vocabulary", "28,800 of", "--vocab-size 300")


def test_a_real_run_of_too_many_epochs(data, tmp_path):
    split, tokenizer = Split.open(data / "train"), Tokenizer.load(data / "tokenizer")
    few = other_texts(data, tmp_path / "few", [tokenizer.decode(split.document(i).tolist()) for i in range(4)])
    run_here(tmp_path / "run", **REAL, data__source=few, train__max_steps=100)
    check(tmp_path / "run", "epochs", "epochs; after about 16", "train.max_steps: ")


def test_a_real_run_whose_rate_never_came_down(data, tmp_path):
    run_here(tmp_path / "run", **REAL, data__source=data, train__max_steps=24, optim__schedule="wsd", optim__decay_fraction=0)
    check(tmp_path / "run", "schedule", "66.7% of the peak", "optim.decay_fraction: 0.3")


def test_a_real_run_that_began_again_since_there_was_no_checkpoint(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("train.print_samples", lambda model, tokenizer, config, log, step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(tmp_path / "run", **REAL, data__source=data, train__max_steps=12, train__sample_every=8)
    run_here(tmp_path / "run", **REAL, data__source=data, train__max_steps=12)
    check(tmp_path / "run", "resume", "start 2 began at step 0, though step 8 had been reached", "train.checkpoint_every: 2")


def test_a_real_run_that_runs_out_of_memory(data, tmp_path, monkeypatch):
    def fail(self, batch, is_last=True):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.26 GiB. GPU 0 has a total capacity of 23.69 GiB")

    monkeypatch.setattr(TrainingStep, "backward", fail)
    with pytest.raises(UserError, match="out of memory with"):
        run_here(tmp_path / "run", **REAL, data__source=data)
    check(tmp_path / "run", "memory", "Tried to allocate 4.26 GiB", "train.micro_batch: 1")


# ---- made runs -----------------------------------------------------------------------------------------------------------------------


def test_a_loss_that_falls_and_then_rises(tmp_path):
    made_run(tmp_path / "run", until=6000, loss=lambda s: usual_loss(s) if s < 3000 else min(6.0, 2 + (s - 3000) / 400), end="killed")
    check(tmp_path / "run", "rate_too_high", "it rose from 1.9", "optim.lr: 0.00017")


def test_memory_that_grows_until_the_process_is_killed(tmp_path):
    made_run(tmp_path / "run", until=9000, end="killed", columns={"memory_gib": lambda s: 2.3 + s / 900})
    check(tmp_path / "run", "memory", "7.36 at half, 12.30 now", "report a bug")


def test_a_process_that_was_killed_at_the_limit_of_the_memory(tmp_path):
    made_run(tmp_path / "run", until=900, end="killed", columns={"memory_gib": lambda s: 23.1}, train__micro_batch=4)
    check(tmp_path / "run", "memory", "used 23.1 GiB, and 24.0 GiB were free", "train.micro_batch: 2")


def test_the_schedule_of_the_series_that_never_came_down(tmp_path):
    """3e12 tokens planned, stopped by hand after 209,000 steps."""
    long: dict[str, Any] = {"train__max_steps": 11_444_091, "log__every": 1000, "train__validate_every": 20_000}
    made_run(tmp_path / "run", until=209_000, end=KeyboardInterrupt(), facts={"plan": {"steps_per_epoch": 13_100}}, **long)
    check(tmp_path / "run", "schedule", "99.9% of its peak", "874 epochs are planned", "optim.schedule: wsd, train.max_steps: 271700")


def test_overfitting(tmp_path):
    val_loss = lambda step: usual_loss(min(step, 8000)) + max(0, step - 8000) / 20_000
    made_run(tmp_path / "run", val_loss=val_loss, facts={"plan": {"steps_per_epoch": 500}})
    check(tmp_path / "run", "overfitting", "at step 8,000", "40.0 epochs", "train.max_steps: 8000")


def test_a_resume_with_another_rate_after_which_the_loss_jumps(tmp_path):
    made_run(tmp_path / "run", until=5000, end="killed")
    made_run(tmp_path / "run", start=5000, optim__lr=0.01, loss=lambda s: usual_loss(s) + 3 * 0.999 ** (s - 5000))
    check(tmp_path / "run", "resume", "changed there: optim.lr: 0.0005 → 0.01", "restore what was changed")


def test_work_that_is_lost_again_and_again(tmp_path):
    for start, until in ((0, 1900), (1000, 1950), (1000, 1900), (1000, 1990), (1000, 2400)):
        made_run(tmp_path / "run", start=start, until=until, end="killed")
    check(tmp_path / "run", "resume", "3,700 steps were made again after 4 resumes", "train.checkpoint_every: 250 (it is 1000)")


def test_bad_steps_and_overflow_in_fp16(tmp_path):
    made_run(tmp_path / "run", columns={"bad_steps": lambda s: s // 20}, facts={"device": {"precision": "fp16"}})
    check(tmp_path / "run", "not_finite", "1,000 of 20,000 steps were skipped", "train.precision: bf16")


SLOW: dict[str, dict[str, Any]] = {
    "slow_precision": dict(facts={"device": {"has_bf16": False, "name": "CPU, 8 threads", "kind": "cpu"}}),
    "slow_compile": dict(train__compile="false"),
    "slow_threads": dict(facts={"device": {"kind": "cpu", "threads": 1, "cores": 16}}),
    "slow_data": dict(columns={"data_share": lambda step: 0.6 + step % 3 / 10}),
    "slowing_down": dict(columns={"tokens_per_second": lambda step: 130_000 if step < 8000 else 50_000}),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_runs(tmp_path, name):
    made_run(tmp_path / "run", until=15_000, end="killed", **SLOW[name])
    check(tmp_path / "run", name)


def test_a_missing_compiler_is_named(tmp_path):
    made_run(tmp_path / "run", facts={"device": {"compiler_missing": "No working C++ compiler found"}})
    check(tmp_path / "run", "slow_compile", "No working C++ compiler", "apt install g++")


# ---- good runs -----------------------------------------------------------------------------------------------------------------------


def test_nothing_is_said_about_a_good_real_run_that_was_killed_and_resumed(data, tmp_path, capsys):
    options = REAL | LARGE_STEPS | {"data__source": data, "train__checkpoint_every": 20, "train__validate_every": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.print_samples", lambda model, tokenizer, config, log, step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(tmp_path / "run", **options, train__sample_every=24)
    assert names(tmp_path / "run") == []
    run_here(tmp_path / "run", **options)
    assert names(tmp_path / "run") == [] and [s["step"] for s in RunFacts.read(tmp_path / "run").starts] == [0, 20]
    capsys.readouterr()
    tritale(["doctor", str(tmp_path / "run")])
    assert capsys.readouterr().out == f"Nothing found by {len(RULES)} rules in 52 lines of metrics (finished, step 52).\n"


def test_nothing_is_said_about_a_good_run_at_any_step(tmp_path, seed):
    for until in range(100, 20_001, 1100):
        out_dir = made_run(tmp_path / str(until), until=until, end="killed", samples=(GOOD_STORY,), seed=seed)
        assert names(out_dir) == []


def test_nothing_is_said_about_a_good_run_on_a_cpu_with_a_spike_and_a_few_bad_steps(tmp_path):
    """The quick start: 800 steps, one epoch, wsd, in minutes, with one thread and without compilation."""
    made_run(
        tmp_path / "run",
        loss=lambda s: (0.7 + 7.5 * (1 + s / 20) ** -0.9) * (1.4 if 400 <= s < 410 else 1),
        facts={
            "plan": {"tokens_per_step": 2048, "steps_per_epoch": 840, "parameters": 1_400_000, "embedding": 524_288},
            "device": {"kind": "cpu", "precision": "fp32", "has_bf16": False, "threads": 1, "cores": 2},
        },
        columns={"bad_steps": lambda s: 2 if s > 300 else 0}, samples=(GOOD_STORY,), seconds=0.25, train__max_steps=800, log__every=10,
        optim__schedule="wsd", optim__lr=0.01, optim__embedding_lr=0.03, optim__warmup_steps=30, optim__decay_fraction=0.5,
        train__compile="false",
    )  # fmt: skip
    assert names(tmp_path / "run") == []


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_about_a_run_whose_only_line_is_its_last_step(tmp_path):
    made_run(tmp_path / "run", train__max_steps=4, optim__warmup_steps=1)  # the rate there is 0
    assert names(tmp_path / "run") == []


def test_nothing_is_said_without_data(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 2, "los')
    assert names(tmp_path) == []
