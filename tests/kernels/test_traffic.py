"""Bytes moved by every op's kernels, counted in the interpreter, against the ideal or the stated formula."""

import pytest
import torch

from bench import traffic
from tritale.kernels import dispatch

AT_MOST = 1.05


@pytest.fixture(scope="module")
def rows():
    if torch.cuda.is_available() or not dispatch.has_triton():
        pytest.skip("counts in Triton's interpreter, which needs a machine without a GPU")
    return {(row["op"], row["pass"]): row for row in traffic.readings()}


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu"])
def test_each_input_is_read_once_and_each_output_written_once(rows, op, which):
    row = rows[op, which]
    assert 1 <= row["ratio"] <= AT_MOST, row


def test_a_step_of_generation_reads_the_cache_once(rows):
    row = rows["decode_attention", "forward"]
    assert 1 <= row["ratio"] <= AT_MOST, row


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy chunk"])
def test_losses_read_the_logits_twice_and_write_their_gradient_once(rows, op):
    row = rows[op, "both"]
    assert 1 <= row["ratio"] <= AT_MOST, row


@pytest.mark.parametrize(
    "key", [("flash_attention", "forward"), ("flash_attention", "backward"), ("linear_cross_entropy recompute", "both")], ids=str
)
def test_kernels_of_tiles_move_what_their_formula_says(rows, key):
    assert 1 <= rows[key]["formula_ratio"] <= AT_MOST, rows[key]
