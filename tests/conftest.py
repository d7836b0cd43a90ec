"""Shared by all tests: a printed seed, and a finished tiny run."""

from pathlib import Path

import pytest
import torch
from runs import train


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
