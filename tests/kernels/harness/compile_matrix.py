"""What the ops' own launchers launch, compiled for every GPU generation without a GPU, and what the binaries say.

A driver that stands in for the GPU (`_driver`) takes each launch: Triton specialises and compiles it as on the card named, and nothing
runs. So the public functions are called, forward and backward, with CPU tensors at the shapes of three models (`MODELS`, `_cases`), and
there is no second list of signatures. The kernels must be decorated without TRITON_INTERPRET, so this runs as a process of its own:

    python -m tests.kernels.harness.compile_matrix [--out readings.json] [--targets sm_90,gfx942] [--ops rms_norm] [--models 44m]
    python -m tests.kernels.harness.compile_matrix --write-budgets      # after a change that is meant to cost more, or less

`readings()` starts it for tests and the report. Triton's cache on disk keeps the binaries and, beside each, what was read from it.
"""

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[3]
BUDGETS = Path(__file__).parents[1] / "budgets.json"
REWRITE = "python -m tests.kernels.harness.compile_matrix --write-budgets"
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

# The 1 B model has Llama 3.2's grouped heads. Last, head sizes of larger models, for attention alone and only when asked for.
MODELS = {
    "44m": {"batch": 8, "context": 512, "width": 512, "n_head": 6, "n_kv_head": 6, "head_dim": 48, "mlp": 768, "vocab": 65024},
    "124m": {"batch": 8, "context": 1024, "width": 768, "n_head": 12, "n_kv_head": 12, "head_dim": 64, "mlp": 2048, "vocab": 50304},
    "1b": {"batch": 4, "context": 2048, "width": 2048, "n_head": 32, "n_kv_head": 8, "head_dim": 64, "mlp": 5632, "vocab": 32000},
}
LARGER_HEADS = {
    f"d{d}": {"batch": 2, "context": 2048, "width": 16 * d, "n_head": 16, "n_kv_head": 4, "head_dim": d, "mlp": 0, "vocab": 0}
    for d in (16, 32, 48, 64, 80, 96, 128, 256)
}

# Per generation and processor: registers, shared bytes, warps, blocks (CUDA C++ programming guide, table of compute capabilities).
PROCESSOR = {
    "sm_75": (65536, 64 << 10, 32, 16),
    "sm_80": (65536, 164 << 10, 64, 32),
    "sm_86": (65536, 100 << 10, 48, 16),
    "sm_89": (65536, 100 << 10, 48, 24),
    "sm_90": (65536, 228 << 10, 64, 32),
    "sm_100": (65536, 228 << 10, 64, 32),
    "sm_120": (65536, 100 << 10, 48, 24),
}

Case = Callable[[dict, "object"], object]


def _cases() -> dict[str, Case]:
    """{op: function of (model, dtype) that calls it forward and backward}, for the ops that have a Triton form."""
    import torch

    from tritale import kernels

    def leaf(*shape, dtype):
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    def run(outputs) -> None:
        global _pass
        _pass = "backward"
        outputs = [o for o in ([outputs] if isinstance(outputs, torch.Tensor) else outputs) if o.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])

    def tokens(m):
        return m["batch"] * m["context"]

    def hidden(m, dtype, name="width", factor=1):
        return leaf(m["batch"], m["context"], factor * m[name], dtype=dtype)

    def weight(n):
        return leaf(n, dtype=torch.float32)

    def packed_heads(m, dtype, is_packed):
        shape = (1, tokens(m)) if is_packed else (m["batch"], m["context"])
        return leaf(*shape, (m["n_head"] + 2 * m["n_kv_head"]) * m["head_dim"], dtype=dtype)

    def heads(m, dtype, is_packed):
        qkv = packed_heads(m, dtype, is_packed).unflatten(-1, (-1, m["head_dim"]))
        return qkv.split((m["n_head"], m["n_kv_head"], m["n_kv_head"]), dim=-2)

    def tables(m):
        return [torch.empty(2 * m["context"], m["head_dim"] // 2) for _ in range(2)]

    def documents(m, is_packed):
        return {"cu_seqlens": torch.arange(0, tokens(m) + 1, m["context"], dtype=torch.int32)} if is_packed else {}

    def targets(m):
        return torch.zeros(tokens(m), dtype=torch.int64)

    def norm(m, dtype):
        run(kernels.rms_norm(hidden(m, dtype), weight(m["width"])))

    def add_norm(m, dtype, residual=None):
        run(kernels.add_rms_norm(hidden(m, dtype), hidden(m, residual or dtype), weight(m["width"])))

    def rope(m, dtype, is_packed=False):
        run(kernels.rope(*heads(m, dtype, is_packed)[:2], *tables(m), **documents(m, is_packed)))

    def qk_norm_rope(m, dtype, is_packed=False):
        sizes = {"n_head": m["n_head"], "n_kv_head": m["n_kv_head"], **documents(m, is_packed)}
        run(kernels.qk_norm_rope(packed_heads(m, dtype, is_packed), weight(m["head_dim"]), weight(m["head_dim"]), *tables(m), **sizes))

    def cross_entropy(m, dtype):
        run(kernels.cross_entropy(leaf(tokens(m), m["vocab"], dtype=dtype), targets(m)))

    def linear_cross_entropy(m, dtype, **options):
        x, w = leaf(tokens(m), m["width"], dtype=dtype), leaf(m["vocab"], m["width"], dtype=dtype)
        run(kernels.linear_cross_entropy(x, w, targets(m), **options))

    def attention(m, dtype, is_packed=False):
        run(kernels.flash_attention(*heads(m, dtype, is_packed), **documents(m, is_packed)))

    return {
        "rms_norm": norm,
        "rms_norm fp32": lambda m, dtype: norm(m, torch.float32),  # under autocast the residual stream is fp32
        "add_rms_norm": add_norm,
        "add_rms_norm fp32": lambda m, dtype: add_norm(m, dtype, torch.float32),
        "rope": rope,
        "rope packed": lambda m, dtype: rope(m, dtype, True),
        "qk_norm_rope": qk_norm_rope,
        "qk_norm_rope packed": lambda m, dtype: qk_norm_rope(m, dtype, True),
        "swiglu": lambda m, dtype: run(kernels.swiglu(hidden(m, dtype, "mlp", 2))),
        "geglu": lambda m, dtype: run(kernels.geglu(hidden(m, dtype, "mlp", 2))),
        "cross_entropy": cross_entropy,
        "linear_cross_entropy": linear_cross_entropy,
        "linear_cross_entropy recompute": lambda m, dtype: linear_cross_entropy(m, dtype, strategy="recompute"),
        "flash_attention": attention,
        "flash_attention packed": lambda m, dtype: attention(m, dtype, True),
        "flash_attention fp32": lambda m, dtype: attention(m, torch.float32),
    }


# Not all ops need all three: the 44 M model brings a head size of 48, the 1 B model grouped heads, and documents are packed in both.
# What the models of an op share, as the losses and activations do, Triton itself does not compile twice.
MODELS_OF = {
    "rms_norm": ("124m", "1b"),
    "rms_norm fp32": ("44m",),
    "add_rms_norm": ("44m", "1b"),
    "add_rms_norm fp32": ("44m", "124m"),
    "rope": ("124m",),
    "rope packed": ("44m", "1b"),
    "qk_norm_rope": ("124m",),
    "qk_norm_rope packed": ("44m", "1b"),
    "flash_attention": ("124m",),
    "flash_attention packed": ("44m", "1b"),
    "flash_attention fp32": (),  # `auto` leaves fp32 to PyTorch; at any of LARGER_HEADS when asked for
}
# Products of blocks need tensor cores that Triton uses; on sm_75 it has none to offer, and the ops choose PyTorch's there.
NEEDS_TENSOR_CORES = ("flash_attention", "flash_attention packed", "flash_attention fp32", "linear_cross_entropy recompute")


def _driver(target: str, log: Callable[[str], None]):
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    from tritale.kernels.launch import SHARED_MEMORY

    class StubDriver(DriverBase):
        """A GPU of the target that compiles what is launched and runs nothing."""

        def __init__(self):
            self.utils = self
            self.launcher_cls = lambda src, metadata: lambda *launch: log(metadata.hash)
            self.get_current_device = lambda: TARGETS.index(target)
            self.get_current_stream = lambda device: 0

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)

        def get_device_properties(self, device):
            return {"max_shared_mem": SHARED_MEMORY[target], "multiprocessor_count": 100, "warpSize": 32}

        def load_binary(self, name, binary, shared, device):
            return object(), object(), 0, 0, 1024

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError

    return StubDriver()


@contextmanager
def standing_in(target: str, log: Callable[[str], None]) -> Iterator[None]:
    """Inside, CPU tensors go through the Triton launchers, compiled for the target, and PyTorch's products beside them do nothing."""
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


def _widest(text: str, pattern: str, default: int = 32) -> int:
    """Bits of the widest access; an instruction that names no width moves 32."""
    return max((int(re.sub(r"\D", "", w) or default) for w in re.findall(pattern, text)), default=0)


def read_cubin(path: Path) -> dict:
    """Registers, stack and instructions of one cubin, by cuobjdump of the Triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    width = r"(?:\.(?!U?\d+\b)\w+)*(\.U?\d+)?\b"
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"] + _count(r"\b(?:STL|LDL)\b", text),
        "load_bits": _widest(text, r"\bLDG(?:STS)?" + width),
        "load_128": _count(r"\bLDG(?:STS)?\.[\w.]*128\b", text),
        "load_narrower": _count(r"\bLDG(?:STS)?\.(?![\w.]*128\b)", text),
        "store_bits": _widest(text, r"\bSTG" + width),
        "store_128": _count(r"\bSTG\.[\w.]*128\b", text),
        "store_narrower": _count(r"\bSTG\.(?![\w.]*128\b)", text),
        "tensor_core": sorted(set(re.findall(r"\b(UTCHMMA|HGMMA|HMMA|DMMA)\b", text))),
        "fma": _count(r"\bFFMA2?\b", text),
        "fp64": _count(r"\b(?:DADD|DMUL|DFMA)\b", text),
        "atomics": _count(r"\b(?:ATOM|ATOMG|RED|REDG)\.", text),
        "instructions": _count(r"/\*[0-9a-f]{4,}\*/ ", text),
    }


def read_amdgcn(text: str) -> dict:
    field = lambda name: max((int(v) for v in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)
    width = r"_(?:ubyte|sbyte|byte|ushort|short|dword)(?:_d16(?:_hi)?)?(x\d)?\b"
    bits = lambda kind: 32 * _widest(text, rf"(?:global|buffer)_{kind}{width}", default=1)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count"),
        "load_bits": bits("load"),
        "load_128": _count(r"(?:global|buffer)_load_dwordx4", text),
        "load_narrower": _count(r"(?:global|buffer)_load_(?!dwordx4)", text),
        "store_bits": bits("store"),
        "store_128": _count(r"(?:global|buffer)_store_dwordx4", text),
        "store_narrower": _count(r"(?:global|buffer)_store_(?!dwordx4)", text),
        "tensor_core": sorted(set(re.findall(r"\b(v_mfma)_\w+", text))),
        "fma": _count(r"\bv_(?:pk_)?(?:fma|fmac)_", text),
        "fp64": _count(r"\bv_(?:add|mul|fma|fmac)_f64", text),
        "atomics": _count(r"(?:global|buffer)_atomic", text),
        "instructions": _count(r"\n\t[sv]_", text),
    }


def occupancy(target: str, registers: int, shared: int, n_warps: int, tensor_memory: int = 0) -> float:
    """Part of a processor's warps that can be resident."""
    if target.startswith("gfx"):  # CDNA 3: 4 × 8 wavefronts, 512 vector registers a lane in pieces of 8, 64 KB
        all_warps, all_shared, all_blocks = 32, 64 << 10, 32
        by_registers = 4 * min(8, 512 // (-(-max(1, registers) // 8) * 8)) // n_warps
    else:
        all_registers, all_shared, all_warps, all_blocks = PROCESSOR[target]
        by_registers = all_registers // (-(-max(1, registers) * 32 // 256) * 256) // n_warps
        shared += 1024 if target != "sm_75" else 0  # what the system keeps for each block
    by_shared = all_shared // shared if shared else all_blocks
    by_tensor_memory = 512 // tensor_memory if tensor_memory else all_blocks
    return round(min(all_blocks, by_registers, by_shared, by_tensor_memory, all_warps // n_warps) * n_warps / all_warps, 3)


def _reading(target: str, name: str, files: dict[str, Path]) -> dict:
    beside = files[".json"].with_name(f"tritale-{VERSION}.json")
    if beside.exists():
        return json.loads(beside.read_text())
    metadata = json.loads(files[".json"].read_text())
    reading = read_cubin(files[".cubin"]) if ".cubin" in files else read_amdgcn(files[".amdgcn"].read_text())
    source = files[".ttir"].read_text()
    n_warps, tensor_memory = metadata["num_warps"], metadata.get("tmem_size") or 0
    reading = {
        "kernel": name.lstrip("_"),
        "warps": n_warps,
        "stages": metadata["num_stages"],
        "shared": metadata["shared"],
        "tensor_memory": tensor_memory,
        "occupancy": occupancy(target, reading["registers"], metadata["shared"], n_warps, tensor_memory),
        "has_dot": "tt.dot" in source,
        **reading,
    }
    temporary = beside.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(reading))
    temporary.replace(beside)  # two processes may read the same kernel
    return reading


VERSION = hashlib.sha256("".join(map(inspect.getsource, (_widest, read_cubin, read_amdgcn, occupancy, _reading))).encode()).hexdigest()[:12]
_pass = "forward"  # what is being launched
_launched: dict[str, list[tuple[str, str]]] = {}  # (hash, pass) by target: a kernel keeps the list it was first launched with
_files: dict[str, tuple[str, dict[str, Path]]] = {}


def measure(task: tuple[str, str, tuple[str, ...]]) -> list[dict]:
    """One row for each kernel binary of an op on a target, by model, or {"error": …} where the op could not be launched."""
    import torch
    import triton

    from tritale import kernels

    def loaded(module, function, name, files, key):
        _files[key] = (name, {Path(f).suffix: Path(f) for f in files.values()})

    triton.knobs.runtime.kernel_load_start_hook = loaded
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
            with standing_in(target, log), kernels.backend("triton"):
                _cases()[op]({**MODELS, **LARGER_HEADS}[model], dtype)
        except Exception as problem:  # told in the row: a test or the report shows it
            rows.append({**where, "kernel": "", "error": f"{type(problem).__name__}: {problem}"[:300]})
        for key, which in dict.fromkeys(launched):
            rows.append({**where, "pass": which, "binary": key[:12], **_reading(target, *_files[key])})
    return rows


def measure_all(targets, ops, models, processes: int, told: Callable[[int, int, str], None]) -> list[dict]:
    """`measure` of everything, in a pool: one task for each op and target, so that no process waits long for another."""
    tasks = []
    for op in _cases():
        wanted = tuple(m for m in MODELS_OF.get(op, MODELS) if m in models)
        if op.startswith("flash_attention"):
            wanted += tuple(m for m in LARGER_HEADS if m in models)
        if wanted and (not ops or op.split()[0] in ops):
            tasks += [(t, op, wanted) for t in targets if not (t == "sm_75" and op in NEEDS_TENSOR_CORES)]
    tasks.reverse()  # attention, the longest to compile, first
    rows = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for i, done in enumerate(as_completed([pool.submit(measure, task) for task in tasks]), 1):
            part = done.result()
            rows += part
            told(i, len(tasks), f"{part[0]['op']} {part[0]['target']}")
    order = {op: i for i, op in enumerate(_cases())}
    return sorted(rows, key=lambda r: (TARGETS.index(r["target"]), order[r["op"]], [*MODELS, *LARGER_HEADS].index(r["model"])))


def readings(targets=TARGETS, ops=(), models=tuple(MODELS), processes: int = 2, told=lambda i, n, name: None) -> list[dict]:
    """`measure_all` in a process of its own, without the interpreter; `told(done, of, name)` is called as it goes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "rows.json"), Path(folder, "errors")
        command = [sys.executable, "-m", "tests.kernels.harness.compile_matrix", "--out", str(out), "--processes", str(processes)]
        command += ["--targets", ",".join(targets), "--models", ",".join(models), "--ops", ",".join(ops)]
        with errors.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stream, text=True)
            for line in process.stdout:
                if match := re.match(r"(\d+)/(\d+) (.*)", line):
                    told(int(match[1]), int(match[2]), match[3])
        if process.wait():
            raise RuntimeError(f"the compile process failed:\n{errors.read_text()[-3000:]}")
        return json.loads(out.read_text())


def budgets(rows: list[dict]) -> dict:
    """{target: {op/model/kernel: {registers, shared, occupancy}}}: the worst of each over the kernel's binaries."""
    table = {}
    for row in rows:
        if "error" in row:
            continue
        budget = table.setdefault(row["target"], {}).setdefault(f"{row['op']}/{row['model']}/{row['kernel']}", {})
        for name, worse in (("registers", max), ("shared", max), ("occupancy", min)):
            budget[name] = worse(row[name], budget.get(name, row[name]))
    return table


def worse_than(kept: dict[str, dict], now: dict[str, dict], slack: int = 0) -> list[str]:
    """What of `now` is worse than `kept`, both {kernel: {registers, shared, occupancy}}, a line each; with slack, as for another version of
    the compiler, that many registers more are none the worse, nor is an occupancy that follows from them."""
    lines = []
    for kernel in sorted({*kept, *now}):
        budget, row = kept.get(kernel), now.get(kernel)
        if budget is None or row is None:
            lines.append(f"{kernel}: {'no budget yet' if budget is None else 'has a budget and is not launched any more'}")
            continue
        over = [f"{n} {row[n]}, budget {budget[n]}" for n, s in (("registers", slack), ("shared", 0)) if row[n] > budget[n] + s]
        if not slack and row["occupancy"] < budget["occupancy"]:
            over.append(f"occupancy {row['occupancy']}, budget {budget['occupancy']}")
        if over:
            lines.append(f"{kernel}: {'; '.join(over)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write-budgets", action="store_true")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ops", default="")
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    told = lambda i, n, name: print(f"{i}/{n} {name}", flush=True)
    rows = measure_all(a.targets.split(","), tuple(filter(None, a.ops.split(","))), a.models.split(","), a.processes, told)
    if a.out:
        a.out.write_text(json.dumps(rows))
    if a.write_budgets:
        import triton

        lines = json.dumps({"triton": triton.__version__, **budgets(rows)}, indent=1)
        BUDGETS.write_text(re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", lines) + "\n")


if __name__ == "__main__":
    main()
