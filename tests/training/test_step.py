"""One optimizer step: overflows in fp16, the operations of the optimizers, and machines on which a GPU cannot be used."""

import functools
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from runs import TINY
from torch._inductor import config as inductor_config
from torch._inductor import cpu_vec_isa
from torch.utils._python_dispatch import TorchDispatchMode

from tritale.common.errors import UserError
from tritale.evaluation.trained_run import TrainedRun
from tritale.inference import LLM
from tritale.kernels import dispatch
from tritale.training import processes
from tritale.training.config import parse
from tritale.training.plan import DataFacts, DeviceFacts, plan
from tritale.training.step import TrainingStep, random_batch

HERE = processes.Processes(rank=0, world_size=1, device=torch.device("cpu"))


def tiny_step(out_dir, **options) -> TrainingStep:
    options = TINY | {"out_dir": out_dir} | {k.replace("__", "."): v for k, v in options.items()}
    config = parse([part for key, value in options.items() for part in (f"--{key}", str(value))])
    return TrainingStep(plan(config, DataFacts("test", 600, 10**6, 10**4, 10**6), DeviceFacts.of(HERE, config)), HERE)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["blocks.1.mlp_out.weight", "embedding"])
def test_an_overflow_in_one_optimizers_gradients_skips_the_step_of_all(bad, where, tmp_path):
    step = tiny_step(tmp_path, optim__matrices="muon")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = random_batch(plan_of(step), 2)
    step.run([batch], 1.0)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.backward(batch)
    gradient = dict(step.model.named_parameters())[where].grad
    assert gradient is not None
    gradient[0, 0] = bad
    step.update()
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())
    assert step.scaler.get_scale() == 512
    step.run([batch], 1.0)
    assert not any(torch.equal(p, before[name]) for name, p in step.model.named_parameters() if p.ndim == 2)
    assert all(p.isfinite().all() for p in step.model.parameters())


def test_fp16_gradients_of_a_large_step_keep_their_digits(tmp_path):
    """Divided by the tokens of the step, most of them are too small for fp16: what rounds them must see the scaled loss."""
    gradients = []
    for dtype, loss_scale in ((torch.float32, 1.0), (torch.float16, 65_536.0)):
        torch.manual_seed(1)
        step = tiny_step(tmp_path)
        step.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
        step.autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype == torch.float16)
        step.normalizer.fill_(2**20)
        step.backward(random_batch(plan_of(step), 2))
        gradients.append({name: p.grad / loss_scale for name, p in step.model.named_parameters() if p.grad is not None})
    exact, rounded = gradients
    assert exact.keys() == rounded.keys() and "embedding" in exact
    for name, gradient in exact.items():
        assert (rounded[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def plan_of(step: TrainingStep):
    return plan(step.config, DataFacts("test", 600, 10**6, 10**4, 10**6), DeviceFacts.of(HERE, step.config))


class Counted(TorchDispatchMode):
    """Counts the calls of each PyTorch operator."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_an_update_clears_all_gradients_at_once_and_allocates_no_state(tmp_path):
    step = tiny_step(tmp_path, optim__matrices="muon")
    batch = random_batch(plan_of(step), 2)
    step.run([batch], 1.0)
    step.backward(batch)
    with Counted() as counted:
        step.update()
    assert counted.calls["zero_"] == 1 and not counted.calls["zeros_like"]
    assert all(p.grad is not None and not p.grad.any() for p in step.model.parameters())


def test_the_running_mean_keeps_no_graph(tmp_path):
    """It would grow by some nodes for each parameter and step."""
    step = tiny_step(tmp_path, train__ema=0.9)
    step.run([random_batch(plan_of(step), 2)], 1.0)
    assert step.averages and not any(t.requires_grad or t.grad_fn for t in step.averages)


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 has no GPU: this machine has 2; start torchrun with --nproc-per-node 2 or fewer"):
        processes.start()


def test_a_gpu_without_a_c_compiler_is_refused_with_the_remedy(monkeypatch, tiny_run):
    if not dispatch.has_triton():
        pytest.skip("needs Triton (Linux)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for variable, path in (("CC", "/nowhere/gcc"), ("PATH", "/nowhere")):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv(variable, path)
        with pytest.raises(UserError, match=r"needs a C compiler .*apt install gcc"):
            processes.start()
        with pytest.raises(UserError, match=r"needs a C compiler .*apt install gcc"):
            LLM.load(tiny_run, device="cuda")


def test_a_compiler_with_pythons_headers_is_enough(monkeypatch, tmp_path):
    if not dispatch.has_triton() or not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("needs Triton and a C compiler")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in (dispatch.launcher_missing() or "")
    (tmp_path / "Python.h").touch()
    assert dispatch.launcher_missing() is None


@pytest.mark.skipif(sys.platform != "linux", reason="Inductor's test of the instructions stays elsewhere")
def test_a_compiled_step_on_a_cpu_does_not_test_the_vector_instructions(tmp_path, monkeypatch):
    """Such a test compiles PyTorch's headers, once for each kind of instructions."""
    compiled = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: compiled.append(code) or True)
    with inductor_config.patch({"cpp.vec_isa_ok": None}):
        tiny_step(tmp_path, train__compile="true")
        cpu_vec_isa.valid_vec_isa_list.__wrapped__()
        assert cpu_vec_isa.VecAVX2() and cpu_vec_isa.VecISA._avx_code not in compiled


@pytest.mark.parametrize(("precision", "has_bf16", "dtype"), [("auto", True, "bfloat16"), ("bf16", False, "float16"), ("fp32", True, None)])
def test_a_run_is_validated_in_its_own_precision_on_a_gpu(precision, has_bf16, dtype, tiny_run, monkeypatch):
    """In fp32 on a GPU attention has no tensor cores."""
    monkeypatch.setattr(processes, "has_bf16", lambda device: has_bf16)
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: asked.append((device, dtype)))
    run = TrainedRun.open(tiny_run)
    run.config["train.precision"] = precision
    model = SimpleNamespace(embedding=SimpleNamespace(device=torch.device("cuda")), config=SimpleNamespace(context=64))
    run.validation_settings(model)["autocast"]()  # pyright: ignore[reportArgumentType]
    assert asked == ([("cuda", getattr(torch, dtype))] if dtype else [])
    model.embedding.device = torch.device("cpu")
    run.validation_settings(model)["autocast"]()  # pyright: ignore[reportArgumentType]
    assert len(asked) == bool(dtype)


def test_generation_does_not_use_pytorchs_attention(tiny_run, monkeypatch):
    """On a GPU that may be cuDNN's, which compiles a plan for each number of cached tokens."""
    monkeypatch.setattr("tritale.inference.native.can_run", lambda model: False)
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    assert LLM.load(tiny_run).complete(["", "小兔"], max_new_tokens=3, seed=1)[0].tokens
