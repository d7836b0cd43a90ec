"""Launches, waits and host time of a training step, a decode step and each op, within the budgets kept in budgets.json; peak memory."""

import functools
import json

import pytest

from tests.nullgpu.measure import BUDGETS, DECODE, MEMORY, STEPS, budget, measured

SLACK = 1.6  # of host times, which are scaled by the machine's time for a small addition
result = functools.cache(measured)


def over(kept: dict, now: dict, scale: float) -> list[str]:
    """One line for each figure above its budget. Host times are multiplied by `scale` before they are compared."""
    limits = {key: value * SLACK if key.startswith("host") else value for key, value in kept.items()}
    values = {key: value * scale if key.startswith("host") else value for key, value in now.items()}
    return [f"{key} {values[key]:.3f}, budget {kept[key]}" for key in kept if values[key] > limits[key]]


def check(case: str, kept: dict, now: dict, unit: float) -> None:
    assert not over(kept, now, json.loads(BUDGETS.read_text())["unit_us"] / unit), case


@pytest.mark.parametrize("case", STEPS)
def test_a_training_step_keeps_to_its_budget(case):
    found = result(case)
    assert not found["faults"] and not found["capture faults"] and not found["warnings"]
    check(case, json.loads(BUDGETS.read_text())[case], budget(found), found["unit_us"])


@pytest.mark.parametrize("case", [case for case in STEPS if "compiled" in case])
def test_a_compiled_step_is_two_graphs_of_the_operations_of_a_step_without_graphs(case):
    found = result(case)
    assert found["kinds"]["graph"] == 2 and found["waits"] == {}
    assert found["captured"] == found["not captured"] and len(found["captured"]) > 100


def test_the_44m_step_leaves_the_host_idle():
    found = result("44m, compiled, adamw")
    assert found["launches"] <= 70 and not found["waits"] and found["host_ms"] <= 2.5
    assert result("quickstart, compiled, muon")["launches"] <= 60


@pytest.mark.parametrize("case", MEMORY)
def test_the_plan_is_the_allocators_peak(case):
    found = result(case)
    assert found["plan"] == pytest.approx(found["peak"], rel=0.05)


@pytest.mark.parametrize("case", DECODE)
def test_a_decode_step_keeps_to_its_budget(case):
    found = result(case)
    assert not found["faults"]
    check(case, json.loads(BUDGETS.read_text())[case], budget(found), found["unit_us"])


@pytest.mark.parametrize("case", DECODE)
def test_a_decode_step_is_one_graph_and_one_copy(case):
    found = result(case)
    assert found["kinds"] == {"graph": 1, "copy": 1} and sum(found["waits"].values()) == 1 and found["host_ms"] <= 0.6


def test_each_op_keeps_to_its_budget():
    found = result("ops")
    kept, now = json.loads(BUDGETS.read_text())["ops"], budget(found)
    assert kept.keys() == now.keys()
    for name in kept:
        assert not found["ops"][name]["faults"] and not found["ops"][name]["waits"]
        check(name, kept[name], now[name], found["unit_us"])
