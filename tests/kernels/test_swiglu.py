"""SwiGLU and GeGLU, packed and separate: numbers, gradients, memory, integration, traffic."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.harness import check_memory, check_numbers, traffic
from tritale.kernels import geglu, launch, reference, swiglu

pytestmark = pytest.mark.usefixtures("device")
PAIRS = [(swiglu, reference.swiglu), (geglu, reference.geglu)]
quick = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape, device, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op, definition", PAIRS)
@quick
@given(
    rows=st.sampled_from([(), (1,), (2, 3), (9,), (0,)]),
    width=st.one_of(st.integers(1, 70), st.sampled_from([512, 600])),
    scale=st.sampled_from([1.0, 1e-3, 30.0]),
)
def test_errors_are_those_of_the_definition(device, dtype, op, definition, rows, width, scale):
    packed = (randn(*rows, 2 * width, device=device) * scale).detach().to(dtype).requires_grad_()
    terms = [4 * packed.abs().max().item() ** 2 if packed.numel() else 0.0] * 2  # a' is a difference where g σ' nearly cancels σ
    check_numbers(op, definition, [packed], gradient_terms=terms)
    gate, up = (randn(*rows, width, device=device, dtype=dtype) for _ in range(2))
    check_numbers(op, definition, [gate, up], gradient_terms=terms)


@pytest.mark.parametrize("op, definition", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(device, dtype, op, definition):
    packed = randn(40, 400, device=device, dtype=dtype, grad=False)
    exact = definition(packed.double()).to(dtype)
    assert (op(packed) == exact).double().mean() > 0.99  # rounding silu(gate) before the product would leave three quarters


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_no_columns_at_all(device, op):
    for inputs in ([randn(3, 0, device=device)], [randn(3, 0, device=device), randn(3, 0, device=device)]):
        h = op(*inputs)
        assert h.shape == (3, 0) and all(g.shape == (3, 0) for g in torch.autograd.grad(h.sum(), inputs))


def test_large_gates_saturate_without_nan(device):
    gate = torch.tensor([[-3e4, -100.0, -0.0, 0.0, 100.0, 3e4]], device=device).requires_grad_()
    up = torch.ones_like(gate).requires_grad_()
    for op, definition in PAIRS:
        check_numbers(op, definition, [gate, up], gradient_terms=[1.0, 1.0])


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_touches_only_its_tensors_in_any_order(device, op):
    with launch.launch_override("glu", BLOCK_M=2, BLOCK_N=16):
        check_memory(op, [randn(3, 50, device=device, dtype=torch.float32)])
        wide = randn(5, 80, device=device, dtype=torch.bfloat16, grad=False)
        gate, up = (t.requires_grad_() for t in (wide[:, :19], wide[:, 40:59]))
        check_memory(op, [gate, up], pull_strides=lambda t: (40, 1))
        check_memory(op, [randn(1, 2, device=device, dtype=torch.float32)])


@pytest.mark.parametrize("op", [swiglu, geglu])
def test_gradients_in_float64(device, op):
    assert torch.autograd.gradcheck(op, (randn(3, 10, device=device),))
    assert torch.autograd.gradcheck(op, (randn(2, 5, device=device), randn(2, 5, device=device)))


def test_ops_pass_opcheck(device):
    gate, up = randn(3, 8, device=device, dtype=torch.float32), randn(3, 8, device=device, dtype=torch.float32)
    for activation in ("silu", "gelu"):
        for second in (None, up):
            torch.library.opcheck(torch.ops.tritale.glu, (gate, second, activation))
            dh = torch.randn(3, 4 if second is None else 8, device=device)
            plain = (gate.detach(), None if second is None else second.detach())
            torch.library.opcheck(torch.ops.tritale.glu_backward, (dh, *plain, activation))


def test_compiled_whole_equals_eager(device):
    x, up = randn(4, 24, device=device, dtype=torch.float32), randn(4, 12, device=device, dtype=torch.float32)
    step = lambda x, up: geglu(swiglu(x), up).square().sum()
    eager, compiled = step(x, up), torch.compile(step, fullgraph=True, backend="aot_eager")(x, up)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, (x, up)), torch.autograd.grad(eager, (x, up)))


def test_autocast_keeps_the_inputs_dtype(device):
    x = randn(4, 24, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        assert swiglu(x).dtype == torch.bfloat16
        assert torch.equal(swiglu(x), reference.swiglu(x))


def test_wrong_shapes_and_second_derivatives_say_what_to_do(device):
    with pytest.raises(ValueError, match="even last dimension"):
        swiglu(torch.ones(2, 7, device=device))
    with pytest.raises(ValueError, match="one shape"):
        geglu(torch.ones(2, 8, device=device), torch.ones(2, 7, device=device))
    x = randn(2, 8, device=device, dtype=torch.float32)
    (dx,) = torch.autograd.grad(swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize("op", [swiglu, geglu])
def test_traffic_is_each_input_and_output_once(device, op):
    x, dh = randn(64, 2 * 768, device=device, dtype=torch.bfloat16), randn(64, 768, device=device, dtype=torch.bfloat16, grad=False)
    outputs = []
    counted = traffic(lambda: outputs.append(op(x)))
    assert counted["loaded"] + counted["stored"] <= 1.05 * 3 * dh.numel() * 2
    counted = traffic(lambda: torch.autograd.grad(outputs, x, dh))
    assert counted["loaded"] + counted["stored"] <= 1.05 * 5 * dh.numel() * 2
