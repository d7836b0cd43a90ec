"""A sample of the damage matrix. All of it: python -m tests.damage_matrix."""

import random

from tests.damage_matrix import matrix


def test_damaged_files_are_refused_reported_or_without_effect(tmp_path, seed):
    n, failures = matrix(tmp_path, lambda cells: random.Random(seed).sample(cells, 24))
    assert n == 24 and failures == []
