"""Time, rate and memory of every op: ours, the reference, torch.compile of the reference, and the peers.

*forward* is a training forward: it saves what backward needs, and the fused losses already compute their gradients in it. *both* is the sum
of forward and backward of the same round.
"""

import pytest
import torch

from bench import ops
from bench.conftest import parameters, selected
from bench.measure import DTYPES, Stopwatch, device, each_in_a_fresh_process, first_line, half_precision, interleaved, one_round, spread
from bench.ops import CONTENDERS, LIGER, OURS, REFERENCE, SMALL, TOLERANCE, TORCH_LCE, TORCH_LCE_CHUNK, missing

PASSES = ("forward", "backward", "both")
MODELS = ("44m", "124m", "1b")
MAX_ROUNDS = 50  # a GPU always takes this many
SECONDS = 1.0  # of timing for a contender on a CPU, with at least 3 rounds
SLOW = {TORCH_LCE} if device().type == "cpu" else set()  # measured once, and only at 44m


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption("--benchmark"):
        half = half_precision()
        dtypes = [half, "fp32"] if device().type == "cuda" else [half or "fp32"]
        groups = [(op, model, dtype, which) for op in CONTENDERS for model in MODELS for dtype in dtypes for which in PASSES]
        keys = [(*group, c) for group in groups for c in CONTENDERS[group[0]]]
    else:
        keys = [("linear_cross_entropy", "tiny", "fp32", "both", c) for c in (REFERENCE, OURS, TORCH_LCE_CHUNK, LIGER)]
    metafunc.parametrize(("op", "model", "dtype", "which", "contender"), keys, ids=["-".join(key) for key in keys])


def cannot_run(op: str, model: str, dtype: str, contender: str) -> str | None:
    """Why a contender is not measured here, or None."""
    is_left_out = (op in SMALL and model == "124m") or (contender in SLOW and model != "44m")
    return missing(contender, dtype) or ("left out on a CPU, to save time" if is_left_out and device().type == "cpu" else None)


@pytest.fixture(scope="session")
def peaks(request, progress) -> dict[tuple, dict]:
    """{(op, model, dtype, contender): peak bytes by pass} of all tests of this session. On a CPU each is measured in a fresh process, which
    also fills torch.compile's cache for the timing."""
    keys = dict.fromkeys((p["op"], p["model"], p["dtype"], p["contender"]) for p in parameters(request.session, "test_op"))
    jobs = [key for key in keys if cannot_run(*key) is None]
    found: dict[tuple, dict] = {}
    with progress("memory of the ops", len(jobs)) as tick:
        if device().type == "cpu":
            threads = torch.get_num_threads()
            results = each_in_a_fresh_process(ops.memory, [(*job, threads) for job in jobs], threads, tick)
            return {job[:-1]: value for job, value in results.items()}
        for job in jobs:
            try:
                found[job] = ops.memory(*job, threads=0)
            except Exception as error:
                found[job] = {"failed": first_line(error)}
            torch._dynamo.reset()
            tick()
    return found


def measure(op: str, model: str, dtype: str, contenders: list[str], progress) -> dict:
    """Compare the contenders with float64, then time them in turns. Returns {"case", "bytes" that must move, "errors" and "times" by
    contender, "failed": {contender: why}}."""
    torch._dynamo.reset()
    case = ops.case(op, model, dtype)
    grads = ops.output_gradients(case.functions[REFERENCE], case.inputs)
    want = ops.exact(case.functions[REFERENCE], case.inputs, grads)
    calls, errors, times, failed, watch = {}, {}, {}, {}, Stopwatch()
    with progress(f"{op} {model} {dtype}: compare", len(contenders)) as tick:
        for name in contenders:
            inputs = case.inputs, grads
            if name == LIGER:  # its kernels overwrite their inputs
                inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in case.inputs], [g.clone() for g in grads]
            calls[name] = case.functions[name], *inputs
            try:
                outputs, found, marks = one_round(watch, calls[name])
            except Exception as error:
                failed[name] = first_line(error)
                del calls[name]
            else:
                errors[name] = ops.error([*outputs, *found], want)
                del outputs, found
                if name in SLOW:  # tens of seconds: this one call is its measurement
                    forward, backward = watch.seconds(*marks[:2]), watch.seconds(*marks[1:])
                    times[name] = {"forward": [forward], "backward": [backward], "both": [forward + backward]}
                    del calls[name]
            tick()
    del want
    rounds = MAX_ROUNDS
    if calls and device().type == "cpu":
        once = interleaved(calls, 1)
        rounds = max(3, min(MAX_ROUNDS, int(SECONDS * len(calls) / sum(t["both"][0] for t in once.values()))))
    with progress(f"{op} {model} {dtype}: {rounds} rounds", rounds * len(calls)) as tick:
        times |= interleaved(calls, rounds, tick)
    return {"case": case, "bytes": ops.ideal_bytes(case.inputs, grads), "errors": errors, "times": times, "failed": failed}


def test_op(op, model, dtype, which, contender, request, benchmarking, progress, peaks, measured, rates, report):
    row = {"suite": "ops", "case": op, "model": model, "dtype": dtype, "pass": which, "contender": contender}
    key = (op, model, dtype)
    if reason := cannot_run(*key, contender):
        return report(row | {"status": "cannot run", "note": reason})
    if key not in measured:
        measured.clear()  # frees the tensors of the previous op
        names = selected(request, op=op, model=model, dtype=dtype)
        able = [name for name in names if cannot_run(*key, name) is None and "failed" not in peaks[(*key, name)]]
        measured[key] = measure(*key, able, progress)
    found = measured[key]
    if reason := peaks[(*key, contender)].get("failed") or found["failed"].get(contender):
        return report(row | {"status": "failed", "note": reason})
    seconds, error = found["times"][contender][which], found["errors"][contender]
    row |= {"sizes": found["case"].sizes, "seconds": spread(seconds), "bytes": peaks[(*key, contender)].get(which), "error": error}
    row |= {"status": "ok", "note": ""}
    median = row["seconds"]["median"]
    if found["case"].flops is None:
        rate, best = found["bytes"][which] / median, "copy"
    else:  # the fused losses do work of backward in forward, so only the sum has a rate
        rate, best = (found["case"].flops / median if which == "both" else None), "product"
    if rate and benchmarking:
        row |= {"rate": rate, "unit": "B/s" if best == "copy" else "FLOP/s", "share": rate / rates(DTYPES[dtype])[best]}
    if not error < TOLERANCE[dtype]:
        row |= {"status": "wrong", "note": f"relative error against float64 {error:.1e} (allowed: {TOLERANCE[dtype]:.0e})"}
    report(row, seconds)
