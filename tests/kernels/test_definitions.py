"""The definitions against PyTorch's own functions, and the faster forms against the definitions, in float64."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tritale import kernels
from tritale.kernels import reference


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_rms_norm_is_pytorchs():
    x, w = randn(5, 33), randn(33)
    assert_close(kernels.rms_norm(x, w, 1e-5), F.rms_norm(x, (33,), w, 1e-5))
    assert_close(kernels.rms_norm(x, w, 1e-5, offset=1.0), F.rms_norm(x, (33,), w + 1, 1e-5))
    y, residual = kernels.add_rms_norm(x, x, w)
    assert_close(residual, 2 * x)
    assert_close(y, kernels.rms_norm(2 * x, w))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_keeps_lengths_and_makes_scores_relative(interleaved):
    angles = torch.outer(torch.arange(16.0, dtype=torch.float64), torch.rand(6, dtype=torch.float64))
    cos, sin = angles.cos(), angles.sin()
    q, k = randn(1, 1, 2, 20).expand(1, 16, 2, 20), randn(1, 1, 1, 20).expand(1, 16, 1, 20)
    q_r, k_r = kernels.rope(q, k, cos, sin, interleaved=interleaved)
    assert_close(q_r.norm(dim=-1), q.norm(dim=-1))
    assert_close(q_r[..., 12:], q[..., 12:])
    scores = torch.einsum("thd,shd->hts", q_r[0], k_r[0].expand(-1, 2, -1))
    assert_close(scores[:, 3, 1], scores[:, 12, 10])
    assert not torch.allclose(scores[:, 3, 1], scores[:, 3, 2])
    cu_seqlens = torch.tensor([0, 5, 16, 16], dtype=torch.int32)
    restarted, _ = kernels.rope(q, k, cos, sin, interleaved=interleaved, cu_seqlens=cu_seqlens)
    assert_close(restarted[:, 5:], q_r[:, :11])


def test_qk_norm_rope_is_its_parts():
    qkv, wq, wk = randn(2, 7, 5 * 8), randn(8), randn(8)
    cos, sin = torch.rand(7, 4, dtype=torch.float64), torch.rand(7, 4, dtype=torch.float64)
    q, k, v = kernels.qk_norm_rope(qkv, wq, wk, cos, sin, n_head=3, n_kv_head=1)
    heads = qkv.view(2, 7, 5, 8)
    expected = kernels.rope(F.rms_norm(heads[:, :, :3], (8,), wq, 1e-6), F.rms_norm(heads[:, :, 3:4], (8,), wk, 1e-6), cos, sin)
    assert_close((q, k), expected)
    assert_close(v, heads[:, :, 4:])


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 3.0},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0, "normalizer": torch.tensor(7.0, dtype=torch.float64)},
]


def test_cross_entropy_is_pytorchs():
    logits, targets = randn(9, 11), torch.randint(11, (9,))
    targets[::4] = -100
    calls: tuple[dict[str, Any], ...] = ({}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"})
    for options in calls:
        assert_close(kernels.cross_entropy(logits, targets, **options), F.cross_entropy(logits, targets, **options))
    loss, stats = kernels.cross_entropy(logits, targets, return_stats=True)
    valid = targets != -100
    assert_close(stats["lse"][valid], logits.logsumexp(-1)[valid].detach())
    assert (stats["correct"] == ((logits.argmax(-1) == targets) & valid)).all()
    assert_close(loss, stats["nll"].sum() / valid.sum())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("memory_budget_mb", [1e-4, 64.0])
def test_linear_cross_entropy_is_its_definition(options, memory_budget_mb):
    x, weight, targets = randn(2, 150, 12), randn(37, 12), torch.randint(37, (2, 150))
    targets[:, ::5] = -100
    token_weight = torch.rand(2, 150, dtype=torch.float64)
    options = {**options, "token_weight": token_weight, "return_stats": True}
    loss, stats = kernels.linear_cross_entropy(x, weight, targets, memory_budget_mb=memory_budget_mb, **options)
    expected, expected_stats = reference.linear_cross_entropy(x, weight, targets, **options)
    assert_close(loss, expected)
    assert_close(stats, expected_stats)
    pull = torch.randn_like(loss)
    assert_close(gradients((loss * pull).sum(), x, weight), gradients((expected * pull).sum(), x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_blocks_of_rows_on_a_cpu_give_the_same_bits(dtype, options, monkeypatch):
    x, weight = torch.randn(50, 12).to(dtype).requires_grad_(), torch.randn(37, 12).to(dtype).requires_grad_()
    targets = torch.randint(37, (50,))
    targets[::5] = -100
    found = []
    for block in (2**20, 7 * 37, 1):
        monkeypatch.setattr(sys.modules["tritale.kernels.linear_cross_entropy"], "BLOCK", block)
        loss, stats = kernels.linear_cross_entropy(x, weight, targets, return_stats=True, **options)
        found.append((loss, *stats.values(), *gradients(loss.sum(), x, weight)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_all_targets_ignored_gives_zero_not_nan():
    x, weight, targets = randn(6, 4), randn(5, 4), torch.full((6,), -100)
    for loss in (kernels.linear_cross_entropy(x, weight, targets), kernels.cross_entropy(x @ weight.T, targets)):
        assert loss.item() == 0
        assert all((g == 0).all() for g in gradients(loss, x, weight))


def test_bf16_head_keeps_the_gradient_of_an_fp32_weight_in_fp32():
    x, weight = torch.randn(700, 16).bfloat16().requires_grad_(), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (700,))
    loss = kernels.linear_cross_entropy(x, weight, targets, memory_budget_mb=0.02)
    (dw,) = gradients(loss, weight)
    exact = reference.linear_cross_entropy(x.double(), weight.bfloat16().double(), targets)
    assert dw.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("memory_budget_mb", [256.0, 0.02])  # one chunk, and six
def test_a_weight_in_bf16_gets_its_gradient_rounded_once(memory_budget_mb):
    x, weight = torch.randn(700, 16).bfloat16().requires_grad_(), torch.randn(50, 16).bfloat16().requires_grad_()
    targets, (wide_x, wide_weight) = torch.randint(50, (700,)), (t.detach().double().requires_grad_() for t in (x, weight))
    pull = 1.0037  # bf16 has 1.0 and 1.0078
    found = gradients(pull * kernels.linear_cross_entropy(x, weight, targets, memory_budget_mb=memory_budget_mb), x, weight)
    expected = gradients(pull * reference.linear_cross_entropy(wide_x, wide_weight, targets), wide_x, wide_weight)
    for gradient, exact in zip(found, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - exact).norm() < 0.01 * exact.norm()
        assert abs((gradient.double() * exact).sum() / exact.square().sum() - 1) < 2e-3  # no factor is rounded away


def test_gradients_of_a_kept_graph_may_be_overwritten():
    x, weight, targets = randn(6, 4), randn(5, 4), torch.randint(5, (6,))
    loss = kernels.linear_cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()
    assert_close(gradients(loss, x, weight), tuple(expected))


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_is_attention_document_by_document(n_kv_head, window):
    q, k, v = randn(1, 23, 4, 12), randn(1, 23, n_kv_head, 12), randn(1, 23, n_kv_head, 12)
    cu_seqlens = torch.tensor([0, 1, 9, 9, 21, 23, 23], dtype=torch.int32)
    out = kernels.flash_attention(q, k, v, cu_seqlens=cu_seqlens, window=window)
    parts = [
        reference.flash_attention(q[:, a:b], k[:, a:b], v[:, a:b], window=window)
        for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        if b > a
    ]
    expected = torch.cat(parts, dim=1)
    assert_close(out, expected)
    pull = torch.randn_like(out)
    assert_close(gradients((out * pull).sum(), q, k, v), gradients((expected * pull).sum(), q, k, v))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("most, dtype", [(33 * 16, torch.float32), (33 * 16 - 1, torch.bfloat16)])
def test_gradients_of_short_documents_are_made_in_fp32(monkeypatch, window, most, dtype):
    """In 16 bits PyTorch's kernel takes longer for them."""
    module = sys.modules["tritale.kernels.flash_attention"]
    used, backward = set(), module._sdpa_backward  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(module, "_sdpa_backward", lambda g, *rest, **options: used.add(g.dtype) or backward(g, *rest, **options))
    monkeypatch.setattr(module, "WIDE_UP_TO", most)
    q, k, v, pull = (torch.randn(1, 40, 2, 16).bfloat16() for _ in range(4))
    cu_seqlens, wide = torch.tensor([0, 7, 7, 40], dtype=torch.int32), [t.double().requires_grad_() for t in (q, k, v)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    found = torch.autograd.grad(kernels.flash_attention(*leaves, window=window, cu_seqlens=cu_seqlens), leaves, pull)
    expected = torch.autograd.grad(reference.flash_attention(*wide, window=window, cu_seqlens=cu_seqlens), wide, pull.double())
    assert used == {dtype}
    for gradient, exact in zip(found, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("lay", [lambda t: t[..., ::2], lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)[..., :12]])
def test_packed_attention_takes_heads_that_lie_apart(lay):
    q, k, v = (lay(torch.randn(1, 13, 2, 24, dtype=torch.float64)).requires_grad_() for _ in range(3))
    assert q.stride(-1) != 1
    cu_seqlens, pull = torch.tensor([0, 5, 13], dtype=torch.int32), lay(torch.randn(1, 13, 2, 24, dtype=torch.float64))
    out, expected = (f(q, k, v, cu_seqlens=cu_seqlens) for f in (kernels.flash_attention, reference.flash_attention))
    assert_close(out, expected)
    assert_close(gradients((out * pull).sum(), q, k, v), gradients((expected * pull).sum(), q, k, v))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize(
    "options", [{}, {"cu_seqlens": torch.tensor([0, 4, 9])}, {"window": 3}, {"softcap": 2.0}], ids=lambda o: "-".join(o) or "causal"
)
def test_attention_with_a_scale_that_is_not_positive(scale, options):
    q, k, v = randn(1, 9, 2, 16), randn(1, 9, 2, 16), randn(1, 9, 2, 16)
    out, expected = (f(q, k, v, scale=scale, **options) for f in (kernels.flash_attention, reference.flash_attention))
    assert_close(out, expected)
    assert_close(gradients(out.square().sum(), q, k, v), gradients(expected.square().sum(), q, k, v))


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"cu_seqlens": True}], ids=lambda o: "-".join(o) or "causal")
def test_compiled_attention_takes_sequences_of_every_length(options):
    def attend(q, k, cu_seqlens):
        return kernels.flash_attention(q, k, k, **{**options, **({"cu_seqlens": cu_seqlens} if "cu_seqlens" in options else {})})

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for n_query, n_key in ((5, 5), (7, 7), (9, 9)) + (() if "cu_seqlens" in options else ((4, 9), (3, 11))):
        q, k = randn(1, n_query, 4, 16), randn(1, n_key, 2, 16)
        cu_seqlens = torch.tensor([0, 2, n_key], dtype=torch.int32)
        out, expected = compiled(q, k, cu_seqlens), attend(q, k, cu_seqlens)
        assert_close(out, expected)
        assert_close(gradients(out.square().sum(), q, k), gradients(expected.square().sum(), q, k))


def test_second_derivative_of_packed_attention_says_what_to_do():
    q = randn(1, 9, 2, 16)
    out = kernels.flash_attention(q, q, q, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*reference\.flash_attention"):
        dq.sum().backward()


@pytest.mark.parametrize("n_query", [1, 3, 10])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_is_its_definition_and_aligned_to_the_end(n_query, window, softcap):
    q, k, v = randn(2, n_query, 4, 16), randn(2, 10, 2, 16), randn(2, 10, 2, 16)
    out = kernels.flash_attention(q, k, v, window=window, softcap=softcap)
    whole = torch.cat([torch.zeros(2, 10 - n_query, 4, 16, dtype=torch.float64), q], dim=1)
    expected = reference.flash_attention(whole, k, v, window=window, softcap=softcap)[:, 10 - n_query :]
    assert_close(out, expected)


def test_custom_ops_pass_opcheck():
    q, k, v = randn(1, 9, 2, 8), randn(1, 9, 2, 8), randn(1, 9, 2, 8)
    torch.library.opcheck(torch.ops.tritale.document_attention, (q, k, v, torch.tensor([0, 4, 9]), True, 0, 0.3))
    x, weight, targets, scale = randn(5, 4), randn(7, 4), torch.randint(7, (5,)), torch.rand(5, dtype=torch.float64)
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(torch.ops.tritale.linear_cross_entropy, (x, weight, targets, scale, 0.1, 0.1, 2.0, 128, *needs))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kernels.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 5), torch.ones(2).long()), r"\(4, 5\)"),
        (lambda: kernels.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.ones(2).long(), reduction="avg"), "avg"),
        (lambda: kernels.flash_attention(torch.ones(1, 2, 3, 4), *[torch.ones(1, 2, 2, 4)] * 2), "multiple"),
        (lambda: kernels.backend("cuda").__enter__(), "auto, triton, torch"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("offset", [1e4, 1e6, 1e8, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_an_offset_of_all_logits_costs_no_digits(offset, options):
    """At the dtype's minimum the logits of a row are equal, as in a row that is masked everywhere."""
    logits, target = torch.tensor([[2.0, -1.0, 0.5]]) + offset, torch.tensor([0])
    wide = logits.double().requires_grad_()
    right = F.cross_entropy(wide, target, **options)
    (gradient,) = torch.autograd.grad(right, wide)
    narrow, column = logits.clone().requires_grad_(), logits.T.clone().requires_grad_()
    for loss, t in (
        (kernels.cross_entropy(narrow, target, **options), narrow),
        (kernels.linear_cross_entropy(torch.ones(1, 1), column, target, **options), column),
    ):
        torch.testing.assert_close(loss.double(), right.detach(), rtol=1e-6, atol=1e-6)
        (g,) = torch.autograd.grad(loss, t)
        torch.testing.assert_close(g.reshape(1, 3).double(), gradient, rtol=1e-6, atol=1e-6)


def test_infinite_logits_are_those_of_pytorch():
    inf = float("inf")
    logits, targets = torch.tensor([[0.0, -inf, 1.0], [inf, 0.0, 1.0], [-inf, -inf, -inf]]), torch.tensor([0, 1, 2])
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(kernels.cross_entropy(logits, targets, reduction="none"), expected, equal_nan=True)
