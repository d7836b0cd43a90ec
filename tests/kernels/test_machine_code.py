"""The binaries of all kernels on all architectures: no spills, wide loads, tensor cores, within the budgets kept in budgets.json."""

import json

import pytest

from bench.machine_code import BUDGETS, NEEDS_TENSOR_CORES, REWRITE, TARGETS, budgets
from tritale.kernels.launch import SHARED_MEMORY

# Kernels that stream their tensors. Packed documents add the tokens' positions, 32 bits each, which stay in cache.
MEMORY_BOUND = ("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu", "cross_entropy", "linear_cross_entropy")
TENSOR_CORES = {
    "sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_120": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma",
}  # fmt: skip
SLACK = 8  # registers that another version of Triton may take more than the one of the budgets


def worse_than(kept: dict[str, dict], now: dict[str, dict], slack: int = 0) -> list[str]:
    """One line for each kernel of `now` that is worse than in `kept`, both {kernel: {registers, shared, occupancy, tensor_ratio}}. With
    slack, for another version of the compiler, that many more registers are accepted, and any occupancy."""
    lines = []
    for kernel in sorted({*kept, *now}):
        budget, row = kept.get(kernel), now.get(kernel)
        if budget is None or row is None:
            lines.append(f"{kernel}: {'no budget yet' if budget is None else 'has a budget and is no longer launched'}")
            continue
        over = [f"{n} {row[n]}, budget {budget[n]}" for n, s in (("registers", slack), ("shared", 0)) if row[n] > budget[n] + s]
        if row["tensor_ratio"] > budget["tensor_ratio"]:
            over.append(f"tensor work {row['tensor_ratio']}, budget {budget['tensor_ratio']}")
        if not slack and row["occupancy"] < budget["occupancy"]:
            over.append(f"occupancy {row['occupancy']}, budget {budget['occupancy']}")
        if over:
            lines.append(f"{kernel}: {'; '.join(over)}")
    return lines


def name(row):
    return f"{row['op']} / {row['model']} / {row['kernel']} / {row['pass']}"


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def rows(target, machine_code):
    """The binaries of one target; only the first test reports a launch that failed."""
    return [row for row in machine_code if row["target"] == target and "error" not in row]


def test_every_op_compiles(target, machine_code):
    rows = [row for row in machine_code if row["target"] == target]
    assert not [f"{row['op']} / {row['model']}: {row['error']}" for row in rows if "error" in row]
    ops = {row["op"] for row in rows}
    assert {*MEMORY_BOUND} <= ops
    assert target == "sm_75" or {*NEEDS_TENSOR_CORES} - {"flash_attention fp32"} <= ops


def test_shared_memory_fits_a_block(target, rows):
    assert not [f"{name(r)}: {r['shared']} bytes" for r in rows if r["shared"] > SHARED_MEMORY[target]]


def test_nothing_spills(rows):
    assert not [f"{name(r)}: STACK {r['stack']} LOCAL {r['local']}" for r in rows if r["stack"] or r["local"]]


def test_nothing_is_atomic_or_in_double_precision(rows):
    assert not [f"{name(r)}: {r['atomics']} atomics, {r['fp64']} fp64" for r in rows if r["atomics"] or r["fp64"]]


def test_memory_bound_kernels_move_128_bits_at_a_time(rows):
    """In the losses only the logits are streamed; the few numbers of a row (target, scale; loss, nll, …) are 32 bits."""
    narrow = []
    for r in rows:
        if r["kernel"] == "cross_entropy_kernel":
            has_gradient = r["pass"] == "backward" or r["op"] == "linear_cross_entropy"
            is_wide = r["load_128"] and r["load_narrower"] <= 4 and r["store_narrower"] <= 5 and (r["store_128"] or not has_gradient)
        else:
            is_wide = r["load_128"] > r["load_narrower"] and r["store_128"] > r["store_narrower"]
        if r["op"].split()[0] in MEMORY_BOUND and "recompute" not in r["op"] and not is_wide:
            loads, stores = (f"{r[f'{kind}_128']} of 128 bits and {r[f'{kind}_narrower']} narrower" for kind in ("load", "store"))
            narrow.append(f"{name(r)}: loads {loads}; stores {stores}")
    assert not narrow


def test_products_of_blocks_use_tensor_cores(target, rows):
    """The newest instruction of the architecture. In dK/dV of heads of 192 and 256 an older one on sm_90: every tile that uses HGMMA spills
    there (docs/log.md)."""
    products = [r for r in rows if r["has_dot"]]
    assert bool(products) == (target in TENSOR_CORES)

    def allowed(row):
        has_older = target == "sm_90" and row["model"] in ("d192", "d256") and row["kernel"] == "flash_attention_bwd_dkv"
        return {TENSOR_CORES[target], "HMMA"} if has_older else {TENSOR_CORES[target]}

    assert not [f"{name(r)}: {r['tensor_core']}" for r in products if not allowed(r) & {*r["tensor_core"]}]


def test_no_product_is_computed_twice(rows):
    """FLOPs that the tensor cores execute over those needed."""
    assert not [f"{name(r)}: {r['tensor_ratio']}" for r in rows if r["tensor_ratio"] > 1.02]


def test_registers_shared_memory_and_occupancy_keep_to_the_budgets(target, rows):
    import triton

    kept = json.loads(BUDGETS.read_text())
    worse = worse_than(kept.get(target, {}), budgets(rows)[target], slack=0 if kept["triton"] == triton.__version__ else SLACK)
    listed = "\n  ".join(worse)
    assert not worse, f"{target}:\n  {listed}\nIf the change is meant to cost this, rewrite the budgets: {REWRITE}"
