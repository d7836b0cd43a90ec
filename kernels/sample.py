"""The choice of the next token of each sequence on the device: penalty, temperature, top-k, top-p, min-p and the draw, without a sort.

    s = logits, penalised where seen, / temperature;   p = softmax(s) over the tokens that all filters keep
    the token is the first whose cumulative p, in descending order (in the order of ids if no filter is on), is above u

Each filter keeps the tokens from a threshold upwards, and the drawn token is one too: the largest t with weight{s ≥ t} above a goal, where
the weight of a token is 1 (top-k) or exp(s − max s) (top-p, and the draw). A program finds the thresholds of its row by bisection. After
each pass over the row both ends of the interval are the nearest scores, so the search ends when one score is left: 12 to 20 passes over a
vocabulary of 65,000. What top-k keeps is copied, so that the passes after it are short. Weights are integers, 2³⁰ for the most likely
token, so their sums are exact in any order.

Bytes: a first kernel reads the logits once and writes int32 keys that are ordered as the scores are. The second reads these 4 V bytes at
each pass, from the L2 cache: about 20 times with top-k (and top-p), 30 times with top-p alone, 20 times with no filter, 2 times if greedy.
"""

import torch
from torch import Tensor

from . import reference
from .common import LOG2E
from .dispatch import uses_triton
from .launch import cdiv, launch_options
from .triton_compat import jit, tl

NOT_FINITE = tl.constexpr(0x7FFFFFFF)  # the key of a score that is not finite
LEAST = tl.constexpr(-2139095041)  # the key of −inf


@jit
def _flip(b_bits):
    """The bits of a float as an int32 that is ordered as the float is, and back."""
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@jit
def _sample_keys(
    p_logits, p_settings, p_seen, p_key,  # (B, V), (B, 5), (B, V), (B, V)
    n_token, stride_logits, stride_settings, stride_seen,
    COLDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(0).to(tl.int64)
    p_settings += o_b * stride_settings
    temperature, top_p, penalty = tl.load(p_settings), tl.load(p_settings + 2), tl.load(p_settings + 4)
    is_greedy = (temperature == 0) | (top_p == 0)
    o_v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < n_token
    b_s = tl.load(p_logits + o_b * stride_logits + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_seen = tl.load(p_seen + o_b * stride_seen + o_v, mask=m_v, other=0)
    b_s = tl.where(b_seen != 0, tl.where(b_s < 0, b_s * penalty, b_s / penalty), b_s)
    b_s = b_s / tl.where(is_greedy, 1.0, tl.maximum(temperature, COLDEST)) + 0.0  # −0 + 0 = 0: equal scores have equal keys
    b_key = tl.where(tl.abs(b_s) < float("inf"), _flip(b_s.to(tl.int32, bitcast=True)), NOT_FINITE)
    tl.store(p_key + o_b * n_token + o_v, b_key, mask=m_v)


@jit
def _weights(b_key, top):
    return (tl.exp2((_flip(b_key).to(tl.float32, bitcast=True) - top) * LOG2E) * 1073741824.0 + 0.5).to(tl.int32)


@jit
def _weight_from(p_key, n, top, threshold, BLOCK: tl.constexpr):
    """The weight of all tokens whose key is at least the threshold."""
    b_sum = tl.zeros([BLOCK], dtype=tl.int64)
    for o in range(0, n, BLOCK):
        o_v = o + tl.arange(0, BLOCK)
        b_key = tl.load(p_key + o_v, mask=o_v < n, other=LEAST)
        b_sum += tl.where(b_key >= threshold, _weights(b_key, top), 0)
    return tl.sum(b_sum, 0)


@jit
def _threshold(p_key, n, top, low, high, goal, by_id, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key in [low, high] with at least the weight `goal` (COUNTS: that many tokens) in the tokens from it upwards. The tokens
    from `low` upwards must have that weight. `by_id`: a token's key is −id."""
    while low < high:
        middle = ((low.to(tl.int64) + high + 1) >> 1).to(tl.int32)
        b_weight = tl.zeros([BLOCK], dtype=tl.int64)
        b_low, b_high = tl.zeros([BLOCK], dtype=tl.int32) + low, tl.zeros([BLOCK], dtype=tl.int32) + high
        for o in range(0, n, BLOCK):
            o_v = o + tl.arange(0, BLOCK)
            b_key = tl.load(p_key + o_v, mask=o_v < n, other=LEAST)
            b_order = tl.where(by_id, -o_v, b_key)
            is_above = b_order >= middle
            b_weight += tl.where(is_above, 1 if COUNTS else _weights(b_key, top), 0)
            b_high = tl.where(is_above, tl.minimum(b_high, b_order), b_high)
            b_low = tl.where(is_above, b_low, tl.maximum(b_low, b_order))
        if tl.sum(b_weight, 0) >= goal:
            low = tl.min(b_high, 0)
        else:
            high = tl.max(b_low, 0)
    return low


@jit
def _sample(
    p_key, p_kept,  # (B, V) int32; what top-k keeps
    p_random,  # (B,) int64 in [0, 2⁶³)
    p_settings,  # (B, 5): temperature, top-k, top-p, min-p, repetition penalty
    p_token,  # (B,) int64
    n_token, stride_settings,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(0).to(tl.int64)
    p_key += o_b * n_token
    p_settings += o_b * stride_settings
    temperature, top_k, top_p, min_p = tl.load(p_settings), tl.load(p_settings + 1), tl.load(p_settings + 2), tl.load(p_settings + 3)
    is_greedy = (temperature == 0) | (top_p == 0)
    by_id = (is_greedy == 0) & (top_k >= n_token) & (top_p >= 1) & (min_p <= 0)

    b_most, b_least = tl.full([BLOCK], LEAST, dtype=tl.int32), tl.full([BLOCK], NOT_FINITE, dtype=tl.int32)
    for o in range(0, n_token, BLOCK):
        o_v = o + tl.arange(0, BLOCK)
        b_key = tl.load(p_key + o_v, mask=o_v < n_token, other=LEAST)
        b_most = tl.maximum(b_most, b_key)
        b_least = tl.minimum(b_least, tl.where(o_v < n_token, b_key, NOT_FINITE))
    key, low = tl.max(b_most, 0), tl.min(b_least, 0)
    token = tl.cast(-1, tl.int32)
    if key != NOT_FINITE:
        rest, weight = tl.cast(0, tl.int64), tl.cast(1, tl.int64)  # of the tokens with the same key
        if is_greedy == 0:
            top = _flip(key).to(tl.float32, bitcast=True)
            p_from, n = p_key, tl.cast(n_token, tl.int32)
            if top_k < n_token:
                low = _threshold(p_key, n_token, top, low, key, top_k.to(tl.int64), False, True, BLOCK)
                p_from, n = p_kept + o_b * n_token, tl.cast(0, tl.int32)
                for o in range(0, n_token, BLOCK):
                    o_v = o + tl.arange(0, BLOCK)
                    b_key = tl.load(p_key + o_v, mask=o_v < n_token, other=LEAST)
                    is_kept = b_key >= low
                    tl.store(p_from + n + tl.cumsum(is_kept.to(tl.int32), 0) - 1, b_key, mask=is_kept)
                    n += tl.sum(is_kept.to(tl.int32), 0)
                tl.debug_barrier()  # other threads read what this one has stored
            if top_p < 1:
                goal = (_weight_from(p_from, n, top, low, BLOCK).to(tl.float32) * top_p).to(tl.int64)
                low = _threshold(p_from, n, top, low, key, tl.maximum(goal, 1), False, False, BLOCK)
            if min_p > 0:
                least = top + tl.log2(min_p) / LOG2E + 0.0
                low = tl.maximum(low, _flip(least.to(tl.int32, bitcast=True)))
            goal = tl.umulhi(tl.load(p_random + o_b), 2 * _weight_from(p_from, n, top, low, BLOCK))  # u · total, rounded down
            low, high = tl.where(by_id, 1 - n_token, low), tl.where(by_id, 0, key)
            key = _threshold(p_from, n, top, low, high, goal + 1, by_id, False, BLOCK)
            if by_id == 0:
                above = _weight_from(p_from, n, top, key + 1, BLOCK)
                rest, weight = goal - above, _weights(key, top).to(tl.int64)
        if by_id:
            token = -key
        else:
            n_before = tl.cast(0, tl.int32)
            for o in range(0, n_token, BLOCK):
                o_v = o + tl.arange(0, BLOCK)
                is_equal = (tl.load(p_key + o_v, mask=o_v < n_token, other=LEAST) == key).to(tl.int32)
                b_weight = (n_before + tl.cumsum(is_equal, 0)) * weight  # of the equal ones so far: they share `rest` in the order of ids
                is_ours = (is_equal != 0) & (b_weight > rest) & (b_weight - weight <= rest)
                token = tl.maximum(token, tl.max(tl.where(is_ours, o_v, -1), 0))
                n_before += tl.sum(is_equal, 0)
    tl.store(p_token + o_b, token.to(tl.int64))


@torch.library.custom_op("tritale::sample", mutates_args=())
def _sample_op(logits: Tensor, random: Tensor, settings: Tensor, seen: Tensor) -> Tensor:
    (n_batch, n_token), token = logits.shape, random.new_empty(random.shape)
    key, kept = (logits.new_empty(logits.shape, dtype=torch.int32) for _ in range(2))
    if not n_batch:
        return token
    options = launch_options("sample_keys", logits)
    with torch.cuda.device_of(logits):
        _sample_keys[n_batch, cdiv(n_token, options["BLOCK"])](
            logits, settings, seen, key, n_token, logits.stride(0), settings.stride(0), seen.stride(0), COLDEST=reference.COLDEST, **options
        )
        _sample[n_batch,](key, kept, random, settings, token, n_token, settings.stride(0), **launch_options("sample", logits))
    return token


_sample_op.register_fake(lambda logits, random, *_: random.new_empty(random.shape))


def sample(
    logits: Tensor,  # (B, V) of any dtype
    random: Tensor,  # (B,) int64, uniform in [0, 2⁶³)
    settings: Tensor,  # (B, 5) fp32: temperature, top-k, top-p, min-p, repetition penalty
    seen: Tensor,  # (B, V) bool: the tokens that the penalty applies to
) -> Tensor:
    """The next token of each sequence, (B,) int64, −1 where a logit is not finite. Each row has its own settings, with the meaning and the
    order of `transformers`: repetition penalty, temperature, top-k, top-p, min-p. Temperature 0 and top-p 0 take the first of the most
    likely tokens; top-k ≥ V, top-p 1, min-p 0 and penalty 1 are off. Tokens as likely as the last that top-k or top-p keeps are kept.

    Raises ValueError if shapes or dtypes do not match."""
    n_batch, n_token = logits.shape
    is_fitting = random.shape == (n_batch,) and settings.shape == (n_batch, 5) and seen.shape == (n_batch, n_token)
    if not is_fitting or (random.dtype, settings.dtype, seen.dtype) != (torch.int64, torch.float32, torch.bool):
        given = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in (("random", random), ("settings", settings), ("seen", seen)))
        raise ValueError(f"logits {tuple(logits.shape)}, {given}: (B, V), (B,) int64, (B, 5) float32 and (B, V) bool expected")
    if not uses_triton(logits):
        return reference.sample(logits, random, settings, seen)
    return _sample_op(*(t if t.stride(-1) == 1 else t.contiguous() for t in (logits, random, settings, seen)))
