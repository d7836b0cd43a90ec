"""The command `tritale`. Each subcommand is a module of this package, named after it, with HELP, add_arguments and run."""

import argparse
import sys

from . import average, export, generate, sweep

COMMANDS = {"average": average, "export": export, "generate": generate, "sweep": sweep}


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand. Ends the process with a message and status 1 on input that cannot work."""
    parser = argparse.ArgumentParser(prog="tritale", description="Small story models, trained from scratch.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        p = subparsers.add_parser(name, help=command.HELP, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_arguments(p)
        p.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"tritale {args.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
