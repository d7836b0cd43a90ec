"""Checkpoints with random weights and prompts of random characters, for measuring generation."""

from pathlib import Path

import torch

from tritale.data.tokenizer import FIXED_TOKENS, Tokenizer, make_backend
from tritale.model import GPT, GPTConfig
from tritale.model.checkpoint import save_model


def save_random_model(folder: Path, config: GPTConfig) -> None:
    """Save a model that never ends a text under greedy decoding, with a tokenizer that has a token for each character of a prompt."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        model.embedding[0] = 0  # the logit of <|endoftext|> is 0 and never the largest
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, eos_token_id=0, pad_token_id=3)
    characters = [*(chr(0x4E00 + i) for i in range(20_000)), *(f"entry {i}" for i in range(config.vocab_size))]
    Tokenizer(make_backend(characters[: config.vocab_size - len(FIXED_TOKENS)], merges=[])).save(folder)


def random_prompts(lengths: list[int]) -> list[str]:
    """A prompt of each length in characters."""
    generator = torch.Generator().manual_seed(1)
    return ["".join(chr(0x4E00 + c) for c in torch.randint(1500, (n,), generator=generator).tolist()) for n in lengths]
