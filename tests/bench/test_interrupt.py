"""Ctrl-C while the kernels are compiled leaves no process behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from runs import REPOSITORY

from tritale.kernels import dispatch

CODE = """
import signal
from bench.machine_code import readings
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
readings(targets=("sm_80",), ops=("swiglu",), models=("44m",))
"""


@pytest.mark.skipif(not dispatch.has_triton(), reason="needs Triton (Linux)")
def test_an_interrupt_ends_the_compile_process_and_its_workers(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", CODE], cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    end = time.monotonic() + 120
    while len(children) < 3 and time.monotonic() < end:  # the compile process, its resource tracker, a worker
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert len(children) >= 3 and process.wait(60) != 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
