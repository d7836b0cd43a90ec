"""Runs commands of tritale in one process on the null GPU: python -m tests.nullgpu.commands '[["train", "--model.preset", "tiny"], …]'.

Prints a JSON line for each command: what it launched, waited for and did wrong.
"""

import json
import sys
from collections import Counter

import torch

from tests.nullgpu.harness import losses_fall, never_overflows, recorded
from tritale.cli.main import main


def run(arguments: list[str]) -> dict:
    with recorded() as record:
        main(arguments)
    return {
        "command": arguments[0],
        "kinds": Counter(x.kind for x in record.launches),
        "collectives": Counter(x.name for x in record.launches if x.kind == "collective"),
        "waits": record.waits,
        "faults": record.faults,
        "memory": torch.cuda.max_memory_allocated(),
    }


if __name__ == "__main__":
    never_overflows()
    losses_fall()
    for command in json.loads(sys.argv[1]):
        print("\n" + json.dumps(run(command)), flush=True)
