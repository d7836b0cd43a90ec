"""From raw text to training data: read, normalise, remove duplicates, split, train a tokenizer, encode, report.

    fingerprints   the hash, split hash and length of each document in work/, and for near duplicates its MinHash signature
    selection      the status of each document, computed from the fingerprints
    tokenizer      loaded, or trained on a sample of the training documents
    encoding       the documents that are kept, read a second time, into train.partial/ and validation.partial/
    report         report.json, report.html; then work/ is removed

Reading twice costs less than a tenth of the encoding and needs no copy of the input. A run may be stopped at any moment, also by SIGKILL.
The next run of the same command resumes after the last commit and gives the same bytes. Memory does not grow with the input except for
two bytes per document.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...common.errors import UserError
from ...common.files import atomic_file, read_json_object, sync_entries, sync_folder, temporary_of, write_json
from ..built_in import open_data
from ..shards import REMEDY, STARTS, Split, SplitWriter, evenly
from ..tokenizer import END_OF_TEXT, FIXED_TOKENS, Tokenizer
from . import deduplicate, report, splitting
from .deduplicate import BLANK, EXACT, NEAR, RECORD, SIGNATURE, TRAIN, VALIDATION, chunks
from .documents import Batch, Fields, Reader
from .inputs import EXTRA, find_files, import_package
from .tokenize import SAMPLE_CHARACTERS, BulkEncoder, encode, sample
from .workers import Workers

RECIPE, REPORT, WORK, LOCK = "prepare.json", "report.json", "work", "lock"
WARNING: dict = {"style": "yellow", "markup": False}  # of console.print
VERSION = 2
VALIDATION_SHARE, ENOUGH_VALIDATION = 0.01, 100  # by default: this share, but this number of documents or a tenth of all
SPLITS = ("train", "validation")
BATCHES_PER_COMMIT = 16
MEASURED_CHARACTERS = 1_000_000  # for the table of vocabulary sizes
PLACES = 100  # they are taken from
N_STRANGEST = {"shortest": 3, "longest": 3, "most byte fallback": 4}
EXCERPT = 60  # characters


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
        """The state that a step committed in work/, or None."""
        path = self.work / name
        return read_json_object(path, remedy=REMEDY) if path.is_file() else None

    def save(self, name: str, state: dict) -> None:
        _write(self.work / name, state)


def prepare(
    inputs: list[str],
    out: str | Path,
    options: Options,
    *,
    preset_sizes: Callable[[], Mapping[str, tuple[int, int]]] = dict,
    workers: int | None = None,
    console: Console | None = None,
) -> dict:
    """Make tokenizer/, train/ and validation/ in `out`, for `open_data`. Returns the content of report.json.

    `preset_sizes` runs in a worker and returns (matrix parameters without the embedding, width) of the models that the report compares.

    Raises UserError for input that cannot be used, naming file and line, or if `out` holds other data; FileNotFoundError for missing
    input; OSError if the disk is full. After each of them the same command resumes.
    """
    out, console = Path(out), console or Console(quiet=True)
    files = [file for file in find_files(inputs) if out.resolve() not in Path(file).resolve().parents]
    options.fields.check(files)
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    pool = Workers(workers)
    if options.dedup == "near":
        import_package("rensa", "--dedup near")
    recipe = _recipe(files, options, given)
    work, (differences, finished) = out / WORK, _compare(out, recipe)
    if finished:
        if differences:
            raise UserError(f"{out} holds data made with other options ({differences}); choose another --out, or delete {out}")
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its very end
        problem = _missing(out, finished)
        if not problem:
            console.print(f"{out} was made from these files with these options before; nothing to do", markup=False)
            return read_json_object(out / REPORT, remedy=REMEDY)
        console.print(f"{out} was made before, but it is no longer complete ({problem}); it is made again", markup=False)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with _only_one(work), pool, _progress(console) as progress:
            job = Job(files, options, out, pool, progress)
            if differences:
                console.print(f"{out} holds unfinished data made with other options ({differences}); it is replaced", **WARNING)
                _discard(out)
            _write(out / RECIPE, recipe)
            read = fingerprints(job)
            status, chosen = selection(job, read)
            tokenizer = given or trained_tokenizer(job, status)
            if read["marked"]:
                n = f"{read['marked']:,} documents contain {END_OF_TEXT}"
                console.print(f"{n} as ordinary text; if it separates stories there, split them before", **WARNING)
            if chosen["validation"] < ENOUGH_VALIDATION:
                n = f"validation has only {chosen['validation']:,} documents"
                console.print(f"{n}, so its loss is inexact; --val-documents {ENOUGH_VALIDATION} or more documents help", **WARNING)
            if BulkEncoder(tokenizer).is_fallback:
                console.print(f"fastokens is not installed ({EXTRA}): tokenizers encodes instead, several times slower", **WARNING)
            if not (out / "tokenizer").exists():
                _save_tokenizer(tokenizer, out / "tokenizer")
            encoded = encoding(job, status, tokenizer)
            found = Result(job, tokenizer, status, read, chosen, encoded).report(preset_sizes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            problem = os.strerror(error.errno)
            raise OSError(f"{out} could not be written ({problem}); free some space and run the same command again: it resumes") from error
        raise
    _write(out / REPORT, found)
    report.write_html(out / "report.html", found)
    _write(out / RECIPE, recipe | {"finished": _sha256(out / REPORT)})
    shutil.rmtree(work)
    return found


# ---- the status of each document --------------------------------------------------------------------------------------------------------


def fingerprints(job: Job) -> dict:
    """Write work/documents.bin (RECORD per document) and, for near duplicates, work/signatures.bin; return the counts."""
    state = job.load("fingerprints.json") or {
        "documents": 0,
        "place": [0, 0],
        "normalised": 0,
        "marked": 0,
        "errors": {},
        "first_errors": [],
    }
    if state.get("done"):
        return state
    is_near = job.options.dedup == "near"
    outputs = {job.documents: RECORD.itemsize} | ({job.signatures: SIGNATURE.itemsize} if is_near else {})
    opened = [_open_at(path, state["documents"] * size) for path, size in outputs.items()]
    reader = job.reader(state["errors"], state["first_errors"])
    total = sum(Path(f).stat().st_size for f in job.files if Path(f).is_file())
    task = job.progress.add_task("reading", total=total or None)

    def commit(**more: object) -> None:
        for file in opened:
            file.flush()
            os.fsync(file.fileno())
        job.save("fingerprints.json", state | more)

    items = ((batch, (batch.texts, batch.groups, is_near)) for batch in reader.batches(state["place"]))
    for n, (batch, (data, n_normalised, n_marked)) in enumerate(job.workers.map(deduplicate.fingerprints, items), 1):
        for file, part in zip(opened, data, strict=True):
            file.write(part)
        state["documents"] += len(batch.texts)
        state["normalised"] += n_normalised
        state["marked"] += n_marked
        state |= {"place": batch.place, "errors": batch.errors, "first_errors": batch.first_errors}
        job.progress.update(task, completed=batch.bytes_read)
        if n % BATCHES_PER_COMMIT == 0:
            commit()
    state |= {"errors": dict(reader.errors), "first_errors": reader.first_errors}
    if not state["documents"]:
        seen = "; ".join(f"{n} × {what}" for what, n in state["errors"].items()) or "the files are empty"
        raise UserError(f"no document could be read from {len(job.files)} files: {seen}")
    commit(done=True)
    for file in opened:
        file.close()
    job.progress.update(task, completed=total)
    return state


def selection(job: Job, read: dict) -> tuple[np.ndarray, dict]:
    """The status of each document, (documents,) uint8, and the counts."""
    path, counts, options = job.work / "status.bin", job.load("selection.json"), job.options
    if counts and path.is_file():
        return np.fromfile(path, np.uint8), counts
    n = read["documents"]
    task = job.progress.add_task("removing duplicates", total=None)
    status = np.zeros(n, np.uint8)
    for first, records in chunks(job.documents, RECORD):
        status[first : first + len(records)][records["characters"] == 0] = BLANK
    if options.dedup != "off":
        deduplicate.exact_duplicates(job.documents, n, status)
    distinct = int(np.count_nonzero(status == TRAIN))
    enough = min(ENOUGH_VALIDATION, max(1, distinct // 10))
    threshold = splitting.threshold_of_fraction(options.val_fraction or VALIDATION_SHARE)
    if options.val_documents is not None:
        threshold = splitting.threshold_of_documents(job.documents, status, options.val_documents)
    elif options.val_fraction is None and distinct > 1:
        threshold = max(threshold, splitting.threshold_of_documents(job.documents, status, enough))
    for first, records in chunks(job.documents, RECORD):
        part = status[first : first + len(records)]
        part[(part == TRAIN) & (records["split_hash"] < np.uint64(threshold))] = VALIDATION
    near_across = near_leaks = None
    if options.dedup == "near":
        track = lambda items: job.progress.track(items, task_id=task)
        near_across = deduplicate.near_duplicates(job.signatures, status, options.near_threshold, track)
        near_leaks = splitting.count_near_leaks(job.signatures, status, options.near_threshold)
    given, kept = splitting.count_exact_leaks(job.documents, n, status, threshold)
    totals = np.bincount(status, minlength=5).tolist()
    if not totals[TRAIN] or not totals[VALIDATION]:
        raise UserError(
            f"of {n:,} documents {totals[TRAIN]:,} are for training and {totals[VALIDATION]:,} for validation, and both need one; "
            + (f"try --val-documents {enough}" if distinct > 1 else "give at least two different documents")
        )
    counts = {
        **dict(zip(SPLITS, totals, strict=False)),
        "exact_duplicates": totals[EXACT],
        "near_duplicates": totals[NEAR],
        "blank": totals[BLANK],
        "val_fraction": threshold / 2**64,
        "exact_across_sides_removed": given - kept,
        "near_across_sides_removed": near_across,
        "exact_leaks": kept,
        "near_leaks": near_leaks,
    }
    with atomic_file(path) as temporary:
        status.tofile(temporary)
    job.save("selection.json", counts)
    job.progress.update(task, total=1, completed=1)
    return status, counts


# ---- tokenizer and shards ---------------------------------------------------------------------------------------------------------------


def trained_tokenizer(job: Job, status: np.ndarray) -> Tokenizer:
    """The tokenizer in `out`, or one trained on a sample of the training documents."""
    if (job.out / "tokenizer").exists():
        return Tokenizer.load(job.out / "tokenizer")
    task = job.progress.add_task("training the tokenizer", total=None)
    tokenizer = Tokenizer.train(sample(job.reader(), status, job.documents, SAMPLE_CHARACTERS), job.options.vocab_size)
    job.progress.update(task, total=1, completed=1)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    temporary = folder.with_name("tokenizer.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    sync_folder(temporary)
    temporary.rename(folder)
    sync_entries(folder.parent)


def encoding(job: Job, status: np.ndarray, tokenizer: Tokenizer) -> dict:
    """Write train/ and validation/; return the byte tokens and the strangest documents."""
    state = job.load("encoding.json") or {"documents": 0, "place": [0, 0], "splits": [None, None], "byte_tokens": [0, 0], "strangest": {}}
    folders = [job.out / name for name in SPLITS]
    if state.get("done") and all(folder.exists() for folder in folders):
        return state
    writers = [
        SplitWriter(folder, tokenizer, state=written, max_shard_tokens=job.options.max_shard_tokens)
        for folder, written in zip(folders, state["splits"], strict=True)
        if not (state.get("done") and folder.exists())
    ]

    def commit(**more: object) -> None:
        state["splits"] = [writer.commit() for writer in writers]
        job.save("encoding.json", state | more)

    if not state.get("done"):
        task = job.progress.add_task("encoding", total=len(status), completed=state["documents"])
        items = _by_split(job.reader().batches(state["place"]), status, state["documents"], (str(job.out / "tokenizer"), tokenizer.hash))
        for n, ((batch, kept), results) in enumerate(job.workers.map(encode, items), 1):
            for i, (ids, lengths, characters, n_bytes) in enumerate(results):
                if len(lengths):
                    writers[i].add(ids, lengths, characters=int(characters.sum()))
                    state["byte_tokens"][i] += int(n_bytes.sum())
                    _note_strangest(state["strangest"], job.files, batch, kept[i], SPLITS[i], lengths, characters, n_bytes)
            state["documents"] += len(batch.texts)
            state["place"] = batch.place
            job.progress.update(task, completed=state["documents"])
            if n % BATCHES_PER_COMMIT == 0:
                commit()
        if state["documents"] != len(status):
            raise UserError(f"{state['documents']:,} documents were read, {len(status):,} before: an input file has changed; {REMEDY}")
        commit(done=True)
    for writer in writers:
        writer.finish()
    return state


def _by_split(batches: Iterable[Batch], status: np.ndarray, done: int, tokenizer: tuple[str, str]) -> Iterator[tuple[Any, tuple]]:
    # ((batch, the indices of the kept documents for each split), the arguments of `encode`)
    for batch in batches:
        part = status[done : done + len(batch.texts)]
        kept = [np.flatnonzero(part == split).tolist() for split in (TRAIN, VALIDATION)]
        yield (batch, kept), (*tokenizer, [[batch.texts[i] for i in indices] for indices in kept])
        done += len(batch.texts)


def _note_strangest(strangest: dict, files: list[str], batch: Batch, kept: list[int], name: str, lengths, characters, n_bytes) -> None:
    # Keeps the first few of each kind. The sort is stable, so of two equal ones the earlier is kept.
    share = n_bytes / lengths
    for kind, key in (("shortest", characters), ("longest", -characters), ("most byte fallback", -share)):
        best = strangest.setdefault(kind, [])
        for j in np.argsort(key, kind="stable")[: N_STRANGEST[kind]].tolist():
            if (len(best) == N_STRANGEST[kind] and key[j] >= best[-1]["key"]) or (kind == "most byte fallback" and not n_bytes[j]):
                break
            text, (file, line) = batch.texts[kept[j]], batch.lines[kept[j]]
            best.append(
                {
                    "key": float(key[j]),
                    "side": name,
                    "place": f"{files[file]}:{line}",
                    "characters": int(characters[j]),
                    "tokens": int(lengths[j]),
                    "byte_fallback": float(share[j]),
                    "excerpt": text[:EXCERPT] + "…" * (len(text) > EXCERPT),
                }
            )
            best.sort(key=lambda entry: entry["key"])
            del best[N_STRANGEST[kind] :]


# ---- report -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The results of the steps, for the report."""

    job: Job
    tokenizer: Tokenizer
    status: np.ndarray
    read: dict  # of `fingerprints`
    chosen: dict  # of `selection`
    encoded: dict  # of `encoding`

    def report(self, preset_sizes: Callable[[], Mapping[str, tuple[int, int]]]) -> dict:
        """The content of report.json."""
        job, files = self.job, self.job.files
        splits = [Split.open(job.out / name, verify=False) for name in SPLITS]
        characters, tokens = self._lengths(splits)
        task = job.progress.add_task("comparing vocabularies", total=None)
        train = excerpts(splits[0], self.tokenizer, MEASURED_CHARACTERS)
        validation = excerpts(splits[1], self.tokenizer, MEASURED_CHARACTERS // 5)
        ((_, presets),) = job.workers.map(preset_sizes, [(None, ())])
        track = lambda done, total: job.progress.update(task, completed=done, total=total)
        table = report.vocabulary_table(train, validation, presets, job.workers, track)
        return {
            "files": len(files),
            "bytes": sum(Path(f).stat().st_size for f in files if Path(f).is_file()),
            "documents_read": self.read["documents"],
            **{key: self.read[key] for key in ("normalised", "errors", "first_errors")},
            "selection": self.chosen,
            "options": asdict(job.options),
            "vocab_size": self.tokenizer.vocab_size,
            "splits": {
                name: {
                    "documents": split.n_documents,
                    "characters": split.characters,
                    "tokens": split.n_tokens,
                    "shards": len(split.shards),
                    "characters_per_token": split.characters / (split.n_tokens - split.n_documents),
                    "byte_fallback_share": n_bytes / (split.n_tokens - split.n_documents),
                }
                for name, split, n_bytes in zip(SPLITS, splits, self.encoded["byte_tokens"], strict=True)
            },
            "lengths": {"edges": [2 ** (i / 4) for i in range(65)], "characters": characters.tolist(), "tokens": tokens.tolist()},
            "vocabularies": table,
            "strangest": self.encoded["strangest"],
        }

    def _lengths(self, splits: list[Split]) -> tuple[np.ndarray, np.ndarray]:
        # Histograms of the lengths in characters and tokens: four bars for each doubling.
        bars = lambda lengths: np.bincount(np.floor(4 * np.log2(np.maximum(lengths, 1))).astype(np.int64).clip(0, 63), minlength=64)
        characters, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
        for first, records in chunks(self.job.documents, RECORD):
            characters += bars(records["characters"][self.status[first : first + len(records)] <= VALIDATION])
        for split in splits:
            last = np.empty(0, np.int64)
            for _, starts in chunks(split.folder / STARTS, split.starts.dtype):  # read, since mapped pages count as memory
                tokens += bars(np.diff(np.concatenate([last, starts])))
                last = starts[-1:]
        return characters, tokens


def excerpts(split: Split, tokenizer: Tokenizer, characters: int) -> list[str]:
    """At most about `characters` of a split, as documents at places evenly spread over it. Long documents are cut."""
    # Runs of documents, since each page of the mapped shards that is touched counts as memory.
    places = evenly(split.n_documents, PLACES)
    left, texts = round(split.n_tokens * characters / split.characters), []  # tokens
    for k, (first, stop) in enumerate(pairwise([*places, split.n_documents])):
        share = left // (len(places) - k)
        for document in range(first, stop):
            begin, end = split.starts[document : document + 2].tolist()
            if end - begin > share and document > first:
                break
            text = tokenizer.decode(split.take(np.arange(begin, min(end, begin + share))).tolist())
            texts.append(text.rstrip("\ufffd") if end - begin > share else text)  # no part of a character
            share, left = share - (end - begin), left - min(end - begin, share)
    return texts


# ---- the output folder ------------------------------------------------------------------------------------------------------------------


def _recipe(files: list[str], options: Options, tokenizer: Tokenizer | None) -> dict:
    listing = {}
    for name in files:
        stat = Path(name).stat() if Path(name).is_file() else None
        listing[name] = [stat.st_size, stat.st_mtime_ns] if stat else None
    chosen = asdict(options) | {"vocab_size": None if tokenizer else options.vocab_size, "tokenizer": tokenizer and tokenizer.hash}
    del chosen["skip_errors"]  # a run that was stopped by an error may continue with skip
    return json.loads(json.dumps({"format": "tritale-prepare", "version": VERSION, "files": listing, **chosen}))


def _compare(out: Path, recipe: dict) -> tuple[str, str | None]:
    # (how the data in `out` differs, the sha256 of its report if it is finished). Raises UserError if `out` holds something else.
    begun = {out / WORK, temporary_of(out / RECIPE)}  # of a run that was killed before it wrote its recipe
    if out.is_file() or (out.is_dir() and not (out / RECIPE).is_file() and not begun.issuperset(out.iterdir())):
        raise UserError(f"{out} exists and does not hold prepared data, so nothing is written there; choose another --out")
    if not (out / RECIPE).is_file():
        return "", None
    found = read_json_object(out / RECIPE, remedy=REMEDY)
    return "; ".join(_differences(found, recipe)), found.get("finished")


def _differences(found: dict, recipe: dict) -> Iterator[str]:
    if (found.get("format"), found.get("version")) != (recipe["format"], recipe["version"]):
        yield f"version of prepare: {found.get('version')} → {recipe['version']}"
        return
    sections = [found.get("files"), found.get("fields")]
    files, fields = (section if isinstance(section, dict) else {} for section in sections)
    changed = [f"{f} changed" if f in files else f"{f} is new" for f, stat in recipe["files"].items() if files.get(f) != stat]
    changed += [f"{f} is not among them" for f in files if f not in recipe["files"]]
    if changed:
        yield f"--input: {', '.join(changed[:3])}" + (f" and {len(changed) - 3:,} more" if len(changed) > 3 else "")
    before, now = found | fields, recipe | recipe["fields"]
    shown = lambda key, values: "not given" if values.get(key) is None else str(values[key])[:40]
    for key in now:
        if key not in ("files", "fields") and before.get(key) != now[key]:
            yield f"--{key.replace('_', '-')}: {shown(key, before)} → {shown(key, now)}"


def _discard(out: Path) -> None:
    # Remove what an unfinished run wrote.
    for name in ("tokenizer", *SPLITS):
        for path in (out / name, out / f"{name}.partial"):
            shutil.rmtree(path, ignore_errors=True)
    for path in (out / WORK).iterdir():
        if path.name != LOCK:
            path.unlink()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _missing(out: Path, report_sha256: str) -> str:
    # What is missing from the finished data, in words.
    try:
        open_data(out, verify=False)
    except (FileNotFoundError, ValueError) as error:
        return str(error).partition(";")[0]
    return "" if _sha256(out / REPORT) == report_sha256 else f"{out / REPORT} is missing or damaged"


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    # The operating system releases the lock when the process ends.
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(work / LOCK, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another tritale prepare is writing to {work.parent}; wait for it, or choose another --out") from None
        yield


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description:24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left")
    return Progress(*columns, TimeRemainingColumn(), console=console)


def _open_at(path: Path, size: int) -> BinaryIO:
    # Open for appending after the first `size` bytes.
    file = open(path, "r+b" if path.exists() else "wb")
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise UserError(f"{path} has fewer bytes than were written; {REMEDY}")
    file.truncate(size)
    file.seek(size)
    return file


def _write(path: Path, value: dict) -> None:
    with atomic_file(path) as temporary:
        write_json(temporary, value)
