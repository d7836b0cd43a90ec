"""The binaries of all kernels on all generations: no spills, whole loads, tensor cores, within the budgets kept in budgets.json."""

import json

import pytest

from tests.kernels.harness.compile_matrix import BUDGETS, NEEDS_TENSOR_CORES, TARGETS, budgets
from tritale.kernels.launch import SHARED_MEMORY

# Kernels that stream their tensors. What they may load or store in narrower pieces are vectors that stay in cache, and partial sums.
MEMORY_BOUND = ("rms_norm", "add_rms_norm", "rope", "rope packed", "qk_norm_rope", "swiglu", "geglu", "cross_entropy")
TENSOR_CORES = {"sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_120": "HMMA", "sm_90": "GMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}
SLACK = 8  # registers that another version of Triton may take more than the one of the budgets


def is_mostly_wide(row):
    return row["load_128"] > row["load_narrower"] and row["store_128"] > row["store_narrower"]


def name(row):
    return f"{row['op']} / {row['model']} / {row['kernel']}"


@pytest.fixture(params=TARGETS)
def rows(request, machine_code):
    return [row for row in machine_code if row["target"] == request.param]


def test_every_op_compiles_within_the_block_limits(rows):
    assert not [f"{name(row)}: {row['error']}" for row in rows if "error" in row]
    ops = {row["op"] for row in rows}
    assert {*MEMORY_BOUND, "linear_cross_entropy"} <= ops
    assert rows[0]["target"] == "sm_75" or {*NEEDS_TENSOR_CORES} <= ops
    assert not [f"{name(r)}: {r['shared']} bytes" for r in rows if r["shared"] > SHARED_MEMORY[r["target"]]]


def test_nothing_spills_and_nothing_is_atomic(rows):
    assert not [f"{name(r)}: STACK {r['stack']} LOCAL {r['local']}" for r in rows if r["stack"] or r["local"]]
    assert not [name(r) for r in rows if r["atomics"]]


def test_memory_bound_kernels_move_128_bits_at_a_time(rows):
    narrow = [
        f"{name(r)}: loads {r['load_128']} of 128 bits, {r['load_narrower']} narrower; stores {r['store_128']}, {r['store_narrower']}"
        for r in rows
        if r["op"] in MEMORY_BOUND
        and not (r["load_128"] and r["store_128"] and (r["op"] == "cross_entropy" or is_mostly_wide(r)))  # its results of a row are narrow
    ]
    assert not narrow


def test_products_of_blocks_use_tensor_cores(rows):
    wanted = TENSOR_CORES.get(rows[0]["target"])
    products = [r for r in rows if r["has_dot"]]
    assert (wanted is None) == (not products)
    assert not [f"{name(r)}: {r['tensor_core']}" for r in products if not any("MMA" in t or "mfma" in t for t in r["tensor_core"])]


def test_registers_shared_memory_and_occupancy_keep_to_the_budgets(rows):
    import triton

    kept = json.loads(BUDGETS.read_text())
    slack = 0 if kept["triton"] == triton.__version__ else SLACK
    target, worse = rows[0]["target"], []
    for kernel, now in budgets(rows)[target].items():
        budget = kept[target].get(kernel)
        assert budget, f"{kernel} has no budget for {target}: python -m tests.kernels.harness.compile_matrix --write-budgets"
        over = now["registers"] > budget["registers"] + slack or now["shared"] > budget["shared"]
        under = not slack and now.get("occupancy", 1) < budget.get("occupancy", 0)
        if over or under:
            worse.append(f"{kernel} on {target}: {now}, budget {budget}")
    assert not worse
