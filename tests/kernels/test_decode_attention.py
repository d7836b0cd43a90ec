"""Attention to the KV cache: numbers against float64, memory, and what the step writes into the cache."""

import pytest
import torch

from tests.kernels.harness import check_memory, check_numbers
from tritale.kernels import decode_attention, reference

# (sequences, heads, heads of keys, head_dim, entries of a row, window): one program's keys are divided if there are few sequences.
SHAPES = [
    (1, 1, 1, 16, 1, None), (1, 1, 1, 48, 600, None), (1, 8, 2, 20, 300, None), (2, 3, 3, 14, 37, 1), (3, 6, 2, 64, 70, 33),
    (1, 2, 1, 32, 513, 300), (4, 12, 1, 80, 90, None), (5, 4, 4, 128, 130, 2**40),
]  # fmt: skip


def draw(device, dtype, n, n_head, n_kv_head, head_dim, size, window=None):
    """q, k, v, a cache whose entries from each position on are NaN, and positions: the first is the last entry, the last is 0."""
    make = lambda *shape: torch.randn(shape).to(device, dtype)
    positions = torch.randint(size, (n,))
    positions[-1], positions[0] = 0, size - 1
    cache = make(2, n + 1, size, n_kv_head, head_dim)
    for row, position in enumerate([*positions.tolist(), 0]):
        cache[:, row, position:] = torch.nan
    return make(n, n_head, head_dim), make(n, n_kv_head, head_dim), make(n, n_kv_head, head_dim), *cache, positions.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_at_most_twice_those_of_the_definition(device, dtype, shape):
    inputs, window = draw(device, dtype, *shape), shape[-1]
    check_numbers(decode_attention, reference.decode_attention, inputs, backward=False, window=window)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_new_tokens_keys_and_values_are_in_the_cache_and_nothing_else_changes(device, shape):
    q, k, v, keys, values, positions = draw(device, torch.float32, *shape)
    before = keys.clone(), values.clone()
    decode_attention(q, k, v, keys, values, positions, window=shape[-1])
    for cache, given, old in ((keys, k, before[0]), (values, v, before[1])):
        rows = torch.arange(len(q), device=device)
        assert torch.equal(cache[rows, positions], given)
        cache[rows, positions] = old[rows, positions]
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory(device, shape):
    q, k, v, keys, values, positions = draw(device, torch.float16, *shape)
    apart = torch.cat((v, v, v), dim=1)[:, : v.shape[1]]  # heads of the packed projection
    check_memory(decode_attention, [q, k, apart, keys, values, positions], window=shape[-1])


def test_a_step_at_each_position_is_causal_attention(device):
    """The last query of a sequence sees the whole; a window of 5 its end."""
    q, k, v = (torch.randn(2, 40, h, 16, device=device, dtype=torch.float64) for h in (4, 2, 2))
    for window in (None, 5):
        keys, values = (torch.full((2, 40, 2, 16), torch.nan, device=device, dtype=torch.float64) for _ in range(2))
        expected = reference.flash_attention(q, k, v, window=window)
        for i in range(40):
            out = decode_attention(q[:, i], k[:, i], v[:, i], keys, values, torch.full((2,), i, device=device), window=window)
            torch.testing.assert_close(out, expected[:, i], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": (2, 3, 16)}, "multiple"), ({"k": (2, 2, 8)}, "expected"), ({"keys": (1, 9, 2, 16)}, "at least B rows"),
        ({"positions": (3,)}, "expected"), ({"window": 0}, "window is 0"), ({"values": (2, 9, 2, 16, 2)}, "contiguous"),
    ],
)  # fmt: skip
def test_wrong_arguments_say_what_is_allowed(change, message):
    shapes = {"q": (2, 4, 16), "k": (2, 2, 16), "v": (2, 2, 16), "keys": (2, 9, 2, 16), "values": (2, 9, 2, 16), "positions": (2,)}
    given = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    if "values" in change:
        given["values"] = given["values"][..., 0]
    with pytest.raises(ValueError, match=message):
        decode_attention(**given, window=change.get("window"))
    with pytest.raises(ValueError, match="one dtype"):
        q, *others = (torch.zeros(shape) for shape in shapes.values())
        decode_attention(q.half(), *others)
