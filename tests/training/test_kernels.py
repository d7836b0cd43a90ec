"""train.py through the Triton kernels, interpreted on the CPU, has the losses of the PyTorch path."""

import json
import os
import subprocess
import sys

import pytest
from runs import REPOSITORY, command, losses, train

from tritale.kernels import dispatch

# Runs train.py and prints the number of launches of each kernel.
COUNTED = """
import collections, json, runpy, sys
from triton.runtime.interpreter import GridExecutor
launches, launch = collections.Counter(), GridExecutor.__call__
def counted(self, *args, **options):
    launches[self.fn.__name__] += 1
    return launch(self, *args, **options)
GridExecutor.__call__ = counted
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("launches", json.dumps(launches))
"""
SIZES = dict(
    train__max_steps=3, train__global_batch=2, train__micro_batch=1, train__context=32, train__precision="fp32",
    train__validate_every=9, train__checkpoint_every=9, data__validation_stories=1, data__document_mask="true",
)  # fmt: skip


def launches(result: subprocess.CompletedProcess) -> dict[str, int]:
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.rsplit("launches", 1)[1])


@pytest.mark.skipif(not dispatch.has_triton(), reason="needs Triton (Linux)")
@pytest.mark.parametrize("options", [{}, {"model__qk_norm": "true"}], ids=["plain", "qk_norm"])
def test_trains_through_the_kernels_with_the_losses_of_pytorch(tmp_path, options):
    train(tmp_path / "torch", **SIZES, **options)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    line = [sys.executable, "-c", COUNTED, *command(tmp_path / "triton", **SIZES, **options)]
    count = launches(subprocess.run(line, capture_output=True, text=True, encoding="utf-8", cwd=REPOSITORY, env=environment))
    plain, ours = losses(tmp_path / "torch"), losses(tmp_path / "triton")
    assert list(ours) == [1, 2, 3] and ours == pytest.approx(plain, rel=2e-5)  # written with six digits

    steps, n_layer, n_norm = 6, 2, 5  # steps: micro-batches; n_norm: two per layer and the last
    rope = "_qk_norm_rope_{}" if options else "_rope"
    least = {
        "_rms_norm_fwd": steps * n_norm, "_rms_norm_bwd": steps * n_norm,
        rope.format("fwd"): steps * n_layer * (1 if options else 2),  # `_rope` and `_glu` also compute their backward
        rope.format("bwd"): steps * n_layer,
        "_glu": steps * n_layer * 2,
        "_flash_attention_fwd": steps * n_layer, "_flash_attention_bwd_dq": steps * n_layer, "_flash_attention_bwd_dkv": steps * n_layer,
        "_cross_entropy_kernel": steps,
    }  # fmt: skip
    assert {name: n for name, n in least.items() if count.get(name, 0) < n} == {}, count
