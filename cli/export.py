"""tritale export: write a checkpoint in the format of another program, and compare what that program computes with it."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError
from . import options

if TYPE_CHECKING:
    from ..inference import LLM

HELP = "write a checkpoint for Hugging Face, litgpt or llama.cpp"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "model", options.CHECKPOINT)
    p.add_argument(
        "--to", required=True, choices=("hf", "litgpt", "gguf"),
        help="hf: a folder for transformers, without the training's state; litgpt: a folder for litgpt.LLM.load; gguf: for llama.cpp",
    )  # fmt: skip
    options.add_ema(p)
    p.add_argument("--out", required=True, metavar="PATH", type=Path, help="folder or file to write; it must not exist")


def run(args: argparse.Namespace) -> None:
    from ..common.run_folder import find_checkpoint, is_adapter
    from ..inference import LLM
    from ..model import consumers, export

    source, out = find_checkpoint(args.model), args.out
    llm = LLM.load(source, device="cpu", ema=args.ema)
    model, tokenizer = llm.model, llm.tokenizer
    if args.to == "hf":
        export.export_merged(model, tokenizer, out) if is_adapter(source) else export.export_hf(source, out, ema=args.ema)
        check, use = consumers.check_hf, f'in Python: transformers.AutoModelForCausalLM.from_pretrained("{out}")'
    elif args.to == "litgpt":
        export.export_litgpt(model, tokenizer, out)
        check, use = consumers.check_litgpt, f'in Python: from litgpt import LLM; LLM.load("{out}").generate("从前，")'
    else:
        try:
            export.export_gguf(model, tokenizer, out, name=f"{source.resolve().parent.name}/{source.resolve().name}")
        except ModuleNotFoundError as error:
            raise UserError(f"the package {error.name} is missing; pip install gguf and try again") from None
        check, use = consumers.check_gguf, f"llama-cli -m {out} -p 从前，  (llama-quantize makes the file smaller than fp32)"
    try:
        checked = check(out, model, tokenizer, documents(source, llm))
    except ImportError as reason:
        checked = f"not checked, because {reason}"
    except BaseException:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        raise
    print(f"{out} is written\n{checked}\nNext: {use}")


def documents(source: Path, llm: "LLM", limit: int = 200) -> list[str]:
    """Validation documents of the checkpoint's run, or stories of the model if the data is not available."""
    from ..data.shards import evenly
    from ..evaluation.trained_run import TrainedRun

    try:
        split = TrainedRun.open(source.resolve().parent).split("validation", llm.tokenizer)
    except (UserError, OSError):
        return ["从前，", *filter(None, (completion.text for completion in llm.complete([""] * 20, seed=0, max_new_tokens=100)))]
    chosen = evenly(split.n_documents, min(limit, split.n_documents))
    return [llm.tokenizer.decode(split.document(i).tolist()) for i in chosen]
