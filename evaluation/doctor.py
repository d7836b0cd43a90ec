"""What is wrong with a run, and what to do: rules over the run's own data.

Each rule is a function of the RunFacts that returns a Diagnosis, or None if it finds nothing or lacks the data. A rule reports only what
its evidence shows. The thresholds stand at the top, each with its reason. tests/evaluation/test_doctor.py applies all rules to runs that
are broken on purpose, and to good ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from ..common.console import duration
from .measures import longest_loop, repeated_share
from .run_facts import RunFacts, is_finite

# The loss is judged by the means of this many parts of the curve after the warm-up, so that single batches do not decide.
PARTS = 12
MIN_LINES = 24  # with a loss, after the warm-up; a shorter curve says nothing
NOISE = 4  # standard errors of a difference between two parts that count as a change
RISE = 0.1  # × what the loss had fallen before; a smaller rise is usual after a spike
# At first a model learns how frequent each token is, which gives the entropy of single tokens as loss. Good runs stay there for some 50
# steps. A small model with a good rate is at 0.9 × the entropy after 100 thousand tokens, and at 0.7 × after 150 thousand.
LEARNED_NOTHING = 0.97  # × the entropy of single tokens
BARELY_LEARNED = 0.8  # × the entropy of single tokens
ENOUGH_STEPS = 2000  # or half of the run, and
ENOUGH_TOKENS = 100_000  # must be trained on before "does not fall" can be said
# AdamW and Muon move a weight by at most about the learning rate in a step. If all rates together are less than the initial weights, the
# weights stay what they were. If one step moves a weight by a multiple of its initial value, it overwrites what was learned.
INITIAL_STD = 0.02
HIGH_RATE = 5 * INITIAL_STD
GOOD_RATE = 2e-3  # the default of optim.lr
BAD_STEPS = 0.01  # of all steps; single ones are skipped without harm
ANNEALED = 0.5  # × the peak: the learning rate has not come down if it ends above (`tritale plan` uses the same)
ENDLESS = 7 * 86400  # seconds left of a schedule that is also planned for 4 × MAX_EPOCHS: nobody will wait for its end
EMBEDDING_SHARE = 0.5  # of the parameters (`tritale plan` uses the same)
MAX_EPOCHS = 16  # further repetitions of the data add almost nothing (arXiv 2305.16264; `tritale plan` uses the same)
OVERFIT = 0.02  # × the lowest validation loss; the noise of a validation is less
REPEATED = 0.2  # of the 4-grams, mean of the samples; human stories and good models are at 0.02 (docs/sweep.md)
LOOP = 0.3  # of a sample's characters that are one piece over and over
USED_MEMORY = 0.9  # of the memory that was free at the start
GROWTH = 1.25  # × the memory at a quarter of the run; a steady run needs what its first steps need
LOST = 0.25  # of the run's steps, made again after interruptions
JUMP = 0.1  # × the loss before a resume
SLOW_FROM = 1200  # seconds of the whole run; in a shorter one speed does not matter, and compiling takes about a minute
DATA_SHARE = 0.2  # of the time that is spent waiting for batches
SLOWER = 0.6  # × the speed of the run's first quarter

OUT_OF_MEMORY = ("out of memory", "outofmemory", "can't allocate memory", "cannot allocate memory", "memoryerror", "bad_alloc")
LR_FIND = "tritale lr-find suggests a rate"


@dataclass(frozen=True)
class Diagnosis:
    """Something that is wrong with a run."""

    name: str  # for programs
    text: str  # what is wrong
    evidence: str  # figures from the run
    remedy: str  # what to do, with the line of the config


def diagnose(facts: RunFacts) -> list[Diagnosis]:
    """What is wrong, the most serious first; [] if nothing is. What follows from another diagnosis is left out."""
    found = [d for rule in RULES if (d := rule(facts))]
    explained = {symptom for d in found for symptom in EXPLAINS.get(d.name, ())}
    return [d for d in found if d.name not in explained]


# ---- the run stopped -----------------------------------------------------------------------------------------------------------------


def not_finite(f: RunFacts) -> Diagnosis | None:
    """The loss, the gradient or a weight became NaN or infinite."""
    bad = f.counted("bad_steps")
    logged = [line for line in f.lines if not (is_finite(line["loss"]) and is_finite(line.get("grad_norm", 0.0)))]
    if f.end and f.end.startswith("FloatingPointError"):
        evidence = f.end.partition(": ")[2].partition(";")[0]
    elif logged:
        evidence = f"step {logged[0]['step']}: loss {logged[0]['loss']}, gradient norm {logged[0].get('grad_norm')}"
    elif bad > BAD_STEPS * f.step:
        evidence = f"{bad:,.0f} of {f.step:,} steps were skipped"
    else:
        return None
    _, norms = f.column("grad_norm")
    if len(norms):
        evidence += f"; the gradient norm was {median(norms):.3g} at the median and {norms[-1]:.3g} in the last line"
    remedy = f"{lower_rates(f, 1 / 3)}, and --resume force; if that does not help, raise optim.warmup_steps"
    if f.device.get("precision") == "fp16":
        remedy = f"train.precision: bf16 or fp32, since fp16 overflows at 65,504; or {remedy}"
    return Diagnosis("not_finite", "the loss or a gradient is not finite", evidence, remedy)


def out_of_memory(f: RunFacts) -> Diagnosis | None:
    """The process was ended for lack of memory, or needs more and more."""
    free, used, end = f.device.get("free_memory"), f.last("memory_gib"), " ".join((f.end or "").split())
    micro, fits = f.config.get("train.micro_batch") or 2, f.plan.get("largest_micro_batch") or math.inf
    remedy = (
        f"train.micro_batch: {max(1, min(fits, micro // 2))}; a step keeps its number of tokens" if micro > 1 else "lower train.context"
    )
    if any(word in end.lower() for word in OUT_OF_MEMORY):
        return Diagnosis("memory", "the memory ran out", end[:160], remedy)
    if f.state == "stopped" and not end and used and free and used * 2**30 > USED_MEMORY * free:
        evidence = f"the process was killed without a message; it used {used:.1f} GiB, and {free / 2**30:.1f} GiB were free at its start"
        return Diagnosis("memory", "the operating system probably ended the process for lack of memory", evidence, remedy)
    _, sizes = f.column("memory_gib")
    if len(sizes) >= MIN_LINES:
        quarter, half, last = sizes[len(sizes) // 4], sizes[len(sizes) // 2], sizes[-1]
        if last > GROWTH * quarter and last > half > quarter:
            evidence = f"{quarter:.2f} GiB at a quarter of the run, {half:.2f} at half, {last:.2f} now"
            evidence += f"; {free / 2**30:.1f} GiB were free at the start" if free else ""
            remedy = "stop the run and start it again, it resumes exactly; then report a bug, with metrics.jsonl"
            return Diagnosis("memory", "the memory grows during the run", evidence, remedy)
    return None


def silent(f: RunFacts) -> Diagnosis | None:
    """The process lives but logs nothing."""
    if not f.is_silent:
        return None
    evidence = f"the last line is {duration(f.silent_for)} old; a step takes {duration(f.seconds_per_step or 0)}"
    remedy = "stop the process, with kill -9 if needed, and run the same command: it resumes"
    return Diagnosis("silent", "the process lives but makes no steps", evidence, remedy)


# ---- resume --------------------------------------------------------------------------------------------------------------------------


def lost_work(f: RunFacts) -> Diagnosis | None:
    """A later start began at step 0, or the starts together repeat much of the work."""
    every = f.config.get("train.checkpoint_every")
    for n, start in enumerate(f.starts[1:], 2):
        logged = start.get("logged", 0)
        if start.get("step") == 0 and logged > LOST * f.step:
            evidence = f"start {n} began at step 0, though step {logged:,} had been reached: there was no checkpoint"
            remedy = f"train.checkpoint_every: {max(1, logged // 4)} (it is {every}), so that there is one before the run is stopped"
            return Diagnosis("resume", "a resume did not resume: the run began again", evidence, remedy)
    lost = sum(max(0, start.get("logged", 0) - start.get("step", 0)) for start in f.starts[1:])
    if len(f.starts) > 2 and lost > LOST * f.step:
        evidence = f"{lost:,} steps were made again after {len(f.starts) - 1} resumes; the run is at step {f.step:,}"
        remedy = f"train.checkpoint_every: {max(1, (every or 4) // 4)} (it is {every})"
        return Diagnosis("resume", "much work is lost between the last checkpoint and an interruption", evidence, remedy)
    return None


def loss_jumped(f: RunFacts) -> Diagnosis | None:
    """The loss is higher after a resume than before it."""
    steps, losses = f.column("loss")
    for start in f.starts[1:]:
        at = start.get("step", 0)
        before, after = losses[steps <= at][-10:], losses[steps > at][:10]
        if at == 0 or len(before) < 3 or len(after) < 3:
            continue
        rise, noise = median(after) - median(before), float(np.std(before)) / math.sqrt(len(before))
        if rise > max(JUMP * median(before), NOISE * noise):
            changed = ", ".join(map(str, start.get("changed") or ()))
            evidence = f"loss {median(before):.3f} before step {at:,}, {median(after):.3f} after it"
            evidence += f"; changed there: {changed}" if changed else "; the config is the same"
            cause = "restore what was changed" if changed else "check that the data is the one of the run"
            remedy = f"{cause}, move the step-… folders after step {at:,} away, and run the command again"
            return Diagnosis("resume", "the loss jumped at a resume", evidence, remedy)
    return None


# ---- the loss ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The training loss after the warm-up, in PARTS parts."""

    steps: np.ndarray  # (PARTS,), means
    means: np.ndarray  # (PARTS,)
    error: float  # standard error of a mean
    first: float  # loss of the run's first line

    @property
    def last(self) -> float:
        return float(self.means[-1])

    def change(self, a: int, b: int) -> float:
        """Part b minus part a, or 0 if the difference is within the noise."""
        difference = float(self.means[b] - self.means[a])
        return difference if abs(difference) > NOISE * math.sqrt(2) * self.error else 0.0


def curve(f: RunFacts) -> Curve | None:
    """The loss curve, or None if it is too short to judge."""
    steps, losses = f.column("loss")
    after = steps > f.config.get("optim.warmup_steps", 0)
    if after.sum() < MIN_LINES:
        return None
    first, steps, losses = float(losses[0]), steps[after], losses[after]
    parts = np.array_split(np.arange(len(steps)), PARTS)
    # The noise is the spread of successive differences, so that the trend within a part does not count. 0.6745: median to deviation.
    noise = float(np.median(np.abs(np.diff(losses)))) / 0.6745 / math.sqrt(2)
    means = np.array([losses[part].mean() for part in parts])
    return Curve(np.array([steps[part].mean() for part in parts]), means, noise / math.sqrt(len(parts[0])), first)


def is_late(f: RunFacts) -> bool:
    """Whether the run has made enough of its steps to say that its loss does not fall."""
    return f.step >= min(ENOUGH_STEPS, (f.max_steps or ENOUGH_STEPS) / 2)


def has_read_enough(f: RunFacts) -> bool:
    """Whether the run has read enough tokens for a model to learn more than their frequencies."""
    return is_late(f) and (f.last("tokens") or 0) >= ENOUGH_TOKENS


def rate_too_high(f: RunFacts) -> Diagnosis | None:
    """The loss rises from its lowest point, or stays near the entropy of single tokens at a rate that overwrites the weights."""
    c, entropy, (_, rates) = curve(f), f.data.get("token_entropy"), f.column("lr")
    if c is None or not len(rates):
        return None
    peak, low = float(rates.max()), int(np.argmin(c.means))
    rise, fallen = c.change(low, PARTS - 1), c.first - float(c.means[low])
    if rise > max(RISE * fallen, 0.05):
        evidence = f"it rose from {c.means[low]:.3f} near step {c.steps[low]:,.0f} to {c.last:.3f}; the peak rate is {peak:.2g}"
        return Diagnosis("rate_too_high", "the loss rises: the learning rate is too high", evidence, f"{lower_rates(f, 1 / 3)}; {LR_FIND}")
    if entropy and c.last > BARELY_LEARNED * entropy and peak >= HIGH_RATE and has_read_enough(f):
        evidence = (
            f"it is {c.last:.3f} at step {f.step:,}, and knowing only the frequency of each token gives {entropy:.3f}. A step moves a "
            f"weight by about the rate, {peak:.2g} at its peak; initial weights are about {INITIAL_STD}"
        )
        remedy = f"{lower_rates(f, 2 * GOOD_RATE / peak)}; {LR_FIND}"
        return Diagnosis("rate_too_high", "the loss does not fall: the learning rate is too high", evidence, remedy)
    return None


def rate_too_low(f: RunFacts) -> Diagnosis | None:
    """All learning rates of the run together are too small to change the weights, and the loss shows it."""
    c, entropy, (steps, rates) = curve(f), f.data.get("token_entropy"), f.column("lr")
    if c is None or not len(rates) or not is_late(f):
        return None
    moved, peak = float(np.sum(rates * np.diff(steps, prepend=0))), float(rates.max())
    if moved >= INITIAL_STD or c.last < (BARELY_LEARNED * entropy if entropy else 0.6 * c.first):
        return None
    evidence = (
        f"it went from {c.first:.3f} to {c.last:.3f} in {f.step:,} steps. The rates of these steps add up to {moved:.2g}; "
        f"initial weights are about {INITIAL_STD}, so they have hardly moved"
    )
    embedding = f.config.get("optim.embedding_lr")
    if peak >= GOOD_RATE / 4:
        remedy = f"train.max_steps: {10 * f.step}, since {f.step:,} steps are few; {LR_FIND}"
    else:
        rate = min(GOOD_RATE, peak * 10 ** math.ceil(math.log10(10 * INITIAL_STD / moved)))
        remedy = (
            f"optim.lr: {rate:.2g}" + (f" and optim.embedding_lr: {rate:.2g}" if embedding and embedding < rate else "") + f"; {LR_FIND}"
        )
    return Diagnosis("rate_too_low", "the loss hardly falls: the learning rate is too low", evidence, remedy)


def only_frequencies(f: RunFacts) -> Diagnosis | None:
    """The loss has stopped at the entropy of single tokens: nothing is learned from the context."""
    c, entropy = curve(f), f.data.get("token_entropy")
    if c is None or not entropy or not has_read_enough(f) or c.last < LEARNED_NOTHING * entropy:
        return None
    if c.change(PARTS // 2, PARTS - 1) < -0.02 * entropy:
        return None  # it still falls
    evidence = f"it has been at {c.last:.3f} since half of the run; knowing only the frequency of each token gives {entropy:.3f}"
    source = f.config.get("data.source")
    remedy = (
        f"look at the text of data.source ({source}): in shuffled or random text there is nothing else to learn. If it is right, {LR_FIND}"
    )
    if f.step < ENOUGH_STEPS:
        remedy += f", and {f.step:,} steps are few: train.max_steps: {ENOUGH_STEPS}"
    text = "the loss stopped at the entropy of single tokens: nothing is learned from the context"
    return Diagnosis("only_frequencies", text, evidence, remedy)


def never_annealed(f: RunFacts) -> Diagnosis | None:
    """The learning rate is near its peak at the end of the run, or the end of its schedule will never be reached."""
    _, rates = f.column("lr")
    if not len(rates) or f.step <= f.config.get("optim.warmup_steps", 0):
        return None
    ratio = float(rates[-math.ceil(len(rates) / 10) :].mean() / rates.max())  # of the last tenth, as in `tritale plan`
    if ratio <= ANNEALED:
        return None
    if f.state == "finished":
        fraction, is_wsd = f.config.get("optim.decay_fraction"), f.config.get("optim.schedule") == "wsd"
        remedy = f"optim.decay_fraction: 0.3 (it is {fraction})" if is_wsd else "optim.schedule: cosine"
        if f.config.get("optim.min_lr_ratio", 0.0) > ANNEALED:
            remedy = "optim.min_lr_ratio: 0.0"
        remedy += f", train.max_steps: {round(1.3 * f.step)} and --resume force"
        return Diagnosis(
            "schedule", "the learning rate never came down", f"the last tenth of the run has {ratio:.1%} of the peak rate", remedy
        )
    per_epoch, left = f.plan.get("steps_per_epoch"), f.seconds_left
    if not (per_epoch and f.max_steps and left) or f.max_steps < 4 * MAX_EPOCHS * per_epoch or left < ENDLESS:
        return None  # it may still come down
    evidence = (
        f"at step {f.step:,} of {f.max_steps:,} the rate is {ratio:.1%} of its peak; {f.max_steps / per_epoch:,.0f} epochs are planned, "
    )
    evidence += f"and {duration(left)} are left"
    remedy = f"optim.schedule: wsd, train.max_steps: {round(1.3 * f.step)} and --resume force: the rate then falls to 0 in the last steps"
    return Diagnosis("schedule", "the learning rate will not come down: the schedule is far too long", evidence, remedy)


# ---- data, model and samples ---------------------------------------------------------------------------------------------------------


def overfitting(f: RunFacts) -> Diagnosis | None:
    """The validation loss rises while the training loss is lower."""
    values = [v["val_loss"] for v in f.validations if is_finite(v["val_loss"])]
    if len(values) < 3 or not f.lines:
        return None
    low, loss = int(np.argmin(values)), f.lines[-1]["loss"]
    if values[-1] <= (1 + OVERFIT) * values[low] or low > len(values) - 3 or loss >= values[low]:
        return None
    at, per_epoch = int(f.validations[low]["step"]), f.plan.get("steps_per_epoch")
    evidence = f"the validation loss was {values[low]:.3f} at step {at:,} and is {values[-1]:.3f}; the training loss is {loss:.3f}"
    evidence += f"; {f.step / per_epoch:,.1f} epochs" if per_epoch else ""
    remedy = f"train.max_steps: {at}, so that the schedule ends there, or more data; train.keep_best keeps the best checkpoint"
    return Diagnosis("overfitting", "the model memorises the training text", evidence, remedy)


def many_epochs(f: RunFacts) -> Diagnosis | None:
    """The data was read too often."""
    per_epoch = f.plan.get("steps_per_epoch")
    if not per_epoch or f.step <= MAX_EPOCHS * per_epoch:
        return None
    evidence = f"{f.step:,} steps are {f.step / per_epoch:,.0f} epochs; after about {MAX_EPOCHS}, repeated data adds almost nothing"
    return Diagnosis("epochs", "the data was read too often", evidence, f"train.max_steps: {MAX_EPOCHS * per_epoch} or less, or more data")


def large_vocabulary(f: RunFacts) -> Diagnosis | None:
    """Most parameters are in the embedding."""
    parameters, embedding, entries = f.plan.get("parameters"), f.plan.get("embedding"), f.data.get("vocab_size")
    if not parameters or not embedding or not entries or embedding <= EMBEDDING_SHARE * parameters:
        return None
    share = f"{embedding:,} of {parameters:,} parameters ({embedding / parameters:.0%})"
    evidence = f"{share} are in the embedding of {entries:,} entries, of which a token uses one row"
    smaller = 6400 if entries > 12_800 else max(300, entries // 2)
    remedy = f"data.vocab_size: {smaller}" if f.config.get("data.source") == "built-in" else f"tritale prepare … --vocab-size {smaller}"
    return Diagnosis("vocabulary", "the vocabulary takes most of the parameters", evidence, f"{remedy}, or a higher model.n_layer")


def repetition(f: RunFacts) -> Diagnosis | None:
    """The newest samples repeat themselves."""
    texts = [text for s in f.newest_samples() if len(text := s["text"][:2000]) >= 40]
    if not texts or (f.max_steps and f.samples[-1]["step"] < f.max_steps / 2):  # early in a run every model repeats itself
        return None
    share = fmean(repeated_share(text) for text in texts)
    loop = median(loop.length / len(text) if (loop := longest_loop(text)) else 0.0 for text in texts)
    if share <= REPEATED and loop <= LOOP:
        return None
    evidence = (
        f"{share:.0%} of the 4-grams in the {len(texts)} samples of step {f.samples[-1]['step']:,} occur earlier in their sample (2% in "
        f"human stories), and the longest loop takes {loop:.0%} of a sample"
    )
    remedy = "look for repeated documents in the data (tritale prepare --dedup near); if the loss still falls, raise train.max_steps; "
    remedy += "to generate with it: --repetition-penalty 1.1"
    return Diagnosis("repetition", "the samples repeat themselves", evidence, remedy)


# ---- speed ---------------------------------------------------------------------------------------------------------------------------


def slow_precision(f: RunFacts) -> Diagnosis | None:
    """bf16 on a device that has no bf16 instructions."""
    if f.device.get("precision") != "bf16" or f.device.get("has_bf16") is not False:
        return None
    evidence = f"{f.device.get('name')} has no bf16 instructions and emulates them"
    return Diagnosis("slow_precision", "slow: the precision is emulated", evidence, "train.precision: auto")


def slow_compile(f: RunFacts) -> Diagnosis | None:
    """torch.compile is off in a long run."""
    missing, is_off = f.device.get("compiler_missing"), f.config.get("train.compile") is False
    if not (missing or is_off) or f.planned_seconds < SLOW_FROM:
        return None
    evidence = f"the run takes {duration(f.planned_seconds)}; compiling takes about a minute and saves a part of every step"
    if is_off:
        return Diagnosis("slow_compile", "slow: torch.compile is off", evidence, "train.compile: true")
    text = "slow: torch.compile is off for lack of a C++ compiler"
    return Diagnosis("slow_compile", text, f"{missing}; {evidence}", "on Debian: apt install g++")


def slow_threads(f: RunFacts) -> Diagnosis | None:
    """One thread on a CPU with several cores."""
    threads, cores, n = f.device.get("threads"), f.device.get("cores"), f.device.get("processes", 1)
    if f.device.get("kind") != "cpu" or threads != 1 or not cores or cores < 2 * n or f.planned_seconds < SLOW_FROM:
        return None
    evidence = f"{n} process{'es' if n > 1 else ''} with one thread each on {cores} cores" if n > 1 else f"one thread on {cores} cores"
    remedy = f"OMP_NUM_THREADS={cores // n} in the environment" + (" (torchrun sets it to 1)" if n > 1 else ", or unset it")
    return Diagnosis("slow_threads", "slow: PyTorch uses one thread", evidence, remedy)


def slow_data(f: RunFacts) -> Diagnosis | None:
    """The step waits for its batches."""
    _, shares = f.column("data_share")
    if len(shares) < 5 or f.planned_seconds < SLOW_FROM or (share := float(np.median(shares))) <= DATA_SHARE:
        return None
    remedy = f"copy data.source ({f.config.get('data.source')}) to a local disk, and free memory for the file cache"
    return Diagnosis(
        "slow_data", "slow: the data does not come fast enough", f"{share:.0%} of the time is spent waiting for batches", remedy
    )


def slowing_down(f: RunFacts) -> Diagnosis | None:
    """The speed falls during the run."""
    _, speeds = f.column("tokens_per_second")
    if len(speeds) < 2 * MIN_LINES or f.planned_seconds < SLOW_FROM:
        return None
    quarter = len(speeds) // 4
    early, late = float(np.median(speeds[1:quarter])), float(np.median(speeds[-quarter:]))
    if late >= SLOWER * early:
        return None
    evidence = f"{early:,.0f} tokens/s in the first quarter of the run, {late:,.0f} in the last"
    remedy = "look for other processes (top, nvidia-smi), heat (nvidia-smi -q -d PERFORMANCE) and swapping (free -h)"
    return Diagnosis("slowing_down", "slow: the run slows down", evidence, remedy)


def lower_rates(f: RunFacts, factor: float) -> str:
    """The config lines that multiply the learning rates by `factor`."""
    rates = {key: rate for key in ("optim.lr", "optim.embedding_lr") if (rate := f.config.get(key))}
    return " and ".join(f"{key}: {rate * factor:.2g}" for key, rate in rates.items()) or "lower optim.lr"


RULES: tuple[Callable[[RunFacts], Diagnosis | None], ...] = (
    not_finite, out_of_memory, silent, lost_work, loss_jumped, rate_too_high, rate_too_low, only_frequencies, overfitting, many_epochs,
    never_annealed, repetition, large_vocabulary, slow_precision, slow_compile, slow_threads, slow_data, slowing_down,
)  # fmt: skip

# Names of diagnoses, and of those that follow from them and are therefore left out.
EXPLAINS = {
    "not_finite": ("rate_too_high", "only_frequencies"),
    "rate_too_high": ("only_frequencies", "repetition", "overfitting"),
    "rate_too_low": ("only_frequencies", "repetition", "schedule"),
    "only_frequencies": ("repetition",),
    "overfitting": ("epochs",),
}
