"""A checkpoint on disk is a Hugging Face model, and it is complete or absent."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritale.common.files import atomic_folder
from tritale.model import GPT, GPTConfig, load_model
from tritale.model.checkpoint import check_files, read_json, save_model, write_checksums

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
def test_hugging_face_gives_the_same_logits(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = random_model(**SHAPES[shape])
    assert model.config.n_head * model.config.head_dim != model.config.width
    folder = write(tmp_path / "step-00000001", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == ("Qwen3" if "qwen3" in shape else "Mistral") + "ForCausalLM"
    tokens = torch.randint(512, (2, 50))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_loading_gives_the_same_model(shape, tmp_path):
    model = random_model(**SHAPES[shape])
    again = load_model(write(tmp_path / "m", model))
    assert again.config == model.config
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    tokens = torch.randint(512, (1, 30))
    assert torch.equal(model(tokens), again(tokens))  # the rotary tables are not on disk
    half = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert torch.equal(half.embedding, model.embedding.bfloat16()) and torch.equal(half.cos, model.cos)
    assert (half.head is half.embedding) == model.config.tie_embeddings


def test_a_failed_save_leaves_the_earlier_checkpoint_complete(tmp_path):
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
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list, not an object; the checkpoint is damaged"):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": ["mistral"]}, "model_type"),
        ({"vocab_size": "x"}, "vocab_size is 'x', not an integer from 1"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"head_dim": 14.0}, r"head_dim is 14\.0"),
        ({"sliding_window": "5"}, "sliding_window is '5'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, not an integer from 1 to 1000"),
        ({"num_attention_heads": 10**9}, "num_attention_heads"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": []}, None),
        ({"rope_parameters": "x"}, "rope_parameters is 'x', not an object"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is None, not a number of at least 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"initializer_range": "x"}, "initializer_range is 'x'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(change, message, tmp_path):
    folder = write(tmp_path / "m", random_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if message is None:  # empty: rope_theta is read from the other key
        assert load_model(folder).config.rope_theta == 3000
        return
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_another_architecture_is_refused(tmp_path):
    folder = write(tmp_path / "m", random_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type is 'gpt2'; supported are mistral, qwen3"):
        load_model(folder)


def test_a_newer_format_is_refused_and_one_without_a_number_is_format_1(tmp_path):
    folder = write(tmp_path / "m", random_model())
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tritale_format") == 1
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder)
    for value, message in (
        (2, "format 2; this version of tritale reads formats up to 1: install a newer version"),
        ("1", "format '1'"),
        (0, "format 0"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"tritale_format": value}))
        with pytest.raises(ValueError, match=message):
            load_model(folder)


def test_a_flipped_bit_in_any_file_is_found(tmp_path, seed):
    folder = write(tmp_path / "m", random_model())
    write_checksums(folder)
    check_files(folder)
    model, random_bit = load_model(folder), random.Random(seed)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for _ in range(10):
            at = random_bit.randrange(8 * len(original))
            data = bytearray(original)
            data[at // 8] ^= 1 << at % 8
            path.write_bytes(data)
            with pytest.raises((ValueError, FileNotFoundError)):
                check_files(folder)
            if path.name in ("config.json", "model.safetensors"):
                with pytest.raises(ValueError, match="has changed since it was written"):
                    load_model(folder)
        path.write_bytes(original)
    assert torch.equal(load_model(folder).embedding, model.embedding)


@pytest.mark.parametrize("damage", ["empty", "missing", "half", "other"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "checksums.json"])
def test_a_damaged_file_is_found_by_its_checksum(name, damage, tmp_path):
    folder = write(tmp_path / "m", random_model())
    write_checksums(folder)
    path = folder / name
    data = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "other": b"{}"}[damage])
    if name == "checksums.json" and damage == "missing":  # as in checkpoints of earlier versions
        check_files(folder)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=name.split(".")[0]):
        check_files(folder)
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.clear(), "has nothing for model.embed_tokens.weight"),
        (lambda state: state.pop("model.norm.weight"), "has nothing for model.norm.weight"),
        (lambda state: state.update({"x": torch.zeros(1)}), r"does not have: \['x'\]"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(49)}), r"has \(49,\) for model.norm.weight, the model needs \(48,\)"),
        (
            lambda state: state.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}),
            r"model.norm.weight in torch.int8; supported",
        ),
        (lambda state: state.update({"model.norm.weight": torch.zeros(48).double()}), r"in torch.float64; supported are torch.float32"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(3)}), r"lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(change, message, tmp_path):
    folder = write(tmp_path / "m", random_model(tie_embeddings=False))
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        folder = write(tmp_path / "m", random_model())
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == dict.fromkeys(os.listdir(folder), mode)


def test_deep_json_is_refused(tmp_path):
    folder = write(tmp_path / "m", random_model())
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(folder, "config.json")
