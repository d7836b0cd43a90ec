"""The kernels inside a Hugging Face model: python examples/patch_hugging_face.py

The model is a small Llama with random weights, so nothing is downloaded. A Llama, Mistral or Qwen3 from `from_pretrained` works the same.
Requires transformers: pip install -e '.[hf]'
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tritale.kernels import patch_transformers, unpatch

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    model = LlamaForCausalLM(config)
tokens = torch.randint(config.vocab_size, (2, 48), device=model.device)

plain = model(input_ids=tokens, labels=tokens).loss
patch_transformers(model)  # from here on the model runs tritale's ops; training code stays the same
patched = model(input_ids=tokens, labels=tokens).loss
patched.backward()
unpatch(model)
print(f"loss of transformers {plain.item():.4f}, with the kernels {patched.item():.4f}")
torch.testing.assert_close(patched, plain, rtol=1e-4, atol=1e-4)
