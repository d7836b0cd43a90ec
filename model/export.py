"""Checkpoints in the formats of other programs: a folder for Hugging Face or litgpt, a GGUF file for llama.cpp."""

import heapq
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from ..common.errors import UserError
from ..common.files import atomic_file, atomic_folder, write_json
from ..data.chat import CHAT_TEMPLATE
from ..data.foreign_tokenizer import ForeignTokenizer
from ..data.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer
from .checkpoint import CHECKSUMS, EMA, WEIGHTS, check_files, hf_config, hf_state, save_model, write_checksums
from .gpt import GPT, GPTConfig

# The names of the tensors in Hugging Face's files, in litgpt's, and in GGUF files. litgpt packs q, k and v.
LAYER_NAMES = {
    "input_layernorm": ("norm_1", "attn_norm"), "self_attn.q_norm": ("attn.norm_q", "attn_q_norm"),
    "self_attn.k_norm": ("attn.norm_k", "attn_k_norm"), "self_attn.q_proj": ("", "attn_q"),
    "self_attn.k_proj": ("", "attn_k"), "self_attn.v_proj": ("", "attn_v"),
    "self_attn.o_proj": ("attn.proj", "attn_output"), "post_attention_layernorm": ("norm_2", "ffn_norm"),
    "mlp.gate_proj": ("mlp.fc_1", "ffn_gate"), "mlp.up_proj": ("mlp.fc_2", "ffn_up"), "mlp.down_proj": ("mlp.proj", "ffn_down"),
}  # fmt: skip
OUTER_NAMES = {
    "model.embed_tokens": ("transformer.wte", "token_embd"), "model.norm": ("transformer.ln_f", "output_norm"),
    "lm_head": ("lm_head", "output"),
}  # fmt: skip
# The fields of litgpt's Config that hold those of GPTConfig.
LITGPT_SIZES = {
    "block_size": "context", "padded_vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head", "n_query_groups": "n_kv_head",
    "head_size": "head_dim", "n_embd": "width", "intermediate_size": "mlp_width", "norm_eps": "norm_eps", "norm_qk": "qk_norm",
    "rope_base": "rope_theta", "sliding_window_size": "window",
}  # fmt: skip
# What its other fields must be, and their values if the file has none; everything else computes another function.
LITGPT_NEEDS = {
    "norm_class_name": ("RMSNorm", "LayerNorm"), "mlp_class_name": ("LLaMAMLP", "GptNeoxMLP"), "parallel_residual": (False, True),
    "bias": (False, True), "attn_bias": (False, False), "lm_head_bias": (False, False), "rotary_percentage": (1.0, 0.25),
    "norm_qk_type": ("default", "default"), "post_attention_norm": (False, False), "post_mlp_norm": (False, False),
    "shared_attention_norm": (False, False), "scale_embeddings": (False, False), "rope_adjustments": (None, None),
    "rope_condense_ratio": (1, 1), "rope_interleave": (False, False), "attention_logit_softcapping": (None, None),
    "final_logit_softcapping": (None, None), "attention_scores_scalar": (None, None), "latent_attention": (None, None),
    "rope_local_base_freq": (None, None), "rope_indices": (None, None),
}  # fmt: skip


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; give another --out")


def _renamed(model: GPT, program: int, layers: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name in the files of `program`, part, tensor): 0 is litgpt, 1 GGUF. The part is Hugging Face's name without layer and suffix."""
    for name, tensor in hf_state(model).items():
        part, prefix, names = name.removesuffix(".weight"), "", OUTER_NAMES
        if part not in names:
            _, _, layer, part = part.split(".", 3)
            prefix, names = f"{layers}.{layer}.", LAYER_NAMES
        if theirs := names[part][program]:
            yield f"{prefix}{theirs}.weight", part, tensor


def export_hf(source: Path, out: Path, *, ema: bool = False) -> None:
    """Copy the files of a checkpoint that Hugging Face reads, without the state of the training; with `ema` the running mean of the weights
    in place of the weights. Raises UserError if `out` exists."""
    refuse_existing(out)
    check_files(source)
    with atomic_folder(out) as folder:
        for path in source.iterdir():
            if path.is_file() and path.name not in (CHECKSUMS, WEIGHTS if ema else EMA):
                shutil.copyfile(path, folder / (WEIGHTS if path.name == EMA else path.name))


def export_merged(model: GPT, tokenizer: Tokenizer, out: Path) -> None:
    """Write a model as an ordinary checkpoint without the state of a training, for example one in whose weights an adapter is merged.

    Raises UserError if `out` exists."""
    refuse_existing(out)
    with atomic_folder(out) as folder:
        save_model(folder, model, state=None, base=None, **tokenizer.special_ids)
        tokenizer.save(folder, context=model.config.context)
        write_checksums(folder)


# ---- litgpt -------------------------------------------------------------------------------------------------------------------------


def litgpt_config(c: GPTConfig) -> dict:
    """litgpt's `Config` of the same model."""
    config = {"name": "qwen3-tritale" if c.qk_norm else "tritale"}  # litgpt chooses the conversion to Hugging Face by the name
    config |= {"hf_config": {}, "vocab_size": c.vocab_size} | {theirs: getattr(c, ours) for theirs, ours in LITGPT_SIZES.items()}
    config |= {key: needed for key, (needed, default) in LITGPT_NEEDS.items() if needed != default}
    return config | {"sliding_window_indices": c.window and [1] * c.n_layer}


def litgpt_state(model: GPT) -> dict[str, torch.Tensor]:
    """The weights under litgpt's names. litgpt packs q, k, v in the same order, but not gate and up."""
    state = {f"transformer.h.{i}.attn.qkv.weight": block.qkv.weight.detach() for i, block in enumerate(model.blocks)}
    for name, part, tensor in _renamed(model, 0, "transformer.h"):
        # A view of gate_up would be saved with the memory of the whole matrix.
        state[name] = tensor.clone() if part in ("mlp.gate_proj", "mlp.up_proj") else tensor
    state["lm_head.weight"] = model.head.detach()  # if tied, it shares its memory in the file too
    return {name: tensor.cpu() for name, tensor in state.items()}


def export_litgpt(model: GPT, tokenizer: Tokenizer, out: Path) -> None:
    """Write a folder for `litgpt.LLM.load`. `lit_model.pth` is a dictionary of plain tensors (`weights_only=True` loads it).

    Raises UserError if `out` exists or the tokenizer is not this project's."""
    refuse_existing(out)
    _refuse_foreign(tokenizer)
    c = model.config
    with atomic_folder(out) as folder:
        torch.save(litgpt_state(model), folder / "lit_model.pth")
        (folder / "model_config.yaml").write_text(yaml.safe_dump(litgpt_config(c), sort_keys=False), encoding="utf-8")
        tokens = {"eos_token_id": tokenizer.end_ids[-1], "pad_token_id": tokenizer.pad_id}
        write_json(folder / "config.json", hf_config(c, **tokens))
        write_json(folder / "generation_config.json", {"bos_token_id": tokenizer.eot_id, **tokens})
        tokenizer.save(folder, context=c.context)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        # Without it litgpt removes the leading <|endoftext|>, with which every training document begins.
        write_json(folder / "tokenizer_config.json", config | {"add_bos_token": True})


def _refuse_foreign(tokenizer: Tokenizer) -> None:
    if isinstance(tokenizer, ForeignTokenizer):
        raise UserError(
            "the checkpoint was imported with another program's tokenizer; export it with --to hf, and convert that folder further"
        )


# ---- GGUF ---------------------------------------------------------------------------------------------------------------------------


def gguf_vocabulary(tokenizer: Tokenizer, n_rows: int) -> tuple[list[str], list[float], list[int]]:
    """(texts, scores, types) of all ids for llama.cpp's tokenizer "llama". Rows of the embedding without a token are unused.

    Like this project's tokenizer, "llama" starts from characters and falls back to bytes for those without an entry. ("gpt2" starts from
    bytes and drops bytes of an unknown character that a merge has joined partly.) It joins the neighbours whose union has the highest
    score, so the score of an entry is minus the rank of its merge. Spaces are written ▁."""
    from gguf import TokenType

    ranks: dict[str, int] = {}
    for rank, pair in enumerate(tokenizer.merges):
        ranks.setdefault("".join(pair), rank)
    space_byte = len(SPECIAL_TOKENS) + ord(" ")
    has_space = tokenizer.encode(" ") != [space_byte]
    texts, scores, types = [], [], []
    for i in range(tokenizer.vocab_size):
        if i < len(SPECIAL_TOKENS):
            text, kind = SPECIAL_TOKENS[i], TokenType.CONTROL
        elif i == space_byte and not has_space:  # otherwise llama.cpp encodes a space as the three bytes of ▁
            text, kind = "▁", TokenType.NORMAL
        elif i < len(SPECIAL_TOKENS) + len(BYTE_TOKENS):
            text, kind = BYTE_TOKENS[i - len(SPECIAL_TOKENS)], TokenType.BYTE
        else:
            text, kind = tokenizer.token_bytes(i).decode("utf-8"), TokenType.NORMAL
            if "▁" in text:  # llama.cpp would read it as a space; the character falls back to its bytes
                text, kind = f"<|unused_{i}|>", TokenType.UNUSED
            elif len(text) > 1 and text.isspace() and text.endswith(" "):
                kind = TokenType.USER_DEFINED  # found before the merges, so that a word after it does not take its last space
        texts.append(text if kind == TokenType.USER_DEFINED else text.replace(" ", "▁"))
        scores.append(-float(ranks.get(text, 0)))
        types.append(int(kind))
    for i in range(tokenizer.vocab_size, n_rows):
        texts.append(f"<|unused_{i}|>")
        scores.append(0.0)
        types.append(int(TokenType.UNUSED))
    return texts, scores, types


def gguf_ids(text: str, vocabulary: tuple[list[str], list[float], list[int]]) -> list[int]:
    """The ids that llama.cpp's tokenizer "llama" (llm_tokenizer_spm) gives. It splits the text at the user-defined entries, the longest
    first. Between them it joins the neighbours whose union has the highest score, the leftmost first."""
    from gguf import TokenType

    texts, scores, types = vocabulary
    ids = {t: i for i, t in enumerate(texts)}
    entries = sorted((t for t, kind in zip(texts, types, strict=True) if kind == TokenType.USER_DEFINED), key=len, reverse=True)
    if entries:
        pieces = re.split(f"({'|'.join(map(re.escape, entries))})", text)
        return [i for piece in pieces for i in ([ids[piece]] if piece in entries else _joined(piece, ids, scores))]
    return _joined(text, ids, scores)


def _joined(text: str, ids: dict[str, int], scores: list[float]) -> list[int]:
    parts = list(text.replace(" ", "▁"))
    before, after = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))
    heap: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(parts) and (i := ids.get(parts[left] + parts[right])) is not None:
            heapq.heappush(heap, (-scores[i], left, right, parts[left] + parts[right]))

    for i in range(len(parts) - 1):
        offer(i, i + 1)
    while heap:
        _, left, right, union = heapq.heappop(heap)
        if not parts[left] or not parts[right] or after[left] != right or parts[left] + parts[right] != union:
            continue
        parts[left], parts[right], after[left] = union, "", after[right]
        if after[left] < len(parts):
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    result: list[int] = []
    for part in filter(None, parts):
        result += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return result


def _interleaved(weight: np.ndarray, n_head: int) -> np.ndarray:
    # llama.cpp's "llama" rotates adjacent pairs of a head, Hugging Face its halves: (H · 2 · D/2, K) -> (H · D/2 · 2, K).
    n, k = weight.shape
    return weight.reshape(n_head, 2, n // n_head // 2, k).swapaxes(1, 2).reshape(n, k)


def gguf_tensors(model: GPT) -> dict[str, np.ndarray]:
    """The weights in fp32 under GGUF's names, in PyTorch's row order."""
    c = model.config
    tensors = {}
    for name, part, tensor in _renamed(model, 1, "blk"):
        array = tensor.float().cpu().numpy()
        if not c.qk_norm and part in ("self_attn.q_proj", "self_attn.k_proj"):
            array = _interleaved(array, c.n_head if part == "self_attn.q_proj" else c.n_kv_head)
        tensors[name] = np.ascontiguousarray(array)
    return tensors


def export_gguf(model: GPT, tokenizer: Tokenizer, out: Path, *, name: str) -> None:
    """Write a GGUF file in fp32 for llama.cpp, with the architecture "llama", or "qwen3" for QK-norm. `llama-quantize` makes it smaller.

    Raises UserError if `out` exists, or if the model has a window shorter than its context, which these architectures do not support;
    ModuleNotFoundError if the package gguf is missing."""
    refuse_existing(out)
    _refuse_foreign(tokenizer)
    c = model.config
    if c.window is not None and c.window < c.context:
        raise UserError(
            f"model.window is {c.window}, and llama.cpp's architectures llama and qwen3 have no sliding window; export to litgpt instead"
        )
    import gguf

    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "qwen3" if c.qk_norm else "llama")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_vocab_size(c.vocab_size)
        writer.add_context_length(c.context)
        writer.add_embedding_length(c.width)
        writer.add_block_count(c.n_layer)
        writer.add_feed_forward_length(c.mlp_width)
        writer.add_head_count(c.n_head)
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_rope_freq_base(c.rope_theta)
        writer.add_layer_norm_rms_eps(c.norm_eps)

        texts, scores, types = gguf_vocabulary(tokenizer, c.vocab_size)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(tokenizer.eot_id)  # every document begins with `<|endoftext|>`
        writer.add_eos_token_id(tokenizer.end_ids[-1])
        writer.add_pad_token_id(tokenizer.pad_id)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        # Without a template llama.cpp's chat front ends use ChatML, which a base model has never seen.
        plain = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        writer.add_chat_template(CHAT_TEMPLATE if tokenizer.is_chat else plain)

        for tensor_name, array in gguf_tensors(model).items():
            writer.add_tensor(tensor_name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
