"""Forward-mode AD and torch.func: each op gives the definition's result or raises an error that says what to use."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from tritale import kernels
from tritale.kernels import backend, reference

pytestmark = pytest.mark.usefixtures("device")


def cases():
    """{name: (op, definition, input)} of one argument."""
    x, w, head, t = torch.randn(6, 8), torch.randn(8), torch.randn(20, 8), torch.randint(20, (6,))
    q, k, angle = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8), torch.rand(5, 4)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    calls = {
        "embedding": (lambda ops, a: ops.embedding(t, a), head),
        "rms_norm": (lambda ops, a: ops.rms_norm(a, w), x),
        "add_rms_norm": (lambda ops, a: ops.add_rms_norm(x, a, w)[0], x),
        "rope": (lambda ops, a: ops.rope(a, k, angle, angle)[0], q),
        "qk_norm_rope": (lambda ops, a: ops.qk_norm_rope(a, w, w, angle, angle, n_head=1, n_kv_head=1)[0], torch.randn(1, 5, 24)),
        "swiglu": (lambda ops, a: ops.swiglu(a), x),
        "geglu": (lambda ops, a: ops.geglu(a), x),
        "cross_entropy": (lambda ops, a: ops.cross_entropy(a, t), x @ head.T),
        "linear_cross_entropy": (lambda ops, a: ops.linear_cross_entropy(x, a, t), head),
        "flash_attention": (lambda ops, a: ops.flash_attention(a, k, k), q),
        "flash_attention, window": (lambda ops, a: ops.flash_attention(a, k, k, window=2), q),
        "flash_attention, documents": (lambda ops, a: ops.flash_attention(a, k, k, cu_seqlens=cu_seqlens), q),
    }
    return {name: (lambda a, f=f: f(kernels, a), lambda a, f=f: f(reference, a), at) for name, (f, at) in calls.items()}


@pytest.mark.parametrize("path", ["auto", "torch"])
@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_is_right_or_refused(path, name, transform):
    op, definition, at = cases()[name]
    direction = torch.randn_like(at)
    run = {
        "jvp": lambda f: jvp(f, (at,), (direction,))[1],
        "grad": lambda f: grad(lambda a: f(a).square().sum())(at),
        "vmap": lambda f: vmap(f)(torch.stack((at, direction))),
    }[transform]
    try:
        expected = run(definition)
    except RuntimeError:
        pytest.skip("the definition itself does not support it")
    with backend(path):
        try:
            result = run(op)
        except RuntimeError as problem:
            assert f"tritale.kernels.reference.{name.partition(',')[0]}" in str(problem)
        else:
            torch.testing.assert_close(result, expected)
