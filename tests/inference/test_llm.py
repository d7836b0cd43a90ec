"""Generation equals that of Hugging Face, alone and in a batch, with native.c and with PyTorch."""

import json
import math
import os
import platform
import shutil
import string
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.runs import REPOSITORY
from tritale.common.sampling import SamplingSettings
from tritale.data.tokenizer import Tokenizer
from tritale.inference import LLM, Decoder, Detokenizer, Sampling, Sequence, native
from tritale.inference.cpu_runner import CPURunner
from tritale.inference.sampling import candidates
from tritale.kernels import c_compiler, cpu
from tritale.model import GPT, GPTConfig
from tritale.model.checkpoint import save_model
from tritale.stories.generator import story

CHARACTERS = "从前有一只小兔子和猫在森林里玩，天气很好。妈妈说：“你看！”🐰龘x1 "


def random_prompts(n: int, longest: int = 20) -> list[str]:
    """Prompts of different lengths; the first is empty."""
    length = lambda i: int(torch.randint(1, longest, ())) if i else 0
    return ["".join(CHARACTERS[j] for j in torch.randint(len(CHARACTERS), (length(i),)).tolist()) for i in range(n)]


def save(folder, tokenizer: Tokenizer, **shape):
    """A checkpoint with large random weights, so that the logits differ clearly."""
    model = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, n_head=4, n_kv_head=2, head_dim=14, **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    folder.mkdir(parents=True)
    save_model(folder, model, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((story(1, i).text for i in range(200)), 600)


SHAPES = {"mistral": {"window": 20}, "qwen3": {"qk_norm": True, "tie_embeddings": False}}


@pytest.fixture(params=SHAPES)
def folder(request, tmp_path, tokenizer):
    """Both architectures: Mistral with a window, Qwen3 with QK-norm."""
    return save(tmp_path / "step-00000001", tokenizer, **SHAPES[request.param])


@pytest.fixture(params=["native", "pytorch"])
def path(request, monkeypatch) -> str:
    """What runs the forward passes."""
    if request.param == "native" and (problem := native.problem()):
        pytest.skip(problem)
    if request.param == "pytorch":
        monkeypatch.setattr(native, "can_run", lambda model: False)
        monkeypatch.setattr(cpu, "_library", lambda: None)  # without a compiler both libraries are missing
    return request.param


@pytest.fixture
def llm(folder, path) -> LLM:
    return LLM.load(folder, device="cpu")


# --- Hugging Face --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trained", "mistral", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(form, request, tmp_path, tokenizer, monkeypatch):
    """20 prompts in one batch; a trained checkpoint, and both architectures with random weights."""
    transformers = pytest.importorskip("transformers")
    if form == "trained":
        folder = request.getfixturevalue("tiny_run") / "step-00000006"
    else:
        folder = save(tmp_path / "m", tokenizer, **SHAPES[form])
    llm, theirs = LLM.load(folder, device="cpu"), transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts, expected = random_prompts(20), []
    for prompt in prompts:
        ids = torch.tensor([llm.tokenizer.encode(prompt, bos=True)])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25)[0, ids.shape[1] :].tolist()
        expected.append(out[: out.index(0)] if 0 in out else out)
    assert len({tuple(tokens) for tokens in expected}) > 1
    for can_run in {native.can_run, lambda model: False}:
        monkeypatch.setattr(native, "can_run", can_run)
        assert [c.tokens for c in llm.complete(prompts, temperature=0, max_new_tokens=25)] == expected


FILTERS = {
    "plain": {"temperature": 1.0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.08},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.85, "min_p": 0.02, "repetition_penalty": 0.8},
}
OFF = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def their_scores(ids: torch.Tensor, logits: torch.Tensor, settings: dict) -> torch.Tensor:
    """Logits (B, V) after the processors and warpers that `generate` of transformers makes for the settings, in its order."""
    transformers = pytest.importorskip("transformers")
    given = {k: v for k, v in settings.items() if v != OFF[k]}
    config = transformers.GenerationConfig(do_sample=True, **({"top_k": 0} | given))
    tiny = transformers.MistralConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.MistralForCausalLM(tiny)
    processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu", logits_processor=[])
    assert len(processors) == len(given)
    return processors(ids, logits.clone())


@pytest.mark.parametrize("name", FILTERS)
def test_20000_first_tokens_are_distributed_as_in_transformers(name, tmp_path, tokenizer, seed):
    settings = OFF | FILTERS[name]
    llm = LLM.load(save(tmp_path / "m", tokenizer), device="cpu")
    llm.model.embedding.data *= 0.5  # a flatter distribution, so that every filter removes tokens
    ids, n = llm.tokenizer.encode("小兔子和小猫", bos=True), 20_000
    scores = their_scores(torch.tensor([ids]), llm.model(torch.tensor([ids]))[:, -1].detach(), settings)
    p = scores.double().softmax(-1)[0]

    decoder = llm.decoder(slots=500, capacity=16)
    for i in range(500):
        decoder.add(Sequence(list(ids), Sampling(seed=seed + i, **settings)))
    runner = decoder._runner
    assert isinstance(runner, CPURunner)
    counts, choose = torch.zeros(len(p), dtype=torch.float64), runner._choose

    def choose_often(sequences, logits):  # each sequence draws its first token 40 times
        tokens = [choose(sequences, logits.clone()) for _ in range(n // 500)]
        counts.add_(torch.bincount(torch.tensor(tokens).flatten(), minlength=len(p)))
        return tokens[0]

    runner._choose = choose_often
    decoder.step()
    assert counts.sum() == n

    assert counts[p == 0].sum() == 0
    rare = p * n < 5  # counted as one class
    expected = torch.cat([p[~rare], p[rare].sum(0, keepdim=True)]) * n
    observed = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    expected, observed = expected[expected > 0], observed[expected > 0]
    chi2, df = ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert df >= 3
    z = ((chi2 / df) ** (1 / 3) - 1 + 2 / (9 * df)) / math.sqrt(2 / (9 * df))  # Wilson-Hilferty: a standard normal
    assert z < 5, f"chi-square {chi2:.1f} at {df} degrees of freedom"


@pytest.mark.parametrize("vocab_size", [50, 5000])  # below and above FIRST_LOOK
@pytest.mark.parametrize("name", [name for name in FILTERS if name != "repetition_penalty"])
def test_filters_keep_what_transformers_keeps(name, vocab_size):
    settings = OFF | FILTERS[name] | {"repetition_penalty": 1.0}
    for spread in (0.1, 2.0, 6.0):  # nearly flat to nearly certain
        logits = torch.randn(4, vocab_size) * spread
        p, ids = candidates(logits, **{k: v for k, v in settings.items() if k != "repetition_penalty"})
        p = p if ids is None else torch.zeros_like(logits).scatter(-1, ids, p)
        expected = their_scores(torch.zeros(4, 1, dtype=torch.int64), logits, settings).softmax(-1)
        assert ((p > 0) != (expected > 0)).sum() <= 4 * (spread < 1)  # if p is flat, rounding decides at the limit
        torch.testing.assert_close(p, expected, atol=2e-3 / vocab_size if spread < 1 else 1e-5, rtol=1e-4)


def test_tokens_as_likely_as_the_kth_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    p, ids = candidates(logits, temperature=1.0, top_k=2, top_p=1.0, min_p=0.0)
    assert ids is not None
    kept = [sorted(ids[i][p[i] > 0].tolist()) for i in range(2)]
    assert kept == [[1, 2, 3, 5], [0, 1]]


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 1e-300])
def test_a_temperature_near_0_draws_the_likeliest_token(temperature):
    logits = torch.randn(4, 50) * 30
    for top_k in (None, 5):
        p, ids = candidates(logits, temperature=temperature, top_k=top_k, top_p=1.0, min_p=0.0)
        p = p if ids is None else torch.zeros_like(logits).scatter(-1, ids, p)
        assert torch.equal(p, F.one_hot(logits.argmax(-1), 50).float())


# --- Batches -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "top_k": None, "repetition_penalty": 1.2}])
def test_a_batch_of_32_gives_each_prompt_what_it_gives_alone(settings, llm, seed):
    prompts = random_prompts(32)
    together = llm.generate(prompts, max_new_tokens=12, seed=seed, **settings)
    alone = [llm.generate(prompt, max_new_tokens=12, seed=seed + i, **settings) for i, prompt in enumerate(prompts)]
    assert together == alone


def test_more_prompts_than_slots_give_the_same_completions(llm, monkeypatch, seed):
    prompts = random_prompts(11)
    expected = llm.complete(prompts, seed=seed, max_new_tokens=12)
    monkeypatch.setattr("tritale.inference.llm.MAX_SLOTS", 3)
    assert llm.complete(prompts, seed=seed, max_new_tokens=12) == expected


def test_adding_and_removing_sequences_does_not_change_the_others(llm):
    prompts = [llm.tokenizer.encode(p, bos=True) for p in random_prompts(12)]
    alone = []
    for ids in prompts:
        one, sequence = llm.decoder(slots=1), Sequence(list(ids), Sampling(temperature=0))
        one.add(sequence)
        alone.append([one.step()[sequence] for _ in range(10)])
    decoder, running, written, waiting = llm.decoder(slots=4), {}, {i: [] for i in range(12)}, list(range(12))
    while waiting or running:
        while waiting and decoder.free and torch.rand(()) < 0.7:
            i = waiting.pop()
            sequence = Sequence(list(prompts[i]), Sampling(temperature=0))
            decoder.add(sequence)
            running[sequence] = i
        for sequence, token in decoder.step().items():
            written[running[sequence]].append(token)
        for sequence, i in list(running.items()):
            if len(written[i]) == 10 or torch.rand(()) < 0.03:  # some are removed early
                decoder.remove(sequence)
                del running[sequence]
    for i, tokens in written.items():
        assert tokens == alone[i][: len(tokens)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_logits_match_pytorch_and_do_not_depend_on_the_batch(dtype, folder):
    if problem := native.problem():
        pytest.skip(problem)
    llm = LLM.load(folder, device="cpu", dtype=dtype)
    c, tokens = llm.model.config, torch.randint(600, (5, 40))
    tokens = tokens.clamp(max=c.vocab_size - 1)
    forward = native.NativeForward(llm.model)
    cache = lambda slots: torch.full((c.n_layer, 2, slots, 50, c.n_kv_head, c.head_dim), torch.nan)
    flat = lambda n: (torch.arange(n).repeat_interleave(40), torch.arange(40).repeat(n))
    together = forward(tokens.flatten(), *flat(5), cache(5), torch.arange(200)).clone()
    one = cache(3)
    for i in range(40):
        logits = forward(tokens[4, i : i + 1].clone(), torch.tensor([2]), torch.tensor([i]), one, torch.tensor([0]))
        assert torch.equal(logits[0], together[160 + i]), i
    torch.testing.assert_close(together, llm.model.float()(tokens).detach().flatten(0, 1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("n_col", [1, 7, 8, 1001])
def test_native_argmax_is_the_first_of_the_largest(n_col):
    if problem := native.problem():
        pytest.skip(problem)
    logits = torch.randn(5, n_col + 3)[:, :n_col]
    logits[1, n_col // 3] = logits[1, n_col // 2] = logits[1, -1] = 9.0
    logits[2] = -torch.inf
    first = [next(i for i, value in enumerate(row) if value == max(row)) for row in logits.tolist()]
    assert native.argmax(logits).tolist() == first
    for i in range(1, n_col):  # NaN hides no other number
        wrong = logits[:1].clone()
        wrong[0, i], wrong[0, 0] = torch.nan, 20.0
        assert native.argmax(wrong).item() == 0


@pytest.mark.parametrize("n_col", [2, 63, 64, 1000, 5003])
@pytest.mark.parametrize("scale", [0.3, 4.0])
@pytest.mark.parametrize("top_k", [1, 30, 900])
def test_native_draw_chooses_as_the_definition(n_col, scale, top_k):
    """With rows that are not contiguous, ties with the k-th logit, and all filters."""
    if problem := native.problem():
        pytest.skip(problem)
    top_k = min(top_k, n_col - 1)
    logits = (torch.randn(40, n_col + 5) * scale)[:, :n_col]
    logits[1::4] = logits[1::4].round()  # many ties
    logits[2] = 0.0
    for filters in ({}, {"top_p": 0.9}, {"min_p": 0.07}, {"top_p": 0.53, "min_p": 0.011}):
        options: dict = {"temperature": 0.8, "top_k": top_k, "top_p": 1.0, "min_p": 0.0} | filters
        p, ids = candidates(logits, **options)
        for _ in range(5):
            u = torch.rand(40, 1, dtype=torch.float64)
            ours = native.draw(logits, u, **options)
            total = (p.double() / p.double().sum(-1, keepdim=True)).cumsum(-1)
            assert ids is not None
            # Ties have no order in `topk`, and a sum rounds: compare the logit, and where it differs, the place of u between two tokens.
            theirs = ids.gather(-1, (total <= u).sum(-1, keepdim=True).clamp(max=ids.shape[1] - 1))
            is_equal = logits.gather(-1, ours[:, None]) == logits.gather(-1, theirs)
            is_border = (total - u).abs().min(-1, keepdim=True).values < 1e-5
            assert (is_equal | is_border).all() and is_equal.float().mean() > 0.9


def test_native_draw_takes_the_largest_for_zero_and_the_last_kept_for_almost_one():
    if problem := native.problem():
        pytest.skip(problem)
    logits = torch.tensor([[0.0, 3.0, -1.0, 3.0, 2.0, -9.0]]).repeat(3, 1)
    logits[1, 5] = torch.nan
    options: dict = {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0}
    ends = [native.draw(logits, torch.full((3, 1), u, dtype=torch.float64), **options).tolist() for u in (0.0, 1 - 2**-53)]
    assert ends == [[1, -1, 1], [4, -1, 4]]
    options["top_k"] = 1  # with its tie
    assert native.draw(logits, torch.full((3, 1), 0.51, dtype=torch.float64), **options).tolist() == [3, -1, 3]
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=r"from 1 to 5"):
            native.draw(logits, torch.zeros(3, 1, dtype=torch.float64), **(options | {"top_k": wrong}))
    with pytest.raises(ValueError, match="one number per row"):
        native.draw(logits, torch.zeros(2, 1, dtype=torch.float64), **options)


def test_weights_that_are_not_finite_are_named(llm):
    for value in (torch.nan, torch.inf):
        llm.model.norm.data[3] = value
        for temperature in (0, 0.8):
            with pytest.raises(ValueError, match="weights hold NaN or infinity"):
                llm.generate("小兔", temperature=temperature)


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.9}])
def test_one_logit_that_is_not_finite_is_named_when_sampling(llm, filters):
    llm.model.head.data[7, 0] = torch.nan
    with pytest.raises(ValueError, match="weights hold NaN or infinity"):
        llm.generate("小兔", temperature=0.8, **filters)


def test_weights_copied_into_the_model_are_used(llm):
    before = llm.generate("小兔", temperature=0, max_new_tokens=20)
    with torch.no_grad():
        for p in llm.model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    after = llm.generate("小兔", temperature=0, max_new_tokens=20)
    ids = llm.tokenizer.encode("小兔", bos=True)
    for _ in range(20):
        ids.append(llm.model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == llm.tokenizer.eot_id:
            break
    assert before != after == "".join(pieces_of(llm.tokenizer, ids[len(llm.tokenizer.encode("小兔", bos=True)) :]))


# --- Detokenizing -------------------------------------------------------------------------------------------------------------------


def pieces_of(tokenizer: Tokenizer, tokens: list[int], **settings) -> list[str]:
    detokenizer = Detokenizer(tokenizer, Sampling(**settings), 1, 10_000)
    return [detokenizer.push(token) for token in tokens]


def test_stream_yields_whole_characters_and_joins_to_the_completion(llm, seed):
    """Random weights generate many single bytes, most of which form no character."""
    for i in range(8):
        settings = {"max_new_tokens": 50, "temperature": 1.5, "top_k": None, "top_p": 1.0, "seed": seed + i}
        pieces = list(llm.stream("小兔", **settings))
        assert all(pieces) and "".join(pieces) == llm.generate("小兔", **settings)
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_bytes_is_returned_whole(tokenizer):
    tokens = [4 + byte for byte in "龘🐰".encode()]
    assert pieces_of(tokenizer, tokens) == ["", "", "龘", "", "", "", "🐰"]
    assert pieces_of(tokenizer, [tokens[0], *tokens]) == ["", "", "", "龘", "", "", "", "🐰"]  # an incomplete character is dropped
    assert "".join(pieces_of(tokenizer, tokens[:5], max_new_tokens=5)) == "龘"


def test_only_a_model_for_conversations_ends_at_its_end_of_a_message(tokenizer):
    """transformers ends a text of a model at the ids in its generation_config.json, which names `<|im_end|>` for conversations alone."""
    chat = Tokenizer.train((story(1, i).text for i in range(50)), 400)
    chat.is_chat = True
    for model, ends in ((tokenizer, [0]), (chat, [0, 2])):
        reasons = {token: Detokenizer(model, Sampling(), 1, 100) for token in range(4)}
        for token, detokenizer in reasons.items():
            detokenizer.push(token)
        assert [token for token, detokenizer in reasons.items() if detokenizer.finish_reason == "end"] == ends


def test_a_completion_ends_before_a_stop_string(llm, seed):
    settings = {"max_new_tokens": 40, "seed": seed, "temperature": 1.0, "top_k": None}
    text = llm.generate("小兔", **settings)
    while len(text) < 8:
        settings["seed"] += 1
        text = llm.generate("小兔", **settings)
    stop = text[4:7]
    expected = text[: text.index(stop)]
    assert llm.generate("小兔", stop=stop, **settings) == expected
    assert "".join(llm.stream("小兔", stop=[stop, "不会写的话"], **settings)) == expected
    assert llm.complete(["小兔"], stop=stop, **settings)[0].finish_reason == "stop"


def test_a_partial_match_of_a_stop_string_is_held_back(tokenizer):
    ids = [4 + ord(c) for c in "aabaabac"]
    assert pieces_of(tokenizer, ids, stop="aabac") == ["", "", "", "", "aab", "", "", ""]
    assert pieces_of(tokenizer, [*ids[:6], 4 + ord("x")], stop="aabac") == ["", "", "", "", "aab", "", "aabx"]
    assert pieces_of(tokenizer, [*ids[:3], 0], stop="aabac") == ["", "", "", "aab"]  # the sequence ended


def test_finish_reasons_and_lengths(llm, seed):
    context, prompts = llm.model.config.context, random_prompts(24)
    settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "seed": seed}
    reasons = set()
    for prompt, done in zip(prompts, llm.complete(prompts, max_new_tokens=1000, **settings), strict=True):
        reasons.add(done.finish_reason)
        assert llm.tokenizer.eot_id not in done.tokens
        is_full = len(llm.tokenizer.encode(prompt, bos=True)) + len(done.tokens) == context
        assert is_full == (done.finish_reason == "length")
    assert "length" in reasons
    for done in llm.complete(prompts, max_new_tokens=3, **settings):
        assert len(done.tokens) == 3 if done.finish_reason == "length" else len(done.tokens) < 3


def test_a_padded_vocabulary_is_never_drawn(tmp_path, tokenizer, path, seed):
    """A model may have more entries than its tokenizer, for speed; the additional ones have no text."""
    folder = save(tmp_path / "m", tokenizer)
    wide = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size + 40))
    wide.embedding.data[tokenizer.vocab_size :] *= 50
    save_model(folder, wide, eos_token_id=0, pad_token_id=3)
    llm = LLM.load(folder, device="cpu")
    for temperature in (0, 2.0):
        completion = llm.complete(["小兔"], temperature=temperature, top_k=None, top_p=1.0, seed=seed)[0]
        assert all(token < tokenizer.vocab_size for token in completion.tokens)


def test_a_seed_repeats_and_seeds_differ(llm, seed):
    settings = {"max_new_tokens": 30, "temperature": 1.5, "top_k": None, "top_p": 1.0}
    a, b, c = (llm.generate("从前", seed=s, **settings) for s in (seed, seed, seed + 1))
    assert a == b != c
    assert llm.generate(["从前", "从前"], seed=[seed, seed], **settings) == [a, a]
    assert llm.generate(["从前", "从前"], seed=seed, **settings) == [a, c]
    assert len({llm.generate("从前", **settings) for _ in range(3)}) > 1


# --- Likelihood ----------------------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_a_plain_computation(llm):
    for text in ("小兔子说：“天气真好。”", "a", story(3, 5).text[:40]):
        ids = torch.tensor([llm.tokenizer.encode(text, bos=True)])
        nll = F.cross_entropy(llm.model(ids[:, :-1])[0].double(), ids[0, 1:], reduction="sum").item()
        assert llm.perplexity(text) == pytest.approx(math.exp(nll / (ids.shape[1] - 1)), rel=1e-4)
        assert llm.bits_per_char(text) == pytest.approx(nll / math.log(2) / len(text), rel=1e-4)


@pytest.mark.parametrize("n", [64, 65, 95, 96, 97, 200])  # tokens to predict; the context is 64
def test_a_long_text_is_read_in_windows_half_a_context_apart(n, llm):
    text = "".join(string.ascii_letters[i] for i in torch.randint(52, (n,)).tolist())  # one token per letter
    ids = torch.tensor(llm.tokenizer.encode(text, bos=True))
    assert len(ids) == n + 1
    total = 0.0
    for i in range(1, n + 1):  # ids[i], predicted from its window
        start = 0 if i <= 64 else min((i - 65) // 32 * 32 + 32, n - 64)
        logits = llm.model(ids[None, start:i])[0, -1].double()
        total += F.cross_entropy(logits, ids[i]).item()
        assert i <= 64 or i - start > 32
    assert llm.perplexity(text) == pytest.approx(math.exp(total / n), rel=1e-4)


# --- Bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": "小猫" * 100}, "context 64; shorten it to 63 or fewer"),
        ({"prompt": ["从前", "小猫" * 100]}, "context 64"),
        ({"prompt": []}, "no prompts"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": -0.1}, r"must be in \[0, 1\]"),
        ({"top_k": 0}, "top_k is 0"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ["。", ""]}, "none of them empty"),
        ({"prompt": ["a", "b"], "seed": [1]}, "1 seeds for 2 prompts"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path, tokenizer):
    llm = LLM.load(save(tmp_path / "m", tokenizer), device="cpu")
    with pytest.raises(ValueError, match=message):
        llm.generate(**settings)
    if isinstance(settings.get("prompt", ""), str):
        with pytest.raises(ValueError, match=message):
            llm.stream(**settings)  # at the call, not at the first piece


def test_an_empty_text_has_no_perplexity(tmp_path, tokenizer):
    llm = LLM.load(save(tmp_path / "m", tokenizer), device="cpu")
    with pytest.raises(ValueError, match="empty"):
        llm.perplexity("")


def test_half_a_surrogate_pair_is_refused(tmp_path, tokenizer):
    llm = LLM.load(save(tmp_path / "m", tokenizer), device="cpu")
    for measure in (llm.generate, llm.perplexity, llm.bits_per_char):
        with pytest.raises(ValueError, match=r"character 3 of the text .*\\ud800.* is not valid Unicode"):
            measure("小兔\ud800")


def test_a_folder_that_is_not_a_checkpoint_is_refused(tmp_path, tokenizer):
    folder = save(tmp_path / "run" / "step-00000002", tokenizer)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        LLM.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty is not a checkpoint: config.json is missing \(found: nothing\)"):
        LLM.load(tmp_path / "empty")
    being_written = shutil.copytree(folder, tmp_path / "run" / ".step-00000004.0123abcd.tmp")
    with pytest.raises(ValueError, match="which is being written or was left"):
        LLM.load(being_written)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        LLM.load(folder)
    with pytest.raises(ValueError, match="device 'tpu'"):
        LLM.load(folder, device="tpu")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        LLM.load(folder, device="cpu", dtype=torch.int8)


def test_a_decoder_refuses_what_it_cannot_hold(tmp_path, tokenizer):
    model = LLM.load(save(tmp_path / "m", tokenizer), device="cpu").model
    with pytest.raises(ValueError, match="capacity is 65"):
        Decoder(model, slots=1, capacity=65)
    decoder = Decoder(model, slots=1, capacity=4)
    assert decoder.step() == {}
    for ids in ([], [1] * 4):
        with pytest.raises(ValueError, match="between 1 and 3 fit"):
            decoder.add(Sequence(ids, Sampling()))
    sequence = Sequence([0, 5, 6], Sampling(seed=1))
    decoder.add(sequence)
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        decoder.add(Sequence([0], Sampling()))
    with pytest.raises(ValueError, match="not among the 1"):
        decoder.remove(Sequence([0, 5, 6], Sampling(seed=1)))
    for _ in range(2):
        decoder.step()
    with pytest.raises(ValueError, match="fill their 4 tokens"):
        decoder.step()
    decoder.remove(sequence)
    assert decoder.free == 1


# --- Compiling -----------------------------------------------------------------------------------------------------------------------


def test_a_missing_or_broken_compiler_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert "could not" in str(native.load_library())
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nprintf 'native.c: In function x:\\nnative.c:4:2: error: impossible\\n' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert "(native.c:4:2: error: impossible)" in str(native.load_library())
    monkeypatch.setattr(c_compiler.shutil, "which", lambda name: None)
    assert "no C compiler" in str(native.load_library())
    assert list(tmp_path.rglob("*.so")) == []


def test_the_library_is_compiled_once_and_kept(tmp_path, monkeypatch):
    if problem := native.problem():
        pytest.skip(problem)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not isinstance(native.load_library(), str)
    kept = list((tmp_path / "tritale").iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".so"
    with monkeypatch.context() as patch:
        patch.setattr(c_compiler.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
        assert not isinstance(native.load_library(), str)
    complete = kept[0].read_bytes()
    kept[0].unlink()  # a new file: this process has mapped the old one
    kept[0].write_bytes(complete[:8000])
    assert not isinstance(native.load_library(), str)
    assert kept[0].read_bytes() == complete


def test_it_compiles_for_an_x86_without_avx(tmp_path, monkeypatch, folder):
    if native.problem() or platform.machine() != "x86_64":
        pytest.skip("not an x86 with a compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", tuple(flag.replace("=native", "=x86-64-v2") for flag in native.FLAGS))
    plain = native.load_library()
    assert not isinstance(plain, str), plain
    llm, prompts = LLM.load(folder, device="cpu"), random_prompts(7)
    settings: SamplingSettings = {"temperature": 0, "max_new_tokens": 10}
    expected = llm.generate(prompts, **settings)
    monkeypatch.setattr(native, "_library", lambda: plain)
    assert llm.generate(prompts, **settings) == [llm.generate(prompt, **settings) for prompt in prompts] == expected


# --- The boundary of native.c --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokens", torch.tensor([3, 600])),
        ("tokens", torch.tensor([-1, 3])),
        ("tokens", torch.tensor([3.0, 4.0])),
        ("tokens", torch.tensor([3, 4], dtype=torch.int32)),
        ("rows", torch.tensor([0, 2])),
        ("rows", torch.tensor([-1, 0])),
        ("rows", torch.tensor([0])),
        ("positions", torch.tensor([0, 16])),
        ("positions", torch.tensor([0, -1])),
        ("last", torch.tensor([2])),
        ("last", torch.tensor([1, 0])),
        ("last", torch.tensor([1, 1])),
        ("last", torch.arange(6)[::3]),
        ("cache", torch.zeros(2, 2, 2, 16, 2, 13)),
        ("cache", torch.zeros(2, 2, 2, 16, 2, 14, dtype=torch.float64)),
        ("cache", torch.zeros(2, 2, 2, 2, 16, 14).transpose(3, 4)),
        ("cache", torch.zeros(2, 2, 2, 65, 2, 14)),
    ],
)
def test_native_forward_refuses_what_is_out_of_range(name, value, tmp_path, tokenizer):
    if problem := native.problem():
        pytest.skip(problem)
    forward = native.NativeForward(LLM.load(save(tmp_path / "m", tokenizer), device="cpu").model)
    arguments = {
        "tokens": torch.tensor([3, 4]), "rows": torch.tensor([0, 0]), "positions": torch.tensor([0, 1]),
        "cache": torch.zeros(2, 2, 2, 16, 2, 14), "last": torch.tensor([1]),
    }  # fmt: skip
    assert forward(**arguments).isfinite().all()
    with pytest.raises(ValueError, match="capacity out of range" if value.shape[3:4] == (65,) else name):
        forward(**arguments | {name: value})


def test_native_forward_refuses_tensors_that_do_not_fit_the_config(tmp_path, tokenizer):
    if problem := native.problem():
        pytest.skip(problem)
    model = LLM.load(save(tmp_path / "m", tokenizer), device="cpu").model
    model.embedding = torch.nn.Parameter(model.embedding[:500])
    with pytest.raises(ValueError, match=r"its config needs \(600, 48\)"):
        native.NativeForward(model)
    with pytest.raises(ValueError, match="2-d fp32"):
        native.argmax(torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("token_id", [600, 5000, 2**31])
def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(token_id, tmp_path, tokenizer):
    folder = save(tmp_path / "m", tokenizer)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    longest = max(vocab, key=lambda entry: vocab[entry])
    assert vocab[longest] == 599
    vocab[longest] = token_id
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"of its 600 ids, 599 is missing"):
        LLM.load(folder, device="cpu")


# --- The folder of the compiled library ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", ["folder", "parent", "file", "link", "relative"])
def test_a_library_that_another_user_could_write_is_not_loaded(planted, tmp_path, monkeypatch):
    if (problem := native.problem()) or not hasattr(os, "getuid"):
        pytest.skip(problem or "no owners of files here")
    tmp_path.chmod(0o755)
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    native.load_library()
    (kept,) = (cache / "tritale").iterdir()
    if planted == "folder":
        (cache / "tritale").chmod(0o777)
    elif planted == "parent":
        cache.chmod(0o777)
    elif planted == "file":
        kept.chmod(0o777)
    elif planted == "link":
        (cache / "tritale").rename(tmp_path / "elsewhere")
        (cache / "tritale").symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        monkeypatch.setenv("HOME", "home")
    compiled, compile = [], c_compiler._compile
    monkeypatch.setattr(c_compiler, "_compile", lambda *args: compiled.append(args) or compile(*args))
    assert not isinstance(native.load_library(), str)
    assert compiled  # anew, elsewhere or in place of the file
    if planted == "file":
        assert not kept.stat().st_mode & 0o022


# --- The lines of a litgpt user ------------------------------------------------------------------------------------------------------


def test_model_is_a_keyword_and_a_run_means_its_newest_checkpoint(tmp_path, tokenizer):
    for step in (1, 2):
        save(tmp_path / "run" / f"step-0000000{step}", tokenizer)
    newest = LLM.load(model=str(tmp_path / "run" / "step-00000002"), device="cpu")
    assert torch.equal(LLM.load(model=str(tmp_path / "run"), device="cpu").model.embedding, newest.model.embedding)


def test_top_p_0_takes_the_most_likely_token(llm):
    prompts = random_prompts(5)
    expected = llm.generate(prompts, temperature=0, max_new_tokens=12)
    assert llm.generate(prompts, temperature=0.8, top_p=0, top_k=30, max_new_tokens=12) == expected
    assert llm.generate(prompts[0], top_p=0.0, max_new_tokens=12) == expected[0]


@pytest.mark.parametrize("folder", ["run/step-00001000", "run"])
def test_a_litgpt_checkpoint_is_named_with_the_command_that_converts_it(folder, tmp_path):
    checkpoint = tmp_path / "run" / "step-00001000"
    checkpoint.mkdir(parents=True)
    for name in ("lit_model.pth", "model_config.yaml", "tokenizer.json", "config.json"):
        (checkpoint / name).write_text("{}")
    with pytest.raises(
        ValueError, match=rf"is a litgpt checkpoint; convert it first: tritale import .*{folder} --from litgpt --out"
    ) as error:
        LLM.load(tmp_path / folder)
    assert "remove" not in str(error.value) and "delete" not in str(error.value)


# --- Threads -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "30000 1"),
        ({"GOMP_SPINCOUNT": "7", "THP_MEM_ALLOC_ENABLE": "0"}, "7 0"),
        ({"OMP_WAIT_POLICY": "active"}, "None 1"),
    ],
)
@pytest.mark.parametrize("entry", ["tritale", "tritale.cli.main", "tritale.kernels", "train", "tests.conftest"])
def test_every_entry_point_limits_spinning_and_asks_for_large_pages_before_torch_is_imported(entry, given, expected):
    code = f"""
import importlib.abc, os, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("THP_MEM_ALLOC_ENABLE"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
import {entry}
import torch
"""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | given
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=environment, cwd=REPOSITORY)
    assert result.stdout == f"{expected}\n", result.stderr


def test_passes_take_the_number_of_threads_that_is_faster_at_present():
    def seconds_of(seconds: dict[int, float]) -> float:
        """How long 2,000 passes took, and the last number of threads."""
        total = 0.0
        for i in range(2000):
            last = 20 if i % 10 == 9 else 1  # each tenth pass is interrupted
            total += (spent := seconds[choice.n_thread] * last)
            choice.record(spent)
        return total

    choice, quiet, busy = native.ThreadChoice(2), {1: 1.0, 2: 0.8}, {1: 1.0, 2: 10.0}
    fastest = 2000 * (0.9 + 0.1 * 20)
    assert seconds_of(quiet) < 1.05 * 0.8 * fastest and choice.n_thread == 2
    assert seconds_of(busy) < 1.2 * fastest and choice.n_thread == 1
    assert seconds_of(quiet) < 1.05 * 0.8 * fastest and choice.n_thread == 2
    alone = native.ThreadChoice(1)
    for _ in range(100):
        alone.record(1.0)
    assert alone.n_thread == 1


def test_logits_do_not_depend_on_the_number_of_threads(tmp_path, tokenizer):
    if native.problem():
        pytest.skip("native.c does not compile here")
    forward, found = native.NativeForward(LLM.load(save(tmp_path / "m", tokenizer), device="cpu").model), []
    c = forward._model
    for n_thread in (1, 2, 3):
        forward._threads = {3: native.ThreadChoice(n_thread)}
        cache = torch.zeros(c.n_layer, 2, 1, c.context, c.n_kv_head, c.head_dim)
        n = torch.arange(5)
        found.append(forward(n, torch.zeros_like(n), n, cache, n).clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
