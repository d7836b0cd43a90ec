"""Adapters against their definition, against PEFT, and their files."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from tritale.common.errors import UserError
from tritale.kernels import linear_cross_entropy
from tritale.kernels.dispatch import has_triton
from tritale.model import GPT, GPTConfig, load_model
from tritale.model.checkpoint import Base, hf_state, load_adapter, merged_model, save_model, write_checksums
from tritale.model.lora import TARGETS, LoRALinear, adapter_state, add_adapters

SHAPES = {"mistral": {"tie_embeddings": False}, "qwen3": {"qk_norm": True}}
CHOICES = [TARGETS, ("v_proj", "q_proj"), ("up_proj", "o_proj", "down_proj")]


def plain_model(shape: str = "qwen3") -> GPT:
    model = GPT(GPTConfig.preset("tiny", n_head=4, n_kv_head=2, head_dim=14, **SHAPES[shape]))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def adapted(model: GPT, targets: Sequence[str] = TARGETS, rank: int = 3, alpha: float = 5.0) -> GPT:
    add_adapters(model, rank=rank, alpha=alpha, targets=targets)
    for module in (module for module in model.modules() if isinstance(module, LoRALinear)):
        for b in module.b:
            nn.init.normal_(b, std=0.2)
    return model


def write(folder: Path, model: GPT, base: Path | None = None) -> Path:
    folder.mkdir()
    save_model(folder, model, eos_token_id=0, pad_token_id=3, base=Base.at(base) if base else None)
    write_checksums(folder)
    return folder


def written(tmp_path: Path, shape: str = "qwen3", targets: Sequence[str] = TARGETS) -> tuple[GPT, Path, Path]:
    """(a model with adapters, the folder of its base, that of the adapter)"""
    model = plain_model(shape)
    base = write(tmp_path / "base", model)
    return model, base, write(tmp_path / "adapter", adapted(model, targets), base)


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
def test_a_fresh_adapter_changes_no_bit_and_only_adapters_are_trained(targets):
    model, tokens = plain_model(), torch.randint(512, (2, 30))
    before = model(tokens)
    add_adapters(model, rank=4, alpha=8.0, targets=targets)
    assert torch.equal(model(tokens), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * model.config.n_layer * len(targets) == len(adapter_state(model))
    model(tokens, tokens).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
def test_outputs_and_gradients_are_those_of_the_merged_matrices(targets):
    """With M = W + s B A: dA = s Bᵀ dM and dB = s dM Aᵀ."""
    model, tokens = adapted(plain_model(), targets), torch.randint(512, (2, 40))
    merged = merged_model(model).requires_grad_()
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    torch.testing.assert_close(merged(tokens), model(tokens), atol=1e-4, rtol=0)
    for m in (model, merged):
        m(tokens, tokens).backward()
    for block, plain in zip(model.blocks, merged.blocks, strict=True):
        for name, parts in model.config.projections.items():
            module, expected = getattr(block, name), getattr(plain, name).weight.grad.split([rows for rows, _ in parts.values()])
            if not isinstance(module, LoRALinear):
                assert not any(part.split(".")[1] in targets for part in parts)
                continue
            for place, a, b in zip(module.places, module.a, module.b, strict=True):
                torch.testing.assert_close(a.grad, 5 / 3 * b.T @ expected[place], atol=1e-5, rtol=1e-3)
                torch.testing.assert_close(b.grad, 5 / 3 * expected[place] @ a.T, atol=1e-5, rtol=1e-3)


def flops(work) -> int:
    """Of the matrix products that PyTorch runs, also inside of custom ops."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profile:
        work()
    return sum(event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::bmm"))


def test_a_frozen_matrix_costs_no_product_for_its_gradient():
    """Every matrix W has two products, W x and dx, the first one only the former; A and B have three each, the first A's two."""
    model, tokens = plain_model(), torch.randint(512, (2, 64))
    c, rank, n = model.config, 4, tokens.numel()
    full = flops(lambda: model(tokens, tokens).backward())
    first = sum(rows for rows, _ in c.projections["qkv"].values()) * c.width
    attention = full - n * 6 * c.n_matrix
    assert attention >= 0  # what of it PyTorch computes by products that the profiler counts
    add_adapters(model, rank=rank, alpha=1.0, targets=TARGETS)
    adapters = sum(t.numel() for t in adapter_state(model).values())
    expected = n * (4 * c.n_matrix - 2 * first + 6 * adapters - 2 * 3 * rank * c.width) + attention
    assert flops(lambda: model(tokens, tokens).backward()) == expected


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_head_costs_no_product_for_its_gradient(reduction, path, monkeypatch):
    if path == "triton":
        if not has_triton():
            pytest.skip("needs Triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, head, targets = torch.randn(256, 32, requires_grad=True), torch.randn(300, 32), torch.randint(300, (256,))
    loss = lambda: linear_cross_entropy(x, head, targets, reduction=reduction).sum().backward()
    assert flops(loss) == (2 + 2 + 2 * (reduction == "none")) * 256 * 32 * 300  # "none" computes the logits again
    head.requires_grad_()
    assert flops(loss) == (2 + 2 + 2 + 2 * (reduction == "none")) * 256 * 32 * 300


@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_loads_the_adapter_with_the_same_logits_and_gradients(shape, targets, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, base, folder = written(tmp_path, shape, targets)
    tokens = torch.randint(512, (2, 40))
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    theirs(tokens, labels=tokens).loss.backward()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for block, layer in enumerate(model.blocks):
        for module in (module for module in layer.children() if isinstance(module, LoRALinear)):
            for name, a, b in zip(module.targets, module.a, module.b, strict=True):
                for kind, p in (("A", a), ("B", b)):
                    expected = gradients.pop(f"base_model.model.model.layers.{block}.{name}.lora_{kind}.weight")
                    torch.testing.assert_close(p.grad, expected, atol=1e-5, rtol=1e-3)
    assert not gradients
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in hf_state(load_model(folder)).items():
        assert torch.equal(tensor, merged[name]), name
    direct = peft.AutoPeftModelForCausalLM.from_pretrained(folder)  # finds the base by its path
    torch.testing.assert_close(direct(tokens).logits, model(tokens), atol=1e-4, rtol=0)


def test_a_loaded_adapter_is_the_same_merged_and_apart(tmp_path):
    model, base, folder = written(tmp_path)
    assert not (folder / "model.safetensors").exists()
    assert all(torch.equal(a, b) for a, b in zip(load_model(folder).parameters(), merged_model(model).parameters(), strict=True))
    again = adapted(plain_model())
    assert load_adapter(again, folder).folder == base
    tokens = torch.randint(512, (1, 30))
    assert torch.equal(again(tokens), model(tokens))
    half = load_model(folder, dtype=torch.bfloat16)  # merged in fp32, and rounded once
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half.parameters(), merged_model(model).parameters(), strict=True))
    with pytest.raises(UserError, match="other tensors than the model's adapters"):
        load_adapter(adapted(plain_model(), rank=2), folder)


def test_the_base_is_found_after_both_were_moved_or_the_adapter_alone(tmp_path):
    (tmp_path / "a").mkdir()
    model, _, folder = written(tmp_path / "a")
    expected = [*merged_model(model).parameters()]
    same = lambda folder: all(torch.equal(a, b) for a, b in zip(load_model(folder).parameters(), expected, strict=True))
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert same(tmp_path / "elsewhere")
    (tmp_path / "a").rename(tmp_path / "b")
    assert same(tmp_path / "b" / "adapter")
    with pytest.raises(FileNotFoundError, match=r"is an adapter of .*base, which is missing; move that checkpoint back"):
        load_model(tmp_path / "elsewhere")


def test_a_changed_base_or_a_damaged_adapter_is_refused(tmp_path):
    _, base, folder = written(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} has changed since it was written"):
            load_model(folder)
        (folder / name).write_bytes(content)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "checksums.json").unlink()
    for change in ({"r": 0}, {"lora_alpha": None}):
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=r"does not fit its base or adapter_config\.json; the checkpoint is damaged"):
            load_model(folder)
    shutil.rmtree(base)
    write(base, plain_model())
    with pytest.raises(UserError, match=r"adapter of .*base, whose model.safetensors is another one now .*; restore that"):
        load_model(folder)
