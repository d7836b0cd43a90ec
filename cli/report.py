"""tritale report: the page of a run."""

import argparse

from ..common.errors import UserError
from . import options

HELP = "write report.html into a run: curves, samples over time, and what is wrong"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "run_dir", "folder of a running or finished run, such as out/quickstart")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.run_facts import RunFacts
    from ..evaluation.run_report import write_report

    RunFacts.read(args.run_dir)  # its errors name the folder

    def fail(text: str) -> None:
        raise UserError(text)

    print(write_report(args.run_dir, warn=fail))
