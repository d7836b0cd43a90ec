"""Generating text with a trained model."""

from .decoder import Decoder
from .llm import LLM, Completion, Writer
from .sampling import Sampling

__all__ = ["LLM", "Completion", "Decoder", "Sampling", "Writer"]
