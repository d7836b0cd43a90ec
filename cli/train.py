"""tritale train: run train.py, also from an installed package, in one process or several."""

import argparse
import logging
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

from ..common.errors import UserError

HELP = "train a model: tritale train [--processes N] [--config FILE] [--section.key VALUE …]"
TAKES_CONFIG = True
SCRIPT = Path(__file__).resolve().parents[1] / "train.py"  # beside the packages, in a checkout and in the wheel


def add_arguments(p: argparse.ArgumentParser) -> None:
    """train.py reads all other options, also --help."""
    p.add_argument("--processes", type=int, default=1, metavar="N", help="one for each GPU; on a CPU they share the cores")


def run(args: argparse.Namespace) -> None:
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}; it must be at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # while PyTorch is imported; later train.py or `launch` handles it
    if args.processes > 1 and "--help" not in args.overrides:
        launch(args.processes, args.overrides)
        return
    sys.argv = [str(SCRIPT), *args.overrides]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def launch(processes: int, overrides: list[str]) -> None:
    """Start the processes as torchrun does, but print nothing: a process that fails has printed its own message. torchrun adds its
    traceback to that. SIGTERM, SIGHUP and Ctrl-C are passed on, and the processes end by themselves; torchrun would kill them after
    30 seconds.

    Raises UserError if the machine has GPUs, but fewer than processes."""
    import psutil

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the warnings about closed connections, which are read at the import
    import torch

    if torch.cuda.is_available() and (count := torch.cuda.device_count()) < processes:
        raise UserError(f"--processes is {processes}, and this machine has {count} GPU{'s' * (count > 1)}; choose at most {count}")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..training.processes import ending_signals, exit_status

    logging.disable()  # torchrun's warnings and errors
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds

    received = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal received
        received = number
        children = psutil.Process().children()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children:  # they have not started yet
            sys.exit(exit_status(number))

    for number in ending_signals():
        signal.signal(number, pass_on)
    options = ["--standalone", f"--nproc-per-node={processes}", "--signals-to-handle=SIGQUIT", "--module", "tritale", "train"]
    try:
        run.run(run.parse_args([*options, *overrides]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if received and failure.exitcode in (-received, -signal.SIGINT):  # before train.py handles signals, or a second Ctrl-C
            sys.exit(exit_status(received))
        if failure.exitcode < 0:
            raise UserError(
                f"process {rank} was ended by signal {-failure.exitcode} (9 is often a lack of memory); "
                "run the same command again to resume from the last checkpoint"
            ) from None
        sys.exit(failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
