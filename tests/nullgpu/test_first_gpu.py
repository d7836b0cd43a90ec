"""bench.first_gpu from start to end, on two cards; and what its times start from."""

import json

import pytest

from tests.nullgpu.build import REPOSITORY, run

CARDS = {75: {"CC": 75, "SMS": 40, "GB": 16}, 90: {"CC": 90, "SMS": 132, "GB": 80}}


def results(card: dict, minutes: float, *parts: str) -> dict:
    """The results file of these parts, for a card with a name of its own."""
    name = f"null-sm_{card['CC']}-{parts[0]}"
    run("-m", "bench.first_gpu", "--minutes", minutes, "--parts", *parts, NAME=name, **card)
    return json.loads((REPOSITORY / "out" / f"first-gpu-{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("card", CARDS)
def test_every_part_has_results(card):
    found = results(CARDS[card], 2, "training", "ops", "tuning", "generation")
    assert found["capability"] == f"{card / 10}" and found["sms"] == CARDS[card]["SMS"]
    for name in ("graphs", "eager"):
        step = found["training"][name]
        assert step["seconds"] > 0 and len(step["losses"]) == 10
        if card == 90:  # in fp16 the scaler reads invented values and takes no step, so the optimizer has no state
            assert step["bytes"] == pytest.approx(step["plan"], rel=0.05)
    op = found["ops"]["flash_attention, packed"]
    assert op["ours"]["forward"] > 0 and op["reference, compiled"]["backward"] > 0
    tuned = found["tuning"]
    assert {"flash_attention_bwd_dkv", "rms_norm_bwd", "glu", "rope", "cross_entropy"} <= tuned.keys()
    for row in tuned.values():
        assert row["seconds"] > 0 and row["tried"]
        assert all(row["options"][tried["option"]] != tried["value"] for tried in row["tried"])
    assert any("seconds" in tried for tried in tuned["flash_attention_fwd"]["tried"])
    assert found["generation"]["1"] > 0 and found["generation"]["32"] > 0


def test_the_kernel_tests_run_natively_and_end_in_time_with_a_list_of_what_failed(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k errors")  # the message of another test would print a tensor, whose size is invented
    found = results(CARDS[90], 2, "kernel_tests")["kernel_tests"]
    assert found["status"] == "out of time" and found["failed"] > 0  # kernels do nothing, so their values are wrong
    assert "FAILED tests/kernels/test_cross_entropy.py::" in found["output"] + found["end"]


def test_launches_are_never_timed_nor_waited_for_once_they_are_compiled():
    """The device waits for as long as the host takes to launch, and does not wait for the first call, which compiles."""
    code = """
import json, time, torch
from bench.measure import interleaved
waited, calls = [], []
torch.cuda._sleep = lambda cycles: waited.append(cycles / 2.5e9)
def function(x):
    calls.append(1)
    time.sleep(5 if len(calls) == 1 else 0.05)
    return x * 2
x = torch.zeros(4, device="cuda", requires_grad=True)
interleaved({"slow": (function, [x], [torch.ones(4, device="cuda")])}, 3)
print(json.dumps(waited[-3:]))
"""
    waited = json.loads(run("-c", code).stdout.splitlines()[-1])
    assert len(waited) == 3 and all(1.5 * 0.05 <= seconds < 2 for seconds in waited)
