"""The config of a run: frozen dataclasses, filled from a YAML file and `--section.key value` on the command line."""

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ..common.console import end_with
from ..common.errors import UserError
from ..common.run_folder import find_checkpoint
from ..model.checkpoint import read_shape
from ..model.gpt import PRESETS, GPTConfig

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"  # in the repository and in the wheel
LONGEST_CONFIG = 1_000_000  # characters


def at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{name} is {value}; it must be at least {least}")


def between(default: Any, least: float, most: float) -> Any:
    """A field whose value is in [least, most]. The limits are far beyond useful values; they catch typing errors."""
    return field(default=default, metadata={"limits": (least, most)})


def one_of(default: str, *others: str) -> Any:
    """A field whose value is one of some words."""
    return field(default=default, metadata={"words": (default, *others)})


def checked(default: Any, is_valid: Callable[[Any], bool], accepted: str) -> Any:
    """A field whose value satisfies a function. `accepted` says so in a message."""
    return field(default=default, metadata={"is_valid": is_valid, "accepted": accepted})


def is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def is_path(value: object) -> bool:
    """Whether a value can be meant as the path of a folder. Nothing in it is expanded, so ~, $ and :// would become names of folders."""
    if not isinstance(value, str) or value != value.strip() or not value.isprintable() or value.lower() in ("", "null", "none"):
        return False
    return not value.startswith("~") and "$" not in value and "://" not in value


def is_source(value: object) -> bool:
    return value == "built-in" or (is_path(value) and str(value).lower().replace("_", "-") not in ("built-in", "builtin"))


PATH = "the path of a folder (~ and $ are not expanded)"


def check_fields(config: Any, section: str = "") -> None:
    """Raises UserError if a field, also of a section, has an invalid value. None is accepted if it is the default."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            check_fields(value, f"{f.name}.")
        elif not (value is None and f.default is None) and not is_valid(f, value):
            raise UserError(f"{section}{f.name} is {show(value)}; {requirement(f)}")


def is_valid(f: Field, value: Any) -> bool:
    if "words" in f.metadata:
        return value in f.metadata["words"]
    if "limits" in f.metadata and value is not None:
        least, most = f.metadata["limits"]
        return all(least <= number <= most for number in (value if isinstance(value, tuple) else (value,)))  # false for NaN
    return value is not None and f.metadata.get("is_valid", lambda value: True)(value)


def requirement(f: Field) -> str:
    """The values that a field accepts, for a message."""
    kind = str(f.type)
    if "words" in f.metadata:
        return f"choose one of {', '.join(f.metadata['words'])}"
    accepted = f.metadata.get("accepted", "true or false")
    if "limits" in f.metadata:
        noun = "a list of two numbers" if "tuple" in kind else "a whole number" if "int" in kind else "a number"
        accepted = f"{noun} from {show(f.metadata['limits'][0])} to {show(f.metadata['limits'][1])}"
    return f"it must be {accepted}" + (", or null" if f.default is None else f"; the default is {show(f.default)}")


def show(value: object) -> str:
    """A value as YAML has it."""
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(str(value), f"{value:g}")
    if isinstance(value, str | list | tuple):
        value = json.dumps(value, ensure_ascii=False)
    text = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
    return text if len(text) < 60 else f"{text[:40]}…"


def divisors(n: int) -> list[int]:
    """The divisors of n in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@dataclass(frozen=True)
class DataConfig:
    """The training and validation data.

    Args:
        source: "built-in" generates stories into out_dir/data; otherwise a folder that contains tokenizer/, train/ and validation/.
        stories: Number of built-in training stories.
        validation_stories: Number of built-in validation stories.
        vocab_size: Vocabulary size of the tokenizer trained on the built-in stories.
        document_mask: Whether attention is limited to one document when a sequence contains several.
        replay: For conversations: a folder of plain text like source, made with the same tokenizer, which is mixed in; null for none.
        replay_share: Share of the tokens that are replayed.
        emphasis: For conversations: weight of the emphasised tokens in the loss; the others weigh 1.
        cut_share: For conversations: share of those that are read only up to their last emphasised token.
    """

    source: str = checked("built-in", is_source, f'"built-in" or {PATH}')
    stories: int = between(12_000, 1, 1_000_000)
    validation_stories: int = between(500, 1, 100_000)
    vocab_size: int = between(2048, 262, 2**20)
    document_mask: bool = True
    replay: str | None = checked(None, is_path, PATH)
    replay_share: float = between(0.1, 0.0, 0.9)
    emphasis: float = between(1.0, 1.0, 1000.0)
    cut_share: float = between(0.0, 0.0, 1.0)

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

    preset: str = one_of("quickstart", *(name for name in PRESETS if name != "quickstart"))
    vocab_size: int | None = between(None, 1, 2**20)
    n_layer: int | None = between(None, 1, 1000)
    n_head: int | None = between(None, 1, 1024)
    n_kv_head: int | None = between(None, 1, 1024)
    head_dim: int | None = between(None, 2, 1024)
    width: int | None = between(None, 1, 65_536)
    mlp_width: int | None = between(None, 1, 2**20)
    context: int | None = between(None, 2, 2**20)  # a beginning and what follows
    rope_theta: float | None = between(None, 1.0, 1e12)
    norm_eps: float | None = between(None, 1e-12, 0.1)
    qk_norm: bool | None = None
    tie_embeddings: bool | None = None
    window: int | None = between(None, 1, 2**20)
    init_std: float | None = between(None, 1e-6, 1.0)

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
        parallel: How several processes share the work: ddp (each holds all weights) or fsdp (each holds a part of the weights, the
            gradients and the optimizer state).
        compile: Whether to use torch.compile.
        grad_clip: Maximum norm of the gradient.
        z_loss: Coefficient of lse² in the loss, which keeps the logits small; 0 for none.
        ema: Decay of the running mean of the weights that is saved beside them; null for none.
        max_bad_steps: After this many steps in a row whose loss or gradient is not finite, the run goes back to the last checkpoint and
            passes over their batches. Each of them is skipped in any case.
        spike: A loss that is above its running mean by more than this many times its spread is reported; 0 for none.
        validate_every: Steps between validations.
        sample_every: Steps between printed samples; 0 for none.
        checkpoint_every: Steps between checkpoints. The last step is always saved.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        keep_best: Whether to also keep the checkpoint with the best validation loss.
        profile: Steps to trace with torch.profiler, after the first three; 0 for none.
    """

    max_steps: int = between(1000, 1, 10**9)
    global_batch: int = between(32, 1, 2**20)
    micro_batch: int = between(32, 1, 2**20)
    context: int | None = between(None, 2, 2**20)
    precision: str = one_of("auto", "bf16", "fp16", "fp32")
    parallel: str = one_of("ddp", "fsdp")
    compile: bool = True
    grad_clip: float = between(1.0, 1e-6, float("inf"))
    z_loss: float = between(0.0, 0.0, 1.0)
    ema: float | None = between(None, 0.5, 0.999999)
    max_bad_steps: int = between(10, 1, 10**9)
    spike: float = between(6.0, 0.0, 1e6)
    validate_every: int = between(250, 1, 10**9)
    sample_every: int = between(250, 0, 10**9)
    checkpoint_every: int = between(250, 1, 10**9)
    keep_last: int = between(0, 0, 10**9)
    keep_best: bool = True
    profile: int = between(0, 0, 1000)

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

    matrices: str = one_of("muon", "adamw")
    lr: float = between(2e-3, 1e-10, 100.0)
    embedding_lr: float | None = between(None, 1e-10, 100.0)
    betas: tuple[float, float] = between((0.9, 0.95), 0.0, 0.99999)
    momentum: float = between(0.95, 0.0, 0.99999)
    weight_decay: float = between(0.1, 0.0, 10.0)
    schedule: str = one_of("cosine", "wsd")
    warmup_steps: int = between(50, 0, 10**9)
    decay_fraction: float = between(0.3, 0.0, 1.0)
    min_lr_ratio: float = between(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class DPOConfig:
    """Preference training, with objective dpo.

    Args:
        beta: How strongly the model is kept near the one that it starts with; a reward is beta · (log p − log p_ref).
        length_normalised: Whether the log-probability of an answer is divided by its number of tokens.
        sft_weight: Coefficient of the chosen answers' mean loss per token, which keeps their probability from falling.
    """

    beta: float = between(0.1, 1e-6, 1000.0)
    length_normalised: bool = False
    sft_weight: float = between(0.0, 0.0, 100.0)


@dataclass(frozen=True)
class LogConfig:
    """Metrics and printed samples.

    Args:
        every: Steps between lines of metrics.jsonl.
        wandb: online, offline or disabled.
        swanlab: online, offline, local or disabled.
        tensorboard: Whether to write event files for TensorBoard.
        project: Project name in wandb and SwanLab.
        prompts: Prompts of the printed samples; an empty prompt starts a new story.
        sample_tokens: Maximum number of tokens of a printed sample.
    """

    every: int = between(10, 1, 10**9)
    wandb: str = one_of("disabled", "online", "offline")
    swanlab: str = one_of("disabled", "online", "offline", "local")
    tensorboard: bool = False
    project: str = checked("tritale", lambda value: is_text(value) and bool(value.strip()), "a text")
    prompts: tuple[str, ...] = checked(
        ("", "", "汤姆和杰瑞是好朋友，"), lambda values: all(map(is_text, values)), 'a list of texts such as ["小兔", ""]'
    )
    sample_tokens: int = between(400, 1, 2**20)


@dataclass(frozen=True)
class RunConfig:
    """A complete run.

    Args:
        out_dir: Output folder.
        seed: Seed of the weights, the built-in stories and the order of the data.
        init_from: A checkpoint or run whose weights and shape the model starts with, in place of random weights and `model`.
        resume: auto resumes from the newest complete checkpoint in out_dir and requires the same config. force also accepts
            changes that the weights do not depend on, for example a longer run.
        objective: cross_entropy (the next token), or dpo (pairs of answers).
        data: The training and validation data.
        model: The model's shape.
        train: The training loop.
        optim: The optimizer.
        dpo: Preference training.
        log: Metrics and printed samples.
    """

    out_dir: str = checked("out/run", is_path, PATH)
    seed: int = between(42, 0, 2**63 - 1)
    init_from: str | None = checked(None, is_path, PATH)
    resume: str = one_of("auto", "force")
    objective: str = one_of("cross_entropy", "dpo")
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        check_fields(self)
        batch, micro_batch = self.train.global_batch, self.train.micro_batch
        if batch % micro_batch:
            nearest = min(divisors(batch), key=lambda n: abs(n - micro_batch))
            raise UserError(
                f"train.micro_batch ({micro_batch}) must divide train.global_batch ({batch}); try --train.micro_batch {nearest}"
            )
        if self.optim.warmup_steps >= self.train.max_steps:
            raise UserError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be less than train.max_steps ({self.train.max_steps}); "
                f"try {self.train.max_steps // 10}"
            )
        if self.init_from and self.model != ModelConfig():
            raise UserError(f"init_from takes the model's shape from {self.init_from}; leave out the keys of model")

        if self.objective == "dpo" and not self.init_from:
            raise UserError("objective dpo starts with a model that follows instructions; set init_from to its run")
        if self.objective != "dpo" and self.dpo != DPOConfig():
            raise UserError(f"the keys of dpo have no effect with objective {self.objective}; set objective dpo, or leave them out")
        if not self.data.replay and self.data.replay_share != DataConfig.replay_share:
            raise UserError("data.replay_share has no effect without data.replay; set that to a folder of plain text, or leave it out")
        if self.objective == "dpo" and self.data.replay:
            raise UserError("data.replay mixes text into conversations, not into pairs; leave it out, or set dpo.sft_weight")

    def shape(self, vocab_size: int | None) -> GPTConfig:
        """The model's shape for the data's vocabulary size (None: not known). Raises UserError if they do not fit, or if init_from is no
        checkpoint."""
        if not self.init_from:
            return self.model.build(vocab_size)
        folder = find_checkpoint(Path(self.init_from))
        shape = read_shape(folder)
        if vocab_size not in (None, shape.vocab_size):
            raise UserError(
                f"{folder} has a vocabulary of {shape.vocab_size}, the data one of {vocab_size}; make the data with "
                f"tritale prepare --tokenizer {folder}"
            )
        return shape

    @property
    def data_folder(self) -> Path:
        """The folder of tokenizer/, train/ and validation/."""
        return Path(self.out_dir) / "data" if self.data.source == "built-in" else Path(self.data.source)


def flatten(config: Any, prefix: str = "") -> dict[str, object]:
    """A config dataclass as {"train.max_steps": 1000, …}, as JSON has it: a tuple is a list."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        value = list(value) if isinstance(value, tuple) else value
        flat |= flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return flat


def differences(before: dict[str, object], config: RunConfig) -> list[str]:
    """The keys in which a saved flat config and this one differ, as "key: before → now", without keys that may change at any time."""
    after = flatten(config)
    events = ("train.validate_every", "train.sample_every", "train.checkpoint_every")
    changeable = ("micro_batch", "parallel", "compile", "keep_", "profile", "max_bad_", "spike")
    free = ("out_dir", "resume", "log.", *(f"train.{key}" for key in changeable))
    keys = [k for k in {**before, **after} if not k.startswith((*free, *events))]
    return [f"{k}: {before.get(k)} → {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


# Keys of other trainers, and options that people expect here.
SYNONYMS = {
    "learning_rate": "optim.lr", "max_lr": "optim.lr", "peak_lr": "optim.lr", "min_lr": "optim.min_lr_ratio", "beta1": "optim.betas",
    "beta2": "optim.betas", "warmup_iters": "optim.warmup_steps", "warmup": "optim.warmup_steps", "optimizer": "optim.matrices",
    "scheduler": "optim.schedule", "lr_scheduler_type": "optim.schedule", "wd": "optim.weight_decay", "batch_size": "train.global_batch",
    "per_device_train_batch_size": "train.micro_batch", "gradient_accumulation_steps": "train.global_batch", "iters": "train.max_steps",
    "max_iters": "train.max_steps", "epochs": "train.max_steps", "num_train_epochs": "train.max_steps", "steps": "train.max_steps",
    "block_size": "model.context", "seq_len": "model.context", "max_seq_length": "model.context", "sequence_length": "model.context",
    "dtype": "train.precision", "fp16": "train.precision", "bf16": "train.precision", "eval_interval": "train.validate_every",
    "eval_steps": "train.validate_every", "save_steps": "train.checkpoint_every", "save_interval": "train.checkpoint_every",
    "save_total_limit": "train.keep_last", "max_grad_norm": "train.grad_clip", "clip": "train.grad_clip", "log_interval": "log.every",
    "ema_decay": "train.ema", "logging_steps": "log.every", "prompt": "log.prompts", "n_embd": "model.width", "d_model": "model.width",
    "hidden_size": "model.width",
    "layers": "model.n_layer", "num_layers": "model.n_layer", "num_hidden_layers": "model.n_layer", "heads": "model.n_head",
    "num_attention_heads": "model.n_head", "num_key_value_heads": "model.n_kv_head", "intermediate_size": "model.mlp_width",
    "tie_word_embeddings": "model.tie_embeddings", "sliding_window": "model.window", "dataset": "data.source", "data_dir": "data.source",
    "profile": "train.profile", "tensorboard": "log.tensorboard", "swanlab": "log.swanlab", "output_dir": "out_dir", "out": "out_dir",
    "resume_from_checkpoint": "resume",
}  # fmt: skip
NO_KEYS = {
    "config": "a config file cannot name another; give --config twice",
    "device": "the GPU is used if there is one; CUDA_VISIBLE_DEVICES= uses the CPU",
    "dropout": "there is no dropout",
    **dict.fromkeys(("nproc", "nproc_per_node", "processes"), "tritale train --processes N starts several processes"),
    "wandb": "set log.wandb to online or offline",
    "<<": "YAML's merge keys are not supported; write the keys out",
}


SECTIONS = [f.name for f in fields(RunConfig) if f.default is MISSING]


def explain_unknown_key(key: str) -> str:
    """What to use in place of an unknown key: by meaning, else by spelling."""
    last = key.rsplit(".", 1)[-1].replace("-", "_")
    if last in NO_KEYS:
        return f"unknown config key {key!r}: {NO_KEYS[last]}"
    keys = [*flatten(RunConfig()), *SECTIONS, "config"]
    same_name = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    nearest = [SYNONYMS[last]] if last in SYNONYMS else same_name or difflib.get_close_matches(key, keys, n=1)
    return f"unknown config key {key!r}; " + (f"did you mean {nearest[0]!r}? " if nearest else "") + "python train.py --help lists all keys"


def explain_error(message: str) -> str:
    """One line for an error of jsonargparse."""
    message = message.removeprefix('Parser key "config": ')
    unknown = (
        r"[Gg]roup '(?P<group>\w+)' does not accept option '(?P<key>[\w.-]+)'",
        r"unrecognized arguments: --(?P<key>[\w.+-]+)",
    )
    for pattern in unknown:
        if found := re.search(pattern, message):
            groups = found.groupdict()
            return explain_unknown_key(f"{groups['group']}.{groups['key']}" if groups.get("group") else groups["key"])
    key, values = re.search(r'Parser key "([\w.]+)"', message), re.findall(r"(?:Got|Given) value: ?(.*)", message)
    if key and values:
        section, name = key[1].rpartition(".")[::2]
        config = getattr(RunConfig(), section) if section else RunConfig()
        text = {"None": "null", "True": "true", "False": "false", "": "empty"}.get(values[-1], values[-1][:60])
        return f"{key[1]} is {text}; {next(requirement(f) for f in fields(config) if f.name == name)}"
    if "must be a mapping" in message or (key and key[1] in SECTIONS):
        return f"{', '.join(SECTIONS)} are sections of keys: write --train.max_steps 800, or in YAML train: {{max_steps: 800}}"
    return " ".join(message.split())


def check_number(text: str) -> None:
    """Raises UserError for a number that means another one in YAML 1.1."""
    if re.fullmatch(r"[-+]?(0\d+|\d[\d_]*(:[0-5]?\d)+(\.\d*)?)", text):
        raise UserError(f"{text} is not a decimal number: in YAML, 10:30 is 630 and 0100 is 64; write it without : and leading zeros")


def read_config(path: str) -> str:
    """The YAML of a config file, in ASCII. Raises UserError if it is not a mapping of sections, has an unknown key, or sets a key twice
    (YAML keeps the last value)."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_CONFIG + 1)
        if len(text) > LONGEST_CONFIG:  # data, or a device without an end
            raise UserError(
                f"{path} is longer than {LONGEST_CONFIG:,} characters, so it is no config; give a YAML file such as {QUICKSTART}"
            )
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path!r}: {error.strerror}; give a YAML file such as configs/quickstart.yaml") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    known, seen, pending = flatten(RunConfig()).keys(), set(), [("", root)]
    while pending:
        prefix, node = pending.pop()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(
                f"{path} must hold {prefix.rstrip('.') or 'sections'} as a mapping of keys, for example train: {{max_steps: 800}}"
            )
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in seen:
                raise UserError(f"{path} sets {name} twice (the second time in line {line}); keep one")
            seen.add(name)
            if name in SECTIONS:
                pending.append((f"{name}.", value))
            elif isinstance(value, yaml.ScalarNode) and not value.style:  # no quotes
                check_number(value.value)
            if name not in {*known, *SECTIONS}:
                raise UserError(f"{path}, line {line}: {explain_unknown_key(name if isinstance(key, yaml.ScalarNode) else '[…]')}")
    return yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=False)


def with_texts(arguments: list[str]) -> list[str]:
    """The arguments with the YAML of each config file in place of its path: jsonargparse would read it in the encoding of the locale."""
    result = []
    for before, argument in pairwise(["", *arguments]):
        if before == "--config" and argument:
            result[-1] = f"--config={read_config(argument)}"
        elif argument.startswith("--config="):
            result.append(f"--config={read_config(argument[9:])}")
        else:
            result.append(argument)
    return result


DESCRIPTION = "Train a GPT from scratch. On several GPUs: tritale train --processes N …"


def parse(arguments: Sequence[str] | None = None, *, file: str | None = None, prog: str = "train.py") -> RunConfig:
    """The config of a command line. `file` is a YAML file, as after --config. Ends the process with a message for a bad key or value."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; configs/quickstart.yaml if not given")
    parser.add_class_arguments(RunConfig)
    if file or not any(argument.partition("=")[0] == "--config" for argument in arguments):
        arguments = [f"--config={file or QUICKSTART}", *arguments]
    try:
        arguments = with_texts(arguments)
        for argument in arguments:
            check_number(argument.partition("=")[2] if argument.startswith("--") else argument)
        try:
            parsed = parser.parse_args(arguments)
        except (ValueError, TypeError) as error:  # of a value that YAML cannot hold, for example
            raise UserError(str(error)) from None
        values = parser.instantiate(parsed)
        return RunConfig(**{f.name: values[f.name] for f in fields(RunConfig)})
    except (ArgumentError, UserError) as error:
        end_with(f"{prog}: {explain_error(str(error))}")
