"""Linear cross-entropy, chunk by chunk and with recomputed tiles: numbers, gradients, memory, integration."""

import importlib
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tests.kernels.harness import check_memory, check_numbers
from tritale.kernels import backend, launch, reference
from tritale.kernels.linear_cross_entropy import IGNORED, chunk_rows, linear_cross_entropy

module = importlib.import_module("tritale.kernels.linear_cross_entropy")  # its name in the package is the function's
pytestmark = pytest.mark.usefixtures("device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRATEGIES = ["chunk", "recompute"]
quick = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small_tiles():
    """Several programs, slices of the vocabulary and turns of each loop at small shapes."""
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            for kernel, row in (
                ("cross_entropy", {"BLOCK_N": 2, "BLOCK_V": 16}),
                ("linear_cross_entropy_recompute_fwd", {"BLOCK_N": 4, "BLOCK_V": 8, "BLOCK_K": 4}),
                ("linear_cross_entropy_recompute_bwd", {"BLOCK_A": 4, "BLOCK_B": 8, "BLOCK_K": 4}),
                ("linear_cross_entropy_combine", {"BLOCK_N": 4}),
            ):
                stack.enter_context(launch.launch_override(kernel, **row))
            stack.enter_context(mock.patch.dict(launch._SMS, interpreter=2))
        yield


def draw(n, width, vocab_size, device, dtype=torch.float64, ignored=0.3):
    """(x, weight, targets)."""
    x, weight = (torch.randn(*s, width, dtype=torch.float64).to(device, dtype).requires_grad_() for s in ((n,), (vocab_size,)))
    targets = torch.randint(vocab_size, (n,), device=device)
    return x, weight, targets.masked_fill(torch.rand(n, device=device) < ignored, -100)


def definition(x, weight, targets, *, strategy=None, memory_budget_mb=None, **options):
    return reference.linear_cross_entropy(x, weight, targets, **options)


def terms(x, weight, targets, z_loss=0.0, **options):
    """How large the parts of dx and dW are that may cancel each other."""
    if not targets.numel():
        return 0.0, 0.0
    lse = (x.detach().double() @ weight.detach().double().T).logsumexp(-1).abs().max().item()
    scale = (1 + 2 * z_loss * lse) / (max(1, int((targets != -100).sum())) if options.get("reduction", "mean") == "mean" else 1)
    return scale * weight.detach().abs().max().item(), scale * x.detach().abs().max().item()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    n=st.sampled_from([0, 1, 2, 7, 130]),
    width=st.integers(1, 40),
    vocab_size=st.one_of(st.integers(1, 70), st.just(300)),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    softcap=st.sampled_from([None, 8.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    has_weight=st.booleans(),
)
def test_errors_are_those_of_the_definition(
    device, dtype, strategy, n, width, vocab_size, label_smoothing, z_loss, softcap, reduction, has_weight
):
    x, weight, targets = draw(n, width, vocab_size, device, dtype)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap, "reduction": reduction}
    check_numbers(
        linear_cross_entropy, definition, [x, weight, targets], strategy=strategy, memory_budget_mb=1e-4,
        token_weight=torch.rand(n, device=device) if has_weight else None, gradient_terms=terms(x, weight, targets, **options), **options,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_statistics_are_the_definitions(device, strategy, small_tiles):
    x, weight, targets = draw(11, 9, 37, device)
    with torch.no_grad():
        weight.round_()
        x.round_()  # exact products, so that equal rows give equal logits in any order of summation
        weight[5] = weight[20] = 3.0  # the first of equals counts as the top
        targets[:2] = torch.tensor([5, 20], device=device)
        x[:2] = weight[5] * 3
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 20.0, "normalizer": torch.tensor(3.0, device=device)}
    options["return_stats"] = True
    loss, stats = linear_cross_entropy(x, weight, targets, strategy=strategy, **options)
    expected, expected_stats = reference.linear_cross_entropy(x, weight, targets, **options)
    torch.testing.assert_close((loss, stats), (expected, expected_stats))
    assert stats["correct"][:2].tolist() == [True, False]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "label_smoothing": 0.2}, {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0, "reduction": "sum"}],
    ids=lambda o: "-".join(o) or "plain",
)
def test_gradients_in_float64(device, strategy, options, small_tiles):
    x, weight, targets = draw(3, 2, 9, device)
    token_weight = torch.rand(3, device=device, dtype=torch.float64, requires_grad=True)
    loss = lambda x, w, t: linear_cross_entropy(x, w, targets, token_weight=t, strategy=strategy, **options)
    assert torch.autograd.gradcheck(loss, (x, weight, token_weight))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_an_input_without_gradient_is_skipped(device, strategy, needs, small_tiles):
    x, weight, targets = draw(7, 5, 20, device)
    inputs = x.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1])
    loss = linear_cross_entropy(*inputs, targets, strategy=strategy)
    expected = reference.linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == any(needs)
    for t, full, is_needed in zip(inputs, (x, weight), needs, strict=True):
        if is_needed:
            torch.testing.assert_close(torch.autograd.grad(loss, t), torch.autograd.grad(expected, full))
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets, strategy=strategy).requires_grad


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("normalizer", [None, 0, 3.0])
def test_all_targets_ignored_gives_zero_not_nan(device, strategy, reduction, name, normalizer):
    x, weight, targets = draw(6, 4, 5, device, torch.float32, ignored=2.0)
    normalizer = None if normalizer is None else torch.tensor(normalizer, device=device)
    with backend(name):
        loss = linear_cross_entropy(x, weight, targets, strategy=strategy, reduction=reduction, normalizer=normalizer)
    assert (loss == 0).all() and all((g == 0).all() for g in torch.autograd.grad(loss.sum(), (x, weight)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("wide", ["token_weight", "normalizer"])
def test_weights_in_float64_leave_the_rest_in_fp32(device, strategy, name, wide):
    x, weight, targets = draw(6, 4, 9, device, torch.float32)
    token_weight = torch.rand(6, device=device, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {wide: token_weight if wide == "token_weight" else torch.tensor([5.0], device=device).double()}
    leaves = [x, weight] + ([token_weight] if wide == "token_weight" else [])
    with backend(name):
        loss = linear_cross_entropy(x, weight, targets, strategy=strategy, **options)
    expected = reference.linear_cross_entropy(x, weight, targets, **options).sum()
    assert loss.dtype == torch.float32
    fp32: dict[str, Any] = {"rtol": 1.3e-6, "atol": 1e-5}  # what is of float64 has been computed from losses of fp32
    torch.testing.assert_close(loss.double(), expected, **fp32)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), **fp32)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_any_integer_dtype(device, strategy, name, dtype):
    x, weight, _ = draw(4, 5, 200, device, torch.float32)
    targets = torch.tensor([0, 156 if dtype != torch.int8 else 100, 3, 1], device=device)  # 156 is −100 in uint8
    with backend(name):
        loss = linear_cross_entropy(x, weight, targets.to(dtype), strategy=strategy)
    torch.testing.assert_close(loss, reference.linear_cross_entropy(x, weight, targets))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_targets_outside_the_vocabulary_give_nan_not_a_wrong_loss(device, strategy):
    x, weight, _ = draw(3, 4, 20, device, torch.float32)
    loss = linear_cross_entropy(x, weight, torch.tensor([4, 20, -1], device=device), strategy=strategy, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulates_like_one_batch_with_tied_weights(device, strategy, small_tiles):
    """Two micro-batches with the global number of targets give the whole batch's loss and gradient; weight is also the embedding."""
    _, weight, targets = draw(12, 6, 15, device)
    tokens, normalizer = torch.randint(15, (12,), device=device), (targets != -100).sum()
    parts = [
        linear_cross_entropy(weight[tokens[c]] * 0.5, weight, targets[c], normalizer=normalizer, strategy=strategy)
        for c in (slice(0, 5), slice(5, 12))
    ]
    whole = reference.linear_cross_entropy(weight[tokens] * 0.5, weight, targets)
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, weight), torch.autograd.grad(whole, weight))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp32_weight_beside_bf16_keeps_its_gradient_in_fp32(device, strategy):
    x, _, targets = draw(300, 8, 40, device, torch.bfloat16)
    weight = torch.randn(40, 8, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(x.float(), weight, targets, strategy=strategy, memory_budget_mb=1e-3)
    (dw,) = torch.autograd.grad(loss, weight)
    wide = x.detach().double(), weight.detach().bfloat16().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.linear_cross_entropy(*wide, targets), wide[1])
    assert dw.dtype == torch.float32
    assert (dw - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ignored_tokens_with_huge_logits_leave_no_trace(device, strategy, small_tiles):
    x, weight, targets = draw(9, 10, 37, device, torch.float32)
    with torch.no_grad():
        x[3:5] = 1e3  # exp of these logits is infinite, and infinity times 0 is NaN
    targets = targets.clamp(min=0)
    targets[3:5] = -100
    kept = torch.arange(9, device=device)[targets != -100]
    loss = linear_cross_entropy(x, weight, targets, strategy=strategy)
    alone = linear_cross_entropy(x[kept], weight, targets[kept], strategy=strategy)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(alone, (x, weight)))


def test_touches_only_its_tensors_in_any_order(device, small_tiles):
    for n, width, vocab_size in ((9, 10, 37), (1, 1, 1)):
        x, weight, targets = draw(n, width, vocab_size, device, torch.float32)
        strided = torch.cat((x, x), dim=-1).detach()[:, :width].requires_grad_()
        targets = targets.masked_fill(targets == -100, IGNORED)
        scale = torch.rand(n, device=device)
        for options in ((0.0, 0.0, 0.0), (0.1, 0.1, 5.0)):
            for needs in ((True, True), (False, False)):
                op = lambda *t: torch.ops.tritale.linear_cross_entropy_triton(*t, *options, 128, *needs)  # noqa: B023
                check_memory(op, [t.detach() for t in (strided, weight)] + [targets, scale])
            apart = lambda t: tuple(2 * n for n in t.stride())
            per_row = lambda *t: torch.ops.tritale.linear_cross_entropy_triton(*t, *options, 128, False, False)[1]  # noqa: B023
            check_memory(per_row, [strided, weight, targets, scale], pull_strides=apart)
            recomputed = lambda *t: torch.ops.tritale.linear_cross_entropy_recompute(*t, *options)[0]  # noqa: B023
            check_memory(recomputed, [strided, weight, targets], pull_strides=apart)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole_equals_eager(device, strategy, reduction, small_tiles):
    x, weight, targets = draw(6, 5, 17, device, torch.float32)
    targets[0] = -100

    def step(x, weight):
        options = {"z_loss": 0.1, "reduction": reduction, "return_stats": True, "strategy": strategy}
        loss, stats = linear_cross_entropy(x * 2, weight, targets, **options)
        return (loss * 3).sum(), stats["correct"].sum(), stats["nll"]

    eager, compiled = step(x, weight), torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled[0], (x, weight)), torch.autograd.grad(eager[0], (x, weight)))


def test_ops_pass_opcheck(device, small_tiles):
    x, weight, targets = draw(5, 4, 7, device, torch.float32, ignored=0.0)
    options = (0.1, 0.1, 2.0)
    for needs in ((True, True), (False, False)):
        scale = torch.rand(5, device=device)
        torch.library.opcheck(torch.ops.tritale.linear_cross_entropy_triton, (x, weight, targets, scale, *options, 128, *needs))
    torch.library.opcheck(torch.ops.tritale.linear_cross_entropy_recompute, (x, weight, targets, *options))
    plain = (x.detach(), weight.detach(), targets)
    _, _, top, log_total, _ = torch.ops.tritale.linear_cross_entropy_recompute(*plain, *options)
    args = (torch.rand(5, device=device), *plain, top, log_total, *options)
    torch.library.opcheck(torch.ops.tritale.linear_cross_entropy_recompute_backward, (*args, True, True))
    torch.library.opcheck(torch.ops.tritale.linear_cross_entropy_recompute_backward, (*args, False, True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_second_derivative_raises(device, strategy, reduction, name):
    x, weight, targets = draw(3, 4, 5, device, torch.float32, ignored=0.0)
    with backend(name):
        loss = linear_cross_entropy(x, weight, targets, strategy=strategy, reduction=reduction).sum()
        dx, dw = torch.autograd.grad(loss, (x, weight), create_graph=True)
    for gradient in (dx, dw):
        with pytest.raises(RuntimeError, match=r"no second derivative.*reference\.linear_cross_entropy"):
            torch.autograd.grad(gradient.square().sum(), x, retain_graph=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_logits_are_never_held(device, strategy):
    n, vocab_size = 512, 300
    x, weight, targets = draw(n, 8, vocab_size, device, torch.float32)
    sizes, new_empty = [], torch.Tensor.new_empty

    def noted(self, *args, **kwargs):
        sizes.append((out := new_empty(self, *args, **kwargs)).numel())
        return out

    with mock.patch.object(torch.Tensor, "new_empty", noted):
        loss = linear_cross_entropy(x, weight, targets, strategy=strategy, memory_budget_mb=1e-3)
        torch.autograd.grad(loss, (x, weight))
    assert sizes and max(sizes) <= (128 * vocab_size if strategy == "chunk" else 2 * n * 8)


def test_chunks_are_of_like_size_within_the_budget():
    assert chunk_rows(4096, 65536, 64.0) == 256
    assert chunk_rows(4096, 65536, 256.0, itemsize=2) == 2048
    assert chunk_rows(4097, 65536, 256.0, itemsize=2) == 1408  # three of about equal size, not two and a row
    assert chunk_rows(1, 65536, 1e-6) == 128


FILTERING = [("chunk", "torch"), ("recompute", "torch"), ("recompute", "auto")]


@pytest.mark.parametrize(("strategy", "name"), FILTERING)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01, "softcap": 20.0}, {"reduction": "none"}], ids=lambda o: "-".join(o) or "plain")
def test_left_out_probabilities_change_the_gradients_within_the_bound(device, strategy, name, options, small_tiles):
    x, weight, targets = draw(30, 6, 90, device)
    with torch.no_grad():
        x *= 3
        weight[40:] -= 3 * x.mean(0)  # most entries are unlikely everywhere
        weight[40:] *= 0.01
        weight[:40] *= 2
    eps, call = 0.01, options | {"strategy": strategy}
    outputs, found = [], []
    with backend(name):
        for filter_eps in (None, eps):
            loss = linear_cross_entropy(x, weight, targets, filter_eps=filter_eps, **call)
            outputs.append(loss)
            found.append(torch.autograd.grad(loss.sum(), (x, weight)))
    assert torch.equal(*outputs)
    (dx, dw), (dx_filtered, dw_filtered) = found
    s = x @ weight.T
    if "softcap" in options:
        s = 20 * torch.tanh(s / 20)
    is_valid = targets != -100
    scale = 1.0 if options.get("reduction") == "none" else 1 / is_valid.sum()
    slope = 1 + 2 * options.get("z_loss", 0) * s.logsumexp(1, keepdim=True).abs()
    p = s.softmax(1) * slope * is_valid[:, None]
    most_dx = (torch.where(p <= eps * slope, p, 0) * weight.norm(dim=1)).sum(1) * scale
    most_dw = eps * (x.norm(dim=1, keepdim=True) * slope * is_valid[:, None]).sum() * scale
    assert ((dx - dx_filtered).norm(dim=1) <= most_dx + 1e-12).all()
    assert ((dw - dw_filtered).norm(dim=1) <= most_dw).all()
    assert not torch.equal(dw, dw_filtered) and not torch.equal(dx, dx_filtered)
    if name == "torch":
        used = (p > eps * slope).any(0).index_fill(0, targets.masked_fill(~is_valid, 0), True)  # ignored rows count as entry 0
        assert not used.all() and torch.equal(dw_filtered.any(1), used) and dw.any(1).all()


@pytest.mark.parametrize(("strategy", "name"), FILTERING)
def test_filtered_gradients_keep_nan_and_precision(device, strategy, name, small_tiles):
    x, weight, targets = draw(20, 5, 60, device, torch.float32, ignored=0.0)
    with backend(name):
        gradients = lambda f: torch.autograd.grad(linear_cross_entropy(x, weight, targets, strategy=strategy, filter_eps=f), (x, weight))
        auto, exact = gradients("auto"), gradients(None)
        torch.testing.assert_close(auto, exact)
        with torch.no_grad():
            x[3, 2] = float("nan")
        found = gradients(0.5)
    assert found[0][3].isnan().all() and found[1].isnan().all()


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_wrong_arguments_say_what_is_allowed(device, name):
    x, weight, targets = draw(3, 4, 5, device, torch.float32)
    with backend(name):
        with pytest.raises(ValueError, match="chunk, recompute"):
            linear_cross_entropy(x, weight, targets, strategy="all")
        with pytest.raises(ValueError, match="mean, sum, none"):
            linear_cross_entropy(x, weight, targets, reduction="avg")
        with pytest.raises(ValueError, match=r"\(3, 4\)"):
            linear_cross_entropy(x, weight[:, :3], targets)
        with pytest.raises(ValueError, match=r"token_weight \(1,\) must have the targets' shape, \(3,\)"):
            linear_cross_entropy(x, weight, targets, token_weight=torch.ones(1, device=device))
        for wrong in (0.0, 1.0, float("nan"), "some"):
            with pytest.raises(ValueError, match="between 0 and 1, 'auto', or None"):
                linear_cross_entropy(x, weight, targets, filter_eps=wrong)
        with pytest.raises(ValueError, match="label_smoothing"):
            linear_cross_entropy(x, weight, targets, filter_eps="auto", label_smoothing=0.1)
    if name == "auto":
        with pytest.raises(ValueError, match="'recompute' on a GPU"):
            linear_cross_entropy(x, weight, targets, filter_eps="auto")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_fp16_gradients_are_rounded_after_the_loss_scale(device, strategy, name, is_weighted):
    """Divided by the tokens of a large step, the gradients are too small for fp16; a GradScaler's factor makes up for that."""
    n_tokens, loss_scale = 2**19, 2.0 ** (26 if is_weighted else 16)
    x, weight, targets = draw(128, 16, 300, device, torch.float16)
    weight = (weight.detach() * 0.05).requires_grad_()
    options: dict[str, Any] = {"normalizer": torch.tensor(n_tokens, device=device)}
    if is_weighted:
        options["token_weight"] = torch.rand(128, device=device) * 1e-3
    with backend(name):
        loss = linear_cross_entropy(x, weight, targets, strategy=strategy, **options)
    grads = torch.autograd.grad(loss * loss_scale, (x, weight))
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(reference.linear_cross_entropy(*wide, targets, **options) * loss_scale, wide)
    for g, e in zip(grads, exact, strict=True):
        assert g.dtype == torch.float16 and (g - e).norm() <= 2e-3 * e.norm()


def test_fp16_sums_of_many_rows_do_not_overflow(device):
    """A feature that is large in every token: the chunk's part of dW passes the range of fp16, dW divided by the tokens does not."""
    x = torch.full((1024, 4), 60.0, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, device=device, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.long, device=device)
    for name in ("auto", "torch"):
        with backend(name):
            (dw,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), weight)
        torch.testing.assert_close(dw[0], torch.full((4,), -60.0 * 7 / 8, device=device), rtol=1e-3, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_inside_non_reentrant_checkpointing(device, strategy, name):
    x, weight, targets = draw(6, 8, 20, device)
    expected = torch.autograd.grad(reference.linear_cross_entropy(x, weight, targets), (x, weight))
    with backend(name):
        loss = checkpoint(lambda x, w: linear_cross_entropy(x, w, targets, strategy=strategy), x, weight, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(loss, (x, weight)), expected)
