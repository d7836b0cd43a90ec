"""tritale pairs: a model's own stories, ranked by what their instructions require, as training data."""

import argparse
from pathlib import Path

from . import options

HELP = "let a model answer instructions several times: the best answers, and pairs of a better and a worse one, as training data"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "model", options.CHECKPOINT)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="data folder of plain stories, such as out/quickstart/data")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for best.jsonl and pairs.jsonl")
    p.add_argument("--instructions", type=Path, metavar="FILE", help="train.jsonl of tritale instruct (default: made from the data)")
    p.add_argument("--asked", type=int, default=1000, metavar="N", help="instructions to make, from training stories")
    p.add_argument("--samples", type=int, default=4, metavar="N", help="stories per instruction")
    options.add_sampling(p)
    p.add_argument("--seed", type=int, default=1, help="of the instructions, other than that of tritale instruct, and of the stories")
    options.add_device(p)


def run(args: argparse.Namespace) -> None:
    import json
    import time
    from dataclasses import replace

    import torch
    from rich.console import Console

    from ..common.console import progress_bar
    from ..common.errors import UserError
    from ..common.files import atomic_file
    from ..data.built_in import open_data
    from ..data.chat import encode_chats
    from ..evaluation.story_measures import StoryMeasures, decode
    from ..inference import LLM
    from ..instructions.pairs import Answer, best_and_worst, rank
    from ..instructions.samples import Sample, make_samples, open_stories, read_samples, write_samples

    if args.asked < 1 or args.samples < 2:
        raise UserError(f"--asked is {args.asked} and must be at least 1; --samples is {args.samples} and must be at least 2")
    sampling = options.sampling(args)
    args.out.mkdir(parents=True, exist_ok=True)  # before minutes of work
    llm = LLM.load(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    with progress_bar(console) as bar:
        tokenizer, _, validation = open_data(args.data)
        if args.instructions:
            samples = read_samples(args.instructions)
        else:
            stories, _ = open_stories(args.data, track=lambda items, description: bar.track(items, description=description))
            fits = {"tokenizer": tokenizer, "context": llm.model.config.context}
            samples = list(make_samples(stories, args.asked, seed=args.seed, **fits))
        if not any(sample.requirements for sample in samples):
            raise UserError(f"no instruction of {args.instructions} has requirements; make some with tritale instruct")
        held_out = [decode(validation, i, tokenizer) for i in range(validation.n_documents)]
        measures = StoryMeasures([], held_out, checks_cast=all(sample.is_built_in for sample in samples))
        asked = [sample.prompt for sample in samples for _ in range(args.samples)]
        answers = [Answer("", False)] * len(asked)
        task, began = bar.add_task("stories", total=len(asked)), time.perf_counter()
        for i, _, done in llm.write(asked, [replace(sampling, seed=args.seed + i) for i in range(len(asked))]):
            if done:
                is_sound = measures.story("", done.text, is_complete=done.finish_reason == "end")["is_coherent"]
                answers[i] = Answer(done.text, is_sound)
                bar.advance(task)
        seconds = time.perf_counter() - began
    best: list[Sample] = []
    pairs: list[dict] = []
    n_met = 0
    # An answer may fill the context up to its last token, and a conversation has one more behind it.
    fits = lambda messages: len(encode_chats(tokenizer, [messages])[0][0]) <= llm.model.config.context
    for n, sample in enumerate(samples):
        own = answers[n * args.samples : (n + 1) * args.samples]
        n_met += sum(rank(sample, answer) == (True, 1, 1) for answer in own)
        chosen, rejected = best_and_worst(sample, own)
        answered = lambda answer, prompt=sample.prompt: (*prompt, {"role": "assistant", "content": answer})
        if chosen is not None and fits(answered(chosen)):
            best.append(replace(sample, messages=answered(chosen)))
            if rejected and rejected.strip() and fits(answered(rejected)):
                pairs.append({"prompt": list(sample.prompt), "chosen": chosen, "rejected": rejected})
    console.print(
        f"{len(asked):,} stories in {seconds:.0f} s, {60 * len(asked) / seconds:,.0f} a minute. Coherent and all requirements met: "
        f"{n_met / len(asked):.0%} of the stories, the best of {args.samples} for {len(best) / len(samples):.0%} of the instructions."
    )
    if not best:
        raise UserError("no story does what it was asked for, so nothing is written; train the model on tritale instruct's data first")
    write_samples(args.out / "best.jsonl", best)
    with atomic_file(args.out / "pairs.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    console.print(f"{args.out / 'best.jsonl'}  {len(best):,} conversations\n{args.out / 'pairs.jsonl'}  {len(pairs):,} pairs")
