"""Cross-entropy of given logits: numbers, gradients, memory, integration, traffic."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.harness import check_memory, check_numbers, traffic
from tritale.kernels import backend, launch, reference
from tritale.kernels.common import tanh
from tritale.kernels.cross_entropy import cross_entropy
from tritale.kernels.triton_compat import jit, tl

pytestmark = pytest.mark.usefixtures("device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
quick = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = {"BLOCK_N": 2, "BLOCK_V": 16}  # several programs, and several turns of each loop, at small shapes


both_paths = pytest.mark.parametrize("path", ["auto", "torch"], indirect=True)  # the kernel, and what a CPU runs


@pytest.fixture(autouse=True)
def path(request):
    with backend(getattr(request, "param", "auto")):
        yield


def draw(n, vocab_size, device, dtype=torch.float64, scale=3.0, ignored=0.3, target_dtype=torch.int64):
    """(logits, targets), some of the targets ignored."""
    logits = (torch.randn(n, vocab_size, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()
    targets = torch.randint(vocab_size, (n,), device=device, dtype=target_dtype)
    return logits, targets.masked_fill(torch.rand(n, device=device) < ignored, -100)


def flat(op):
    """op with its statistics as further outputs."""

    def run(*args, **options):
        loss, stats = op(*args, **options, return_stats=True)
        return [loss, *stats.values()]

    return run


def check(logits, targets, **options):
    """Numbers of loss, statistics and gradient; its terms are as large as the probabilities' and the target's, p − 1 may cancel."""
    with torch.no_grad():
        _, stats = reference.cross_entropy(logits.double(), targets, return_stats=True, softcap=options.get("softcap"))
        lse = stats["lse"].abs().max().item() if targets.numel() else 0.0
    terms = 1 + 2 * options.get("z_loss", 0.0) * lse
    if options.get("token_weight") is not None and targets.numel():
        terms *= options["token_weight"].abs().max().item()
    if options.get("reduction", "mean") == "mean" and options.get("normalizer") is None:
        terms /= max(1, int((targets != -100).sum()))
    return check_numbers(flat(cross_entropy), flat(reference.cross_entropy), [logits], gradient_terms=[terms], targets=targets, **options)


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    n=st.sampled_from([0, 1, 2, 5, 17]),
    vocab_size=st.one_of(st.integers(1, 140), st.sampled_from([4096, 5003])),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    softcap=st.sampled_from([None, 8.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    has_weight=st.booleans(),
    has_normalizer=st.booleans(),
    is_small=st.booleans(),
    target_dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_errors_are_those_of_the_definition(
    device, dtype, n, vocab_size, label_smoothing, z_loss, softcap, reduction, has_weight, has_normalizer, is_small, target_dtype
):
    logits, targets = draw(n, vocab_size, device, dtype, target_dtype=target_dtype)
    blocks = {**SMALL, "BLOCK_V": 64 if vocab_size < 200 else 1024} if is_small else {}
    with launch.launch_override("cross_entropy", **blocks):
        check(
            logits, targets, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, reduction=reduction,
            token_weight=torch.rand(n, device=device) if has_weight else None,
            normalizer=torch.tensor(7.0, device=device) if has_normalizer else None,
        )  # fmt: skip


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
def test_logits_of_any_magnitude(device, dtype, scale):
    check(*draw(6, 300, device, dtype, scale=scale), reduction="none")


@both_paths
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_equal_values_and_of_minus_infinity(device, dtype):
    logits, targets = draw(8, 70, device, dtype, ignored=0.0)
    with torch.no_grad():
        logits[0] = 0.0
        logits[1] = 300.0
        logits[2:5] = logits[2:5].masked_fill(torch.rand(3, 70, device=device) < 0.8, float("-inf"))
        logits[3] = float("-inf")
        logits.scatter_(1, targets[:, None], 1.0)
        targets[6], logits[6, :] = 3, logits[6, 3]  # a tie: the first entry counts as the top
        targets[7], logits[7, :2] = 1, 20.0
    with launch.launch_override("cross_entropy", **SMALL):
        check(logits, targets, reduction="none")
        check(logits[:2].detach().requires_grad_(), targets[:2], label_smoothing=0.1, softcap=30.0)
    loss, stats = cross_entropy(logits, targets, reduction="none", return_stats=True)
    assert loss[3] == 0 and stats["correct"].tolist()[3] and not stats["correct"].tolist()[6] and not stats["correct"].tolist()[7]


@both_paths
def test_loss_keeps_its_digits_where_the_logits_are_large(device):
    logits, targets = torch.full((3, 50), 3e4, device=device), torch.tensor([0, 7, 49], device=device)
    loss = cross_entropy(logits, targets, reduction="none")  # lse − s would keep 2e-3 of it
    torch.testing.assert_close(loss.cpu(), torch.full((3,), math.log(50)), rtol=1e-6, atol=0)


@both_paths
def test_rows_with_an_infinite_maximum_are_nan_as_pytorchs(device):
    logits = torch.tensor([[float("-inf")] * 5, [1.0, float("inf"), 0.0, 2.0, 3.0]], device=device)
    targets = torch.tensor([0, 1], device=device)
    for t in (targets, targets + 1):
        loss, stats = cross_entropy(logits, t, reduction="none", return_stats=True)
        expected, expected_stats = reference.cross_entropy(logits, t, reduction="none", return_stats=True)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        torch.testing.assert_close(loss, F.cross_entropy(logits, t, reduction="none"), equal_nan=True)
        torch.testing.assert_close(stats["lse"], expected_stats["lse"], equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("normalizer", [None, 0, 3.0])
def test_all_targets_ignored_gives_zero_whatever_the_logits_hold(device, reduction, name, normalizer):
    logits = torch.full((5, 40), float("nan"), device=device).requires_grad_()
    targets = torch.full((5,), 7, device=device)
    options = {"token_weight": torch.full((5,), float("nan"), device=device), "softcap": 5.0 if normalizer else None}
    options["normalizer"] = None if normalizer is None else torch.tensor(normalizer, device=device)
    with backend(name):
        loss, stats = cross_entropy(logits, targets, ignore_index=7, reduction=reduction, return_stats=True, **options)
    assert (loss == 0).all() and all((t == 0).all() for t in stats.values())
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_ignored_rows_may_hold_anything(device, name, value):
    logits, targets = draw(4, 20, device, torch.float32, ignored=0.0)
    expected = torch.autograd.grad(cross_entropy(logits[1:], targets[1:]), logits)[0]
    with torch.no_grad():
        logits[0] = float(value)
    targets[0] = -100
    with backend(name):
        loss = cross_entropy(logits, targets)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@both_paths
def test_a_normalizer_of_zero_does_not_hide_targets(device):
    logits, targets = draw(4, 20, device, torch.float32, ignored=0.0)
    for name in ("auto", "torch"):
        with backend(name):
            assert cross_entropy(logits, targets, normalizer=torch.tensor(0, device=device)).isinf()


@both_paths
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_targets_of_any_integer_dtype(device, name, dtype):
    logits, _ = draw(4, 200, device, torch.float32)
    targets = torch.tensor([0, 156 if dtype != torch.int8 else 100, 3, 1], device=device)  # 156 is −100 in uint8
    with backend(name):
        loss = cross_entropy(logits, targets.to(dtype), reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"))


def test_targets_outside_the_vocabulary_give_nan_not_a_wrong_loss(device):
    logits, _ = draw(3, 20, device, torch.float32)
    loss, stats = cross_entropy(logits, torch.tensor([4, 20, -1], device=device), reduction="none", return_stats=True)
    assert loss.isnan().tolist() == [False, True, True] and not stats["correct"][1:].any()


@both_paths
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_true_class_gradient_keeps_precision_near_one(device, dtype):
    logits = torch.zeros(4, 50, device=device, dtype=dtype)
    logits[:, 3] = torch.tensor([8.0, 9.0, 10.0, 11.0], device=device)  # p from 0.98 to 0.999
    logits.requires_grad_()
    targets = torch.full((4,), 3, device=device)
    (ours,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits)
    exact = logits.detach().double().softmax(-1)
    exact[:, 3] -= 1
    assert ((ours[:, 3].double() - exact[:, 3]) / exact[:, 3]).abs().max() <= torch.finfo(dtype).eps


@both_paths
def test_gradient_of_large_logits_keeps_precision(device):
    """Better than the definition, whose lse near 10⁴ is rounded to 10⁻³."""
    logits = (1e4 + torch.randn(6, 50, device=device)).requires_grad_()
    targets = torch.randint(50, (6,), device=device)
    (ours,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits)
    exact = torch.autograd.grad(F.cross_entropy(wide := logits.detach().double().requires_grad_(), targets, reduction="sum"), wide)[0]
    assert (ours - exact).abs().max() < 1e-6


@both_paths
def test_incoming_gradients_of_ignored_rows_do_not_matter(device):
    logits, targets = draw(4, 20, device, torch.float32, ignored=0.0)
    targets[1] = -100
    pull = torch.tensor([1.0, float("nan"), 1.0, 1.0], device=device)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, targets, reduction="none"), logits, pull)
    assert (gradient[1] == 0).all() and gradient.isfinite().all()


@both_paths
@pytest.mark.parametrize("vocab_size", [65536, 151936, 262144])
def test_large_vocabularies(device, vocab_size):
    check(*draw(2, vocab_size, device, torch.bfloat16, ignored=0.0), label_smoothing=0.1, z_loss=1e-3)


def test_offsets_pass_32_bits(device):
    stride, vocab_size = 2**30, 40  # the third row starts at element 2³¹; only the touched pages are real
    logits = torch.empty(2 * stride + vocab_size, dtype=torch.bfloat16, device=device).as_strided((3, vocab_size), (stride, 1))
    logits.copy_(torch.randn(3, vocab_size))
    targets = torch.tensor([1, 2, 39], device=device)
    loss = cross_entropy(logits.requires_grad_(), targets)
    expected = F.cross_entropy(logits.detach().float(), targets)
    torch.testing.assert_close(loss, expected)
    options = (-100, 0.0, 0.0, 0.0)
    _, _, top, log_total, _ = torch.ops.tritale.cross_entropy(logits.detach(), targets, *options, False)
    torch.ops.tritale.cross_entropy_backward_(torch.ones(3, device=device), logits.detach(), targets, top, log_total, *options)
    assert logits.detach().double().sum(1).abs().max() < 1e-2  # softmax − one-hot, in place


OPTIONS = [
    {},
    {"reduction": "none", "label_smoothing": 0.2},
    {"reduction": "sum", "z_loss": 0.05},
    {"softcap": 3.0},
    {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0, "normalizer": 7.0, "inplace_backward": True},
]


@both_paths
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_gradients_in_float64(device, options):
    number = lambda v: torch.tensor(v, device=device, dtype=torch.float64)
    call: dict[str, Any] = {k: number(v) if k == "normalizer" else v for k, v in options.items()}
    logits, targets = draw(3, 9, device)
    weight = torch.rand(3, device=device, dtype=torch.float64, requires_grad=True)
    with launch.launch_override("cross_entropy", BLOCK_N=2, BLOCK_V=4):
        assert torch.autograd.gradcheck(lambda x, w: cross_entropy(x, targets, token_weight=w, **call), (logits, weight))


@pytest.mark.parametrize("layout", ["contiguous", "strided rows", "transposed"])
def test_touches_only_its_tensors_in_any_order(device, layout):
    for shape in ((5, 37), (3, 64), (1, 1)):
        logits, targets = draw(*shape, device, torch.float32)
        lay = {
            "contiguous": lambda t: t,
            "strided rows": lambda t: torch.cat((t, t), dim=-1)[..., : t.shape[-1]],
            "transposed": lambda t: t.T.contiguous().T,
        }[layout]
        x = lay(logits.detach())
        if layout == "transposed" and shape != (1, 1):  # is copied before the kernel: only the copy's addresses would be seen
            torch.testing.assert_close(cross_entropy(x, targets), cross_entropy(logits, targets))
            continue
        with launch.launch_override("cross_entropy", **SMALL):
            for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}):
                op = lambda x, t, **o: cross_entropy(x, t, reduction="none", **o)
                check_memory(op, [x.requires_grad_(), targets], pull_strides=lambda t: (2,), **options)
            x = x.detach()
            _, _, top, log_total, _ = torch.ops.tritale.cross_entropy(x, targets, -100, 0.0, 0.0, 0.0, False)

            def inplace(*tensors):
                torch.ops.tritale.cross_entropy_backward_(*tensors, -100, 0.0, 0.0, 0.0)
                return tensors[1]

            check_memory(inplace, [torch.rand(shape[0], device=device), x, targets, top, log_total])


@both_paths
def test_inplace_backward_writes_over_the_logits_and_autograd_knows(device):
    x, targets = draw(4, 30, device, torch.float32)
    (expected,) = torch.autograd.grad(cross_entropy(x, targets), x)
    logits = x * 1.0
    loss = cross_entropy(logits, targets, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr() and torch.equal(gradient, expected) and not gradient.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)
    logits = x * 1.0
    other, loss = logits.square().sum(), cross_entropy(logits, targets, inplace_backward=True)
    torch.autograd.grad(loss, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, x)


@both_paths
def test_inplace_backward_spares_leaves_and_what_overlaps(device):
    x, targets = draw(4, 30, device, torch.float32, ignored=0.0)
    before = x.detach().clone()
    square = targets.view(2, 2)
    for form, t in ((lambda x: x, targets), (lambda x: x.view(2, 2, 30), square), (lambda x: (x[:1] * 1.0).expand(4, 30), targets)):
        (gradient,) = torch.autograd.grad(cross_entropy(form(x), t, inplace_backward=True), x)
        (expected,) = torch.autograd.grad(reference.cross_entropy(form(x), t), x)
        torch.testing.assert_close(gradient, expected)
    assert torch.equal(x, before)


def test_ops_pass_opcheck(device):
    logits, targets = draw(5, 20, device, torch.float32)
    options = (-100, 0.1, 0.1, 2.0)
    torch.library.opcheck(torch.ops.tritale.cross_entropy, (logits, targets, *options, False))
    x = logits.detach()
    _, _, top, log_total, _ = torch.ops.tritale.cross_entropy(x, targets, *options, False)
    args = (torch.rand(5, device=device), x, targets, top, log_total, *options)
    torch.library.opcheck(torch.ops.tritale.cross_entropy_backward, args)
    torch.library.opcheck(torch.ops.tritale.cross_entropy_backward_, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole_equals_eager(device, reduction):
    x, targets = draw(6, 33, device, torch.float32)
    targets[0] = -100

    def step(x):
        loss, stats = cross_entropy(x * 2, targets, z_loss=0.1, reduction=reduction, inplace_backward=True, return_stats=True)
        return (loss * 3).sum(), stats["correct"].sum(), stats["nll"]

    compiler = "inductor" if reduction == "mean" else "aot_eager"  # a C++ compile a form is enough
    eager, compiled = step(x), torch.compile(step, fullgraph=True, backend=compiler)(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled[0], x), torch.autograd.grad(eager[0], x))


@both_paths
def test_autocast_leaves_the_loss_in_fp32(device):
    logits, targets = draw(4, 24, device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, cross_entropy(logits, targets))


def test_second_derivative_says_what_to_do(device):
    x, targets = draw(3, 9, device, torch.float32, ignored=0.0)
    (gradient,) = torch.autograd.grad(cross_entropy(x * 1, targets, inplace_backward=True), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*reference\.cross_entropy"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_a_cpu_has_second_derivatives_and_forward_mode(device, options):
    number = lambda v: torch.tensor(v, device=device, dtype=torch.float64)
    call: dict[str, Any] = {k: number(v) if k == "normalizer" else v for k, v in options.items()}
    logits, targets = draw(3, 9, device)
    with backend("torch"):
        loss = lambda x: cross_entropy(x, targets, **call).sum()
        assert torch.autograd.gradgradcheck(loss, logits)
        tangent = torch.randn_like(logits)
        found = torch.func.jvp(loss, (logits.detach(),), (tangent,))[1]
        (gradient,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(found, (gradient * tangent).sum())


def test_a_cpu_keeps_nothing_of_the_size_of_the_logits():
    """One block of rows and the gradient; PyTorch's own loss keeps the log-probabilities besides."""
    logits = torch.randn(64, 40_000, requires_grad=True)
    saved = []
    with backend("torch"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_entropy(logits, torch.randint(40_000, (64,)), return_stats=True)
    assert sum(t.numel() for t in saved if t.data_ptr() != logits.data_ptr()) <= 6 * 64


def test_wrong_arguments_say_what_is_allowed(device):
    logits, targets = torch.ones(2, 3, 4, device=device), torch.ones(2, 3, device=device, dtype=torch.int64)
    with pytest.raises(ValueError, match="mean, sum, none"):
        cross_entropy(logits, targets, reduction="avg")
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        cross_entropy(logits, targets[:1])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        cross_entropy(logits, targets, label_smoothing=2.0)
    with pytest.raises(ValueError, match="None for no cap"):
        cross_entropy(logits, targets, softcap=0.0)
    for name in ("auto", "torch"):  # the same errors whatever computes it
        with backend(name):
            with pytest.raises(ValueError, match=r"token_weight \(3,\) must have the targets' shape, \(2, 3\)"):
                cross_entropy(logits, targets, token_weight=torch.ones(3, device=device))
            with pytest.raises(ValueError, match="integers expected"):
                cross_entropy(logits, targets.float())
    assert cross_entropy(logits, targets, reduction="none").shape == (2, 3)


@jit
def _tanh_kernel(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tanh(tl.load(p_x + o), True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernel is decorated for the interpreter")
def test_tanh_is_exact_to_rounding(device, monkeypatch):
    x = torch.cat((torch.logspace(-12, 2, 2048), torch.linspace(-1, 1, 2048))).to(device)
    for dtype in (torch.float32, torch.float64):
        exact = x.to(dtype).double().tanh()
        y = torch.empty_like(x, dtype=dtype)
        from triton.runtime.interpreter import InterpretedFunction

        kernel = _tanh_kernel if isinstance(_tanh_kernel, InterpretedFunction) else InterpretedFunction(_tanh_kernel.fn)
        kernel[(1,)](x.to(dtype), y, N=4096)
        error = (y.double() - exact).abs()
        bound = 1.8e-7 * exact.abs() if dtype == torch.float32 else torch.full_like(exact, 3e-16)
        assert (error <= bound).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize("is_inplace", [False, True])
def test_traffic_is_two_reads_and_one_write(device, is_inplace):
    x, targets = draw(4, 8192, device, torch.bfloat16, ignored=0.0)
    logits, losses = x * 1.0, []
    size = x.numel() * 2
    forward = traffic(lambda: losses.append(cross_entropy(logits, targets, inplace_backward=is_inplace)))
    assert forward["loaded"] + forward["stored"] <= 1.05 * size
    backward = traffic(lambda: torch.autograd.grad(losses[0], logits))
    assert backward["loaded"] + backward["stored"] <= 1.05 * 2 * size
