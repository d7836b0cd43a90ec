"""Sampling: the same tokens as the definition, for every setting; memory."""

import pytest
import torch

from tests.kernels.harness import check_memory
from tritale.kernels import launch, reference, sample

OFF = {"temperature": 1.0, "top_k": torch.inf, "top_p": 1.0, "min_p": 0.0, "penalty": 1.0}
SETTINGS = [
    {}, {"temperature": 0.0, "penalty": 1.2}, {"temperature": 0.6}, {"temperature": 1e-40}, {"top_p": 0.0}, {"top_k": 1}, {"top_k": 12},
    {"top_p": 0.7}, {"top_p": 0.99}, {"min_p": 0.08}, {"min_p": 1.0}, {"penalty": 1.7}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.85, "min_p": 0.02, "penalty": 0.8},
]  # fmt: skip


def draw(device, n_token, spread, dtype=torch.float32):
    """A row for each of SETTINGS: logits, random numbers, settings, the tokens that were seen."""
    n = len(SETTINGS)
    settings = torch.tensor([[*(OFF | given).values()] for given in SETTINGS])
    random = (torch.rand(n, dtype=torch.float64) * 2.0**63).long()
    given = (torch.randn(n, n_token) * spread).to(dtype), random, settings, torch.rand(n, n_token) < 0.1
    return [t.to(device) for t in given]


@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0], ids=["flat", "usual", "steep"])
@pytest.mark.parametrize("n_token", [2, 33, 700])
def test_tokens_are_those_of_the_definition(device, n_token, spread):
    """Blocks of 128, so that a row has several, and of the usual size. bf16 logits have ties."""
    for dtype in (torch.float32, torch.bfloat16):
        given = draw(device, n_token, spread, dtype)
        expected = reference.sample(*given)
        assert torch.equal(sample(*given), expected) and ((0 <= expected) & (expected < n_token)).all()
        with launch.launch_override("sample", BLOCK=128), launch.launch_override("sample_keys", BLOCK=128):
            assert torch.equal(sample(*given), expected)


def test_tokens_of_equal_logits_share_the_draw(device):
    """With one threshold for all, the first or the last of them would always be drawn."""
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, -0.0], device=device).repeat(60, 1)
    random = torch.arange(60, device=device) * (2**63 // 60)
    settings = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0], device=device).repeat(60, 1)
    counts = torch.bincount(sample(logits, random, settings, torch.zeros_like(logits, dtype=torch.bool)), minlength=6)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0] and all(19 <= n <= 21 for n in counts[[1, 2, 4]].tolist())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite_gives_minus_one(device, value):
    logits, *rest = draw(device, 300, 2.0)
    logits[1::2, 299] = value
    for backend in (sample, reference.sample):
        token = backend(logits, *rest)
        assert (token[1::2] == -1).all() and (token[::2] >= 0).all()


def test_memory(device):
    logits, *rest = draw(device, 140, 2.0, torch.float16)
    wide = torch.cat((logits, logits), dim=1)[:, :140]  # the vocabulary is wider than the tokenizer's
    with launch.launch_override("sample", BLOCK=64), launch.launch_override("sample_keys", BLOCK=64):
        check_memory(sample, [wide, *rest])


def test_wrong_arguments_say_what_is_allowed():
    with pytest.raises(ValueError, match=r"settings \(1, 4\).*\(B, 5\) float32"):
        sample(torch.zeros(1, 9), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4), torch.zeros(1, 9, dtype=torch.bool))
