"""Lets the kernel tests run Triton's interpreter in a process where everything else runs as usual.

Whether a kernel can be interpreted is decided when it is decorated. So, without a GPU, the kernels (Triton's own among them) are
decorated here, before any test module imports them, under TRITON_INTERPRET=1, and the variable is taken away again: all other tests, and
the processes they start, see the plain environment and the PyTorch path. A kernel test asks for the fixture `device`
(tests/kernels/conftest.py), which sets the variable back for that test, since `dispatch.interprets` reads it at each call. With a GPU
nothing of this happens and the same tests run natively. What must not be interpreted, the compile checks, runs in a process of its own
(tests/kernels/harness/compile_matrix.py).
"""

import importlib
import os
import pkgutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `from tests.kernels.harness import …`

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import tritale.kernels

    for module in pkgutil.iter_modules(tritale.kernels.__path__, "tritale.kernels."):
        importlib.import_module(module.name)
    del os.environ["TRITON_INTERPRET"]
