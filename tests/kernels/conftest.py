import pytest
import torch

from tritale.kernels import dispatch


@pytest.fixture
def device(monkeypatch):
    """Where the Triton kernels run in this test: "cuda", or "cpu" through the interpreter (see tests/conftest.py)."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    if not dispatch.has_triton():
        pytest.skip("needs Triton (Linux)")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield "cpu"


@pytest.fixture(scope="session")
def machine_code():
    """What the ops' launchers launch, compiled for every architecture: once a session, shared by all checks of the binaries."""
    if not dispatch.has_triton():
        pytest.skip("needs Triton (Linux)")
    from bench import machine_code

    return machine_code.readings()
