"""The kernels without the rest of the project: python examples/kernels_alone.py

On a GPU the ops run as Triton kernels, on a CPU as plain PyTorch.
"""

import torch

from tritale.kernels import linear_cross_entropy, rms_norm, swiglu

device = "cuda" if torch.cuda.is_available() else "cpu"
tokens, width, hidden, vocab = 64, 32, 96, 500
x = torch.randn(tokens, width, device=device)
norm = torch.ones(width, device=device, requires_grad=True)
gate, up, down, head = (
    torch.randn(rows, columns, device=device).div(columns**0.5).requires_grad_()
    for rows, columns in ((hidden, width), (hidden, width), (width, hidden), (vocab, width))
)
y = rms_norm(x, norm)  # (tokens, width)
y = x + swiglu(y @ gate.T, y @ up.T) @ down.T
loss = linear_cross_entropy(y, head, torch.randint(vocab, (tokens,), device=device))  # without the (tokens, vocab) logits
gradients = torch.autograd.grad(loss, (norm, gate, up, down, head))
print(f"loss {loss.item():.3f}, gradient norms {' '.join(f'{g.norm().item():.3f}' for g in gradients)}")
