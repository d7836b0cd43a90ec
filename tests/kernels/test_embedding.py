import pytest
import torch
import torch.nn.functional as F

from tritale.kernels import embedding


def test_values_and_gradient_are_those_of_pytorch():
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (3, 5))
    assert torch.equal(embedding(ids, weight), F.embedding(ids, weight))
    assert torch.autograd.gradcheck(lambda w: embedding(ids, w), (weight,))
    torch.library.opcheck(torch.ops.tritale.embedding_backward, (torch.randn(3, 5, 6), ids, 11))


@pytest.fixture
def two_threads():
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)


def test_the_compiled_gradient_is_the_same_in_every_run(two_threads):
    """Many threads add to the same few rows: with atomic additions the order, and so the rounding, changes."""
    weight, dy = torch.randn(4, 64, requires_grad=True), torch.randn(2, 8192, 64)
    ids = torch.randint(4, (2, 8192))
    compiled = torch.compile(lambda ids, weight: embedding(ids, weight) * 1.5, fullgraph=True)
    gradients = [torch.autograd.grad(compiled(ids, weight), weight, dy)[0] for _ in range(10)]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients[1:])
