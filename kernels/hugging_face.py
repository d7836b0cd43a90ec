"""The kernels inside a Hugging Face Llama, Mistral or Qwen3 model, in place and for this one model.

    patch_transformers(model)    # norms, rotary positions, attention, SwiGLU and the loss run the kernels
    unpatch(model)               # as it was

Each module gets its own `forward` in its `__dict__`; parameters, classes, hooks and the state dict stay as they are. In training mode
with labels the loss comes from `linear_cross_entropy` and `logits` is None, since they are never all there. Padding becomes documents that
do not see each other, so the kernels need no mask; what they cannot express (a padded batch with a KV cache, a mask with holes or of four
dimensions, a static cache) runs through the layer's own attention.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cross_entropy import cross_entropy
from .flash_attention import flash_attention
from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

Model = TypeVar("Model", bound=nn.Module)
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}  # model_type: prefix of its classes


def _cache_name() -> str:
    """What this transformers calls the KV cache: `cache` from 5.24 on, `past_key_values` before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _norm(self, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _attention(
    self,
    hidden_states: Tensor,  # (B, T, width)
    position_embeddings: tuple[Tensor, Tensor],  # cos and sin, (1 or B, T, D): both halves alike
    attention_mask: Tensor | None = None,
    past_key_values=None,
    *,
    cache=None,
    tritale_attention: "tuple[bool, Tensor | None]",
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    use_kernel, cu_seqlens = tritale_attention
    cache = past_key_values if cache is None else cache
    if not use_kernel:
        kwargs |= {_cache_name(): cache}
        return type(self).forward(self, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs)
    n_batch, n_tokens, _ = hidden_states.shape
    q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H, D)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    cos, sin = (t[..., : t.shape[-1] // 2].flatten(0, 1) for t in position_embeddings)
    own = cos.shape[0] != n_tokens  # each sequence of the batch has its own positions
    rows = torch.arange(n_batch * n_tokens, device=q.device).view(n_batch, n_tokens) if own else None
    q, k = rope(q, k, cos, sin, positions=rows)
    if cache is not None:
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, S, H_kv, D)
    window = self.sliding_window if hasattr(self, "sliding_window") else getattr(self.config, "sliding_window", None)
    if cu_seqlens is not None:
        q, k, v = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v))
    out = flash_attention(q, k, v, window=window, scale=self.scaling, cu_seqlens=cu_seqlens)
    return self.o_proj(out.reshape(n_batch, n_tokens, -1)), None


def _documents(starts: Tensor) -> Tensor:
    """(B, T) bool, True where a document starts → cu_seqlens of the flattened batch; its length does not depend on the documents."""
    n = starts.numel()
    places = torch.where(starts.flatten(), torch.arange(n, device=starts.device), n)
    return F.pad(places.sort().values, (0, 1), value=n).int()


def _plan(self, attention_mask, position_ids, cache, use_cache, n_batch: int, n_tokens: int, options: dict):
    """(mask to hand down, (whether the kernel can do it, its documents))."""
    from transformers import DynamicCache

    if options.get("output_attentions", self.config.output_attentions):
        raise ValueError("output_attentions: the fused attention does not compute the attention matrix; call unpatch(model) first")
    if not options.get("is_causal", getattr(self.config, "is_causal", True)):
        raise ValueError("is_causal=False: the patched attention is causal; unpatch(model) first")
    if options.get("cu_seq_lens_q") is not None:  # padding-free batches, in the form of transformers' flash-attention
        return attention_mask, (True, options["cu_seq_lens_q"].int())
    is_cached = cache is not None
    if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2):
        return attention_mask, (False, None)
    if is_cached and not isinstance(cache, DynamicCache):
        return attention_mask, (False, None)
    is_fresh = not is_cached or cache.get_seq_length() == 0
    if attention_mask is None:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if position_ids is None or is_cached or use_cache:
            return None, (True, None)
        steps = position_ids.diff(dim=-1) != 1  # positions that jump start another document
        if not torch.compiler.is_compiling() and not steps.any():
            return None, (True, None)
        starts = F.pad(steps, (1, 0), value=True).expand(n_batch, -1)
        return None, (True, _documents(starts))
    real = attention_mask.bool()
    if torch.compiler.is_compiling():
        is_padded = True
    else:
        is_padded = not real.all()
        if is_padded and (real.diff(dim=-1).sum(-1) > 1 + ~real[:, 0]).any():
            return attention_mask, (False, None)  # holes between real tokens
    if not is_padded:
        return None, (True, None)
    if not is_fresh or real.shape != (n_batch, n_tokens):
        return attention_mask, (False, None)
    return None, (True, _documents(F.pad(real.diff(dim=-1), (1, 0), value=True)))


def _base_model(
    self, input_ids: Any = None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds: Any = None, use_cache=None,
    *, cache=None, **kwargs,
):  # fmt: skip
    cache = past_key_values if cache is None else cache
    n_batch, n_tokens, *_ = input_ids.shape if inputs_embeds is None else inputs_embeds.shape
    attention_mask, plan = _plan(self, attention_mask, position_ids, cache, use_cache, n_batch, n_tokens, kwargs)
    return type(self).forward(
        self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
        use_cache=use_cache, tritale_attention=plan, **{_cache_name(): cache}, **kwargs,
    )  # fmt: skip


def _causal_lm(
    self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None, use_cache=None,
    logits_to_keep=0, *, cache=None, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs,
):  # fmt: skip
    from transformers.modeling_outputs import CausalLMOutputWithPast

    inputs = {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds,
        "use_cache": use_cache, _cache_name(): past_key_values if cache is None else cache,
    }  # fmt: skip
    if labels is None and shift_labels is None:
        return type(self).forward(self, **inputs, logits_to_keep=logits_to_keep, **kwargs)
    return_dict = kwargs.pop("return_dict", None)
    outputs = self.model(**inputs, **kwargs)
    x = outputs.last_hidden_state  # (B, T, width)
    if shift_labels is None:  # the next token's
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    targets = shift_labels.reshape(x.shape[:-1]).to(x.device)
    normalizer = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=x.device)
    if self.training and type(self.lm_head) is nn.Linear:
        logits, loss = None, linear_cross_entropy(x, self.lm_head.weight, targets, ignore_index=ignore_index, normalizer=normalizer)
    else:
        logits = self.lm_head(x)
        loss = cross_entropy(logits, targets, ignore_index=ignore_index, normalizer=normalizer)
    result = CausalLMOutputWithPast(
        loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        **{_cache_name(): getattr(outputs, _cache_name())},
    )  # fmt: skip
    return_dict = self.config.return_dict if return_dict is None else return_dict
    return result if return_dict else result.to_tuple()


def _forwards(prefix: str) -> dict[type, Callable]:
    """The kernel form of each class's forward."""
    from importlib import import_module

    module = import_module(f"transformers.models.{prefix.lower()}.modeling_{prefix.lower()}")
    forwards = {"RMSNorm": _norm, "MLP": _mlp, "Attention": _attention, "Model": _base_model, "ForCausalLM": _causal_lm}
    return {getattr(module, prefix + name): forward for name, forward in forwards.items()}


def _is_ours(forward) -> bool:
    return getattr(forward, "__func__", None) in (_norm, _mlp, _attention, _base_model, _causal_lm)


def patch_transformers(model: Model) -> Model:
    """Make `model`, a Llama, Mistral or Qwen3 of transformers, run the kernels, in place; returns it. `unpatch` undoes it.

    Works for the bare model, the causal language model and what wraps them with a `config` (PEFT); gradient checkpointing, KV cache,
    left- and right-padded and packed batches included. In training mode with labels, `logits` is None. To find padding and documents,
    a forward pass reads the attention mask or the positions back from the device: it synchronises once or twice, unless it is compiled.

    Raises ValueError for another architecture, or a model set up in a way that the kernels do not compute."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(f"patch_transformers supports {', '.join(ARCHITECTURES)}, not {kind!r}; use the ops of tritale.kernels directly")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"config.hidden_act is {config.hidden_act!r}; the kernel of the MLP is SwiGLU, so it must be 'silu'")
    if config.attention_dropout:
        raise ValueError(f"config.attention_dropout is {config.attention_dropout}; the kernels have no dropout, set it to 0")
    forwards = _forwards(ARCHITECTURES[kind])
    modules = [m for m in model.modules() if type(m) in forwards]
    for module in modules:
        if "forward" in module.__dict__:
            who = "patch_transformers" if _is_ours(module.forward) else "something else"
            raise ValueError(f"{type(module).__name__}.forward was already replaced by {who}; undo that first")
    for module in modules:
        module.forward = MethodType(forwards[type(module)], module)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch_transformers`; a model that is not patched stays as it is."""
    for module in model.modules():
        if _is_ours(module.__dict__.get("forward")):
            del module.forward
    return model
