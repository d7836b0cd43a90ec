import pytest

from tests.nullgpu import build


@pytest.fixture(autouse=True)
def null_gpu(request):
    """Skips a test without --null-gpu, or where the null GPU cannot be built."""
    if not request.config.getoption("--null-gpu"):
        pytest.skip("opt-in: pytest --null-gpu tests/nullgpu (docs/gpu.md)")
    if reason := build.missing():
        pytest.skip(reason)
