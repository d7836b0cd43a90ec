"""The target programs read the exports and give the same ids and logits. Without llama.cpp, gguf's own reader checks the file."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import REPOSITORY

from tritale.cli.main import main
from tritale.common.errors import UserError
from tritale.data.chat import chat_prompt
from tritale.data.tokenizer import Tokenizer
from tritale.inference import LLM
from tritale.model import GPT, GPTConfig, consumers
from tritale.model.checkpoint import hf_state, save_model
from tritale.model.consumers import check_gguf, check_hf, check_litgpt, llama_cpp
from tritale.model.export import export_gguf, export_hf, export_litgpt, gguf_ids, gguf_vocabulary
from tritale.stories.generator import story


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([story(3, i).text for i in range(200)], 700)


# Heads times head size is not the width; grouped queries; both families; tied and not.
SHAPES = {
    "mistral": dict(qk_norm=False, tie_embeddings=True),
    "qwen3": dict(qk_norm=True, tie_embeddings=True),
    "untied": dict(qk_norm=False, tie_embeddings=False),
}


def checkpoint(folder, tokenizer, **changes):
    """A checkpoint with random weights and norms, large enough that the logits differ."""
    config = GPTConfig(tokenizer.vocab_size, n_layer=2, n_head=4, n_kv_head=2, head_dim=32, width=96, mlp_width=160, context=96)
    model = GPT(replace(config, rope_theta=20_000.0, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    folder.mkdir()
    save_model(folder, model, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return folder


@pytest.fixture(params=list(SHAPES))
def model_folder(request, tmp_path, tokenizer):
    return checkpoint(tmp_path / "step-00000001", tokenizer, **SHAPES[request.param])


def prompt_ids(llm: LLM) -> torch.Tensor:
    return torch.tensor([llm.encode_prompt("汤姆和杰瑞是好朋友，他们 love 龘。")])


def test_litgpt_loads_the_export_and_gives_the_same_logits(model_folder, tmp_path):
    litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed (pip install --no-deps litgpt lightning)")
    llm, out = LLM.load(model_folder, device="cpu"), tmp_path / "lit"
    main(["export", str(model_folder), "--to", "litgpt", "--out", str(out)])
    theirs = litgpt.GPT(litgpt.Config.from_file(out / "model_config.yaml")).eval()
    theirs.load_state_dict(torch.load(out / "lit_model.pth", weights_only=True))
    ids = prompt_ids(llm)
    assert litgpt.Tokenizer(out).encode("汤姆和杰瑞是好朋友，他们 love 龘。").tolist() == ids[0].tolist()
    with torch.no_grad():
        ours, found = llm.model(ids), theirs(ids)
    assert ours.std() > 0.1
    torch.testing.assert_close(found, ours, atol=1e-3, rtol=0)


def test_the_lines_of_a_litgpt_user_run_on_the_export(tmp_path, tokenizer):
    litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed (pip install --no-deps litgpt lightning)")
    out = tmp_path / "step-00001000"
    ours = LLM.load(checkpoint(tmp_path / "step-00000001", tokenizer), device="cpu")
    export_litgpt(ours.model, ours.tokenizer, out)
    llm = litgpt.LLM.load(model=str(out))
    text = llm.generate(prompt="汤姆和杰瑞是好朋友，", max_new_tokens=20, temperature=0.8, top_p=0.9, top_k=30)
    assert isinstance(text, str)


def test_lit_model_holds_only_plain_tensors_and_each_once(model_folder, tmp_path):
    llm = LLM.load(model_folder, device="cpu")
    export_litgpt(llm.model, llm.tokenizer, tmp_path / "lit")
    state = torch.load(tmp_path / "lit" / "lit_model.pth", weights_only=True)
    assert all(type(t) is torch.Tensor for t in state.values())
    n_parameters = sum(p.numel() for p in llm.model.parameters())
    assert (tmp_path / "lit" / "lit_model.pth").stat().st_size < 4 * n_parameters + 50_000  # a tied head is stored once
    assert torch.equal(state["lm_head.weight"], llm.model.head)


def read_gguf(path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: t.data.reshape(list(reversed(t.shape.tolist()))) for t in reader.tensors}


def gguf_logits(fields: dict, tensors: dict, tokens: list[int]) -> np.ndarray:
    """llama.cpp's definition of the model in float64, from the file alone. Rotary pairs are adjacent in "llama", halves in "qwen3"."""
    arch = fields["general.architecture"]
    value = lambda name: fields[f"{arch}.{name}"]
    n_head, n_kv, d = value("attention.head_count"), value("attention.head_count_kv"), value("attention.key_length")
    eps, theta, n = value("attention.layer_norm_rms_epsilon"), value("rope.freq_base"), len(tokens)
    norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w
    angles = np.arange(n)[:, None] * theta ** (-np.arange(0, d, 2) / d)  # (n, D/2)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotate(x):  # (n, H, D)
        first, second = (x[..., 0::2], x[..., 1::2]) if arch == "llama" else (x[..., : d // 2], x[..., d // 2 :])
        a, b = first * cos - second * sin, first * sin + second * cos
        return np.stack([a, b], -1).reshape(x.shape) if arch == "llama" else np.concatenate([a, b], -1)

    w = {name: t.astype(np.float64) for name, t in tensors.items()}
    x = w["token_embd.weight"][tokens]
    for i in range(value("block_count")):
        of = lambda name, i=i: w[f"blk.{i}.{name}.weight"]
        h = norm(x, of("attn_norm"))
        q, k, v = ((h @ of(f"attn_{name}").T).reshape(n, -1, d) for name in "qkv")
        if arch == "qwen3":
            q, k = norm(q, of("attn_q_norm")), norm(k, of("attn_k_norm"))
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, n_head // n_kv, axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(d) + np.triu(np.full((n, n), -np.inf), 1)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        a = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
        x = x + a @ of("attn_output").T
        h = norm(x, of("ffn_norm"))
        gate = h @ of("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ of("ffn_up").T)) @ of("ffn_down").T
    return norm(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T


def test_the_gguf_file_gives_the_same_logits(model_folder, tmp_path):
    llm, out = LLM.load(model_folder, device="cpu"), tmp_path / "model.gguf"
    pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
    main(["export", str(model_folder), "--to", "gguf", "--out", str(out)])
    fields, tensors = read_gguf(out)
    c, ids = llm.model.config, prompt_ids(llm)
    arch = "qwen3" if c.qk_norm else "llama"
    assert fields["general.architecture"] == arch and fields["tokenizer.ggml.model"] == "llama"
    sizes = {"context_length": c.context, "embedding_length": c.width, "feed_forward_length": c.mlp_width, "vocab_size": c.vocab_size}
    assert {name: fields[f"{arch}.{name}"] for name in sizes} == sizes
    assert fields[f"{arch}.rope.dimension_count"] == fields[f"{arch}.attention.value_length"] == c.head_dim
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == llm.tokenizer.eot_id
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_space_prefix"] is False
    assert len(fields["tokenizer.ggml.tokens"]) == len(tensors["token_embd.weight"]) == c.vocab_size
    assert ("output.weight" in tensors) is not c.tie_embeddings
    with torch.no_grad():
        ours = llm.model(ids)[0].double().numpy()
    np.testing.assert_allclose(gguf_logits(fields, tensors, ids[0].tolist()), ours, atol=1e-3)


def test_llama_cpp_encodes_to_the_same_ids(tokenizer, seed):
    pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size + 3)
    texts = vocabulary[0]
    assert len(texts) == len(set(texts)) == tokenizer.vocab_size + 3
    for text in [story(seed, i).text for i in range(150)] + ["龘 and <|endoftext|> 12 ……！！\n\n<0x41>", ""]:
        assert gguf_ids(text, vocabulary) == tokenizer.encode(text), text


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    """A tokenizer for text in which sentences are parted by one space or by two."""
    texts = [
        f"Once Tom met Anna. {n} said hello.{' ' * (1 + i % 2)}They played, and {n} went home." for i in range(300) for n in ("Tom", "Bo")
    ]
    return Tokenizer.train(texts, 500)


def varied_strings(n: int) -> list[str]:
    """Random strings of Chinese, English, digits, emoji, marks, spaces, runs of both, ▁, line ends and control characters."""
    parts = [
        *"从前有一只小兔子森林，。！？：“”…—龘𠮷", *("Tom", "Anna", " said", " hello.", " They", "played", " home"),
        "<|endoftext|>", "<0x41>", "▁", "▁They",
        " ", "  ", "   ", "    ", "\n", "\n\n", "\r\n", "\t", " \t ", "\u3000", "\u00a0", "\x00", "\x07", "\x1b", "\u200b", "\ufeff",
        "🐰", "👨‍👩‍👧", "é", "e\u0301", "12", "3.14", "……", "——", "！！！", "。。。。。", "-----", "\u0e2a\u0e27\u0e31", "\U000e0001",
    ]  # fmt: skip
    choose = lambda k: [parts[i] for i in torch.randint(len(parts), (k,)).tolist()]
    return ["".join(choose(1 + i % 12)) for i in range(n)]


def test_transformers_gives_the_same_ids_for_1000_strings(tmp_path, tokenizer, english):
    transformers = pytest.importorskip("transformers")
    for name, ours in (("chinese", tokenizer), ("english", english)):
        theirs = transformers.AutoTokenizer.from_pretrained(checkpoint(tmp_path / name, ours))
        for text in varied_strings(1000):
            ids = theirs(text, split_special_tokens=True)["input_ids"]
            assert ids == ours.encode(text, bos=True), text
            assert theirs.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_llama_cpp_gives_the_ids_of_gguf_ids_for_1000_strings(tmp_path, tokenizer, english):
    """They are ours but for ▁ and for words after several spaces, which `check_gguf` reports."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed (pip install xllamacpp)")
    pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
    for name, ours in (("chinese", tokenizer), ("english", english)):
        llm = LLM.load(checkpoint(tmp_path / name, ours), device="cpu")
        export_gguf(llm.model, ours, tmp_path / f"{name}.gguf", name="test")
        post, vocabulary = llama_cpp(tmp_path / f"{name}.gguf", 96), gguf_vocabulary(ours, ours.vocab_size)
        n_equal = 0
        for text in varied_strings(1000):
            theirs = post("tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]
            assert theirs == gguf_ids(text, vocabulary), text
            is_equal = theirs == ours.encode(text)
            assert is_equal or consumers.UNUSUAL.search(text), text
            n_equal += is_equal
        print(f"{name}: {n_equal} of 1000 equal")
        assert n_equal > 700


def test_llama_cpp_chats_as_we_do(tmp_path, tokenizer):
    """Its chat endpoint uses the exported template: the same ids before the answer, and the same answer."""
    pytest.importorskip("xllamacpp", reason="xllamacpp, llama.cpp as a wheel, is not installed (pip install xllamacpp)")
    pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
    llm = LLM.load(checkpoint(tmp_path / "model", tokenizer), device="cpu")
    llm.tokenizer.is_chat = True
    export_gguf(llm.model, llm.tokenizer, tmp_path / "model.gguf", name="test")
    post, messages = llama_cpp(tmp_path / "model.gguf", 96), [{"role": "user", "content": "\n写一个小兔的故事。 "}]
    text = post("apply-template", {"messages": messages})["prompt"]
    assert text.removeprefix("<|endoftext|>") == chat_prompt(messages)
    ids = post("tokenize", {"content": chat_prompt(messages), "add_special": True, "parse_special": True})["tokens"]
    assert ids == llm.encode_prompt(messages)
    answer = post("v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 8, "cache_prompt": False})
    text = answer["choices"][0]["message"]["content"].replace("\ufffd", "")  # for bytes that form no character, which we drop
    assert text == llm.chat(messages, temperature=0, max_new_tokens=8)
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("kind", ["hf", "litgpt", "gguf"])
def test_an_export_that_computes_something_else_is_refused(kind, model_folder, tmp_path, monkeypatch):
    """Each check fails when the model differs a little from the export, and when the tokenizer does."""
    package = {"hf": "transformers", "litgpt": "litgpt", "gguf": "xllamacpp"}[kind]
    pytest.importorskip(package)
    llm, out, texts = LLM.load(model_folder, device="cpu"), tmp_path / "out", [story(5, i).text for i in range(10)]
    writers = {
        "hf": lambda: export_hf(model_folder, out), "litgpt": lambda: export_litgpt(llm.model, llm.tokenizer, out),
        "gguf": lambda: export_gguf(llm.model, llm.tokenizer, out, name="test"),
    }  # fmt: skip
    writers[kind]()
    check = {"hf": check_hf, "litgpt": check_litgpt, "gguf": check_gguf}[kind]
    assert "the same logits" in check(out, llm.model, llm.tokenizer, texts)
    other = Tokenizer.train(texts[:5], 600)
    with pytest.raises(UserError, match=r"encodes \d+ of 10 documents differently"):
        check(out, llm.model, other, texts)
    with torch.no_grad():
        llm.model.norm[7] *= 1.02  # one of 96 channels
    with pytest.raises(UserError, match="computes other logits"):
        check(out, llm.model, llm.tokenizer, texts)
    out.rename(tmp_path / "first")
    monkeypatch.setattr(consumers, "TOLERANCE", -1)
    with pytest.raises(SystemExit, match="the export is removed"):
        main(["export", str(model_folder), "--to", kind, "--out", str(out)])
    assert not out.exists()


def test_documents_beyond_the_context_are_checked_without_a_warning_of_transformers(tiny_run, tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "tritale", "export", str(tiny_run), "--to", "hf", "--out", str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "generate runs" in done.stdout and done.stderr == ""


def test_a_program_that_cannot_be_imported_is_named(model_folder, tmp_path, monkeypatch, capsys):
    for package, kind in (("transformers", "hf"), ("litgpt", "litgpt"), ("xllamacpp", "gguf")):
        monkeypatch.setitem(sys.modules, package, None)
        main(["export", str(model_folder), "--to", kind, "--out", str(tmp_path / kind)])
        assert f"not checked, because {package} cannot be imported" in capsys.readouterr().out and (tmp_path / kind).exists()
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == sorted(p.name for p in model_folder.iterdir() if p.is_file())
    with pytest.raises(ImportError, match="litgpt"):
        check_litgpt(tmp_path / "litgpt", LLM.load(model_folder).model, Tokenizer.load(model_folder), [])


def test_an_export_that_is_not_possible_is_refused(tmp_path, tokenizer):
    folder, out = checkpoint(tmp_path / "step-00000001", tokenizer, window=8), tmp_path / "there"
    out.mkdir()
    with pytest.raises(SystemExit, match="exists and is not overwritten"):
        main(["export", str(folder), "--to", "litgpt", "--out", str(out)])
    with pytest.raises(SystemExit, match="exists and is not overwritten"):
        main(["export", str(folder), "--to", "gguf", "--out", str(out)])
    with pytest.raises(SystemExit, match="sliding window"):
        main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "model.gguf")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "there"] and not any(out.iterdir())
    with pytest.raises(SystemExit, match=r"config.json is missing"):
        main(["export", str(out), "--to", "litgpt", "--out", str(tmp_path / "lit")])
    with pytest.raises(SystemExit, match="is being written or was left"):
        main(["export", str(tmp_path / ".step-00000002.0123abcd.tmp"), "--to", "litgpt", "--out", str(tmp_path / "lit")])


def test_a_missing_package_gguf_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        main(["export", str(checkpoint(tmp_path / "m", tokenizer)), "--to", "gguf", "--out", str(tmp_path / "model.gguf")])
    assert not (tmp_path / "model.gguf").exists()


def test_strings_that_llama_cpp_encodes_differently_are_reported(tmp_path, tokenizer, english, seed, capsys):
    pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")
    vocabulary = gguf_vocabulary(english, english.vocab_size)
    assert gguf_ids("Tom said hello.  They", vocabulary) == english.encode("Tom said hello.  They")
    assert gguf_ids("Tom said hello.   They", vocabulary) != english.encode("Tom said hello.   They")
    main(["export", str(checkpoint(tmp_path / "english", english)), "--to", "gguf", "--out", str(tmp_path / "english.gguf")])
    assert "write single spaces in prompts" in capsys.readouterr().out
    model = LLM.load(tmp_path / "english", device="cpu").model
    said = check_gguf(tmp_path / "english.gguf", model, english, ["hello.   They", "Tom  and Anna", "▁They"])
    assert "WARNING: it encodes 2 of 3 documents differently, for example 'hello.   They'" in said
    usual = [story(seed, i).text for i in range(20)]
    model = LLM.load(checkpoint(tmp_path / "chinese", tokenizer), device="cpu").model
    export_gguf(model, tokenizer, tmp_path / "chinese.gguf", name="test")
    assert "WARNING" not in check_gguf(tmp_path / "chinese.gguf", model, tokenizer, usual)


def test_the_gguf_file_has_a_template_that_changes_nothing(tmp_path, tokenizer):
    jinja2 = pytest.importorskip("jinja2")
    main(["export", str(checkpoint(tmp_path / "m", tokenizer)), "--to", "gguf", "--out", str(tmp_path / "m.gguf")])
    template = jinja2.Template(read_gguf(tmp_path / "m.gguf")[0]["tokenizer.chat_template"])
    assert template.render(messages=[{"role": "user", "content": "从前，"}], add_generation_prompt=True) == "从前，"


def test_litgpt_converts_the_export_back_to_hugging_face(model_folder, tmp_path, capsys):
    pytest.importorskip("litgpt", reason="litgpt is not installed (pip install --no-deps litgpt lightning)")
    from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint  # pyright: ignore[reportMissingImports] (optional)

    main(["export", str(model_folder), "--to", "litgpt", "--out", str(tmp_path / "lit")])
    assert "checked: litgpt gives the same ids for " in capsys.readouterr().out
    convert_lit_checkpoint(tmp_path / "lit", tmp_path / "back")
    state = torch.load(tmp_path / "back" / "model.pth", weights_only=True)
    for name, tensor in hf_state(LLM.load(model_folder, device="cpu").model).items():
        assert torch.equal(state[name], tensor), name


def test_transformers_reads_a_checkpoint_and_generates(model_folder, tokenizer):
    """transformers 4.57 fails with a list of extra_special_tokens; both need left padding and no token_type_ids for `generate`."""
    config = json.loads((model_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "extra_special_tokens" not in config and config["padding_side"] == "left" and "token_type_ids" not in config["model_input_names"]
    transformers = pytest.importorskip("transformers")
    theirs, llm = transformers.AutoTokenizer.from_pretrained(model_folder), LLM.load(model_folder, device="cpu")
    inputs = theirs(["小兔", "从前有一只小兔子"], return_tensors="pt", padding=True)
    assert inputs["input_ids"][1].tolist() == tokenizer.encode("从前有一只小兔子", bos=True) and inputs["attention_mask"][0, 0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    cut = lambda ids: ids[: ids.index(tokenizer.eot_id)] if tokenizer.eot_id in ids else ids
    ours = llm.complete(["小兔", "从前有一只小兔子"], temperature=0, max_new_tokens=8)
    assert [cut(ids) for ids in generated] == [completion.tokens for completion in ours]
    ids = prompt_ids(llm)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llm.model(ids), atol=1e-4, rtol=0)
