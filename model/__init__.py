"""The GPT, its checkpoint on disk (a Hugging Face model), and generation."""

from .checkpoint import load_model
from .generate import LLM
from .gpt import GPT, GPTConfig

__all__ = ["GPT", "LLM", "GPTConfig", "load_model"]
