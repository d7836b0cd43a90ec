"""One run of `prepare`: its options, what its steps share, and the recipe that says how the data in the output folder was made."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import Progress

from ...common.errors import UserError
from ...common.files import LOCK, atomic_file, read_json_object, sha256_of, temporary_of, write_json
from ..built_in import open_data
from ..shards import REMEDY, checksum
from ..tokenizer import FIXED_TOKENS, Tokenizer
from .conversations import ChatFields
from .documents import Fields, Reader
from .workers import Workers

RECIPE, REPORT, WORK = "prepare.json", "report.json", "work"
VERSION = 2
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Options:
    """What determines the data: the same options and files give the same data."""

    fields: Fields = field(default_factory=Fields)
    vocab_size: int = 6400  # unless there is a tokenizer
    tokenizer: str | None = None  # folder
    val_fraction: float | None = None
    val_documents: int | None = None  # in place of val_fraction
    dedup: str = "exact"
    near_threshold: float = 0.8  # Jaccard similarity
    skip_errors: bool = False
    max_shard_tokens: int = 2**27

    @property
    def is_chat(self) -> bool:
        return isinstance(self.fields, ChatFields)

    def __post_init__(self):
        if self.dedup not in ("exact", "near", "off"):
            raise UserError(f"--dedup {self.dedup!r} must be exact, near or off")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction} must lie between 0 and 1, such as 0.01")
        if self.val_documents is not None and self.val_documents < 1:
            raise UserError(f"--val-documents {self.val_documents} must be at least 1")
        if not 0.5 <= self.near_threshold <= 1:
            raise UserError(f"--near-threshold {self.near_threshold} must lie between 0.5 and 1; 0.8 is usual")
        if self.tokenizer is None and self.vocab_size < len(FIXED_TOKENS) + 2:
            raise UserError(f"--vocab-size {self.vocab_size} must be at least {len(FIXED_TOKENS) + 2}; for Chinese stories try 6400")


@dataclass(frozen=True)
class Job:
    """One run of `prepare`: what its steps share."""

    files: list[str]
    listing: dict  # `listing_of(files)` at the start
    options: Options
    out: Path
    workers: Workers
    progress: Progress

    @property
    def work(self) -> Path:
        return self.out / WORK

    @property
    def documents(self) -> Path:
        return self.work / "documents.bin"

    @property
    def signatures(self) -> Path:
        return self.work / "signatures.bin"

    def reader(self, errors: Mapping[str, int] | None = None, first_errors: list[str] | None = None) -> Reader:
        return Reader(self.files, self.options.fields, self.options.skip_errors, Counter(errors), first_errors or [])

    def load(self, name: str) -> dict | None:
        """The state that a step committed in work/, or None. Raises UserError if it is damaged."""
        path = self.work / name
        if not path.is_file():
            return None
        found = read_json_object(path, remedy=REMEDY)
        if found.get("sha256") != checksum(found.get("state")):
            raise UserError(f"{path} is damaged; delete {self.out} and run the same command again")
        return found["state"]

    def save(self, name: str, state: dict) -> None:
        write_durably(self.work / name, {"state": state, "sha256": checksum(state)})


def listing_of(files: list[str]) -> dict[str, list[int] | None]:
    """{file: [size, time of the last change]}, None for a data set."""
    stats = {name: Path(name).stat() if Path(name).is_file() else None for name in files}
    return {name: stat and [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def recipe_of(files: list[str], options: Options, tokenizer: Tokenizer | None) -> dict:
    chosen = asdict(options) | {"vocab_size": None if tokenizer else options.vocab_size, "tokenizer": tokenizer and tokenizer.hash}
    del chosen["skip_errors"]  # a run that was stopped by an error may continue with skip
    return json.loads(json.dumps({"format": "tritale-prepare", "version": VERSION, "files": listing_of(files), **chosen}))


def compare(out: Path, recipe: dict) -> tuple[str, dict | None]:
    """(how the data in `out` differs, `checksums` of it if it is finished). Raises UserError if `out` holds something else."""
    begun = {out / WORK, temporary_of(out / RECIPE)}  # of a run that was killed before it wrote its recipe
    if out.is_file() or (out.is_dir() and not (out / RECIPE).is_file() and not begun.issuperset(out.iterdir())):
        raise UserError(f"{out} exists and does not hold prepared data, so nothing is written there; choose another --out")
    if not (out / RECIPE).is_file():
        return "", None
    found = read_json_object(out / RECIPE, remedy=REMEDY)
    finished = found.get("finished")
    if finished is not None and not isinstance(finished, dict):
        finished = {REPORT: finished}  # of an earlier version
    return "; ".join(_differences(found, recipe)), finished


def _differences(found: dict, recipe: dict) -> Iterator[str]:
    if (found.get("format"), found.get("version")) != (recipe["format"], recipe["version"]):
        yield f"version of prepare: {found.get('version')} → {recipe['version']}; the data can still be used for training"
        return
    sections = [found.get("files"), found.get("fields")]
    files, fields = (section if isinstance(section, dict) else {} for section in sections)
    if changed := changed_files(files, recipe["files"]):
        yield f"--input: {changed}"
    before, now = found | fields, recipe | recipe["fields"]
    shown = lambda key, values: "not given" if values.get(key) is None else str(values[key])[:40]
    for key in now:
        if key not in ("files", "fields") and before.get(key) != now[key]:
            yield f"--{key.replace('_', '-')}: {shown(key, before)} → {shown(key, now)}"


def changed_files(before: dict, now: dict) -> str:
    """The differences of two listings, in words."""
    changed = [f"{f} changed" if f in before else f"{f} is new" for f, stat in now.items() if before.get(f) != stat]
    changed += [f"{f} is not among them" for f in before if f not in now]
    return ", ".join(changed[:3]) + (f" and {len(changed) - 3:,} more" if len(changed) > 3 else "")


def discard(out: Path) -> None:
    """Remove what an unfinished run wrote."""
    for name in ("tokenizer", *SPLITS):
        for path in (out / name, out / f"{name}.partial"):
            shutil.rmtree(path, ignore_errors=True)
    for path in (out / WORK).iterdir():
        if path.name != LOCK:
            path.unlink()


def checksums(out: Path) -> dict[str, str]:
    """{file: sha256} of the finished files that do not have their checksum elsewhere."""
    return {name: sha256_of(out / name) for name in (REPORT, "tokenizer/tokenizer_config.json")}


def damage(out: Path, finished: dict) -> str:
    """What is missing or damaged in the finished data with these `checksums`, in words."""
    try:
        open_data(out)
    except (FileNotFoundError, UserError) as error:
        return str(error).partition(";")[0]
    wrong = [out / name for name, sha256 in finished.items() if not (out / name).is_file() or sha256_of(out / name) != sha256]
    return f"{wrong[0]} is missing or damaged" if wrong else ""


def write_durably(path: Path, value: dict) -> None:
    """Write JSON, complete or not at all."""
    with atomic_file(path) as temporary:
        write_json(temporary, value)
