"""Shapes, masks, the KV cache and presets of the model."""

import pytest
import torch

from tritale.model import GPT, GPTConfig
from tritale.model.gpt import CachedTokens


def small(**changes) -> GPT:
    model = GPT(GPTConfig.preset("tiny", n_head=4, n_kv_head=2, head_dim=10, **changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.double()


def test_microstories_has_the_architecture_of_the_series():
    config = GPTConfig.preset("microstories-44m")
    with torch.device("meta"):
        n = sum(p.numel() for p in GPT(config).parameters())
    head_share = config.vocab_size * config.width / n
    assert round(n / 1e6, 1) == 43.9 and round(head_share, 2) == 0.76
    assert config.n_head * config.head_dim == 288 != config.width == 512 and config.context == 512 and config.tie_embeddings


@pytest.mark.parametrize("qk_norm", [False, True])
def test_packed_documents_give_the_same_logits_as_alone(qk_norm):
    model, tokens = small(qk_norm=qk_norm, context=32), torch.randint(512, (1, 40))  # longer than the context in total
    cu_seqlens = torch.tensor([0, 7, 8, 31, 40, 40], dtype=torch.int32)
    packed = model(tokens, cu_seqlens=cu_seqlens)
    for start, end in ((0, 7), (7, 8), (8, 31), (31, 40)):
        torch.testing.assert_close(packed[:, start:end], model(tokens[:, start:end]))
    assert not torch.allclose(packed[:, 8:31], model(tokens[:, :31])[:, 8:])


@pytest.mark.parametrize("shape", [{}, {"window": 6}, {"qk_norm": True, "tie_embeddings": False}])
def test_cached_steps_give_the_logits_of_one_pass(shape):
    """Three sequences of different lengths: first their beginnings in one pass, then one token of each per step."""
    model, tokens, lengths = small(**shape).requires_grad_(False), torch.randint(512, (3, 21)), (4, 9, 1)
    c = model.config
    cache = torch.full((c.n_layer, 2, 5, 30, c.n_kv_head, c.head_dim), torch.nan, dtype=torch.float64)
    rows = torch.cat([torch.full((n,), row) for row, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    where = CachedTokens(cache, positions, rows, cu_seqlens)
    last = torch.tensor(lengths).cumsum(0) - 1
    expected = model(tokens)
    beginnings = model(tokens[rows, positions][None], cache=where, last=last)[0]
    torch.testing.assert_close(beginnings, torch.stack([expected[row, n - 1] for row, n in enumerate(lengths)]))
    rows = torch.arange(3)
    for step in range(12):
        positions = torch.tensor(lengths) + step
        where = CachedTokens(cache, positions)
        logits = model(tokens[rows, positions][None], cache=where)[0]
        torch.testing.assert_close(logits, expected[rows, positions])


def test_loss_is_the_mean_of_the_logits_cross_entropy():
    model, tokens, targets = small(tie_embeddings=False), torch.randint(512, (2, 30)), torch.randint(512, (2, 30))
    targets[0, :9] = -100
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(expected, list(model.parameters())))


def test_residual_matrices_start_smaller_with_depth():
    stds = [GPT(GPTConfig.preset("quickstart", n_layer=n)).blocks[0].mlp_out.weight.std().item() for n in (1, 4)]
    assert stds[0] / stds[1] == pytest.approx(2, rel=0.02)


def test_attention_starts_as_a_copy_operation():
    """The product of a head's output and value matrices is symmetric and positive semidefinite, for any grouping of heads."""
    for shape in ({}, {"n_kv_head": 1}, {"n_head": 2, "n_kv_head": 1, "head_dim": 16}):
        model = GPT(GPTConfig.preset("quickstart", **shape))
        c, block = model.config, model.blocks[-1]
        q, k, v = block.qkv.weight.detach().split([n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)])
        k, v = (x.view(c.n_kv_head, c.head_dim, -1).repeat_interleave(c.n_head // c.n_kv_head, 0) for x in (k, v))
        for head, out in enumerate(block.attention_out.weight.detach().split(c.head_dim, 1)):
            written = out @ v[head]  # (width, width)
            torch.testing.assert_close(written, written.T)
            assert torch.linalg.eigvalsh(written).min() > -1e-6 and written.trace() > 0.1
            assert torch.equal(q[head * c.head_dim : (head + 1) * c.head_dim], k[head])


def test_flops_count_each_matrix_six_times():
    config = GPTConfig.preset("quickstart")
    n = sum(p.numel() for p in GPT(config).parameters() if p.ndim == 2)
    assert config.n_matrix == n
    assert config.flops_per_token(0) == 6 * n


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_head": 3, "n_kv_head": 2}, r"n_kv_head \(2\) must divide model.n_head \(3\); try one of \[1, 3\]"),
        ({"head_dim": 7}, "try 8"),
        ({"n_layer": 0}, "at least 1"),
        ({"window": 0}, "null"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig.preset("tiny", **changes)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="tiny, quickstart, microstories-44m"):
        GPTConfig.preset("44m")


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="context of 64"):
        small()(torch.zeros(1, 65, dtype=torch.long))
