"""The choice of the next token of each sequence on the device: penalty, temperature, top-k, top-p, min-p and the draw, without a sort.

    s = logits, penalised where seen, / temperature;   p = softmax(s) over the tokens that all filters keep
    the token is the first whose cumulative p, in descending order (in the order of ids if no filter is on), is above u

Each filter keeps the tokens from a threshold upwards, and the drawn token is one too: the largest t with weight{s ≥ t} above a goal, where
the weight of a token is 1 (top-k) or exp(s − max s) (top-p, and the draw). A program finds the thresholds of its row by bisection. After
each pass over the row both ends of the interval are the nearest scores, so the search ends when one score is left: 10 to 15 passes over a
vocabulary of 65,000 for one threshold. Weights are integers, 2³⁰ for the most likely token, so their sums are exact in any order.

Bytes: (itemsize + 1) V a pass, which the L2 cache serves: with all filters about 40 passes, with none about 20, greedy 2.
"""

import torch
from torch import Tensor

from . import reference
from .common import LOG2E
from .dispatch import uses_triton
from .launch import launch_options
from .triton_compat import jit, tl


@jit
def _scores(p_logits, p_seen, o_v, n_token, inverse, penalty):
    """Scores of the tokens o_v, −inf beyond the vocabulary."""
    m_v = o_v < n_token
    b_x = tl.load(p_logits + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_seen = tl.load(p_seen + o_v, mask=m_v, other=0)
    b_x = tl.where(b_seen != 0, tl.where(b_x < 0, b_x * penalty, b_x / penalty), b_x)
    return b_x * inverse + 0.0  # −0 + 0 = 0: equal scores have equal keys


@jit
def _key(b_s):
    """An int32 that is ordered as the score is."""
    b_bits = b_s.to(tl.int32, bitcast=True)
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@jit
def _weights(b_s, top):
    return (tl.exp2((b_s - top) * LOG2E) * 1073741824.0 + 0.5).to(tl.int64)


@jit
def _weight_from(p_logits, p_seen, n_token, inverse, penalty, top, threshold, BLOCK: tl.constexpr):
    """The weight of all tokens whose key is at least the threshold."""
    b_sum = tl.zeros([BLOCK], dtype=tl.int64)
    for o in range(0, n_token, BLOCK):
        b_s = _scores(p_logits, p_seen, o + tl.arange(0, BLOCK), n_token, inverse, penalty)
        b_sum += tl.where(_key(b_s) >= threshold, _weights(b_s, top), 0).to(tl.int64)
    return tl.sum(b_sum, 0)


@jit
def _threshold(p_logits, p_seen, n_token, inverse, penalty, top, low, high, goal, by_id, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key in [low, high] with at least the weight `goal` (COUNTS: that many tokens) in the tokens from it upwards. The tokens
    from `low` upwards must have that weight. `by_id`: a token's key is −id."""
    while low < high:
        middle = ((low.to(tl.int64) + high + 1) >> 1).to(tl.int32)
        b_weight = tl.zeros([BLOCK], dtype=tl.int64)
        b_low, b_high = tl.zeros([BLOCK], dtype=tl.int32) + low, tl.zeros([BLOCK], dtype=tl.int32) + high
        for o in range(0, n_token, BLOCK):
            o_v = o + tl.arange(0, BLOCK)
            b_s = _scores(p_logits, p_seen, o_v, n_token, inverse, penalty)
            b_key = tl.where(by_id, -o_v, _key(b_s))
            is_above = b_key >= middle
            b_weight += tl.where(is_above, 1 if COUNTS else _weights(b_s, top), 0)
            b_high = tl.where(is_above, tl.minimum(b_high, b_key), b_high)
            b_low = tl.where(is_above, b_low, tl.maximum(b_low, b_key))
        if tl.sum(b_weight, 0) >= goal:
            low = tl.min(b_high, 0)
        else:
            high = tl.max(b_low, 0)
    return low


@jit
def _sample(
    p_logits,  # (B, V)
    p_random,  # (B,) int64 in [0, 2⁶³)
    p_settings,  # (B, 5): temperature, top-k, top-p, min-p, repetition penalty
    p_seen,  # (B, V) bool
    p_token,  # (B,) int64
    n_token, stride_logits, stride_settings, stride_seen,
    COLDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_b = tl.program_id(0).to(tl.int64)
    p_logits += o_b * stride_logits
    p_seen += o_b * stride_seen
    p_settings += o_b * stride_settings
    temperature, top_k, top_p = tl.load(p_settings), tl.load(p_settings + 1), tl.load(p_settings + 2)
    min_p, penalty = tl.load(p_settings + 3), tl.load(p_settings + 4)
    is_greedy = (temperature == 0) | (top_p == 0)
    inverse = 1.0 / tl.where(is_greedy, 1.0, tl.maximum(temperature, COLDEST))

    b_top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    b_bottom = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    b_wrong = tl.zeros([BLOCK], dtype=tl.int32)
    for o in range(0, n_token, BLOCK):
        o_v = o + tl.arange(0, BLOCK)
        b_s = _scores(p_logits, p_seen, o_v, n_token, inverse, penalty)
        is_finite = tl.abs(b_s) < float("inf")
        b_wrong += ((o_v < n_token) & (is_finite == 0)).to(tl.int32)
        b_top = tl.maximum(b_top, tl.where(is_finite, b_s, float("-inf")))
        b_bottom = tl.minimum(b_bottom, tl.where(is_finite, b_s, float("inf")))
    top = tl.max(b_top, 0)
    token = tl.cast(-1, tl.int32)
    if tl.sum(b_wrong, 0) == 0:
        key, rank = _key(top), tl.cast(0, tl.int64)
        by_id = (is_greedy == 0) & (top_k >= n_token) & (top_p >= 1) & (min_p <= 0)
        if is_greedy == 0:
            low = _key(tl.min(b_bottom, 0))
            if top_k < n_token:
                low = _threshold(p_logits, p_seen, n_token, inverse, penalty, top, low, key, top_k.to(tl.int64), False, True, BLOCK)
            if top_p < 1:
                total = _weight_from(p_logits, p_seen, n_token, inverse, penalty, top, low, BLOCK)
                goal = tl.maximum((total.to(tl.float32) * top_p).to(tl.int64), 1)
                low = _threshold(p_logits, p_seen, n_token, inverse, penalty, top, low, key, goal, False, False, BLOCK)
            if min_p > 0:
                low = tl.maximum(low, _key(top + tl.log2(min_p) / LOG2E))
            total = _weight_from(p_logits, p_seen, n_token, inverse, penalty, top, low, BLOCK)
            goal = tl.umulhi(tl.load(p_random + o_b), 2 * total)  # u · total, rounded down
            low, high = tl.where(by_id, 1 - n_token, low), tl.where(by_id, 0, key)
            key = _threshold(p_logits, p_seen, n_token, inverse, penalty, top, low, high, goal + 1, by_id, False, BLOCK)
            if by_id == 0:  # tokens with the same score follow each other in the order of ids
                above = _weight_from(p_logits, p_seen, n_token, inverse, penalty, top, key + 1, BLOCK)
                score = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
                rank = (goal - above) // tl.maximum(_weights(score, top), 1)
        if by_id:
            token = -key
        else:
            n_before = tl.cast(0, tl.int64)
            for o in range(0, n_token, BLOCK):
                o_v = o + tl.arange(0, BLOCK)
                is_equal = (_key(_scores(p_logits, p_seen, o_v, n_token, inverse, penalty)) == key).to(tl.int32)
                is_ours = (is_equal != 0) & (n_before + tl.cumsum(is_equal, 0) == rank + 1)
                token = tl.maximum(token, tl.max(tl.where(is_ours, o_v, -1), 0))
                n_before += tl.sum(is_equal, 0)
    tl.store(p_token + o_b, token.to(tl.int64))


@torch.library.custom_op("tritale::sample", mutates_args=())
def _sample_op(logits: Tensor, random: Tensor, settings: Tensor, seen: Tensor) -> Tensor:
    token = random.new_empty(random.shape)
    if len(logits):
        options = launch_options("sample", logits)
        with torch.cuda.device_of(logits):
            _sample[len(logits),](
                logits, random, settings, seen, token, logits.shape[1], logits.stride(0), settings.stride(0), seen.stride(0),
                COLDEST=reference.COLDEST, **options,
            )  # fmt: skip
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
