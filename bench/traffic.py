"""Bytes that each op's kernels load and store, forward and backward, counted in the interpreter, over the ideal.

The ideal reads each input once and writes each output once; vectors that stay in cache (a norm's weight, cos and sin, targets) are counted
apart. For kernels that read tiles again from the L2 cache there is also a formula, and the count is compared with that. Shapes are cut to
what the interpreter can run, at the widths of the 44 M model; a persistent grid is cut to 4 programs.

    TRITON_INTERPRET=1 python -m bench.traffic --out traffic.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def measure() -> list[dict]:
    import torch

    from bench.recorder import traffic
    from tritale import kernels
    from tritale.kernels.launch import cdiv, launch_options

    rows = []

    def leaf(*shape, dtype=torch.bfloat16):
        return torch.randn(shape).to(dtype).requires_grad_()

    def vector(n):
        return leaf(n, dtype=torch.float32)

    def size(*tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def add(op: str, which: str, run, cached, ideal: int, formula: int | None = None, note: str = "") -> None:
        row = {"op": op, "pass": which, **traffic(run, cached)}
        moved = row["loaded"] + row["stored"]
        over = {"ratio": round(moved / ideal, 3), "formula_ratio": None if formula is None else round(moved / formula, 3)}
        rows.append({**row, "ideal": ideal, "formula": formula, "note": note, **over})

    def count(op: str, call, inputs, cached=(), backward=None, formulas=(None, None), note="") -> None:
        """Forward and backward of call(); `backward`: its ideal, by default the sizes of inputs, incoming and outgoing gradients."""
        outputs = call()
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        add(op, "forward", call, cached, size(*inputs, *outputs), formulas[0], note)
        weights = [t for t in cached if t.requires_grad]
        pulls = [torch.randn_like(o) for o in outputs]
        ideal = size(*inputs, *pulls, *inputs, *weights) if backward is None else backward + size(*weights)
        add(op, "backward", lambda: torch.autograd.grad(outputs, [*inputs, *weights], pulls), cached, ideal, formulas[1], note)

    x, residual, w = leaf(1024, 512), leaf(1024, 512), vector(512)
    count("rms_norm", lambda: kernels.rms_norm(x, w), [x], [w])
    # Backward reads one sum instead of its two parts, and both parts share one gradient.
    count("add_rms_norm", lambda: kernels.add_rms_norm(x, residual, w), [x, residual], [w], backward=4 * size(x))

    cos, sin = (torch.rand(256, 24) for _ in range(2))
    q, k = leaf(1, 256, 6, 48), leaf(1, 256, 6, 48)
    count("rope", lambda: kernels.rope(q, k, cos, sin), [q, k], [cos, sin], backward=2 * size(q, k))
    qkv, wq, wk = leaf(1, 256, 18 * 48), vector(48), vector(48)
    pair = lambda: kernels.qk_norm_rope(qkv, wq, wk, cos, sin, n_head=6, n_kv_head=6)
    # Backward does not read v, and copies its gradient.
    count("qk_norm_rope", pair, [qkv], [cos, sin, wq, wk], backward=size(qkv) * 8 // 3)

    packed = leaf(128, 2 * 768)
    count("swiglu", lambda: kernels.swiglu(packed), [packed])
    count("geglu", lambda: kernels.geglu(packed), [packed])

    targets, logits = torch.randint(4096, (32,)), leaf(32, 4096)
    run = lambda: torch.autograd.grad(kernels.cross_entropy(logits, targets), logits)
    add("cross_entropy", "both", run, [targets], 3 * size(logits), note="ideal: 2 reads and 1 write of the logits")

    n, width, vocab_size = 256, 64, 1024
    x, weight, targets = leaf(n, width), leaf(vocab_size, width), torch.randint(vocab_size, (n,))
    run = lambda: torch.autograd.grad(kernels.linear_cross_entropy(x, weight, targets), (x, weight))
    note = "ideal: 2 reads and 1 write of a chunk's logits; the matrix products are PyTorch's"
    add("linear_cross_entropy chunk", "both", run, [targets], 3 * n * vocab_size * 2, note=note)

    # Each tile of logits loads tiles of x, (N, K), and of W, (V, K). The backward computes the logits twice, for dx and for dW. Each time
    # it loads one operand again for the product, and loads and stores the fp32 sums; the first tile of a row only stores them.
    forward = launch_options("linear_cross_entropy_recompute_fwd", x, itemsize=2)
    backward = launch_options("linear_cross_entropy_recompute_bwd", x, itemsize=2)
    formula = cdiv(vocab_size, forward["BLOCK_V"]) * size(x) + cdiv(n, forward["BLOCK_N"]) * size(weight)
    for a, b in ((x, weight), (weight, x)):
        n_a, n_b = cdiv(a.shape[0], backward["BLOCK_A"]), cdiv(b.shape[0], backward["BLOCK_B"])
        n_slices = 1 if a is weight else min(n_b, max(1, 2 // n_a))
        formula += n_b * size(a) + 2 * n_a * size(b) + (2 * n_b - n_slices) * 4 * a.numel()
    run = lambda: torch.autograd.grad(kernels.linear_cross_entropy(x, weight, targets, strategy="recompute"), (x, weight))
    note = "tiles come again from the L2 cache; the vectors of the rows are left out of the formula"
    add("linear_cross_entropy recompute", "both", run, [targets], 2 * size(x) + size(weight) + 4 * weight.numel(), formula, note)

    q, k, v = (torch.randn(4, h, 48).bfloat16() for h in (4, 2, 2))
    cache = torch.randn(2, 4, 200, 2, 48).bfloat16()
    run = lambda: kernels.decode_attention(q, k, v, cache[0], cache[1], torch.full((4,), 199))
    add("decode_attention", "forward", run, [], size(q, q, k, v, cache), note="a sequence's last token is at position 199")

    q, k, v = (leaf(1, 256, 2, 48) for _ in range(3))
    blocks = [launch_options(f"flash_attention_{name}", q, head_dim=48, itemsize=2) for name in ("fwd", "bwd_dq", "bwd_dkv")]

    def walked(n_tokens: int, block: int, other: int) -> int:
        """Rows of the other operand that all blocks walk, causal: whole blocks of `other` up to the block's last row."""
        return sum(cdiv(min(start + block, n_tokens), other) * other for start in range(0, n_tokens, block))

    head, vectors = 2 * 48 * 2, 2 * 256 * 4  # bytes a token over the 2 heads; lse or delta
    keys = [walked(256, o["BLOCK_M"], o["BLOCK_N"]) for o in blocks[:2]]
    queries = walked(256, blocks[2]["BLOCK_N"], blocks[2]["BLOCK_M"])  # seen from the keys, mirrored
    dq = 4 * size(q) + 2 * vectors + 2 * keys[1] * head
    formulas = (2 * size(q) + vectors + 2 * keys[0] * head, dq + 4 * size(q) + queries * (2 * head + 2 * 2 * 4))
    note = "causal; k, v (dK/dV: q, dO) come again for each block that sees them, from the L2 cache"
    count("flash_attention", lambda: kernels.flash_attention(q, k, v), [q, k, v], formulas=formulas, note=note)
    return rows


def readings() -> list[dict]:
    """`measure` in a process of its own, under the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "traffic.json")
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "bench.traffic", "--out", str(out)], cwd=ROOT, env=environment, check=True)
        return json.loads(out.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bytes that each op's kernels load and store, over the ideal.")
    parser.add_argument("--out", type=Path, required=True)
    parser.parse_args().out.write_text(json.dumps(measure()))
