"""Shared by all tests: the kernels decorated for the interpreter, a printed seed, and a finished tiny run.

Whether Triton interprets a kernel is decided when it is decorated. So, without a GPU, the kernels (and Triton's own) are imported here,
before any test module imports them, under TRITON_INTERPRET=1, and the variable is taken away again: all other tests, and the processes
they start, see the plain environment and the PyTorch path. A kernel test asks for the fixture `device` (tests/kernels/conftest.py), which
sets the variable for that test alone, since `dispatch.interprets` reads it at each call. With a GPU nothing of this happens and the same
tests run natively. What must not be interpreted, the compile checks, runs in a process of its own (harness/compile_matrix.py).
"""

import importlib
import os
import pkgutil
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: the workers share the cores; before torch counts its threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import Phase, settings
from runs import train

# Without shrinking: in the interpreter a failing case would run some hundred times more, for minutes.
settings.register_profile("tritale", deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
settings.load_profile("tritale")

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import tritale.kernels

    for module in pkgutil.iter_modules(tritale.kernels.__path__, "tritale.kernels."):
        importlib.import_module(module.name)
    del os.environ["TRITON_INTERPRET"]


def pytest_configure(config):
    """Under `pytest -n` tests of one xdist_group (they share something that takes minutes to make) go to one worker."""
    if hasattr(config, "workerinput"):
        config.option.loadgroup = True
    elif getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed so that a failure can be repeated, and given to torch."""
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
