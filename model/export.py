"""Checkpoints in the formats of other programs: a litgpt folder, a GGUF file for llama.cpp. Hugging Face reads a checkpoint as it is."""

import heapq
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
import yaml

from ..common.errors import UserError
from ..common.files import atomic_file, atomic_folder, write_json
from ..data.tokenizer import BYTE_TOKENS, SPECIAL_TOKENS, Tokenizer
from .checkpoint import hf_config, hf_state
from .gpt import GPT, GPTConfig


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; give another --out")


# ---- litgpt -------------------------------------------------------------------------------------------------------------------------


def litgpt_config(c: GPTConfig) -> dict:
    """litgpt's `Config` of the same model."""
    config = {
        "name": "qwen3-tritale" if c.qk_norm else "tritale",  # litgpt chooses the conversion to Hugging Face by the name
        "hf_config": {},
        "block_size": c.context,
        "vocab_size": c.vocab_size,
        "padded_vocab_size": c.vocab_size,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_query_groups": c.n_kv_head,
        "head_size": c.head_dim,
        "n_embd": c.width,
        "intermediate_size": c.mlp_width,
        "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm",
        "norm_eps": c.norm_eps,
        "norm_qk": c.qk_norm,
        "parallel_residual": False,
        "bias": False,
        "rotary_percentage": 1.0,
        "rope_base": int(c.rope_theta) if float(c.rope_theta).is_integer() else c.rope_theta,
    }
    if c.window is not None:
        config |= {"sliding_window_size": c.window, "sliding_window_indices": [1] * c.n_layer}
    return config


def litgpt_state(model: GPT) -> dict[str, torch.Tensor]:
    """The weights under litgpt's names. litgpt packs q, k, v in the same order, but not gate and up."""
    state = {
        "transformer.wte.weight": model.embedding,
        "lm_head.weight": model.head,  # if tied, it shares its memory in the file too
        "transformer.ln_f.weight": model.norm,
    }
    for i, block in enumerate(model.blocks):
        gate, up = block.gate_up.weight.chunk(2)
        layer = {
            "norm_1": block.attention_norm,
            "attn.qkv": block.qkv.weight,
            "attn.proj": block.attention_out.weight,
            "norm_2": block.mlp_norm,
            "mlp.fc_1": gate.clone(),  # a view would be saved with the memory of the whole matrix
            "mlp.fc_2": up.clone(),
            "mlp.proj": block.mlp_out.weight,
        }
        if model.config.qk_norm:
            layer |= {"attn.norm_q": block.q_norm, "attn.norm_k": block.k_norm}
        state |= {f"transformer.h.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def export_litgpt(model: GPT, tokenizer: Tokenizer, out: Path) -> None:
    """Write a folder for `litgpt.LLM.load`. `lit_model.pth` is a dictionary of plain tensors (`weights_only=True` loads it).

    Raises UserError if `out` exists."""
    _refuse_existing(out)
    c = model.config
    with atomic_folder(out) as folder:
        torch.save(litgpt_state(model), folder / "lit_model.pth")
        (folder / "model_config.yaml").write_text(yaml.safe_dump(litgpt_config(c), sort_keys=False), encoding="utf-8")
        tokens = {"eos_token_id": tokenizer.eot_id, "pad_token_id": tokenizer.pad_id}
        write_json(folder / "config.json", hf_config(c, **tokens))
        write_json(folder / "generation_config.json", {"bos_token_id": tokenizer.eot_id, **tokens})
        tokenizer.save(folder, context=c.context)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        # Without it litgpt removes the leading <|endoftext|>, with which every training document begins.
        write_json(folder / "tokenizer_config.json", config | {"add_bos_token": True})


def check_litgpt(out: Path, model: GPT, ids: list[int]) -> str:
    """Load the export with litgpt and compare the logits for `ids`: a sentence about the result. Raises RuntimeError if they differ."""
    if importlib.util.find_spec("litgpt") is None:
        return "not checked, because litgpt is not installed"
    import litgpt  # pyright: ignore[reportMissingImports] (optional)

    theirs = litgpt.GPT(litgpt.Config.from_file(out / "model_config.yaml")).eval()
    theirs.load_state_dict(torch.load(out / "lit_model.pth", weights_only=True))
    with torch.no_grad():
        difference = (theirs(torch.tensor([ids])) - model(torch.tensor([ids]))).abs().max().item()
    if not difference < 1e-2:
        raise RuntimeError(f"litgpt's logits of {out} differ by {difference:g}; do not use this export")
    return f"checked: litgpt gives the same logits (largest difference {difference:.1g})"


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
            text, kind = " ", TokenType.NORMAL
        elif i < len(SPECIAL_TOKENS) + len(BYTE_TOKENS):
            text, kind = BYTE_TOKENS[i - len(SPECIAL_TOKENS)], TokenType.BYTE
        else:
            text, kind = tokenizer.token_bytes(i).decode("utf-8"), TokenType.NORMAL
            if "▁" in text:  # llama.cpp would read it as a space; the character falls back to its bytes
                text, kind = f"<|unused_{i}|>", TokenType.UNUSED
        texts.append(text.replace(" ", "▁"))
        scores.append(-float(ranks.get(text, 0)))
        types.append(int(kind))
    for i in range(tokenizer.vocab_size, n_rows):
        texts.append(f"<|unused_{i}|>")
        scores.append(0.0)
        types.append(int(TokenType.UNUSED))
    return texts, scores, types


def gguf_ids(text: str, vocabulary: tuple[list[str], list[float], list[int]]) -> list[int]:
    """The ids that llama.cpp's tokenizer "llama" (llm_tokenizer_spm) gives: it joins the neighbours whose union has the highest score, the
    leftmost first."""
    texts, scores, _ = vocabulary
    ids = {t: i for i, t in enumerate(texts)}
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


def check_gguf(tokenizer: Tokenizer, documents: list[str]) -> str:
    """Compare the ids of llama.cpp's tokenizer with ours, on the documents and on strings with several spaces: a sentence about the result.

    llama.cpp has no pre-tokenizer here, so it joins a word with the space before it also after another space, and reads ▁ as a space."""
    vocabulary = gguf_vocabulary(tokenizer, tokenizer.vocab_size)
    differs = lambda text: gguf_ids(text, vocabulary) != tokenizer.encode(text)
    different = [document for document in documents if differs(document)]
    result = f"llama.cpp's tokenizer gives the same ids for {len(documents) - len(different)} of {len(documents)} documents"
    if different:
        result = f"WARNING: llama.cpp encodes {len(different)} of {len(documents)} documents differently, for example {different[0][:60]!r}"
    words = [entry for entry in vocabulary[0] if entry.startswith("▁") and len(entry) > 1]
    spaced = [text for word in words[:200] if differs(text := "." + word.replace("▁", "  ", 1))]
    if spaced:
        result += f"; it encodes a word after two spaces differently ({spaced[0]!r}): write single spaces in prompts"
    return result


def _interleaved(weight: np.ndarray, n_head: int) -> np.ndarray:
    # llama.cpp's "llama" rotates adjacent pairs of a head, Hugging Face its halves: (H · 2 · D/2, K) -> (H · D/2 · 2, K).
    n, k = weight.shape
    return weight.reshape(n_head, 2, n // n_head // 2, k).swapaxes(1, 2).reshape(n, k)


def gguf_tensors(model: GPT) -> dict[str, np.ndarray]:
    """The weights in fp32 under GGUF's names, in PyTorch's row order."""
    c = model.config
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    outer = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
    }  # fmt: skip
    tensors = {}
    for name, tensor in hf_state(model).items():
        array = tensor.float().cpu().contiguous().numpy()
        if name in outer:
            tensors[outer[name]] = array
            continue
        _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
        if not c.qk_norm and kind in ("self_attn.q_proj", "self_attn.k_proj"):
            array = _interleaved(array, c.n_head if kind == "self_attn.q_proj" else c.n_kv_head)
        tensors[f"blk.{layer}.{names[kind]}.weight"] = np.ascontiguousarray(array)
    return tensors


def export_gguf(model: GPT, tokenizer: Tokenizer, out: Path, *, name: str) -> None:
    """Write a GGUF file in fp32 for llama.cpp, with the architecture "llama", or "qwen3" for QK-norm. `llama-quantize` makes it smaller.

    Raises UserError if `out` exists, or if the model has a window shorter than its context, which these architectures do not support;
    ModuleNotFoundError if the package gguf is missing."""
    _refuse_existing(out)
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
        writer.add_eos_token_id(tokenizer.eot_id)
        writer.add_pad_token_id(tokenizer.pad_id)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        # Without a template llama.cpp's chat front ends use ChatML, which a base model has never seen.
        writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

        for tensor_name, array in gguf_tensors(model).items():
            writer.add_tensor(tensor_name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
