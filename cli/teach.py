"""tritale teach: a pre-trained run learns to follow instructions. Each stage is another command, into a folder of its own."""

import argparse
import shlex
import time
from pathlib import Path

from ..common.errors import UserError
from . import options

HELP = "teach a run to follow instructions: data, training in copying, training on instructions, evaluation"
TAKES_CONFIG = True
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # in the repository and in the wheel
FORMAT = "tritale-teaching"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "base", options.CHECKPOINT + "; keys of the config, such as --optim.lr 0.01, are those of both trainings")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for all stages and teach.html (default: that of the run with -taught)")
    p.add_argument("--data", type=Path, metavar="DIR", help="data folder of plain stories (default: that of the run)")
    p.add_argument("--conversations", type=int, default=24_000, metavar="N", help="conversations of the second training")
    p.add_argument("--summaries", type=int, default=24_000, metavar="N", help="more of them, which ask for a summary, if stories have one")
    p.add_argument("--copies", type=int, default=6_000, metavar="N", help="exercises of the first training, and as many conversations")
    p.add_argument("--steps", type=int, nargs=2, default=(400, 1700), metavar="N", help="steps of both trainings")
    p.add_argument("--held-out", type=int, default=500, metavar="N", help="instructions of the evaluation")


def run(args: argparse.Namespace) -> None:
    import json

    from rich.console import Console

    from ..common.files import atomic_file, read_json_object, write_json
    from ..common.run_folder import find_checkpoint, is_checkpoint, step_folder
    from ..evaluation.instructions import context_of, data_of
    from ..evaluation.instructions_page import page
    from ..instructions.copies import COPIES
    from .main import main

    if any(option.startswith("--lora.") for option in args.overrides):
        raise UserError("both trainings change all weights; for adapters give lora.rank to one of them: tritale train (docs/teach.md)")
    base = find_checkpoint(args.base)
    context = ["--context", context_of(base)]
    data = args.data or data_of([base])
    folder = args.base.parent if is_checkpoint(args.base) else args.base
    out = args.out or folder.parent / f"{folder.resolve().name}-taught"
    held_out = out / "samples" / "held_out.jsonl"
    copying, sft = (step_folder(out / name, n) for name, n in zip(("copying", "sft"), args.steps, strict=True))

    def prepare(source: Path, name: str) -> list:
        return ["prepare", "--task", "sft", "--input", source, "--tokenizer", base, *context, "--out", out / name]

    def train(config: str, start: Path, name: str, steps: int, source: str) -> list:
        what = ["--init_from", start, "--data.source", out / source, "--data.replay", data, "--out_dir", out / name]
        return ["train", "--config", CONFIGS / config, *what, "--train.max_steps", steps, *args.overrides]

    sizes = ["--samples", args.conversations, "--summaries", args.summaries, "--copies", args.copies, "--held-out", args.held_out]
    stages: dict[str, tuple[list, Path]] = {  # name → command, what it has written last
        "samples": (["instruct", data, "--out", out / "samples", *context, *sizes], out / "samples" / COPIES),
        "copies": (prepare(out / "samples" / COPIES, "copies"), out / "copies" / "report.json"),
        "copying": (train("copying.yaml", base, "copying", args.steps[0], "copies"), copying),
        "instructions": (prepare(out / "samples" / "train.jsonl", "instructions"), out / "instructions" / "report.json"),
        "sft": (train("sft.yaml", copying, "sft", args.steps[1], "instructions"), sft),
        "evaluation": (
            ["evaluate", base, sft, "--instructions", held_out, "--data", data, "--out", out / "evaluation", "--overwrite"],
            out / "evaluation" / "evaluate.json",
        ),
    }
    commands = {name: [str(part) for part in command] for name, (command, _) in stages.items()}
    record: dict = {"format": FORMAT, "commands": commands, "seconds": {}}
    path = out / "teach.json"
    if path.is_file():
        record = read_json_object(path, remedy="move it away")
        if record.get("format") != FORMAT or record["commands"] != commands:
            raise UserError(f"{path} is that of other options; give the same ones to go on, or another --out")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and was not made by tritale teach; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    for name, (_, written) in stages.items():
        if name in record["seconds"] and written.exists():
            console.print(f"{out / name} is finished", style="dim")
            continue
        console.print(f"\n$ {shlex.join(['tritale', *commands[name]])}", style="bold")
        began = time.perf_counter()
        main(commands[name])  # ends this process after an error
        record["seconds"][name] = round(time.perf_counter() - began, 1)
        write_json(path, record)
    report = json.loads((out / "evaluation" / "evaluate.json").read_text(encoding="utf-8"))
    done = [(name, shlex.join(["tritale", *commands[name]]), seconds) for name, seconds in record["seconds"].items()]
    with atomic_file(out / "teach.html") as temporary:
        temporary.write_text(page(report, done), encoding="utf-8")
    minutes = sum(record["seconds"].values()) / 60
    console.print(f"\n{minutes:.1f} minutes. {out / 'teach.html'}")
    console.print(f"Next: tritale generate --model {sft} --instruct --prompt 写一个小兔的故事。")
