"""What a run will do, computed before it runs: from the config, the facts about the data and those about the device, in plain sight.

`plan` is a pure function of the three; `tritale plan` prints all of it and train.py the rows of `Plan.rows` at its start, so that the two
never disagree. The estimate of memory is held against what the allocator measures in tests/training/test_plan.py.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import UserError
from ..data.shards import Split
from ..kernels.dispatch import has_triton
from ..kernels.flash_attention import head_tiles
from ..kernels.linear_cross_entropy import chunk_rows
from ..model.gpt import GPTConfig
from . import processes
from .config import RunConfig
from .optimizer import lr_factor

CHINCHILLA = 20  # tokens per parameter where a compute budget is best spent (arXiv 2203.15556)
MAX_EPOCHS = 16  # a text repeated more often than this adds almost nothing (arXiv 2305.16264, section 5)
FILL = 0.9  # of the free memory: the allocator loses some of it between its blocks
SAMPLES = 1000  # built-in stories that stand for all of them where they are not written yet


@dataclass(frozen=True)
class DataFacts:
    """What is known about the data; None where it is not."""

    known_from: str  # in words
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
    """What is known about the device, or each of several equal ones."""

    name: str
    kind: str  # cpu or cuda
    count: int
    precision: str  # bf16, fp16 or fp32
    has_bf16: bool
    runs_triton: bool
    compiler_missing: str | None  # why torch.compile cannot work
    free_memory: int  # bytes
    free_disk: int  # bytes, where out_dir will be
    flops: float  # that matrix products reach, per second
    flops_source: str

    @classmethod
    def of(cls, here: processes.Processes, config: RunConfig) -> "DeviceFacts":
        """The facts about this process's device; measures its matrix products. Call it before the model takes its memory."""
        device, folder = here.device, Path(config.out_dir).absolute()
        precision = processes.choose_precision(config.train.precision, device)
        flops, source = processes.matmul_flops(device, precision)
        return cls(
            name=processes.device_name(device),
            kind=device.type,
            count=here.world_size,
            precision=precision,
            has_bf16=processes.has_bf16(device),
            runs_triton=device.type == "cuda" and has_triton(),
            compiler_missing=processes.cpp_compiler_missing() if device.type == "cpu" and config.train.compile else None,
            free_memory=processes.free_memory(device),
            free_disk=shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free,
            flops=flops,
            flops_source=source,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class Remark:
    """Something to think about before the run, and what to do about it. A note may be left alone; a warning should not."""

    text: str
    remedy: str
    is_note: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    config: RunConfig
    data: DataFacts
    device: DeviceFacts
    shape: GPTConfig
    sequence: int  # tokens
    parameters: int
    embedding: int  # of the parameters, with the head where it is not tied
    tokens_per_step: int
    micro_batches: int  # of a step and process
    steps_per_epoch: int | None
    tokens: int  # of the whole run
    epochs: float | None
    rates: tuple[float, float, float]  # learning rate of the first, the middle and the last step
    last_tenth: float  # mean rate of the last tenth of the run over the peak
    memory: Memory
    largest_micro_batch: int  # that fits and divides the global batch; 0 if none does
    checkpoint: int  # bytes
    checkpoints: int  # kept at the end
    flops_per_token: float
    remarks: tuple[Remark, ...]

    @property
    def warnings(self) -> list[Remark]:
        return [r for r in self.remarks if not r.is_note]

    @property
    def notes(self) -> list[Remark]:
        return [r for r in self.remarks if r.is_note]

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints at their most: those kept, and one that is being written."""
        return (self.checkpoints + (self.config.train.keep_last > 0)) * self.checkpoint

    def rows(self) -> dict[str, str]:
        """The plan in short, a line each."""
        c, d, t = self.config, self.device, self.config.train
        facts = [self.data.known_from]
        if self.data.documents:
            facts.append(f"{self.data.documents:,} documents")
        facts.append(f"{self.data.tokens:,} tokens" if self.data.tokens else "number of tokens unknown (--tokens)")
        if self.data.characters:
            facts.append(f"{self.data.characters / (self.data.tokens - self.data.documents):.2f} characters per token")
        run = f"{t.max_steps:,} steps, {self.tokens / 1e6:,.1f} M tokens"
        if self.epochs is not None:
            run += f", {self.epochs:.1f} epochs"
        ratio = self.tokens / self.parameters
        first, middle, last = (f"{rate:.1e}" if rate else "0" for rate in self.rates)
        own = f" (embedding, head and norms: × {c.optim.embedding_lr / c.optim.lr:.3g})" if c.optim.embedding_lr else ""
        return {
            "device": f"{d.count} × {d.name}, {d.precision}",
            "matrix products": f"{d.flops / 1e9:,.0f} GFLOP/s ({d.flops_source}; mfu is against this)",
            "data": ", ".join(facts),
            "model": f"{self.parameters / 1e6:.1f} M parameters, {self.embedding / self.parameters:.0%} of them embedding",
            "step": f"{self.tokens_per_step:,} tokens in {self.micro_batches} micro-batches"
            + (f", {self.steps_per_epoch:,} an epoch" if self.steps_per_epoch is not None else ""),
            "run": f"{run}, {ratio:,.0f} tokens per parameter ({ratio / CHINCHILLA:.1f} × Chinchilla's {CHINCHILLA})",
            "learning rate": f"first step {first}, middle {middle}, last {last}{own}",
            "memory": f"{size(self.memory.total)} of {size(d.free_memory)} free; "
            + f"largest micro-batch that fits: {self.largest_micro_batch or 'none'}",
            "disk": f"{self.checkpoints} checkpoints of {size(self.checkpoint)}, {size(self.disk)} of {size(d.free_disk)} free",
            "output": c.out_dir,
        }


def size(n_bytes: float) -> str:
    """1.2 GB, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def known_data(config: RunConfig, *, tokens: int | None = None, vocab_size: int | None = None) -> DataFacts:
    """The facts of the data on the disk; where there is none, `tokens` and `vocab_size`, and for what is not given either the config's own
    numbers. Raises FileNotFoundError or ValueError for data that is there but damaged."""
    folder = config.data_folder
    if (folder / "train").exists() and tokens is None and vocab_size is None:
        return DataFacts.of(Split.open(folder / "train", verify=False))
    if config.data.source == "built-in" and tokens is None and vocab_size is None:
        return _built_in(config)
    words = [f"no data at {folder} yet" if not (folder / "train").exists() else f"instead of {folder}"]
    known_vocab = vocab_size or config.model.vocab_size or config.model.build(None).vocab_size
    source = "as given" if vocab_size else ("model.vocab_size" if config.model.vocab_size else f"that of the preset {config.model.preset}")
    words.append(f"vocabulary {known_vocab:,} ({source})")
    return DataFacts(", ".join(words), known_vocab, tokens)


def _built_in(config: RunConfig) -> DataFacts:
    # The built-in stories before they are written: their number is known, their length from the first of them.
    from ..data.tokenizer import Tokenizer
    from ..stories.generator import TRAIN_START, story

    n = min(SAMPLES, config.data.stories)
    texts = [story(config.seed, TRAIN_START + i).text for i in range(n)]
    tokenizer = Tokenizer.train(iter(texts), config.data.vocab_size)
    tokens = sum(map(len, tokenizer.encode_batch(texts, bos=True)))
    scale = config.data.stories / n
    words = f"built-in stories, not written yet, estimated from {n:,} of them"
    return DataFacts(words, tokenizer.vocab_size, round(tokens * scale), config.data.stories, round(sum(map(len, texts)) * scale))


def plan(config: RunConfig, data: DataFacts, device: DeviceFacts) -> Plan:
    """What the run of `config` will do with this data on this device.

    Raises ValueError for a shape, a sequence or a vocabulary that cannot be, and where the micro-batches of all processes do not divide a
    step."""
    t, shape = config.train, config.model.build(data.vocab_size)
    sequence = t.sequence(shape)
    if t.global_batch % (t.micro_batch * device.count):
        raise UserError(
            f"train.micro_batch ({t.micro_batch}) × processes ({device.count}) must divide train.global_batch ({t.global_batch}); "
            f"try --train.global_batch {max(1, t.global_batch // (t.micro_batch * device.count)) * t.micro_batch * device.count}"
        )

    embedding = shape.vocab_size * shape.width * (1 if shape.tie_embeddings else 2)
    matrices = shape.n_matrix - shape.vocab_size * shape.width  # of the blocks; n_matrix counts the head once
    norms = shape.width * (2 * shape.n_layer + 1) + 2 * shape.head_dim * shape.n_layer * shape.qk_norm
    parameters = embedding + matrices + norms

    tokens_per_step = t.global_batch * sequence
    steps_per_epoch = None if data.tokens is None else data.tokens // tokens_per_step
    tokens = t.max_steps * tokens_per_step

    factors = [lr_factor(step, t.max_steps, config.optim) for step in (0, t.max_steps // 2, t.max_steps - 1)]
    tenth = range(t.max_steps - max(1, t.max_steps // 10), t.max_steps)
    tenth = tenth[:: max(1, len(tenth) // 1000)]
    last_tenth = sum(lr_factor(step, t.max_steps, config.optim) for step in tenth) / len(tenth)

    # AdamW keeps two fp32 numbers a parameter, Muon one.
    optimizer = 8 * (parameters - matrices) + (4 if config.optim.matrices == "muon" else 8) * matrices
    per_process = t.global_batch // device.count
    needs = {n: memory(config, shape, device, n, parameters, optimizer) for n in divisors(per_process)}
    largest = max((n for n, m in needs.items() if m.total <= FILL * device.free_memory), default=0)

    checkpoint = 4 * parameters + optimizer  # fp32 weights beside the optimizer's state; tokenizer and JSON are small
    checkpoints = -(-t.max_steps // t.checkpoint_every)
    if t.keep_last:
        checkpoints = min(checkpoints, t.keep_last + t.keep_best)

    result = Plan(
        config=config,
        data=data,
        device=device,
        shape=shape,
        sequence=sequence,
        parameters=parameters,
        embedding=embedding,
        tokens_per_step=tokens_per_step,
        micro_batches=per_process // t.micro_batch,
        steps_per_epoch=steps_per_epoch,
        tokens=tokens,
        epochs=t.max_steps / steps_per_epoch if steps_per_epoch else None,
        rates=tuple(config.optim.lr * f for f in factors),
        last_tenth=last_tenth,
        memory=needs[t.micro_batch],
        largest_micro_batch=largest,
        checkpoint=checkpoint,
        checkpoints=checkpoints,
        flops_per_token=shape.flops_per_token(min(sequence, data.document_length(sequence))),
        remarks=(),
    )
    return replace(result, remarks=tuple([*_training(result), *_serving(result)]))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# --- Memory --------------------------------------------------------------------------------------------------------------------------


def activation_bytes(shape: GPTConfig, device: DeviceFacts, is_compiled: bool) -> int:
    """What forward keeps for backward, in bytes per token. The residual stream is fp32; what goes into a matrix product has the precision's
    size. Exact within 2 %, but for eager bf16 on a CPU, which keeps some fp32 copies more."""
    s, item = shape, 4 if device.precision == "fp32" else 2
    heads, kv_heads = s.n_head * s.head_dim, s.n_kv_head * s.head_dim
    on_cpu, is_grouped = not device.runs_triton, s.n_head > s.n_kv_head
    normed = 2 * s.width * item  # what the two norms give: the inputs of qkv and gate_up
    residual = 2 * s.width * 4 + 2 * 4  # what they take, and 1 / rms
    packed = (heads + 2 * kv_heads) * item  # the product, kept for the norms of q and k or because v is a view of it
    if on_cpu and is_grouped:  # PyTorch's attention wants k and v repeated for each query head
        qkv = 3 * heads * item + s.qk_norm * packed
    else:
        qkv = (heads + kv_heads) * item + packed
    if on_cpu:
        qkv += s.qk_norm * (s.n_head + s.n_kv_head) * 4  # 1 / rms of each head
    else:
        qkv += s.qk_norm * kv_heads * item + 2 * 4  # qk_norm_rope gives a v of its own; where the token's document starts and ends
    attention = qkv + heads * item + s.n_head * 4  # q, k, v; its output; lse
    mlp = 3 * s.mlp_width * item  # gate, up; silu(gate) · up
    layer = normed + residual + attention + mlp
    if on_cpu and not is_compiled:  # x / rms, silu(gate) and the rows of cos and sin, fp32, which compiled code makes anew
        layer += (2 * s.width + s.mlp_width + s.head_dim + s.qk_norm * (heads + kv_heads)) * 4
    last_norm = s.width * 4 * (2 if on_cpu and not is_compiled else 1)
    return s.n_layer * layer + last_norm


def memory(config: RunConfig, shape: GPTConfig, device: DeviceFacts, micro_batch: int, parameters: int, optimizer: int) -> Memory:
    """What one process holds when a step needs the most: at the end of forward, when the activations are all there, the loss has made the
    gradients of the head and of its input, and its chunk of logits is still there; or where that is more, one gradient of the
    embedding that backward adds to another."""
    rows, item = micro_batch * config.train.sequence(shape), 4 if device.precision == "fp32" else 2
    head = shape.vocab_size * shape.width
    is_compiled = config.train.compile and not device.compiler_missing
    activations = rows * activation_bytes(shape, device, is_compiled)
    if item == 2:  # autocast's copies of the blocks' matrices
        activations += 2 * (shape.n_matrix - head)
    if device.runs_triton:  # written over in place
        chunk = min(rows, chunk_rows(rows, shape.vocab_size, 256, item)) * shape.vocab_size * item
    else:  # fp32, and beside them the product and the gradient in bf16
        chunk = min(rows, chunk_rows(rows, shape.vocab_size, 64)) * shape.vocab_size * (4 if item == 4 else 8)
    gradients = 4 * parameters * (2 if device.count > 1 else 1)  # DistributedDataParallel reduces in buckets of its own
    return Memory(
        weights=4 * parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        loss=4 * head + rows * shape.width * item + max(chunk + (2 * head if item == 2 else 0), 4 * head),
    )


# --- Remarks -------------------------------------------------------------------------------------------------------------------------


def _training(p: Plan) -> list[Remark]:
    c, t, o, d, found = p.config, p.config.train, p.config.optim, p.device, []
    if p.last_tenth > 0.5:
        if o.warmup_steps > 0.8 * t.max_steps:
            remedy = f"warm-up takes {o.warmup_steps} of {t.max_steps} steps; set optim.warmup_steps {t.max_steps // 10}"
        elif o.min_lr_ratio > 0.4:
            remedy = f"optim.min_lr_ratio is {o.min_lr_ratio}; set it to 0 (0.1 is the most that is usual)"
        else:
            remedy = f"optim.decay_fraction is {o.decay_fraction}; set it to 0.3, or optim.schedule to cosine"
        text = f"the learning rate never anneals: over the last tenth of the run it is {p.last_tenth:.0%} of its peak"
        found.append(Remark(text, remedy))
    if p.steps_per_epoch == 0:
        most = p.data.tokens // (p.sequence * t.micro_batch * d.count) * t.micro_batch * d.count
        remedy = f"set train.global_batch {most} or less" if most else "lower train.micro_batch"
        text = f"the data ({p.data.tokens:,} tokens) is less than one step of {p.tokens_per_step:,}"
        found.append(Remark(text, f"{remedy}, or add data"))
    if p.epochs is not None and p.epochs > MAX_EPOCHS:
        end = MAX_EPOCHS * p.steps_per_epoch
        rate = lr_factor(end, t.max_steps, o)
        text = f"{p.epochs:,.0f} epochs, and after about {MAX_EPOCHS} a repeated text adds almost nothing"
        text += f"; there the learning rate is still {rate:.1%} of its peak"
        found.append(Remark(text, f"set train.max_steps {end} or less, so that the schedule decays by then; or add data"))
    if p.embedding > p.parameters / 2:
        text = f"{p.embedding / p.parameters:.0%} of the parameters are embedding, which each token uses one row of"
        body = p.parameters - p.embedding
        small = 6400 * p.embedding // p.shape.vocab_size
        if small < body:
            remedy = "a vocabulary of the data's own: prepared with --vocab-size 6400 "
            remedy += f"it is {small / (small + body):.0%} of {(small + body) / 1e6:.1f} M"
        else:
            remedy = f"more layers, or a smaller vocabulary than {p.shape.vocab_size:,}"
        found.append(Remark(text, remedy))
    if p.memory.total > FILL * d.free_memory:
        text = f"a micro-batch of {t.micro_batch} needs {size(p.memory.total)}, and {size(d.free_memory)} are free"
        fits = p.largest_micro_batch
        remedy = f"set train.micro_batch {fits}; a step keeps its tokens" if fits else "a smaller model or context"
        found.append(Remark(f"{text} (a tenth is kept for the allocator)", remedy))
    if p.disk > d.free_disk:
        keep = max(1, int(d.free_disk / p.checkpoint) - 2)
        text = f"the checkpoints will take {size(p.disk)}, and {size(d.free_disk)} are free"
        found.append(Remark(text, f"set train.keep_last {keep}, or train.checkpoint_every higher"))
    if d.precision == "bf16" and not d.has_bf16:
        text = "train.precision bf16: this device has no bf16 instructions and only imitates them, many times slower than auto's choice"
        found.append(Remark(text, "set train.precision auto"))
    if d.compiler_missing and c.train.compile:
        text = f"no C++ compiler, so torch.compile is off and training is slower ({d.compiler_missing})"
        found.append(Remark(text, "on Debian: apt install g++"))
    return found


def _serving(p: Plan) -> list[Remark]:
    """What becomes of the shape after training, and costs a new training to change."""
    s, found, d = p.shape, [], p.shape.head_dim
    tiles = sum(head_tiles(d))
    if d <= 256 and tiles > d:
        near = [n for n in (*range(d, 15, -1), *range(d, 257)) if sum(head_tiles(n)) == n]
        text = f"the attention kernels pad heads of {d} to {tiles}, {tiles / d - 1:.0%} of their work for nothing"
        found.append(Remark(text, f"set model.head_dim {min(near, key=lambda n: (abs(n - d), -n))}"))
    # vLLM, vllm/v1/attention/backends: supports_head_size is `head_size % 8 == 0 and head_size <= 256` for FlashAttention (flash_attn.py at
    # 5704f34) and `head_size >= 32` for Triton (triton_attn.py at 001ceb3); what both refuse is left to FlexAttention.
    if d % 8 or d > 256:
        other = "Triton attention" if d >= 32 else "FlexAttention, the slowest"
        text = f"vLLM's FlashAttention does not take heads of {d} (multiples of 8 up to 256), and it falls back to {other}"
        found.append(Remark(text, f"set model.head_dim {min(256, max(8, round(d / 8) * 8))}"))
    # The list of CPUAttentionBackend.get_supported_head_sizes (cpu_attn.py at 0035860; 512 came later). Another size is an error at start.
    cpu_sizes = [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512]
    if d not in cpu_sizes:
        near = min(cpu_sizes, key=lambda n: (abs(n - d), -n))
        text = f"vLLM on a CPU does not take heads of {d} (only {', '.join(map(str, cpu_sizes))})"
        found.append(Remark(text, f"set model.head_dim {near}"))
    # llama.cpp has no sliding window in its llama (Mistral) and qwen3 graphs: ggml-org/llama.cpp#3377, closed as stale.
    if s.window is not None and s.window < s.context:
        text = f"llama.cpp knows no sliding window in Mistral or Qwen3: beyond {s.window} tokens its model is not the one trained"
        found.append(Remark(text, "leave model.window null, or serve with transformers or vLLM"))
    # llama.cpp: "K cache type q8_0 with block size 32 does not divide n_embd_head_k=48" (src/llama-context.cpp).
    if d % 32:
        text = f"llama.cpp cannot quantize the KV cache of heads of {d} (blocks of 32): leave out --cache-type-k and -v"
        found.append(Remark(text, f"set model.head_dim {max(32, (d + 16) // 32 * 32)}", is_note=True))
    # K-quants need rows of a multiple of 256, else a legacy quant of blocks of 32 takes their place, else F16 (ggml-org/llama.cpp#1921,
    # #3747, #28474: q4_K → q5_0, "+37 %"). A row is as long as what the matrix multiplies.
    rows = {"width": s.width, "n_head × head_dim": s.n_head * d, "mlp_width": s.mlp_width}
    odd = {name: n for name, n in rows.items() if n % 256}
    if odd:
        kind = "f16" if any(n % 32 for n in odd.values()) else "q5_0 and q8_0"
        text = f"llama.cpp quantizes rows of {', '.join(f'{n} ({name})' for name, n in odd.items())} to {kind} instead of q4_K and q6_K"
        found.append(Remark(text, "multiples of 256, if it is to be quantized to four bits", is_note=True))
    return found
