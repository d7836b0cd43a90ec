"""The ops, their shapes, and the contenders: the reference, torch.compile of it, ours, and the peers.

`case(op, model, dtype)` makes the inputs and the functions. All functions of a case take the same inputs and return the same outputs, so
that they can be compared with the reference in float64. `memory(…)` measures the peak of one contender.
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine_code import MODELS
from bench.measure import DTYPES, as_list, device, peak, reset_peak
from tritale import kernels
from tritale.kernels import reference

EPS = 1e-5
REFERENCE, COMPILED, OURS = "reference", "reference, compiled", "ours"
LIGER, FLASH_ATTN, SDPA = "Liger-Kernel", "flash-attn", "SDPA"
TORCH_RMS, TORCH_CE = "F.rms_norm", "F.cross_entropy"
TORCH_LCE_WHOLE, TORCH_LCE = "F.linear_cross_entropy, no options", "F.linear_cross_entropy, default options"
TORCH_LCE_CHUNK, CUT = "F.linear_cross_entropy, 256 rows", "cut-cross-entropy"
RECOMPUTE = "ours, recompute"

CONTENDERS = {
    "rms_norm": (REFERENCE, COMPILED, OURS, TORCH_RMS, LIGER),
    "add_rms_norm": (REFERENCE, COMPILED, OURS, TORCH_RMS, LIGER),
    "rope": (REFERENCE, COMPILED, OURS, LIGER),
    "qk_norm_rope": (REFERENCE, COMPILED, OURS),
    "swiglu": (REFERENCE, COMPILED, OURS, LIGER),
    "geglu": (REFERENCE, COMPILED, OURS, LIGER),
    "cross_entropy": (REFERENCE, COMPILED, OURS, TORCH_CE, LIGER),
    "linear_cross_entropy": (REFERENCE, COMPILED, OURS, RECOMPUTE, TORCH_LCE_WHOLE, TORCH_LCE, TORCH_LCE_CHUNK, CUT, LIGER),
    "flash_attention": (REFERENCE, COMPILED, OURS, SDPA, FLASH_ATTN),
    "flash_attention, packed": (REFERENCE, COMPILED, OURS, SDPA, FLASH_ATTN),
}

# On a CPU measured at two models only, to save time.
SMALL = {"rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu"}

# On a CPU there are fewer tokens; widths, heads and vocabularies are the same. "head" is the number of rows of the two losses.
CPU_TOKENS = {
    "44m": {"batch": 2, "context": 512, "head": 1024},
    "124m": {"batch": 1, "context": 1024, "head": 512},
    "1b": {"batch": 1, "context": 1024, "head": 512},
}
TINY = {"batch": 2, "context": 32, "width": 48, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "mlp": 64, "vocab": 300}

# Relative difference from the float64 reference, by largest entry and by norm.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2}


def missing(contender: str, dtype: str) -> str | None:
    """Why a contender cannot run here, None if it can."""
    is_gpu = device().type == "cuda"
    if dtype == "fp32" and is_gpu and contender in (FLASH_ATTN, CUT):
        return f"{contender} takes bf16 and fp16 only"
    package = {LIGER: "liger_kernel", FLASH_ATTN: "flash_attn", CUT: "cut_cross_entropy"}.get(contender)
    if contender in (LIGER, FLASH_ATTN) and not is_gpu:
        return f"{contender} needs a GPU"
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install {contender.lower()})"
    if contender in (TORCH_LCE_WHOLE, TORCH_LCE, TORCH_LCE_CHUNK) and not hasattr(F, "linear_cross_entropy"):
        return f"PyTorch {torch.__version__} does not have it (2.13 does)"
    return None


def shape(model: str) -> dict[str, int]:
    """The sizes of a model, with fewer tokens if this machine has no GPU."""
    sizes = TINY if model == "tiny" else MODELS[model] | ({} if device().type == "cuda" else CPU_TOKENS[model])
    return {"head": sizes["batch"] * sizes["context"]} | sizes


@dataclass(frozen=True)
class Case:
    """The inputs of an op (leaves if they need a gradient), the functions by contender, and the sizes as a table shows them."""

    inputs: list[Tensor]
    functions: dict[str, Callable]
    sizes: str
    flops: float | None = None  # of forward and backward together; None if the op is bound by memory bandwidth


def _liger(name: str, *more) -> Callable:
    """Liger-Kernel's function `liger_<name>`, with further arguments after the inputs."""
    return lambda *inputs: getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}")(*inputs, *more)


def case(op: str, model: str, dtype: str) -> Case:
    s, on, kind = shape(model), device(), DTYPES[dtype]
    batch, context, width, head_dim = s["batch"], s["context"], s["width"], s["head_dim"]
    random = torch.Generator(on).manual_seed(0)

    def leaf(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=random, device=on) * scale + shift).to(kind).requires_grad_()

    call: Callable[[Any], Callable]  # the op of a module: `reference` has the definition, `kernels` ours
    peers: dict[str, Callable] = {}
    flops = None
    sizes = f"{batch} × {context:,} × {s['n_head']} + {s['n_kv_head']} heads of {head_dim}"
    if op == "rms_norm":
        inputs = [leaf(batch, context, width), leaf(width, scale=0.1, shift=1.0)]
        call = lambda module: lambda x, w: module.rms_norm(x, w, EPS)
        peers[TORCH_RMS] = lambda x, w: F.rms_norm(x, (width,), w, EPS)
        peers[LIGER] = _liger("rms_norm", EPS)
        sizes = f"{batch * context:,} × {width:,}"
    elif op == "add_rms_norm":
        inputs = [leaf(batch, context, width), leaf(batch, context, width), leaf(width, scale=0.1, shift=1.0)]
        call = lambda module: lambda x, r, w: module.add_rms_norm(x, r, w, EPS)
        peers[TORCH_RMS] = lambda x, r, w: (F.rms_norm(r := r + x, (width,), w, EPS), r)
        peers[LIGER] = _liger("fused_add_rms_norm", EPS)
        sizes = f"{batch * context:,} × {width:,}"
    elif op == "rope":
        cos, sin = kernels.rotary_tables(context, head_dim, device=on)
        inputs = [leaf(batch, context, s["n_head"], head_dim), leaf(batch, context, s["n_kv_head"], head_dim)]
        call = lambda module: lambda q, k: module.rope(q, k, cos, sin)
        wide = [torch.cat((t, t), -1).to(kind).unsqueeze(0) for t in (cos, sin)]  # the layout of transformers
        peers[LIGER] = lambda q, k: [t.transpose(1, 2) for t in _liger("rope", *wide)(q.transpose(1, 2), k.transpose(1, 2))]
    elif op == "qk_norm_rope":
        cos, sin = kernels.rotary_tables(context, head_dim, device=on)
        heads = {"n_head": s["n_head"], "n_kv_head": s["n_kv_head"], "eps": EPS}
        inputs = [leaf(batch, context, (s["n_head"] + 2 * s["n_kv_head"]) * head_dim)]
        inputs += [leaf(head_dim, scale=0.1, shift=1.0) for _ in range(2)]
        call = lambda module: lambda x, wq, wk: module.qk_norm_rope(x, wq, wk, cos, sin, **heads)
    elif op in ("swiglu", "geglu"):
        inputs = [leaf(batch, context, s["mlp"]) for _ in range(2)]
        call = lambda module: getattr(module, op)
        peers[LIGER] = _liger(op)
        sizes = f"{batch * context:,} × {s['mlp']:,}"
    elif op == "cross_entropy":
        n, vocab = s["head"], s["vocab"]
        inputs = [leaf(n, vocab, scale=2.0), torch.randint(vocab, (n,), generator=random, device=on)]
        call = lambda module: module.cross_entropy
        peers[TORCH_CE] = lambda logits, targets: F.cross_entropy(logits.float(), targets)
        peers[LIGER] = _liger("cross_entropy")
        sizes = f"{n:,} × {vocab:,}"
    elif op == "linear_cross_entropy":
        n, vocab = s["head"], s["vocab"]
        # Logits of deviation 3: few entries have most of the probability, as in a trained model. The softmax's part of the gradients is
        # then far above the rounding error of 16 bits.
        inputs = [leaf(n, width), leaf(vocab, width, scale=3 * width**-0.5), torch.randint(vocab, (n,), generator=random, device=on)]
        call = lambda module: module.linear_cross_entropy
        peers[RECOMPUTE] = partial(kernels.linear_cross_entropy, strategy="recompute")
        if missing(TORCH_LCE, dtype) is None:
            options = torch.nn.LinearCrossEntropyOptions
            peers[TORCH_LCE_WHOLE] = F.linear_cross_entropy
            peers[TORCH_LCE] = partial(F.linear_cross_entropy, options=options())
            peers[TORCH_LCE_CHUNK] = partial(F.linear_cross_entropy, options=options(batch_chunk_size=256))
        impl = "cce" if on.type == "cuda" else "torch_compile"
        peers[CUT] = lambda *inputs: importlib.import_module("cut_cross_entropy").linear_cross_entropy(*inputs, impl=impl)
        peers[LIGER] = _liger("fused_linear_cross_entropy")
        sizes, flops = f"{n:,} × {width:,} × {vocab:,}", 6.0 * n * width * vocab
    else:
        heads = (s["n_head"], s["n_kv_head"], s["n_kv_head"])
        length, cu_seqlens, mask = context, None, None
        if op.endswith("packed"):  # documents of 128 tokens, one after another
            batch, context, length = 1, batch * context, min(128, context // 2)
            cu_seqlens = torch.arange(0, context + 1, length, dtype=torch.int32, device=on)
            masks = {"is_causal": True, "window": None, "cu_seqlens": cu_seqlens, "device": on}
            mask = reference.attention_mask(context, context, **masks)
        inputs = [leaf(batch, context, n, head_dim) for n in heads]
        call = lambda module: lambda q, k, v: module.flash_attention(q, k, v, cu_seqlens=cu_seqlens)
        is_grouped = heads[0] != heads[1]

        def sdpa(q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped)
            return out.transpose(1, 2)

        def flash_attn(q, k, v):
            with kernels.attention_backend("flash_attn"):
                return kernels.flash_attention(q, k, v, cu_seqlens=cu_seqlens)

        peers |= {SDPA: sdpa, FLASH_ATTN: flash_attn}
        sizes = f"{batch} × {context:,} × {heads[0]}/{heads[1]} heads of {head_dim}"
        sizes += f", {length} a document" if length < context else ""
        # 2 products forward and 5 backward, each of 2 FLOPs for the T² D / 2 causal entries of a document.
        flops = 14.0 / 2 * batch * context * length * heads[0] * head_dim
    definition = call(reference)
    functions = {REFERENCE: definition, COMPILED: torch.compile(definition, dynamic=False), OURS: call(kernels)} | peers
    available = [name for name in CONTENDERS[op] if missing(name, dtype) is None]
    return Case(inputs, {name: functions[name] for name in available}, sizes, flops)


def output_gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the outputs of a case: 1 for a loss, normally distributed for others."""
    with torch.no_grad():
        outputs = as_list(function(*inputs))
    random = torch.Generator(device()).manual_seed(1)
    return [
        torch.ones_like(o) if o.ndim == 0 else torch.randn(o.shape, generator=random, device=o.device).to(o.dtype).contiguous()
        for o in outputs
    ]


def exact(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of the definition, in float64, or in fp32 if float64 does not fit the GPU."""
    for kind in (torch.float64, torch.float32):
        try:
            wide = [t.detach().to(kind).requires_grad_() if t.requires_grad else t for t in inputs]
            outputs = as_list(function(*wide))
            found = torch.autograd.grad(outputs, [t for t in wide if t.requires_grad], [g.to(kind) for g in grads])
            return [t.detach() for t in (*outputs, *found)]
        except torch.OutOfMemoryError:
            if kind == torch.float32:
                raise
            wide = outputs = found = None  # make room
    raise AssertionError


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The relative error of the worst tensor, by largest entry or by norm, whichever is larger; infinite if something is not finite."""
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        difference = g.detach().to(w.dtype) - w
        for norm in (math.inf, 2):
            relative = (torch.linalg.vector_norm(difference, norm) / (torch.linalg.vector_norm(w, norm).item() or 1.0)).item()
            worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def ideal_bytes(inputs: list[Tensor], grads: list[Tensor]) -> dict[str, int]:
    """The fewest bytes moved. Forward reads the inputs and writes the outputs; backward reads the inputs and the gradients of the outputs,
    and writes the gradients of the inputs."""
    size = lambda tensors: sum(t.numel() * t.itemsize for t in tensors)
    forward = size(inputs) + size(grads)  # outputs have the shapes of their gradients
    backward = forward + size(t for t in inputs if t.requires_grad)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def memory(op: str, model: str, dtype: str, contender: str, threads: int) -> dict[str, int]:
    """Peak bytes beyond the inputs, of forward, and of forward and backward. The first of two runs compiles and fills caches."""
    warnings.filterwarnings("ignore")
    if device().type == "cpu":
        torch.set_num_threads(threads)
    what = case(op, model, dtype)
    function, inputs = what.functions[contender], what.inputs
    leaves = [t for t in inputs if t.requires_grad]
    grads = output_gradients(function, inputs)
    peaks = {}
    for _ in range(1 if contender == TORCH_LCE and device().type == "cpu" else 2):  # TORCH_LCE takes tens of seconds and compiles nothing
        before = reset_peak()
        outputs = as_list(function(*inputs))
        peaks["forward"] = peak() - before
        found = torch.autograd.grad(outputs, leaves, grads)
        peaks["both"] = peak() - before
        del outputs, found
    return peaks
