"""Speed and memory of generation: `pytest bench/test_generate.py --benchmark`. Without the option, one short round.

The model has the shape `microstories-44m` and random weights; decoding is greedy. The contenders of a table take turns. Every token must be
the one with the largest logit in the plain model, up to rounding.
"""

import importlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.conftest import ROWS
from bench.measure import DTYPES, device, first_line, spread
from bench.random_model import random_prompts, save_random_model
from bench.trainers import MISTRAL, missing
from tritale.data.tokenizer import Tokenizer
from tritale.inference import LLM
from tritale.model import GPT, GPTConfig
from tritale.model.checkpoint import load_model
from tritale.model.export import litgpt_config, litgpt_state
from tritale.training.processes import has_bf16

MAX_GAP = {"fp32": 1e-4, "bf16": 5e-2}  # from the largest logit to that of the chosen token; the logits have a deviation of about 0.5
PROMPTS = random_prompts([1 + 13 * i % 40 for i in range(32)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, benchmarking):
    """A checkpoint of 44 M parameters; a smaller one without --benchmark."""
    smaller = {} if benchmarking else {"vocab_size": 2048, "n_layer": 1}
    folder = tmp_path_factory.mktemp("generate")
    save_random_model(folder, GPTConfig.preset("microstories-44m", **smaller))
    return folder


Write = Callable[[list[str]], list[list[int]]]  # prompts → new tokens of each


def tritale(folder, dtype, n_tokens) -> Write:
    llm = LLM.load(folder, device=device().type, dtype=dtype)
    return lambda prompts: [c.tokens for c in llm.complete(prompts, temperature=0, max_new_tokens=n_tokens)]


def transformers(folder, dtype, n_tokens) -> Write:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.nn.Module.to(model, device())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")

    def write(prompts: list[str]) -> list[list[int]]:
        given = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(device())
        written = model.generate(**given, do_sample=False, max_new_tokens=n_tokens)  # pyright: ignore[reportAttributeAccessIssue]
        return written[:, given["input_ids"].shape[1] :].tolist()

    return write


def litgpt(folder, dtype, n_tokens) -> Write:
    litgpt, base = importlib.import_module("litgpt"), importlib.import_module("litgpt.generate.base")
    plain, tokenizer = load_model(folder), Tokenizer.load(folder)
    model = litgpt.GPT(litgpt.Config(**litgpt_config(plain.config))).to(device(), dtype).eval()
    model.load_state_dict(litgpt_state(plain))
    model.max_seq_length = plain.config.context
    model.set_kv_cache(batch_size=1, device=device(), dtype=dtype)

    @torch.inference_mode()
    def write(prompts: list[str]) -> list[list[int]]:
        encoded = [torch.tensor(tokenizer.encode(prompt, bos=True), device=device()) for prompt in prompts]
        settings = dict(temperature=0.0, eos_id=0, include_prompt=False)
        return [base.generate(model, ids, len(ids) + n_tokens, **settings).tolist() for ids in encoded]

    return write


def largest_gap(model: GPT, prompts: list[list[int]], written: list[list[int]]) -> float:
    """The largest difference between the largest logit and that of the chosen token, in the plain fp32 model."""
    gaps = []
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, written, strict=True):
            logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1].float()  # (T, V)
            chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            gaps.append((logits.max(1).values - chosen).max().item())
    return torch.tensor(gaps).max().item()  # NaN if one is


Contenders = dict[str, tuple[Callable[[], Write], list[str]]]  # {name: (function that makes its `Write`, its prompts)}


def compare(request, folder, model: str, dtype: str, contenders: Contenders, n_tokens: int, rounds: int, left_out: dict[str, str]) -> None:
    """Let the contenders take turns and add a row for each to the results. `left_out` has the reason of each that is not measured."""
    head = {"suite": "generation", "case": "generation", "model": model, "dtype": dtype, "device": device().type}
    rows = {name: head | {"contender": name, "status": "ok", "note": ""} for name in contenders}
    writers, found, tokens = {}, {name: [] for name in contenders}, {}
    for name, (make, _) in contenders.items():
        if reason := left_out.get(name) or missing(MISTRAL if name == "transformers" else name):
            rows[name] |= {"status": "cannot run", "note": reason}
        else:
            writers[name] = make()
    for i in range(rounds + 1):
        for name in list(writers):
            began = time.perf_counter()
            try:
                tokens[name] = writers[name](contenders[name][1])
            except Exception as error:
                rows[name] |= {"status": "failed", "note": first_line(error)}
                del writers[name]
            if i:  # the first call compiles, allocates and reads the disk
                found[name].append(time.perf_counter() - began)
    plain, encode = load_model(folder).eval(), Tokenizer.load(folder).encode
    for name, (_, prompts) in contenders.items():
        row = rows[name]
        if row["status"] == "ok":
            n_written = sum(map(len, tokens[name]))
            row |= {"tokens": n_written, "seconds": spread(found[name]), "bytes": None}
            gap = largest_gap(plain, [encode(prompt, bos=True) for prompt in prompts], tokens[name])
            if n_written != len(prompts) * n_tokens:
                row |= {"status": "wrong", "note": f"wrote {n_written:,} tokens, not {len(prompts) * n_tokens:,}"}
            elif not gap <= MAX_GAP[dtype]:
                row |= {"status": "wrong", "note": f"a token's logit is {gap:.1e} below the largest (allowed: {MAX_GAP[dtype]:.0e})"}
        request.config.stash[ROWS].append(row)
        assert not name.startswith("ours") or row["status"] == "ok", row["note"]


@pytest.mark.parametrize("dtype", MAX_GAP)
def test_one_prompt(dtype, folder, benchmarking, request):
    n_tokens, rounds = (100, 5) if benchmarking else (4, 1)
    makers = {"ours": tritale, "transformers": transformers, "litgpt": litgpt}
    contenders = {name: (partial(make, folder, DTYPES[dtype], n_tokens), random_prompts([20])) for name, make in makers.items()}
    compare(request, folder, "one prompt", dtype, contenders, n_tokens, rounds, {})


@pytest.mark.parametrize("dtype", MAX_GAP)
def test_32_prompts(dtype, folder, benchmarking, request):
    n_tokens, rounds = (100, 3) if benchmarking else (4, 1)
    ours = tritale(folder, DTYPES[dtype], n_tokens)
    contenders = {
        "ours": (lambda: ours, PROMPTS),
        "ours, one after the other": (lambda: lambda prompts: [ours([prompt])[0] for prompt in prompts], PROMPTS[:3]),
        "transformers": (partial(transformers, folder, DTYPES[dtype], n_tokens), PROMPTS),
    }
    is_slow = dtype == "bf16" and benchmarking and not has_bf16(device())
    left_out = {"transformers": "left out: this CPU emulates bf16, and one batch takes minutes"} if is_slow else {}
    compare(request, folder, f"{len(PROMPTS)} prompts of 1 to 40 characters", dtype, contenders, n_tokens, rounds, left_out)


def test_memory(folder, benchmarking, capsys):
    """The peak memory that `tritale generate` reports."""
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-m", "tritale.cli.main", "generate", "--model", str(folder), "--dtype", dtype, "--seed", "1"]
        command += ["--prompt", "小", "--max-new-tokens", "500" if benchmarking else "4"]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
        line = result.stderr.strip().splitlines()[-1]
        with capsys.disabled():
            print(f"\n{dtype}: {line}")
        found = re.search(r"memory (\d+) MiB", line)
        assert found and int(found[1]) <= 650
