"""What a person with a GPU runs once, in about 15 minutes, so that the project learns from real hardware: python -m bench.first_gpu

1. The tests of the kernels and of the decoder, natively instead of in the interpreter.
2. Training steps of the 44 M model, eager and as CUDA graphs: time, whether both have the same losses, memory beside the plan.
3. Each op beside its definition, its compiled definition and PyTorch's own.
4. The launch table: each option of each kernel at half, equal and double its value (within limits), one at a time.
5. Generation of 1 and of 32 sequences.

Each part has a share of --minutes and stops at its end. The results are written to out/first-gpu-<card>.json after each part: that file is
what to send back. Nothing is changed or uploaded.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from bench.measure import DTYPES, ROOT, first_line, half_precision, interleaved, reset_peak
from bench.ops import COMPILED, OURS, REFERENCE, SDPA, TORCH_CE, TORCH_RMS, case, output_gradients
from tritale.common.files import write_json
from tritale.common.sampling import Sampling
from tritale.inference.decoder import Decoder
from tritale.inference.sequence import Sequence
from tritale.kernels import launch
from tritale.model import GPT, GPTConfig
from tritale.training import processes
from tritale.training.config import parse
from tritale.training.plan import DataFacts, DeviceFacts, plan
from tritale.training.step import TrainingStep, random_batch

CONTENDERS = (OURS, SDPA, TORCH_RMS, TORCH_CE, REFERENCE, COMPILED)
TUNED = {  # op: kernels that it launches
    "flash_attention, packed": ("flash_attention_fwd", "flash_attention_bwd_dq", "flash_attention_bwd_dkv"),
    "add_rms_norm": ("rms_norm_fwd", "rms_norm_bwd"),
    "swiglu": ("glu",),
    "rope": ("rope",),
    "qk_norm_rope": ("qk_norm_rope_fwd", "qk_norm_rope_bwd"),
    "cross_entropy": ("cross_entropy",),
}
# SIGINT is ignored in the children of a job in the background, unless they ask for it.
PYTEST = "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main(sys.argv[1:]))"
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5), "PER_SM": (1, 8)}  # of other options 1 to 8,192


def facts() -> dict:
    card = torch.cuda.get_device_properties(0)
    about = {"name": card.name, "capability": f"{card.major}.{card.minor}", "sms": card.multi_processor_count, "bytes": card.total_memory}
    return about | {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": launch_version()}


def launch_version() -> str:
    import triton

    return triton.__version__


def kernel_tests(seconds: float) -> dict:
    """What pytest prints. The tests of the compiled code, of the traffic and of the source need no GPU and are left out. At the end of its
    time pytest is interrupted, and still lists what has failed."""
    left_out = [f"--ignore=tests/kernels/test_{name}.py" for name in ("machine_code", "traffic", "source")]
    command = [
        sys.executable,
        "-c",
        PYTEST,
        "tests/inference/test_gpu_runner.py",
        "tests/kernels",
        "-rf",
        "--tb=short",
        "--color=no",
        *left_out,
    ]
    pytest = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    is_late = False
    try:
        output, _ = pytest.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        is_late = True
        pytest.send_signal(signal.SIGINT)
        try:
            output, _ = pytest.communicate(timeout=60)
        except subprocess.TimeoutExpired:  # a kernel that never ends
            pytest.kill()
            output, _ = pytest.communicate()
    status = "out of time" if is_late else ("ok" if pytest.returncode == 0 else "failed")
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", output[-2000:])}
    return {"status": status} | counts | {"output": output[:20_000], "end": output[20_000:][-8000:]}


def training(seconds: float) -> dict:
    """{"graphs": …, "eager": …} with losses of the first steps on one batch, seconds of a step, bytes and the plan's bytes."""
    here, found = processes.start(), {}
    for name, is_compiled in (("graphs", "true"), ("eager", "false")):
        options = ["--config", "configs/microstories-44m.yaml", "--train.global_batch", "32", "--train.compile", is_compiled]
        config = parse(options)
        planned = plan(config, DataFacts("random", 65_024, 10**9, 5_000_000, 10**9), DeviceFacts.of(here, config))
        step = None
        reset_peak()  # collects the step before, which refers to itself
        torch.cuda.empty_cache()
        torch.manual_seed(1)
        step, batch, losses = TrainingStep(planned, here), random_batch(planned, 32), []
        for i in range(10):
            step.run([batch], step.lr_factor(i + 200))
            losses.append(step.mean_loss())
            time.sleep(0.3)  # autograd's thread releases the last tensors of a step after backward has returned
        found[name] = {"losses": losses, "bytes": torch.cuda.max_memory_allocated(), "plan": planned.memory.total}
        found[name]["seconds"] = timed(lambda step=step, batch=batch: step.run([batch], 1e-3), seconds / 4)
        found[name]["tokens_per_second"] = 32 * planned.sequence / found[name]["seconds"]
    pairs = zip(found["graphs"]["losses"], found["eager"]["losses"], strict=True)
    return found | {"largest_difference": max(abs(a - b) for a, b in pairs)}


def timed(call: Callable[[], object], seconds: float) -> float:
    """Seconds of a call, waits included: the median of 5 rounds of as many calls as fit."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    n, rounds = max(1, min(50, int(seconds / 5 / (time.perf_counter() - start)))), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(n):
            call()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / n)
    return median(rounds)


def ops(seconds: float) -> dict:
    """{op: {contender: {"forward", "backward"}}} in seconds, at the sizes of the 44 M model."""
    found, end = {}, time.perf_counter() + seconds
    for op in (*TUNED, "linear_cross_entropy", "rms_norm"):
        this = case(op, "44m", half_precision() or "fp32")
        grads = output_gradients(this.functions[OURS], this.inputs)
        found[op] = {}
        for name in [name for name in CONTENDERS if name in this.functions]:
            if time.perf_counter() > end:
                return found
            try:
                times = interleaved({name: (this.functions[name], this.inputs, grads)}, 20)[name]
                found[op][name] = {which: median(times[which]) for which in ("forward", "backward")}
            except Exception as error:
                found[op][name] = {"failed": first_line(error)}
        torch._dynamo.reset()
    return found


def tuning(seconds: float) -> dict:
    """{kernel: {"options": in the table, "seconds", "tried": [{"option", "value", "seconds"}, …]}}, of forward and backward of its op."""
    found, last, left = {}, time.perf_counter() + seconds, sum(map(len, TUNED.values()))
    for op, kernels in TUNED.items():
        this = case(op, "44m", half_precision() or "fp32")
        grads = output_gradients(this.functions[OURS], this.inputs)

        def both(this=this, grads=grads) -> float:
            return median(interleaved({OURS: (this.functions[OURS], this.inputs, grads)}, 10)[OURS]["both"])

        for kernel in kernels:
            options, now = launched_options(kernel, both), time.perf_counter()
            end, left = now + max(0.0, last - now) / left, left - 1
            found[kernel] = row = {"options": options, "seconds": both(), "tried": []}
            for option, value in options.items():
                low, high = LIMITS.get(option, (1, 8192))
                for other in (value // 2, value * 2):
                    is_late = row["tried"] and time.perf_counter() > end  # one is tried in any case
                    if is_late or not low <= other <= high:
                        continue
                    try:
                        with launch.launch_override(kernel, **{option: other}):
                            row["tried"].append({"option": option, "value": other, "seconds": both()})
                    except Exception as error:  # it does not fit the card
                        row["tried"].append({"option": option, "value": other, "failed": first_line(error)})
    return found


def launched_options(kernel: str, call: Callable[[], object]) -> dict[str, int]:
    """The options of the table that the kernel is launched with in `call`."""
    seen, row = {}, launch._row

    def recording(name: str, architecture: str, **sizes: int) -> launch.Options:
        options = row(name, architecture, **sizes)
        seen.setdefault(name, dict(options))
        return options

    launch._row = recording
    try:
        call()
    finally:
        launch._row = row
    return seen[kernel]


def generation(seconds: float) -> dict:
    """{"1": tokens per second of one sequence, "32": of 32}, random weights in 16 bits."""
    model = GPT(GPTConfig.preset("microstories-44m")).to("cuda", DTYPES[half_precision() or "fp32"]).eval()
    found = {}
    for n in (1, 32):
        decoder = Decoder(model, slots=n)
        for i in range(n):
            decoder.add(Sequence([0, 5, 6, 7], Sampling(seed=i, max_new_tokens=500)))
        for _ in range(20):
            decoder.step()
        start, steps = time.perf_counter(), 0
        while steps < 400 and time.perf_counter() - start < seconds / 2:
            decoder.step()
            steps += 1
        found[str(n)] = n * steps / (time.perf_counter() - start)
    return found


PARTS = {
    "kernel_tests": (kernel_tests, 0.4),
    "training": (training, 0.15),
    "ops": (ops, 0.15),
    "tuning": (tuning, 0.2),
    "generation": (generation, 0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="about how long all parts may take")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.first_gpu: PyTorch finds no GPU; docs/gpu.md says what can be checked without one")
    results = facts()
    path = Path("out") / f"first-gpu-{results['name'].replace(' ', '-').lower()}.json"
    path.parent.mkdir(exist_ok=True)
    for name in args.parts:
        function, share = PARTS[name]
        print(f"{name}: up to {share * args.minutes:.1f} minutes", flush=True)
        try:
            results[name] = function(share * args.minutes * 60)
        except Exception as error:
            results[name] = {"failed": first_line(error)}
        write_json(path, results)
        print("  " + json.dumps(results[name], ensure_ascii=False)[:300], flush=True)
    print(f"{path} holds the results: please attach it to an issue.")


if __name__ == "__main__":
    main()
