"""The benchmark: its tables show what is wrong, cannot run or is faster than ours, and its checks find wrong contenders."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import measure, ops, trainers
from bench.measure import PROCESS_DIED, Stopwatch, each_in_a_fresh_process, interleaved, one_round, write_results
from bench.report import CHINESE, COLORS, short_table, slower_than_peers, tables
from bench.test_training_step import SCALED_TRAINERS, TRAINERS
from bench.trainers import status
from tritale.model.gpt import GPTConfig

ROOT = Path(__file__).parents[2]


def op_rows(contender: str, seconds: float, n_bytes: int | None, **changes) -> list[dict]:
    spread = {"median": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds, "rounds": 5}
    row = {"suite": "ops", "case": "swiglu", "model": "44m", "dtype": "fp32", "contender": contender, "status": "ok", "note": ""}
    row |= {"sizes": "8 × 16", "seconds": spread, "bytes": n_bytes, "rate": 1e9, "unit": "B/s", "share": 0.5, **changes}
    return [row | {"pass": p} for p in ("forward", "backward", "both")]


def step_row(contender: str, seconds: float, **changes) -> dict:
    spread = {"median": seconds, "low": seconds, "high": seconds, "rounds": 5}
    row = {"suite": "training step", "case": "training step", "model": "small", "contender": contender, "status": "ok", "note": ""}
    return row | {"dtype": "fp32", "tokens": 100, "parameters": 10, "seconds": spread, "bytes": 2**20, "loss": 1.0, **changes}


def scaling_row(contender: str, value: int) -> dict:
    return step_row(contender, 0.5) | {"suite": "scaling", "case": "batch", "value": value, "model": None}


def generation_row(contender: str, seconds: float, **changes) -> dict:
    return step_row(contender, seconds, **changes) | {"suite": "generation", "case": "generation", "bytes": None}


def listed(rows: list[dict]) -> list[str]:
    """The lines about what is faster or smaller than ours."""
    return [line for line in slower_than_peers(rows)[1:] if line != "- nothing is faster or smaller than ours."]


def test_a_trainer_is_right_only_if_its_first_steps_are():
    right = {"fp32": [18.7, 5.1, 10.0], "bf16": [18.6, 5.0, 10.1]}
    assert status(right, right | {"failed": "out of memory, in the whole batch"})["status"] == "ok"
    assert status({"fp32": [18.7, 5.1, 10.002], "bf16": right["bf16"]}, right)["status"] == "wrong"
    assert status({"fp32": right["fp32"], "bf16": [18.6, 5.3, 10.1]}, right)["status"] == "wrong"
    assert status({"fp32": [18.7, float("nan"), 10.0], "bf16": right["bf16"]}, right)["status"] == "wrong"
    assert status(right | {"failed": "out of memory"}, right) == {"status": "failed", "note": "out of memory"}
    assert status(right, {"failed": "died"})["status"] == "cannot run"


def fails(n: int) -> int:
    if n == 2:
        raise ValueError("two")
    if n == 3:
        os._exit(1)
    return n


def test_a_contender_that_raises_or_dies_leaves_the_others_their_results():
    found = each_in_a_fresh_process(fails, [(1,), (2,), (3,)], 2, lambda: None)
    assert found == {(1,): 1, (2,): {"failed": "ValueError: two"}, (3,): {"failed": PROCESS_DIED}}


def test_every_contender_has_a_colour():
    names = {c for contenders in ops.CONTENDERS.values() for c in contenders} | {*SCALED_TRAINERS, *TRAINERS}
    assert not {n for n in names if not n.startswith("ours without")} - set(COLORS)


def test_what_is_wrong_or_cannot_run_is_listed_without_figures():
    rows = op_rows("reference", 2.0, 2**20) + op_rows("ours", 1.0, 2**19)
    rows += op_rows("SDPA", 0.001, 1, status="wrong", note="differs by 3")
    without = {"suite": "ops", "case": "swiglu", "model": "44m", "dtype": "fp32", "pass": "both"}
    rows += [without | {"contender": "Liger-Kernel", "status": "cannot run", "note": "needs a GPU"}]
    rows += [without | {"contender": "flash-attn", "status": "failed", "note": "RuntimeError: no"}]
    rows += [step_row("reference, eager", 1.0), step_row("ours", 1.0), step_row("litgpt", 0.001, status="wrong", note="differs by 4")]
    rows += [generation_row("ours", 1.0), generation_row("litgpt", 0.001, status="wrong", note="differs by 5")]
    ops_table, steps, generation = tables(rows)
    lines = {line[2]: line for line in ops_table.lines}
    assert lines["ours"][7] == "2.00 ×" and lines["ours"][10] == "0.50 ×"
    assert lines["SDPA"][3:] == [""] * 8 + ["WRONG: differs by 3"]
    assert lines["Liger-Kernel"][3:] == [""] * 8 + ["needs a GPU"]
    assert lines["flash-attn"][3:] == [""] * 8 + ["FAILED: RuntimeError: no"]
    assert steps.lines[-1] == ["litgpt", *[""] * 6, "WRONG: differs by 4"]
    assert generation.lines[-1] == ["litgpt", "fp32", "", "", "", "WRONG: differs by 5"]
    assert not list(listed(rows))


def test_a_faster_or_smaller_peer_is_listed():
    rows = op_rows("reference", 2.0, 2**20) + op_rows("ours", 1.0, 2**20) + op_rows("SDPA", 0.5, 2**19)
    assert listed(rows) == ["- swiglu, 44m, fp32: SDPA is 2.00 × as fast; SDPA needs 0.50 × the memory."]
    assert slower_than_peers(rows)[0].startswith("Ours was compared 2 times with another; 0 cases were not compared")
    rows = [step_row("reference, eager", 2.0), step_row("ours", 1.0), step_row("litgpt", 0.8)]
    assert listed(rows) == ["- training step, small, fp32: litgpt is 1.25 × as fast."]
    rows = [scaling_row("ours", 4), scaling_row("transformers Mistral", 4) | {"bytes": 2**19}]
    assert listed(rows) == ["- scaling, batch 4, fp32: transformers Mistral needs 0.50 × the memory."]


def test_training_step_table_has_tokens_per_second_and_the_ablation_its_own():
    off = step_row("ours without attention", 2.0, ours_beside_it={"median": 1.0})
    rows = [step_row("reference, eager", 2.0), step_row("ours", 0.5), off]
    trainers, ablation = tables(rows)
    assert trainers.lines[1][:2] == ["ours", "200"] and trainers.lines[1][3] == "4.00 ×"
    assert ablation.lines[0][:2] == ["attention", "0.50 ×"]


def test_readme_table_compares_ours_with_the_fastest_other_library_in_both_languages():
    rows = [generation_row("ours", 1.0), generation_row("litgpt", 2.0), generation_row("transformers", 4.0)]
    rows += [
        step_row("reference, eager", 0.1),
        step_row("ours", 1.0),
        step_row("litgpt", 0.8),
        step_row("transformers Mistral", 0.9, bytes=1),
    ]
    *_, steps, generation = short_table(rows, {}).splitlines()
    assert steps == "| training step, small, fp32 | 100 | 125 (litgpt) | 0.80 × | 1.00 × |"
    assert generation == "| generation, small, fp32 | 100 | 50 (litgpt) | 2.00 × |  |"
    assert short_table(rows, CHINESE).splitlines()[-1] == "| 生成，small，fp32 | 100 | 50 (litgpt) | 2.00 × |  |"


def test_report_writes_page_and_charts(tmp_path):
    rows = op_rows("reference", 2.0, 2**20) + op_rows("ours", 1.0, 2**20)
    rows += [step_row("reference, eager", 2.0), step_row("ours", 1.0)]
    rows += [scaling_row(name, value) for name in ("reference", "ours") for value in (1, 2)]
    machine = {"name": "Test", "slug": "test", "device": "cpu", "simd": "AVX2", "half_precision": None, "seconds": 60}
    machine |= {"torch": "2", "commit": "abc", "date": "now"}
    write_results(tmp_path / "test.json", machine, rows)
    assert json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))["rows"] == rows
    arguments = [sys.executable, "-m", "bench.report", str(tmp_path / "test.json"), "--out", str(tmp_path)]
    subprocess.run(arguments, cwd=ROOT, check=True)
    page = (tmp_path / "test.md").read_text(encoding="utf-8")
    for part in ("training-step", "speed", "memory", "scaling"):
        assert (tmp_path / f"test-{part}.png").stat().st_size > 10_000 and f"(test-{part}.png)" in page


def test_report_rejects_other_files(tmp_path):
    for name, content, complaint in (("none.json", None, "does not exist"), ("bad.json", '{"a": 1}', "not a results file")):
        if content:
            (tmp_path / name).write_text(content, encoding="utf-8")
        run = subprocess.run([sys.executable, "-m", "bench.report", str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 1 and complaint in run.stderr


@pytest.mark.parametrize("op", ops.CONTENDERS)
def test_contenders_compute_what_the_reference_does_and_a_wrong_one_is_found(op):
    case = ops.case(op, "tiny", "fp32")
    definition = case.functions[ops.REFERENCE]
    grads = ops.output_gradients(definition, case.inputs)
    want = ops.exact(definition, case.inputs, grads)
    for name, function in case.functions.items():
        if name in (ops.COMPILED, ops.CUT):  # compiling them takes seconds
            continue
        outputs, found, _ = one_round(Stopwatch(), (function, case.inputs, grads))
        assert ops.error([*outputs, *found], want) < ops.TOLERANCE["fp32"], name
        bad = [outputs[0] * 1.001, *outputs[1:], *found]
        assert ops.error(bad, want) > ops.TOLERANCE["fp32"]
        nan = [*outputs, found[0] * torch.nan, *found[1:]]
        assert ops.error(nan, want) == float("inf")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_fused_loss_without_the_softmax_in_its_gradient_is_found(dtype):
    case = ops.case("linear_cross_entropy", "tiny", dtype)
    grads = [torch.ones(())]
    want = ops.exact(case.functions[ops.REFERENCE], case.inputs, grads)

    def without_softmax(x, weight, targets):
        return -(x.float() * weight.float()[targets]).sum(-1).mean()

    loss = want[0].float()
    _, found, _ = one_round(Stopwatch(), (without_softmax, case.inputs, grads))
    assert ops.error([loss, *want[1:]], want) < ops.TOLERANCE[dtype]
    assert ops.error([loss, found[0], want[2]], want) > 3 * ops.TOLERANCE[dtype]
    assert ops.error([loss, want[1], found[1]], want) > 3 * ops.TOLERANCE[dtype]


def test_on_a_gpu_kernels_queue_up_behind_a_wait_longer_than_their_launches(monkeypatch):
    waits = []

    class OnAGPU(Stopwatch):
        def __init__(self):
            super().__init__()
            self.flush = torch.empty(0)

        def mark(self):
            return time.perf_counter()

        def seconds(self, start, end):
            return end - start

        def cold(self, head_start):
            waits.append(head_start)

    monkeypatch.setattr(measure, "Stopwatch", OnAGPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    interleaved({"slow": (lambda t: time.sleep(0.05) or t.sum(), [torch.ones(2, requires_grad=True)], [torch.ones(())])}, 2)
    assert waits[:2] == [0, 0] and waits[2] == waits[3] >= 1.5 * 0.05


def test_on_a_gpu_each_trainer_runs_alone(monkeypatch):
    started = []

    @contextlib.contextmanager
    def processes(function, jobs, at_once, tick):
        started.append(list(jobs))
        yield {name: SimpleNamespace(first={"failed": "no GPU"}, pipe=None) for name in jobs}

    monkeypatch.setattr(trainers, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(trainers, "fresh_processes", processes)
    jobs = [trainers.Job(name, GPTConfig.preset("tiny"), 1, 8, 1) for name in "ab"]
    assert list(trainers.measure(jobs, 1)) == ["a", "b"] and started == [["a"], ["b"]]


def test_rounds_are_taken_in_turns():
    called = []
    x = torch.ones(2, requires_grad=True)
    calls = {name: (lambda t, name=name: called.append(name) or t.sum(), [x], [torch.ones(())]) for name in "ABC"}
    times = interleaved(calls, 30)
    turns = ["".join(called[i : i + 3]) for i in range(0, 90, 3)]
    assert len(called) == 90 and all(sorted(turn) == list("ABC") for turn in turns)
    assert len({turn[0] for turn in turns}) == 3  # each is the first of a turn
    assert all(len(t["both"]) == 30 and t["both"][0] == t["forward"][0] + t["backward"][0] for t in times.values())
