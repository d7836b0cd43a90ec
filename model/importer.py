"""Checkpoints of other programs, converted to this project's format: litgpt folders, and Hugging Face's Llama, Mistral and Qwen3."""

import shutil
from pathlib import Path
from zipfile import is_zipfile

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..common.errors import UserError, one_line
from ..common.files import atomic_folder, read_json_object, write_json
from ..data.foreign_tokenizer import ForeignTokenizer
from .checkpoint import copy_weights, gpt_config, save_model, write_checksums, wrong_values
from .export import LAYER_NAMES, LITGPT_NEEDS, LITGPT_SIZES, OUTER_NAMES, refuse_existing
from .gpt import GPT, GPTConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def find_sources(folder: Path, kind: str) -> list[Path]:
    """The checkpoint itself, or those in the subfolders of a run, by name. Raises FileNotFoundError if there is none."""
    name = "lit_model.pth" if kind == "litgpt" else "config.json"
    found = [folder] if (folder / name).is_file() else sorted(path.parent for path in folder.glob(f"*/{name}"))
    if not found:
        raise FileNotFoundError(f"{folder} has no {kind} checkpoint: no {name} in it or in a subfolder; give the folder that contains it")
    return found


def convert(source: Path, out: Path, kind: str) -> None:
    """Write the checkpoint `source` of "litgpt" or "hf" as the new folder `out`.

    Raises FileNotFoundError if a file is missing, UserError if the architecture or a value is not supported, or `out` exists."""
    refuse_existing(out)
    if not (source / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{source} has no tokenizer.json; make one with transformers: "
            f'AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True).save_pretrained("{source}")'
        )
    config, state = _read_litgpt(source) if kind == "litgpt" else _read_hf(source)
    tokenizer = ForeignTokenizer.load(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{source}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {config.vocab_size} entries")
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device="cpu")
    if config.tie_embeddings:
        model.head = model.embedding
    copy_weights(model, state, source)
    with atomic_folder(out) as temporary:
        save_model(temporary, model, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
        hf = read_json_object(temporary / "config.json", remedy="")
        write_json(temporary / "config.json", hf | {"bos_token_id": tokenizer.bos_id, "tritale_import": kind})
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        write_checksums(temporary)


def _read_hf(source: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    hf = read_json_object(source / "config.json", remedy="give the folder of a Hugging Face model")
    if hf.get("model_type") == "llama":
        hf |= {"model_type": "mistral", "sliding_window": None, "attention_bias": hf.get("attention_bias") or hf.get("mlp_bias")}
    config = gpt_config(hf, source / "config.json")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source} has no *.safetensors; save the model with save_pretrained(…, safe_serialization=True)")
    try:
        return config, {name: tensor for path in files for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{source}: the weights cannot be read ({one_line(error)}); download or save them again") from None


def _read_litgpt(source: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    path = source / "model_config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no model_config.yaml; give the complete litgpt folder")
    try:
        c = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(c, dict):
            raise TypeError(f"it holds {type(c).__name__}")
        for key, (needed, default) in LITGPT_NEEDS.items():
            if c.get(key, default) != needed:
                raise UserError(f"{path}: {key} is {c.get(key, default)!r}; only {needed!r} is supported")
        if c.get("sliding_window_size") and not all(c.get("sliding_window_indices") or [1]):
            raise UserError(f"{path}: only some layers have a sliding window; all or none are supported")
        defaults = {
            "n_query_groups": c["n_head"], "head_size": c["n_embd"] // c["n_head"], "rope_base": 10_000, "norm_eps": 1e-5, "norm_qk": False,
            "sliding_window_size": None,
        }  # fmt: skip
        c = defaults | {name: value for name, value in c.items() if value is not None}
        values = {ours: c[theirs] for theirs, ours in LITGPT_SIZES.items()}
        numbers = {ours: value for ours, value in values.items() if ours != "qk_norm" and not (ours == "window" and value is None)}
        if wrong := wrong_values(numbers, {ours: theirs for theirs, ours in LITGPT_SIZES.items()}):
            raise UserError(f"{path}: {wrong}")
        config = GPTConfig(**values)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # YAML's errors have several lines
        raise UserError(f"{path} is not a litgpt config ({reason}); give the complete litgpt folder") from None
    path = source / "lit_model.pth"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))  # before torch 1.6 it was no zip file
        loaded = loaded.get("model", loaded)  # of `litgpt pretrain`
        lit = {name.removeprefix("_forward_module.").removeprefix("_orig_mod."): t for name, t in loaded.items() if isinstance(t, Tensor)}
    except Exception:  # a damaged file can raise any; torch's messages advise weights_only=False
        raise UserError(f"{path} is damaged or holds more than plain tensors, which alone are read; pickled code is not run") from None
    return _litgpt_state(config, lit, source)


def _litgpt_state(config: GPTConfig, lit: dict[str, Tensor], source: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config with its tie_embeddings, and the weights under Hugging Face's names."""
    sizes = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
    outer, inner = ({lit: hf for hf, (lit, _) in names.items() if lit} for names in (OUTER_NAMES, LAYER_NAMES))
    state: dict[str, Tensor] = {}
    for name, tensor in lit.items():
        base = name.removesuffix(".weight")
        if tensor.layout != torch.strided or tensor.is_meta:
            layout = "without values" if tensor.is_meta else f"in the layout {tensor.layout}"
            raise UserError(f"{source / 'lit_model.pth'} has {name} {layout}; only dense tensors are supported")
        if base in outer:
            state[f"{outer[base]}.weight"] = tensor
            continue
        _, _, layer, part = [*base.split(".", 3), "", "", ""][:4]
        if part in ("attn.qkv", "attn.attn") and tensor.shape == (sum(sizes), config.width):
            if part == "attn.attn":  # before litgpt 0.5.4: the heads of each group, then its key and value
                groups = tensor.view(config.n_kv_head, config.n_head // config.n_kv_head + 2, config.head_dim, config.width)
                q, k, v = (x.reshape(-1, config.width) for x in groups.split((config.n_head // config.n_kv_head, 1, 1), dim=1))
            else:
                q, k, v = tensor.split(sizes)
            state |= {f"model.layers.{layer}.self_attn.{x}_proj.weight": t for x, t in (("q", q), ("k", k), ("v", v))}
        elif part in inner:
            state[f"model.layers.{layer}.{inner[part]}.weight"] = tensor
        else:
            raise UserError(f"{source / 'lit_model.pth'} has {name} {tuple(tensor.shape)}, which this architecture does not have")
    embedding, head = state.get("model.embed_tokens.weight"), state.get("lm_head.weight")
    is_tied = embedding is not None and (head is None or (head.shape == embedding.shape and torch.equal(head, embedding)))
    return GPTConfig(**{**vars(config), "tie_embeddings": is_tied}), state
