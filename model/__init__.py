"""The GPT, its checkpoint on disk (a Hugging Face model), and exports of it to other formats."""

from .checkpoint import load_model
from .gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig", "load_model"]
