"""Shared by all tests: kernels decorated for Triton's interpreter, a seed for each test, and a finished tiny run.

Without a GPU the kernels are imported for Triton's interpreter before any test module imports them (harness/interpreter.py). The
environment does not change: all other tests, and the processes they start, use the PyTorch path. A kernel test requests the fixture
`device` (tests/kernels/conftest.py), which sets TRITON_INTERPRET=1 for that test; `dispatch.interprets` reads it at each call. The compile
checks must not be interpreted and run in their own process (bench/machine_code.py).

With a GPU the kernel tests and those of the GPU's decoder run natively. All other tests and all child processes run on the CPU, so that
they compute the same everywhere.
"""

import importlib
import os
import signal
import sys
import zlib
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: the workers share the cores. This must happen before torch counts its threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "torch" not in sys.modules:  # tritale limits the spinning of OpenMP's threads; it must be imported before torch
    importlib.import_module("tritale")

import pytest
import torch
from hypothesis import Phase, settings
from runs import train

from tests.kernels.harness.interpreter import interpret_kernels

# No shrinking: in the interpreter it would repeat a failing case some hundred times, for minutes.
settings.register_profile("tritale", deadline=None, derandomize=True, phases=(Phase.explicit, Phase.reuse, Phase.generate))
settings.load_profile("tritale")

if torch.cuda.is_available():
    torch.cuda.init()
    torch.cuda.device_count()  # cached from here on, so that this process keeps its GPU when the variable changes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
else:
    interpret_kernels()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a script ignores Ctrl-C, and its children would do the same
    signal.signal(signal.SIGINT, signal.default_int_handler)

ON_GPU = {Path(__file__).parent / name for name in ("kernels", "inference/test_gpu_runner.py")}  # where there is one
SHARED = ("test_machine_code.py", "test_traffic.py")  # their tests share a fixture that takes minutes


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="draw other random numbers in all tests")
    parser.addoption("--null-gpu", action="store_true", help="also run tests/nullgpu, with PyTorch's CUDA build (docs/gpu.md)")
    parser.addoption("--signals", type=int, default=1, help="signals that each test of tests/training/test_disturbed.py sends to a run")


def pytest_sessionstart(session):
    config = session.config
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and reporter and not hasattr(config, "workerinput"):
        reporter.write_line("All tests take up to 25 minutes on two cores with -n 2. `pytest tests/model` runs those of one folder.")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `pytest -n`, any worker may run any test, but one worker runs all tests of a file in SHARED."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return path if path.endswith(SHARED) else nodeid

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hides the GPU from tests that are not in ON_GPU, and from the fixtures that several of them share, which are set up first."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU & {item.path, *item.path.parents}:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


@pytest.fixture(autouse=True)
def isolated():
    """Restores torch's global settings after each test."""
    precision, dtype, threads = torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)  # "high" is TF32
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """The seed of torch's random numbers: the same in every run of a test, another for each test and each `--seed`."""
    value = zlib.crc32(f"{request.node.nodeid} {request.config.option.seed}".encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The out_dir of a finished tiny run."""
    out_dir = tmp_path_factory.mktemp("tiny") / "run"
    train(out_dir)
    return out_dir
