"""Shared by all tests: kernels decorated for Triton's interpreter, a printed seed, and a finished tiny run.

Without a GPU the kernels are imported for Triton's interpreter before any test module imports them (harness/interpreter.py). The
environment stays plain: all other tests, and the processes they start, run the PyTorch path. A kernel test requests the fixture `device`
(tests/kernels/conftest.py), which sets TRITON_INTERPRET=1 for that test alone; `dispatch.interprets` reads it at each call. With a GPU the
same tests run natively. What must not be interpreted, the compile checks, runs in a process of its own (bench/machine_code.py).
"""

import importlib
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: the workers share the cores. This must happen before torch counts its threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "torch" not in sys.modules:  # it limits the spinning of OpenMP's threads
    importlib.import_module("tritale.common")

import pytest
import torch
from hypothesis import Phase, settings
from runs import train

from tests.kernels.harness.interpreter import interpret_kernels

# No shrinking: in the interpreter it would repeat a failing case some hundred times, for minutes.
settings.register_profile("tritale", deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
settings.load_profile("tritale")

if not torch.cuda.is_available():
    interpret_kernels()


SHARED = ("test_machine_code.py", "test_traffic.py")  # their tests share a fixture that takes minutes


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n`, any worker may run any test, but one worker runs all tests of a file in SHARED."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return path if path.endswith(SHARED) else nodeid

    return Scheduling(config, log)


@pytest.fixture
def seed() -> int:
    """A fresh seed, set in torch and printed so that a failure can be reproduced."""
    value = torch.seed() % 2**32
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The out_dir of a finished tiny run."""
    out_dir = tmp_path_factory.mktemp("tiny") / "run"
    train(out_dir)
    return out_dir
