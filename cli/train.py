"""tritale train: run train.py, also from an installed package."""

import argparse
import runpy
import sys
from pathlib import Path

HELP = "train a model: tritale train [--config FILE] [--section.key VALUE …]"
TAKES_CONFIG = True
SCRIPT = Path(__file__).resolve().parents[1] / "train.py"  # beside the packages, in a checkout and in the wheel


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add none: train.py reads all options, also --help."""


def run(args: argparse.Namespace) -> None:
    sys.argv = [str(SCRIPT), *args.overrides]
    runpy.run_path(str(SCRIPT), run_name="__main__")
