"""Bytes that each op loads and stores, forward and backward, counted in the interpreter, over the ideal.

The ideal reads each input once and writes each output once; vectors that stay in cache (a norm's weight, cos and sin) are counted apart.
Shapes are cut to what the interpreter can run, at the widths of the 44 M model; a persistent grid is cut likewise.

    TRITON_INTERPRET=1 python -m tests.kernels.harness.traffic_matrix --out traffic.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]


def measure() -> list[dict]:
    import torch

    from tests.kernels.harness.memory import Recorder
    from tritale import kernels

    rows = []

    def leaf(*shape, dtype=torch.bfloat16):
        return torch.randn(shape).to(dtype).requires_grad_()

    def size(*tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def count(op: str, call, inputs, cached=(), forward=None, backward=None, note="") -> None:
        with Recorder() as recorder:
            outputs = call()
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        ideal = size(*inputs, *outputs) if forward is None else forward
        rows.append({"op": op, "pass": "forward", "ideal": ideal, "note": note, **recorder.bytes(cached)})
        pulls = [torch.randn_like(o) for o in outputs]
        with Recorder() as recorder:
            gradients = torch.autograd.grad(outputs, inputs, pulls)
        ideal = size(*inputs, *pulls, *gradients) if backward is None else backward
        rows.append({"op": op, "pass": "backward", "ideal": ideal, "note": note, **recorder.bytes(cached)})

    x, residual, w = leaf(1024, 512), leaf(1024, 512), leaf(512, dtype=torch.float32).detach()
    count("rms_norm", lambda: kernels.rms_norm(x, w), [x], [w])
    # Backward reads one sum, not both of its parts, and both parts have one gradient.
    count("add_rms_norm", lambda: kernels.add_rms_norm(x, residual, w), [x, residual], [w], backward=4 * size(x))
    cos, sin = (torch.rand(64, 24) for _ in range(2))
    q, k = leaf(1, 64, 6, 48), leaf(1, 64, 6, 48)
    count("rope", lambda: kernels.rope(q, k, cos, sin), [q, k], [cos, sin], backward=2 * size(q, k))
    qkv, wq, wk = leaf(1, 64, 18 * 48), leaf(48, dtype=torch.float32).detach(), leaf(48, dtype=torch.float32).detach()
    pair = lambda: kernels.qk_norm_rope(qkv, wq, wk, cos, sin, n_head=6, n_kv_head=6)
    count("qk_norm_rope", pair, [qkv], [cos, sin, wq, wk], backward=2 * size(qkv) + size(q, k), note="v is copied, not normed")
    packed = leaf(128, 2 * 768)
    for name in ("swiglu", "geglu"):
        count(name, lambda: getattr(kernels, name)(packed), [packed])  # noqa: B023
    targets = torch.randint(4096, (32,))
    logits = leaf(32, 4096)
    note = "over 2 reads and 1 write of the logits, forward and backward together"
    with Recorder() as recorder:
        torch.autograd.grad(kernels.cross_entropy(logits, targets), logits)
    rows.append({"op": "cross_entropy", "pass": "both", "ideal": 3 * size(logits), "note": note, **recorder.bytes([targets])})
    x, weight = leaf(128, 64), leaf(1024, 64)
    targets = torch.randint(1024, (128,))
    for strategy in ("chunk", "recompute"):
        note = "kernels only, the products of strategy chunk are PyTorch's; over 2 reads and 1 write of the logits"
        with Recorder() as recorder:
            torch.autograd.grad(kernels.linear_cross_entropy(x, weight, targets, strategy=strategy), (x, weight))
        ideal = 3 * 128 * 1024 * 2 if strategy == "chunk" else 2 * size(x, weight)
        note = note if strategy == "chunk" else "over x and W read once and both gradients written once; tiles are read again from cache"
        rows.append({"op": f"linear_cross_entropy {strategy}", "pass": "both", "ideal": ideal, "note": note, **recorder.bytes([targets])})
    q, k, v = (leaf(1, 128, 2, 48) for _ in range(3))
    note = "causal, 128 tokens; k and v (backward: q and dO) come again for each block of rows that sees them, from cache"
    count("flash_attention", lambda: kernels.flash_attention(q, k, v), [q, k, v], note=note)
    for row in rows:
        row["ratio"] = round((row["loaded"] + row["stored"]) / row["ideal"], 3)
    return rows


def traffic_rows() -> list[dict]:
    """`measure` in a process of its own, under the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "traffic.json")
        command = [sys.executable, "-m", "tests.kernels.harness.traffic_matrix", "--out", str(out)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return json.loads(out.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.parse_args().out.write_text(json.dumps(measure()))
