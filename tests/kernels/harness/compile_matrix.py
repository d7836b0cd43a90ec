"""What the ops' own launchers launch, compiled for every GPU generation without a GPU, and what the binaries say.

A driver that stands in for the GPU (`StubDriver`) takes each launch: Triton specialises and compiles it as on the card named, and nothing
runs. So the public functions are called, forward and backward, with CPU tensors at the shapes of three models (`MODELS`, `_cases`), and
there is no second list of signatures. The kernels must be decorated without TRITON_INTERPRET, so this runs as a process of its own:

    python -m tests.kernels.harness.compile_matrix --out readings.json [--targets sm_90,gfx942] [--ops rms_norm]
    python -m tests.kernels.harness.compile_matrix --write-budgets      # after a change that is meant to cost more, or less

`readings()` starts it for tests and the report. Triton's cache on disk keeps the binaries and, beside each, what was read from it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]
BUDGETS = Path(__file__).parents[1] / "budgets.json"
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

MODELS = {
    "44m": {"width": 512, "n_head": 6, "n_kv_head": 6, "head_dim": 48, "mlp": 768, "vocab": 65024},
    "124m": {"width": 768, "n_head": 12, "n_kv_head": 12, "head_dim": 64, "mlp": 2048, "vocab": 50304},
    "1b": {"width": 2048, "n_head": 32, "n_kv_head": 8, "head_dim": 64, "mlp": 5632, "vocab": 32000},
}
TOKENS = 128  # multiples of 16 are all alike to the compiler; few, as PyTorch's products around the kernels do run

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
        outputs = [o for o in ([outputs] if isinstance(outputs, torch.Tensor) else outputs) if o.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])

    def heads(m, dtype):
        n = m["n_head"] + 2 * m["n_kv_head"]
        qkv = leaf(1, TOKENS, n * m["head_dim"], dtype=dtype)
        return qkv, qkv.unflatten(-1, (n, -1)).split((m["n_head"], m["n_kv_head"], m["n_kv_head"]), dim=-2)

    def tables(m):
        return [torch.empty(2 * TOKENS, m["head_dim"] // 2) for _ in range(2)]

    def documents():
        return torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)

    def targets():
        return torch.zeros(TOKENS, dtype=torch.int64)

    def weight(n):
        return leaf(n, dtype=torch.float32)

    def qk_norm_rope(m, dtype):
        qkv, _ = heads(m, dtype)
        sizes = {"n_head": m["n_head"], "n_kv_head": m["n_kv_head"]}
        return run(kernels.qk_norm_rope(qkv, weight(m["head_dim"]), weight(m["head_dim"]), *tables(m), **sizes))

    def linear_cross_entropy(m, dtype, **options):
        x, w = leaf(TOKENS, m["width"], dtype=dtype), leaf(m["vocab"], m["width"], dtype=dtype)
        return run(kernels.linear_cross_entropy(x, w, targets(), **options))

    def attention(m, dtype, **options):
        _, (q, k, v) = heads(m, dtype)
        return run(kernels.flash_attention(q, k, v, **options))

    return {
        "rms_norm": lambda m, t: run(kernels.rms_norm(leaf(TOKENS, m["width"], dtype=t), weight(m["width"]))),
        "add_rms_norm": lambda m, t: run(
            kernels.add_rms_norm(*(leaf(TOKENS, m["width"], dtype=t) for _ in range(2)), weight(m["width"]))
        ),
        "rope": lambda m, t: run(kernels.rope(*heads(m, t)[1][:2], *tables(m))),
        "rope packed": lambda m, t: run(kernels.rope(*heads(m, t)[1][:2], *tables(m), cu_seqlens=documents())),
        "qk_norm_rope": qk_norm_rope,
        "swiglu": lambda m, t: run(kernels.swiglu(leaf(TOKENS, 2 * m["mlp"], dtype=t))),
        "geglu": lambda m, t: run(kernels.geglu(leaf(TOKENS, 2 * m["mlp"], dtype=t))),
        "cross_entropy": lambda m, t: run(kernels.cross_entropy(leaf(TOKENS, m["vocab"], dtype=t), targets())),
        "linear_cross_entropy": linear_cross_entropy,
        "linear_cross_entropy recompute": lambda m, t: linear_cross_entropy(m, t, strategy="recompute"),
        "flash_attention": attention,
        "flash_attention packed": lambda m, t: attention(m, t, cu_seqlens=documents()),
    }


# Products of blocks need tensor cores that Triton uses; on sm_75 it has none to offer, and the ops choose PyTorch's there.
NEEDS_TENSOR_CORES = ("flash_attention", "flash_attention packed", "linear_cross_entropy recompute")


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
    """Inside, CPU tensors go through the Triton launchers, compiled for the target."""
    from triton.runtime import driver

    from tritale.kernels import dispatch

    driver.set_active(_driver(target, log))
    before, dispatch.uses_triton.__globals__["interprets"] = dispatch.interprets, lambda: True
    try:
        yield
    finally:
        dispatch.uses_triton.__globals__["interprets"] = before


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def read_cubin(path: Path, target: str) -> dict:
    """Registers, stack and instructions of one cubin, by cuobjdump of the Triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [str(tools / "cuobjdump"), "-res-usage", "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"] + _count(r"\b(?:STL|LDL)\b", text),
        "load_128": _count(r"\bLDG(?:STS)?\.[\w.]*128\b", text) + _count(r"\bUTMALDG\b", text),
        "load_narrower": _count(r"\bLDG(?:STS)?\.(?![\w.]*128\b)", text),
        "store_128": _count(r"\bSTG\.[\w.]*128\b", text) + _count(r"\bUTMASTG\b", text),
        "store_narrower": _count(r"\bSTG\.(?![\w.]*128\b)", text),
        "tensor_core": sorted(set(re.findall(r"\b(U?T?C?HMMA|HGMMA|DMMA)\b", text))),
        "fma": _count(r"\bFFMA\b", text),
        "atomics": _count(r"\b(?:ATOM|ATOMG|RED|REDG)\.", text),
        "instructions": _count(r"/\*[0-9a-f]{4,}\*/ ", text),
    }


def read_amdgcn(text: str) -> dict:
    field = lambda name: max((int(v) for v in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count"),
        "load_128": _count(r"(?:global|buffer)_load_dwordx4", text),
        "load_narrower": _count(r"(?:global|buffer)_load_(?!dwordx4)", text),
        "store_128": _count(r"(?:global|buffer)_store_dwordx4", text),
        "store_narrower": _count(r"(?:global|buffer)_store_(?!dwordx4)", text),
        "tensor_core": sorted(set(re.findall(r"\b(v_mfma_\w+?)_\w+", text))),
        "fma": _count(r"\bv_(?:pk_)?(?:fma|fmac)_", text),
        "atomics": _count(r"(?:global|buffer)_atomic", text),
        "instructions": _count(r"\n\t[sv]_", text),
    }


def occupancy(target: str, registers: int, shared: int, n_warps: int) -> float | None:
    """Part of a processor's warps that can be resident (NVIDIA)."""
    if target not in PROCESSOR:
        return None
    all_registers, all_shared, all_warps, all_blocks = PROCESSOR[target]
    by_registers = all_registers // (max(1, -(-registers * 32 // 256)) * 256) // n_warps
    by_shared = all_shared // (shared + (1024 if target != "sm_75" else 0)) if shared else all_blocks
    return round(min(all_blocks, by_registers, by_shared, all_warps // n_warps) * n_warps / all_warps, 3)


def measure(targets, ops, models) -> list[dict]:
    """One row for each kernel binary of each op, model and target, or {"error": …} where the op could not be launched."""
    import torch
    import triton

    from tritale import kernels

    paths = {}  # hash → files of the compiled kernel

    def loaded(module, function, name, files, key):
        paths[key] = (name, {Path(f).suffix: Path(f) for f in files.values()})

    triton.knobs.runtime.kernel_load_start_hook = loaded
    rows = []
    for target in targets:
        launched = []  # hashes; one list a target, as a kernel keeps the launcher it was first launched with
        for op, case in _cases().items():
            if (ops and op.split()[0] not in ops) or (target == "sm_75" and op in NEEDS_TENSOR_CORES):
                continue
            for model in models:
                launched.clear()
                dtype = torch.float16 if target == "sm_75" else torch.bfloat16
                where = {"target": target, "op": op, "model": model, "dtype": str(dtype)[6:]}
                try:
                    with standing_in(target, launched.append), kernels.backend("triton"):
                        case(MODELS[model], dtype)
                except Exception as problem:  # told in the row: a test or the report shows it
                    rows.append({**where, "kernel": "", "error": f"{type(problem).__name__}: {problem}"[:300]})
                for key in dict.fromkeys(launched):
                    rows.append({**where, **_reading(target, *paths[key])})
    return rows


def _reading(target: str, name: str, files: dict[str, Path]) -> dict:
    beside = files[".json"].with_name("tritale-reading.json")
    if beside.exists():
        return json.loads(beside.read_text())
    metadata = json.loads(files[".json"].read_text())
    if ".cubin" in files:
        reading = read_cubin(files[".cubin"], target)
        if files[".ptx"].read_text().count("tcgen05.mma"):
            reading["tensor_core"] = sorted({*reading["tensor_core"], "UTCHMMA"})
    else:
        reading = read_amdgcn(files[".amdgcn"].read_text())
    source = (files.get(".ttgir") or files[".ttir"]).read_text()
    reading = {
        "kernel": name,
        "warps": metadata["num_warps"],
        "stages": metadata["num_stages"],
        "shared": metadata["shared"],
        "occupancy": occupancy(target, reading["registers"], metadata["shared"], metadata["num_warps"]),
        "has_dot": "tt.dot" in source or "_mma" in source or "_dot" in source,
        **reading,
    }
    temporary = beside.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(reading))
    temporary.replace(beside)  # two processes may read the same kernel
    return reading


def readings(targets=TARGETS, ops=(), models=tuple(MODELS), processes: int = 2) -> list[dict]:
    """`measure` in processes of their own, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(min(processes, len(targets))):
            out = Path(folder, f"{i}.json")
            command = [sys.executable, "-m", "tests.kernels.harness.compile_matrix", "--out", str(out)]
            command += ["--targets", ",".join(targets[i::processes]), "--models", ",".join(models), "--ops", ",".join(ops)]
            running.append((out, subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)))
        rows = []
        for out, process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"the compile process failed:\n{errors[-3000:]}")
            rows += json.loads(out.read_text())
    return sorted(rows, key=lambda r: (TARGETS.index(r["target"]), r["op"], list(MODELS).index(r["model"]), r["kernel"]))


def budgets(rows: list[dict]) -> dict:
    """{target: {op/model/kernel: {registers, shared, occupancy}}}: the worst of each over the kernel's binaries."""
    table = {}
    for row in rows:
        if "error" in row:
            continue
        budget = table.setdefault(row["target"], {}).setdefault(f"{row['op']}/{row['model']}/{row['kernel']}", {})
        for name, worse in (("registers", max), ("shared", max), ("occupancy", min)):
            if row[name] is not None:
                budget[name] = worse(row[name], budget.get(name, row[name]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write-budgets", action="store_true")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ops", default="")
    a = parser.parse_args()
    if a.write_budgets:
        import triton

        lines = json.dumps({"triton": triton.__version__, **budgets(readings())}, indent=1)
        BUDGETS.write_text(re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", lines) + "\n")
        return
    rows = measure(a.targets.split(","), tuple(filter(None, a.ops.split(","))), a.models.split(","))
    text = json.dumps(rows)
    a.out.write_text(text) if a.out else print(text)


if __name__ == "__main__":
    main()
