"""RoPE alone and with the QK-norm before it: numbers, gradients, memory, integration, traffic."""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.harness import Recorder, check_memory, check_numbers, guarded_outputs, traffic
from tritale.kernels import backend, launch, qk_norm_rope, reference, rope

pytestmark = pytest.mark.usefixtures("device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
quick = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = {
    "batch": st.sampled_from([0, 1, 2]),
    "tokens": st.sampled_from([1, 2, 7]),
    "heads": st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 6)]),
    "head_dim": st.sampled_from([2, 10, 48, 64, 80, 96]),
    "is_partial": st.booleans(),
    "where": st.sampled_from(["count", "positions", "positions of all", "positions of each", "documents"]),
}


def randn(*shape, device, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_(grad)


def pair(make: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return make(), make()


def tables(half, device, dtype=torch.float32, n=12):
    angles = torch.rand(n, half, dtype=torch.float64) * 6.3
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def places(where, batch, tokens, device):
    """The option that says where tokens stand."""
    if where == "documents":
        return {"cu_seqlens": torch.tensor([0, tokens // 3, tokens, tokens], dtype=torch.int32, device=device)}
    if where == "count":
        return {}
    shape = {"positions": (tokens,), "positions of all": (1, tokens), "positions of each": (batch, tokens)}[where]
    return {"positions": torch.randint(12, shape, device=device)}


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(interleaved=st.booleans(), **shapes)
def test_rope_errs_as_its_definition(device, dtype, interleaved, batch, tokens, heads, head_dim, is_partial, where):
    batch = 1 if where == "documents" else batch
    half = max(1, head_dim // 4) if is_partial else head_dim // 2
    q, k = (randn(batch, tokens, h, head_dim, device=device, dtype=dtype) for h in heads)
    options = {"interleaved": interleaved, **places(where, batch, tokens, device)}
    check_numbers(rope, reference.rope, [q, k, *tables(half, device)], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@quick
@given(**shapes)
def test_qk_norm_rope_errs_as_its_definition(device, dtype, batch, tokens, heads, head_dim, is_partial, where):
    batch = 1 if where == "documents" else batch
    half = max(1, head_dim // 4) if is_partial else head_dim // 2
    qkv = randn(batch, tokens, (heads[0] + 2 * heads[1]) * head_dim, device=device, dtype=dtype)
    weights = pair(lambda: randn(head_dim, device=device, dtype=torch.float32))
    options = {"n_head": heads[0], "n_kv_head": heads[1], **places(where, batch, tokens, device)}
    # The definition rounds to the input's dtype between norm and rotation, the kernel does not: it may only be better.
    rstd = torch.rsqrt(qkv.detach().unflatten(-1, (-1, head_dim)).double().square().mean(-1) + 1e-6)
    terms = [8 * max(w.abs().max().item() for w in weights) * rstd.max().item() if rstd.numel() else 0.0]
    check_numbers(qk_norm_rope, reference.qk_norm_rope, [qkv, *weights, *tables(half, device)], gradient_terms=terms, **options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [3, 5])
def test_touches_only_its_tensors_in_any_order(device, interleaved, half):
    head_dim, heads = 10, (3, 1)
    qkv = randn(2, 3, 5 * head_dim, device=device, dtype=torch.float32, grad=False).unflatten(-1, (5, head_dim))
    q, k = (t.requires_grad_() for t in qkv.split((*heads, 1), dim=2)[:2])
    positions = torch.randint(12, (2, 3), device=device)
    cos, sin = tables(half, device)
    strides = lambda t: (t.shape[1] * t.shape[2] * 24, t.shape[2] * 24, 24, 1)
    with launch.launch_override("rope", BLOCK_T=4):
        check_memory(rope, [q, k, cos, sin], interleaved=interleaved, positions=positions, pull_strides=strides)
        with torch.no_grad():
            plain = [t.detach() for t in (q, k)]
            check_memory(rope, [*plain, cos, sin], interleaved=interleaved, positions=positions[0], inplace=True)
    if interleaved:
        return
    packed = randn(2, 3, 60, device=device, dtype=torch.float32, grad=False)[..., :50].requires_grad_()
    weights = pair(lambda: randn(head_dim, device=device, dtype=torch.float32))
    with launch.launch_override("qk_norm_rope_fwd", BLOCK_R=4), launch.launch_override("qk_norm_rope_bwd", BLOCK_R=4, PER_SM=1):
        op = lambda *t, **o: qk_norm_rope(*t, n_head=3, n_kv_head=1, **o)
        check_memory(op, [packed, *weights, cos, sin], positions=positions, pull_strides=strides)


def test_programs_that_walk_several_blocks_of_heads(device):
    qkv, weights = randn(1, 9, 4 * 6, device=device), pair(lambda: randn(6, device=device))
    options: dict[str, Any] = {"n_head": 2, "n_kv_head": 1}
    with launch.launch_override("qk_norm_rope_bwd", BLOCK_R=2, PER_SM=1):  # 2 programs in the interpreter
        check_numbers(qk_norm_rope, reference.qk_norm_rope, [qkv, *weights, *tables(2, device, torch.float64)], factor=4.0, **options)


def test_gradients_in_float64(device):
    cos, sin = tables(2, device, torch.float64)
    q, k = (randn(1, 3, h, 6, device=device) for h in (2, 1))
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), (q, k))  # noqa: B023
    qkv, weights = randn(1, 2, 20, device=device), pair(lambda: randn(5, device=device))
    for half in (1, 2):
        c, s = tables(half, device, torch.float64)
        op = lambda x, q_weight, k_weight: qk_norm_rope(x, q_weight, k_weight, c, s, n_head=2, n_kv_head=1)  # noqa: B023
        assert torch.autograd.gradcheck(op, (qkv, *weights))


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_writes_where_no_gradient_is_asked(device, interleaved):
    q, k = (randn(2, 3, h, 8, device=device, dtype=torch.float32, grad=False) for h in (2, 1))
    cos, sin = tables(3, device)
    expected = rope(q, k, cos, sin, interleaved=interleaved)
    q_out, k_out = rope(q.clone().requires_grad_(), k, cos, sin, interleaved=interleaved, inplace=True)
    assert q_out.requires_grad and torch.equal(q_out, expected[0])
    q_out, k_out = rope(q, k, cos, sin, interleaved=interleaved, inplace=True)
    assert q_out is q and k_out is k and torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@pytest.mark.parametrize("where", ["positions", "positions of all", "positions of each"])
def test_one_sequence_may_give_the_positions_of_all(device, where):
    q, k = (randn(3, 5, h, 8, device=device) for h in (2, 1))
    cos, sin = tables(3, device, torch.float64)
    option: dict[str, Any] = places(where, 3, 5, device)
    with Recorder():  # an address that is far off is reported before it is read
        rotated = rope(q, k, cos, sin, **option)
    torch.testing.assert_close(rotated, reference.rope(q, k, cos, sin, **option))
    qkv, weights, sizes = randn(3, 5, 32, device=device), pair(lambda: randn(8, device=device)), {"n_head": 2, "n_kv_head": 1}
    option |= sizes
    expected = reference.qk_norm_rope(qkv, *weights, cos, sin, **option)
    with Recorder():
        out = qk_norm_rope(qkv, *weights, cos, sin, **option)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(torch.stack([t.square().sum() for t in o]).sum(), (qkv, *weights)) for o in (out, expected)]
    torch.testing.assert_close(*grads)


def test_offsets_of_heads_pass_32_bits(device):
    stride, tokens = 2**30, 3  # as in a cache (B, H, S, D): the third head starts at element 2³¹; only the touched pages are real
    k = torch.empty(2 * stride + 16 * tokens, dtype=torch.float16, device=device).as_strided((1, tokens, 3, 16), (0, 16, stride, 1))
    k.copy_(torch.randn(1, tokens, 3, 16))
    q, (cos, sin) = torch.randn(1, tokens, 3, 16, device=device, dtype=torch.float16), tables(8, device)
    with Recorder():
        out = rope(q, k, cos, sin)
    torch.testing.assert_close(out, reference.rope(q, k, cos, sin))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs one program of the grid, in the interpreter")
def test_batch_strides_pass_32_bits(device):
    """Sequences of a batch are T · H · D = 2³¹ elements apart; one program runs, the first of the second one. Only its pages are real."""
    n_tokens, n_head, head_dim, block = 2**20, 16, 128, 1024
    first = n_tokens * n_head // block
    sizes: dict[str, Any] = {"n_head": n_head, "n_kv_head": 1}
    cos, sin = tables(head_dim // 2, device)
    positions = torch.arange(n_tokens, device=device) % 12
    weights = pair(lambda: randn(head_dim, device=device, dtype=torch.float32, grad=False))
    token = randn(2, 1, (n_head + 2) * head_dim, device=device, dtype=torch.float16, grad=False)
    qkv, here = token.expand(2, n_tokens, -1), slice(0, block // n_head)
    with Recorder(), only_program("_qk_norm_rope_fwd", first), launch.launch_override("qk_norm_rope_fwd", BLOCK_R=block):
        q, _, _ = qk_norm_rope(qkv, *weights, cos, sin, positions=positions, **sizes)
    part = qkv[1:, here].float().requires_grad_()
    expected, *_ = reference.qk_norm_rope(part, *weights, cos, sin, positions=positions[here], **sizes)
    torch.testing.assert_close(q[1:, here].float(), expected.detach(), rtol=2e-3, atol=2e-3)
    del q
    dq, dkv = (randn(2, 1, h, head_dim, device=device, dtype=torch.float16, grad=False).expand(2, n_tokens, -1, -1) for h in (n_head, 1))
    row = {"BLOCK_R": block, "PER_SM": n_tokens}
    with Recorder(), only_program("_qk_norm_rope_bwd", first), launch.launch_override("qk_norm_rope_bwd", **row):
        dqkv, _, _ = torch.ops.tritale.qk_norm_rope_backward(dq, dkv, dkv, qkv, *weights, cos, sin, positions, 1e-6)
    (exact,) = torch.autograd.grad(expected, part, dq[1:, here].float())
    ours = slice(0, n_head * head_dim)
    torch.testing.assert_close(dqkv[1:, here, ours].float(), exact[..., ours], rtol=2e-3, atol=2e-3)


@contextmanager
def only_program(kernel, index):
    """Inside, a launch of the kernel runs program (index, 0, 0) of its grid alone."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    module = sys.modules["tritale.kernels.qk_norm_rope"]  # the package's attribute of that name is the function
    whole = getattr(module, kernel)

    class One:
        def __getitem__(self, grid):
            def launch(*args, **options):
                set_dim, set_idx = Builder.set_grid_dim, Builder.set_grid_idx
                dims = lambda self, *_: set_dim(self, *grid, *(1,) * (3 - len(grid)))
                place = lambda self, *_: set_idx(self, index, 0, 0)
                with mock.patch.multiple(Builder, set_grid_dim=dims, set_grid_idx=place):
                    whole[(1,)](*args, **options)

            return launch

    with mock.patch.object(module, kernel, One()):
        yield


def test_cos_and_sin_get_no_gradient(device):
    q, k = (randn(1, 3, h, 8, device=device) for h in (2, 1))
    cos, sin = (t.requires_grad_() for t in tables(4, device, torch.float64))
    qkv, weight = randn(1, 3, 32, device=device), randn(8, device=device)
    for name in ("auto", "torch"):
        with backend(name):
            outputs = (*rope(q, k, cos, sin), *qk_norm_rope(qkv, weight, weight, cos, sin, n_head=2, n_kv_head=1))
        assert torch.autograd.grad(torch.stack([t.sum() for t in outputs]).sum(), (cos, sin), allow_unused=True) == (None, None)


def test_no_heads_of_q_or_k(device):
    cos, sin = tables(3, device)
    q, k = (randn(1, 3, h, 10, device=device, dtype=torch.float32, grad=False) for h in (2, 1))
    for a, b in ((q[:, :, :0], k), (q, k[:, :, :0])):
        guards = []
        with guarded_outputs(guards):  # what is not written stays NaN
            out = rope(a, b, cos, sin)
        torch.testing.assert_close(out, reference.rope(a, b, cos, sin))


def test_in_place_refuses_heads_that_share_memory(device):
    q, k = (randn(1, 3, 4, 8, device=device, dtype=torch.float32, grad=False) for _ in range(2))
    cos, sin = tables(4, device)
    shared, before = k[:, :, :1].expand(1, 3, 4, 8), q.clone()
    windows = torch.randn(1, 3, 11, device=device).unfold(2, 8, 1)
    for name in ("auto", "torch"):
        for bad in (shared, windows):
            with backend(name), pytest.raises(ValueError, match="share memory"):
                rope(q, bad, cos, sin, inplace=True)
    assert torch.equal(q, before)  # nothing was written before the error
    turned = torch.randn(1, 4, 3, 8, device=device).transpose(1, 2)
    expected = reference.rope(turned, k, cos, sin)
    torch.testing.assert_close(rope(turned, k, cos, sin, inplace=True), expected)


def test_ops_pass_opcheck(device):
    q, k = (randn(1, 3, h, 6, device=device, dtype=torch.float32) for h in (2, 1))
    cos, sin = tables(2, device)
    torch.library.opcheck(torch.ops.tritale.rope, (q, k, cos, sin, torch.tensor([3, 1, 0], device=device), False, False))
    plain = (q.detach(), k.detach(), cos, sin)
    torch.library.opcheck(torch.ops.tritale.rope, (*plain, None, True, True))
    torch.library.opcheck(torch.ops.tritale.rope_, (*(t.clone() for t in plain), None, False))
    qkv, weights = randn(1, 3, 24, device=device, dtype=torch.float32), pair(lambda: randn(6, device=device, dtype=torch.float32))
    torch.library.opcheck(torch.ops.tritale.qk_norm_rope, (qkv, *weights, cos, sin, None, 2, 1, 1e-6))
    detached = [t.detach() for t in (qkv, *weights)]
    torch.library.opcheck(torch.ops.tritale.qk_norm_rope_backward, (q.detach(), *(k.detach(),) * 2, *detached, cos, sin, None, 1e-6))


def test_compiled_whole_equals_eager(device):
    qkv = randn(1, 5, 4 * 8, device=device, dtype=torch.float32)
    weights = pair(lambda: randn(8, device=device, dtype=torch.float32))
    cos, sin = tables(4, device)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)

    def step(qkv, wq, wk):
        q, k, v = qk_norm_rope(qkv, wq, wk, cos, sin, n_head=2, n_kv_head=1, cu_seqlens=cu_seqlens)
        q, k = rope(q, k, cos, sin, interleaved=True)
        return (q * (k + v)).sum()

    eager, compiled = step(qkv, *weights), torch.compile(step, fullgraph=True, backend="aot_eager")(qkv, *weights)
    torch.testing.assert_close(compiled, eager)
    pairs = zip(*(torch.autograd.grad(loss, (qkv, *weights)) for loss in (compiled, eager)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_inputs_dtype(device):
    q, k = (randn(1, 3, h, 8, device=device, dtype=torch.bfloat16) for h in (2, 1))
    cos, sin = tables(4, device)
    with torch.autocast(device, torch.bfloat16):
        assert all(t.dtype == torch.bfloat16 for t in rope(q, k, cos, sin))
        qkv, w = randn(1, 3, 32, device=device, dtype=torch.bfloat16), torch.ones(8, device=device)
        assert all(t.dtype == torch.bfloat16 for t in qk_norm_rope(qkv, w, w, cos, sin, n_head=2, n_kv_head=1))


def test_wrong_arguments_say_what_is_expected(device):
    q, (cos, sin) = torch.ones(1, 13, 2, 8, device=device), tables(4, device)
    with pytest.raises(ValueError, match="hold 12 positions"):
        rope(q, q, cos, sin)
    with pytest.raises(ValueError, match="at most D / 2"):
        rope(q[..., :6], q[..., :6], cos, sin)
    with pytest.raises(ValueError, match="one of them"):
        rope(q, q, cos, sin, positions=torch.arange(13), cu_seqlens=torch.tensor([0, 13]))
    with pytest.raises(ValueError, match="expected"):
        qk_norm_rope(q.flatten(2), torch.ones(8), torch.ones(8), cos, sin, n_head=2, n_kv_head=1)
    for name in ("auto", "torch"):  # the same errors whatever computes it
        with backend(name):
            check_wrong_places(device, cos, sin)


def test_rope_is_differentiable_twice(device):
    q = randn(1, 3, 2, 8, device=device, dtype=torch.float64)
    cos, sin = (t.double() for t in tables(4, device))
    assert torch.autograd.gradgradcheck(lambda q: rope(q, q, cos, sin)[0].sin(), q)


def check_wrong_places(device, cos, sin):
    def wrong(n_batch, n_tokens, message, **options):
        q = torch.ones(n_batch, n_tokens, 2, 8, device=device)
        with pytest.raises(ValueError, match=message):
            rope(q, q, cos, sin, **options)
        qkv, weights = torch.ones(n_batch, n_tokens, 32, device=device), pair(lambda: torch.ones(8, device=device))
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(qkv, *weights, cos, sin, n_head=2, n_kv_head=1, **options)

    at = lambda *n, dtype=torch.int64: torch.tensor(n, device=device, dtype=dtype)
    wrong(1, 13, "hold 12 positions")
    wrong(1, 3, "one of them", positions=at(0, 1, 2), cu_seqlens=at(0, 3))
    wrong(2, 3, r"\(1, 3\) or \(2, 3\) expected", positions=at(0, 1))
    wrong(2, 3, r"\(1, 3\) or \(2, 3\) expected", positions=at(0, 1, 2).expand(3, 3))
    wrong(2, 3, "B = 1", cu_seqlens=at(0, 3, dtype=torch.int32))
    if device == "cpu":  # where looking at the values costs nothing
        wrong(1, 3, "from 0 to 12", positions=at(0, 1, 12))
        wrong(2, 3, "from -1 to 2", positions=at(0, -1, 2))
        wrong(1, 14, "from 0 to 12", cu_seqlens=at(0, 13, 14))
        wrong(1, 3, "rise from 0", cu_seqlens=at(0, 2))
    q = torch.ones(3, 2, 8, device=device)
    with pytest.raises(ValueError, match=r"\(B, T, H, D\)"):
        rope(q, q, cos, sin)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@pytest.mark.parametrize("heads, head_dim", [((6, 6), 48), ((12, 4), 64)])
def test_traffic_is_each_input_and_output_once(device, heads, head_dim):
    tokens = 64
    bf16 = {"device": device, "dtype": torch.bfloat16}
    qkv = randn(1, tokens, (heads[0] + 2 * heads[1]) * head_dim, **bf16)
    q, k, v = (t.detach().requires_grad_() for t in qkv.detach().unflatten(-1, (-1, head_dim)).split((heads[0], *heads[1:] * 2), dim=2))
    weights = pair(lambda: randn(head_dim, device=device, dtype=torch.float32))
    cos, sin = tables(head_dim // 2, device, n=tokens)
    both = (q.numel() + k.numel()) * 2
    pulls, outputs = [torch.randn_like(t).detach() for t in (q, k, v)], []
    for run, passes, size in (
        (lambda: outputs.extend(rope(q, k, cos, sin)), 2, both),
        (lambda: torch.autograd.grad(outputs, (q, k), pulls[:2]), 2, both),
        (lambda: outputs.extend(qk_norm_rope(qkv, *weights, cos, sin, n_head=heads[0], n_kv_head=heads[1])), 2, qkv.numel() * 2),
        (lambda: torch.autograd.grad(outputs[2:], qkv, pulls), None, qkv.numel() * 2),
    ):
        counted = traffic(run, [cos, sin, *weights])
        # The last reads the gradients and q and k, and writes all; its v has no part in the norm.
        ideal = passes * size if passes else 2 * size + both
        partial_sums = 0 if passes else 2 * counted_programs(head_dim // 2, tokens * heads[0]) * head_dim * 4
        assert counted["loaded"] + counted["stored"] <= 1.05 * ideal + partial_sums


def counted_programs(half, rows):
    row = launch.launch_options("qk_norm_rope_bwd", torch.empty(0), half=half)
    return min(2 * row["PER_SM"], -(-rows // row["BLOCK_R"]))
