"""The null GPU notices what it is there to notice: each planted fault is reported."""

import json

import pytest

from tests.nullgpu.build import run

HEAD = """
import json, torch
from tests.nullgpu.harness import recorded
from tritale.kernels import flash_attention, rms_norm
from tritale.kernels.launch import launch_override
from tritale.common.graphs import Graphed
on = lambda *shape: torch.zeros(shape, device="cuda")
"""


def outcome(code: str, **card) -> dict:
    """What the code, run on the null GPU, has put into the dictionary `found`."""
    return json.loads(run("-c", f"{HEAD}\nfound = {{}}\n{code}\nprint(json.dumps(found))", **card).stdout.splitlines()[-1])


DECODER = """
from tritale.common.sampling import Sampling
from tritale.inference.decoder import Decoder
from tritale.inference.sequence import Sequence
from tritale.kernels import backend
from tritale.model import GPT, GPTConfig

def sequence(i, **settings):
    return Sequence([0, 5, 6, 7][: i + 1], Sampling(seed=i, **settings))
"""
CAPTURES = {
    "a wait": ("x.sum().item()", "cudaStreamSynchronize while a graph is captured"),
    "a copy from the host": ("torch.ones(4).pin_memory().to('cuda', non_blocking=True)", "copy to the device while a graph is captured"),
    "the default stream": ("double_on_the_default_stream(x)", "on the default stream while a graph is captured"),
}


@pytest.mark.parametrize("what", CAPTURES)
def test_what_a_graph_cannot_hold_is_a_fault(what):
    line, expected = CAPTURES[what]
    code = f"""
def double_on_the_default_stream(x):
    with torch.cuda.stream(torch.cuda.default_stream()):
        return x * 2
x = on(4)
with recorded() as record:
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            {line}
    except RuntimeError as error:
        found["error"] = str(error)
found["faults"] = record.faults
"""
    found = outcome(code)
    assert expected in found["faults"] and "error" in found


def test_a_wait_is_reported_with_its_line():
    code = """
from tritale.training import processes
with recorded() as record:
    processes.synchronize(torch.device("cuda"))
    on(4).sum().item()
found["waits"] = record.waits
"""
    waits = outcome(code)["waits"]
    assert any("cudaDeviceSynchronize training/processes.py:" in where for where in waits) and sum(waits.values()) == 2


def test_a_block_with_too_much_shared_memory_is_a_fault_on_the_smaller_card_alone():
    code = """
q = on(1, 256, 2, 128).half()
with recorded() as record, launch_override("flash_attention_fwd", BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=3):
    try:
        flash_attention(q, q, q)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
found["launches"] = len(record.launches)
"""
    assert "error" not in outcome(code, CC=90)
    assert "shared memory" in outcome(code, CC=86, SMS=82)["error"]


def test_a_tensor_of_the_cpu_is_refused():
    code = """
try:
    rms_norm(on(4, 64), torch.ones(64))
except ValueError as error:
    found["error"] = str(error)
"""
    assert "cpu tensor" in outcome(code)["error"]


def test_a_function_is_captured_at_its_third_call_and_again_after_its_memory_is_released():
    code = """
calls = []
def function(x, y):
    calls.append(1)
    return x + 1
graphed = Graphed(function)
x = on(4)
with recorded() as record:
    for argument in (x, x, x, x, on(5), x):  # run, run, captured, replayed, run, replayed
        result = graphed(argument, None)
found["calls"], found["graphs"] = len(calls), sum(launch.kind == "graph" for launch in record.launches)
graphed.release()
for i in range(3):  # run, captured, replayed
    graphed(x, None)
found["again"] = len(calls)
found["shape"] = list(result.shape)
"""
    assert outcome(code) == {"calls": 4, "graphs": 3, "again": 6, "shape": [4]}


def test_a_decoder_captures_a_graph_for_each_power_of_two_of_rows_at_the_third_step():
    code = f"""
{DECODER}
decoder = Decoder(GPT(GPTConfig.preset("tiny")).to("cuda", torch.float16).eval(), slots=5)
kinds, sequences = [], [sequence(i % 4, temperature=i % 2) for i in range(5)]
for n_added, n_step in ((1, 4), (2, 4), (1, 2), (1, 4)):  # 1, 3, 4 and 5 sequences
    for _ in range(n_added):
        decoder.add(sequences.pop())
    for _ in range(n_step):
        with recorded() as record:
            decoder.step()
        kinds.append("".join(sorted(x.kind[0] for x in record.launches if x.kind in ("graph", "triton"))))
        assert not record.faults
found["steps"] = [set(k) == {{"g"}} for k in kinds]
"""
    # The first step of each new sequence has its prompt too; 3 and 4 rows share a graph.
    steps = outcome(code)["steps"]
    assert steps == [False, False, True, True] * 2 + [False, True] + [False, False, True, True]


def test_a_decoder_without_triton_is_captured_too():
    code = f"""
{DECODER}
decoder = Decoder(GPT(GPTConfig.preset("tiny", qk_norm=True, window=9)).to("cuda").eval(), slots=2)
for i in range(2):
    decoder.add(sequence(i))
with recorded() as record, backend("torch"):
    for _ in range(4):
        decoder.step()
found["graphs"] = sum(x.kind == "graph" for x in record.launches)
found["faults"] = record.faults
"""
    assert outcome(code) == {"graphs": 2, "faults": ""}
