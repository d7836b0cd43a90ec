"""Generating text with a trained model."""

from ..common.sampling import Sampling
from .decoder import Decoder
from .detokenizer import Completion, Detokenizer
from .llm import LLM
from .scheduler import Scheduler
from .sequence import Sequence

__all__ = ["LLM", "Completion", "Decoder", "Detokenizer", "Sampling", "Scheduler", "Sequence"]
