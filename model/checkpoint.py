"""A checkpoint on disk is a Hugging Face model: config.json, generation_config.json, model.safetensors, and the tokenizer's files.

Without QK-norm it is a Mistral, with QK-norm a Qwen3; `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads it. Only
safetensors and JSON are read, so a checkpoint from an untrusted source cannot run code.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.errors import UserError, one_line
from ..common.files import read_json_object, sha256_of, write_json
from ..common.run_folder import ADAPTER, ADAPTER_CONFIG, is_adapter, listing
from ..common.sampling import Sampling
from ..kernels.rotary import rotary_tables
from .gpt import GPT, GPTConfig
from .lora import adapter_state, merged

FORMAT = 1  # config.json's "tritale_format"; a checkpoint without the key has format 1
ARCHITECTURES = {"mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DAMAGED = "the checkpoint is damaged, use another step"
WEIGHTS, EMA = "model.safetensors", "ema.safetensors"  # the second, of `train.ema`, holds the running mean of the weights
CHECKSUMS = "checksums.json"  # {file name: sha256} of the files in the same folder
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {  # of config.json, and of GPTConfig
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "context",
}


LARGEST = {  # of damaged values: larger ones would fill the memory or take forever before anything else fails
    "n_layer": 1000, "n_head": 1024, "n_kv_head": 1024, "head_dim": 1024, "width": 2**16, "context": 2**20,
}  # fmt: skip
NUMBERS = {"rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "init_std": "initializer_range"}  # of GPTConfig, and of config.json


class Base(NamedTuple):
    """The checkpoint whose weights an adapter changes."""

    folder: Path
    sha256: str  # of its weights

    @classmethod
    def at(cls, folder: Path) -> "Base":
        return cls(folder.resolve(), sha256_of(folder / WEIGHTS))


def hf_config(config: GPTConfig, *, eos_token_id: int, pad_token_id: int) -> dict:
    """The config.json from which Hugging Face builds the same model."""
    kind = "qwen3" if config.qk_norm else "mistral"
    result = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "tritale_format": FORMAT,
        **{name: getattr(config, ours) for name, ours in SIZES.items()},
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "sliding_window": config.window,
        "attention_dropout": 0.0,
        "bos_token_id": eos_token_id,  # every document begins with `<|endoftext|>`
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "dtype": "float32",
    }
    if kind == "qwen3":
        result |= {"attention_bias": False, "use_sliding_window": config.window is not None, "max_window_layers": 0}
    return result


def check_format(found: object, known: int, where: Path | str) -> None:
    """Raises UserError if a file has a newer format than `known`, or one that is not a number."""
    if type(found) is not int or found < 1:
        raise UserError(f"{where} has format {found!r}, not an integer of at least 1; {DAMAGED}")
    if found > known:
        raise UserError(f"{where} has format {found}; this version of tritale reads formats up to {known}: install a newer version")


def wrong_values(values: dict[str, Any], names: dict[str, str]) -> str:
    """What is wrong with the values of a config file, in words. `values` has GPTConfig's names, which `names` maps to those of the file."""
    wrong = []
    for ours, value in values.items():
        largest = LARGEST.get(ours, 2**24)
        if ours in NUMBERS:
            if type(value) not in (int, float) or not 0 <= value < float("inf") or (ours == "rope_theta" and value == 0):
                wrong.append(f"{names[ours]} is {value!r}, not a number of at least 0" + (" (0 excluded)" if ours == "rope_theta" else ""))
        elif type(value) is not int or not 1 <= value <= largest:
            wrong.append(f"{names[ours]} is {value!r}, not an integer from 1 to {largest}")
    return "; ".join(wrong)


def gpt_config(hf: dict, where: Path | str = "config.json") -> GPTConfig:
    """The model's shape from a config.json. Raises UserError, which names `where`, for another architecture or format or a wrong value."""
    kind = hf.get("model_type")
    if kind not in tuple(ARCHITECTURES):
        llama = "; convert a Llama first: tritale import FOLDER --from hf --out NEW_FOLDER" if kind == "llama" else ""
        raise UserError(f"{where}: model_type is {kind!r}; supported are {', '.join(ARCHITECTURES)}{llama}")
    check_format(hf.get("tritale_format", 1), FORMAT, where)
    if missing := [name for name in (*SIZES, "rms_norm_eps") if name not in hf]:
        raise UserError(f"{where} lacks {', '.join(missing)}; {DAMAGED}")
    if hf.get("hidden_act", "silu") != "silu" or hf.get("attention_bias"):
        raise UserError(f"{where}: only hidden_act 'silu' without attention_bias is supported")
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0)}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, not an object; {DAMAGED}")
    if hf.get("rope_scaling"):
        raise UserError(f"{where}: rope_scaling is {hf['rope_scaling']!r}; only null is supported")
    if kind == "qwen3" and hf.get("use_sliding_window") and hf.get("max_window_layers"):
        raise UserError(f"{where}: max_window_layers is {hf['max_window_layers']!r}; only 0 is supported, a window in every layer")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{where}: rope_type is {rope['rope_type']!r}; only 'default' is supported")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", kind == "mistral") else None
    layers = hf.get("layer_types") if kind == "qwen3" and window is not None else None
    if layers is not None and layers != ["sliding_attention"] * len(layers if isinstance(layers, list) else ()):
        raise UserError(f"config.json: layer_types is {layers!r}; only a window in every layer, 'sliding_attention', is supported")
    if type(hf.get("tie_word_embeddings") or False) is not bool:
        raise UserError(f"config.json: tie_word_embeddings is {hf['tie_word_embeddings']!r}, not true or false; {DAMAGED}")
    head_dim, init_std = hf.get("head_dim"), hf.get("initializer_range", 0.02)
    values = {ours: hf[name] for name, ours in SIZES.items()} | {"head_dim": head_dim or 1, "window": 1 if window is None else window}
    values |= {"rope_theta": rope.get("rope_theta"), "norm_eps": hf["rms_norm_eps"], "init_std": init_std}
    names = {ours: name for name, ours in SIZES.items()} | NUMBERS | {"head_dim": "head_dim", "window": "sliding_window"}
    if wrong := wrong_values(values, names):
        raise UserError(f"{where}: {wrong}; {DAMAGED}")
    return GPTConfig(
        **{ours: hf[name] for name, ours in SIZES.items()},
        head_dim=head_dim or hf["hidden_size"] // hf["num_attention_heads"],
        rope_theta=rope["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        qk_norm=kind == "qwen3",
        tie_embeddings=hf.get("tie_word_embeddings", False),
        window=window,
        init_std=init_std,
    )


def read_shape(folder: Path) -> GPTConfig:
    """The model's shape from the config.json of a checkpoint. Raises FileNotFoundError, or UserError as `gpt_config` does."""
    return gpt_config(read_json(folder, "config.json"), folder / "config.json")


def hf_state(model: GPT) -> dict[str, Tensor]:
    """The weights under Hugging Face's names. q, k, v and gate, up are views of the packed matrices."""
    c = model.config
    state = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if not c.tie_embeddings:
        state["lm_head.weight"] = model.head
    for i, block in enumerate(model.blocks):
        layer = {"input_layernorm": block.attention_norm, "post_attention_layernorm": block.mlp_norm}
        for name, parts in c.projections.items():
            layer |= zip(parts, getattr(block, name).weight.split([rows for rows, _ in parts.values()]), strict=True)
        if c.qk_norm:
            layer |= {"self_attn.q_norm": block.q_norm, "self_attn.k_norm": block.k_norm}
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return {name: tensor.detach() for name, tensor in state.items()}


def save_model(
    folder: Path,
    model: GPT,
    *,
    eos_token_id: int,
    pad_token_id: int,
    im_end_id: int | None = None,
    state: dict[str, Tensor] | None = None,
    base: Base | None = None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors into an existing folder. Call `write_checksums` last. `state` is a
    copy of `hf_state(model)`, if the model may change meanwhile. `im_end_id` of a model for conversations also ends a text.

    With `base`, the checkpoint whose weights a model with adapters has, the adapters in PEFT's format in place of model.safetensors;
    `state` is then a copy of `adapter_state(model)`."""
    tokens = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    record = {"tritale_base": {"path": os.path.relpath(base.folder, folder.resolve()), "sha256": base.sha256}} if base else {}
    write_json(folder / "config.json", hf_config(model.config, **tokens) | record)
    sampling = {name: getattr(Sampling, name) for name in ("temperature", "top_p", "top_k")}
    if im_end_id is not None:
        sampling |= {"eos_token_id": [eos_token_id, im_end_id]}
    write_json(folder / "generation_config.json", {"bos_token_id": eos_token_id, **tokens, "do_sample": True, **sampling})
    if base is None:
        save_tensors(folder / WEIGHTS, hf_state(model) if state is None else state)
        return
    save_tensors(folder / ADAPTER, adapter_state(model) if state is None else state)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.folder), **(model.adapters or {})}
    write_json(folder / ADAPTER_CONFIG, settings | {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True})


def write_checksums(folder: Path) -> None:
    """Write checksums.json for the files of a folder. `check_files` compares them when they are read."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_json(folder / CHECKSUMS, {path.name: sha256_of(path) for path in files})


def check_files(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files of a folder with its checksums.json, by default all that it lists. A folder without checksums.json passes.

    Raises FileNotFoundError if a file is missing, UserError if one has changed."""
    if not (folder / CHECKSUMS).is_file():  # written by an earlier version
        return
    expected = read_json_object(folder / CHECKSUMS, remedy=DAMAGED)
    for name in expected if names is None else names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a complete checkpoint: {name} is missing; use another step")
        if name not in expected:
            raise UserError(f"{folder / CHECKSUMS} does not list {name}; {DAMAGED}")
        if sha256_of(folder / name) != expected[name]:
            raise UserError(
                f"{folder / name} has changed since it was written (its sha256 is not that of {CHECKSUMS}); use another step, or remove "
                f"{folder / CHECKSUMS} if you changed the file yourself"
            )


def read_json(folder: Path, name: str) -> dict:
    """A JSON object of a checkpoint. Raises FileNotFoundError if it is missing, UserError if it is damaged."""
    path = folder / name
    if not path.is_file():
        found = listing(folder) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} is not a checkpoint: {name} is missing (found: {found}); give a step-… folder of a run")
    check_files(folder, [name])
    return read_json_object(path, remedy=DAMAGED)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with the permissions of the umask; safetensors itself uses 0600."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A safetensors file of a checkpoint. Raises FileNotFoundError if it is missing, UserError if it is damaged."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a complete checkpoint: {name} is missing; use another step")
    check_files(folder, [name])
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); {DAMAGED}") from None


def load_weights(model: GPT, folder: Path, *, name: str = WEIGHTS) -> None:
    """Copy the weights of a checkpoint, or with `name` EMA their running mean, into a model of the same shape. Those of an adapter are its
    base's with the adapter merged. Raises UserError if the tensors do not match, or if the checkpoint has no running mean;
    FileNotFoundError or UserError if an adapter's base is missing or has changed."""
    if name == EMA and not (folder / EMA).is_file():
        raise UserError(f"{folder} has no {EMA}; train with --train.ema 0.999, or leave out --ema")
    state = load_tensors(*((base_of(folder).folder, WEIGHTS) if is_adapter(folder) else (folder, name)))
    if is_adapter(folder):
        adapter, settings = load_tensors(folder, ADAPTER), read_json(folder, ADAPTER_CONFIG)
        try:
            state = merged(state, adapter, settings["lora_alpha"] / settings["r"])
        except (KeyError, TypeError, RuntimeError, ArithmeticError):
            raise UserError(f"{folder / ADAPTER} does not fit its base or {ADAPTER_CONFIG}; {DAMAGED}") from None
    copy_weights(model, state, folder / name)


def base_of(folder: Path) -> Base:
    """The checkpoint that an adapter was trained on: at the same place as seen from the adapter, or at its absolute path of that time.

    Raises FileNotFoundError if it is missing, UserError if its weights have changed."""
    record, settings = read_json(folder, "config.json").get("tritale_base"), read_json(folder, ADAPTER_CONFIG)
    path, sha256 = (record.get(key) for key in ("path", "sha256")) if isinstance(record, dict) else (None, None)
    if not isinstance(path, str) or not isinstance(sha256, str):
        raise UserError(f"{folder / 'config.json'} does not name the checkpoint that the adapter was trained on; {DAMAGED}")
    places = [(folder / path).resolve(), Path(str(settings.get("base_model_name_or_path")))]
    found = [place for place in places if (place / WEIGHTS).is_file()]
    for place in found:
        if sha256_of(place / WEIGHTS) == sha256:
            return Base(place, sha256)
    if found:
        raise UserError(f"{folder} is an adapter of {found[0]}, whose {WEIGHTS} is another one now (its sha256 differs); restore that")
    raise FileNotFoundError(f"{folder} is an adapter of {places[0]}, which is missing; move that checkpoint back to this place")


@torch.no_grad()
def load_adapter(model: GPT, folder: Path) -> Base:
    """Copy an adapter and the weights of its base, which is returned, into a model with adapters. Raises UserError if they do not fit."""
    base, own, adapter = base_of(folder), adapter_state(model), load_tensors(folder, ADAPTER)
    load_weights(model, base.folder)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in adapter.items()}:
        raise UserError(f"{folder / ADAPTER} has other tensors than the model's adapters; {DAMAGED}")
    for name, tensor in own.items():
        tensor.copy_(adapter[name])
    return base


def merged_model(model: GPT) -> GPT:
    """A copy of a model in which its adapters are merged."""
    assert model.adapters is not None
    plain = empty_model(model.config, model.embedding.device).requires_grad_(False)
    scale = model.adapters["lora_alpha"] / model.adapters["r"]
    copy_weights(plain, merged(hf_state(model), adapter_state(model), scale), Path(WEIGHTS))
    return plain


@torch.no_grad()
def copy_weights(model: GPT, state: dict[str, Tensor], where: Path) -> None:
    """Copy tensors under Hugging Face's names into a model. Raises UserError, which names `where`, if they do not match."""
    expected = hf_state(model)  # views of the packed parameters: copying into them fills the model
    if model.config.tie_embeddings:
        state.pop("lm_head.weight", None)  # some programs store a tied head twice
    if extra := set(state) - set(expected):
        raise UserError(f"{where} has tensors that the model does not have: {sorted(extra)[:5]}; {DAMAGED}")
    for name, tensor in expected.items():
        if name not in state or state[name].shape != tensor.shape:
            found = tuple(state[name].shape) if name in state else "nothing"
            raise UserError(f"{where} has {found} for {name}, the model needs {tuple(tensor.shape)}; {DAMAGED}")
        if state[name].dtype not in DTYPES:
            raise UserError(f"{where} has {name} in {state[name].dtype}; supported are {', '.join(map(str, DTYPES))}")
    for name, tensor in expected.items():
        tensor.copy_(state[name])


def empty_model(config: GPTConfig, device: torch.device | str, dtype: torch.dtype = torch.float32) -> GPT:
    """A model whose weights are not set. The rotary tables are, in fp32."""
    with torch.device("meta"):  # initializes nothing
        model = GPT(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_embeddings:
        model.head = model.embedding
    model.cos, model.sin = (table.to(device) for table in rotary_tables(config.context, config.head_dim, config.rope_theta))
    return model


def load_model(folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, name: str = WEIGHTS) -> GPT:
    """The model of a checkpoint folder, on `device` and in `dtype`; the rotary tables stay fp32. `name` as in `load_weights`.

    Raises FileNotFoundError if a file is missing, UserError if one is damaged or of another architecture."""
    folder = Path(folder)
    model = empty_model(read_shape(folder), device, dtype)
    load_weights(model, folder, name=name)
    return model
