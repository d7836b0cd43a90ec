"""Train a GPT from scratch: python train.py [--config FILE] [--section.key VALUE …], on several GPUs tritale train --processes N …

Read it from top to bottom: data, plan, model and optimizer, resume, the loop, the end. Without --config it runs configs/quickstart.yaml.
`python train.py --help` lists every key.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

from tritale.common.console import end_with, prepare_output, wrapped
from tritale.common.errors import UserError, sentence
from tritale.common.files import locked, sha256_of
from tritale.common.run_folder import find_checkpoint, step_folder, weights_of
from tritale.data.batches import Batches, PairBatches
from tritale.data.built_in import open_data, write_built_in
from tritale.data.chat import prompt_ids
from tritale.data.shards import with_replay
from tritale.data.tokenizer import Tokenizer
from tritale.evaluation.compatibility import compatibility_warnings
from tritale.evaluation.run_report import write_report
from tritale.evaluation.validation import validate
from tritale.inference import LLM
from tritale.model import GPT
from tritale.training import processes, record, state
from tritale.training.config import RunConfig, flatten, parse
from tritale.training.logs import Log
from tritale.training.plan import DataFacts, DeviceFacts, plan
from tritale.training.preference import reference_log_probs, validate_pairs
from tritale.training.profiling import profiled
from tritale.training.step import TrainingStep, explain_errors


def print_samples(model: GPT, tokenizer: Tokenizer, config: RunConfig, log: Log, step: int) -> None:
    llm = LLM(model, tokenizer)
    for i, prompt in enumerate(config.log.prompts):
        given = [{"role": "user", "content": prompt}] if tokenizer.is_chat and prompt else prompt
        text = llm.complete([given], max_new_tokens=config.log.sample_tokens, seed=config.seed + i)[0].text
        log.print(f"\n{prompt}{text}", style="green", soft_wrap=True)
        log.sample(step=step, prompt=prompt, text=text, seed=config.seed + i)
    log.print()


def main(config: RunConfig) -> None:
    here = processes.start()
    log = Log(config, is_main=here.is_main)
    try:
        lock = locked(Path(config.out_dir), "another training process") if here.is_main else contextlib.nullcontext()
        with processes.Stop() as stop, lock, explain_errors(config), log.recorded():
            run(config, here, log, stop)
    finally:
        if log.has_started:
            write_report(Path(config.out_dir), warn=log.print)
    processes.stop()


def run(config: RunConfig, here: processes.Processes, log: Log, stop: processes.Stop) -> None:
    start = time.perf_counter()
    train, out_dir = config.train, Path(config.out_dir)
    newest = state.newest_complete(out_dir, warn=log.print)
    if newest:
        state.check_config(newest, config)  # before anything is written
    if here.is_main:
        state.remove_leftovers(out_dir)

    # ---- data: the main process writes it, the others wait -------------------------------------------------------------------------
    if config.data.source == "built-in" and here.is_main:
        write_built_in(config.data_folder, seed=config.seed, **config.data.built_in, track=log.track)
    processes.barrier()
    tokenizer, train_split, validation_split = open_data(config.data_folder)
    seen = {"the last checkpoint": newest, "the tokens of the data": train_split.n_tokens, "the tokenizer": tokenizer.hash}
    processes.check_same(here.device, seen | flatten(config))
    if config.data.replay:
        train_split = with_replay(train_split, open_data(Path(config.data.replay))[1], config.data.replay_share)
    base = find_checkpoint(Path(config.init_from)) if config.init_from else None
    if base and Tokenizer.load(base).hash != tokenizer.hash:
        raise UserError(f"{config.data_folder} has another tokenizer than {base}; make it with --tokenizer {base}")

    # ---- the plan of the run --------------------------------------------------------------------------------------------------------
    device = DeviceFacts.of(here, config)
    planned = plan(config, DataFacts.of(train_split), device)
    log.table(planned.rows())
    for warning in (*planned.warnings, *compatibility_warnings(planned.shape)):
        if not warning.is_note:
            log.print(f"{warning.text}: {warning.remedy}", style="yellow")
    for prompt in config.log.prompts:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}]) if tokenizer.is_chat else tokenizer.encode(prompt, bos=True)
        if len(ids) >= planned.shape.context:
            raise UserError(
                f"log.prompts contains {prompt[:20]!r}…, longer than the model's context of {planned.shape.context} tokens; shorten it"
            )

    # ---- model, optimizers, batches -------------------------------------------------------------------------------------------------
    step = TrainingStep(planned, here)
    sizes = {"context": planned.sequence, "micro_batch": train.micro_batch}
    order = {"global_batch": train.global_batch, "seed": config.seed, "rank": here.rank, "world_size": here.world_size}
    shared = {"here": here, "autocast": step.autocast}
    if config.objective == "dpo" and base:
        name = sha256_of(weights_of(base))[:16]
        references = [reference_log_probs(step.whole_model(), s, name, **sizes, **shared) for s in (train_split, validation_split)]
        batches = PairBatches(train_split, references[0].cpu(), **sizes, **order)
        evaluate = functools.partial(validate_pairs, split=validation_split, reference=references[1], config=config.dpo, **sizes, **shared)
    else:
        mask = config.data.document_mask
        batches = Batches(train_split, **sizes, **order, document_mask=mask, emphasis=config.data.emphasis, cut_share=config.data.cut_share)
        evaluate = functools.partial(validate, split=validation_split, **sizes, document_mask=mask, **shared)

    # ---- resume: weights, optimizer and random state; the order of the data is a function of the step -------------------------------
    progress = state.Progress()
    if newest:
        progress = state.load(newest, step)
        log.print(f"resuming from {newest}")
    log.open(out_dir, progress.step, record.facts(planned, train_split, flatten(config)))
    saver = state.Saver(step, tokenizer, report=log.print, after=lambda: write_report(out_dir, warn=log.print))

    # ---- the loop -------------------------------------------------------------------------------------------------------------------
    seconds_before = progress.seconds
    done = logged_step = progress.step
    logged_at = time.perf_counter()
    paused = 0.0  # seconds of validation, samples and checkpoints since the last log line
    val_bits = math.nan
    peak_flops = device.flops  # per process; raised if training is faster than the measurement
    went_back_to: Path | None = None
    tracing = profiled(train.profile if here.is_main else 0, out_dir, progress.step, log.print)
    with contextlib.closing(saver), tracing as trace_step, log.progress(train.max_steps, done) as update, stop.deferred():
        while done < train.max_steps and not stop.is_due():
            number = progress.batch(done)
            step.run(batches.step(number), step.lr_factor(done), done, n_targets=batches.n_targets(number))
            done += 1
            trace_step()

            is_last = done == train.max_steps
            validates, saves = (done % every == 0 or is_last for every in (train.validate_every, train.checkpoint_every))
            if done % config.log.every == 0 or is_last or saves:
                preference = step.mean_preference()
                loss = step.mean_loss()
                seconds = time.perf_counter() - logged_at - paused
                speed = (done - logged_step) * planned.tokens_per_step / seconds
                flops = speed * planned.flops_per_token / here.world_size
                peak_flops = max(peak_flops, flops)
                log.metrics(
                    step=done,
                    tokens=done * planned.tokens_per_step,
                    **step.health.values(loss),
                    lr=config.optim.lr * step.lr_factor(done - 1),
                    **preference,
                    tokens_per_second=speed,
                    mfu=flops / peak_flops,
                    memory_gib=processes.peak_memory_gib(here.device),
                    data_share=step.data_seconds / seconds,
                    seconds=seconds_before + time.perf_counter() - start,
                )
                for text in step.health.take_reports():
                    log.print(text, style="yellow")
                update(done, loss=loss, speed=speed)
                logged_step, logged_at, paused, step.data_seconds = done, time.perf_counter(), 0.0, 0.0
            update(done)

            pause = time.perf_counter()
            if step.health.bad_in_row >= train.max_bad_steps:
                saver.close()
                processes.barrier()
                went_back_to = state.go_back(out_dir, step, progress, done, went_back_to, warn=log.print)
                done = logged_step = progress.step
                log.keep_until(done)
                continue
            saves = saves and (is_last or not step.health.bad_in_row)  # else the run may have to go back to before the bad steps
            if validates:
                step.release_memory()
            if validates or saves:
                step.check_finite(done)
            if validates:
                val_loss, val_bits = evaluate(step.whole_model())
                step.check_finite(done, **{"validation loss": val_loss})
                values = {"val_loss": val_loss, "val_bits_per_char": val_bits}
                if step.averages:
                    values |= dict(zip(("ema_val_loss", "ema_val_bits_per_char"), evaluate(step.whole_model(ema=True)), strict=True))
                log.metrics(step=done, **values, seconds=seconds_before + time.perf_counter() - start)
                log.print(f"step {done}: validation {val_bits:.3f} bits per character, loss {val_loss:.3f}")
                if saves and (progress.best_loss is None or val_loss < progress.best_loss):
                    progress.best_step, progress.best_loss = done, val_loss
            if train.sample_every and done % train.sample_every == 0 and not is_last:
                model = step.whole_model()
                if here.is_main:
                    log.print(f"step {done}: samples")
                    print_samples(model, tokenizer, config, log, done)
            if saves:
                progress.step, progress.seconds = done, seconds_before + time.perf_counter() - start
                saver.save(progress)
            paused += time.perf_counter() - pause

        is_stopped = done < train.max_steps  # by a signal
        if is_stopped and done != progress.step:
            step.check_finite(done)
            progress.step, progress.seconds = done, seconds_before + time.perf_counter() - start
            saver.save(progress)
        saver.finish()
        processes.barrier()
    if is_stopped:
        log.close()
        if here.is_main:
            text = f"train.py: stopped, {step_folder(out_dir, done)} is written; run the same command again to go on"
            print(wrapped(text), file=sys.stderr)
        processes.stop()
        sys.exit(stop.status)

    # ---- the end ----------------------------------------------------------------------------------------------------------------------
    model = step.whole_model()
    if math.isnan(val_bits):  # the run had already reached max_steps
        _, val_bits = evaluate(model)
    if here.is_main:
        entropy = (validation_split.entropy_bits or 0) / validation_split.characters  # of the built-in stories
        above = f" ({val_bits / entropy:.2f} × the {entropy:.3f} bits of entropy of the built-in stories)" if entropy else ""
        last = step_folder(out_dir, train.max_steps)
        minutes = (seconds_before + time.perf_counter() - start) / 60
        log.print(f"\n{train.max_steps} steps in {minutes:.1f} minutes. Validation: {val_bits:.3f} bits per character{above}.")
        log.print(f"Checkpoint: {last}\n\nSamples:")
        print_samples(model, tokenizer, config, log, train.max_steps)
        example = "--instruct --prompt 写一个小兔的故事。" if tokenizer.is_chat else "--prompt 小兔"
        log.print(f"Next: tritale generate --model {last} {example}", soft_wrap=True)  # a command is not broken
    log.close()


if __name__ == "__main__":
    prepare_output(is_lasting=True)
    try:
        main(parse())
    except (UserError, OSError, FloatingPointError) as error:
        end_with(f"train.py: {sentence(error)}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends a second one
        if os.environ.get("RANK", "0") == "0":
            print("\ntrain.py: stopped; run the same command again to resume from the last checkpoint", file=sys.stderr)
        sys.exit(130)
