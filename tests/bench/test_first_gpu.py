"""What bench.first_gpu keeps of tests that take too long."""

from bench import first_gpu


def test_tests_that_take_too_long_are_interrupted_and_list_what_failed(monkeypatch):
    start, _, _ = first_gpu.PYTEST.partition("sys.exit")
    code = """
import time
print("F.", flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("FAILED test_a.py\\n1 failed, 12 passed in 3.21s")
"""
    monkeypatch.setattr(first_gpu, "PYTEST", start + code)
    found = first_gpu.kernel_tests(10)
    assert found == {
        "status": "out of time",
        "failed": 1,
        "passed": 12,
        "output": "F.\nFAILED test_a.py\n1 failed, 12 passed in 3.21s\n",
        "end": "",
    }
