"""A checkpoint on disk is a Hugging Face model, whole or not there."""

import json

import pytest
import torch

from tritale.data.stories import story
from tritale.data.tokenizer import Tokenizer
from tritale.model import GPT, LLM, GPTConfig, load_model
from tritale.model.checkpoint import atomic_folder, save_model
from tritale.model.generate import sampling_probabilities

SHAPES = {
    "mistral": {},
    "mistral-window-untied": {"window": 5, "tie_embeddings": False},
    "qwen3": {"qk_norm": True},
    "qwen3-window-untied": {"qk_norm": True, "window": 5, "tie_embeddings": False},
}


def random_model(**changes) -> GPT:
    model = GPT(GPTConfig.preset("tiny", n_head=4, n_kv_head=2, head_dim=14, rope_theta=3000.0, **changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def write(folder, model):
    with atomic_folder(folder) as temporary:
        save_model(temporary, model, eos_token_id=0, pad_token_id=3)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_face_gives_the_same_logits(shape, tmp_path, seed):
    transformers = pytest.importorskip("transformers")
    model = random_model(**SHAPES[shape])
    assert model.config.n_head * model.config.head_dim != model.config.width
    folder = write(tmp_path / "step-00000001", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == ("Qwen3" if "qwen3" in shape else "Mistral") + "ForCausalLM"
    tokens = torch.randint(512, (2, 50))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_loading_gives_the_same_model(shape, tmp_path, seed):
    model = random_model(**SHAPES[shape])
    again = load_model(write(tmp_path / "m", model))
    assert again.config == model.config
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_failed_save_leaves_the_earlier_checkpoint_whole(tmp_path, seed):
    model = random_model()
    folder = write(tmp_path / "m", model)
    with pytest.raises(OSError, match="No space"), atomic_folder(folder) as temporary:
        (temporary / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert torch.equal(load_model(folder).embedding, model.embedding)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    folder = write(tmp_path / "m", random_model())
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(folder)


def test_a_damaged_file_is_named(tmp_path):
    folder = write(tmp_path / "m", random_model())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_model(folder)


def test_another_architecture_is_refused(tmp_path):
    folder = write(tmp_path / "m", random_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' is not one this project reads"):
        load_model(folder)


@pytest.fixture(scope="module")
def llm() -> LLM:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train((story(1, i).text for i in range(200)), 512)
    return LLM(GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size)), tokenizer)


def test_a_seed_repeats_and_seeds_differ(llm):
    texts = [llm.generate("从前", seed=seed, max_new_tokens=30) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_zero_is_greedy(llm):
    ids = llm.tokenizer.encode("小猫", bos=True)
    for _ in range(10):
        ids.append(llm.model(torch.tensor([ids]))[0, -1].argmax().item())
    expected = llm.tokenizer.decode(ids[1:])
    assert "小猫" + llm.generate("小猫", temperature=0, max_new_tokens=10) == expected


def test_generation_stops_at_the_end_of_the_context(llm):
    calls = []
    hook = llm.model.register_forward_hook(lambda *_: calls.append(1))  # one call a token
    while len(calls) < 64 - len(llm.tokenizer.encode("小猫", bos=True)):  # until a text that did not end by itself
        calls.clear()
        llm.generate("小猫", max_new_tokens=10_000)
    hook.remove()
    assert len(calls) == 64 - len(llm.tokenizer.encode("小猫", bos=True))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": "小猫" * 100}, "context 64"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "temperature=0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, llm):
    with pytest.raises(ValueError, match=message):
        llm.generate(**settings)


@pytest.mark.parametrize("top_k, top_p", [(5, 1.0), (None, 0.7), (7, 0.6), (None, 1.0)])
def test_filters_are_hugging_faces(top_k, top_p, seed):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(3, 40) * 2
    processors = [transformers.TemperatureLogitsWarper(0.7)]
    processors += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    processors += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs = logits
    for processor in processors:
        theirs = processor(None, theirs)
    torch.testing.assert_close(sampling_probabilities(logits, temperature=0.7, top_k=top_k, top_p=top_p), theirs.softmax(-1))
