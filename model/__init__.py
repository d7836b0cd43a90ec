"""The GPT, its checkpoint on disk (a Hugging Face model), and generation."""

from .checkpoint import load_model
from .decode import Decoder
from .generate import LLM, Completion, Writer
from .gpt import GPT, GPTConfig
from .sampling import Sampling

__all__ = ["GPT", "LLM", "Completion", "Decoder", "GPTConfig", "Sampling", "Writer", "load_model"]
