"""tritale prepare: raw text to training data."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError

if TYPE_CHECKING:
    from ..data.prepare.conversations import ChatFields

HELP = "turn raw text into training data: tokenizer, shards, report"
PRESETS = ("quickstart", "microstories-44m")  # the models whose parameters the report compares


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, folders, globs ('raw/*.jsonl'), or a data set's name")
    p.add_argument("--out", required=True, metavar="DIR", help="output folder, for tokenizer/, train/, validation/ and report.html")
    p.add_argument(
        "--task",
        choices=("text", "sft", "dpo"),
        default="text",
        help="sft: conversations, of which only the answers are learnt, from records with messages, with instruction and output, or with "
        "故事 and 词汇, 特点, 摘要, 随机句子; dpo: pairs of answers, from prompt (messages), chosen and rejected; both need --tokenizer",
    )
    p.add_argument("--context", type=int, metavar="N", help="tokens of the longest conversation; without it, that of --tokenizer's model")
    text = p.add_mutually_exclusive_group()
    text.add_argument("--text-key", default="text", metavar="KEY", help="the field that holds the text")
    text.add_argument("--template", metavar="TEXT", help="builds the text from several fields: '{genre}：{story}'")
    p.add_argument(
        "--txt-documents",
        choices=("line", "blank-line", "file", "endoftext"),
        help="what a document of a txt file is: a line, a block between blank lines, the file, or what is between <|endoftext|> marks; "
        "without it, blank-line or endoftext according to the file",
    )
    kind = p.add_mutually_exclusive_group()
    kind.add_argument("--vocab-size", type=int, default=6400, metavar="N", help="entries of the tokenizer that is trained")
    kind.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer to use instead")
    held_out = p.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help="share of the documents held out, by hash; without it 0.01, but 100 documents or a tenth of fewer",
    )
    held_out.add_argument("--val-documents", type=int, metavar="N", help="number of documents held out")
    p.add_argument("--group-key", metavar="KEY", help="keep documents with the same value of this field in the same split")
    p.add_argument("--dedup", choices=("exact", "near", "off"), default="exact", help="which duplicates to remove")
    p.add_argument(
        "--near-threshold",
        type=float,
        default=0.8,
        metavar="X",
        help="share of common 5-character runs from which two documents are near duplicates",
    )
    p.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do about a document that cannot be read")
    p.add_argument("--workers", type=int, metavar="N", help="processes; without it, one for each core, at most 8")


def preset_sizes() -> dict[str, tuple[int, int]]:
    """(matrix parameters without the embedding, width) of each preset. It runs in a worker, since it imports torch."""
    from ..model.gpt import GPTConfig

    configs = {name: GPTConfig.preset(name) for name in PRESETS}
    return {name: (c.n_matrix - c.vocab_size * c.width, c.width) for name, c in configs.items()}


def chat_fields(args: argparse.Namespace) -> "ChatFields":
    """Raises UserError if the tokenizer or the context is not given."""
    from ..common.files import read_json_object
    from ..data.prepare.conversations import ChatFields

    if args.tokenizer is None:
        raise UserError(
            f"--task {args.task} needs the tokenizer of the model that will learn the conversations: --tokenizer out/quickstart/step-…"
        )
    config, context = Path(args.tokenizer) / "tokenizer_config.json", args.context
    if context is None and config.is_file():
        context = read_json_object(config, remedy="restore it").get("model_max_length")
    if type(context) is not int or context < 8:
        raise UserError(f"--context is {context}; give the model's context in tokens, or the folder of a checkpoint as --tokenizer")
    return ChatFields(group_key=args.group_key, tokenizer=args.tokenizer, context=context, task=args.task)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..data.prepare.documents import Fields
    from ..data.prepare.pipeline import Options, prepare
    from ..data.prepare.report import print_report

    fields = chat_fields(args) if args.task != "text" else Fields(args.text_key, args.template, args.group_key, args.txt_documents)
    options = Options(
        fields=fields,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        val_fraction=args.val_fraction,
        val_documents=args.val_documents,
        dedup=args.dedup,
        near_threshold=args.near_threshold,
        skip_errors=args.on_error == "skip",
    )
    console = Console(markup=False, highlight=False)
    report = prepare(args.input, args.out, options, preset_sizes=preset_sizes, workers=args.workers, console=console)
    print_report(report, console)
    out = Path(args.out)
    more = ["--config", f"configs/{args.task}.yaml", "--init_from", "CHECKPOINT"] if args.task != "text" else []
    train = shlex.join(["tritale", "train", *more, "--data.source", str(out), "--out_dir", f"{out}-run"])
    console.print(f"\nreport  {out / 'report.html'}\ntrain   {train}", soft_wrap=True)
