"""tritale export: write a checkpoint in the format of another program."""

import argparse
from pathlib import Path

from ..common.errors import UserError

HELP = "write a checkpoint for litgpt or llama.cpp (Hugging Face reads it as it is)"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="DIR", help="checkpoint folder, such as out/quickstart/step-00000800")
    p.add_argument(
        "--to", required=True, choices=("litgpt", "gguf"), help="litgpt: a folder for litgpt.LLM.load; gguf: a file for llama.cpp"
    )
    p.add_argument("--out", required=True, metavar="PATH", help="folder or file to write; it must not exist")


def run(args: argparse.Namespace) -> None:
    from ..inference import LLM
    from ..model.export import export_gguf, export_litgpt

    source, out = Path(args.model), Path(args.out)
    llm = LLM.load(source, device="cpu")
    if args.to == "litgpt":
        export_litgpt(llm.model, llm.tokenizer, out)
        print(f'{out} is written; from litgpt import LLM; LLM.load("{out}").generate("从前，") reads it')
        return
    try:
        export_gguf(llm.model, llm.tokenizer, out, name=f"{source.resolve().parent.name}/{source.resolve().name}")
    except ModuleNotFoundError as error:
        raise UserError(f"the package {error.name} is missing; pip install 'tritale[export]' (or gguf) and try again") from None
    print(f"{out} is written in fp32; llama-cli -m {out} -p 从前， reads it, llama-quantize makes it smaller")
