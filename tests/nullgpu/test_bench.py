"""The benchmarks and the test suite on a machine with a GPU: all of it is collected, and each benchmark runs a round on the GPU."""

import json

from tests.nullgpu.build import run

ROWS = """
import json, pytest, sys
from bench.conftest import ROWS

class Plugin:
    def pytest_collection_modifyitems(self, items):
        for item in items:
            if hasattr(item.module, "largest_gap"):
                item.module.largest_gap = lambda *_: 0.0  # of the logits of generated tokens, which no kernel has computed

    def pytest_sessionfinish(self, session):
        print("ROWS" + json.dumps(session.config.stash[ROWS]))

sys.exit(pytest.main([*sys.argv[1:], "-s", "-p", "no:cacheprovider"], plugins=[Plugin()]))
"""


def benchmarked(*files: str) -> tuple[dict, str]:
    """({case: row} of ours, what was printed) of one round of the benchmarks in these files."""
    output = run("-c", ROWS, *files).stdout
    rows = json.loads(next(line.partition("ROWS")[2] for line in output.splitlines() if "ROWS[" in line))
    names = ("suite", "case", "model", "dtype", "pass", "contender")
    return {tuple(row.get(name) for name in names): row for row in rows if row["contender"].startswith("ours")}, output


def test_generation_is_benchmarked():
    ours, output = benchmarked("bench/test_generate.py")
    assert all(row["device"] == "cuda" and row["status"] == "ok" for row in ours.values())
    assert sorted(row["tokens"] for row in ours.values()) == [4, 4, 12, 12, 128, 128]
    assert "GPU memory" in output  # of `tritale generate`


def test_ops_and_training_steps_are_benchmarked():
    ours, _ = benchmarked("bench/test_ops.py", "bench/test_training_step.py")
    assert {key[0] for key in ours} == {"ops", "training step", "scaling"}
    assert all(row["status"] == "ok" for row in ours.values())


def test_the_whole_suite_is_collected():
    run("-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "tests", "bench")


def test_all_but_the_kernel_tests_and_the_processes_they_start_run_on_the_cpu():
    tests = ("tests/training/test_step.py", "tests/training/test_train.py::test_a_run_writes_metrics_and_checkpoints")
    assert " passed" in run("-m", "pytest", "-p", "no:cacheprovider", *tests).stdout
