"""Whole training steps by trainer, each in a process of its own that waits for orders, so that steps can be taken in turns.

All trainers start from the same weights and see the same batch, with the same AdamW, gradient clipping, autocast, threads and heap settings
(`keep_heap`, which our trainer uses, for all). The losses and gradient norms of the first steps say whether they compute the same thing.
"""

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch
from torch import Tensor, nn

from bench.measure import DIED, DTYPES, children, device, forget_peak, half_precision, in_a_line, peak
from tritale.kernels import reference
from tritale.model import GPT
from tritale.model import gpt as gpt_module
from tritale.model.checkpoint import hf_config, hf_state
from tritale.model.export import litgpt_config, litgpt_state
from tritale.model.gpt import GPTConfig
from tritale.training.processes import keep_heap

REFERENCE, OURS = "reference", "ours"
MISTRAL, LITGPT = "transformers Mistral", "litgpt"
# Ops of the model that an ablation switches off, each alone. Attention on a CPU is PyTorch's kernel, the head's loss goes in chunks; the
# rest is on a CPU the definition itself, so that switching it off changes nothing.
ABLATIONS = {
    "RMSNorm": ("rms_norm", "add_rms_norm"),
    "RoPE": ("rope",),
    "SwiGLU": ("swiglu",),
    "attention": ("flash_attention",),
    "linear cross-entropy": ("linear_cross_entropy",),
}
SAME_ON_CPU = {"RMSNorm", "RoPE", "SwiGLU"}


def ablation(op: str) -> str:
    return f"ours without {op}"


def missing(trainer: str) -> str | None:
    """Why a trainer cannot run here, or None."""
    if trainer.startswith(MISTRAL) and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install transformers)"
    if trainer.startswith(LITGPT):
        if importlib.util.find_spec("litgpt") is None or importlib.util.find_spec("lightning") is None:
            return "litgpt is not installed (pip install --no-deps litgpt && pip install lightning psutil)"
    if device().type == "cpu" and trainer in {ablation(op) for op in SAME_ON_CPU}:
        return "on a CPU this op is its definition with and without"
    return None


Loss = Callable[[Tensor, Tensor], Tensor]  # of (B, T) tokens and targets
CHECKED_STEPS = 2
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}  # of their losses and gradient norms


def _weights(config: GPTConfig) -> GPT:
    """The weights all start from: matrices four times as large as at the start of a training, so that attention and the softmax are far
    from uniform, and the losses depend on every part of the model."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model


def _our_model(config: GPTConfig, replaced: tuple[str, ...], is_compiled: bool) -> tuple[nn.Module, Loss]:
    """Our model, with the named ops replaced by the reference's for the rest of this process."""
    for name in replaced:
        setattr(gpt_module, name, getattr(reference, name))
    model = _weights(config)
    run = torch.compile(model, dynamic=False) if is_compiled else model
    return model, lambda tokens, targets: run(tokens, targets)


def _mistral(config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    from transformers import MistralConfig, MistralForCausalLM

    state = hf_state(_weights(config))
    fair = {"use_cache": False, "pad_token_id": None}  # a padding token's embedding would get no gradient
    model = MistralForCausalLM(MistralConfig(**hf_config(config, eos_token_id=0, pad_token_id=0) | fair))
    model.load_state_dict(state, strict=False)  # the tied head is not in it
    run = torch.compile(model, dynamic=False) if is_compiled else model
    return model, lambda tokens, targets: run(input_ids=tokens, labels=targets, shift_labels=targets).loss


def _litgpt(config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    from litgpt.model import GPT as LitGPT
    from litgpt.model import Config
    from litgpt.utils import chunked_cross_entropy

    model = LitGPT(Config(**litgpt_config(config)))
    model.load_state_dict(litgpt_state(_weights(config)))
    model.lm_head.weight = model.transformer.wte.weight  # its tie_embeddings
    run = torch.compile(model) if is_compiled else model  # as its pretrain.py: the model compiled, the loss on the logits outside
    return model, lambda tokens, targets: chunked_cross_entropy(run(tokens), targets)


def build(trainer: str, config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    if trainer == MISTRAL:
        return _mistral(config, is_compiled)
    if trainer == LITGPT:
        return _litgpt(config, is_compiled)
    every = tuple(name for names in ABLATIONS.values() for name in names)
    replaced = {REFERENCE: every, OURS: ()} | {ablation(op): names for op, names in ABLATIONS.items()}
    return _our_model(config, replaced[trainer], is_compiled)


@dataclass(frozen=True)
class Job:
    """One trainer on one shape."""

    trainer: str
    config: GPTConfig
    batch: int
    context: int
    is_compiled: bool
    threads: int
    name: str  # what the results are filed under


def serve(pipe, job: Job) -> None:
    """What the fresh process does: build, take the steps that are checked, send {"loss", …}, then a step for each message until None comes.

    Checked are the first steps on two of the sequences, in fp32 and, where training has autocast, in that too. Then the whole batch
    warms up."""
    first = {}
    try:
        warnings.filterwarnings("ignore")
        on, precision = device(), half_precision()
        if on.type == "cpu":
            torch.set_num_threads(job.threads)
            keep_heap()
        before = forget_peak()
        model, loss_of = build(job.trainer, job.config, job.is_compiled)
        model.to(on).train()
        parameters = list(dict.fromkeys(model.parameters()))
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        random = torch.Generator().manual_seed(1)
        text = torch.randint(job.config.vocab_size, (job.batch, job.context + 1), generator=random).to(on)
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        scaler = torch.amp.GradScaler(on.type, enabled=precision == "fp16")

        def step(rows: int = job.batch, precision: str | None = precision) -> tuple[Tensor, Tensor]:
            with contextlib.nullcontext() if precision is None else torch.autocast(on.type, DTYPES[precision]):
                loss = loss_of(tokens[:rows], targets[:rows])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
            scaler.update()
            return loss.detach(), norm

        first["parameters"] = sum(p.numel() for p in parameters)
        for dtype in dict.fromkeys((None, precision)):
            steps = [step(min(2, job.batch), dtype) for _ in range(CHECKED_STEPS)]
            first[dtype or "fp32"] = [x.item() for pair in steps for x in pair]
        step()
        forget_peak()  # compilation is over: what is measured from here on is training
        pipe.send(first)
        while pipe.recv():
            start = time.perf_counter()
            step()
            if on.type == "cuda":
                torch.cuda.synchronize()
            pipe.send({"seconds": time.perf_counter() - start, "bytes": peak() - before})
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        pipe.send(first | {"failed": in_a_line(error)})


@contextlib.contextmanager
def _started(jobs: list[Job], at_once: int, tick: Callable) -> Iterator[tuple[dict[str, tuple], dict[str, dict]]]:
    """({name: (process, pipe)}, {name: what it sent, or {"failed": …}}): all jobs built and warm, `at_once` starting together."""
    context = children()
    running: dict[str, tuple] = {}
    first: dict[str, dict] = {}
    try:
        waiting, starting = list(jobs), []
        while waiting or starting:
            while waiting and len(starting) < at_once:
                job = waiting.pop(0)
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs, job), daemon=True)
                process.start()
                theirs.close()
                running[job.name] = process, ours
                starting.append(job.name)
            ready = wait([running[trainer][1] for trainer in starting])
            for trainer in [t for t in starting if running[t][1] in ready]:
                starting.remove(trainer)
                first[trainer] = answer(running[trainer][1])
                tick()
        yield running, first
    finally:
        for process, pipe in running.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(30)
            if process.is_alive():
                process.terminate()


def answer(pipe) -> dict:
    try:
        return pipe.recv()
    except EOFError:
        return {"failed": DIED}


def measure(jobs: list[Job], rounds: int, tick: Callable = lambda: None) -> dict[str, dict]:
    """{name: {"parameters", dtype: what is checked, "seconds": […], "bytes"}} of the jobs, steps taken in turns; with "failed": why for one
    that did not run to its end. On a CPU as many start (and compile) together as there are threads; when the timing begins all are done."""
    at_once = 1 if device().type == "cuda" else torch.get_num_threads()
    with _started(jobs, at_once, tick) as (running, found):
        seconds = {t: [] for t in found}
        for _ in range(rounds):
            for trainer in found:
                if "failed" not in found[trainer]:
                    pipe = running[trainer][1]
                    pipe.send(True)
                    found[trainer] |= answer(pipe)
                    seconds[trainer].append(found[trainer].get("seconds"))
                tick()
    return {t: {**value, "seconds": seconds[t]} for t, value in found.items()}


def status(found: dict, reference: dict) -> dict[str, str]:
    """{"status", "note"} of a trainer, by how far the losses and gradient norms of the first steps lie from the reference's."""
    if "failed" in found:
        return {"status": "failed", "note": found["failed"]}
    compared = [dtype for dtype in TOLERANCE if dtype in found and dtype in reference]
    if not compared:
        return {"status": "cannot run", "note": f"not compared, so not reported: the reference failed ({reference['failed']})"}
    for dtype in compared:
        allowed = TOLERANCE[dtype]
        off = (torch.tensor(found[dtype]) / torch.tensor(reference[dtype]) - 1).abs().max().item()  # NaN if one is
        if not off < allowed:
            note = f"{dtype}: losses or gradient norms of the first steps {off:.1e} from the reference's (allowed: {allowed:.0e})"
            return {"status": "wrong", "note": note}
    return {"status": "ok", "note": ""}
