"""The kernels inside a Hugging Face Llama, Mistral or Qwen3 model, in place.

    patch_transformers(model)    # norms, rotary positions, attention, SwiGLU and the loss run the kernels
    unpatch(model)               # as it was

Each stock module becomes an instance of a subclass of its class; parameters, names, hooks and the state dict stay. The config's attention
implementation becomes "tritale-…": transformers decides which tokens see which (padding, packed positions, window, cache) and passes that
decision to `_plan`, which turns it into documents for the kernel. What the kernel cannot express (a mask with holes or of four dimensions,
a padded batch with a KV cache, a static cache, any mask under torch.compile) runs through the implementation that was set before. In
training mode with labels the loss comes from `linear_cross_entropy` and `logits` is None, since they are never all in memory.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flash_attention import flash_attention
from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu

Model = TypeVar("Model", bound=nn.Module)
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}  # model_type: prefix of its classes
PREFIX = "tritale-"  # of the attention implementation; the one that it falls back to follows


class Plan(NamedTuple):
    """What the kernel computes in place of a mask: causal attention, with a window, inside documents of the flattened batch."""

    window: int | None = None
    cu_seqlens: Tensor | None = None


def _documents(starts: Tensor) -> Tensor:
    """(B, T) bool, True if a document starts → cu_seqlens of the flattened batch; its length does not depend on the documents."""
    n = starts.numel()
    places = torch.where(starts.flatten(), torch.arange(n, device=starts.device), n)
    return F.pad(places.sort().values, (0, 1), value=n).int()


def _plan(mask_of: Callable, **options) -> Any:
    """The mask function of transformers' AttentionMaskInterface: a Plan, or the mask of the implementation before, `mask_of`."""
    n_batch, n_tokens, n_key = options["batch_size"], options["q_length"], options["kv_length"]
    q_offset, kv_offset, padding = options["q_offset"], options["kv_offset"], options["attention_mask"]
    is_causal = not options.get("use_vmap") and "allow_is_bidirectional_skip" not in options
    if not is_causal or not isinstance(q_offset, int) or q_offset + n_tokens != kv_offset + n_key:
        return mask_of(**options)
    window = options.get("local_size")
    is_square = n_tokens == n_key
    if padding is None:
        if options["allow_is_causal_skip"]:
            return Plan(window)
        if not is_square:
            return mask_of(**options)
        # Packed positions: a document starts at each token that may not see the token before it.
        rows, index = torch.arange(n_batch, device=options["device"])[:, None], torch.arange(1, n_tokens, device=options["device"])[None]
        starts = ~options["mask_function"](rows, 0, index, index - 1).expand(n_batch, -1)
        return Plan(window, _documents(F.pad(starts, (1, 0), value=True)))
    if (
        torch.compiler.is_compiling() or type(padding) is not Tensor
    ):  # its values are unknown, and with holes between tokens it is no row of documents
        return mask_of(**options)
    if padding.all():
        return Plan(window)
    change = padding.diff(dim=-1)
    if not is_square or padding.shape != (n_batch, n_tokens) or (change.sum(-1) > 1 + ~padding[:, 0]).any():
        return mask_of(**options)
    return Plan(window, _documents(F.pad(change, (1, 0), value=True)))


def _check_call(options: dict, module: Any) -> None:
    if options.get("output_attentions", getattr(module.config, "output_attentions", False)):
        raise ValueError("output_attentions: the fused attention does not compute the attention matrix; call unpatch(model) first")
    is_causal = options.get("is_causal")
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:  # as transformers' sdpa reads it
        raise ValueError("is_causal is False: the patched attention is causal; call unpatch(model) first")
    if given := [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]:
        raise ValueError(f"{given[0]} was given: the patched attention does not compute it; call unpatch(model) first")
    if options.get("dropout"):
        raise ValueError(
            f"attention dropout is {options['dropout']}; the kernels have no dropout, set it to 0 or call unpatch(model) first"
        )


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float | None, plan: Plan, options: dict) -> Tensor:
    """(B, T, H, D), (B, S, H_kv, D) → (B, T, H, D)."""
    _check_call(options, module)
    cu_seqlens = options.get("cu_seq_lens_q")  # padding-free batches, in the form of transformers' flash-attention
    cu_seqlens = plan.cu_seqlens if cu_seqlens is None else cu_seqlens.int()
    shape = q.shape
    if cu_seqlens is not None:
        q, k, v = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v))
    return flash_attention(q, k, v, window=plan.window, scale=scale, cu_seqlens=cu_seqlens).view(shape)


def _attention_function(before: Callable, module: nn.Module, query, key, value, attention_mask, scaling=None, **options):
    """The attention of transformers' AttentionInterface, for modules that were not patched themselves; tensors are (B, H, T, D)."""
    if not isinstance(attention_mask, Plan):
        return before(module, query, key, value, attention_mask, scaling=scaling, **options)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return _attend(module, q, k, v, scaling, attention_mask, options), None


class _Patched:
    """Marks the subclasses that `patch_transformers` gives to modules."""


class _Norm(_Patched):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _MLP(_Patched):
    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _is_stock(self.act_fn, "SiLU", "SiLUActivation"):
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class _Attention(_Patched):
    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask=None, *args, **kwargs):
        if not isinstance(attention_mask, Plan) or args:
            return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)  # pyright: ignore
        n_batch, n_tokens, _ = hidden_states.shape
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H, D)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (t[..., : t.shape[-1] // 2].flatten(0, 1) for t in position_embeddings)  # (1 or B, T, D): both halves are alike
        own = cos.shape[0] != n_tokens  # each sequence of the batch has its own positions
        rows = torch.arange(n_batch * n_tokens, device=q.device).view(n_batch, n_tokens) if own else None
        q, k = rope(q, k, cos, sin, positions=rows)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, S, H_kv, D)
        dropout = self.attention_dropout if self.training else 0.0
        out = _attend(self, q, k, v, self.scaling, attention_mask, {**kwargs, "dropout": dropout})
        return self.o_proj(out.flatten(2)), None


class _CausalLM(_Patched):
    def forward(self: Any, *args, **kwargs):
        kwargs |= zip(("input_ids", "attention_mask", "position_ids", _cache_name(), "inputs_embeds", "labels", "use_cache"), args)  # noqa: B905
        if kwargs.get("labels") is None or not self.training or not _has_stock_loss(self):
            return super().forward(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return _training_loss(self, **kwargs)


def _training_loss(
    self, *, labels: Tensor, num_items_in_batch=None, ignore_index: int = -100, shift_labels: Tensor | None = None, return_dict=None,
    logits_to_keep=0, **kwargs,
):  # fmt: skip
    from transformers.modeling_outputs import CausalLMOutputWithPast

    outputs = self.model(**kwargs)
    x = outputs.last_hidden_state  # (B, T, width)
    if shift_labels is None:  # the next token's
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    targets = shift_labels.reshape(x.shape[:-1]).to(x.device)
    normalizer = None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=x.device)
    loss = linear_cross_entropy(x, self.lm_head.weight, targets, ignore_index=ignore_index, normalizer=normalizer)
    cache = {_cache_name(): getattr(outputs, _cache_name())}
    result = CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **cache)
    return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


def _cache_name() -> str:
    """What this transformers calls the KV cache: `cache` from 5.24 on, `past_key_values` before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _is_stock(module: nn.Module, *names: str) -> bool:
    """Whether calling the module runs its class's forward and nothing else; the class has one of the names."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module).__name__ in names and not any(hooks) and "forward" not in module.__dict__


def _has_stock_loss(model: Any) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING

    has_stock_head = _is_stock(model.lm_head, "Linear") and model.lm_head.bias is None
    return has_stock_head and model.loss_function is LOSS_MAPPING["ForCausalLM"]


PARTS = {"RMSNorm": _Norm, "MLP": _MLP, "Attention": _Attention, "ForCausalLM": _CausalLM}


@functools.cache
def _patched_class(prefix: str, part: str) -> type:
    """The subclass of a stock class that runs the kernels. It has the stock name, and a qualified name by which pickle finds it."""
    stock = getattr(import_module(f"transformers.models.{prefix.lower()}.modeling_{prefix.lower()}"), prefix + part)
    ours = PARTS[part].forward
    forward = FunctionType(ours.__code__, ours.__globals__, "forward", ours.__defaults__, ours.__closure__)
    forward = functools.wraps(stock.forward)(forward)  # keeps the original signature: trainers read the names of the inputs from it
    names = {"__module__": __name__, "__qualname__": f"Patched{prefix}{part}", "forward": forward}
    return type(prefix + part, (PARTS[part], stock), names)


def __getattr__(name: str) -> type:
    for prefix in ARCHITECTURES.values():
        for part in PARTS:
            if name == f"Patched{prefix}{part}":
                for before in ("sdpa", "eager"):  # an unpickled model runs in a process that did not patch it
                    _register(before)
                return _patched_class(prefix, part)
    raise AttributeError(name)


def _register(before: str) -> str:
    """The attention implementation that falls back to `before`, made known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # "eager" is not registered in transformers' attention interface; sdpa gives the same results.
    inner = "sdpa" if before == "eager" else before
    AttentionMaskInterface.register(PREFIX + before, functools.partial(_plan, ALL_MASK_ATTENTION_FUNCTIONS[inner]))
    AttentionInterface.register(PREFIX + before, functools.partial(_attention_function, ALL_ATTENTION_FUNCTIONS[inner]))
    return PREFIX + before


def _stock(patched: type) -> type:
    return patched.__bases__[1]


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configs of the model and its modules."""
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    return [c for c in configs.values() if isinstance(getattr(c, "_attn_implementation", None), str)]


def _refuse_sharded(model: nn.Module, action: str) -> None:
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if any(isinstance(m, FSDPModule) for m in model.modules()):
            raise ValueError(f"fully_shard was applied to the model, which changes the classes of its modules; {action}")


def patch_transformers(model: Model) -> Model:
    """Make `model`, a Llama, Mistral or Qwen3 of transformers, run the kernels, in place; returns it. `unpatch` undoes it.

    Works for the bare model, the causal language model and what wraps them with a `config` (PEFT); gradient checkpointing, KV cache,
    left- and right-padded and packed batches, pickling and copies included. In training mode with labels, `logits` is None. Only modules of
    the stock classes are patched; a subclass, a replaced activation or head, one with hooks or a bias, and another loss run as they are.
    A padded batch is found by reading the attention mask back from the device; compiled, it runs transformers' own attention.

    Raises ValueError for another architecture, a model that the kernels do not compute, or one that is patched or sharded already."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(f"patch_transformers supports {', '.join(ARCHITECTURES)}, not {kind!r}; use the ops of tritale.kernels directly")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"config.hidden_act is {config.hidden_act!r}; the kernel of the MLP is SwiGLU, so it must be 'silu'")
    if config.attention_dropout:
        raise ValueError(f"config.attention_dropout is {config.attention_dropout}; the kernels have no dropout, set it to 0")
    from transformers.masking_utils import sdpa_mask

    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ValueError("patch_transformers needs a newer transformers, whose mask functions take q_length: pip install -U transformers")
    _refuse_sharded(model, "call patch_transformers before fully_shard")
    if any(isinstance(m, _Patched) for m in model.modules()):
        raise ValueError("the model was already replaced by patch_transformers; call unpatch(model) first")
    prefix = ARCHITECTURES[kind]
    classes = {_stock(patched): patched for patched in (_patched_class(prefix, part) for part in PARTS)}
    modules = [m for m in model.modules() if type(m) in classes]
    for module in modules:
        if "forward" in module.__dict__:
            raise ValueError(f"{type(module).__name__}.forward was already replaced by something else; undo that first")
    for module in modules:
        module.__class__ = classes[type(module)]
    for config in _configs(model):
        if not str(config._attn_implementation).startswith(PREFIX):  # two models may share one config
            config._attn_implementation = _register(config._attn_implementation or "sdpa")
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch_transformers`; a model that is not patched stays as it is.

    Raises ValueError, and changes nothing, if a patched forward was replaced or the model was sharded since."""
    modules = [m for m in model.modules() if isinstance(m, _Patched)]
    if not modules:
        return model
    _refuse_sharded(model, "a sharded model cannot be unpatched")
    for module in modules:
        if "forward" in module.__dict__:
            raise ValueError(f"{type(module).__name__}.forward was replaced after patch_transformers (by accelerate?); undo that first")
    for module in modules:
        module.__class__ = _stock(type(module))
    for config in _configs(model):
        config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)
    return model
