"""Counts on the null GPU: python -m tests.nullgpu.measure CASE prints JSON (in `build.environment()`). --write-budgets [CASE …] measures
all or some cases and rewrites their budgets and the tables of docs/gpu.md.

A launch is a call that gives the device work: a kernel, a matrix product, a copy, a fill, a collective or a graph. A graph counts as one
launch; its operations are counted as nodes. Host time is the CPU time of the process, and excludes what a real driver would take.
"""

import functools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

BUDGETS = Path(__file__).with_name("budgets.json")
PAGE, BEGIN, END = (
    Path(__file__).parents[2] / "docs/gpu.md",
    "<!-- table: python -m tests.nullgpu.measure --write-budgets -->",
    "<!-- end of table -->",
)
VOCABULARY = {"microstories-44m": 65_024, "quickstart": 4096, "tiny": 512}


def _step(preset: str, rows: int, options: str = "", **card: int) -> dict:
    return {"what": "step", "preset": preset, "rows": rows, "options": options.split(), "card": card}


STEPS = {
    "44m, compiled, adamw": _step("microstories-44m", 32),
    "44m, compiled, adamw, no document mask": _step("microstories-44m", 32, "--data.document_mask false"),
    "44m, compiled, muon": _step("microstories-44m", 32, "--optim.matrices muon"),
    "44m, eager, adamw": _step("microstories-44m", 32, "--train.compile false"),
    "44m, eager, muon": _step("microstories-44m", 32, "--train.compile false --optim.matrices muon"),
    "44m, eager, adamw, no document mask": _step("microstories-44m", 32, "--train.compile false --data.document_mask false"),
    "quickstart, compiled, muon": _step("quickstart", 8, "--optim.matrices muon"),
    "quickstart, eager, muon": _step("quickstart", 8, "--train.compile false --optim.matrices muon"),
}
GROUPED, ROWS = "--model.n_head 8 --model.n_kv_head 2 --model.head_dim 64", "--data.document_mask false"
FP32, EAGER = "--train.precision fp32", "--train.compile false"
SM_75, SM_80, SM_86, SM_120 = {"CC": 75, "SMS": 40}, {"CC": 80, "SMS": 108}, {"CC": 86, "SMS": 82}, {"CC": 120, "SMS": 170}
MEMORY = {
    **{name: STEPS[name] for name in STEPS if name.startswith("44m") and "adamw" in name},
    "44m, compiled, fp32": _step("microstories-44m", 16, FP32),
    "44m, eager, fp32": _step("microstories-44m", 16, f"{FP32} {EAGER}"),
    "44m, compiled, grouped heads": _step("microstories-44m", 32, GROUPED),
    "44m, compiled, grouped heads of 320, no document mask": _step(
        "microstories-44m", 16, f"--model.n_head 4 --model.n_kv_head 2 --model.head_dim 320 {ROWS}"
    ),
    "44m, compiled, grouped heads, fp32": _step("microstories-44m", 16, f"{GROUPED} {FP32}"),
    "44m, eager, grouped heads, fp32": _step("microstories-44m", 16, f"{GROUPED} {FP32} {EAGER}"),
    "44m, eager, grouped heads, fp32, no document mask": _step("microstories-44m", 16, f"{GROUPED} {FP32} {EAGER} {ROWS}"),
    "44m, compiled, sm_75": _step("microstories-44m", 16, "", **SM_75),
    "44m, compiled, sm_75, grouped heads": _step("microstories-44m", 16, GROUPED, **SM_75),
    "44m, compiled, sm_75, no document mask": _step("microstories-44m", 16, ROWS, **SM_75),
    "44m, compiled, sm_75, fp32": _step("microstories-44m", 16, FP32, **SM_75),
    "44m, compiled, sm_80, fp16": _step("microstories-44m", 32, "--train.precision fp16", **SM_80),
    "44m, eager, sm_86, qk norm, untied": _step(
        "microstories-44m", 16, f"{EAGER} --model.qk_norm true --model.tie_embeddings false", **SM_86
    ),
    "44m, eager, sm_86, grouped heads, fp32": _step("microstories-44m", 16, f"{GROUPED} {FP32} {EAGER}", **SM_86),
    "44m, eager, sm_120": _step("microstories-44m", 16, EAGER, **SM_120),
    "44m, eager, sm_120, fp16, grouped heads": _step("microstories-44m", 16, f"{GROUPED} {EAGER} --train.precision fp16", **SM_120),
    "44m, eager, sm_120, fp32": _step("microstories-44m", 16, f"{FP32} {EAGER}", **SM_120),
}
DECODE = {
    "44m, one sequence, sampled": {"what": "decode", "slots": 1, "temperature": 0.8, "card": {}},
    "44m, one sequence, greedy": {"what": "decode", "slots": 1, "temperature": 0.0, "card": {}},
    "44m, eight sequences, sampled": {"what": "decode", "slots": 8, "temperature": 0.8, "card": {}},
}
CASES = STEPS | MEMORY | DECODE | {"ops": {"what": "ops", "card": {}}}


def counts(record, calls: int = 1) -> dict:
    """The record per call."""
    per_call = lambda n: round(n / calls, 2)
    return {
        "launches": per_call(len(record.launches)),
        "nodes": per_call(record.nodes),
        "waits": {where: per_call(n) for where, n in record.waits.items()},
        "kinds": {kind: per_call(n) for kind, n in Counter(x.kind for x in record.launches).items()},
        "names": Counter(f"{x.kind} {x.name}" for x in record.launches).most_common(),
        "faults": record.faults,
    }


def unit_us() -> float:
    """Host microseconds of PyTorch's addition of two small tensors: what other host times are compared with, on any machine."""
    import torch

    from tests.nullgpu.harness import host_ms

    x = torch.zeros(8, device="cuda")
    return 1000 * host_ms(lambda: [x + x for _ in range(500)], 20) / 500


def step(preset: str, rows: int, options: list[str]) -> dict:
    """An optimizer step of one micro-batch with `rows` sequences."""
    import torch

    from tests.nullgpu.harness import host_ms, never_overflows, recorded
    from tritale.common.graphs import WARM_UP
    from tritale.training import processes
    from tritale.training.config import parse
    from tritale.training.plan import DataFacts, DeviceFacts, plan
    from tritale.training.step import TrainingStep, random_batch

    config = "configs/quickstart.yaml" if preset == "quickstart" else "configs/microstories-44m.yaml"
    given = ["--config", config, "--model.preset", preset, "--train.micro_batch", str(rows), "--train.global_batch", str(rows), *options]
    parsed, here = parse(given), processes.start()
    planned = plan(parsed, DataFacts("measure", VOCABULARY[preset], 10**9, 5_000_000, 10**9), DeviceFacts.of(here, parsed))
    never_overflows()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    training, batch = TrainingStep(planned, here), random_batch(planned, rows)
    call = lambda: training.run([batch], 1.0)

    def call_and_settle() -> None:
        """PyTorch's autograd thread releases the last tensors of a step some time after backward has returned, late on a busy machine."""
        call()
        time.sleep(0.3)

    for _ in range(WARM_UP):
        call_and_settle()
    with recorded() as captures:
        call_and_settle()
    with recorded() as record:
        call()
    result = counts(record) | {"plan": planned.memory.total, "peak": torch.cuda.max_memory_allocated()}
    result |= {"reserved": torch.cuda.memory_reserved(), "host_ms": host_ms(call)}
    with recorded() as eager:
        training._forward_backward(*batch.on(here.device))
        training._clip_and_step()
    with recorded() as update:
        training.optimizers[-1].step()  # Muon's, where it is used
    operations = lambda launches: [f"{x.kind} {x.name} {x.grid} {x.block} {x.shared}" for x in launches if "copy to" not in x.name]
    return result | {
        "captured": operations(captures.captured),
        "not captured": operations(eager.launches),
        "capture faults": captures.faults,
        "update": len(update.launches),
    }


def decode(slots: int, temperature: float) -> dict:
    """A step of the decoder for `slots` sequences, in bf16."""
    import torch

    from tests.nullgpu.harness import host_ms, recorded
    from tritale.common.sampling import Sampling
    from tritale.inference.decoder import Decoder
    from tritale.inference.sequence import Sequence
    from tritale.model import GPT, GPTConfig

    model = GPT(GPTConfig.preset("microstories-44m")).to("cuda", torch.bfloat16).eval()
    decoder = Decoder(model, slots=slots)
    for i in range(slots):
        decoder.add(Sequence([0, 5, 6, 7], Sampling(temperature=temperature, seed=i, max_new_tokens=500)))
    for _ in range(10):
        decoder.step()
    with recorded() as record:
        for _ in range(10):
            decoder.step()
    return counts(record, 10) | {"host_ms": host_ms(decoder.step, 60)}


def ops() -> dict:
    """{op: {"launches", "host_us"}} of one call without gradients, at the sizes of the 44 M model and 2,048 tokens in bf16."""
    import torch

    from tests.nullgpu.harness import host_ms, recorded
    from tritale import kernels

    on = functools.partial(torch.zeros, device="cuda", dtype=torch.bfloat16)
    x, residual, weight, norm = on(1, 2048, 512), on(1, 2048, 512, dtype=torch.float32), on(4096, 512), on(512, dtype=torch.float32)
    q, table, head = on(1, 2048, 6, 48), on(512, 24, dtype=torch.float32), on(48, dtype=torch.float32)
    positions, targets = on(2048, dtype=torch.int64), on(1, 2048, dtype=torch.int64)
    packed = on(1, 2048, 18 * 48)
    cu_seqlens, logits = torch.arange(0, 2049, 256, device="cuda", dtype=torch.int32), on(1, 2048, 4096)
    calls: dict[str, Callable[[], object]] = {
        "rms_norm": lambda: kernels.rms_norm(x, norm),
        "add_rms_norm": lambda: kernels.add_rms_norm(x, residual, norm),
        "swiglu": lambda: kernels.swiglu(x),
        "rope": lambda: kernels.rope(q, q, table, table, positions=positions),
        "qk_norm_rope": lambda: kernels.qk_norm_rope(
            packed, head, head, table, table, n_head=6, n_kv_head=6, positions=positions
        ),
        "flash_attention": lambda: kernels.flash_attention(q, q, q),
        "flash_attention, packed": lambda: kernels.flash_attention(q, q, q, cu_seqlens=cu_seqlens),
        "cross_entropy": lambda: kernels.cross_entropy(logits, targets),
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(x, weight, targets),
        "embedding": lambda: kernels.embedding(targets, weight),
    }  # fmt: skip
    found = {}
    with torch.no_grad():
        for name, call in calls.items():
            call()
            with recorded() as record:
                call()
            microseconds = 1000 * host_ms(lambda call=call: [call() for _ in range(50)], 10) / 50
            found[name] = {
                "launches": len(record.launches),
                "waits": record.waits.total(),
                "host_us": microseconds,
                "faults": record.faults,
            }
    return {"ops": found}


def measured(case: str) -> dict:
    """The result of a case, measured in a process of its own."""
    from tests.nullgpu.build import run

    done = run("-m", "tests.nullgpu.measure", case, **CASES[case]["card"])
    return json.loads(done.stdout.splitlines()[-1]) | {
        "warnings": [line for line in done.stderr.splitlines() if "Warning: " in line and "tl.where" not in line]
    }


def budget(found: dict, unit: float) -> dict:
    """What is kept of a result, with host times as on a machine whose small addition takes `unit` µs."""
    scale = unit / found["unit_us"]
    if "ops" in found:
        return {name: {"launches": row["launches"], "host_us": round(row["host_us"] * scale, 1)} for name, row in found["ops"].items()}
    kept = {key: found[key] for key in ("launches", "nodes")} | {"waits": sum(found["waits"].values())}
    return kept | {"host_ms": round(found["host_ms"] * scale, 3)}


def page(kept: dict) -> str:
    """The tables of docs/gpu.md."""
    small = f"{kept['unit_us']:.1f} µs"
    lines = [f"Counted on the null GPU (H100), PyTorch {kept['torch']}; an addition of two small tensors takes {small} of host time.", ""]
    lines += ["| step or decode step | launches | operations | waits | host ms |", "|---|---|---|---|---|"]
    for case in (*STEPS, *DECODE):
        row = kept[case]
        lines.append(f"| {case} | {row['launches']:g} | {row['nodes']:g} | {row['waits']:g} | {row['host_ms']:.2f} |")
    lines += ["", "| memory of a step | plan, GiB | allocator's peak, GiB |", "|---|---|---|"]
    for case in (case for case in MEMORY if case in kept["memory"]):
        plan, peak = (kept["memory"][case][key] / 2**30 for key in ("plan", "peak"))
        lines.append(f"| {case} | {plan:.2f} | {peak:.2f} ({plan / peak - 1:+.1%}) |")
    lines += ["", "| op, without gradients | launches | host µs |", "|---|---|---|"]
    lines += [f"| `{name}` | {row['launches']} | {row['host_us']:.0f} |" for name, row in kept["ops"].items()]
    return "\n".join(lines)


def write_budgets(cases: list[str]) -> None:
    import torch

    kept: dict = json.loads(BUDGETS.read_text(encoding="utf-8")) | {"torch": torch.__version__.partition("+")[0]}
    for case in cases:
        found = measured(case)
        if case in MEMORY:
            kept.setdefault("memory", {})[case] = {key: found[key] for key in ("plan", "peak")}
        if case not in MEMORY or case in STEPS:
            kept[case] = budget(found, kept["unit_us"])
        lines = json.dumps(kept, indent=1)
        lines = re.sub(r"\{([^{}]*)\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]).strip() + "}", lines)
        BUDGETS.write_text(lines + "\n", encoding="utf-8")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{page(kept)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--write-budgets":
        write_budgets(sys.argv[2:] or list(CASES))
    else:
        arguments = {k: v for k, v in CASES[sys.argv[1]].items() if k not in ("what", "card")}
        print(json.dumps(globals()[CASES[sys.argv[1]]["what"]](**arguments) | {"unit_us": unit_us()}))
