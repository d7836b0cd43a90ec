"""RMSNorm and its form with the residual addition: numbers, gradients, memory, integration, traffic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.harness import check_memory, check_numbers, traffic
from tritale.kernels import launch, reference
from tritale.kernels.rms_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.usefixtures("device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
quick = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape, device, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def dx_terms(x, weight, offset):
    """How large the terms are whose difference is dx: up to |dy (offset + w)| ρ."""
    rstd = torch.rsqrt(x.detach().double().square().mean(-1) + 1e-6)
    scale = 1.0 if weight is None else (weight.detach().double() + offset).abs().max().item()
    return 4 * scale * rstd.max().item() if rstd.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    rows=st.sampled_from([(), (1,), (2, 3), (7,), (33,), (0,), (2, 0)]),
    width=st.one_of(st.integers(1, 140), st.sampled_from([512, 768, 1000])),
    offset=st.sampled_from([0.0, 1.0]),
    weight_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([1.0, 1e-4, 1e3]),
)
def test_errors_are_those_of_the_definition(device, dtype, rows, width, offset, weight_dtype, scale):
    x = (randn(*rows, width, device=device) * scale).detach().to(dtype).requires_grad_()
    residual = randn(*rows, width, device=device, dtype=dtype)
    weight = None if weight_dtype is None else randn(width, device=device, dtype=weight_dtype)
    terms = [dx_terms(x, weight, offset), 0.0]
    check_numbers(rms_norm, reference.rms_norm, [x, weight], eps=1e-5, offset=offset, gradient_terms=terms)
    terms = [dx_terms(x + residual, weight, offset)] * 2
    check_numbers(add_rms_norm, reference.add_rms_norm, [x, residual, weight], eps=1e-5, offset=offset, gradient_terms=terms)


LAYOUTS = {
    "contiguous": lambda t: t,
    "strided rows": lambda t: torch.cat((t, torch.zeros_like(t)), dim=-1)[..., : t.shape[-1]],
    "every second row": lambda t: torch.stack((t, t), dim=1)[:, 0],
    "transposed": lambda t: t.T.contiguous().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(9, 40), (2, 1)])
def test_touches_only_its_tensors_in_any_order(device, layout, shape):
    lay = LAYOUTS[layout]
    x, residual = (lay(randn(*shape, device=device, dtype=torch.float32, grad=False)).requires_grad_() for _ in range(2))
    weight = randn(shape[1], device=device, dtype=torch.float32)
    for row in ({"BLOCK_M": 2, "PER_SM": 1}, {"BLOCK_M": 4, "BLOCK_N": 32, "PER_SM": 1}):
        forward = {k: v for k, v in row.items() if k.startswith("BLOCK")}
        with launch.launch_override("rms_norm_fwd", **forward), launch.launch_override("rms_norm_bwd", **row):
            with launch.launch_override("rms_norm_sums", BLOCK_N=32):
                strides = lambda t: lay(torch.empty(t.shape, device=t.device)).stride()
                check_memory(rms_norm, [x, weight], pull_strides=strides)
                check_memory(add_rms_norm, [x, residual, weight], pull_strides=strides)


@pytest.mark.parametrize("block_n", [None, 8])  # rows in registers, and rows wider than a block
@pytest.mark.parametrize("layout", ["every second", "expanded"])
def test_weight_of_any_stride(device, layout, block_n):
    x, residual = (randn(3, 20, device=device, dtype=torch.float32) for _ in range(2))
    weight = randn(40, device=device, dtype=torch.float32)[::2] if layout == "every second" else randn(1, device=device).float().expand(20)
    row = {} if block_n is None else {"BLOCK_N": block_n}
    with launch.launch_override("rms_norm_fwd", **row), launch.launch_override("rms_norm_bwd", **row):
        for op, inputs in ((rms_norm, [x]), (add_rms_norm, [x, residual])):
            ours = differentiate_all(op, inputs, weight)
            torch.testing.assert_close(ours, differentiate_all(getattr(reference, op.__name__), inputs, weight), rtol=1e-4, atol=1e-4)


def differentiate_all(op, inputs, weight):
    """Outputs and gradients, the weight's with it as it lies in memory."""
    outputs = op(*inputs, weight)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return outputs + list(torch.autograd.grad(torch.stack([o.square().sum() for o in outputs]).sum(), (*inputs, weight)))


@pytest.mark.parametrize("block_n", [None, 4])
def test_gradients_in_float64(device, block_n):
    x, residual, weight = (randn(*shape, device=device) for shape in ((2, 7), (2, 7), (7,)))
    offset = 0.5
    row = {} if block_n is None else {"BLOCK_N": block_n}
    with launch.launch_override("rms_norm_fwd", **row), launch.launch_override("rms_norm_bwd", **row):
        with launch.launch_override("rms_norm_sums", **row):
            assert torch.autograd.gradcheck(lambda *t: rms_norm(*t, offset=offset), (x, weight))
            assert torch.autograd.gradcheck(rms_norm, (x,))
            assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, offset=offset), (x, residual, weight))
            assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, offset=offset)[0], (x, residual, weight))
            assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t)[1] * 2, (x, residual))


@pytest.mark.parametrize("block_n", [64, 32])  # rows in registers, and rows wider than a block
def test_programs_that_walk_several_blocks_of_rows(device, block_n):
    x, residual = (randn(11, 40, device=device, dtype=torch.float32) for _ in range(2))
    weight = randn(40, device=device, dtype=torch.float32)
    with launch.launch_override("rms_norm_bwd", BLOCK_M=2, BLOCK_N=block_n, PER_SM=1):  # 2 programs in the interpreter
        check_numbers(add_rms_norm, reference.add_rms_norm, [x, residual, weight], gradient_terms=[dx_terms(x + residual, weight, 0.0)] * 2)


@pytest.mark.parametrize("width", [9000, 65536])
def test_rows_wider_than_the_registers(device, width):
    x, residual = (randn(3, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = randn(width, device=device, dtype=torch.float32)
    check_numbers(rms_norm, reference.rms_norm, [x, weight])
    with launch.launch_override("rms_norm_fwd", BLOCK_N=4096):
        check_numbers(add_rms_norm, reference.add_rms_norm, [x, residual, weight])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_residual_of_another_dtype(device, dtypes):
    x, residual = (randn(6, 50, device=device, dtype=dtype) for dtype in dtypes)
    weight = randn(50, device=device, dtype=torch.float32)
    check_numbers(add_rms_norm, reference.add_rms_norm, [x, residual, weight], gradient_terms=[dx_terms(x + residual, weight, 0.0)] * 2)


@pytest.mark.parametrize("block_n", [None, 32])  # rows in registers, and rows wider than a block
def test_what_is_normed_is_the_residual_that_goes_on(device, block_n):
    x, residual = (randn(5, 70, device=device, dtype=torch.bfloat16, grad=False) for _ in range(2))
    weight = randn(70, device=device, dtype=torch.float32, grad=False)
    row = {} if block_n is None else {"BLOCK_N": block_n}
    with launch.launch_override("rms_norm_fwd", **row), launch.launch_override("rms_norm_sums", BLOCK_N=32):
        y, total = add_rms_norm(x, residual, weight)
        torch.testing.assert_close(y, rms_norm(total, weight), rtol=0, atol=0)  # rounding of the sum included
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)


def test_rows_of_equal_values_and_of_zeros(device):
    x = torch.stack((torch.zeros(40), torch.full((40,), 3e4), torch.full((40,), -1e-7))).to(device).requires_grad_()
    weight = randn(40, device=device, dtype=torch.float32)
    check_numbers(rms_norm, reference.rms_norm, [x, weight], gradient_terms=[dx_terms(x, weight, 0.0), 0.0])


def test_ops_pass_opcheck(device):
    x, residual = (randn(3, 20, device=device, dtype=torch.float32) for _ in range(2))
    weight = randn(20, device=device, dtype=torch.float32)
    for w in (weight, None):
        torch.library.opcheck(torch.ops.tritale.rms_norm, (x, w, 1e-6, 0.0))
        torch.library.opcheck(torch.ops.tritale.add_rms_norm, (x, residual, w, 1e-6, 1.0))
        plain = [None if t is None else t.detach() for t in (x, None, residual, w)]
        torch.library.opcheck(torch.ops.tritale.rms_norm_backward, (*plain, 1e-6, 0.0, w is not None))


def test_compiled_whole_equals_eager(device):
    x, residual = (randn(4, 24, device=device, dtype=torch.float32) for _ in range(2))
    weight = randn(24, device=device, dtype=torch.float32)

    def step(x, residual, weight):
        y, r = add_rms_norm(x, residual, weight)
        return (rms_norm(y * 2) * r).sum()

    eager = step(x, residual, weight)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, residual, weight)
    torch.testing.assert_close(compiled, eager)
    pairs = zip(*(torch.autograd.grad(loss, (x, residual, weight)) for loss in (compiled, eager)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_autocast_leaves_the_norm_in_its_inputs_dtype(device):
    x, weight = randn(4, 24, device=device, dtype=torch.bfloat16), randn(24, device=device, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(rms_norm(x, weight), rms_norm(x, weight))
        y = rms_norm(x, weight)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rms_norm(x, weight))


def test_second_derivative_says_what_to_do(device):
    x = randn(2, 8, device=device, dtype=torch.float32)
    (dx,) = torch.autograd.grad(rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_wrong_shapes_say_what_is_expected(device):
    with pytest.raises(ValueError, match=r"\(8,\) expected"):
        rms_norm(torch.ones(2, 8, device=device), torch.ones(7, device=device))
    with pytest.raises(ValueError, match="one shape"):
        add_rms_norm(torch.ones(2, 8, device=device), torch.ones(1, 8, device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize("width", [512, 768])
def test_traffic_is_one_read_and_one_write(device, width, monkeypatch):
    monkeypatch.setitem(launch._SMS, "interpreter", 8)
    rows = 1024
    x, residual, dy, dr = (randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(4))
    weight = randn(width, device=device, dtype=torch.float32)
    size = x.numel() * 2
    cases: list[tuple[Callable[..., Any], tuple, tuple, int, int]] = [
        (rms_norm, (x, weight), (dy,), 2, 3),
        (add_rms_norm, (x, residual, weight), (dy, dr), 4, 4),
    ]
    for op, inputs, pulls, forward, backward in cases:
        outputs: list[torch.Tensor] = []
        counted = traffic(lambda: outputs.extend([o] if isinstance(o := op(*inputs), torch.Tensor) else o), [weight])  # noqa: B023
        assert counted["loaded"] + counted["stored"] <= 1.05 * forward * size
        counted = traffic(lambda: torch.autograd.grad(outputs, inputs, pulls), [weight])  # noqa: B023
        assert counted["loaded"] + counted["stored"] <= 1.05 * backward * size
