"""Text from a checkpoint: `LLM.load(folder).generate("从前，")`."""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import UserError
from ..data.tokenizer import Tokenizer
from ..model.checkpoint import load_model
from ..model.gpt import GPT
from ..model.run_folder import check_is_final, step_folders
from . import native
from .decoder import Decoder
from .sampling import Sampling

MAX_SLOTS = 64  # texts written at a time: beyond it the products no longer get cheaper per text, and the cache grows


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt."""

    text: str
    tokens: list[int]  # `<|endoftext|>` not among them
    finish_reason: str  # "end": the model ended its text; "stop": a stop string; "length": max_new_tokens, or the context is full


class Writer:
    """The text of one prompt's tokens as they come: only whole characters, and nothing that may yet become a stop string.

    Bytes that never become a character are dropped."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, n_prompt: int, capacity: int):
        self._tokenizer, self._stop = tokenizer, sampling.stop
        self._room = min(sampling.max_new_tokens, capacity - n_prompt)
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._held = ""  # may be the beginning of a stop string
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain after one more token, often empty. Sets `finish_reason` where it was the last."""
        if token == self._tokenizer.eot_id:
            self.finish_reason = "end"
        else:
            self._tokens.append(token)
            self._held += self._bytes.decode(self._tokenizer.token_bytes(token))
            found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
            if found:
                self.finish_reason, self._held = "stop", self._held[: min(found)]
            elif len(self._tokens) >= self._room:
                self.finish_reason = "length"
        n_held = 0
        if self.finish_reason is None:
            n_held = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        piece, self._held = self._held[: len(self._held) - n_held], self._held[len(self._held) - n_held :]
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        return Completion("".join(self._pieces), self._tokens, self.finish_reason or "length")


class LLM:
    """A model and its tokenizer, ready to write.

    On a CPU the passes run in `native.c` (fp32 or bf16 weights, fp32 arithmetic): a text is the same, bit for bit, alone and in any batch.
    Where no C compiler is found, and on a GPU, PyTorch runs them; there a batch may round differently. Nothing is traced or compiled for
    a shape, so a short text does not wait for it: `torch.compile` of a step takes half a minute, as long as a hundred stories."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(cls, folder: Path | str, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> "LLM":
        """From a checkpoint folder, on the GPU where there is one. `dtype` is that of the weights: float32, bfloat16 or float16.

        Raises FileNotFoundError or ValueError where the folder is not a whole checkpoint, is being written at that moment, or where device
        or dtype cannot be had."""
        folder = Path(folder)
        check_is_final(folder)
        steps = step_folders(folder)
        if steps and not (folder / "config.json").exists():
            raise UserError(f"{folder} is a run, not a checkpoint; give one of its steps, such as {steps[max(steps)]}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.split(":")[0] not in ("cpu", "cuda") or (device.startswith("cuda") and not torch.cuda.is_available()):
            raise UserError(f"device {device!r} is not here; choose cpu{', cuda' if torch.cuda.is_available() else ''}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"dtype is {dtype}; choose torch.float32, torch.bfloat16 or torch.float16")
        model, tokenizer = load_model(folder, device=device, dtype=dtype), Tokenizer.load(folder)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} entries, the model {model.config.vocab_size}; "
                "they do not belong together"
            )
        return cls(model.eval(), tokenizer)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The prompt's ids, `<|endoftext|>` in front, as every document begins. Raises ValueError where they fill the context."""
        ids, context = self.tokenizer.encode(prompt, bos=True), self.model.config.context
        if len(ids) >= context:
            raise UserError(f"the prompt has {len(ids)} tokens and the model's context {context}; shorten it to {context - 1} or fewer")
        return ids

    def decoder(self, *, slots: int, capacity: int | None = None) -> Decoder:
        """A `Decoder` of this model, for texts that join and leave."""
        return Decoder(self.model, slots=slots, capacity=capacity, n_token=self.tokenizer.vocab_size)

    def write(self, prompts: Sequence[str], samplings: Sequence[Sampling]) -> Iterator[tuple[int, str, Completion | None]]:
        """All prompts side by side: (index of the prompt, new text, the whole completion with the last piece). `max_new_tokens` and the
        seed of each `Sampling` are its prompt's own.

        Raises ValueError for an empty list of prompts or a prompt that fills the context."""
        if not prompts:
            raise UserError("there are no prompts; give at least one ('' lets the model begin)")
        ids = [self.encode_prompt(prompt) for prompt in prompts]
        return self._write(ids, samplings)

    def _write(self, prompts: list[list[int]], samplings: Sequence[Sampling]) -> Iterator[tuple[int, str, Completion | None]]:
        longest = max(len(ids) + s.max_new_tokens for ids, s in zip(prompts, samplings, strict=True))
        capacity = min(self.model.config.context, longest)
        decoder = self.decoder(slots=min(len(prompts), MAX_SLOTS), capacity=capacity)
        waiting, running = list(range(len(prompts)))[::-1], {}
        while waiting or running:
            while waiting and decoder.free:
                i = waiting.pop()
                running[decoder.add(prompts[i], samplings[i])] = i, Writer(self.tokenizer, samplings[i], len(prompts[i]), capacity)
            for handle, token in decoder.step().items():
                i, writer = running[handle]
                piece = writer.push(token)
                if writer.finish_reason:
                    decoder.remove(handle)
                    del running[handle]
                    yield i, piece, writer.completion()
                elif piece:
                    yield i, piece, None

    def complete(self, prompts: Sequence[str], *, seed: int | Sequence[int] | None = None, **settings) -> list[Completion]:
        """A `Completion` of each prompt, written side by side, with the settings of `Sampling`.

        Prompt i draws with `seed` + i, or with seeds[i] of a list: so the i-th of a batch is what it is alone with that seed."""
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(len(prompts))]
        elif len(seed) != len(prompts):
            raise UserError(f"there are {len(seed)} seeds for {len(prompts)} prompts; give one for each, or a single number")
        else:
            seeds = seed
        sampling = Sampling(**settings)
        done: list[Completion | None] = [None] * len(prompts)
        for i, _, completion in self.write(prompts, [replace(sampling, seed=s) for s in seeds]):
            done[i] = completion
        return done

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = 30,
        top_p: float = 0.9,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
    ) -> str | list[str]:
        """What the model writes after the prompt, up to the end of its text, a `stop` string (which is not part of the result),
        `max_new_tokens` or the end of its context. A list of prompts gives a list of texts, written side by side.

        temperature 0 always takes the likeliest token. The other settings mean what they mean in `transformers` (see `Sampling`). A fixed
        seed repeats on the same machine; prompt i of a list draws with `seed` + i, or with the i-th of a list of seeds.
        Raises ValueError for a prompt longer than the context, an empty list of prompts, or a setting out of range."""
        settings = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "stop": stop,
        }  # fmt: skip
        if isinstance(prompt, str):
            return self.complete([prompt], seed=seed, **settings)[0].text
        return [completion.text for completion in self.complete(prompt, seed=seed, **settings)]

    def stream(self, prompt: str = "", **settings) -> Iterator[str]:
        """What `generate` gives with the same settings, in pieces as they are written: whole characters, never an empty piece."""
        pieces = self.write([prompt], [Sampling(**settings)])
        return (piece for _, piece, _ in pieces if piece)

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log-likelihood of the text's tokens, after `<|endoftext|>`.

        A text longer than the context is read in windows half a context apart, so each token but the first ones is judged by at least
        half a context before it. Raises ValueError for an empty text."""
        nll, n_token = self._nll(text)
        return math.exp(nll / n_token)

    def bits_per_char(self, text: str) -> float:
        """The bits that the model needs for the text, a character (Unicode code point): comparable across tokenizers, unlike perplexity.

        The end of the text is not counted; the trainer's validation figure, on whole stories, counts it. Windows and errors are those of
        `perplexity`."""
        return self._nll(text)[0] / math.log(2) / len(text)

    @torch.inference_mode()
    def _nll(self, text: str) -> tuple[float, int]:
        """(sum over the text's tokens in nats, their number)"""
        if not text:
            raise UserError("the text is empty; there is nothing to measure")
        ids = torch.tensor(self.tokenizer.encode(text, bos=True))
        context, n = self.model.config.context, len(ids) - 1
        total, done = 0.0, 0  # tokens 1 … done are judged
        while done < n:
            start = max(0, min(done - context // 2, n - context)) if done else 0
            end = min(start + context, n)
            total += self._window_nll(ids[start:end], ids[start + 1 : end + 1], done - start)
            done = end
        return total, n

    def _window_nll(self, tokens: Tensor, targets: Tensor, skip: int) -> float:
        """Sum in nats over the targets (n,) from `skip` on, each after the tokens (n,) up to its place."""
        model, device = self.model, self.model.embedding.device
        if not native.can_run(model):
            targets = targets.masked_fill(torch.arange(len(targets)) < skip, -100)
            return model(tokens[None].to(device), targets[None].to(device), reduction="sum").item()
        forward, c = native.NativeForward(model), model.config
        cache = torch.empty(c.n_layer, 2, 1, len(tokens), c.n_kv_head, c.head_dim)
        total = 0.0
        for piece in torch.arange(len(tokens)).split(64):  # all logits of a window at once may be hundreds of megabytes
            logits = forward(tokens[piece], torch.zeros_like(piece), piece, cache, torch.arange(len(piece)))
            nll = F.cross_entropy(logits, targets[piece], reduction="none")
            total += nll[piece >= skip].sum(dtype=torch.float64).item()
        return total
