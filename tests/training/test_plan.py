"""The plan compared with what is built, allocated and written; each warning when it applies and when it does not."""

import contextlib
import dataclasses
import gc
import re
from typing import Any

import pytest
import torch
from runs import REPOSITORY, TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from tritale.common.errors import UserError
from tritale.common.run_folder import step_folders
from tritale.data.batches import Batches
from tritale.data.built_in import open_data
from tritale.data.shards import Split
from tritale.evaluation.compatibility import compatibility_warnings
from tritale.kernels import cpu, dispatch
from tritale.model import GPT
from tritale.training import plan as planning
from tritale.training.config import RunConfig, parse
from tritale.training.plan import DataFacts, DeviceFacts, known_data, plan
from tritale.training.processes import Processes, data_sheet_tflops
from tritale.training.step import TrainingStep, measure, random_batch

HERE = Processes(rank=0, world_size=1, device=torch.device("cpu"))
CPU = DeviceFacts(
    name="CPU, 1 threads",
    count=1,
    precision="fp32",
    has_bf16=False,
    runs_triton=False,
    compiler_missing=None,
    free_memory=16 * 10**9,
    free_disk=10**12,
    flops=1e11,
    flops_source="measured now",
)
DATA = DataFacts("somewhere", vocab_size=6400, tokens=640_000_000, documents=3_900_000, characters=1_000_000_000)
# Without warnings: heads of 64, rows of 256 and 512, a small embedding, a schedule that decays.
CLEAN = {
    "model.n_layer": 8,
    "model.n_head": 4,
    "model.n_kv_head": 4,
    "model.head_dim": 64,
    "model.width": 256,
    "model.mlp_width": 512,
    "model.context": 512,
    "train.max_steps": 20_000,
    "train.global_batch": 64,
    "train.micro_batch": 8,
    "train.checkpoint_every": 1000,
    "optim.schedule": "cosine",
}


def configured(**changes) -> RunConfig:
    sections = {}
    for key, value in (CLEAN | {k.replace("__", "."): v for k, v in changes.items()}).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    config = RunConfig()
    return dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()})


def warnings(data=DATA, device=CPU, **changes) -> str:
    planned = plan(configured(**changes), data, device)
    return " | ".join(f"{w.text} → {w.remedy}" for w in (*planned.warnings, *compatibility_warnings(planned.shape)))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_project_can_be_planned(path):
    config = parse(["--config", str(path)])
    if config.init_from:
        with pytest.raises(FileNotFoundError, match=f"{config.init_from} is not a folder; give a run"):
            config.shape(None)
        return
    planned = plan(config, DataFacts("given", config.data.vocab_size, 2_000_000_000), CPU)
    assert planned.parameters > 0 and not any("anneals" in w.text for w in planned.warnings)


def test_the_series_run_has_the_series_numbers():
    config = parse(["--config", str(REPOSITORY / "configs" / "microstories-44m.yaml")])
    p = plan(config, DataFacts("series", 65_024, 640_000_000), CPU)
    assert (round(p.parameters / 1e6, 1), round(p.embedding / 1e6, 1)) == (43.9, 33.3)
    assert (p.tokens_per_step, p.micro_batches, p.steps_per_epoch) == (262_144, 16, 2441)
    assert p.rates[0] == pytest.approx(5e-7) and p.rates[2] == 0 and 2e-4 < p.rates[1] < 3e-4
    assert round(plan(config, DataFacts("series", 6400, None), CPU).parameters / 1e6, 1) == 13.9
    endless = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=int(3e12 / 262_144)))
    text = " ".join(w.text for w in plan(endless, DataFacts("series", 65_024, 640_000_000), CPU).warnings)
    assert "4,688 epochs" in text and "still 100.0% of its peak" in text


def test_a_clean_plan_has_no_warnings():
    assert warnings() == ""


@pytest.mark.parametrize(
    "changes, facts, message",
    [
        ({"optim.min_lr_ratio": 0.9}, {}, "never anneals.*min_lr_ratio is 0.9"),
        ({"optim.schedule": "wsd", "optim.decay_fraction": 0.01}, {}, "never anneals.*decay_fraction is 0.01"),
        ({"optim.warmup_steps": 19_000}, {}, "never anneals.*warmup_steps 2000"),
        (
            {"optim.schedule": "wsd", "optim.warmup_steps": 15_000, "optim.decay_fraction": 0.3},
            {},
            "decay begins before the warm-up of 15000 steps ends.*warmup_steps 2000 and optim.decay_fraction 0.3",
        ),
        ({"train.max_steps": 400_000}, {}, "20 epochs.*max_steps 312496"),
        ({}, {"vocab_size": 65_024}, "embedding.*--vocab-size 6400 the embedding is 24% of 6.9 M"),
        ({}, {"vocab_size": 200_000, "tokens": None}, "embedding"),
        ({}, {"tokens": 30_000}, r"less than one step.*global_batch 56 "),
        ({}, {"free_memory": 5 * 10**8}, r"a micro-batch of 8 needs .* 500 MB are free.*micro_batch 4"),
        ({}, {"free_memory": 10**7}, "a smaller model"),
        ({}, {"free_disk": 10**9}, "the checkpoints will take .*keep_last"),
        ({}, {"precision": "bf16"}, "no bf16 instructions"),
        ({}, {"compiler_missing": "No working C++ compiler"}, r"torch.compile is off.*apt install g\+\+"),
        ({"model.window": 128}, {}, "llama.cpp has no sliding window.*128"),
        ({"model.head_dim": 40}, {}, "kernels pad heads of 40 to 48, which wastes 20%.*head_dim (32|48)"),
        ({"model.head_dim": 300}, {}, "FlashAttention does not take heads of 300.*Triton.*head_dim 256"),
        ({"model.head_dim": 20}, {}, "FlashAttention does not take heads of 20.*FlexAttention"),
        ({"model.head_dim": 48}, {}, "vLLM on a CPU does not take heads of 48.*head_dim 64"),
        ({"model.head_dim": 48}, {}, "KV cache of heads of 48.*head_dim 64"),
        ({"model.mlp_width": 544}, {}, r"rows of 544 \(mlp_width\) to q5_0"),
        ({"model.mlp_width": 540}, {}, r"rows of 540 \(mlp_width\) to f16"),
    ],
)
def test_each_warning_is_made_with_its_remedy(changes, facts, message):
    data = dataclasses.replace(DATA, **{k: v for k, v in facts.items() if hasattr(DATA, k)})
    device = dataclasses.replace(CPU, **{k: v for k, v in facts.items() if hasattr(CPU, k)})
    assert re.search(message, warnings(data, device, **changes))


def test_packed_documents_on_a_gpu_take_heads_of_at_most_256():
    gpu = dataclasses.replace(CPU, runs_triton=True)
    message = "model.head_dim is 258, and packed documents on a GPU take heads of at most 256; set model.head_dim 256, or data.doc"
    with pytest.raises(UserError, match=message):
        plan(configured(model__head_dim=258), DATA, gpu)
    for device, changes in ((gpu, {"model__head_dim": 256}), (gpu, {"data__document_mask": False}), (CPU, {})):
        assert plan(configured(**{"model__head_dim": 258, **changes}), DATA, device).parameters


def test_values_just_inside_a_limit_make_no_warning():
    """16 epochs, a usual min_lr_ratio, a window as long as the context, heads that need no padding."""
    assert DATA.tokens
    steps_per_epoch = DATA.tokens // (64 * 512)
    assert "epochs" not in warnings(train__max_steps=16 * steps_per_epoch)
    assert "anneals" not in warnings(optim__min_lr_ratio=0.1)
    assert "window" not in warnings(model__window=512)
    assert "kernels pad" not in warnings(model__head_dim=96) and warnings(model__head_dim=96, model__n_head=8, model__n_kv_head=8) == ""


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [{}, {"model.tie_embeddings": False, "model.qk_norm": True}])
def test_parameters_and_persistent_memory_are_the_models(matrices, shape):
    config = configured(optim__matrices=matrices, model__n_layer=2, **shape)
    p = plan(config, dataclasses.replace(DATA, vocab_size=700), dataclasses.replace(CPU, compiler_missing="not here"))
    step = TrainingStep(p, HERE)
    step.backward(random_batch(p, 1))
    step.update()
    tensors = [t for o in step.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    assert p.parameters == sum(t.numel() for t in step.model.parameters())
    assert p.memory.weights == sum(t.nbytes for t in step.model.parameters())
    assert p.memory.gradients == sum(t.grad.nbytes for t in step.model.parameters() if t.grad is not None)
    assert p.memory.optimizer == sum(t.nbytes for t in tensors)


def saved_bytes(model, batch, *, bf16=False) -> int:
    """Bytes that the forward pass saves for the backward pass, each storage once, without parameters and inputs."""
    own = [*model.parameters(), *model.buffers(), batch.tokens, batch.targets]
    sizes = {t.untyped_storage()._cdata: 0 for t in own}
    alive: list[torch.UntypedStorage] = []

    def pack(t):
        alive.append(t.untyped_storage())  # so that no address is reused
        sizes.setdefault(alive[-1]._cdata, alive[-1].nbytes())
        return t

    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, normalizer=torch.tensor(1.0))
    return sum(sizes.values())


def expected_saved(p, micro_batch) -> int:
    """The estimate of `saved_bytes`: activations, and the two gradients that the loss computes in the forward pass."""
    rows, item = micro_batch * p.sequence, 4 if p.device.precision == "fp32" else 2
    needs = planning.memory(p.config, p.shape, p.device, micro_batch, p.parameters, 0)
    return needs.activations + 4 * p.shape.vocab_size * p.shape.width + rows * p.shape.width * item


SHAPES = [
    {"model.n_layer": 3, "model.qk_norm": True, "model.mlp_width": 320},
    {"model.n_layer": 2, "model.n_head": 6, "model.n_kv_head": 2, "model.head_dim": 48, "model.width": 160},
]


@pytest.fixture(params=["C", "definition"])
def eager_cpu(request, monkeypatch) -> DeviceFacts:
    """A CPU whose uncompiled ops are those of cpu.c, or their definition as without a C compiler."""
    if request.param == "definition":
        monkeypatch.setattr(cpu, "_library", lambda: None)
    elif not cpu.is_available():
        pytest.skip("no C compiler")
    return dataclasses.replace(CPU, runs_c_ops=cpu.is_available())


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_the_forward_pass_saves(shape, eager_cpu):
    p = plan(configured(train__compile=False, model__context=128, **shape), dataclasses.replace(DATA, vocab_size=900), eager_cpu)
    model = GPT(p.shape)
    assert saved_bytes(model, random_batch(p, 4)) == pytest.approx(expected_saved(p, 4), rel=0.03 if eager_cpu.runs_c_ops else 0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_of_the_gpu_path_are_what_the_forward_pass_saves(shape, monkeypatch):
    """bf16 through the ops of the Triton kernels, on fake tensors of the real shapes."""
    if not dispatch.has_triton():
        pytest.skip("needs Triton (Linux)")
    device = dataclasses.replace(CPU, precision="bf16", runs_triton=True)
    p = plan(configured(model__context=64, **shape), dataclasses.replace(DATA, vocab_size=500), device)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with FakeTensorMode():
        saved = saved_bytes(GPT(p.shape), random_batch(p, 2), bf16=True)
    assert saved == pytest.approx(expected_saved(p, 2), rel=0.02)


def allocated_peak(work) -> int:
    """Peak bytes allocated by torch's allocator during `work`, from the profiler's memory events."""
    gc.collect()  # or what earlier tests have left is freed in between
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    kineto: Any = profile.profiler and profile.profiler.kineto_results  # its stubs lack nbytes
    events = sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab_size", [900, 20_000])
def test_the_peak_of_a_step_is_within_a_tenth_of_the_estimate(shape, vocab_size, eager_cpu):
    """Weights, gradients, optimizer state, activations, and the loss's chunk or one more gradient of the embedding, in a real step."""
    p = plan(configured(train__compile=False, model__context=128, **shape), dataclasses.replace(DATA, vocab_size=vocab_size), eager_cpu)
    batch, held = random_batch(p, 8), list[TrainingStep]()

    def step():
        held[0].backward(batch)
        held[0].update()

    def work():
        held.append(TrainingStep(p, HERE))
        step()
        step()

    assert allocated_peak(work) == pytest.approx(p.memory.total, rel=0.1)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config = configured()
    device = dataclasses.replace(CPU, free_memory=2 * 10**9)
    p = plan(config, DATA, device)
    fits = p.largest_micro_batch
    needs = [planning.memory(config, p.shape, device, n, p.parameters, p.memory.optimizer).total for n in (fits, 2 * fits)]
    assert 64 % fits == 0 and needs[0] <= 0.9 * device.free_memory < needs[1]
    assert plan(config, DATA, dataclasses.replace(device, count=4)).largest_micro_batch <= 16


def test_the_plan_of_a_run_is_the_run(tiny_run):
    config = parse([part for k, v in (TINY | {"out_dir": tiny_run}).items() for part in (f"--{k}", str(v))])
    _, split, _ = open_data(tiny_run / "data")
    p = plan(config, DataFacts.of(split), CPU)
    batches = Batches(split, context=p.sequence, micro_batch=2, global_batch=4, seed=1)
    assert (p.steps_per_epoch, p.tokens_per_step, p.micro_batches) == (
        batches.steps_per_epoch,
        batches.tokens_per_step,
        batches.micro_batches_per_step,
    )
    folders = step_folders(tiny_run)
    assert p.checkpoints == len(folders)
    for folder in folders.values():
        written = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        assert p.checkpoint <= written < p.checkpoint + 50_000  # plus names, steps, random state
    assert known_data(config).tokens == split.n_tokens


def test_the_size_of_built_in_data_is_estimated(tiny_run, tmp_path):
    options = TINY | {"out_dir": tmp_path, "data.stories": 60}
    config = parse([part for k, v in options.items() for part in (f"--{k}", str(v))])
    facts, split = known_data(config), Split.open(tiny_run / "data" / "train")
    assert facts.documents == split.n_documents and facts.characters == split.characters
    assert facts.tokens == pytest.approx(split.n_tokens, rel=0.05)


def test_missing_data_is_reported_as_unknown(tmp_path):
    config = configured(data__source=str(tmp_path / "none"), model__preset="microstories-44m")
    p = plan(config, known_data(config), CPU)
    assert p.epochs is None and "no data at" in p.rows()["data"] and "tokens unknown" in p.rows()["data"]
    assert p.shape.vocab_size == 65_024 and "preset microstories-44m" in p.rows()["data"]
    given = plan(config, known_data(config, tokens=10**9, vocab_size=5000), CPU)
    assert given.shape.vocab_size == 5000 and given.epochs == pytest.approx(20_000 / (10**9 // (64 * 512)))


def test_micro_batches_that_do_not_divide_the_step_are_refused():
    with pytest.raises(ValueError, match=r"processes \(3\) must divide.*try --train.global_batch 48"):
        plan(configured(), DATA, dataclasses.replace(CPU, count=3))


def test_more_micro_batches_take_more_time():
    data = dataclasses.replace(DATA, vocab_size=500)
    changes = dict(model__n_layer=1, model__context=64, train__compile=False)
    plans = (plan(configured(train__global_batch=n, **changes), data, CPU) for n in (8, 512))
    small, large = (measure(p, HERE, lambda items, _: items) for p in plans)
    assert small[1] == large[1] == 8 and 0 < small[0] < large[0] / 8


def test_unfinished_data_is_not_used(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no training data"):
        known_data(configured(data__source=str(tmp_path)))


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_own_version(name, tflops):
    assert data_sheet_tflops(name) == tflops
