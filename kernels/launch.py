"""How every kernel is launched: block sizes, warps and stages, one row per kernel and GPU generation, readable in this one place.

No autotuning: a start is quick, and a run repeats. The choices are argued from the binaries (registers, occupancy, bytes in flight: see
docs/kernels.md and `python -m bench.kernel_report`).

    options = launch_options("rms_norm_fwd", x, width=4096)      # {"BLOCK_N": 4096, "BLOCK_M": 1, "num_warps": 8, "num_stages": 1}
    _rms_norm_fwd[grid](x, …, **options)

`x` is any tensor on the device of the launch; the sizes are what the row may depend on. To add a kernel, add its rows to TABLE, a dict or a
function of the sizes per generation; at least "sm_80", which the others fall back to along FALLBACK. For an experiment or a test:

    with launch_override("rms_norm_fwd", num_warps=4):
        rms_norm(x)
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .dispatch import interprets

Row = dict[str, int] | Callable[..., dict[str, int]]

# A generation without a row of its own takes that of the next: sm_86, sm_89 and sm_120 share the limit of 99 KB a block.
FALLBACK = {
    "sm_120": "sm_89",
    "sm_100": "sm_90",
    "sm_90": "sm_80",
    "sm_89": "sm_86",
    "sm_86": "sm_80",
    "sm_75": "sm_80",
    "gfx942": "sm_80",
    "interpreter": "sm_80",
}

# Bytes of shared memory a block may have.
SHARED_MEMORY = {
    "sm_75": 64 << 10,
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


def power_of_two(n: int) -> int:
    """The smallest power of two ≥ n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _norm(elements: int, widest: int, a_warp: int) -> Row:
    """Rows of a norm side by side until a program has `elements` of them; a row of more than `widest` goes in blocks of 4096.

    Forward 32 elements a thread, four 128-bit loads of bf16 in flight each. Backward keeps dw beside them, so 16: about 100 registers
    instead of 190 (128 instead of 230 with an fp32 residual), and twice the warps for the same two programs and 32 KB in flight."""

    def row(width: int, itemsize: int) -> dict[str, int]:
        block_n = power_of_two(width) if width <= widest else 4096
        block_m = max(1, elements // block_n)
        n_warps = min(16, max(4, block_m * block_n // a_warp))
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": n_warps}

    return row


def _glu(warp: int) -> Row:
    """16 elements a thread forward, 8 backward, of each tensor: rows side by side where they are narrow."""

    def row(width: int, is_backward: bool) -> dict[str, int]:
        elements = 4 * warp * (8 if is_backward else 16)
        block_n = max(16, min(power_of_two(width), 512))
        return {"BLOCK_M": elements // block_n, "BLOCK_N": block_n, "num_warps": 4}

    return row


def _heads(elements: int) -> Row:
    """As many heads a program as make `elements` entries of each half: two to four 128-bit loads a thread."""

    def row(half: int) -> dict[str, int]:
        return {"BLOCK_R": max(1, elements // power_of_two(half)), "num_warps": 4}

    return row


def _cross_entropy(vocab_size: int) -> dict[str, int]:
    """16 logits a thread, 2–4 loads of 128 bits in flight each and about 32 registers, so that sm_80–sm_100 keep all their warps resident:
    64 KB in flight per processor, where 20–25 saturate the memory. 32 logits a thread spilled on sm_90. Several rows where V is small."""
    block = max(16, min(power_of_two(vocab_size), 4096))
    rows = min(16, 4096 // block)
    return {"BLOCK_N": rows, "BLOCK_V": block, "num_warps": 8 if rows * block == 4096 else 4, "num_stages": 1}


def _attention(**tiles: tuple[int, int, int, int]) -> Row:
    """(BLOCK_M, BLOCK_N, warps, stages) by head size, up to 48, 64, 128 and 256, and dtype, half (16 bits) or wide (fp32, fp64).

    Heads of up to 48 have a tile of 16 columns: 64 rows of it are one 128-bit load for each of 128 threads, so these take four warps."""

    def row(head_dim: int, itemsize: int) -> dict[str, int]:
        width = "48" if head_dim <= 48 and itemsize == 2 else "64" if head_dim <= 64 else "128" if head_dim <= 128 else "256"
        m, n, warps, stages = tiles[("half_" if itemsize == 2 else "wide_") + width]
        return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}

    return row


_ATTENTION_INTERPRETER = {f"{kind}_{width}": (32, 32, 4, 1) for kind in ("half", "wide") for width in (48, 64, 128, 256)}


def _linear_recompute(half: tuple[int, ...], wide: tuple[int, ...], names: tuple[str, str, str]) -> Row:
    """Rows by dtype: tile sizes of the two sides and of K, warps and stages, for 16-bit inputs and for fp32 (no tensor cores: small
    tiles). 128 × 128 tiles with 64 of K spilled in backward on sm_80–sm_100, 32 × 64 in fp32 on all."""

    def row(itemsize: int) -> dict[str, int]:
        return dict(zip((*names, "num_warps", "num_stages"), half if itemsize == 2 else wide, strict=True))

    return row


TABLE: dict[str, dict[str, Row]] = {
    "flash_attention_fwd": {
        "sm_80": _attention(
            half_48=(64, 32, 4, 3),
            half_64=(128, 64, 8, 3),
            half_128=(128, 32, 8, 3),
            half_256=(64, 32, 8, 2),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "interpreter": _attention(**_ATTENTION_INTERPRETER),
    },
    "flash_attention_bwd_dq": {
        "sm_80": _attention(
            half_48=(64, 64, 4, 2),
            half_64=(128, 64, 8, 2),
            half_128=(64, 32, 8, 2),
            half_256=(64, 32, 8, 1),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "sm_90": _attention(
            half_48=(64, 64, 4, 2),
            half_64=(128, 64, 8, 2),
            half_128=(64, 64, 8, 2),
            half_256=(32, 32, 8, 1),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "gfx942": _attention(
            half_48=(64, 64, 4, 2),
            half_64=(64, 64, 4, 2),
            half_128=(64, 32, 4, 2),
            half_256=(32, 32, 4, 1),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "interpreter": _attention(**_ATTENTION_INTERPRETER),
    },
    "flash_attention_bwd_dkv": {
        "sm_80": _attention(  # 64 queries at a time took 255 registers and spilled on sm_86; 32 take 168, and three blocks are resident
            half_48=(32, 64, 4, 3),
            half_64=(32, 64, 4, 3),
            half_128=(16, 64, 8, 2),
            half_256=(16, 32, 8, 1),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "sm_90": _attention(
            half_48=(64, 64, 4, 1),
            half_64=(32, 64, 4, 3),
            half_128=(32, 64, 8, 2),
            half_256=(16, 32, 8, 1),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "sm_100": _attention(  # one stage: accumulators pass through tensor memory, and a pipeline on top spills
            half_48=(64, 64, 4, 1),
            half_64=(32, 64, 4, 1),
            half_128=(64, 64, 8, 1),
            half_256=(16, 32, 8, 1),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "gfx942": _attention(
            half_48=(32, 64, 4, 2),
            half_64=(32, 64, 4, 2),
            half_128=(32, 64, 4, 2),
            half_256=(16, 32, 4, 1),
            wide_64=(32, 32, 4, 1),
            wide_128=(16, 16, 4, 1),
            wide_256=(16, 16, 4, 1),
        ),
        "interpreter": _attention(**_ATTENTION_INTERPRETER),
    },
    "rms_norm_fwd": {"sm_80": _norm(elements=4096, widest=16384, a_warp=1024)},
    "rms_norm_bwd": {
        "sm_80": lambda **sizes: {**_norm(elements=4096, widest=8192, a_warp=512)(**sizes), "PER_PROCESSOR": 2},
        "gfx942": lambda **sizes: {**_norm(elements=4096, widest=8192, a_warp=1024)(**sizes), "PER_PROCESSOR": 2},
    },
    "rms_norm_sums": {"sm_80": {"BLOCK_N": 4096, "num_warps": 8}},
    "glu": {"sm_80": _glu(warp=32), "gfx942": _glu(warp=64)},
    "rope": {"sm_80": _heads(1024), "gfx942": _heads(2048)},
    "qk_norm_rope_fwd": {"sm_80": _heads(1024), "gfx942": _heads(2048)},
    "qk_norm_rope_bwd": {
        "sm_80": lambda half: {**_heads(1024)(half), "PER_PROCESSOR": 4},
        "gfx942": lambda half: {**_heads(2048)(half), "PER_PROCESSOR": 2},
    },
    "cross_entropy": {"sm_80": _cross_entropy},
    "linear_cross_entropy_recompute_fwd": {
        "sm_80": _linear_recompute((128, 64, 64, 8, 3), (32, 32, 32, 4, 2), ("BLOCK_N", "BLOCK_V", "BLOCK_K")),
        "sm_86": _linear_recompute((128, 128, 32, 8, 3), (32, 32, 32, 4, 2), ("BLOCK_N", "BLOCK_V", "BLOCK_K")),
    },
    "linear_cross_entropy_recompute_bwd": {
        "sm_80": _linear_recompute((128, 64, 64, 8, 2), (32, 32, 32, 4, 1), ("BLOCK_A", "BLOCK_B", "BLOCK_K")),
        "sm_86": _linear_recompute((128, 64, 32, 8, 2), (32, 32, 32, 4, 1), ("BLOCK_A", "BLOCK_B", "BLOCK_K")),
    },
    "linear_cross_entropy_combine": {
        "sm_80": lambda n_slices: {"BLOCK_N": max(1, 4096 // n_slices) if n_slices > 32 else 128, "num_warps": 4, "num_stages": 1},
    },
}


def _known(name: str) -> str:
    """The generation of FALLBACK that a device's own name stands for: sm_103 → sm_100, sm_87 → sm_86, gfx950 → gfx942."""
    if name in FALLBACK or name == "sm_80":
        return name
    if not name.startswith("sm_"):
        return "gfx942"
    number = int(name[3:])
    known = sorted(int(g[3:]) for g in SHARED_MEMORY if g.startswith("sm_"))
    return f"sm_{max((g for g in known if g <= number), default=known[0])}"


@functools.cache
def _generation_of_device(index: int) -> str:
    if torch.version.hip:
        return _known(torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return _known(f"sm_{major}{minor}")


def generation(x: Tensor) -> str:
    """The generation x's kernels are launched for: "sm_75" … "sm_120", "gfx942", or "interpreter"."""
    if x.is_cuda:
        return _generation_of_device(x.device.index)
    if interprets():
        return "interpreter"
    # A CPU tensor reaches a launcher elsewhere only where a driver stands in for a GPU and kernels are compiled, not run.
    from .triton_compat import triton

    arch = triton.runtime.driver.active.get_current_target().arch
    return _known(f"sm_{arch}" if isinstance(arch, int) else arch)


# Processors of a typical card, where none is at hand to ask: T4, A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI300X.
_PROCESSORS = {
    "sm_75": 40,
    "sm_80": 108,
    "sm_86": 82,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "interpreter": 2,
}


@functools.cache
def _processors_of_device(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of x's device: what a persistent grid is a multiple of (2 in the interpreter)."""
    return _processors_of_device(x.device.index) if x.is_cuda else _PROCESSORS[generation(x)]


_overrides: dict[str, dict[str, int]] = {}


def launch_options(kernel: str, x: Tensor, **sizes: int) -> dict[str, int]:
    """The constexpr block sizes, num_warps and num_stages to launch `kernel` with on x's device (keyword arguments of the launch)."""
    options = _row(kernel, generation(x), **sizes)
    return {**options, **_overrides[kernel]} if kernel in _overrides else options


@functools.cache
def _row(kernel: str, name: str, **sizes: int) -> dict[str, int]:
    rows = TABLE[kernel]
    while name not in rows:
        name = FALLBACK[name]
    row = rows[name]
    return row(**sizes) if callable(row) else row


@contextmanager
def launch_override(kernel: str, **options: int) -> Iterator[None]:
    """Launch `kernel` with some options replaced inside the block, as BLOCK_N=256 or num_warps=2, for experiments and tests.

    Raises ValueError for a kernel that has no row."""
    if kernel not in TABLE:
        raise ValueError(f"kernel {kernel!r} has no launch options; choose one of {', '.join(TABLE)}")
    before = _overrides.get(kernel)
    _overrides[kernel] = {**(before or {}), **options}
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before
