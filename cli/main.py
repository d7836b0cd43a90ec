"""The command `tritale`. Each subcommand is a module of this package with HELP, add_arguments and run.

A module with TAKES_CONFIG gets the keys of a run's config, which it does not define, as `args.overrides`.
"""

import argparse
import sys

from ..common.errors import UserError
from . import average, export, generate, lr_find, plan, prepare, serve, sweep

COMMANDS = {
    "prepare": prepare, "plan": plan, "lr-find": lr_find, "generate": generate, "sweep": sweep, "average": average, "export": export,
    "serve": serve,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand. A UserError or OSError ends the process with a one-line message and status 1."""
    parser = argparse.ArgumentParser(prog="tritale", description="Small story models, trained from scratch.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        p = subparsers.add_parser(name, help=command.HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        command.add_arguments(p)
        p.set_defaults(run=command.run)
    args, unknown = parser.parse_known_args(arguments)
    if unknown and not getattr(COMMANDS[args.command], "TAKES_CONFIG", False):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = unknown
    try:
        args.run(args)
    except (UserError, OSError) as error:
        sys.exit(f"tritale {args.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
