"""Training steps of different trainers. Each trainer has its own process and takes a step on request, so that the trainers take turns.

All trainers start from the same weights and see the same batch. AdamW, gradient clipping, autocast, threads and heap settings (`keep_heap`,
which our trainer uses) are the same for all. The losses and gradient norms of the first steps show whether they compute the same thing.
"""

import contextlib
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

from bench.measure import DTYPES, device, first_line, fresh_processes, half_precision, peak, reset_peak
from tritale.kernels import reference
from tritale.model import GPT
from tritale.model import gpt as gpt_module
from tritale.model.checkpoint import hf_config, hf_state
from tritale.model.export import litgpt_config, litgpt_state
from tritale.model.gpt import GPTConfig
from tritale.training.processes import keep_heap

REFERENCE, OURS = "reference", "ours"
MISTRAL, LITGPT = "transformers Mistral", "litgpt"
EAGER = ", eager"  # ends the name of a trainer that is not compiled
# The ops that an ablation replaces by the reference, one at a time. On a CPU only the last two differ from the reference: attention is
# PyTorch's kernel and the loss is computed in chunks.
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
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 3e-2}  # relative, for the losses and gradient norms of the checked steps


def _weights(config: GPTConfig) -> GPT:
    """The initial weights of all trainers. The matrices are four times as large as those of a real run, so that attention and the softmax
    are far from uniform and the losses depend on every part of the model."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model


def _our_model(config: GPTConfig, replaced: tuple[str, ...], is_compiled: bool) -> tuple[nn.Module, Loss]:
    """Our model. The named ops are replaced by the reference's for the rest of this process."""
    for name in replaced:
        setattr(gpt_module, name, getattr(reference, name))
    model = _weights(config)
    run = torch.compile(model, dynamic=False) if is_compiled else model
    return model, lambda tokens, targets: run(tokens, targets)


def _mistral(config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    from transformers import MistralConfig, MistralForCausalLM

    state = hf_state(_weights(config))
    fair = {"use_cache": False, "pad_token_id": None}  # with a padding token, its embedding would get no gradient
    model = MistralForCausalLM(MistralConfig(**hf_config(config, eos_token_id=0, pad_token_id=0) | fair))
    model.load_state_dict(state, strict=False)  # the tied head is not in it
    run = torch.compile(model, dynamic=False) if is_compiled else model
    return model, lambda tokens, targets: run(input_ids=tokens, labels=targets, shift_labels=targets).loss


def _litgpt(config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    litgpt, utils = importlib.import_module("litgpt.model"), importlib.import_module("litgpt.utils")
    model = litgpt.GPT(litgpt.Config(**litgpt_config(config)))
    model.load_state_dict(litgpt_state(_weights(config)))
    model.lm_head.weight = model.transformer.wte.weight  # its tie_embeddings
    run = torch.compile(model) if is_compiled else model  # as in litgpt's pretrain.py: the model is compiled, the loss is not
    return model, lambda tokens, targets: utils.chunked_cross_entropy(run(tokens), targets)


def build(name: str, config: GPTConfig) -> tuple[nn.Module, Loss]:
    trainer, is_compiled = name.removesuffix(EAGER), not name.endswith(EAGER)
    if trainer in (MISTRAL, LITGPT):
        return (_mistral if trainer == MISTRAL else _litgpt)(config, is_compiled)
    every = tuple(name for names in ABLATIONS.values() for name in names)
    replaced = {REFERENCE: every, OURS: ()} | {ablation(op): names for op, names in ABLATIONS.items()}
    return _our_model(config, replaced[trainer], is_compiled)


@dataclass(frozen=True)
class Job:
    """One trainer on one shape."""

    name: str  # of the trainer, which is compiled unless it ends in EAGER
    config: GPTConfig
    batch: int
    context: int
    threads: int


def serve(pipe: Connection, job: Job) -> None:
    """The child process: build the trainer, check its first steps, send {"parameters", dtype: checked values}, then take a step for each
    message until None comes.

    The checked steps use two of the sequences, in fp32 and also under autocast if training uses it. The whole batch then warms up."""
    first: dict = {}
    try:
        warnings.filterwarnings("ignore")
        on, precision = device(), half_precision()
        if on.type == "cpu":
            torch.set_num_threads(job.threads)
            keep_heap()
        before = reset_peak()
        model, loss_of = build(job.name, job.config)
        model.to(on).train()
        parameters = list(dict.fromkeys(model.parameters()))
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(job.config.vocab_size, (job.batch, job.context + 1), generator=random).to(on)
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
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
        reset_peak()  # compilation is over; the peak from here on is that of training
        pipe.send(first)
        while pipe.recv():
            start = time.perf_counter()
            step()
            if on.type == "cuda":
                torch.cuda.synchronize()
            pipe.send({"seconds": time.perf_counter() - start, "bytes": peak() - before})
    except EOFError:  # the parent process has ended
        pass
    except Exception as error:
        pipe.send(first | {"failed": first_line(error)})


def measure(jobs: list[Job], rounds: int, tick: Callable = lambda: None) -> dict[str, dict]:
    """{name: {"parameters", dtype: checked values, "seconds": […], "bytes"}} of the jobs, with steps taken in turns. A trainer that failed
    also has {"failed": why}. On a CPU, as many trainers start (and compile) together as there are threads; all are ready before timing.
    On a GPU each runs alone and has the memory for itself."""
    if device().type == "cuda" and len(jobs) > 1:
        return {name: found for job in jobs for name, found in measure([job], rounds, tick).items()}
    with fresh_processes(serve, {job.name: (job,) for job in jobs}, torch.get_num_threads(), tick) as children:
        found = {name: {**child.first, "seconds": []} for name, child in children.items()}
        for _ in range(rounds):
            for name, child in children.items():
                if "failed" not in found[name]:
                    child.pipe.send(True)
                    answer = child.answer()
                    found[name]["seconds"].append(answer.pop("seconds", None))
                    found[name] |= answer
                tick()
    return found


def status(found: dict, reference: dict) -> dict[str, str]:
    """{"status", "note"} of a trainer: how far its first losses and gradient norms are from the reference's."""
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
