"""Imported checkpoints compute what the original program computes, and other architectures are refused."""

import json
import shutil

import pytest
import tokenizers
import torch
import yaml
from safetensors.torch import load_file

from tritale.cli.main import main
from tritale.data.tokenizer import Tokenizer
from tritale.inference import LLM
from tritale.model import GPT, GPTConfig
from tritale.model.checkpoint import hf_state
from tritale.model.export import export_litgpt
from tritale.stories.generator import story

TEXT = "从前，有一只 little 小兔子。  It said: “龘🐰!”\n"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [story(3, i).text for i in range(100)] + ["Once upon a time there was a little rabbit. It said hello."] * 20


def save_foreign_tokenizer(folder, texts, kind: str) -> tokenizers.Tokenizer:
    """A byte-level tokenizer as Qwen has it, or one with ▁ and byte fallback as Llama has it."""
    special = ["<pad>", "<s>", "</s>"]
    if kind == "byte-level":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token=None))
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        backend.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        )
        alphabet, special = [], [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return backend


@pytest.mark.parametrize("family, kind", [("Llama", "spaces"), ("Mistral", "spaces"), ("Qwen3", "byte-level")])
def test_a_hugging_face_model_gives_the_same_completions(family, kind, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    source.mkdir()
    backend = save_foreign_tokenizer(source, texts, kind)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=backend.get_vocab_size() + 5, head_dim=12, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=family == "Qwen3", **sizes,
    )  # fmt: skip
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.bfloat16().save_pretrained(source, max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    theirs.save_pretrained(shutil.copytree(source, tmp_path / "one", ignore=shutil.ignore_patterns("model*")))
    for folder in (source, tmp_path / "one"):
        with pytest.raises(ValueError, match=r"tritale import .* --from hf --out"):
            LLM.load(folder)
    main(["import", str(source), "--from", "hf", "--out", str(tmp_path / "out")])
    llm, theirs = LLM.load(tmp_path / "out", device="cpu"), transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = llm.encode_prompt(TEXT)
    assert ids == backend.encode(TEXT).ids and llm.tokenizer.decode(ids) == TEXT
    torch.testing.assert_close(llm.model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-3, rtol=1e-3)
    unnamed = list(range(backend.get_vocab_size(), config.vocab_size))  # ids that the tokenizer lacks; LLM never gives them
    greedy = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": unnamed}
    out = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **greedy)[0, len(ids) :].tolist()
    n = out.index(2) if 2 in out else len(out)
    assert llm.complete([TEXT], top_p=0, max_new_tokens=10)[0].tokens == out[:n]


@pytest.fixture
def lit(tmp_path):
    """(our model, a litgpt run with two equal checkpoints of it)"""
    tokenizer = Tokenizer.train([story(3, i).text for i in range(100)], 600)
    model = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, n_head=4, n_kv_head=2, head_dim=14, tie_embeddings=False))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for step in (1000, 2000):
        export_litgpt(model, tokenizer, tmp_path / "lit" / f"step-{step:08d}")
    return model, tmp_path / "lit"


@pytest.mark.parametrize("form", ["plain", "pretrain", "before 0.5.4", "no zip file"])
def test_the_lines_of_a_litgpt_user_run_on_an_imported_run(form, lit, tmp_path, capsys):
    model, run = lit
    for path in run.glob("*/lit_model.pth"):
        state = torch.load(path, weights_only=True)
        if form == "before 0.5.4":  # q, k, v of each group together
            for i in range(2):
                q, k, v = state.pop(f"transformer.h.{i}.attn.qkv.weight").split([56, 28, 28])
                groups = torch.cat([q.view(2, 28, 48), k.view(2, 14, 48), v.view(2, 14, 48)], dim=1)
                state[f"transformer.h.{i}.attn.attn.weight"] = groups.reshape(112, 48)
        torch.save(state, path, _use_new_zipfile_serialization=form != "no zip file")
        if form == "pretrain":
            torch.save({"model": {f"_orig_mod.{k}": v for k, v in state.items()}, "iter_num": 3}, path)
    main(["import", str(run), "--from", "litgpt", "--out", str(tmp_path / "out")])
    assert "step-00002000 is written" in capsys.readouterr().out
    for i in range(1, 3):
        llm = LLM.load(model=f"{tmp_path}/out/step-{i * 1000:08d}")
        assert all(torch.equal(a, b) for a, b in zip(hf_state(llm.model).values(), hf_state(model).values(), strict=True))
        text = llm.generate(prompt="汤姆和杰瑞是好朋友，", max_new_tokens=50, temperature=0.8, top_p=0, top_k=30)
        assert text == llm.generate("汤姆和杰瑞是好朋友，", max_new_tokens=50, temperature=0)
    weights = load_file(tmp_path / "out" / "step-00001000" / "model.safetensors")
    assert set(weights) == set(hf_state(model))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bias": True}, "bias is True; only False is supported"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name is 'LayerNorm'"),
        ({"rotary_percentage": 0.5}, r"rotary_percentage is 0\.5"),
        ({"rope_adjustments": {"factor": 8}}, "rope_adjustments"),
        ({"sliding_window_size": 8, "sliding_window_indices": [0, 1]}, "only some layers"),
        ({"n_head": None}, "not a litgpt config"),
        ({"n_embd": 64}, "which this architecture does not have"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, not an integer from 1 to 1000"),  # would take for ever
        ({"block_size": 10**12}, "block_size is 1000000000000, not an integer from 1 to 1048576"),
        ({"norm_eps": -1.0}, r"norm_eps is -1\.0, not a number of at least 0"),
        ({"rope_base": float("nan")}, "rope_base is nan, not a number"),
        ({"rope_local_base_freq": 1e4, "rope_indices": [0, 1]}, "rope_local_base_freq is 10000.0"),
    ],
)
def test_another_litgpt_architecture_is_refused(change, message, lit, tmp_path):
    folder = lit[1] / "step-00001000"
    path = folder / "model_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        main(["import", str(folder), "--from", "litgpt", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_imported_is_refused(lit, tmp_path):
    folder, out = lit[1] / "step-00001000", tmp_path / "out"
    refused = lambda *arguments: pytest.raises(SystemExit, match=arguments[0])
    run = lambda source, kind: main(["import", str(source), "--from", kind, "--out", str(out)])
    with refused("has no litgpt checkpoint"):
        run(tmp_path / "nowhere", "litgpt")
    with refused("has no .*safetensors"):
        run(folder, "hf")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    windows = {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    for change, message in (
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        (windows | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        (windows | {"layer_types": 5}, "layer_types is 5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', not true or false"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with refused(message):
            run(folder, "hf")

    class Evil:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path),))

    for content in (b"", b"x" * 100, {"model": Evil()}):
        torch.save(content, folder / "lit_model.pth") if isinstance(content, dict) else (folder / "lit_model.pth").write_bytes(content)
        with refused("more than plain tensors"):
            run(folder, "litgpt")
    lit_state = torch.load(lit[1] / "step-00002000" / "lit_model.pth", weights_only=True)
    for head, message in (
        (lit_state["lm_head.weight"].to_sparse(), "torch.sparse_coo"),
        (lit_state["lm_head.weight"].to("meta"), "values"),
    ):
        torch.save(lit_state | {"lm_head.weight": head}, folder / "lit_model.pth")
        with refused(message):
            run(folder, "litgpt")
    (folder / "model_config.yaml").write_text("a: " + "[" * 5000)
    with refused("RecursionError"):
        run(folder, "litgpt")
    (folder / "tokenizer.json").unlink()
    with refused("has no tokenizer.json; make one with transformers"):
        run(folder, "litgpt")
    out.mkdir()
    with refused("exists and is not overwritten"):
        run(lit[1] / "step-00002000", "litgpt")


def test_a_run_is_imported_as_far_as_possible_and_continued(lit, tmp_path, capsys):
    run, out = lit[1], tmp_path / "out"
    damaged = run / "step-00001000" / "lit_model.pth"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:5000])
    with pytest.raises(SystemExit, match="1 of 2 checkpoints could not be converted"):
        main(["import", str(run), "--from", "litgpt", "--out", str(out)])
    assert f"{damaged} is damaged" in capsys.readouterr().err and [p.name for p in out.iterdir()] == ["step-00002000"]
    damaged.write_bytes(content)
    main(["import", str(run), "--from", "litgpt", "--out", str(out)])
    said = capsys.readouterr().out
    assert "step-00002000 exists and is kept" in said and "step-00001000 is written" in said


def test_checkpoints_of_litgpt_itself_give_the_same_logits(texts, tmp_path, monkeypatch):
    """Written by the function that `litgpt pretrain` uses, with the optimizer's state."""
    pretrain = pytest.importorskip("litgpt.pretrain", reason="litgpt is not installed (pip install --no-deps litgpt lightning)")
    from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports] (optional)
    from litgpt import GPT as LitGPT  # pyright: ignore[reportMissingImports] (optional)
    from litgpt import Config  # pyright: ignore[reportMissingImports] (optional)

    monkeypatch.setattr("sys.argv", ["litgpt", "microstories"])  # from which litgpt writes hyperparameters.yaml
    tokenizer = Tokenizer.train(texts, 600)
    tokenizer.save(tmp_path / "tokenizer")
    config = Config(
        name="microstories", block_size=64,
        vocab_size=tokenizer.vocab_size, padded_vocab_size=tokenizer.vocab_size + 24, n_layer=2, n_head=4,
        n_query_groups=2, head_size=14, n_embd=48, intermediate_size=64, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        parallel_residual=False, bias=False, rotary_percentage=1.0, norm_eps=1e-5, rope_base=20_000,
    )  # fmt: skip
    fabric = Fabric(devices=1, accelerator="cpu", precision="32-true")
    model = fabric.setup(LitGPT(config))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.1))
    for step in (1000, 2000):
        ids = torch.tensor([tokenizer.encode(TEXT, bos=True)])
        fabric.backward(model(ids).square().mean())
        optimizer.step()
        state = {"model": model, "optimizer": optimizer, "train_dataloader": None, "iter_num": step, "step_count": step}
        pretrain.save_checkpoint(fabric, state, tmp_path / "tokenizer", tmp_path / "lit" / f"step-{step:08d}" / "lit_model.pth")
    main(["import", str(tmp_path / "lit"), "--from", "litgpt", "--out", str(tmp_path / "out")])
    llm = LLM.load(tmp_path / "out" / "step-00002000", device="cpu")
    with torch.no_grad():
        theirs = model(ids)
        assert llm.encode_prompt(TEXT) == ids[0].tolist() and theirs.std() > 0.1
        torch.testing.assert_close(llm.model(ids), theirs, atol=1e-4, rtol=1e-4)
