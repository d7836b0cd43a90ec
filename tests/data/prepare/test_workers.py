import os
from itertools import count

import pytest

from tritale.common.errors import UserError
from tritale.data.prepare.workers import Workers


def test_results_come_in_order():
    with Workers(2) as pool:
        found = list(pool.map(pow, ((i, (i, 2)) for i in range(30))))
    assert found == [(i, i * i) for i in range(30)]


def test_a_killed_worker_is_reported():
    with Workers(2) as pool, pytest.raises(UserError, match=r"a worker process was killed, .* use fewer --workers than 2"):
        list(pool.map(os._exit, ((i, (9,)) for i in count())))
