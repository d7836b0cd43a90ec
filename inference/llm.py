"""Text from a checkpoint: `LLM.load(folder).generate("从前，")`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..common.errors import UserError
from ..common.run_folder import find_checkpoint
from ..common.sampling import Sampling, SamplingSettings
from ..data.chat import Messages, problem, prompt_ids
from ..data.foreign_tokenizer import ForeignTokenizer
from ..data.tokenizer import Tokenizer
from ..kernels.dispatch import launcher_missing
from ..model.checkpoint import EMA, WEIGHTS, check_files, load_model, read_json
from ..model.gpt import GPT
from . import native, sequence
from .decoder import Decoder
from .detokenizer import Completion
from .scheduler import Scheduler

MAX_SLOTS = 64  # sequences in one batch: beyond it the products no longer get cheaper per sequence, and the cache grows


class LLM:
    """A model and its tokenizer.

    On a CPU `native.c` runs the forward passes (fp32 or bf16 weights, fp32 arithmetic): a sequence is the same, bit for bit, alone and in
    any batch. PyTorch runs them on a GPU, and on a CPU without a C compiler; there a batch may round differently. Nothing is compiled per
    shape: `torch.compile` of a step takes half a minute, as long as a hundred stories."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, model: Path | str, *, device: str | None = None, dtype: torch.dtype = torch.float32, ema: bool = False) -> "LLM":
        """Load a checkpoint folder, or the newest checkpoint of a run, by default onto the GPU if there is one. `dtype` of the weights:
        float32, bfloat16 or float16. `ema`: the running mean of the weights, of a run with `train.ema`.

        Raises FileNotFoundError or UserError if the folder is not a complete checkpoint or is being written, or if the device or dtype is
        not available."""
        folder = find_checkpoint(Path(model))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.split(":")[0] not in ("cpu", "cuda") or (device.startswith("cuda") and not torch.cuda.is_available()):
            raise UserError(f"device {device!r} is not available; choose cpu{', cuda' if torch.cuda.is_available() else ''}")
        if device.startswith("cuda") and (reason := launcher_missing()):
            raise UserError(reason)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"dtype is {dtype}; choose torch.float32, torch.bfloat16 or torch.float16")
        gpt = load_model(folder, device=device, dtype=dtype, name=EMA if ema else WEIGHTS)
        check_files(folder, ["tokenizer.json"])
        is_imported = "tritale_import" in read_json(folder, "config.json")
        tokenizer = ForeignTokenizer.load(folder) if is_imported else Tokenizer.load(folder)
        if tokenizer.vocab_size > gpt.config.vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, the model {gpt.config.vocab_size}; "
                "they do not belong together"
            )
        return cls(gpt.eval(), tokenizer)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """The ids of a prompt or conversation after `<|endoftext|>`, as in a training document.

        Raises UserError if they fill the context, or for a conversation that is not valid or a model that was not trained on any."""
        context = self.model.config.context
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, bos=True)
        elif not self.tokenizer.is_chat:
            raise UserError("the model was not trained on instructions; train it with tritale train and init_from, or give a prompt")
        elif what := problem(prompt):
            raise UserError(what)
        else:
            ids = prompt_ids(self.tokenizer, prompt)
        if len(ids) >= context:
            raise UserError(f"the prompt has {len(ids)} tokens and the model's context {context}; shorten it to {context - 1} or fewer")
        return ids

    def decoder(self, *, slots: int, capacity: int | None = None, limits_prefill: bool = False) -> Decoder:
        """A `Decoder` of this model."""
        return Decoder(self.model, slots=slots, capacity=capacity, n_token=self.tokenizer.vocab_size, limits_prefill=limits_prefill)

    def write(self, prompts: Sequence[str | Messages], samplings: Sequence[Sampling]) -> Iterator[tuple[int, str, Completion | None]]:
        """Run all prompts in one batch and yield (index of the prompt, new text, completion); the completion comes with the last piece.
        Each prompt has its own `Sampling`.

        Raises UserError if the list of prompts is empty or a prompt fills the context."""
        if not prompts:
            raise UserError("there are no prompts; give at least one ('' generates without a prompt)")
        return self.write_ids([self.encode_prompt(prompt) for prompt in prompts], samplings)

    def write_ids(self, prompts: list[list[int]], samplings: Sequence[Sampling]) -> Iterator[tuple[int, str, Completion | None]]:
        """`write` for prompts of token ids, each shorter than the context."""
        longest = max(len(ids) + s.max_new_tokens for ids, s in zip(prompts, samplings, strict=True))
        decoder = self.decoder(slots=min(len(prompts), MAX_SLOTS), capacity=min(self.model.config.context, longest))
        scheduler = Scheduler(decoder, self.tokenizer)
        for i, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            scheduler.add(sequence.Sequence(ids, sampling, index=i))
        while scheduler.is_busy:
            for done, text, completion in scheduler.step():
                if text or completion:
                    yield done.index, text, completion

    def complete(
        self, prompts: Sequence[str | Messages], *, seed: int | Sequence[int] | None = None, **settings: Unpack[SamplingSettings]
    ) -> list[Completion]:
        """A `Completion` of each prompt or conversation, generated in one batch. `settings` are those of `Sampling`.

        Prompt i uses `seed` + i, or the i-th of a list of seeds, so its completion is the same alone with that seed."""
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(len(prompts))]
        elif len(seed) != len(prompts):
            raise UserError(f"there are {len(seed)} seeds for {len(prompts)} prompts; give one for each, or a single number")
        else:
            seeds = seed
        sampling = Sampling(**settings)
        found = {i: done for i, _, done in self.write(prompts, [replace(sampling, seed=s) for s in seeds]) if done}
        return [found[i] for i in range(len(prompts))]

    @overload
    def generate(self, prompt: str = "", *, seed: int | None = None, **settings: Unpack[SamplingSettings]) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, seed: int | Sequence[int] | None = None, **settings: Unpack[SamplingSettings]
    ) -> list[str]: ...
    def generate(self, prompt: str | Sequence[str] = "", *, seed=None, **settings):
        """The continuation of the prompt up to `<|endoftext|>`, a `stop` string (not part of the result), `max_new_tokens` or the end of
        the context. A list of prompts runs in one batch and gives a list.

        `settings` and their defaults are those of `Sampling`: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop.
        A fixed seed repeats on the same machine; prompt i of a list uses `seed` + i, or the i-th of a list of seeds.
        Raises UserError if a prompt fills the context, the list of prompts is empty, or a setting is out of range."""
        if isinstance(prompt, str):
            return self.complete([prompt], seed=seed, **settings)[0].text
        return [completion.text for completion in self.complete(prompt, seed=seed, **settings)]

    def stream(self, prompt: str = "", *, seed: int | None = None, **settings: Unpack[SamplingSettings]) -> Iterator[str]:
        """The result of `generate` in pieces, as they are generated. A piece has whole characters and is never empty."""
        pieces = self.write([prompt], [Sampling(**settings, seed=seed)])
        return (piece for _, piece, _ in pieces if piece)

    def chat(self, messages: Messages, *, seed: int | None = None, **settings: Unpack[SamplingSettings]) -> str:
        """The assistant's answer to a conversation, such as [{"role": "user", "content": "写一个故事。"}]. `settings` as in `generate`.

        Raises UserError if the model was not trained on conversations, or as `generate` does."""
        return self.complete([messages], seed=seed, **settings)[0].text

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log-likelihood of the text's tokens, after `<|endoftext|>`.

        A text longer than the context is read in windows half a context apart: each token but the first ones is predicted from at least
        half a context. Raises UserError if the text is empty."""
        nll, n_token = self._nll(text)
        return math.exp(nll / n_token)

    def bits_per_char(self, text: str) -> float:
        """Bits per character (Unicode code point) of the text. Unlike perplexity it is comparable across tokenizers.

        The end of the text is not counted; the trainer's validation on complete stories counts it. Windows and errors are those of
        `perplexity`."""
        return self._nll(text)[0] / math.log(2) / len(text)

    @torch.inference_mode()
    def _nll(self, text: str) -> tuple[float, int]:
        """(sum over the text's tokens in nats, their number)"""
        if not text:
            raise UserError("the text is empty; there is nothing to measure")
        ids = torch.tensor(self.tokenizer.encode(text, bos=True))
        context, n = self.model.config.context, len(ids) - 1
        total, done = 0.0, 0  # tokens 1 … done are counted
        while done < n:
            start = max(0, min(done - context // 2, n - context)) if done else 0
            end = min(start + context, n)
            total += self._window_nll(ids[start:end], ids[start + 1 : end + 1], done - start)
            done = end
        return total, n

    def _window_nll(self, tokens: Tensor, targets: Tensor, skip: int) -> float:
        """Sum in nats over the targets (n,) from index `skip` on; target i follows tokens[: i + 1]."""
        model, device = self.model, self.model.embedding.device
        if not native.can_run(model):
            targets = targets.masked_fill(torch.arange(len(targets)) < skip, -100)
            return model(tokens[None].to(device), targets[None].to(device), reduction="sum").item()
        forward, c = native.NativeForward(model), model.config
        cache = torch.empty(c.n_layer, 2, 1, len(tokens), c.n_kv_head, c.head_dim)
        total = 0.0
        for piece in torch.arange(len(tokens)).split(64):  # all logits of a window may take hundreds of megabytes
            logits = forward(tokens[piece], torch.zeros_like(piece), piece, cache, torch.arange(len(piece)))
            nll = F.cross_entropy(logits, targets[piece], reduction="none")
            total += nll[piece >= skip].sum(dtype=torch.float64).item()
        return total
