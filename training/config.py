"""The config of a run: frozen dataclasses, filled from a YAML file and `--section.key value` on the command line."""

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from ..common.errors import UserError
from ..model.gpt import PRESETS, GPTConfig

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"  # in the repository and in the wheel


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")


def at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class DataConfig:
    """The training and validation data.

    Args:
        source: "built-in" generates stories into out_dir/data; otherwise a folder that contains tokenizer/, train/ and validation/.
        stories: Number of built-in training stories.
        validation_stories: Number of built-in validation stories.
        vocab_size: Vocabulary size of the tokenizer trained on the built-in stories.
        document_mask: Whether attention is limited to one document when a sequence contains several.
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
        """The arguments of `write_built_in`."""
        return {"stories": self.stories, "validation_stories": self.validation_stories, "vocab_size": self.vocab_size}


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape: a preset and changes to it (null keeps the preset's value).

    Args:
        preset: tiny, quickstart or microstories-44m.
        vocab_size: Rows of the embedding; null uses the tokenizer's vocabulary size.
        n_layer: Number of layers.
        n_head: Number of query heads.
        n_kv_head: Number of key and value heads; must divide n_head.
        head_dim: Size of a head; n_head × head_dim need not equal width.
        width: Size of the residual stream.
        mlp_width: Size of the MLP's hidden layer.
        context: Maximum sequence length in tokens.
        rope_theta: Base of the rotary frequencies.
        norm_eps: Epsilon of the norms.
        qk_norm: Whether q and k are normalized (saved as Qwen3; otherwise saved as Mistral).
        tie_embeddings: Whether the head shares the embedding's weights.
        window: Sliding attention window in tokens; null for none.
        init_std: Standard deviation of the initial weights.
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
        """The shape for a vocabulary size (None: the config's, else the preset's). Raises UserError if the config has another."""
        if vocab_size is None:
            vocab_size = self.vocab_size or PRESETS[self.preset].vocab_size
        if self.vocab_size not in (None, vocab_size):
            raise UserError(
                f"model.vocab_size is {self.vocab_size}, but the data has a vocabulary of {vocab_size}; "
                f"set --model.vocab_size {vocab_size}, or null to use the data's"
            )
        changes = {k: v for k, v in asdict(self).items() if k != "preset" and v is not None}
        return GPTConfig.preset(self.preset, **(changes | {"vocab_size": vocab_size}))


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        max_steps: Number of optimizer steps.
        global_batch: Sequences of `context` tokens per optimizer step, over all processes and gradient accumulation.
        micro_batch: Sequences per process and forward pass. Lower it when memory runs out; a step keeps its number of tokens.
        context: Tokens per sequence; null uses the model's context.
        precision: auto, bf16, fp16 or fp32. auto is bf16 if the hardware supports it, else fp16 on a GPU and fp32 on a CPU.
        compile: Whether to use torch.compile.
        grad_clip: Maximum norm of the gradient.
        z_loss: Coefficient of lse² in the loss, which keeps the logits small; 0 for none.
        validate_every: Steps between validations.
        sample_every: Steps between printed samples; 0 for none.
        checkpoint_every: Steps between checkpoints. The last step is always saved.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        keep_best: Whether to also keep the checkpoint with the best validation loss.
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
        """Tokens per training sequence. Raises UserError if it exceeds the model's context."""
        if self.context is not None and self.context > shape.context:
            raise UserError(
                f"train.context ({self.context}) is longer than the model's ({shape.context}); set --model.context {self.context}"
            )
        return self.context or shape.context


@dataclass(frozen=True)
class OptimConfig:
    """AdamW for the embedding, the head and the norms; AdamW or Muon for the matrices of the blocks.

    Args:
        matrices: muon or adamw.
        lr: Peak learning rate. Muon's update is scaled to the size of AdamW's, so the same rate suits both.
        embedding_lr: Peak learning rate of the embedding, the head and the norms; null uses lr.
        betas: Betas of AdamW.
        momentum: Momentum of Muon.
        weight_decay: Decoupled weight decay of the matrices.
        schedule: cosine (warm-up, cosine decay) or wsd (warm-up, stable, linear decay).
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Share of the run in which wsd decays.
        min_lr_ratio: Learning rate of the last step divided by the peak.
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
    """Metrics and printed samples.

    Args:
        every: Steps between lines of metrics.jsonl.
        wandb: online, offline or disabled.
        project: Project name in wandb.
        prompts: Prompts of the printed samples; an empty prompt starts a new story.
        sample_tokens: Maximum number of tokens of a printed sample.
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
        out_dir: Output folder.
        seed: Seed of the weights, the built-in stories and the order of the data.
        resume: auto resumes from the newest complete checkpoint in out_dir and requires the same config. force also accepts
            changes that the weights do not depend on, for example a longer run.
        data: The training and validation data.
        model: The model's shape.
        train: The training loop.
        optim: The optimizer.
        log: Metrics and printed samples.
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
        """The folder of tokenizer/, train/ and validation/."""
        return Path(self.out_dir) / "data" if self.data.source == "built-in" else Path(self.data.source)


def flatten(config: Any, prefix: str = "") -> dict[str, object]:
    """A config dataclass as {"train.max_steps": 1000, …}."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return flat


def differences(before: dict[str, object], config: RunConfig) -> list[str]:
    """The keys in which a saved flat config and this one differ, as "key: before → now", without keys that may change at any time."""
    after = flatten(config)
    events = ("train.validate_every", "train.sample_every", "train.checkpoint_every")
    free = ("out_dir", "resume", "log.", "train.micro_batch", "train.compile", "train.keep_", *events)

    def same(a: object, b: object) -> bool:
        return (list(a) if isinstance(a, tuple) else a) == (list(b) if isinstance(b, tuple) else b)

    keys = [k for k in {**before, **after} if not k.startswith(free)]
    return [f"{k}: {before.get(k)} → {after.get(k)}" for k in keys if not same(before.get(k), after.get(k))]


def explain_key_error(message: str) -> str:
    """jsonargparse's message for a bad key or value; for an unknown key, a message that names the nearest key."""
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


def parse(arguments: Sequence[str] | None = None, *, file: str | None = None, prog: str = "train.py") -> RunConfig:
    """The config of a command line. `file` is a YAML file, as after --config. Ends the process with a message for a bad key or value."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(prog=prog, description="Train a GPT from scratch.", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; configs/quickstart.yaml if not given")
    parser.add_class_arguments(RunConfig)
    if file or not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = [f"--config={file or QUICKSTART}", *arguments]
    try:
        values = parser.instantiate(parser.parse_args(arguments))
        return RunConfig(**{f.name: values[f.name] for f in fields(RunConfig)})
    except (ArgumentError, ValueError, TypeError) as error:
        sys.exit(f"{prog}: {explain_key_error(str(error))}")
