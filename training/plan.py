"""The plan of a run: its size, learning rate, memory and disk, computed before it starts.

`plan` is a pure function of the config and of facts about the data and the device. `tritale plan` prints the plan, train.py prints
`Plan.rows` at its start. tests/training/test_plan.py compares the memory estimate with what PyTorch's allocator measures.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from ..common.errors import UserError
from ..data import built_in
from ..data.shards import Split
from ..kernels import cpu
from ..kernels.dispatch import has_triton
from ..kernels.flash_attention import LARGEST_HEAD, head_tiles
from ..kernels.linear_cross_entropy import BUDGET_MB, chunk_rows
from ..model.gpt import GPTConfig
from . import processes
from .config import RunConfig, divisors
from .optimizer import lr_factor

CHINCHILLA = 20  # tokens per parameter that are compute-optimal (arXiv 2203.15556)
MAX_EPOCHS = 16  # further repetitions of the data add almost nothing (arXiv 2305.16264, section 5)
FILL = 0.9  # usable share of the free memory; the rest is lost to fragmentation


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training data; None if unknown."""

    source: str  # where the facts are from, for the user
    vocab_size: int
    tokens: int | None = None
    documents: int | None = None
    characters: int | None = None

    @classmethod
    def of(cls, split: Split) -> "DataFacts":
        return cls(str(split.folder), split.vocab_size, split.n_tokens, split.n_documents, split.characters)

    def document_length(self, default: int) -> float:
        """Mean tokens of a document."""
        return self.tokens / self.documents if self.tokens and self.documents else default


@dataclass(frozen=True)
class DeviceFacts:
    """Facts about the device of a process."""

    name: str
    count: int  # processes, each with an equal device
    precision: str  # bf16, fp16 or fp32
    has_bf16: bool
    runs_triton: bool
    compiler_missing: str | None  # the reason why torch.compile cannot work
    free_memory: int  # bytes
    free_disk: int  # bytes, at out_dir
    flops: float  # FLOP/s of matrix products
    flops_source: str
    workspace: int = 0  # bytes that PyTorch gives cuBLAS for each stream
    runs_flash_attention: bool = True  # with `runs_triton`: attention is a Triton kernel too, not PyTorch's
    runs_c_ops: bool = False  # on a CPU the ops of an uncompiled model are in C

    @classmethod
    def of(cls, here: processes.Processes, config: RunConfig) -> "DeviceFacts":
        """Measures the device's matrix products and its free memory. Call it before the model is built."""
        device, folder = here.device, Path(config.out_dir).absolute()
        precision = processes.choose_precision(config.train.precision, device)
        flops, source = processes.matmul_flops(device, precision)
        return cls(
            name=processes.device_name(device),
            count=here.world_size,
            precision=precision,
            has_bf16=processes.has_bf16(device),
            runs_triton=device.type == "cuda" and has_triton(),
            compiler_missing=processes.cpp_compiler_missing() if device.type == "cpu" and config.train.compile else None,
            free_memory=processes.free_memory(device),
            free_disk=shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free,
            flops=flops,
            flops_source=source,
            workspace=processes.cublas_workspace(device),
            runs_c_ops=device.type == "cpu" and cpu.is_available(),
            runs_flash_attention=config.data.document_mask or processes.has_fast_attention(device, precision),
        )


class Memory(NamedTuple):
    """Bytes of one process at the peak of a step."""

    weights: int  # and their EMA
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int  # of cuBLAS; 0 on a CPU

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class PlanWarning:
    """A problem of the planned run and its remedy. A note is less than a warning: it can be ignored."""

    text: str
    remedy: str
    is_note: bool = False


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    config: RunConfig
    data: DataFacts
    device: DeviceFacts
    shape: GPTConfig
    sequence: int  # tokens
    parameters: int
    trained: int  # parameters: all, or those of the adapters
    embedding: int  # parameters of the embedding, and of the head if it is not tied
    tokens_per_step: int
    micro_batches: int  # per step and process
    steps_per_epoch: int | None
    tokens: int  # over the whole run
    epochs: float | None
    rates: tuple[float, float, float]  # learning rates of the first, the middle and the last step
    memory: Memory
    largest_micro_batch: int  # the largest that fits into memory and divides the global batch; 0 if none does
    checkpoint: int  # bytes
    checkpoints: int  # number kept at the end
    flops_per_token: float

    @property
    def disk(self) -> int:
        """Peak bytes of the checkpoints: those kept, and the one being written."""
        return (self.checkpoints + (self.config.train.keep_last > 0)) * self.checkpoint

    @property
    def warnings(self) -> list[PlanWarning]:
        return _warnings(self)

    def rows(self) -> dict[str, str]:
        """{name: text} of the lines that summarize the plan."""
        c, d, t, data = self.config, self.device, self.config.train, self.data
        facts = [data.source]
        if data.documents:
            facts.append(f"{data.documents:,} documents")
        facts.append(f"{data.tokens:,} tokens" if data.tokens else "number of tokens unknown (--tokens)")
        if data.characters and data.tokens and data.documents:
            facts.append(f"{data.characters / (data.tokens - data.documents):.2f} characters per token")
        run = f"{t.max_steps:,} steps, {count(self.tokens)} tokens"
        if self.epochs is not None:
            run += f", {self.epochs:,.1f} epochs"
        ratio = self.tokens / self.parameters
        fits_all = " (all sequences of a step)" if self.largest_micro_batch == t.global_batch // d.count else ""
        first, middle, last = (f"{rate:.1e}" if rate else "0" for rate in self.rates)
        others = None if c.lora.rank else c.optim.embedding_lr
        embedding_rate = f" (embedding, head and norms: × {others / c.optim.lr:.3g})" if others else ""
        share = f"; {count(self.trained)} are trained, adapters of rank {c.lora.rank}" if c.lora.rank else ""
        return {
            "device": f"{d.count} × {d.name}, {d.precision}",
            "matrix products": f"{d.flops / 1e9:,.0f} GFLOP/s ({d.flops_source}; the reference for mfu)",
            "data": ", ".join(facts),
            "model": f"{count(self.parameters)} parameters, {self.embedding / self.parameters:.0%} of them in the embedding{share}",
            "step": f"{self.tokens_per_step:,} tokens in {self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
            + (f", {self.steps_per_epoch:,} steps per epoch" if self.steps_per_epoch is not None else ""),
            "run": f"{run}, {digits(ratio)} tokens per parameter ({digits(ratio / CHINCHILLA)} × Chinchilla's {CHINCHILLA})",
            "learning rate": f"first step {first}, middle {middle}, last {last}{embedding_rate}",
            "memory": f"{size(self.memory.total)} of {size(d.free_memory)} free; "
            + f"largest micro-batch that fits: {self.largest_micro_batch or 'none'}{fits_all}",
            "disk": f"{self.checkpoints:,} × {size(self.checkpoint)} of checkpoints, {size(self.disk)} of {size(d.free_disk)} free",
            "output": c.out_dir,
        }


def count(n: int) -> str:
    """A number as "950", "1.6 M", "7.9 B" or "3.0 T"."""
    for unit, value in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if n >= value:
            return f"{n / value:,.1f} {unit}"
    return f"{n:,}"


def digits(x: float) -> str:
    """A number with three significant digits and no exponent: "0.059", "8.96", "68,321"."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def size(n_bytes: float) -> str:
    """A number of bytes as "1.2 GB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def known_data(config: RunConfig, *, tokens: int | None = None, vocab_size: int | None = None) -> DataFacts:
    """The facts about the data on disk. `tokens` and `vocab_size` replace them; data that does not exist yet is estimated or unknown.

    Raises FileNotFoundError or UserError if the data is damaged."""
    folder, given = config.data_folder, tokens is not None or vocab_size is not None
    if (folder / "train").exists() and not given:
        return DataFacts.of(built_in.open_data(folder, verify=False)[1])
    if config.data.source == "built-in" and not given:
        stories = config.data.stories
        size = built_in.estimate(seed=config.seed, stories=stories, vocab_size=config.data.vocab_size)
        source = f"built-in stories, not written yet, estimated from {size.sample:,} of them"
        return DataFacts(source, size.vocab_size, size.tokens, stories, size.characters)
    place = f"instead of {folder}" if (folder / "train").exists() else f"no data at {folder} yet"
    entries = vocab_size or config.model.vocab_size or config.shape(None).vocab_size
    origin = "as given" if vocab_size else ("model.vocab_size" if config.model.vocab_size else f"that of the preset {config.model.preset}")
    return DataFacts(f"{place}, vocabulary {entries:,} ({origin})", entries, tokens)


def plan(config: RunConfig, data: DataFacts, device: DeviceFacts) -> Plan:
    """The plan of the run of `config` with this data on this device.

    Raises UserError if the config's shape, context or vocabulary do not fit each other, the data or the device, or if the micro-batches of
    all processes do not divide the global batch."""
    t, shape = config.train, config.shape(data.vocab_size)
    sequence = t.sequence(shape)
    if t.global_batch % (t.micro_batch * device.count):
        raise UserError(
            f"train.micro_batch ({t.micro_batch}) × processes ({device.count}) must divide train.global_batch ({t.global_batch}); "
            f"try --train.global_batch {max(1, t.global_batch // (t.micro_batch * device.count)) * t.micro_batch * device.count}"
        )

    if device.runs_triton and config.data.document_mask and shape.head_dim > LARGEST_HEAD:
        raise UserError(
            f"model.head_dim is {shape.head_dim}, and packed documents on a GPU take heads of at most {LARGEST_HEAD}; set "
            f"model.head_dim {LARGEST_HEAD}, or data.document_mask false"
        )

    embedding = shape.vocab_size * shape.width * (1 if shape.tie_embeddings else 2)
    matrices = shape.n_matrix - shape.vocab_size * shape.width  # parameters of the blocks' matrices; n_matrix counts the head once
    norms = shape.width * (2 * shape.n_layer + 1) + 2 * shape.head_dim * shape.n_layer * shape.qk_norm
    adapters = config.lora.parameters(shape)
    parameters = embedding + matrices + norms + adapters
    trained = adapters or parameters

    tokens_per_step = t.global_batch * sequence
    steps_per_epoch = None if data.tokens is None else data.tokens // tokens_per_step
    if config.objective == "dpo" and data.documents is not None:
        steps_per_epoch = data.documents // (t.global_batch // 2)  # pairs
    tokens = t.max_steps * tokens_per_step

    first, middle, last = (config.optim.lr * lr_factor(i, t.max_steps, config.optim) for i in (0, t.max_steps // 2, t.max_steps - 1))

    # AdamW keeps two fp32 numbers per parameter, Muon one.
    trained_matrices = adapters or matrices
    optimizer = 8 * (trained - trained_matrices) + (4 if config.optim.matrices == "muon" else 8) * trained_matrices
    per_process = t.global_batch // device.count
    needs = {n: memory(config, shape, device, n, parameters, optimizer) for n in divisors(per_process)}
    largest = max((n for n, m in needs.items() if m.total <= FILL * device.free_memory), default=0)

    # fp32 weights, their EMA and optimizer state; the other files are small.
    checkpoint = 4 * trained * (2 if t.ema else 1) + optimizer
    checkpoints = -(-t.max_steps // t.checkpoint_every)
    if t.keep_last:
        checkpoints = min(checkpoints, t.keep_last + t.keep_best)

    flops = shape.flops_per_token(min(sequence, data.document_length(sequence)))
    if adapters:  # a frozen matrix has no product for its gradient
        flops += 6 * adapters - 2 * shape.n_matrix

    return Plan(
        config=config,
        data=data,
        device=device,
        shape=shape,
        sequence=sequence,
        parameters=parameters,
        trained=trained,
        embedding=embedding,
        tokens_per_step=tokens_per_step,
        micro_batches=per_process // t.micro_batch,
        steps_per_epoch=steps_per_epoch,
        tokens=tokens,
        epochs=t.max_steps / steps_per_epoch if steps_per_epoch else None,
        rates=(first, middle, last),
        memory=needs[t.micro_batch],
        largest_micro_batch=largest,
        checkpoint=checkpoint,
        checkpoints=checkpoints,
        flops_per_token=flops,
    )


# --- Memory --------------------------------------------------------------------------------------------------------------------------


def activation_bytes(shape: GPTConfig, device: DeviceFacts, is_compiled: bool, is_frozen: bool) -> int:
    """Bytes per token that the forward pass saves for the backward pass. The residual stream is fp32, the inputs of matrix products have
    the run's precision. `is_frozen`: only adapters are trained, of all matrices; less is saved if some have none. Exact within 3 %, except
    in eager bf16 on a CPU, which saves some more fp32 copies."""
    s, item = shape, 4 if device.precision == "fp32" else 2
    heads, kv_heads = s.n_head * s.head_dim, s.n_kv_head * s.head_dim
    on_cpu, is_grouped = not device.runs_triton, s.n_head > s.n_kv_head
    is_definition = on_cpu and (is_compiled or not device.runs_c_ops)
    normed = 2 * s.width * item  # outputs of the two norms: the inputs of qkv and gate_up
    residual = 2 * s.width * 4 + 2 * 4  # inputs of the two norms, and 1 / rms
    packed = (heads + 2 * kv_heads) * item  # output of qkv: saved for the norms of q and k, or because v is a view of it
    runs_flash_attention = device.runs_flash_attention and s.head_dim <= LARGEST_HEAD
    if is_grouped and (on_cpu or not runs_flash_attention):  # PyTorch's attention repeats k and v for each query head
        qkv = 3 * heads * item + s.qk_norm * packed
    else:
        qkv = (heads + kv_heads) * item + packed
    if is_definition:
        qkv += s.qk_norm * (s.n_head + s.n_kv_head) * 4  # 1 / rms of each head
    else:
        qkv += s.qk_norm * kv_heads * item + 2 * 4  # qk_norm_rope copies v; first and last token of the document
    attention = qkv + heads * item + s.n_head * 4  # q, k, v; its output; lse
    mlp = 3 * s.mlp_width * item  # gate, up; silu(gate) · up
    layer = normed + residual + attention + mlp
    is_eager = is_definition and not is_compiled
    if is_eager:  # silu(gate) and rows of cos and sin, fp32; compiled code recomputes them
        layer += (s.mlp_width + s.head_dim) * 4
    if is_eager and not is_frozen:  # x / rms, for the gradients of the norms' weights
        layer += (2 * s.width + s.qk_norm * (heads + kv_heads)) * 4
    last_norm = s.width * 4 * (2 if is_eager and not is_frozen else 1)
    return s.n_layer * layer + last_norm


def memory(config: RunConfig, shape: GPTConfig, device: DeviceFacts, micro_batch: int, parameters: int, optimizer: int) -> Memory:
    """The peak memory of one process in a step. It is reached at the end of the forward pass, with all activations, the gradients of the
    head and of its input, and one chunk of logits; or, if that is more, when the backward pass adds two gradients of the embedding."""
    rows, item = micro_batch * config.train.sequence(shape), 4 if device.precision == "fp32" else 2
    head = shape.vocab_size * shape.width
    is_compiled = config.train.compile and not device.compiler_missing
    adapters = config.lora.parameters(shape)
    activations = rows * activation_bytes(shape, device, is_compiled, adapters > 0)
    if item == 2:  # autocast's copies of the blocks' matrices
        activations += 2 * (shape.n_matrix - head)
    activations += rows * shape.n_layer * len(set(config.lora.targets)) * config.lora.rank * item  # x Aᵀ
    chunk = min(rows, chunk_rows(rows, shape.vocab_size, BUDGET_MB, item)) * shape.vocab_size * item  # the gradient overwrites the logits
    loss = rows * shape.width * item + chunk + (2 * head if item == 2 else 0)
    if not adapters:  # the head's gradient, and at the end another one of the embedding
        loss = rows * shape.width * item + 4 * head + max(chunk + (2 * head if item == 2 else 0), 4 * head)
    if device.runs_triton:  # the loss's input, and in eager code that of the last norm, are still there
        loss += rows * shape.width * item * (1 if is_compiled else 2)
    parts = device.count if config.train.parallel == "fsdp" else 1
    # At most: all weights at a validation, with adapters those in which they are merged; the weights and gradients of a block in a step.
    gathered = 4 * parameters if parts > 1 or adapters else 0
    return Memory(
        weights=4 * parameters * (2 if config.train.ema else 1) // parts + gathered,
        gradients=4 * (adapters or parameters) // parts,
        optimizer=optimizer // parts,
        activations=activations,
        loss=loss,
        workspace=device.workspace * (2 if is_compiled else 1),  # CUDA graphs have a stream of their own
    )


# --- Warnings ------------------------------------------------------------------------------------------------------------------------


def _warnings(p: Plan) -> list[PlanWarning]:
    c, t, o, d, found = p.config, p.config.train, p.config.optim, p.device, []
    last_tenth = range(t.max_steps - max(1, t.max_steps // 10), t.max_steps)
    rate = mean(lr_factor(step, t.max_steps, o) for step in last_tenth[:: max(1, len(last_tenth) // 1000)])  # divided by the peak
    if rate > 0.5:
        if o.warmup_steps > 0.8 * t.max_steps:
            remedy = f"warm-up takes {o.warmup_steps} of {t.max_steps} steps; set optim.warmup_steps {t.max_steps // 10}"
        elif o.min_lr_ratio > 0.4:
            remedy = f"optim.min_lr_ratio is {o.min_lr_ratio}; set it to 0 (values up to 0.1 are usual)"
        else:
            remedy = f"optim.decay_fraction is {o.decay_fraction}; set it to 0.3, or optim.schedule to cosine"
        text = f"the learning rate never anneals: it is {rate:.0%} of its peak over the last tenth of the run"
        found.append(PlanWarning(text, remedy))
    if o.schedule == "wsd" and o.warmup_steps + round(o.decay_fraction * t.max_steps) > t.max_steps:
        text = f"the decay begins before the warm-up of {o.warmup_steps} steps ends: the learning rate never reaches its peak"
        found.append(PlanWarning(text, f"set optim.warmup_steps {t.max_steps // 10} and optim.decay_fraction 0.3"))
    if p.data.tokens and p.steps_per_epoch == 0:
        most = p.data.tokens // (p.sequence * t.micro_batch * d.count) * t.micro_batch * d.count
        remedy = f"set train.global_batch {most} or less" if most else "lower train.micro_batch"
        text = f"the data ({p.data.tokens:,} tokens) is less than one step of {p.tokens_per_step:,}"
        found.append(PlanWarning(text, f"{remedy}, or add data"))
    if p.epochs and p.steps_per_epoch and p.epochs > MAX_EPOCHS:
        end = MAX_EPOCHS * p.steps_per_epoch
        rate = lr_factor(end, t.max_steps, o)
        text = f"{p.epochs:,.0f} epochs: after about {MAX_EPOCHS}, repeated data adds almost nothing"
        text += f"; the learning rate is then still {rate:.1%} of its peak"
        found.append(PlanWarning(text, f"set train.max_steps {end} or less, so that the schedule has decayed by then; or add data"))
    if p.embedding > p.parameters / 2:
        text = f"{p.embedding / p.parameters:.0%} of the parameters are in the embedding, of which each token uses one row"
        body = p.parameters - p.embedding
        small = 6400 * p.embedding // p.shape.vocab_size
        if small < body:
            remedy = "train a smaller tokenizer on the data: with --vocab-size 6400 the embedding is "
            remedy += f"{small / (small + body):.0%} of {(small + body) / 1e6:.1f} M parameters"
        else:
            remedy = f"use more layers, or a vocabulary smaller than {p.shape.vocab_size:,}"
        found.append(PlanWarning(text, remedy))
    if p.memory.total > FILL * d.free_memory:
        text = f"a micro-batch of {t.micro_batch} needs {size(p.memory.total)}; {size(d.free_memory)} are free"
        fits = p.largest_micro_batch
        remedy = f"set train.micro_batch {fits}; a step keeps its number of tokens" if fits else "use a smaller model or context"
        found.append(PlanWarning(f"{text} (a tenth of it is left to the allocator)", remedy))
    if p.disk > d.free_disk:
        keep = max(1, int(d.free_disk / p.checkpoint) - 2)
        text = f"the checkpoints will take {size(p.disk)}; {size(d.free_disk)} are free"
        found.append(PlanWarning(text, f"set train.keep_last {keep}, or raise train.checkpoint_every"))
    if d.precision == "bf16" and not d.has_bf16:
        text = "train.precision bf16: this device has no bf16 instructions and emulates them, which is many times slower"
        found.append(PlanWarning(text, "set train.precision auto"))
    if d.compiler_missing and c.train.compile:
        text = f"no C++ compiler, so torch.compile is off and training is slower ({d.compiler_missing})"
        found.append(PlanWarning(text, "on Debian: apt install g++"))
    head_dim, padded = p.shape.head_dim, sum(head_tiles(p.shape.head_dim))
    if head_dim <= LARGEST_HEAD and padded > head_dim:
        near = [n for n in (*range(head_dim, 15, -1), *range(head_dim, 257)) if sum(head_tiles(n)) == n]
        text = f"the attention kernels pad heads of {head_dim} to {padded}, which wastes {padded / head_dim - 1:.0%} of their work"
        found.append(PlanWarning(text, f"set model.head_dim {min(near, key=lambda n: (abs(n - head_dim), -n))}"))
    return found
