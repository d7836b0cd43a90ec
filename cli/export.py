"""tritale export: write a checkpoint in the format of another program."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError
from . import options

if TYPE_CHECKING:
    from ..inference import LLM

HELP = "write a checkpoint for litgpt or llama.cpp (Hugging Face reads it as it is)"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "model", options.CHECKPOINT)
    p.add_argument(
        "--to", required=True, choices=("litgpt", "gguf"), help="litgpt: a folder for litgpt.LLM.load; gguf: a file for llama.cpp"
    )
    p.add_argument("--out", required=True, metavar="PATH", help="folder or file to write; it must not exist")


def run(args: argparse.Namespace) -> None:
    from ..inference import LLM
    from ..model.export import check_gguf, check_litgpt, export_gguf, export_litgpt
    from ..model.run_folder import find_checkpoint

    source, out = find_checkpoint(args.model), Path(args.out)
    llm = LLM.load(source, device="cpu")
    if args.to == "litgpt":
        export_litgpt(llm.model, llm.tokenizer, out)
        print(f"{out} is written")
        print(check_litgpt(out, llm.model, llm.tokenizer.encode("从前，", bos=True)))
        print(f'Next, in Python: from litgpt import LLM; LLM.load("{out}").generate("从前，")')
        return
    try:
        export_gguf(llm.model, llm.tokenizer, out, name=f"{source.resolve().parent.name}/{source.resolve().name}")
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is missing; pip install gguf and try again") from None
    print(f"{out} is written in fp32 (llama-quantize makes it smaller)")
    print(check_gguf(llm.tokenizer, documents(source, llm)))
    print(f"Next: llama-cli -m {out} -p 从前，")


def documents(source: Path, llm: "LLM", limit: int = 200) -> list[str]:
    """Validation documents of the checkpoint's run, or stories of the model if the data is not available."""
    from ..data.shards import evenly
    from ..evaluation.trained_run import TrainedRun

    try:
        split = TrainedRun.open(source.resolve().parent).split("validation", llm.tokenizer)
    except (UserError, OSError):
        return [completion.text for completion in llm.complete([""] * 20, seed=0, max_new_tokens=100)]
    chosen = evenly(split.n_documents, min(limit, split.n_documents))
    return [llm.tokenizer.decode(split.document(i).tolist()) for i in chosen]
