"""Text from a checkpoint: `LLM.load(folder).generate("从前，")`."""

from pathlib import Path

import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from .checkpoint import load_model
from .gpt import GPT


def sampling_probabilities(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities after temperature, then top-k, then nucleus filtering, as Hugging Face orders them: (B, V) from (B, V).

    top-p keeps the smallest set of tokens whose probability reaches `top_p` (arXiv 1904.09751)."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered, index = p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # a token stays if those above it do not reach top_p yet
        p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(before >= top_p, 0.0))
    return p / p.sum(-1, keepdim=True)


class LLM:
    """A model and its tokenizer, ready to write."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, folder: Path | str, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> "LLM":
        """From a checkpoint folder, on the GPU where there is one.

        Raises FileNotFoundError or ValueError where the folder is not a whole checkpoint."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.split(":")[0] not in ("cpu", "cuda") or (device.startswith("cuda") and not torch.cuda.is_available()):
            raise ValueError(f"device {device!r} is not here; choose cpu{', cuda' if torch.cuda.is_available() else ''}")
        model, tokenizer = load_model(folder).to(device=device, dtype=dtype), Tokenizer.load(folder)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, the model {model.config.vocab_size}; "
                "they do not belong together"
            )
        return cls(model.eval(), tokenizer)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 30,
        top_p: float = 0.9,
        seed: int | None = None,
    ) -> str:
        """What the model writes after the prompt, up to the end of the story, `max_new_tokens` or the end of its context.

        temperature 0 always takes the likeliest token; a fixed seed repeats on the same machine.
        Raises ValueError for a prompt longer than the context or a setting out of range."""
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 (always the likeliest token) or more, usually 0.7 to 1")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be in (0, 1]. 1 keeps all tokens; for the likeliest only, use temperature=0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1, or None to keep all tokens")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        device, context = self.model.embedding.device, self.model.config.context
        ids = self.tokenizer.encode(prompt, bos=True)
        if len(ids) >= context:
            raise ValueError(f"the prompt has {len(ids)} tokens and the model's context {context}; shorten it to {context - 1} or fewer")
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        capacity = min(context, len(ids) + max_new_tokens)
        cache = self.model.new_cache(1, capacity)
        new: list[int] = []
        step = ids
        while len(ids) + len(new) < capacity:
            logits = self.model(torch.tensor([step], device=device), cache=cache, last_only=True)[:, -1]  # (1, V)
            logits = logits[:, : self.tokenizer.vocab_size]  # a padded vocabulary has entries without a text
            if temperature == 0:
                token = logits.argmax(-1).item()
            else:
                p = sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                token = torch.multinomial(p.cpu(), 1, generator=generator).item()
            if token == self.tokenizer.eot_id:
                break
            new.append(token)
            step = [token]
        return self.tokenizer.decode(new)
