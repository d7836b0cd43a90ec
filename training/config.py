"""The configuration of a run: small frozen dataclasses, filled from a YAML file and `--section.key value` on the command line."""

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from ..common.errors import UserError
from ..model.gpt import PRESETS, GPTConfig

REPOSITORY = Path(__file__).resolve().parent.parent
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")


def at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class DataConfig:
    """What the model reads.

    Args:
        source: "built-in" makes stories of its own under out_dir/data; else a folder with tokenizer/, train/ and validation/.
        stories: Built-in stories to train on.
        validation_stories: Built-in stories held out.
        vocab_size: Entries of the tokenizer trained on the built-in stories.
        document_mask: Whether attention stays inside a document when several are packed into one sequence.
    """

    source: str = "built-in"
    stories: int = 12_000
    validation_stories: int = 500
    vocab_size: int = 2048
    document_mask: bool = True

    def __post_init__(self):
        at_least("data.stories", self.stories, 1)
        at_least("data.validation_stories", self.validation_stories, 1)
        at_least("data.vocab_size", self.vocab_size, 262)

    @property
    def built_in(self) -> dict[str, int]:
        """The sizes of the built-in data, as `write_built_in` takes them."""
        return {"stories": self.stories, "validation_stories": self.validation_stories, "vocab_size": self.vocab_size}


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape: a preset, and what to change in it (null keeps the preset's value).

    Args:
        preset: tiny, quickstart or microstories-44m.
        vocab_size: Entries of the embedding; null takes the tokenizer's.
        n_layer: Layers.
        n_head: Query heads.
        n_kv_head: Key and value heads, a divisor of n_head.
        head_dim: Size of a head; heads times size need not be the width.
        width: Size of the residual stream.
        mlp_width: Size of the MLP's hidden layer.
        context: Longest sequence in tokens.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of the norms.
        qk_norm: Whether q and k are normalised (saved as Qwen3; without it as Mistral).
        tie_embeddings: Whether the head is the embedding.
        window: Sliding attention window in tokens; null for none.
        init_std: Standard deviation of the fresh weights.
    """

    preset: str = "quickstart"
    vocab_size: int | None = None
    n_layer: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    head_dim: int | None = None
    width: int | None = None
    mlp_width: int | None = None
    context: int | None = None
    rope_theta: float | None = None
    norm_eps: float | None = None
    qk_norm: bool | None = None
    tie_embeddings: bool | None = None
    window: int | None = None
    init_std: float | None = None

    def __post_init__(self):
        one_of("model.preset", self.preset, list(PRESETS))

    def build(self, vocab_size: int | None) -> GPTConfig:
        """The shape for a tokenizer of `vocab_size` entries (None: the config's or the preset's own number). Raises ValueError where the
        config asks for another size."""
        if vocab_size is None:
            vocab_size = self.vocab_size or PRESETS[self.preset].vocab_size
        if self.vocab_size not in (None, vocab_size):
            raise UserError(
                f"model.vocab_size is {self.vocab_size}, but the data was made with a vocabulary of {vocab_size}; "
                f"set --model.vocab_size {vocab_size}, or null to take the data's"
            )
        changes = {k: v for k, v in asdict(self).items() if k != "preset" and v is not None}
        return GPTConfig.preset(self.preset, **(changes | {"vocab_size": vocab_size}))


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        max_steps: Optimizer steps of the whole run.
        global_batch: Sequences of `context` tokens in an optimizer step, over all processes and accumulation steps.
        micro_batch: Sequences a process takes at once; lower it when memory runs out, a step keeps its tokens.
        context: Tokens of a sequence; null takes the model's context.
        precision: auto, bf16, fp16 or fp32. auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU.
        compile: Whether to use torch.compile.
        grad_clip: Largest norm of the gradient.
        z_loss: Coefficient of lse², keeps logits small; 0 for none.
        validate_every: Steps between validations.
        sample_every: Steps between printed samples; 0 for none.
        checkpoint_every: Steps between checkpoints (the last step always is one).
        keep_last: How many of the newest checkpoints to keep; 0 keeps all.
        keep_best: Whether to keep the checkpoint with the best validation loss besides.
    """

    max_steps: int = 1000
    global_batch: int = 32
    micro_batch: int = 32
    context: int | None = None
    precision: str = "auto"
    compile: bool = True
    grad_clip: float = 1.0
    z_loss: float = 0.0
    validate_every: int = 250
    sample_every: int = 250
    checkpoint_every: int = 250
    keep_last: int = 0
    keep_best: bool = True

    def __post_init__(self):
        one_of("train.precision", self.precision, ("auto", "bf16", "fp16", "fp32"))
        for name in ("max_steps", "global_batch", "micro_batch", "validate_every", "checkpoint_every"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("sample_every", "keep_last", "z_loss"):
            at_least(f"train.{name}", getattr(self, name), 0)
        if self.global_batch % self.micro_batch:
            divisors = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            near = min(divisors, key=lambda n: abs(n - self.micro_batch))
            raise UserError(
                f"train.micro_batch ({self.micro_batch}) must divide train.global_batch ({self.global_batch}); "
                f"try --train.micro_batch {near}"
            )
        if self.grad_clip <= 0:
            raise UserError(f"train.grad_clip is {self.grad_clip}; it must be above 0 (1.0 is usual, inf never clips)")

    def sequence(self, shape: GPTConfig) -> int:
        """Tokens of a training sequence. Raises ValueError where it is longer than the model's context."""
        if self.context is not None and self.context > shape.context:
            raise UserError(
                f"train.context ({self.context}) is longer than the model's ({shape.context}); set --model.context {self.context}"
            )
        return self.context or shape.context


@dataclass(frozen=True)
class OptimConfig:
    """AdamW for embedding, head and norms; AdamW or Muon for the matrices between them.

    Args:
        matrices: muon or adamw.
        lr: Peak learning rate. Muon's update is scaled to the size of AdamW's, so one rate serves both.
        embedding_lr: Peak rate of embedding, head and norms; null takes lr.
        betas: AdamW's.
        momentum: Muon's.
        weight_decay: Decoupled, on matrices only.
        schedule: cosine (warm-up, cosine), or wsd (warm-up, stable, linear decay).
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Share of the run that wsd decays in.
        min_lr_ratio: The last step's rate over the peak.
    """

    matrices: str = "muon"
    lr: float = 2e-3
    embedding_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    min_lr_ratio: float = 0.0

    def __post_init__(self):
        one_of("optim.matrices", self.matrices, ("muon", "adamw"))
        one_of("optim.schedule", self.schedule, ("cosine", "wsd"))
        for name in ("lr", "embedding_lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}; it must be above 0 (0.002 is usual)")
        for name, values in (("betas", self.betas), ("momentum", (self.momentum,))):
            if not all(0 <= value < 1 for value in values):
                raise UserError(f"optim.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        at_least("optim.weight_decay", self.weight_decay, 0)
        at_least("optim.warmup_steps", self.warmup_steps, 0)
        for name in ("decay_fraction", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name} is {getattr(self, name)}; it must be in [0, 1]")


@dataclass(frozen=True)
class LogConfig:
    """What is told, and where.

    Args:
        every: Steps between lines of metrics.jsonl.
        wandb: online, offline or disabled; disabled needs no account.
        project: Project name in wandb.
        prompts: What the printed samples continue; an empty one lets the model begin.
        sample_tokens: Most tokens of a printed sample.
    """

    every: int = 10
    wandb: str = "disabled"
    project: str = "tritale"
    prompts: tuple[str, ...] = ("", "", "汤姆和杰瑞是好朋友，")
    sample_tokens: int = 400

    def __post_init__(self):
        one_of("log.wandb", self.wandb, ("online", "offline", "disabled"))
        at_least("log.every", self.every, 1)
        at_least("log.sample_tokens", self.sample_tokens, 1)


@dataclass(frozen=True)
class RunConfig:
    """A complete run.

    Args:
        out_dir: Where everything is written.
        seed: Seed of the weights, the built-in stories and the order of the data.
        resume: auto goes on from the newest whole checkpoint in out_dir if its run had this config; force also where the
            config differs in something that the weights do not depend on (a longer run, say).
        data: What the model reads.
        model: The model's shape.
        train: The loop.
        optim: The optimizer.
        log: What is told, and where.
    """

    out_dir: str = "out/run"
    seed: int = 42
    resume: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        one_of("resume", self.resume, ("auto", "force"))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be 0 or more and below 2**63")
        if self.optim.warmup_steps >= self.train.max_steps:
            raise UserError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be less than train.max_steps ({self.train.max_steps}); "
                f"try {self.train.max_steps // 10}"
            )

    @property
    def data_folder(self) -> Path:
        """Where tokenizer/, train/ and validation/ are, or the built-in ones will be."""
        return Path(self.out_dir) / "data" if self.data.source == "built-in" else Path(self.data.source)


def flatten(config: object, prefix: str = "") -> dict[str, object]:
    """{"train.max_steps": 1000, …} of a config."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return flat


def differences(before: dict[str, object], config: RunConfig) -> list[str]:
    """What differs, as "key: before → now", between a saved flat config and this one, but for keys that may always change."""
    after = flatten(config)
    events = ("train.validate_every", "train.sample_every", "train.checkpoint_every")
    free = ("out_dir", "resume", "log.", "train.micro_batch", "train.compile", "train.keep_", *events)

    def same(a: object, b: object) -> bool:
        return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)

    keys = [k for k in {**before, **after} if not k.startswith(free)]
    return [f"{k}: {before.get(k)} → {after.get(k)}" for k in keys if not same(before.get(k), after.get(k))]


def explain_key_error(message: str) -> str:
    """jsonargparse's message for a bad key or value, with the nearest known key where it names an unknown one."""
    keys = [*flatten(RunConfig()), "config"]
    unknown = [m.removeprefix("--").split("=")[0] for m in re.findall(r"--[\w.-]+", message) if "unrecognized" in message]
    found = re.search(r"[Gg]roup '(\w+)' does not accept option '([\w.]+)'", message)
    if found:
        unknown = [".".join(found.groups())]
    found = re.search(r"[Oo]ption '([\w.]+)' is not accepted", message)
    if found:
        unknown = [found.group(1)]
    for key in unknown:
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0) or [""]
        message = f"unknown config key {key!r}; the nearest is {near[0]!r}. All keys: python train.py --help"
    return message


def parse(arguments: Sequence[str] | None = None, *, prog: str = "train.py") -> RunConfig:
    """The config of a command line. Ends the process with a message on a bad key or value, as argument parsers do."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(prog=prog, description="Train a GPT from scratch.", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; without one it is configs/quickstart.yaml")
    parser.add_class_arguments(RunConfig)
    if not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = [f"--config={QUICKSTART}", *arguments]
    try:
        values = parser.instantiate(parser.parse_args(arguments))
        return RunConfig(**{f.name: values[f.name] for f in fields(RunConfig)})
    except (ArgumentError, ValueError, TypeError) as error:
        sys.exit(f"{prog}: {explain_key_error(str(error))}")
