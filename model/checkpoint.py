"""A model on disk is a Hugging Face model: config.json, model.safetensors, generation_config.json (and the tokenizer's files beside).

Without QK-norm it is a Mistral, with it a Qwen3; `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it. Only safetensors
and JSON are read, so a checkpoint from a stranger cannot run code.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.errors import UserError
from ..common.files import read_json_object, write_json
from .gpt import GPT, GPTConfig, rotary_tables

ARCHITECTURES = {"mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def hf_config(config: GPTConfig, *, eos_token_id: int, pad_token_id: int) -> dict:
    """The config.json that makes Hugging Face build the same model."""
    kind = "qwen3" if config.qk_norm else "mistral"
    result = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.window,
        "attention_dropout": 0.0,
        "bos_token_id": eos_token_id,  # every document begins with the token that ends the one before
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "dtype": "float32",
    }
    if kind == "qwen3":
        result |= {"attention_bias": False, "use_sliding_window": config.window is not None, "max_window_layers": 0}
    return result


def gpt_config(hf: dict) -> GPTConfig:
    """The model's shape from a config.json. Raises ValueError where the architecture is another one, or a value of the wrong kind."""
    kind = hf.get("model_type")
    if kind not in tuple(ARCHITECTURES):
        raise UserError(f"model_type {kind!r} is not one this project reads ({', '.join(ARCHITECTURES)})")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes += ("max_position_embeddings",)
    missing = [name for name in (*sizes, "rms_norm_eps") if name not in hf]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}; the checkpoint is damaged, use another step")
    if hf.get("hidden_act", "silu") != "silu" or hf.get("attention_bias"):
        raise UserError("only models with hidden_act 'silu' and without attention biases are read")
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0)}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters is {rope!r}, no object; the checkpoint is damaged, use another step")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"rope_type {rope['rope_type']!r} is not read; only 'default' is")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", kind == "mistral") else None
    sizes = {name: hf[name] for name in sizes} | {"head_dim": hf.get("head_dim") or 1, "sliding_window": 1 if window is None else window}
    init_std = hf.get("initializer_range", 0.02)
    numbers = {"rope_theta": rope.get("rope_theta"), "rms_norm_eps": hf["rms_norm_eps"], "initializer_range": init_std}
    wrong = [f"{name} is {value!r}, not a whole number from 1" for name, value in sizes.items() if type(value) is not int or value < 1]
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            wrong.append(f"{name} is {value!r}, not a number from 0")
    if wrong:
        raise UserError(f"config.json: {'; '.join(wrong)}; the checkpoint is damaged, use another step")
    return GPTConfig(
        vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_kv_head=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        width=hf["hidden_size"],
        mlp_width=hf["intermediate_size"],
        context=hf["max_position_embeddings"],
        rope_theta=rope["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        qk_norm=kind == "qwen3",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        window=window,
        init_std=init_std,
    )


def hf_state(model: GPT) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, q, k, v and gate, up taken apart."""
    c = model.config
    state = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if not c.tie_embeddings:
        state["lm_head.weight"] = model.head
    for i, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.split([n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)])
        gate, up = block.gate_up.weight.chunk(2)
        layer = {
            "input_layernorm": block.attention_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention_out.weight,
            "post_attention_layernorm": block.mlp_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.mlp_out.weight,
        }
        if c.qk_norm:
            layer |= {"self_attn.q_norm": block.q_norm, "self_attn.k_norm": block.k_norm}
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return {name: tensor.detach() for name, tensor in state.items()}


def save_model(folder: Path, model: GPT, *, eos_token_id: int, pad_token_id: int) -> None:
    """Write config.json, generation_config.json and model.safetensors into an existing folder."""
    tokens = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    write_json(folder / "config.json", hf_config(model.config, **tokens))
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 30}
    write_json(folder / "generation_config.json", {"bos_token_id": eos_token_id, **tokens, **sampling})
    state = {name: tensor.cpu().contiguous() for name, tensor in hf_state(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def read_json(folder: Path, name: str) -> dict:
    """A JSON object of a checkpoint. Raises FileNotFoundError or ValueError that says what the folder lacks."""
    path = folder / name
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} is not a checkpoint: {name} is missing (found: {found}); give a step-… folder of a run")
    return read_json_object(path, remedy="the checkpoint is damaged, use another step")


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A safetensors file of a checkpoint. Raises FileNotFoundError where it is missing, ValueError where it is damaged."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a whole checkpoint: {name} is missing; delete the folder to use an earlier step")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}); the checkpoint is damaged, use another step") from None


@torch.no_grad()
def load_weights(model: GPT, folder: Path) -> None:
    """Copy the weights of a checkpoint into a model of the same shape. Raises ValueError where a tensor is missing or of another shape."""
    state = load_tensors(folder, "model.safetensors")
    expected = hf_state(model)  # views of the packed parameters: copying into them fills the model
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise UserError(f"{folder}/model.safetensors has {found} for {name}, the model needs {tuple(tensor.shape)}")
        tensor.copy_(state[name])
    extra = set(state) - set(expected) - {"lm_head.weight"}
    if extra:
        raise UserError(f"{folder}/model.safetensors holds tensors the model has no place for: {sorted(extra)[:5]}")


def load_model(folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """The model of a checkpoint folder. The weights go straight to `device` and `dtype`; the tables of rotary positions stay fp32.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged or of another architecture."""
    folder = Path(folder)
    with torch.device("meta"):  # no memory, no random numbers: all weights come from the file
        model = GPT(gpt_config(read_json(folder, "config.json")))
    model = model.to(dtype).to_empty(device=device)
    if model.config.tie_embeddings:
        model.head = model.embedding
    model.cos, model.sin = (table.to(device) for table in rotary_tables(model.config))
    load_weights(model, folder)
    return model
