"""Machine code of every kernel for every GPU architecture, compiled without a GPU, and what it uses.

A stub driver takes each launch of the ops' own launchers: Triton specialises and compiles it as for the card named, and nothing runs. The
public functions are called, forward and backward, with CPU tensors at the shapes of three models (`MODELS`, `_cases`), so there is no
second list of signatures. The kernels must be decorated without TRITON_INTERPRET, so this runs in a process of its own:

    python -m bench.machine_code [--out readings.json] [--targets sm_90,gfx942] [--ops rms_norm] [--models 44m]
    python -m bench.machine_code --write-budgets      # after a change that is meant to cost more, or less

`readings()` starts it for tests and the report. Triton's disk cache keeps the binaries and, next to each, what was read from it.
"""

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "tests/kernels/budgets.json"
REWRITE = "python -m bench.machine_code --write-budgets"
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

# The 1 B model has Llama 3.2's grouped heads. HEADS: other head sizes, for attention alone.
MODELS = {
    "44m": {"batch": 8, "context": 512, "width": 512, "n_head": 6, "n_kv_head": 6, "head_dim": 48, "mlp": 768, "vocab": 65024},
    "124m": {"batch": 8, "context": 1024, "width": 768, "n_head": 12, "n_kv_head": 12, "head_dim": 64, "mlp": 2048, "vocab": 50304},
    "1b": {"batch": 4, "context": 2048, "width": 2048, "n_head": 32, "n_kv_head": 8, "head_dim": 64, "mlp": 5632, "vocab": 32000},
}
HEADS = {
    f"d{d}": {"batch": 2, "context": 2048, "width": 16 * d, "n_head": 16, "n_kv_head": 4, "head_dim": d, "mlp": 0, "vocab": 0}
    for d in (16, 32, 80, 96, 128, 192, 256)
}
GATED = (*MODELS, "d80", "d96", "d128", "d192", "d256")  # what the tests and the report compile

# Limits of an SM: registers, shared bytes, warps, blocks (CUDA C++ programming guide, table of compute capabilities).
SM_LIMITS = {
    "sm_75": (65536, 64 << 10, 32, 16), "sm_80": (65536, 164 << 10, 64, 32), "sm_86": (65536, 100 << 10, 48, 16),
    "sm_89": (65536, 100 << 10, 48, 24), "sm_90": (65536, 228 << 10, 64, 32), "sm_100": (65536, 228 << 10, 64, 32),
    "sm_120": (65536, 100 << 10, 48, 24),
}  # fmt: skip


def _cases() -> dict[str, Callable]:
    """{op: function of (model, dtype) that calls it forward and backward}, for the ops that have a Triton form."""
    import torch

    from tritale import kernels
    from tritale.kernels.newton_schulz import newton_schulz

    def leaf(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    def run(outputs) -> None:
        global _pass
        _pass = "backward"
        outputs = [o for o in ([outputs] if isinstance(outputs, torch.Tensor) else outputs) if o.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])

    tokens = lambda m: m["batch"] * m["context"]
    hidden = lambda m, dtype, width: leaf(m["batch"], m["context"], width, dtype=dtype)
    targets = lambda m: torch.zeros(tokens(m), dtype=torch.int64)
    tables = lambda m: [torch.empty(2 * m["context"], m["head_dim"] // 2) for _ in range(2)]

    def packed_heads(m, dtype, is_packed):
        shape = (1, tokens(m)) if is_packed else (m["batch"], m["context"])
        return leaf(*shape, (m["n_head"] + 2 * m["n_kv_head"]) * m["head_dim"], dtype=dtype)

    def heads(m, dtype, is_packed):
        qkv = packed_heads(m, dtype, is_packed).unflatten(-1, (-1, m["head_dim"]))
        return qkv.split((m["n_head"], m["n_kv_head"], m["n_kv_head"]), dim=-2)

    def documents(m, is_packed):
        return {"cu_seqlens": torch.arange(0, tokens(m) + 1, m["context"], dtype=torch.int32)} if is_packed else {}

    def norm(m, dtype):
        run(kernels.rms_norm(hidden(m, dtype, m["width"]), leaf(m["width"])))

    def add_norm(m, dtype, residual=None):
        run(kernels.add_rms_norm(hidden(m, dtype, m["width"]), hidden(m, residual or dtype, m["width"]), leaf(m["width"])))

    def rope(m, dtype, is_packed=False):
        run(kernels.rope(*heads(m, dtype, is_packed)[:2], *tables(m), **documents(m, is_packed)))

    def qk_norm_rope(m, dtype, is_packed=False):
        sizes = {"n_head": m["n_head"], "n_kv_head": m["n_kv_head"], **documents(m, is_packed)}
        weights = leaf(m["head_dim"]), leaf(m["head_dim"])
        run(kernels.qk_norm_rope(packed_heads(m, dtype, is_packed), *weights, *tables(m), **sizes))

    def linear_cross_entropy(m, dtype, **options):
        x, w = leaf(tokens(m), m["width"], dtype=dtype), leaf(m["vocab"], m["width"], dtype=dtype)
        run(kernels.linear_cross_entropy(x, w, targets(m), **options))

    def attention(m, dtype, is_packed=False, **options):
        run(kernels.flash_attention(*heads(m, dtype, is_packed), **documents(m, is_packed), **options))

    def orthogonalize(m, dtype):
        width, hidden = m["width"], m["mlp"]
        updates = [torch.empty(shape) for shape in ((2 * hidden, width), (width, hidden), ((m["n_head"] + 2) * m["head_dim"], width))]
        newton_schulz(updates, (1.0,) * len(updates), coefficients=(3.4445, -4.775, 2.0315), steps=2, eps=1e-7)

    def decode_attention(m, dtype):
        """One sequence, whose keys are divided between programs, and 256, whose keys are not."""
        for n in (1, 256):
            q, k, v = (torch.empty(n, h, m["head_dim"], dtype=dtype) for h in (m["n_head"], m["n_kv_head"], m["n_kv_head"]))
            keys, values = torch.empty(2, n, m["context"], m["n_kv_head"], m["head_dim"], dtype=dtype)
            kernels.decode_attention(q, k, v, keys, values, torch.zeros(n, dtype=torch.int64))

    def sample(m, dtype):
        n, vocab = 8, m["vocab"]
        seen = torch.zeros(n, vocab, dtype=torch.bool)
        kernels.sample(torch.empty(n, vocab, dtype=dtype), torch.zeros(n, dtype=torch.int64), torch.zeros(n, 5), seen)

    return {
        "rms_norm": norm,
        "rms_norm fp32": lambda m, dtype: norm(m, torch.float32),  # under autocast the residual stream is fp32
        "add_rms_norm": add_norm,
        "add_rms_norm fp32": lambda m, dtype: add_norm(m, dtype, torch.float32),
        "rope": rope,
        "rope packed": lambda m, dtype: rope(m, dtype, True),
        "qk_norm_rope": qk_norm_rope,
        "qk_norm_rope packed": lambda m, dtype: qk_norm_rope(m, dtype, True),
        "swiglu": lambda m, dtype: run(kernels.swiglu(hidden(m, dtype, 2 * m["mlp"]))),
        "geglu": lambda m, dtype: run(kernels.geglu(hidden(m, dtype, 2 * m["mlp"]))),
        "cross_entropy": lambda m, dtype: run(kernels.cross_entropy(leaf(tokens(m), m["vocab"], dtype=dtype), targets(m))),
        "linear_cross_entropy": linear_cross_entropy,
        "linear_cross_entropy recompute": lambda m, dtype: linear_cross_entropy(m, dtype, strategy="recompute"),
        "linear_cross_entropy recompute filtered": lambda m, dtype: linear_cross_entropy(m, dtype, strategy="recompute", filter_eps="auto"),
        "flash_attention": attention,
        "flash_attention packed": lambda m, dtype: attention(m, dtype, True),
        "flash_attention packed, capped": lambda m, dtype: attention(m, dtype, True, softcap=30.0),
        "flash_attention fp32": lambda m, dtype: attention(m, torch.float32),
        "newton_schulz": orthogonalize,
        "decode_attention": decode_attention,
        "sample": sample,
    }


# Not all ops need all three models: the 44 M model has heads of 48, the 1 B model grouped heads, and documents are packed in both.
MODELS_OF = {
    "rms_norm": ("124m", "1b"), "rms_norm fp32": ("44m",), "add_rms_norm": ("44m", "1b"), "add_rms_norm fp32": ("44m", "124m"),
    "rope": ("124m",), "rope packed": ("44m", "1b"), "qk_norm_rope": ("124m",), "qk_norm_rope packed": ("44m", "1b"),
    "flash_attention": ("124m",), "flash_attention packed": ("44m", "1b"), "flash_attention packed, capped": ("44m", "124m"),
    "flash_attention fp32": (),  # strategy "auto" uses PyTorch in fp32; at any of HEADS on request
    "linear_cross_entropy recompute filtered": ("1b",),
    "newton_schulz": ("44m",), "decode_attention": ("44m", "1b"), "sample": ("44m",),
}  # fmt: skip
HEADS_OF = {
    "flash_attention": HEADS, "flash_attention packed, capped": ("d96", "d128", "d192", "d256"), "flash_attention fp32": ("d16", "d32"),
    "decode_attention": ("d80", "d128", "d256"),
}  # fmt: skip
# Products of blocks need tensor cores. Triton uses none on sm_75; the ops choose PyTorch's kernels there.
NEEDS_TENSOR_CORES = (
    *(op for op in MODELS_OF if op.startswith(("flash", "linear"))), "linear_cross_entropy recompute", "newton_schulz"
)  # fmt: skip


def _driver(target: str, log: Callable[[str], None]):
    """A Triton driver of a GPU of the target that compiles what is launched and runs nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    from tritale.kernels.launch import SHARED_MEMORY

    class StubDriver(DriverBase):
        def __init__(self):
            self.utils = self
            self.launcher_cls = lambda src, metadata: lambda *launch: log(metadata.hash)
            self.get_current_device = lambda: TARGETS.index(target)
            self.get_current_stream = lambda device: 0

        @classmethod
        def is_active(cls) -> Any:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)

        def get_device_properties(self, device):
            return {"max_shared_mem": SHARED_MEMORY[target], "multiprocessor_count": 100, "warpSize": 32}

        def load_binary(self, name, binary, shared, device):
            return object(), object(), 0, 0, 1024

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_active_torch_device(self):
            raise NotImplementedError  # nothing runs

        get_benchmarker = get_active_torch_device

    return StubDriver()


@contextmanager
def stub_gpu(target: str, log: Callable[[str], None]) -> Iterator[None]:
    """Inside, CPU tensors go through the Triton launchers, compiled for the target, and PyTorch's matrix products do nothing."""
    import torch
    from triton.runtime import driver

    from tritale.kernels import dispatch

    def product(a, b, *, out=None, **_):
        return a.new_empty((*a.shape[:-1], b.shape[-1])) if out is None else out

    driver.set_active(_driver(target, log))
    with (
        mock.patch.object(dispatch, "interprets", lambda: True),
        mock.patch.object(torch, "mm", product),
        mock.patch.object(torch.Tensor, "__matmul__", product),
    ):
        yield


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _accesses(text: str, instructions: dict[str, str], width: str, wide: str, unit: int, default: int) -> dict[str, int]:
    """Loads and stores of global memory: bits of the widest, and how many are of 128 bits or narrower."""
    counts = {}
    for kind, name in instructions.items():
        widths = [int(re.sub(r"\D", "", w) or default) for w in re.findall(name + width, text)]
        counts[f"{kind}_bits"] = unit * max(widths, default=0)
        counts[f"{kind}_128"] = _count(name + wide, text)
        counts[f"{kind}_narrower"] = _count(rf"{name}(?!{wide})", text)
    return counts


def read_cubin(path: Path) -> dict:
    """Registers, stack and instructions of one cubin, by cuobjdump of the Triton wheel."""
    import triton

    tools = Path(triton.__path__[0]) / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    loads = {"load": r"\bLDG(?:STS)?\b", "store": r"\bSTG\b"}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"] + _count(r"\b(?:STL|LDL)\b", text),
        **_accesses(text, loads, r"(?:\.(?!U?\d+\b)\w+)*(\.U?\d+)?\b", r"\.[\w.]*128\b", unit=1, default=32),  # without a width: 32
        "tensor_core": sorted(set(re.findall(r"\b(UTCHMMA|HGMMA|HMMA|DMMA)\b", text))),
        "fma": _count(r"\bFFMA2?\b", text),
        "fp64": _count(r"\b(?:DADD|DMUL|DFMA)\b", text),
        "atomics": _count(r"\b(?:ATOM|ATOMG|RED|REDG)\.", text),
        "instructions": _count(r"/\*[0-9a-f]{4,}\*/ ", text),
    }


def read_amdgcn(text: str) -> dict:
    """The same of the assembly of an AMD GPU."""
    field = lambda name: max((int(v) for v in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)
    loads = {kind: rf"(?:global|buffer)_{kind}" for kind in ("load", "store")}
    width = r"_(?:ubyte|sbyte|byte|ushort|short|dword)(?:_d16(?:_hi)?)?(x\d)?\b"
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count"),
        **_accesses(text, loads, width, "_dwordx4", unit=32, default=1),
        "tensor_core": sorted(set(re.findall(r"\b(v_mfma)_\w+", text))),
        "fma": _count(r"\bv_(?:pk_)?(?:fma|fmac)_", text),
        "fp64": _count(r"\bv_(?:add|mul|fma|fmac)_f64", text),
        "atomics": _count(r"(?:global|buffer)_atomic", text),
        "instructions": _count(r"\n\t[sv]_", text),
    }


def tensor_ratio(ttgir: str) -> float:
    """Tensor FLOPs executed over needed, from the layouts of Triton's last representation. A product (M, N) that is smaller than what its
    warps cover, warps · instruction along M and N, is computed several times. UTCHMMA has no warps to cover and counts as 1."""
    layouts = {}
    for name, text in re.findall(r"(#mma\d*) = #ttg\.\w+<\{(.*?)\}>", ttgir):
        warps, shape = (
            re.findall(r"\d+", m[1]) if (m := re.search(field + r" = \[([\d, ]+)\]", text)) else ()
            for field in ("warpsPerCTA", "instrShape")
        )
        layouts[name] = [int(w) * int(i) for w, i in zip(warps, shape, strict=False)]
    executed = needed = 0
    for k, m, n, name in re.findall(r"(?:tt\.dot|warp_group_dot) .*?<\d+x(\d+)x\w+, .* -> tensor<(\d+)x(\d+)x\w+, (#mma\d*)>", ttgir):
        (warps_m, warps_n), shape = layouts[name], (int(m), int(n))
        needed += shape[0] * shape[1] * int(k)
        executed += max(shape[0], warps_m) * max(shape[1], warps_n) * int(k)
    return round(executed / needed, 3) if needed else 1.0


def occupancy(target: str, registers: int, shared: int, n_warps: int, tensor_memory: int = 0) -> float:
    """The fraction of an SM's warps that can be resident."""
    if target.startswith("gfx"):  # CDNA 3: 4 × 8 wavefronts, 512 vector registers a lane in pieces of 8, 64 KB
        all_warps, all_shared, all_blocks = 32, 64 << 10, 32
        by_registers = 4 * min(8, 512 // (-(-max(1, registers) // 8) * 8)) // n_warps
    else:
        all_registers, all_shared, all_warps, all_blocks = SM_LIMITS[target]
        by_registers = all_registers // (-(-max(1, registers) * 32 // 256) * 256) // n_warps
        shared += 1024 if target != "sm_75" else 0  # reserved by the system for each block
    by_shared = all_shared // shared if shared else all_blocks
    by_tensor_memory = 512 // tensor_memory if tensor_memory else all_blocks
    return round(min(all_blocks, by_registers, by_shared, by_tensor_memory, all_warps // n_warps) * n_warps / all_warps, 3)


def _reading(target: str, name: str, files: dict[str, Path]) -> dict:
    saved = files[".json"].with_name(f"tritale-{VERSION}.json")
    if saved.exists():
        return json.loads(saved.read_text())
    metadata = json.loads(files[".json"].read_text())
    reading = read_cubin(files[".cubin"]) if ".cubin" in files else read_amdgcn(files[".amdgcn"].read_text())
    n_warps, tensor_memory = metadata["num_warps"], metadata.get("tmem_size") or 0
    reading = {
        "kernel": name.lstrip("_"),
        **{"warps": n_warps, "stages": metadata["num_stages"], "shared": metadata["shared"], "tensor_memory": tensor_memory},
        "occupancy": occupancy(target, reading["registers"], metadata["shared"], n_warps, tensor_memory),
        "has_dot": "tt.dot" in files[".ttir"].read_text(),
        "tensor_ratio": tensor_ratio(files[".ttgir"].read_text()),
        **reading,
    }
    temporary = saved.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(reading))
    temporary.replace(saved)  # two processes may read the same kernel
    return reading


VERSION = hashlib.sha256(
    "".join(map(inspect.getsource, (_accesses, read_cubin, read_amdgcn, tensor_ratio, occupancy, _reading))).encode()
).hexdigest()[:12]
_pass = "forward"  # what is being launched
_launched: dict[str, list[tuple[str, str]]] = {}  # (hash, pass) by target: a kernel keeps the list it was first launched with
_files: dict[str, tuple[str, dict[str, Path]]] = {}


def measure(task: tuple[str, str, tuple[str, ...]]) -> list[dict]:
    """One row for each kernel binary of an op on a target, by model, or {"error": …} if the op could not be launched."""
    import torch
    from triton import knobs

    from tritale import kernels

    def loaded(module, function, name, files, key):
        _files[key] = (name, {Path(f).suffix: Path(f) for f in files.values()})

    knobs.runtime.kernel_load_start_hook = loaded  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    global _pass
    target, op, models = task
    launched = _launched.setdefault(target, [])
    log = lambda key: launched.append((key, _pass))
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    rows = []
    for model in models:
        launched.clear()
        _pass = "forward"
        where = {"target": target, "op": op, "model": model}
        try:
            with stub_gpu(target, log), kernels.backend("triton"):
                _cases()[op]({**MODELS, **HEADS}[model], dtype)
        except Exception as problem:  # reported in the row: a test or the report shows it
            rows.append({**where, "kernel": "", "error": f"{type(problem).__name__}: {problem}"[:300]})
        for key, which in dict.fromkeys(launched):
            rows.append({**where, "pass": which, "binary": key[:12], **_reading(target, *_files[key])})
    return rows


def measure_all(targets, ops, models, processes: int, report: Callable[[int, int, str], None]) -> list[dict]:
    """`measure` of everything, in a pool: one task for each op and target, so that no process waits long for another."""
    order = {op: i for i, op in enumerate(_cases())}
    tasks = []
    for op in order:
        wanted = tuple(m for m in MODELS_OF.get(op, MODELS) if m in models)
        wanted += tuple(m for m in HEADS_OF.get(op, ()) if m in models)
        if wanted and (not ops or op.split()[0] in ops):
            tasks += [(t, op, wanted) for t in targets if not (t == "sm_75" and op in NEEDS_TENSOR_CORES)]
    rows = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measure, task) for task in reversed(tasks)]  # attention, the longest to compile, first
        for i, done in enumerate(as_completed(futures), 1):
            rows += done.result()
            report(i, len(tasks), f"{rows[-1]['op']} {rows[-1]['target']}")
    return sorted(rows, key=lambda r: (TARGETS.index(r["target"]), order[r["op"]], [*MODELS, *HEADS].index(r["model"])))


def readings(targets=TARGETS, ops=(), models=GATED, processes: int = 2, report=lambda i, n, name: None) -> list[dict]:
    """`measure_all` in a process of its own, without the interpreter; calls `report(done, of, name)` after each task."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "rows.json"), Path(folder, "errors")
        command = [sys.executable, "-m", "bench.machine_code", "--out", str(out), "--processes", str(processes)]
        command += ["--targets", ",".join(targets), "--models", ",".join(models), "--ops", ",".join(ops)]
        with errors.open("w") as stream:
            options: dict = {"stdout": subprocess.PIPE, "stderr": stream, "text": True, "start_new_session": True}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
            try:
                for line in process.stdout or ():
                    if match := re.match(r"(\d+)/(\d+) (.*)", line):
                        report(int(match[1]), int(match[2]), match[3])
                status = process.wait()
            finally:
                if process.poll() is None:  # interrupted: end the process and its workers
                    os.killpg(process.pid, signal.SIGKILL)
        if status:
            raise RuntimeError(f"the compile process failed:\n{errors.read_text()[-3000:]}")
        return json.loads(out.read_text())


def budgets(rows: list[dict]) -> dict:
    """{target: {op/model/kernel: {registers, shared, occupancy, tensor_ratio}}}: the worst of each over the kernel's binaries."""
    table = {}
    for row in rows:
        if "error" in row:
            continue
        budget = table.setdefault(row["target"], {}).setdefault(f"{row['op']}/{row['model']}/{row['kernel']}", {})
        for name, worse in (("registers", max), ("shared", max), ("occupancy", min), ("tensor_ratio", max)):
            budget[name] = worse(row[name], budget.get(name, row[name]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Machine code of every kernel for every GPU architecture, compiled without a GPU.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write-budgets", action="store_true")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default=",".join(GATED))
    parser.add_argument("--ops", default="")
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    report = lambda i, n, name: print(f"{i}/{n} {name}", flush=True)
    rows = measure_all(a.targets.split(","), tuple(filter(None, a.ops.split(","))), a.models.split(","), a.processes, report)
    if a.out:
        a.out.write_text(json.dumps(rows))
    if a.write_budgets:
        import triton

        lines = json.dumps({"triton": triton.__version__, **budgets(rows)}, indent=1)
        BUDGETS.write_text(re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", lines) + "\n")


if __name__ == "__main__":
    main()
