"""Attention: numbers, gradients, memory, integration, traffic, and the choice of the backend."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.harness import Recorder, check_memory, check_numbers, traffic
from tritale.kernels import dispatch, launch, reference
from tritale.kernels.flash_attention import _attend_documents, _choose, _document_bounds, attention_backend, flash_attention

MODULE = sys.modules["tritale.kernels.flash_attention"]  # the package's attribute of that name is the function
KERNELS = ("flash_attention_fwd", "flash_attention_bwd_dq", "flash_attention_bwd_dkv")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
quick = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def triton_attention(q, k, v, **options):
    with attention_backend("triton"):
        return flash_attention(q, k, v, **options)


def plain_attention(q, k, v, *, is_causal=True, window=None, softcap=None, scale=None, cu_seqlens=None):
    """The definition with every product and the softmax in the dtype of the inputs, as a model without a fused kernel writes it."""
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    s = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    mask = reference.attention_mask(q.shape[1], k.shape[1], is_causal=is_causal, window=window, cu_seqlens=cu_seqlens, device=q.device)
    if mask is not None:
        s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
    p = s.softmax(-1)
    return torch.einsum("bhts,bshd->bthd", p if mask is None else p.masked_fill(~mask, 0.0), v)


@contextmanager
def blocks(m: int, n: int):
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(launch.launch_override(kernel, BLOCK_M=m, BLOCK_N=n))
        yield


def randn(*shape, device, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()


def heads(device, n_query, n_key, n_head, n_kv_head, head_dim, dtype=torch.float64, n_batch=1, scale=1.0):
    make = lambda n, h: randn(n_batch, n, h, head_dim, device=device, dtype=dtype, scale=scale)
    return [make(n_query, n_head), make(n_key, n_kv_head), make(n_key, n_kv_head)]


def bounds(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)


def gradient_terms(q, k, v, scale=None):
    """How large the terms are that rounding leaves traces of: p (do · v − do · o) times k or q, and p do.

    p = exp2(s − lse) is made again from a stored lse, so in fp32 its error is eps · |s|, that of the exponent; a stored p has eps. In 16
    bits do · o is made from the stored o: its error, |o| · eps at random, reaches 2.7 TINY · |v| in 250 short documents (4 σ are 7)."""
    if not q.numel() or not k.numel():
        return [0.0, 0.0, 0.0]
    scale = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    is_fp32 = q.dtype == torch.float32
    q, k, v = (t.detach().double() for t in (q, k, v))
    span = scale * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() if is_fp32 else 1.0
    dp = v.norm(dim=-1).max().item() * (max(1.0, span) if is_fp32 else 7.0)
    rows = (q.shape[1] * q.shape[2] / k.shape[2]) ** 0.5  # dk sums one rounding of delta (o is stored in its dtype) for each query
    return [scale * dp * k.abs().max().item(), scale * dp * q.abs().max().item() * rows, max(1.0, span)]


OPTIONS = {
    "causal": {},
    "everything": {"is_causal": False},
    "window": {"window": 7},
    "window, both sides": {"window": 5, "is_causal": False},
    "wide window": {"window": 2**40},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": -0.4},
    "scale of zero": {"scale": 0.0},
    "all": {"window": 9, "softcap": 2.0, "scale": 0.3},
}
options_strategy = st.sampled_from(list(OPTIONS.values()))


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    n_query=st.sampled_from([0, 1, 2, 17, 33, 48, 70]),
    n_key=st.sampled_from([None, 1, 2, 16, 50]),
    heads_=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    head_dim=st.sampled_from([16, 20, 32, 48, 80, 96, 128, 144, 256]),
    n_batch=st.sampled_from([1, 2]),
    scale=st.sampled_from([1.0, 1e-3, 4.0]),
    options=options_strategy,
)
def test_errors_are_at_most_twice_those_of_pytorch(device, dtype, n_query, n_key, heads_, head_dim, n_batch, scale, options):
    n_key = n_query if n_key is None else n_key
    q, k, v = heads(device, n_query, n_key, heads_[0], heads_[1], head_dim, dtype, n_batch, scale)
    with blocks(32, 16):
        check_numbers(triton_attention, plain_attention, [q, k, v], gradient_terms=gradient_terms(q, k, v, options.get("scale")), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 31, 40]), min_size=1, max_size=6).filter(sum),
    heads_=st.sampled_from([(1, 1), (4, 2)]),
    head_dim=st.sampled_from([16, 48, 64, 144]),
    options=options_strategy,
)
def test_packed_documents_have_the_errors_of_pytorch(device, dtype, lengths, heads_, head_dim, options):
    q, k, v = heads(device, sum(lengths), sum(lengths), heads_[0], heads_[1], head_dim, dtype)
    with blocks(16, 32):
        check_numbers(
            triton_attention, plain_attention, [q, k, v],
            gradient_terms=gradient_terms(q, k, v, options.get("scale")), cu_seqlens=bounds(lengths, device), **options,
        )  # fmt: skip


@pytest.mark.parametrize("head_dim", [16, 24, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 200, 256])
def test_every_head_size_is_exact_in_float64(device, head_dim):
    q, k, v = heads(device, 35, 35, 2, 1, head_dim)
    with blocks(16, 16):
        check_numbers(triton_attention, reference.flash_attention, [q, k, v], factor=4.0)


@pytest.mark.parametrize("block_m, block_n", [(16, 64), (64, 16)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_exact_in_float64_whatever_the_blocks(device, block_m, block_n, name):
    with blocks(block_m, block_n):
        for n_query, n_key, lengths in ((67, 67, None), (19, 67, None), (67, 19, None), (67, 67, [20, 0, 1, 33, 13])):
            q, k, v = heads(device, n_query, n_key, 2, 1, 16)
            packed: dict[str, Any] = {} if lengths is None else {"cu_seqlens": bounds(lengths, device)}
            check_numbers(
                triton_attention, reference.flash_attention, [q, k, v], factor=4.0,
                gradient_terms=gradient_terms(q, k, v, OPTIONS[name].get("scale")), **OPTIONS[name], **packed,
            )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "scale of zero"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_float64(device, name, packed):
    """By finite differences, along a random direction; every entry of the Jacobian for tensors of one block."""
    attend = lambda lengths: lambda *t: triton_attention(*t, **OPTIONS[name], **({"cu_seqlens": bounds(lengths, device)} if packed else {}))
    if name in ("causal", "all"):
        assert torch.autograd.gradcheck(attend([1, 0, 1]), heads(device, 2, 2, 2, 1, 2))
    with blocks(16, 16):
        assert torch.autograd.gradcheck(attend([12, 7]), heads(device, 19, 19, 2, 1, 18), fast_mode=True)
        if not packed:
            assert torch.autograd.gradcheck(attend(None), heads(device, 19, 35, 1, 1, 18, n_batch=2), fast_mode=True)


def packed_qkv(device, n_query, n_head, n_kv_head, head_dim, dtype):
    """q, k and v as they lie in one packed projection."""
    qkv = torch.randn(1, n_query, n_head + 2 * n_kv_head, head_dim, dtype=dtype, device=device)
    return [t.requires_grad_() for t in qkv.split((n_head, n_kv_head, n_kv_head), dim=2)]


@pytest.mark.parametrize(
    "name, head_dim", [("causal", 20), ("everything", 48), ("window", 16), ("all", 48), ("all", 144)]
)  # one, masked, two tiles; one loop
def test_touches_only_its_tensors_in_any_order(device, name, head_dim):
    dtype = torch.float32
    every_second = lambda t: (*torch.empty(*t.shape[:3], 2, t.shape[3]).stride()[:3], 1)
    with blocks(16, 32):
        check_memory(triton_attention, heads(device, 35, 35, 2, 1, head_dim, dtype, 2), pull_strides=every_second, **OPTIONS[name])
        check_memory(triton_attention, heads(device, *((5, 35) if head_dim == 16 else (35, 5)), 1, 1, head_dim, dtype), **OPTIONS[name])
    options = {"is_causal": True, "window": 0, "softcap": 0.0, "scale": 0.3, **OPTIONS[name]}
    ends = _document_bounds(bounds([17, 1, 0, 22], device), 40)
    with blocks(32, 16):  # the op itself, so that the documents' starts and ends lie between bands too
        packed = packed_qkv(device, 40, 2, 1, head_dim, dtype)
        check_memory(lambda *t: torch.ops.tritale.flash_attention(*t, **options)[0], [*packed, *ends])


def test_heads_that_do_not_lie_side_by_side(device):
    q, k, v = (randn(1, 16, 2, 20, device=device, dtype=torch.float32) for _ in range(3))
    turned = [t.detach().transpose(1, 3).requires_grad_() for t in (q, k, v)]  # (1, D, H, T) read as (1, T, H, D)
    check_memory(triton_attention, turned, pull_strides=lambda t: t.transpose(1, 3).contiguous().transpose(1, 3).stride())
    check_numbers(triton_attention, plain_attention, turned)


def test_offsets_of_heads_pass_32_bits(device):
    stride, n = 2**30, 3  # as in a cache (B, H, S, D): the third head starts at element 2³¹; only the touched pages are real
    far = torch.empty(2 * stride + 16 * n, dtype=torch.float16, device=device).as_strided((1, n, 3, 16), (0, 16, stride, 1))
    far.copy_(torch.randn(1, n, 3, 16))
    near = torch.randn(1, n, 3, 16, device=device, dtype=torch.float16)
    for q, k, grad in ((near, far, near), (far, near, far)):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        with Recorder(), blocks(16, 16):  # an address that is far off is reported before it is read
            out = triton_attention(q, k, near)
            gradients = torch.autograd.grad(out, (q, k), grad)
        expected = reference.flash_attention(q, k, near)
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k), grad), rtol=1e-2, atol=1e-2)


def test_a_query_without_keys_gives_zero_and_no_gradient(device):
    q, k, v = heads(device, 40, 7, 2, 2, 16, torch.float32)
    with blocks(16, 16):
        out = triton_attention(q, k, v)  # causal, aligned to the end: the first 33 queries come before every key
        dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (out[:, :33] == 0).all() and (dq[:, :33] == 0).all() and (out[:, 33:] != 0).any()
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))
    q, k, v = heads(device, 5, 0, 2, 2, 16, torch.float32)
    out = triton_attention(q, k, v, is_causal=False)
    assert (out == 0).all() and (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_scores_a_thousand_apart_do_not_overflow(device):
    q, k, v = heads(device, 40, 40, 1, 1, 16, torch.float32, scale=30.0)
    with blocks(16, 16):
        out = triton_attention(q, k, v)
        equal = triton_attention(torch.full_like(q, 100.0), torch.full_like(k, 100.0), v, is_causal=False)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), reference.flash_attention(q.double(), k.double(), v.double()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(equal, v.mean(1, keepdim=True).expand_as(equal), rtol=1e-5, atol=1e-4)


def test_the_grid_does_not_depend_on_the_documents(device):
    if device == "cuda":
        pytest.skip("grids are recorded in the interpreter")
    grids = []
    for lengths in ([64], [1] * 64, [30, 0, 0, 34]):
        with Recorder() as recorder:
            q, k, v = heads(device, 64, 64, 2, 1, 16, torch.float32)
            triton_attention(q, k, v, cu_seqlens=bounds(lengths, device)).sum().backward()
        grids.append([r.grid for r in recorder.launches])
    assert len(grids[0]) == 3 and grids[0] == grids[1] == grids[2]


def pairs_walked(n_query, n_key, block, is_causal=True, window=None, lengths=None, transposed=False):
    """(rows of the other operand that all blocks of rows walk, block by block), from the mask alone."""
    cu_seqlens = None if lengths is None else bounds(lengths, "cpu")
    mask = reference.attention_mask(n_query, n_key, is_causal=is_causal, window=window, cu_seqlens=cu_seqlens, device=torch.device("cpu"))
    mask = torch.ones(n_query, n_key, dtype=torch.bool) if mask is None else mask
    mask = mask.T if transposed else mask
    total = 0
    for rows in mask.split(block[0]):
        blocks_seen = {int(j) // block[1] for j in rows.any(0).nonzero()}
        total += sum(min((b + 1) * block[1], mask.shape[1]) - b * block[1] for b in blocks_seen)
    return total


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": False}, {"window": 20}, {"lengths": [50, 7, 64, 23]}, {"window": 20, "lengths": [50, 7, 64, 23]}],
    ids=lambda o: "-".join(o) or "causal",
)  # fmt: skip
def test_traffic_is_its_formula(device, options):
    """The forward loads q and stores o once. It loads k and v once for each block of rows that attends to them, and no other block."""
    n, n_head, n_kv_head, head_dim, m_n = 144, 4, 2, 48, (32, 16)
    q, k, v = heads(device, n, n, n_head, n_kv_head, head_dim, torch.bfloat16)
    call = dict(options)
    lengths = call.pop("lengths", None)
    cu_seqlens = None if lengths is None else bounds(lengths, device)
    out = []
    row, tensor = head_dim * 2, n * n_head * head_dim * 2
    vector, ends = n * n_head * 4, 0 if lengths is None else 8 * n_head * (n + 2 * n)  # start and end of documents: at most
    with blocks(*m_n):
        forward = traffic(lambda: out.append(triton_attention(q, k, v, cu_seqlens=cu_seqlens, **call)))
        backward = traffic(lambda: torch.autograd.grad(out[0], (q, k, v), torch.ones_like(out[0])))
    keys = pairs_walked(n, n, m_n, lengths=lengths, **call) * n_head * row
    queries = pairs_walked(n, n, m_n[::-1], lengths=lengths, transposed=True, **call) * n_head
    expected_fwd = tensor + 2 * keys
    expected_dq = 3 * tensor + 2 * keys + vector
    expected_dkv = 2 * n * n_kv_head * row + queries * (2 * row + 2 * 4)
    assert expected_fwd <= forward["loaded"] <= expected_fwd + ends
    assert expected_dq + expected_dkv <= backward["loaded"] <= expected_dq + expected_dkv + 2 * ends
    assert forward["stored"] == tensor + vector
    assert backward["stored"] == tensor + vector + 2 * n * n_kv_head * row


def test_ops_pass_opcheck(device):
    q, k, v = heads(device, 19, 19, 2, 1, 16, torch.float32)
    start, end = (t.to(device, torch.int32) for t in (torch.tensor([0] * 7 + [7] * 12), torch.tensor([7] * 7 + [19] * 12)))
    for options in ((None, None, True, 0, 0.0, 0.3), (start, end, False, 5, 2.0, 0.3)):
        torch.library.opcheck(torch.ops.tritale.flash_attention, (q, k, v, *options))
        plain = [t.detach() for t in (q, k, v)]
        out, lse = torch.ops.tritale.flash_attention(*plain, *options)
        torch.library.opcheck(torch.ops.tritale.flash_attention_backward, (torch.randn_like(out), *plain, out, lse, *options))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_whole_equals_eager(device, packed):
    q, k, v = heads(device, 24, 24, 4, 2, 16, torch.float32)
    cu_seqlens = bounds([10, 14], device) if packed else None

    def step(q, k, v):
        return flash_attention(q * 2, k, v, cu_seqlens=cu_seqlens, window=8, softcap=5.0).square().sum()

    with attention_backend("triton"):
        eager = step(q, k, v)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager" if packed else "inductor")(q, k, v)
        torch.testing.assert_close(compiled, eager)
        gradients = [torch.autograd.grad(loss, (q, k, v)) for loss in (compiled, eager)]
    torch.testing.assert_close(*gradients)


def test_autocast_makes_it_half_precision(device):
    q, k, v = heads(device, 20, 20, 2, 1, 16, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        out = triton_attention(q, k, v)
    assert out.dtype == torch.bfloat16 and torch.equal(out, triton_attention(*(t.bfloat16() for t in (q, k, v))))
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_second_derivative_says_what_to_do(device):
    q, k, v = heads(device, 4, 4, 1, 1, 16, torch.float32)
    (dq,) = torch.autograd.grad(triton_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def fake_tensor(architecture, monkeypatch, **attributes) -> Any:
    monkeypatch.setattr(MODULE, "architecture", lambda x: architecture)
    return SimpleNamespace(**{"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 64, 2, 48), **attributes})


@pytest.mark.skipif(not dispatch.has_triton(), reason="needs Triton (Linux)")
def test_auto_takes_no_kernel_that_the_architecture_cannot_run_well(monkeypatch):
    def choose(architecture, needs_scores=False, **attributes):
        return _choose(fake_tensor(architecture, monkeypatch, **attributes), needs_scores)

    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert choose(architecture) == "triton"
    assert choose("sm_75") == "sdpa"  # its tensor cores are out of Triton's reach
    assert choose("sm_90", dtype=torch.float32) == "sdpa"  # exact fp32 products have no tensor cores
    assert choose("sm_90", needs_scores=True, dtype=torch.float32) == choose("sm_75", needs_scores=True) == "triton"
    assert choose("sm_90", shape=(1, 64, 2, 512)) == "sdpa"
    assert choose("sm_90", shape=(1, 1, 2, 64)) == "sdpa"  # decoding: one query leaves the GPU idle
    with attention_backend("triton"):
        assert choose("sm_75") == "triton"
    with attention_backend("sdpa"):
        assert choose("sm_90") == "sdpa"
    with dispatch.backend("torch"):
        assert choose("sm_90") == "sdpa"
    assert choose("sm_90", is_cuda=False, device=torch.device("cpu")) == "sdpa"


def test_backends_agree(device):
    q, k, v = heads(device, 33, 33, 4, 2, 20)
    documents = {"cu_seqlens": bounds([10, 23], device)}
    calls: list[dict[str, Any]] = [{}, {"window": 5}, documents, {"softcap": 2.0}, {"is_causal": False, "scale": 0.1}]
    for options in calls:
        results = []
        for name in ("triton", "sdpa"):
            with attention_backend(name):
                out = flash_attention(q, k, v, **options)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("n_kv_head", [2, 4])
def test_packed_documents_never_become_a_mask(n_kv_head, window):
    """The largest allocation on a CPU. The same test for GPUs is in tests/nullgpu."""
    n, n_head = 1024, 4
    q, k, v = (torch.randn(1, n, h, 16, requires_grad=True) for h in (n_head, n_kv_head, n_kv_head))
    documents = torch.arange(0, n + 1, 64, dtype=torch.int32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        flash_attention(q, k, v, cu_seqlens=documents, window=window).sum().backward()
    events: Any = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert q.numel() <= largest < n * n


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
def test_documents_one_by_one_are_the_definition(window, softcap):
    """What heads above 256, for which there is no Triton kernel, run on a GPU."""
    q, k, v = heads("cpu", 24, 24, 4, 2, 264)
    documents = bounds([0, 7, 0, 16, 1, 0], "cpu")
    results = []
    for out in (
        _attend_documents(q, k, v, True, window, softcap, 0.1, documents),
        reference.flash_attention(q, k, v, window=window, softcap=softcap, scale=0.1, cu_seqlens=documents),
    ):
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_flash_attn_is_called_with_its_own_conventions(monkeypatch):
    """The package stands in as the definition behind its documented arguments: window (left, right), causal, cu_seqlens per side."""

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size, softcap):
        left, right = window_size
        assert right == (0 if causal else -1)
        return reference.flash_attention(
            q, k, v, is_causal=causal, window=None if left < 0 else left + 1, softcap=softcap or None, scale=softmax_scale
        )

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k == q.shape[0] and q.dim() == 3
        ends = cu_q.tolist()
        parts = [flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0] for a, b in pairwise(ends)]
        return torch.cat(parts)

    module = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(MODULE.importlib.util, "find_spec", lambda name: module)
    q, k, v = heads("cpu", 23, 23, 4, 2, 16)
    packed: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 9, 23])}
    calls: list[dict[str, Any]] = [
        {},
        {"window": 4},
        {"is_causal": False, "softcap": 2.0},
        {"scale": 0.3, **packed},
        {"window": 3, **packed},
    ]
    for options in calls:
        with attention_backend("flash_attn"):
            out = flash_attention(q, k, v, **options)
        torch.testing.assert_close(out, reference.flash_attention(q, k, v, **options))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: flash_attention(*[torch.ones(1, 2, 2, 4)] * 3, window=0), "window"),
        (lambda: flash_attention(*[torch.ones(1, 2, 2, 4)] * 3, softcap=-1.0), "softcap"),
        (lambda: flash_attention(torch.ones(2, 2, 2, 4), *[torch.ones(1, 2, 2, 4)] * 2), "batch"),
        (lambda: flash_attention(*[torch.ones(2, 2, 2, 4)] * 3, cu_seqlens=torch.tensor([0, 2])), "flattened"),
        (lambda: flash_attention(*[torch.ones(1, 3, 2, 4)] * 3, cu_seqlens=torch.tensor([0, 2])), "rise from 0 to the number of tokens, 3"),
        (lambda: flash_attention(*[torch.ones(1, 3, 2, 4)] * 3, cu_seqlens=torch.tensor([1, 3])), "rise from 0 to the number of tokens, 3"),
        (lambda: flash_attention(*[torch.ones(1, 3, 2, 4)] * 3, cu_seqlens=torch.tensor([0, 2, 1, 3])), "rise from 0"),
        (lambda: flash_attention(torch.ones(1, 2, 2, 4), *[torch.ones(1, 2, 0, 4)] * 2), "multiple"),
        (lambda: flash_attention(torch.ones(1, 2, 0, 4), *[torch.ones(1, 2, 2, 4)] * 2), "multiple"),
        (lambda: flash_attention(*[torch.ones(2, 2, 4)] * 3), r"\(B, T, H, D\)"),
        (lambda: flash_attention(torch.ones(1, 2, 2, 4).bfloat16(), *[torch.ones(1, 2, 2, 4)] * 2), "one dtype"),
        (lambda: flash_attention(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4).half()), "one dtype"),
        (lambda: attention_backend("fast").__enter__(), "auto, triton, sdpa, flash_attn"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "sdpa"])  # the same errors whatever computes it
def test_wrong_arguments_say_what_is_allowed(device, call, message, backend):
    with attention_backend(backend), pytest.raises(ValueError, match=message):
        call()


def test_triton_on_a_cpu_says_how_to_interpret():
    with attention_backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        flash_attention(*[torch.ones(1, 2, 2, 4)] * 3)


def test_flash_attn_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(MODULE.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install flash-attn"):
        attention_backend("flash_attn").__enter__()


def test_compiled_with_dynamic_shapes_on_pytorchs_path():
    torch._dynamo.reset()
    step = torch.compile(lambda q, k, v: flash_attention(q, k, v), dynamic=True, fullgraph=True, backend="eager")
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    for n_query, n_key in ((5, 5), (1, 5), (1, 1)):
        inputs = q[:, :n_query], k[:, :n_key], v[:, :n_key]
        torch.testing.assert_close(step(*inputs), reference.flash_attention(*inputs))


def test_tokens_far_apart_in_memory(device):
    """Offsets within a tile of tokens pass 2³¹: tokens are 70 million elements apart. Only the pages that are touched are real."""
    code = """if True:
        import torch
        from tritale.kernels import attention_backend, flash_attention, reference
        stride, n = 70_000_000, 33
        leaves = [torch.empty(stride * (n - 1) + 32, dtype=torch.float16).as_strided((1, n, 2, 16), (1, stride, 16, 1)) for _ in range(2)]
        for t in leaves:
            t.copy_(torch.randn(1, n, 2, 16))
        q, grad = leaves
        q.requires_grad_()
        k, v = (torch.randn(1, n, 1, 16).half().requires_grad_() for _ in range(2))
        with attention_backend("triton"):
            out = flash_attention(q, k, v)
        results = [(o, *torch.autograd.grad(o, (q, k, v), grad)) for o in (out, reference.flash_attention(q, k, v))]
        torch.testing.assert_close(*results, atol=3e-2, rtol=1e-2)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
