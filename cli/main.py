"""The command `tritale`. Each subcommand is a module of this package with HELP, add_arguments and run.

A module with TAKES_CONFIG gets the options that it does not define, the keys of a run's config, as `args.overrides`.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import tritale

from ..common.console import prepare_output, wrapped
from ..common.errors import UserError, sentence
from . import (
    average,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    instruct,
    lr_find,
    merge,
    pairs,
    plan,
    prepare,
    report,
    serve,
    status,
    sweep,
    teach,
    train,
    verify,
)

COMMANDS: dict[str, ModuleType] = {
    "prepare": prepare, "instruct": instruct, "plan": plan, "lr-find": lr_find, "train": train, "status": status, "report": report,
    "doctor": doctor, "verify": verify, "generate": generate,
    "sweep": sweep, "evaluate": evaluate, "pairs": pairs, "teach": teach,
    "average": average, "merge": merge, "export": export, "import": import_, "serve": serve,
}  # fmt: skip

# Names of our options in other programs, where the spelling is not similar.
SYNONYMS = {
    "checkpoint": "--model", "ckpt": "--model", "checkpoint-dir": "--model", "max-tokens": "--max-new-tokens", "n": "--samples",
    "num-samples": "--samples", "num-return-sequences": "--samples", "output": "--out", "out-dir": "--out", "gpu": "--device",
    "cuda": "--device", "precision": "--dtype", "text": "--prompt", "num-workers": "--workers", "nproc": "--processes",
    "bind": "--host", "force": "--overwrite",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, wrapped(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand. A UserError or OSError ends the process with a one-line message and status 1."""
    prepare_output()
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter reports the error again at exit
        sys.exit(141)  # as a shell reports SIGPIPE
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich ends the process with 1
            sys.exit(141)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: list[str] | None) -> None:
    parser = Parser(prog="tritale", description="Train small language models from scratch, and use them.")
    parser.add_argument("--version", action="version", version=f"tritale {tritale.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        p = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
            add_help=command is not train,
        )
        command.add_arguments(p)
        p.set_defaults(run=command.run, parser=p)
    args, unknown = parser.parse_known_args(arguments)
    if args.command is None:
        if unknown:
            parser.error(f"{unknown[0]} is not an option; give a command first: {', '.join(COMMANDS)}")
        parser.print_help()
        return
    if unknown and not getattr(COMMANDS[args.command], "TAKES_CONFIG", False):
        args.parser.error(f"{unknown[0]} is not an option{hint(unknown[0], args.parser)}")
    if name := getattr(args, "model_argument", None):
        if getattr(args, name) is None:
            args.parser.error("DIR, the folder of a checkpoint or run, is missing")
        setattr(args, name, Path(getattr(args, name)))
    args.overrides = unknown
    try:
        args.run(args)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        sys.exit(wrapped(f"tritale {args.command}: {sentence(error)}"))


def hint(option: str, parser: argparse.ArgumentParser) -> str:
    """A question that names the option that was probably meant, or nothing."""
    known = [name for name in parser._option_string_actions if name not in ("-h", "--help")]
    name = option.partition("=")[0].strip("-").replace("_", "-")
    near = [SYNONYMS[name]] if SYNONYMS.get(name) in known else difflib.get_close_matches(f"--{name}", known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
    main()
