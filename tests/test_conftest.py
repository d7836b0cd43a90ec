"""Tests do not influence each other: what conftest.py restores and hides."""

import os
import subprocess
import sys

from runs import REPOSITORY

LEAKY = """
import pytest
import torch

torch.cuda.is_available = lambda: True  # as on a machine with a GPU

def test_one():
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.float64)

def test_two():
    assert torch.get_float32_matmul_precision() == "highest" and torch.get_default_dtype() == torch.float32

@pytest.fixture(scope="module")
def shared_has_gpu():
    return torch.cuda.is_available()

def test_on_the_cpu(shared_has_gpu):
    assert not torch.cuda.is_available() and not shared_has_gpu
"""


def test_settings_do_not_leak_and_only_kernel_tests_see_a_gpu(tmp_path):
    (tmp_path / "test_leaky.py").write_text(LEAKY, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", tmp_path]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
