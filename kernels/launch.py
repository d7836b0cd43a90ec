"""Launch options of every kernel: block sizes, warps and stages, one row per kernel and GPU architecture.

There is no autotuning, so start-up is quick and runs repeat. The choices follow from the binaries (registers, occupancy, bytes in flight):
see docs/kernels.md and `python -m bench.kernel_report`.

    options = launch_options("rms_norm_fwd", x, width=4096)      # {"BLOCK_N": 4096, "BLOCK_M": 1, "num_warps": 8}
    _rms_norm_fwd[grid](x, …, **options)

`x` is any tensor on the device of the launch; a row may depend on the sizes given. To add a kernel, add its rows to TABLE, one function of
the sizes for each architecture. "sm_80" is required, since the others fall back to it along FALLBACK. For an experiment or a test:

    with launch_override("rms_norm_fwd", num_warps=4):
        rms_norm(x)
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .dispatch import interprets

Options = dict[str, int]
Row = Callable[..., Options]

# An architecture without a row takes the row of the next: sm_86, sm_89 and sm_120 share the limit of 99 KB a block.
FALLBACK = {
    "sm_120": "sm_89", "sm_100": "sm_90", "sm_90": "sm_80", "sm_89": "sm_86", "sm_86": "sm_80", "sm_75": "sm_80", "gfx942": "sm_80",
    "interpreter": "sm_80",
}  # fmt: skip

# Bytes of shared memory a block may have.
SHARED_MEMORY = {
    "sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_120": 99 << 10, "gfx942": 64 << 10,
}  # fmt: skip

# SMs of a typical card, for compiling without one: T4, A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI300X (compute units).
_SMS = {
    "sm_75": 40, "sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304, "interpreter": 2,
}  # fmt: skip

# Bytes of the last cache before memory, of the same cards; MI300X: the Infinity Cache.
_L2 = {
    "sm_75": 4 << 20, "sm_80": 40 << 20, "sm_86": 6 << 20, "sm_89": 72 << 20, "sm_90": 50 << 20, "sm_100": 126 << 20, "sm_120": 96 << 20,
    "gfx942": 256 << 20, "interpreter": 1 << 14,
}  # fmt: skip


def power_of_two(n: int) -> int:
    """The smallest power of two ≥ n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, divisor: int) -> int:
    """n / divisor, rounded up."""
    return -(-n // divisor)


def _fixed(**options: int) -> Row:
    return lambda **sizes: options


def _norm(widest: int, a_warp: int, **more: int) -> Row:
    """A program takes as many rows as make 4,096 elements; a row of more than `widest` is cut into blocks of 4096.

    Forward 32 elements per thread, four 128-bit loads of bf16 in flight each. Backward also holds dw, so 16: about 100 registers
    instead of 190 (128 instead of 230 with an fp32 residual), and twice the warps for the same two programs and 32 KB in flight."""

    def row(width: int, itemsize: int) -> Options:
        block_n = power_of_two(width) if width <= widest else 4096
        block_m = max(1, 4096 // block_n)
        n_warps = min(16, max(4, block_m * block_n // a_warp))
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": n_warps, **more}

    return row


def _glu(warp: int) -> Row:
    """16 elements per thread of each tensor forward, 8 backward; several rows per program if they are narrow."""

    def row(width: int, is_backward: bool) -> Options:
        elements = 4 * warp * (8 if is_backward else 16)
        block_n = max(16, min(power_of_two(width), 512))
        return {"BLOCK_M": elements // block_n, "BLOCK_N": block_n, "num_warps": 4}

    return row


def _heads(elements: int, **more: int) -> Row:
    """A program takes as many heads as make `elements` entries of each half: two to four 128-bit loads per thread."""
    return lambda half: {"BLOCK_R": max(1, elements // power_of_two(half)), "num_warps": 4, **more}


def _rope(elements: int) -> Row:
    """A program takes as many tokens as make `elements` entries of each half: one 128-bit load per thread, for each head."""
    return lambda half: {"BLOCK_T": max(1, elements // power_of_two(half)), "MOST_HEADS": 8, "num_warps": 4}


def _cross_entropy(*, widest: int) -> Row:
    """16 logits per thread, 2–4 loads of 128 bits in flight each and about 32 registers, so that sm_80–sm_100 keep all warps resident: 64
    KB in flight per SM; 20–25 KB saturate the memory. 32 logits per thread spilled on sm_90. Several rows per program if V is small. A
    row that is read twice gets as many warps as a block may have, so that few rows are in flight and stay in the L2 cache: `widest`
    logits."""

    def row(vocab_size: int, reads_twice: bool) -> Options:
        most = widest if reads_twice else 4096
        block = max(16, min(power_of_two(vocab_size), most))
        rows = max(1, min(16, 4096 // block))
        return {"BLOCK_N": rows, "BLOCK_V": block, "num_warps": max(4, min(rows * block, most) // 512), "num_stages": 1}

    return row


Tiles = tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, warps, stages
SCALAR: dict[int, Tiles] = {64: (32, 32, 4, 1), 256: (16, 16, 4, 1)}  # without tensor cores: fp32, fp64, and all on sm_75


def _attention(tiles: dict[int, Tiles]) -> Row:
    """Tiles of 16-bit inputs, by the largest head size that they are for; of fp32 and fp64 one choice for all kernels and architectures.

    A warp owns 16 rows of every product (a warp of CDNA 3 32): with fewer rows than 16 for each warp, warps compute the same again. Heads
    of up to 48 have a tile of 16 columns: 64 rows of it are one 128-bit load for each of 128 threads, so these take four warps."""

    def row(head_dim: int, itemsize: int) -> Options:
        if itemsize == 2:
            chosen = tiles[min(size for size in tiles if head_dim <= size)]
        else:
            chosen = SCALAR[64 if head_dim <= 64 else 256]
        return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), chosen, strict=True))

    return row


_ATTENTION_SCALAR = _attention(SCALAR)
_ATTENTION_INTERPRETER = _fixed(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)


def _linear_recompute(half: tuple[int, ...], wide: tuple[int, ...], names: tuple[str, str, str]) -> Row:
    """Rows by dtype: tile sizes of rows, of columns and of K, warps and stages, for 16-bit inputs and for fp32 (no tensor cores: small
    tiles). 128 × 128 tiles with 64 of K spilled in backward on sm_80–sm_100, 32 × 64 in fp32 on all."""
    return lambda itemsize: dict(zip((*names, "num_warps", "num_stages"), half if itemsize == 2 else wide, strict=True))


def _decode(sums: int) -> Row:
    """`entries`: of a key, for all heads of a program."""
    return lambda entries: {"BLOCK_S": max(1, min(128, sums // entries)), "num_warps": 4}


TABLE: dict[str, dict[str, Row]] = {
    "flash_attention_fwd": {
        "sm_75": _ATTENTION_SCALAR,
        "sm_80": _attention(
            {48: (64, 32, 4, 3), 64: (128, 64, 8, 3), 96: (128, 64, 8, 3), 128: (128, 32, 8, 3), 192: (128, 32, 8, 1), 256: (128, 16, 8, 1)}
        ),
        "sm_120": _attention({48: (64, 32, 4, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (128, 16, 8, 1)}),
        "sm_90": _attention({48: (64, 32, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)}),
        "gfx942": _attention({256: (128, 32, 4, 2)}),
        "interpreter": _ATTENTION_INTERPRETER,
    },
    "flash_attention_bwd_dq": {
        "sm_75": _ATTENTION_SCALAR,
        "sm_80": _attention({48: (64, 64, 4, 2), 64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 192: (128, 16, 8, 1), 256: (32, 64, 8, 1)}),
        "sm_86": _attention({48: (64, 64, 4, 2), 64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 64, 8, 1)}),
        "sm_90": _attention({48: (64, 64, 4, 2), 128: (128, 64, 8, 2), 192: (128, 32, 8, 1), 256: (128, 32, 8, 2)}),
        "sm_100": _attention({48: (64, 64, 4, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 1)}),
        "gfx942": _attention({192: (128, 32, 4, 1), 256: (64, 16, 4, 1)}),
        "interpreter": _ATTENTION_INTERPRETER,
    },
    "flash_attention_bwd_dkv": {
        "sm_75": _ATTENTION_SCALAR,
        # 64 queries at a time took 255 registers and spilled on sm_86 at a head of 64; 32 take 168, and three blocks are resident.
        "sm_80": _attention({64: (32, 64, 4, 3), 80: (16, 128, 8, 2), 128: (16, 128, 8, 1), 256: (64, 32, 8, 2)}),
        "sm_86": _attention({64: (32, 64, 4, 3), 80: (16, 128, 8, 2), 128: (16, 128, 8, 1), 192: (64, 32, 8, 2), 256: (64, 16, 8, 2)}),
        "sm_90": _attention({48: (64, 64, 4, 1), 64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (64, 32, 8, 2)}),
        # One stage: accumulators pass through tensor memory, and a pipeline on top spills.
        "sm_100": _attention({48: (64, 64, 4, 1), 64: (32, 128, 8, 1), 256: (64, 64, 8, 1)}),
        "gfx942": _attention({96: (16, 128, 4, 1), 192: (16, 128, 8, 1), 256: (16, 64, 4, 1)}),
        "interpreter": _ATTENTION_INTERPRETER,
    },
    "rms_norm_fwd": {"sm_80": _norm(widest=16384, a_warp=1024)},
    "rms_norm_bwd": {"sm_80": _norm(widest=8192, a_warp=512, PER_SM=2), "gfx942": _norm(widest=8192, a_warp=1024, PER_SM=2)},
    "rms_norm_sums": {"sm_80": _fixed(BLOCK_N=4096, num_warps=8)},
    "glu": {"sm_80": _glu(warp=32), "gfx942": _glu(warp=64)},
    "rope": {"sm_80": _rope(1024), "gfx942": _rope(2048)},
    "qk_norm_rope_fwd": {"sm_80": _heads(1024), "gfx942": _heads(2048)},
    "qk_norm_rope_bwd": {"sm_80": _heads(1024, PER_SM=4), "gfx942": _heads(2048, PER_SM=2)},
    "cross_entropy": {"sm_80": _cross_entropy(widest=16384), "gfx942": _cross_entropy(widest=8192)},  # 1,024 threads each
    "linear_cross_entropy_recompute_fwd": {
        "sm_80": _linear_recompute((128, 64, 64, 8, 3), (32, 32, 32, 4, 2), ("BLOCK_N", "BLOCK_V", "BLOCK_K")),
        "sm_86": _linear_recompute((128, 128, 32, 8, 3), (32, 32, 32, 4, 2), ("BLOCK_N", "BLOCK_V", "BLOCK_K")),
    },
    "linear_cross_entropy_recompute_bwd": {
        "sm_80": _linear_recompute((128, 64, 64, 8, 2), (32, 32, 32, 4, 1), ("BLOCK_A", "BLOCK_B", "BLOCK_K")),
        "sm_86": _linear_recompute((128, 64, 32, 8, 2), (32, 32, 32, 4, 1), ("BLOCK_A", "BLOCK_B", "BLOCK_K")),
    },
    "newton_schulz": {
        "sm_80": _fixed(BLOCK=64, BLOCK_K=64, num_warps=4, num_stages=3),
        "gfx942": _fixed(BLOCK=64, BLOCK_K=64, num_warps=4, num_stages=2),
        "interpreter": _fixed(BLOCK=16, BLOCK_K=16, num_warps=4, num_stages=1),
    },
    # 32 sums a thread; with one head four 128-bit loads of keys and four of values in bf16 are in flight. On sm_120 that spilled.
    "decode_attention": {"sm_80": _decode(4096), "sm_120": _decode(2048)},
    "decode_attention_combine": {"sm_80": _fixed(num_warps=8)},
    "sample_keys": {"sm_80": _fixed(BLOCK=1024, num_warps=4)},
    "sample": {  # one program an SM
        "sm_75": _fixed(BLOCK=2048, num_warps=8),
        "sm_80": _fixed(BLOCK=4096, num_warps=16),
        "gfx942": _fixed(BLOCK=4096, num_warps=8),
    },
    "linear_cross_entropy_combine": {
        "sm_80": lambda n_slices: {"BLOCK_N": max(1, 4096 // n_slices) if n_slices > 32 else 128, "num_warps": 4, "num_stages": 1},
    },
}


def _nearest(name: str) -> str:
    """The architecture of FALLBACK whose launches a device gets: sm_103 → sm_100, sm_87 → sm_86, gfx950 → gfx942."""
    if name in FALLBACK or name == "sm_80":
        return name
    if not name.startswith("sm_"):
        return "gfx942"
    known = sorted(int(a[3:]) for a in SHARED_MEMORY if a.startswith("sm_"))
    return f"sm_{max((a for a in known if a <= int(name[3:])), default=known[0])}"


_architectures: dict[int, str] = {}


def _query_architecture(index: int) -> str:
    if torch.version.hip:
        return _nearest(torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return _nearest(f"sm_{major}{minor}")


def _device_architecture(index: int) -> str:
    if torch.compiler.is_compiling():  # the content of the dictionary would be a condition of the compiled code
        return _query_architecture(index)
    if index not in _architectures:
        _architectures[index] = _query_architecture(index)
    return _architectures[index]


def architecture(x: Tensor) -> str:
    """The GPU architecture that x's kernels are launched for: "sm_75" … "sm_120", "gfx942", or "interpreter"."""
    if x.is_cuda:
        return _device_architecture(x.device.index)
    if interprets():
        return "interpreter"
    # Any other CPU tensor that reaches a launcher is compiled for the target of a stub driver, not run.
    from .triton_compat import triton

    target: Any = triton.runtime.driver.active.get_current_target()
    return _nearest(f"sm_{target.arch}" if isinstance(target.arch, int) else target.arch)


@functools.cache
def _device_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(x: Tensor) -> int:
    """Number of SMs (streaming multiprocessors) of x's device; 2 in the interpreter. The size of a persistent grid is a multiple of it."""
    return _device_sms(x.device.index) if x.is_cuda else _SMS[architecture(x)]


@functools.cache
def _device_l2(index: int) -> int:
    return torch.cuda.get_device_properties(index).L2_cache_size


def cached_programs(x: Tensor, n_bytes: int, n_warps: int) -> int:
    """How many programs may run at once so that n_bytes of each stay in 0.6 of the L2 cache: up to 32 warps for each SM. As many as that if
    not even a third of the SMs could work, since arithmetic would then take longer than reading memory twice."""
    n_sms, l2 = sm_count(x), _device_l2(x.device.index) if x.is_cuda and not torch.version.hip else _L2[architecture(x)]
    most, fitting = n_sms * max(1, 32 // n_warps), int(0.6 * l2 / n_bytes)
    return most if 3 * fitting < n_sms else min(most, fitting)


_overrides: dict[str, Options] = {}


def launch_options(kernel: str, x: Tensor, **sizes: int) -> Options:
    """Block sizes, num_warps and num_stages to launch `kernel` with on x's device, as keyword arguments of the launch."""
    return {**_row(kernel, architecture(x), **sizes), **_overrides.get(kernel, {})}


@functools.cache
def _row(kernel: str, name: str, **sizes: int) -> Options:
    rows = TABLE[kernel]
    while name not in rows:
        name = FALLBACK[name]
    return rows[name](**sizes)


@contextmanager
def launch_override(kernel: str, **options: int) -> Iterator[None]:
    """Replace some launch options of `kernel` inside the block, such as BLOCK_N=256 or num_warps=2, for experiments and tests.

    Raises ValueError for a kernel that has no row."""
    if kernel not in TABLE:
        raise ValueError(f"kernel {kernel!r} has no launch options; choose one of {', '.join(TABLE)}")
    before = _overrides.get(kernel, {})
    _overrides[kernel] = {**before, **options}
    try:
        yield
    finally:
        _overrides[kernel] = before
