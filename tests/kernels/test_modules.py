"""The nn.Module forms: each is its op, under torch.compile too."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tritale.kernels import LinearCrossEntropy, RMSNorm, RotaryEmbedding, SwiGLU, reference


@pytest.fixture(params=["torch", "triton"])
def where(request) -> str:
    """The device of the PyTorch path, or of the kernels."""
    return "cpu" if request.param == "torch" else request.getfixturevalue("device")


def randn(*shape, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64).to(device).requires_grad_()


def shaken(module, device="cpu"):
    """The module in float64 with random weights, which would show a weight that is not used."""
    for p in module.parameters():
        nn.init.normal_(p)
    return module.double().to(device)


def test_rms_norm_is_its_op(where):
    x, residual = randn(3, 4, 10, device=where), randn(3, 4, 10, device=where)
    norm = shaken(RMSNorm(10, eps=1e-3, offset=0.5), where)
    torch.testing.assert_close(norm(x), reference.rms_norm(x, norm.weight, 1e-3, offset=0.5))
    torch.testing.assert_close(norm(x, residual), reference.add_rms_norm(x, residual, norm.weight, 1e-3, offset=0.5))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_fresh_norm_scales_by_one(offset):
    x = randn(2, 10)
    torch.testing.assert_close(RMSNorm(10, offset=offset).double()(x), reference.rms_norm(x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_is_its_op(where, interleaved):
    rotate = RotaryEmbedding(20, 9, theta=100.0, interleaved=interleaved, rotary_dim=12).to(where)
    q, k = randn(1, 7, 4, 20, device=where), randn(1, 7, 2, 20, device=where)
    angle = torch.arange(9.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    cos, sin = angle.cos().float().to(where), angle.sin().float().to(where)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=where)
    positions = torch.tensor([8, 0, 2, 1, 4, 4, 3], device=where)
    calls: tuple[dict[str, Any], ...] = ({}, {"positions": positions}, {"cu_seqlens": cu_seqlens})
    for more in calls:
        expected = reference.rope(q, k, cos, sin, interleaved=interleaved, **more)
        torch.testing.assert_close(rotate(q, k, **more), expected)
    assert not rotate.state_dict()


def test_swiglu_is_three_products_and_the_gate(where):
    x, mlp = randn(2, 3, 8, device=where), shaken(SwiGLU(8, 5), where)
    gate, up = mlp.gate_up.weight.chunk(2)
    torch.testing.assert_close(mlp(x), (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)
    assert {n: tuple(p.shape) for n, p in mlp.named_parameters()} == {"gate_up.weight": (10, 8), "down.weight": (8, 5)}


def test_linear_cross_entropy_takes_its_options_and_ties(where):
    embedding, loss = nn.Embedding(11, 6).double().to(where), LinearCrossEntropy(11, 6, z_loss=0.1, label_smoothing=0.2).double().to(where)
    loss.weight = embedding.weight
    assert len({id(p) for m in (embedding, loss) for p in m.parameters()}) == 1
    x, targets = randn(2, 4, 6, device=where), torch.randint(11, (2, 4), device=where)
    options = {"z_loss": 0.1, "label_smoothing": 0.2}
    torch.testing.assert_close(loss(x, targets), reference.linear_cross_entropy(x, embedding.weight, targets, **options))
    per_token = loss(x, targets, reduction="none", z_loss=0.0)
    expected = reference.linear_cross_entropy(x, embedding.weight, targets, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(per_token, expected)


def test_compiled_whole_equals_eager(where, request):
    """With Inductor through the kernels: one C++ compile for most ops; their own tests stop before it, at the traced graph."""
    norm, rotate, mlp = RMSNorm(16), RotaryEmbedding(8, 10), SwiGLU(16, 12)
    model = shaken(nn.ModuleDict({"norm": norm, "rotate": rotate, "mlp": mlp, "loss": LinearCrossEntropy(9, 16)}), where)
    x, targets = randn(2, 5, 16, device=where), torch.randint(9, (2, 5), device=where)

    def step(x):
        h = model["norm"](x)
        q, k = model["rotate"](h.unflatten(-1, (2, 8)), h.unflatten(-1, (2, 8)))
        h, x = model["norm"](q.flatten(-2) * k.flatten(-2), x)
        return model["loss"](x + model["mlp"](h), targets)

    results = []
    compiler = "inductor" if "triton" in request.node.name else "aot_eager"
    for run in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        loss = run(x)
        results.append((loss, *torch.autograd.grad(loss, [x, *model.parameters()])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: RotaryEmbedding(16, 8, rotary_dim=5), ValueError, "even"),
        (lambda: RotaryEmbedding(16, 8, rotary_dim=18), ValueError, r"at most head_dim \(16\)"),
        (lambda: LinearCrossEntropy(4, 4, smoothing=0.1), TypeError, "smoothing; choose from .*label_smoothing"),
    ],
)
def test_wrong_settings_say_what_is_allowed(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_rotary_tables_are_right_in_fp32_after_meta_and_casts():
    right = RotaryEmbedding(16, 64, theta=500.0)
    with torch.device("meta"):
        made = RotaryEmbedding(16, 64, theta=500.0)
    for rotate in (
        made.to_empty(device="cpu"),
        copy.deepcopy(right).bfloat16(),
        copy.deepcopy(right).half().float(),
        copy.deepcopy(right).double(),
    ):
        assert torch.equal(rotate.cos, right.cos) and torch.equal(rotate.sin, right.sin)
    emptied = copy.deepcopy(right).to_empty(device="cpu")
    emptied.reset_parameters()
    assert torch.equal(emptied.cos, right.cos)
