"""Whole training steps by trainer, each in a process of its own that waits for orders, so that steps can be taken in turns.

All trainers start from the same weights and see the same batch, with the same AdamW, gradient clipping, autocast, threads and heap settings
(`keep_heap`, which our trainer uses, for all). The first loss and gradient norm say whether they compute the same thing.
"""

import contextlib
import importlib.util
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch
from torch import Tensor, nn

from bench.measure import DTYPES, children, device, forget_peak, half_precision, peak
from tritale.kernels import reference
from tritale.model import GPT
from tritale.model import gpt as gpt_module
from tritale.model.checkpoint import hf_config, hf_state
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


def _our_model(config: GPTConfig, replaced: tuple[str, ...], is_compiled: bool) -> tuple[nn.Module, Loss]:
    """Our model, with the named ops replaced by the reference's for the rest of this process."""
    for name in replaced:
        setattr(gpt_module, name, getattr(reference, name))
    model = GPT(config)
    run = torch.compile(model, dynamic=False) if is_compiled else model
    return model, lambda tokens, targets: run(tokens, targets)


def _mistral(config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    from transformers import MistralConfig, MistralForCausalLM

    state = hf_state(GPT(config))
    model = MistralForCausalLM(MistralConfig(**hf_config(config, eos_token_id=0, pad_token_id=0) | {"use_cache": False}))
    model.load_state_dict(state, strict=False)  # the tied head is not in it
    run = torch.compile(model, dynamic=False) if is_compiled else model
    return model, lambda tokens, targets: run(input_ids=tokens, labels=targets, shift_labels=targets).loss


def _litgpt(config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    from litgpt.model import GPT as LitGPT
    from litgpt.model import Config
    from litgpt.utils import chunked_cross_entropy

    ours = GPT(config)
    model = LitGPT(
        Config(
            block_size=config.context, vocab_size=config.vocab_size, padded_vocab_size=config.vocab_size, n_layer=config.n_layer,
            n_head=config.n_head, n_query_groups=config.n_kv_head, head_size=config.head_dim, n_embd=config.width, rotary_percentage=1.0,
            parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=config.norm_eps, mlp_class_name="LLaMAMLP",
            intermediate_size=config.mlp_width, rope_base=int(config.rope_theta),
        )
    )  # fmt: skip
    with torch.no_grad():
        model.transformer.wte.weight.copy_(ours.embedding)
        model.transformer.ln_f.weight.copy_(ours.norm)
        for theirs, block in zip(model.transformer.h, ours.blocks, strict=True):
            gate, up = block.gate_up.weight.chunk(2)
            pairs = [
                (theirs.norm_1.weight, block.attention_norm), (theirs.attn.qkv.weight, block.qkv.weight),
                (theirs.attn.proj.weight, block.attention_out.weight), (theirs.norm_2.weight, block.mlp_norm),
                (theirs.mlp.fc_1.weight, gate), (theirs.mlp.fc_2.weight, up), (theirs.mlp.proj.weight, block.mlp_out.weight),
            ]  # fmt: skip
            for into, value in pairs:
                into.copy_(value)
    model.lm_head.weight = model.transformer.wte.weight  # its tie_embeddings
    run = torch.compile(model) if is_compiled else model  # as its pretrain.py: the model compiled, the loss on the logits outside
    return model, lambda tokens, targets: chunked_cross_entropy(run(tokens), targets)


def build(trainer: str, config: GPTConfig, is_compiled: bool) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)  # the same weights for all
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
    """What the fresh process does: build, take two steps, send ("ready", {…}), then a step for each message until None comes."""
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

        def step() -> tuple[Tensor, Tensor]:
            with contextlib.nullcontext() if precision is None else torch.autocast(on.type, DTYPES[precision]):
                loss = loss_of(tokens, targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=False)
            scaler.update()
            return loss.detach(), norm

        loss, norm = step()
        first = {"loss": loss.item(), "grad_norm": norm.item(), "parameters": sum(p.numel() for p in parameters)}
        step()
        forget_peak()  # compilation is over: what is measured from here on is training
        pipe.send(("ready", first))
        while pipe.recv():
            start = time.perf_counter()
            step()
            if on.type == "cuda":
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - start, peak() - before))
    except EOFError:  # the parent is gone
        pass
    except Exception:
        pipe.send(("failed", traceback.format_exc().strip().splitlines()[-1]))


@contextlib.contextmanager
def _started(jobs: list[Job], at_once: int, tick: Callable) -> Iterator[tuple[dict[str, tuple], dict[str, dict]]]:
    """({name: (process, pipe)}, {name: first loss and norm, or {"failed": …}}): all jobs built and warm, `at_once` starting together."""
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
        kind, value = pipe.recv()
    except EOFError:
        return {"failed": "the process died (out of memory?)"}
    return value if kind == "ready" else {"failed": value}


def measure(jobs: list[Job], rounds: int, tick: Callable = lambda: None) -> dict[str, dict]:
    """{name: {"loss", "grad_norm", "parameters", "seconds": […], "bytes"}} of the jobs, steps taken in turns; {"failed": why} for one that
    did not run. On a CPU as many start (and compile) together as there are threads; when the timing begins all are done."""
    at_once = 1 if device().type == "cuda" else torch.get_num_threads()
    with _started(jobs, at_once, tick) as (running, found):
        alive = [t for t in found if "failed" not in found[t]]
        for trainer in alive:
            found[trainer]["seconds"] = []
        for _ in range(rounds):
            for trainer in alive:
                pipe = running[trainer][1]
                pipe.send(True)
                seconds, found[trainer]["bytes"] = pipe.recv()
                found[trainer]["seconds"].append(seconds)
                tick()
    return found


def disagreement(found: dict, reference: dict) -> float:
    """Largest relative difference of the first loss and gradient norm from the reference's."""
    return max(abs(found[k] / reference[k] - 1) for k in ("loss", "grad_norm"))
