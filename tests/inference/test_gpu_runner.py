"""The decoder of a GPU, there or through Triton's interpreter: its tokens are those of `native.c`. tests/nullgpu counts what a step
launches."""

import copy

import pytest
import torch

from tritale.common.sampling import Sampling
from tritale.inference import Decoder, Sequence, native
from tritale.inference.gpu_runner import GPURunner
from tritale.inference.sampling import candidates, draw
from tritale.kernels import dispatch, reference
from tritale.model import GPT, GPTConfig

SHAPES = {"mistral": {"window": 6}, "qwen3": {"qk_norm": True, "tie_embeddings": False}}
SETTINGS = [
    {"temperature": 0}, {}, {"temperature": 1.0, "top_k": None, "top_p": 1.0}, {"top_k": None, "top_p": 0.8, "repetition_penalty": 1.3},
    {"top_k": None, "top_p": 1.0, "min_p": 0.05}, {"temperature": 0, "repetition_penalty": 1.5},
]  # fmt: skip


@pytest.fixture(params=SHAPES)
def model(request) -> GPT:
    """Large random weights, so that the logits differ clearly."""
    model = GPT(GPTConfig.preset("tiny", n_head=4, n_kv_head=2, head_dim=14, **SHAPES[request.param])).requires_grad_(False).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def on_gpu(monkeypatch):
    """A function that makes a GPU's decoder: on the GPU, or with interpreted kernels."""
    if not dispatch.has_triton():
        pytest.skip("needs Triton (Linux)")

    def decoder(model: GPT, **options) -> Decoder:
        if torch.cuda.is_available():
            model = copy.deepcopy(model).to("cuda")
        else:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(native, "can_run", lambda model: False)
        decoder = Decoder(model, **options)
        assert isinstance(decoder._runner, GPURunner)
        return decoder

    return decoder


def run(decoder: Decoder, prompts: list[list[int]], settings: list[dict]) -> list[list[int]]:
    """The ids after 9 steps: two sequences from the start, the others from the third step, and the first until the sixth."""
    sequences = [Sequence(list(ids), Sampling(seed=i, **s)) for i, (ids, s) in enumerate(zip(prompts, settings, strict=True))]
    for step in range(9):
        for sequence in {0: sequences[:2], 2: sequences[2:]}.get(step, []):
            decoder.add(sequence)
        if step == 5:
            decoder.remove(sequences[0])
        decoder.step()
    return [s.ids for s in sequences]


def test_tokens_are_those_of_native_c(model, on_gpu):
    """Prompts of 1 to 30 tokens in one batch, each with its own settings and seed."""
    if problem := native.problem():
        pytest.skip(problem)
    prompts = [torch.randint(500, (n,)).tolist() for n in (5, 1, 12, 3, 30, 2)]
    expected = run(Decoder(model, slots=6, n_token=500), prompts, SETTINGS)
    assert len({tuple(ids[-3:]) for ids in expected}) > 3 and max(map(max, expected)) < 500
    assert run(on_gpu(model, slots=6, n_token=500), prompts, SETTINGS) == expected


@pytest.mark.parametrize("dtype, gap", [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_greedy_tokens_in_16_bits_are_the_likeliest_up_to_rounding(dtype, gap, model, on_gpu):
    prompts = [torch.randint(512, (n,)).tolist() for n in (7, 2, 16)]
    written = run(on_gpu(model.to(dtype), slots=3), prompts, [{"temperature": 0}] * 3)
    for ids, prompt in zip(written, prompts, strict=True):
        assert len(ids) - len(prompt) >= 5
        logits = model.double()(torch.tensor([ids]))[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(ids[len(prompt) :])[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() <= gap * logits.std()


def test_a_sequence_runs_to_its_capacity(model, on_gpu):
    decoder, sequence = on_gpu(model, slots=2, capacity=6), Sequence([1, 2, 3], Sampling(seed=1))
    decoder.add(sequence)
    for _ in range(4):
        decoder.step()
    assert len(sequence.ids) == 7 and decoder._runner._state.positions[0] == 5
    with pytest.raises(ValueError, match="fill their 6 tokens"):
        decoder.step()


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_weights_that_are_not_finite_are_named(temperature, model, on_gpu):
    model.head[7, 0] = torch.nan
    decoder = on_gpu(model, slots=1)
    decoder.add(Sequence([1, 2], Sampling(temperature=temperature)))
    with pytest.raises(ValueError, match="weights hold NaN or infinity"):
        decoder.step()


@pytest.mark.parametrize("n_token", [50, 5000])
def test_the_device_draws_what_the_cpu_draws(n_token):
    """The definition of `sample` with the CPU's choice, for each filter."""
    filters = [
        {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.0},
        {"temperature": 1.0, "top_k": None, "top_p": 0.7, "min_p": 0.0}, {"temperature": 1.3, "top_k": None, "top_p": 0.9, "min_p": 0.05},
    ]  # fmt: skip
    u = torch.rand(200, dtype=torch.float64)
    for spread in (0.5, 2.0, 6.0):
        logits = torch.randn(200, n_token) * spread
        for given in filters:
            expected = draw(*candidates(logits, **given), u[:, None])
            settings = torch.tensor([given["temperature"], given["top_k"] or torch.inf, given["top_p"], given["min_p"], 1.0]).repeat(200, 1)
            random = (u * 2.0**63).long()
            found = reference.sample(logits, random, settings, torch.zeros_like(logits, dtype=torch.bool))
            assert (found != expected).sum() <= 1  # at a limit of the cumulative distribution fp32 and fp64 may differ
