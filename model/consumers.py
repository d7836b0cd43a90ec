"""What other programs make of an export: their token ids and logits, compared with ours, if they are installed."""

import importlib
import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..data.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer
from .export import gguf_ids, gguf_vocabulary
from .gpt import GPT

UNUSUAL = re.compile(r"[^\S\r\n] |▁")  # what llama.cpp may encode differently
TOLERANCE = 1e-4  # of the largest logit. Sums of some thousand terms in fp32 differ by about 1e-6 of it, in fp16 by 1e-3


def _import(package: str, *names: str) -> list[Any]:
    """Attributes of an optional package. Raises ImportError if it is missing or its installation is broken."""
    try:
        module = importlib.import_module(package)
        return [getattr(module, name) for name in names]
    except Exception as error:  # beside another torch, a compiled package may raise anything
        raise ImportError(f"{package} cannot be imported ({str(error).splitlines()[0]})") from None


def check_hf(folder: Path, model: GPT, tokenizer: Tokenizer, documents: list[str]) -> str:
    """Compare a checkpoint with what transformers loads: a sentence about the result.

    Raises UserError if ids or logits differ, ImportError without transformers."""
    version, tokenizers, models, logs = _import("transformers", "__version__", "AutoTokenizer", "AutoModelForCausalLM", "logging")
    logs.disable_progress_bar()
    backend, theirs = tokenizers.from_pretrained(folder), models.from_pretrained(folder, dtype=torch.float32)
    compared = _compare(
        f"transformers {version}", model, tokenizer, documents,
        lambda text: backend(text, split_special_tokens=True, verbose=False)["input_ids"],  # or it warns of texts beyond the context
        lambda ids: theirs(torch.tensor([ids])).logits[0, -1],
    )  # fmt: skip
    theirs.generate(**backend(["", documents[0][:4]], padding=True, return_tensors="pt"), max_new_tokens=2)
    return compared + "; generate runs"


def check_litgpt(out: Path, model: GPT, tokenizer: Tokenizer, documents: list[str]) -> str:
    """The same for `export_litgpt`."""
    config, gpt, load_tokenizer = _import("litgpt", "Config", "GPT", "Tokenizer")
    theirs, backend = gpt(config.from_file(out / "model_config.yaml")).eval(), load_tokenizer(out)
    theirs.load_state_dict(torch.load(out / "lit_model.pth", weights_only=True))
    logits = lambda ids: theirs(torch.tensor([ids]))[0, -1]
    return _compare("litgpt", model, tokenizer, documents, lambda text: backend.encode(text).tolist(), logits)


def check_gguf(out: Path, model: GPT, tokenizer: Tokenizer, documents: list[str]) -> str:
    """The same for `export_gguf` and llama.cpp. Without the package xllamacpp only the token ids are compared, with its algorithm.

    llama.cpp has no pre-tokenizer here, so it joins a word with the space before it also after other white space, and reads ▁ as a space.
    Documents with these are counted in a warning."""
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    encode = lambda text: [tokenizer.eot_id, *gguf_ids(text, vocabulary)]
    usual = [text for text in documents if encode(text) == tokenizer.encode(text, bos=True)]
    unusual = [text for text in documents if text not in usual]
    if unexplained := [text for text in unusual if not UNUSUAL.search(text)]:
        raise UserError(_other_ids("llama.cpp", len(unexplained), documents, unexplained[0]))
    try:
        post = llama_cpp(out, model.config.context)
        ids_of = lambda text: post("tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]
        result = _compare("llama.cpp", model, tokenizer, usual, ids_of, lambda ids: llama_cpp_logprobs(post, ids, model.config.vocab_size))
    except ImportError as reason:
        result = f"llama.cpp's algorithm gives the same ids for {len(usual)} of {len(documents)} documents"
        result += f"; logits are not checked, because {reason}"
    if unusual:
        result += f". WARNING: it encodes {len(unusual)} of {len(documents)} documents differently, for example {unusual[0][:60]!r}"
    words = [entry.replace("▁", "   ", 1) for entry in vocabulary[0] if entry.startswith("▁") and len(entry) > 1]
    if spaced := [text for text in words[:200] if encode(text) != tokenizer.encode(text, bos=True)]:
        result += f"; it encodes a word after several spaces differently ({spaced[0]!r}): write single spaces in prompts"
    return result


def llama_cpp(file: Path, context: int) -> Callable[[str, dict], dict]:
    """A function that sends a request to llama.cpp's server, which runs in this process until the function is deleted.

    llama.cpp's flash attention, its default, converts keys and values to fp16, whatever the type of the cache: logits differ by 1e-3."""
    names = ("CommonParams", "Server", "ggml_type", "llama_flash_attn_type")
    common_params, start, types, flash_attention = _import("xllamacpp", *names)
    params = common_params()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = str(file), context, 1, False
    params.n_parallel, params.verbosity = 1, -1
    params.cache_type_k = params.cache_type_v = types.GGML_TYPE_F32
    params.flash_attn_type = flash_attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = start(params)

    def post(path: str, request: dict) -> dict:
        data, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/{path}", data, headers)) as response:
            return json.load(response)

    return post


def llama_cpp_logprobs(post: Callable[[str, dict], dict], ids: list[int], vocab_size: int) -> Tensor:
    """Log-probabilities (V,) of the token after `ids`."""
    # Its answer has none if it ends inside a character, so it may not choose a byte. The ban does not change the probabilities.
    bans = [[len(SPECIAL_TOKENS) + byte, False] for byte in range(len(BYTE_TOKENS))]
    request = {"prompt": ids, "n_predict": 1, "n_probs": vocab_size, "logit_bias": bans, "temperature": 0}
    found = post("completion", request)["completion_probabilities"][0]["top_logprobs"]
    return torch.tensor([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])])


@torch.no_grad()
def _compare(
    program: str, model: GPT, tokenizer: Tokenizer, documents: list[str],
    encode: Callable[[str], list[int]], last_logits: Callable[[list[int]], Tensor],
) -> str:  # fmt: skip
    """Compare the ids of all documents, and the log-probabilities after the first half of each of up to eight."""
    different = [text for text in documents if encode(text) != tokenizer.encode(text, bos=True)]
    if different:
        raise UserError(_other_ids(program, len(different), documents, different[0]))
    largest = 0.0
    for text in documents[:8]:
        ids = tokenizer.encode(text, bos=True)[: model.config.context]
        ids = ids[: (len(ids) + 1) // 2]
        ours, theirs = model(torch.tensor([ids]))[0, -1], last_logits(ids)
        difference = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
        if not difference <= TOLERANCE * ours.abs().max().item():
            raise UserError(f"{program} computes other logits (difference {difference:.2g}), so the export is removed; please report this")
        largest = max(largest, difference)
    return f"checked: {program} gives the same ids for {len(documents)} documents and the same logits (largest difference {largest:.1g})"


def _other_ids(program: str, n: int, documents: list[str], example: str) -> str:
    return f"{program} encodes {n} of {len(documents)} documents differently, for example {example[:60]!r}, so the export is removed"
