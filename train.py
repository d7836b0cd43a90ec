"""Train a GPT from scratch: torchrun train.py [--config FILE] [--section.key VALUE …]

Read it from top to bottom: processes and data, model, optimizer, resume, the loop, the end. Without arguments it runs
configs/quickstart.yaml. `python train.py --help` lists every key.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tritale.common.errors import UserError
from tritale.data.batches import Batches
from tritale.data.built_in import open_data, write_built_in
from tritale.evaluation.validation import validate
from tritale.inference import LLM
from tritale.model import GPT
from tritale.model.run_folder import step_folder
from tritale.training import processes, state
from tritale.training.config import RunConfig, parse
from tritale.training.logs import Log
from tritale.training.optimizer import build_optimizers, lr_factor
from tritale.training.plan import DataFacts, DeviceFacts, plan


def write_samples(model: GPT, tokenizer, config: RunConfig, log: Log, *, seed: int) -> None:
    llm = LLM(model, tokenizer)
    for i, prompt in enumerate(config.log.prompts):
        text = llm.generate(prompt, max_new_tokens=config.log.sample_tokens, seed=seed + i)
        log.print(f"\n{prompt}{text}", style="green")
    log.print()


def main(config: RunConfig) -> None:
    began = time.perf_counter()
    here = processes.start()
    log = Log(config, is_main=here.is_main)
    train, out_dir = config.train, Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    newest = state.newest_whole(out_dir, warn=log.print)
    if newest:
        state.check_config(newest, config)  # before anything is written
    if here.is_main:
        state.remove_leftovers(out_dir)

    # ---- data: the main process makes it, the others wait -------------------------------------------------------------------------
    if config.data.source == "built-in" and here.is_main:
        write_built_in(config.data_folder, seed=config.seed, **config.data.built_in, track=log.track)
    processes.total(torch.zeros(1, device=here.device))  # a barrier
    tokenizer, train_split, validation_split = open_data(config.data_folder)

    # ---- what this run will do ----------------------------------------------------------------------------------------------------
    device = DeviceFacts.of(here, config)
    planned = plan(config, DataFacts.of(train_split), device)
    log.table(planned.rows())
    for warning in planned.warnings:
        log.print(f"{warning.text}: {warning.remedy}", style="yellow")
    floor = validation_split.entropy_bits and validation_split.entropy_bits / validation_split.characters

    # ---- model --------------------------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    shape = planned.shape
    for prompt in config.log.prompts:
        if len(tokenizer.encode(prompt, bos=True)) >= shape.context:
            raise UserError(f"log.prompts has one longer than the model's context of {shape.context} tokens: {prompt[:20]!r}…; shorten it")
    model = GPT(shape).to(here.device)
    batches = Batches(
        train_split,
        context=planned.sequence,
        micro_batch=train.micro_batch,
        global_batch=train.global_batch,
        seed=config.seed,
        document_mask=config.data.document_mask,
        rank=here.rank,
        world_size=here.world_size,
    )
    eval_sizes = dict(context=planned.sequence, micro_batch=train.micro_batch, document_mask=config.data.document_mask)

    # ---- optimizer, precision -----------------------------------------------------------------------------------------------------
    optimizers = build_optimizers(model, config.optim, bf16=device.precision == "bf16")
    scaler = torch.amp.GradScaler(here.device.type, enabled=device.precision == "fp16")
    autocast = processes.autocast(here.device, device.precision)
    # The loss of a micro-batch is its sum over the tokens of the step; DistributedDataParallel takes the mean over the processes.
    normalizer = torch.tensor(batches.tokens_per_step / here.world_size, device=here.device)

    # ---- resume: weights, optimizer and random state; the data needs none -----------------------------------------------------------
    progress = {"step": 0, "best_step": None, "best_loss": None, "seconds": 0.0}
    if newest:
        progress |= state.load(newest, model, optimizers, scaler)
        log.print(f"going on from {newest}")
    log.open(out_dir, progress["step"])

    # ---- compile ------------------------------------------------------------------------------------------------------------------
    run: torch.nn.Module = model
    if train.compile and not device.compiler_missing:
        run = torch.compile(model, dynamic=False)
    if here.world_size > 1:
        run = DistributedDataParallel(run, device_ids=[here.device] if here.device.type == "cuda" else None, broadcast_buffers=False)

    # ---- the loop -----------------------------------------------------------------------------------------------------------------
    before = progress["seconds"]
    logged_step, logged_at = progress["step"], time.perf_counter()
    paused = 0.0  # seconds since the last log line that were not training
    loss_sum = torch.zeros((), device=here.device)
    val_bits = math.nan
    with log.progress() as bar:
        task = bar.add_task("", total=train.max_steps, completed=progress["step"], loss=math.nan, speed=0.0)
        for step in range(progress["step"], train.max_steps):
            factor = lr_factor(step, train.max_steps, config.optim)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = factor * group["peak_lr"]

            for i, batch in enumerate(batches.step(step)):
                tokens, targets, cu_seqlens = batch.on(here.device)
                is_last = i == batches.micro_batches_per_step - 1
                with contextlib.nullcontext() if is_last or here.world_size == 1 else run.no_sync(), autocast():
                    loss = run(tokens, targets, cu_seqlens=cu_seqlens, normalizer=normalizer, z_loss=train.z_loss)
                    scaler.scale(loss).backward()
                loss_sum += loss.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=False)  # the next backward adds into the same memory
            scaler.update()

            done = step + 1
            is_end = done == train.max_steps
            if done % config.log.every == 0 or is_end or done % train.checkpoint_every == 0:
                seconds = time.perf_counter() - logged_at - paused
                mean_loss = processes.total(loss_sum).item() / here.world_size / (done - logged_step)
                if not math.isfinite(mean_loss) or (not math.isfinite(grad_norm.item()) and not scaler.is_enabled()):
                    raise FloatingPointError(
                        f"loss {mean_loss}, gradient norm {grad_norm.item()} at step {done}; nothing was saved since the last "
                        "checkpoint. Lower optim.lr, or set train.z_loss 1e-4, and run the same command again to go on from there"
                    )
                speed = (done - logged_step) * batches.tokens_per_step / seconds
                log.metrics(
                    step=done,
                    tokens=done * batches.tokens_per_step,
                    loss=mean_loss,
                    lr=config.optim.lr * factor,
                    grad_norm=grad_norm.item(),
                    tokens_per_second=speed,
                    mfu=speed * planned.flops_per_token / device.flops / here.world_size,
                    memory_gib=processes.peak_memory_gib(here.device),
                    seconds=before + time.perf_counter() - began,
                )
                bar.update(task, loss=mean_loss, speed=speed)
                logged_step, logged_at, paused = done, time.perf_counter(), 0.0
                loss_sum.zero_()
            bar.update(task, completed=done)

            pause = time.perf_counter()
            if done % train.validate_every == 0 or is_end:
                val_loss, val_bits = validate(model, validation_split, **eval_sizes, here=here, autocast=autocast)
                log.metrics(step=done, val_loss=val_loss, val_bits_per_char=val_bits, seconds=before + time.perf_counter() - began)
                log.print(f"step {done}: validation {val_bits:.3f} bits per character, loss {val_loss:.3f}")
            if here.is_main and train.sample_every and done % train.sample_every == 0 and not is_end:
                write_samples(model, tokenizer, config, log, seed=config.seed)
            if done % train.checkpoint_every == 0 or is_end:
                if done % train.validate_every == 0 or is_end:
                    if progress["best_loss"] is None or val_loss < progress["best_loss"]:
                        progress |= {"best_step": done, "best_loss": val_loss}
                progress |= {"step": done, "seconds": before + time.perf_counter() - began}
                if here.is_main:
                    state.save(out_dir, config, done, model, optimizers, scaler, tokenizer, progress)
                    state.remove_old(out_dir, keep_last=train.keep_last, best_step=progress["best_step"] if train.keep_best else None)
            paused += time.perf_counter() - pause

    # ---- the end --------------------------------------------------------------------------------------------------------------------
    if math.isnan(val_bits):  # the run was complete before
        _, val_bits = validate(model, validation_split, **eval_sizes, here=here, autocast=autocast)
    log.close()
    if here.is_main:
        above = f", {val_bits / floor - 1:.0%} above the {floor:.3f} that chance alone puts into the stories" if floor else ""
        last = step_folder(out_dir, train.max_steps)
        minutes = (before + time.perf_counter() - began) / 60
        log.print(f"\n{train.max_steps} steps in {minutes:.1f} minutes. Validation: {val_bits:.3f} bits per character{above}.")
        log.print(f"Checkpoint: {last}\n\nThree stories:")
        write_samples(model, tokenizer, config, log, seed=config.seed)
        log.print(f"Next: tritale generate --model {last} --prompt 小兔")
    processes.stop()


if __name__ == "__main__":
    try:
        main(parse())
    except (UserError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: stopped; run the same command again to go on from the last checkpoint")
