"""Which shapes vLLM and llama.cpp accept after training. Another shape costs a new training."""

from ..model.gpt import GPTConfig
from ..training.plan import PlanWarning

# CPUAttentionBackend.get_supported_head_sizes of vLLM (cpu_attn.py at 0035860; 512 came later). Another size is an error at its start.
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def compatibility_warnings(shape: GPTConfig) -> list[PlanWarning]:
    """What other tools do not accept about the shape."""
    found, head_dim = [], shape.head_dim
    # vLLM, vllm/v1/attention/backends: supports_head_size is `head_size % 8 == 0 and head_size <= 256` for FlashAttention (flash_attn.py at
    # 5704f34) and `head_size >= 32` for Triton (triton_attn.py at 001ceb3). FlexAttention takes what both refuse.
    if head_dim % 8 or head_dim > 256:
        other = "Triton attention" if head_dim >= 32 else "FlexAttention, the slowest"
        text = f"vLLM's FlashAttention does not take heads of {head_dim} (multiples of 8 up to 256), and it falls back to {other}"
        found.append(PlanWarning(text, f"set model.head_dim {min(256, max(8, round(head_dim / 8) * 8))}"))
    if head_dim not in VLLM_CPU_HEAD_SIZES:
        nearest = min(VLLM_CPU_HEAD_SIZES, key=lambda n: (abs(n - head_dim), -n))
        text = f"vLLM on a CPU does not take heads of {head_dim} (only {', '.join(map(str, VLLM_CPU_HEAD_SIZES))})"
        found.append(PlanWarning(text, f"set model.head_dim {nearest}"))
    # llama.cpp has no sliding window in its llama (Mistral) and qwen3 graphs: ggml-org/llama.cpp#3377, closed as stale.
    if shape.window is not None and shape.window < shape.context:
        text = f"llama.cpp has no sliding window for Mistral and Qwen3: beyond {shape.window} tokens it computes another model"
        found.append(PlanWarning(text, "leave model.window null, or serve with transformers or vLLM"))
    # llama.cpp: "K cache type q8_0 with block size 32 does not divide n_embd_head_k=48" (src/llama-context.cpp).
    if head_dim % 32:
        text = f"llama.cpp cannot quantize the KV cache of heads of {head_dim} (blocks of 32): leave out --cache-type-k and -v"
        found.append(PlanWarning(text, f"set model.head_dim {max(32, (head_dim + 16) // 32 * 32)}", is_note=True))
    # K-quants need rows of a multiple of 256. Other rows get a legacy quant of blocks of 32, or F16 (ggml-org/llama.cpp#1921, #3747,
    # #28474: q4_K → q5_0, "+37 %"). A row is the inner dimension of a matrix product.
    rows = {"width": shape.width, "n_head × head_dim": shape.n_head * head_dim, "mlp_width": shape.mlp_width}
    odd = {name: n for name, n in rows.items() if n % 256}
    if odd:
        kind = "f16" if any(n % 32 for n in odd.values()) else "q5_0 and q8_0"
        text = f"llama.cpp quantizes rows of {', '.join(f'{n} ({name})' for name, n in odd.items())} to {kind} instead of q4_K and q6_K"
        found.append(PlanWarning(text, "use multiples of 256 if the model is to be quantized to four bits", is_note=True))
    return found
