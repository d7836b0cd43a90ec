"""How fast texts are written, and in how much memory: `pytest bench/test_generate.py --benchmark`; without the option one short round.

The model has the shape `microstories-44m` and random weights, the tokenizer as many entries; all is greedy. Contenders of one table take
turns, round after round, so that whatever else the machine does falls on all. Every token must be the one that the plain model finds
most likely after those before it.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from bench.conftest import ROWS
from bench.measure import in_a_line, spread
from bench.trainers import MISTRAL, missing
from tritale.data.tokenizer import END_OF_TEXT, FIXED_TOKENS, SPECIAL_TOKENS, Tokenizer
from tritale.inference import LLM
from tritale.model import GPT, GPTConfig
from tritale.model.checkpoint import load_model, save_model
from tritale.model.export import litgpt_config, litgpt_state
from tritale.training.processes import has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_OFF = {"fp32": 1e-4, "bf16": 5e-2}  # how far below the largest logit a token's may lie; logits here deviate by about 0.5
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
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")

    def write(texts: list[str]) -> list[list[int]]:
        given = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        return model.generate(**given, do_sample=False, max_new_tokens=n_tokens)[:, given["input_ids"].shape[1] :].tolist()

    return write


def litgpt(folder, dtype, n_tokens) -> Write:
    import litgpt
    from litgpt.generate.base import generate

    plain, tokenizer = load_model(folder), Tokenizer.load(folder)
    model = litgpt.GPT(litgpt.Config(**litgpt_config(plain.config))).to(dtype).eval()
    model.load_state_dict(litgpt_state(plain))
    model.max_seq_length = plain.config.context
    model.set_kv_cache(batch_size=1, dtype=dtype)

    @torch.inference_mode()
    def write(texts: list[str]) -> list[list[int]]:
        prompts = [torch.tensor(tokenizer.encode(text, bos=True)) for text in texts]
        settings = dict(temperature=0.0, eos_id=0, include_prompt=False)
        return [generate(model, ids, len(ids) + n_tokens, **settings).tolist() for ids in prompts]

    return write


def off(model: GPT, texts: list[list[int]], written: list[list[int]]) -> float:
    """How far the logit of a written token lies below the largest of its place, in the plain model in fp32: that of the worst token."""
    worst = 0.0
    with torch.inference_mode():
        for text, tokens in zip(texts, written, strict=True):
            logits = model(torch.tensor([text + tokens]))[0, len(text) - 1 : -1].float()
            own = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            worst = max(worst, (logits.max(1).values - own).max().item())
    return worst


Contenders = dict[str, tuple[Callable[[], Write], list[str]]]  # {name: (what makes its `Write`, its texts)}


def compare(request, folder, model: str, dtype: str, contenders: Contenders, n_tokens: int, rounds: int, left_out: dict[str, str]) -> None:
    """Let the contenders take turns, and put a row for each into the results; `left_out` says why one is not measured."""
    head = {"suite": "generation", "case": "generation", "model": model, "dtype": dtype}
    rows = {name: head | {"contender": name, "status": "ok", "note": ""} for name in contenders}
    writers, found, tokens = {}, {name: [] for name in contenders}, {}
    for name, (make, _) in contenders.items():
        reason = left_out.get(name) or missing(MISTRAL if name == "transformers" else name)
        if reason:
            rows[name] |= {"status": "cannot run", "note": reason}
        else:
            writers[name] = make()
    for i in range(rounds + 1):
        for name, (_, texts) in contenders.items():
            if rows[name]["status"] != "ok":
                continue
            began = time.perf_counter()
            try:
                tokens[name] = writers[name](texts)
            except Exception as error:
                rows[name] |= {"status": "failed", "note": in_a_line(error)}
            if i:  # the first call compiles, allocates, reads from the disk
                found[name].append(time.perf_counter() - began)
    plain, encode = load_model(folder).eval(), Tokenizer.load(folder).encode
    for name, (_, texts) in contenders.items():
        row = rows[name]
        if row["status"] == "ok":
            n_written = sum(map(len, tokens[name]))
            row |= {"tokens": n_written, "seconds": spread(found[name]), "bytes": None}
            worst = off(plain, [encode(text, bos=True) for text in texts], tokens[name])
            if n_written != len(texts) * n_tokens:
                row |= {"status": "wrong", "note": f"wrote {n_written:,} tokens, not {len(texts) * n_tokens:,}"}
            elif not worst <= MOST_OFF[dtype]:
                row |= {"status": "wrong", "note": f"a token's logit is {worst:.1e} below the largest (allowed: {MOST_OFF[dtype]:.0e})"}
        request.config.stash[ROWS].append(row)
        assert not name.startswith("ours") or row["status"] == "ok", row["note"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_prompt(dtype, folder, is_measured, request):
    n_tokens, rounds = (100, 5) if is_measured else (4, 1)
    makers = {"ours": tritale, "transformers": transformers, "litgpt": litgpt}
    contenders = {name: (partial(make, folder, DTYPES[dtype], n_tokens), prompts(1)) for name, make in makers.items()}
    compare(request, folder, "one prompt", dtype, contenders, n_tokens, rounds, {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_32_prompts(dtype, folder, is_measured, request):
    n_tokens, rounds = (100, 3) if is_measured else (4, 1)
    texts, ours = prompts(N_PROMPTS), tritale(folder, DTYPES[dtype], n_tokens)
    one_by_one = lambda texts: [ours([text])[0] for text in texts]
    contenders = {
        "ours": (lambda: ours, texts),
        "ours, one after the other": (lambda: one_by_one, texts[:3]),
        "transformers": (partial(transformers, folder, DTYPES[dtype], n_tokens), texts),
    }
    is_slow = dtype == "bf16" and is_measured and not has_bf16(torch.device("cpu"))
    left_out = {"transformers": "left out: this CPU only imitates bf16, and one batch takes minutes"} if is_slow else {}
    compare(request, folder, f"{N_PROMPTS} prompts of 1 to 40 characters", dtype, contenders, n_tokens, rounds, left_out)


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
