"""tritale verify: compare the files of a run, a checkpoint or a data folder with their checksums."""

import argparse
import sys
from pathlib import Path

from . import options

HELP = "compare the files of a run, a checkpoint or a data folder with their checksums"


def add_arguments(p: argparse.ArgumentParser) -> None:
    options.add_model(p, "dir", "folder of a run, a checkpoint or prepared data")


def run(args: argparse.Namespace) -> None:
    """Print a line for each checkpoint and data split in the folder. The exit status is 1 if one is damaged."""
    from ..common.errors import UserError
    from ..common.run_folder import ADAPTER, STEP_FOLDER, listing
    from ..data.shards import INDEX, Split
    from ..model.checkpoint import CHECKSUMS

    folder = args.dir
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a run such as out/quickstart, one of its step-… folders, or data")
    names = (CHECKSUMS, INDEX, "model.safetensors", ADAPTER)
    found = {path.parent for name in names for path in folder.rglob(name) if not any(part.startswith(".") for part in path.parts)}
    found |= {path for path in folder.rglob("step-*") if path.is_dir() and STEP_FOLDER.fullmatch(path.name)}
    found = sorted(path for path in found if path == folder or path.name != "trainer")  # that one is a part of its checkpoint
    if not found:
        raise UserError(f"{folder} has no checkpoint and no prepared data (found: {listing(folder)}); give the folder of a run or of data")
    damaged = 0
    for path in found:
        try:
            what = f"whole, {Split.open(path).n_documents:,} documents" if (path / INDEX).is_file() else checked(path)
        except (OSError, ValueError) as error:
            damaged += 1
            what = f"damaged ({error})"
        print(f"{path}: {what}")
    if damaged:
        sys.exit(f"tritale verify: {damaged} of {len(found)} are damaged; a run resumes from the newest checkpoint that is whole")


def checked(checkpoint: Path) -> str:
    """What `check_files` says about a checkpoint and its folder trainer/. Raises FileNotFoundError or UserError if a file is missing or has
    changed."""
    from ..common.errors import UserError
    from ..common.files import read_json_object
    from ..common.run_folder import is_adapter
    from ..model.checkpoint import CHECKSUMS, DAMAGED, base_of, check_files

    n_files = 0
    for folder in (checkpoint, checkpoint / "trainer"):
        if folder != checkpoint and not folder.is_dir():
            continue  # an average or an imported checkpoint
        if not (folder / CHECKSUMS).is_file():
            trainer = checkpoint / "trainer" / "trainer.json"
            if trainer.is_file() and "format" not in read_json_object(trainer, remedy=DAMAGED):
                return f"not checked, an earlier version wrote no {CHECKSUMS}"
            raise UserError(f"{folder / CHECKSUMS} is missing")
        check_files(folder)
        n_files += len(read_json_object(folder / CHECKSUMS, remedy=DAMAGED))
    if is_adapter(checkpoint):
        return f"whole, {n_files} files; an adapter of {base_of(checkpoint).folder}, whose weights have not changed"
    return f"whole, {n_files} files"
