"""The ops in `cpu.c`: numbers and gradients against float64, memory, second derivatives, and when they run."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.harness.memory import guard, guarded_outputs
from tests.kernels.harness.numbers import check_numbers
from tritale import kernels
from tritale.kernels import c_compiler, cpu, reference, rotary_tables

DTYPES = [torch.float32, torch.bfloat16]
COS, SIN = rotary_tables(16, 10)
HEADS = {"n_head": 3, "n_kv_head": 2}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """The compiled library, also for small tensors."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "SMALLEST", 1)
    if isinstance(problem := c_compiler.load(cpu.SOURCE, cpu.FLAGS), str):
        pytest.skip(problem)


def randn(*shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def targets(n, vocab):
    t = torch.randint(vocab, (n,))
    t[::5] = -100
    return t


def cases(dtype) -> dict:
    """{name: (op, definition, inputs, options)} of odd shapes and strides."""
    x, positions = randn(2, 7, 130, dtype=dtype), torch.randint(16, (2, 7))
    packed = {"cu_seqlens": torch.tensor([0, 3, 3, 14], dtype=torch.int32)}
    strided = randn(7, 2, 131, dtype=dtype).transpose(0, 1)[..., 1:]
    q, k, qkv = randn(2, 7, 3, 13, dtype=dtype), randn(7, 2, 2, 13, dtype=dtype).transpose(0, 1), randn(2, 7, 7 * 13, dtype=dtype)
    flat = randn(1, 14, 3, 13, dtype=dtype), randn(1, 14, 2, 13, dtype=dtype)
    norms = randn(13, dtype=dtype), randn(13, dtype=dtype)
    logits, smooth = randn(11, 38, scale=3.0, dtype=dtype)[:, 1:].detach().requires_grad_(), {"label_smoothing": 0.1, "z_loss": 0.01}
    wide, wider = (randn(9, n, dtype=dtype)[:, :130].detach().requires_grad_() for n in (131, 140))  # rows that are apart
    found = {}
    for name, inputs, options in (
        ("rms_norm", (x, randn(130, dtype=dtype)), {"eps": 1e-5}),
        ("rms_norm", (x, randn(130)), {"offset": 1.0}),
        ("rms_norm", (strided,), {}),
        ("rms_norm", (randn(3, 1, dtype=dtype), randn(1, dtype=dtype)), {"eps": 0.1}),
        ("rms_norm", (wide, randn(130, dtype=dtype)), {}),
        ("add_rms_norm", (x, strided, randn(130, dtype=dtype)), {}),
        ("add_rms_norm", (wide, wider, randn(130, dtype=dtype)), {}),
        ("add_rms_norm", (x, strided), {}),
        ("swiglu", (x,), {}),
        ("swiglu", (strided, x), {}),
        ("swiglu", (wide, wider), {}),
        ("geglu", (strided,), {}),
        ("geglu", (x, strided), {}),
        ("rope", (q, k, COS, SIN), {}),
        ("rope", (q, k, COS, SIN), {"positions": positions}),
        ("rope", (q, k, COS, SIN), {"positions": positions[0].int()}),
        ("rope", (*flat, COS, SIN), packed),
        ("qk_norm_rope", (qkv, *norms, COS, SIN), HEADS),
        ("qk_norm_rope", (qkv, *norms, COS, SIN), HEADS | {"positions": positions}),
        ("cross_entropy", (logits, targets(11, 37)), {}),
        ("cross_entropy", (logits, targets(11, 37)), smooth | {"reduction": "none"}),
        ("linear_cross_entropy", (randn(11, 16, dtype=dtype), randn(37, 16, dtype=dtype), targets(11, 37)), {}),
        ("linear_cross_entropy", (randn(11, 16, dtype=dtype), randn(37, 16), targets(11, 37)), smooth),
    ):
        found[f"{name} {len(found)}"] = getattr(kernels, name), getattr(reference, name), inputs, options
    return found


NAMES = list(cases(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_gradients_are_as_exact_as_the_definitions(name, dtype):
    op, definition, inputs, options = cases(dtype)[name]
    calls, call = [], cpu._call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_call", lambda *arguments: calls.append(arguments[0]) or call(*arguments))
        check_numbers(op, definition, inputs, **options)
    assert len(calls) >= (1 if "linear" in name else 2)  # forward and backward ran in cpu.c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_of_the_tensors_is_read_or_written(name, dtype):
    """Inputs and outputs lie between bands of NaN, and the outputs' memory is NaN before."""
    op, _, inputs, options = cases(dtype)[name]
    guards = [guard(t) for t in inputs]
    inside = [g.view.requires_grad_(t.requires_grad) for g, t in zip(guards, inputs, strict=True)]
    with guarded_outputs(guards):
        outputs = op(*inside, **options)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        pulls = [guard(torch.ones_like(o)).view for o in outputs]
        gradients = torch.autograd.grad(outputs, [t for t in inside if t.requires_grad], pulls)
    for t in (*outputs, *gradients):
        assert t.isfinite().all()
    for g in guards:
        g.check()


@pytest.mark.parametrize("name", [n for n in NAMES if "add" not in n and "cross" not in n])
def test_bf16_is_fp32_rounded_to_nearest(name):
    op, _, inputs, options = cases(torch.bfloat16)[name]
    found = op(*inputs, **options)
    exact = op(*(t.float() if t.dtype == torch.bfloat16 else t for t in inputs), **options)
    for ours, theirs in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (found, exact)), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_special_values_are_those_of_the_definition():
    inf, nan = torch.inf, torch.nan
    gate = torch.tensor([-inf, -1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30, inf, nan]).repeat(8, 1)
    for name in ("swiglu", "geglu"):
        ours, theirs = getattr(kernels, name)(gate, gate), getattr(reference, name)(gate, gate)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    for dtype in DTYPES:
        logits = torch.randn(6, 40).to(dtype)
        logits[0, 3], logits[1, 4], logits[2], logits[3, :20], logits[4] = inf, nan, -inf, -inf, 1e4
        logits = logits.requires_grad_()
        index = torch.tensor([3, 0, 1, 30, 2, 5])
        found = []
        for module in (kernels, reference):
            loss, stats = module.cross_entropy(logits, index, reduction="none", return_stats=True)
            stats["correct"][loss.isnan()] = False
            found.append((loss, stats["lse"], stats["correct"], *torch.autograd.grad(loss, logits, torch.ones_like(loss))))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert (found[0][-1][3, :20] == 0).all()  # a masked entry has no probability at all
    big = torch.tensor([3e38, 3.3895e38, -3.3895e38, nan, inf]).bfloat16().repeat(8, 1)
    assert torch.equal(kernels.rms_norm(big, eps=0.0).isnan(), reference.rms_norm(big, eps=0.0).isnan())


def test_the_first_of_equal_maxima_is_the_one_that_counts():
    logits, index = torch.zeros(5, 700), torch.tensor([0, 1, 699, 350, -100])
    logits[3, 350] = 1
    _, stats = kernels.cross_entropy(logits, index, return_stats=True)
    assert stats["correct"].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("target", [5, -1, 2**40])
def test_a_target_outside_of_the_vocabulary_is_named(target):
    index = torch.tensor([1, target, 0])
    with pytest.raises(IndexError, match=f"target {target} is outside of 0 … 4, and it is not ignore_index"):
        kernels.cross_entropy(torch.randn(3, 5), index)


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("linear")])
def test_second_derivatives_are_the_definitions(name):
    op, definition, inputs, options = cases(torch.float32)[name]
    leaves = [t for t in inputs if t.requires_grad]
    found = []
    for f in (op, definition):
        torch.manual_seed(0)
        outputs = f(*inputs, **options)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        first = torch.autograd.grad([o.pow(3).sum() for o in outputs], leaves, create_graph=True)
        found.append(torch.autograd.grad([g.square().sum() for g in first], leaves))
    torch.testing.assert_close(*found, rtol=2e-4, atol=2e-4 * max(g.abs().max().item() for g in found[1]))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("linear")])
def test_backward_works_for_a_batch_of_gradients(name):
    op, definition, inputs, options = cases(torch.float32)[name]
    leaves = [t for t in inputs if t.requires_grad]
    found = []
    for f in (op, definition):
        outputs = f(*inputs, **options)
        output = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        torch.manual_seed(0)
        pulls = torch.randn(3, *output.shape)
        found.append(torch.autograd.grad(output, leaves, pulls, is_grads_batched=True, allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_changes_no_bit(name, monkeypatch):
    op, _, inputs, options = cases(torch.float32)[name]
    monkeypatch.setattr(cpu, "PER_THREAD", 1)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            outputs = op(*inputs, **options)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            gradients = torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], [torch.ones_like(o) for o in outputs])
            found.append((*outputs, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rope_overwrites_q_and_k_in_place():
    q, k = (torch.randn(2, 7, n, 13) for n in (3, 2))
    expected = kernels.rope(q, k, COS, SIN)
    q_in, k_in = q.clone(), k.clone()
    found = kernels.rope(q_in, k_in, COS, SIN, inplace=True)
    assert found[0] is q_in and found[1] is k_in
    assert torch.equal(q_in, expected[0]) and torch.equal(k_in, expected[1])


def test_the_gradient_of_an_unused_output_is_absent():
    x, residual, weight = randn(5, 32), randn(5, 32), randn(32)
    for used, expected in ((0, True), (1, False)):
        out = kernels.add_rms_norm(x, residual, weight)[used]
        *_, dw = torch.autograd.grad(out.sum(), (x, residual, weight), allow_unused=True)
        assert (dw is not None) == expected


def runs_in_c(call, monkeypatch) -> bool:
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_call", lambda name, *arguments: calls.append(name))
        call()
    return bool(calls)


def test_what_else_than_plain_tensors_takes_the_definition(monkeypatch):
    x, w, up, q = torch.randn(8, 64), torch.randn(64), torch.randn(8, 64), torch.randn(1, 4, 1, 16)
    assert runs_in_c(lambda: kernels.rms_norm(x, w), monkeypatch)
    others = {
        "float64": lambda: kernels.rms_norm(x.double(), w),
        "a weight in float64": lambda: kernels.rms_norm(x, w.double()),
        "fp16": lambda: kernels.rms_norm(x.half(), w),
        "two dtypes": lambda: kernels.swiglu(x, up.bfloat16()),
        "interleaved": lambda: kernels.rope(q, q, COS[:, :4], SIN[:, :4], interleaved=True),
        "tables in float64": lambda: kernels.rope(q, q, COS.double()[:, :4], SIN.double()[:, :4]),
        "soft cap": lambda: kernels.cross_entropy(x, torch.zeros(8, dtype=torch.int64), softcap=3.0),
        "forward mode": lambda: torch.func.jvp(lambda x: kernels.rms_norm(x, w), (x,), (x,)),
        "vmap": lambda: torch.vmap(lambda x: kernels.swiglu(x, x))(x),
        "torch.func.grad": lambda: torch.func.grad(lambda x: kernels.rms_norm(x, w).sum())(x),
        "a forced backend": lambda: forced(lambda: kernels.rms_norm(x, w)),
        "torch.compile": lambda: torch.compile(kernels.rms_norm, backend="eager", fullgraph=True)(x, w),
        "FakeTensor": lambda: fake(lambda: kernels.rms_norm(torch.randn(8, 64), torch.randn(64))),
        "a dispatch mode": lambda: counted(lambda: kernels.rms_norm(x, w)),
        "tracing": lambda: traced(lambda x: kernels.rms_norm(x, w), x),
        "meta": lambda: kernels.rms_norm(x.to("meta"), w.to("meta")),
    }
    for name, call in others.items():
        assert not runs_in_c(call, monkeypatch), name
    monkeypatch.setattr(cpu, "SMALLEST", x.numel() + 1)
    assert not runs_in_c(lambda: kernels.rms_norm(x, w), monkeypatch)


def forced(call):
    with kernels.backend("torch"):
        return call()


def counted(call):
    with FlopCounterMode(display=False):
        return call()


def traced(call, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(call, x, check_trace=False)


def fake(call):
    with torch._subclasses.FakeTensorMode():
        return call()


def test_without_a_compiler_the_definition_runs_after_one_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(c_compiler.shutil, "which", lambda name: None)
    cpu._library.cache_clear()
    try:
        x = torch.randn(8, 64)
        with pytest.warns(UserWarning, match="no C compiler"):
            found = kernels.rms_norm(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.swiglu(x)
        assert torch.equal(found, reference.rms_norm(x))
    finally:
        cpu._library.cache_clear()


# --- Uses that a C function must be protected from -----------------------------------------------------------------------------------


def test_weights_of_qk_norm_rope_are_one_vector_each():
    weight = torch.ones(1, 12)
    with pytest.raises(ValueError, match=r"q_weight \(1, 12\)"):
        kernels.qk_norm_rope(torch.randn(1, 4, 36), weight, weight, COS, SIN, n_head=1, n_kv_head=1)


def test_a_default_device_changes_nothing():
    q, k, qkv, w = torch.randn(1, 4, 2, 12), torch.randn(1, 4, 1, 12), torch.randn(1, 4, 48), torch.randn(12)
    call = lambda: (*kernels.rope(q, k, COS, SIN), *kernels.qk_norm_rope(qkv, w, w, COS, SIN, n_head=2, n_kv_head=1))
    expected = call()
    with torch.device("meta"):
        found = call()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_values_that_change_between_forward_and_backward_are_checked_again():
    q, k = randn(1, 8, 2, 12), randn(1, 8, 1, 12)
    for call in (
        lambda index: kernels.cross_entropy(randn(8, 50), index),
        lambda index: kernels.rope(q, k, COS, SIN, positions=index)[0].sum(),
    ):
        array = np.zeros(8, dtype=np.int64)
        loss = call(torch.from_numpy(array))
        array[:] = 10**9
        with pytest.raises((IndexError, ValueError), match="1000000000"):
            loss.backward()


def test_gradients_without_ordinary_memory_are_right():
    x = randn(4, 16)
    (zero,) = torch.autograd.grad(kernels.rms_norm(x), x, torch._efficientzerotensor((4, 16)))  # pyright: ignore[reportPrivateImportUsage]
    assert (zero == 0).all()
    pull = torch.randn(4, 16)
    negative = torch._neg_view  # pyright: ignore[reportPrivateImportUsage]
    found = torch.autograd.grad(kernels.rms_norm(x), x, negative(pull))
    torch.testing.assert_close(found, torch.autograd.grad(reference.rms_norm(x), x, -pull))
    torch.testing.assert_close(kernels.rms_norm(negative(x.detach())), reference.rms_norm(-x.detach()))


def test_autograd_notices_what_is_overwritten():
    h, index = randn(8, 50), torch.randint(50, (8,))
    loss = kernels.cross_entropy(h.tanh(), index, inplace_backward=True)  # tanh has saved its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    q, k, w = torch.randn(1, 4, 2, 12), torch.randn(1, 4, 1, 12), randn(1, 4, 2, 12)
    product = (w * q).sum()
    kernels.rope(q, k, COS, SIN, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_q_and_k_that_share_memory_are_rotated_once():
    qk = torch.randn(1, 4, 3, 12)
    for q, k in ((qk, qk), (qk[:, :, :2], qk[:, :, 1:])):
        expected = reference.rope(q.clone(), k.clone(), COS, SIN)
        kernels.rope(q, k, COS, SIN, inplace=True)
        torch.testing.assert_close(k, expected[1])


def composed(module) -> dict:
    """Functions of x and w in which an input of an op depends on another of its inputs, or is it."""
    w_of = lambda w: w[:4]
    return {
        "twice the same": lambda x, w: module.swiglu(x, x),
        "one of the other": lambda x, w: module.swiglu(x, 2 * x.sin()),
        "a weight used twice": lambda x, w: module.rms_norm(module.rms_norm(x, w) + x, w),
        "a sum with its parts": lambda x, w: module.add_rms_norm(module.rms_norm(x, w), x, w)[0],
        "one weight for q and k": lambda x, w: module.qk_norm_rope(
            x.view(1, 6, 12), w_of(w), w_of(w), COS[:, :2], SIN[:, :2], n_head=1, n_kv_head=1
        )[0],
        "logits of themselves": lambda x, w: module.cross_entropy(x * x.detach(), torch.arange(6), reduction="none"),
    }


@pytest.mark.parametrize("name", composed(kernels))
@pytest.mark.parametrize("mode", ["create_graph", "batched"])
def test_inputs_may_depend_on_each_other(name, mode):
    x, w, found = randn(6, 12), randn(12), []
    calls = []
    for module in (kernels, reference):
        torch.manual_seed(0)
        z = x * 1
        z.register_hook(lambda g: calls.append(0))
        out = composed(module)[name](z, w)
        if mode == "batched":
            found.append(torch.autograd.grad(out, (x, w), torch.randn(3, *out.shape), is_grads_batched=True, allow_unused=True))
            continue
        first = torch.autograd.grad(out.square().sum(), (x, w), create_graph=True, allow_unused=True)
        penalty = torch.stack([g.square().sum() for g in first if g is not None]).sum()
        found.append((*first, *torch.autograd.grad(penalty, (x, w), allow_unused=True)))
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert len(calls) % 2 == 0  # hooks run as often


def test_options_may_be_tensors():
    x, half = torch.randn(4, 16), torch.tensor(0.5)
    torch.testing.assert_close(kernels.rms_norm(x, eps=half), reference.rms_norm(x, eps=0.5))  # pyright: ignore[reportArgumentType]
    found = kernels.cross_entropy(x, torch.zeros(4, dtype=torch.int64), z_loss=half)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, reference.cross_entropy(x, torch.zeros(4, dtype=torch.int64), z_loss=0.5))


def test_an_op_of_constants_inside_of_a_transform():
    x, w, v = torch.randn(4, 16), torch.randn(16), torch.randn(4, 16)
    found = torch.func.grad(lambda v: (kernels.rms_norm(x, w) * v).sum())(v)
    torch.testing.assert_close(found, reference.rms_norm(x, w))


def test_tensors_of_inference_mode_may_be_weights():
    with torch.inference_mode():
        w = torch.randn(16)
    x = randn(4, 16)
    kernels.rms_norm(x, w).sum().backward()


def test_only_outputs_that_depend_on_it_need_a_gradient():
    q, k, w = torch.randn(1, 4, 2, 12), torch.randn(1, 4, 1, 12), randn(12)
    assert not kernels.add_rms_norm(q, q, w)[1].requires_grad
    assert [t.requires_grad for t in kernels.rope(q.requires_grad_(), k, COS, SIN)] == [True, False]
    assert not kernels.rope(k, k, COS.clone().requires_grad_(), SIN)[0].requires_grad
    heads = kernels.qk_norm_rope(torch.randn(1, 4, 36), w, w, COS, SIN, n_head=1, n_kv_head=1)
    assert [t.requires_grad for t in heads] == [True, True, False]


def test_long_sums_keep_their_digits():
    logits = torch.zeros(1, 2**18)
    logits[0, 7] = 1.3
    index = torch.tensor([7])
    exact = reference.cross_entropy(logits.double(), index)
    assert abs(kernels.cross_entropy(logits, index) - exact) < 1e-6 * exact
    x = torch.full((1, 2**16), 1.1)
    assert (kernels.rms_norm(x, eps=0.0) - 1).abs().max() < 1e-6


def test_a_target_without_probability_has_an_infinite_loss():
    logits = torch.randn(2, 9)
    logits[:, 3] = -torch.inf
    for smoothing in (0.0, 0.1):
        assert kernels.cross_entropy(logits, torch.tensor([3, 3]), label_smoothing=smoothing) == torch.inf
