import os
import signal
import subprocess
import sys
from itertools import count

import pytest

from tritale.common.errors import UserError
from tritale.data.prepare.workers import Workers


def test_results_come_in_order():
    with Workers(2) as pool:
        found = list(pool.map(pow, ((i, (i, 2)) for i in range(30))))
    assert found == [(i, i * i) for i in range(30)]


SLEEP = """
import time
from tritale.data.prepare.workers import Workers
if __name__ == "__main__":
    with Workers(2) as pool:
        for i, (_, _) in enumerate(pool.map(time.sleep, ((i, (0.2,)) for i in range(1000)))):
            print(i, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no process groups")
def test_workers_end_at_ctrl_c_without_a_traceback(tmp_path):
    (tmp_path / "sleep.py").write_text(SLEEP, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "sleep.py")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment()
    )
    assert process.stdout and process.stdout.readline() == "0\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Process Spawn" not in errors, errors


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_a_killed_worker_is_reported():
    with Workers(2) as pool, pytest.raises(UserError, match=r"was killed at a\.txt:1 or after, .* use fewer --workers than 2"):
        list(pool.map(os._exit, ((i, (9,)) for i in count(1)), "a.txt:{}".format))
