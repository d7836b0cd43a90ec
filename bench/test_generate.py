"""How fast texts are written, and in how much memory: `pytest bench/test_generate.py --benchmark`; without the option one short round.

The model has the shape `microstories-44m` and random weights, the tokenizer as many entries; all is greedy. Contenders of one table take
turns, round after round, so that whatever else the machine does falls on all. In fp32 their tokens must be the same.
"""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from bench.conftest import ROWS
from bench.measure import spread
from tritale.data.tokenizer import END_OF_TEXT, FIXED_TOKENS, SPECIAL_TOKENS, Tokenizer
from tritale.model import GPT, LLM, GPTConfig
from tritale.model.checkpoint import save_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
N_PROMPTS = 32


@pytest.fixture(scope="module")
def is_measured(pytestconfig) -> bool:
    return bool(pytestconfig.getoption("--benchmark", default=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, is_measured):
    """A checkpoint of 44 M parameters; in the short round a small one."""
    torch.manual_seed(0)
    config = GPTConfig.preset("microstories-44m") if is_measured else GPTConfig.preset("microstories-44m", vocab_size=2048, n_layer=1)
    folder = tmp_path_factory.mktemp("generate")
    model = GPT(config)
    with torch.no_grad():
        model.embedding[0] = 0  # the logit of <|endoftext|> is 0, never the largest: every text is written to the end, by everybody
    save_model(folder, model, eos_token_id=0, pad_token_id=3)
    entries = [*FIXED_TOKENS, *(chr(0x4E00 + i) for i in range(20_000)), *(f"entry {i}" for i in range(65_024))][: config.vocab_size]
    backend = tokenizers.Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)])
    Tokenizer(backend).save(folder)
    return folder


def prompts(n: int) -> list[str]:
    """n prompts of 1 to 40 characters."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda high, size: torch.randint(high, size, generator=generator)
    return ["".join(chr(0x4E00 + c) for c in draw(1500, (int(draw(40, ())) + 1,)).tolist()) for _ in range(n)]


Write = Callable[[list[str]], list[list[int]]]  # the new tokens of each text


def tritale(folder, dtype, n_tokens) -> Write:
    llm = LLM.load(folder, device="cpu", dtype=dtype)
    return lambda texts: [c.tokens for c in llm.complete(texts, temperature=0, max_new_tokens=n_tokens)]


def transformers(folder, dtype, n_tokens) -> Write:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")

    def write(texts: list[str]) -> list[list[int]]:
        given = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        return model.generate(**given, do_sample=False, max_new_tokens=n_tokens)[:, given["input_ids"].shape[1] :].tolist()

    return write


def litgpt(folder, dtype, n_tokens) -> Write:
    litgpt = pytest.importorskip("litgpt")
    from litgpt.generate.base import generate

    from tritale.model.checkpoint import gpt_config, read_json

    c, tokenizer = gpt_config(read_json(folder, "config.json")), Tokenizer.load(folder)
    config = litgpt.Config(
        name="tritale", block_size=c.context, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
        n_query_groups=c.n_kv_head, head_size=c.head_dim, n_embd=c.width, intermediate_size=c.mlp_width, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    model = litgpt.GPT(config).to(dtype).eval()
    model.max_seq_length = c.context
    model.set_kv_cache(batch_size=1, dtype=dtype)

    @torch.inference_mode()
    def write(texts: list[str]) -> list[list[int]]:
        prompts = [torch.tensor(tokenizer.encode(text, bos=True)) for text in texts]
        settings = dict(temperature=0.0, eos_id=0, include_prompt=False)
        return [generate(model, ids, len(ids) + n_tokens, **settings).tolist() for ids in prompts]

    return write


def compare(request, model: str, dtype: str, contenders: dict[str, tuple[Write, list[str]]], n_tokens: int, rounds: int) -> None:
    """Let the contenders {name: (write, its texts)} take turns, and put a row for each into the results. The first is ours."""
    found, tokens = {name: [] for name in contenders}, {}
    for i in range(rounds + 1):
        for name, (write, texts) in contenders.items():
            began = time.perf_counter()
            tokens[name] = write(texts)
            if i:  # the first call compiles, allocates, reads from the disk
                found[name].append(time.perf_counter() - began)
    for name, seconds in found.items():
        row = {"suite": "generation", "case": "generation", "model": model, "dtype": dtype, "contender": name, "status": "ok", "note": ""}
        row |= {"tokens": sum(map(len, tokens[name])), "seconds": spread(seconds), "bytes": None}
        same = [ours == theirs for ours, theirs in zip(tokens["ours"], tokens[name], strict=False)]
        if not all(same) and dtype == "fp32":
            row |= {"status": "wrong", "note": f"{same.count(False)} of {len(same)} texts differ from ours"}
        request.config.stash[ROWS].append(row)
        assert name != "ours" or row["tokens"] == len(contenders[name][1]) * n_tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_prompt(dtype, folder, is_measured, request):
    n_tokens, rounds = (100, 7) if is_measured else (4, 1)
    makers = {"ours": tritale, "transformers": transformers} | ({"litgpt": litgpt} if importlib.util.find_spec("litgpt") else {})
    contenders = {name: (make(folder, DTYPES[dtype], n_tokens), prompts(1)) for name, make in makers.items()}
    compare(request, "one prompt", dtype, contenders, n_tokens, rounds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_32_prompts(dtype, folder, is_measured, request):
    n_tokens, rounds = (100, 5) if is_measured else (4, 1)
    texts, ours = prompts(N_PROMPTS), tritale(folder, DTYPES[dtype], n_tokens)
    one_by_one = lambda texts: [ours([text])[0] for text in texts]
    contenders = {"ours": (ours, texts), "ours, one after the other": (one_by_one, texts[:3])}
    if dtype == "fp32" or not is_measured or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        contenders["transformers"] = transformers(folder, DTYPES[dtype], n_tokens), texts
    else:  # on a CPU that imitates bf16 it takes minutes; a tenth tells
        contenders["transformers"] = transformers(folder, DTYPES[dtype], n_tokens // 10), texts
    compare(request, f"{N_PROMPTS} prompts of 1 to 40 characters", dtype, contenders, n_tokens, rounds)


def test_memory(folder, is_measured, capsys):
    """What `tritale generate` reports, in a process of its own."""
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-m", "tritale.cli.main", "generate", "--model", str(folder), "--dtype", dtype, "--seed", "1"]
        command += ["--prompt", "小", "--max-new-tokens", "500" if is_measured else "4"]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
        line = result.stderr.strip().splitlines()[-1]
        with capsys.disabled():
            print(f"\n{dtype}: {line}")
        assert int(re.search(r"memory (\d+) MiB", line)[1]) <= 650
