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
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...common.errors import UserError
from ...common.files import atomic_file, locked, read_json_object
from ..shards import REMEDY, SplitWriter, open_at, sync
from ..tokenizer import END_OF_TEXT, Tokenizer
from . import deduplicate, report, splitting
from .deduplicate import BLANK, EXACT, NEAR, RECORD, SIGNATURE, TRAIN, VALIDATION, chunks
from .documents import Batch, Reader
from .inputs import find_files, import_package
from .job import (
    RECIPE,
    REPORT,
    SPLITS,
    WORK,
    Job,
    Options,
    changed_files,
    checksums,
    compare,
    damage,
    discard,
    listing_of,
    recipe_of,
    write_durably,
)
from .result import Result
from .tokenize import SAMPLE_CHARACTERS, BulkEncoder, encode, sample
from .workers import Workers

WARNING: dict = {"style": "yellow", "markup": False}  # of console.print
VALIDATION_SHARE, ENOUGH_VALIDATION = 0.01, 100  # by default: this share, but this number of documents or a tenth of all
BATCHES_PER_COMMIT = 16
N_STRANGEST = {"shortest": 3, "longest": 3, "most byte fallback": 4}
EXCERPT = 60  # characters


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
    out, console = Path(out), console or Console(quiet=True, markup=False)
    files = [file for file in find_files(inputs) if out.resolve() not in Path(file).resolve().parents]
    options.fields.check(files)
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    if given:
        given.is_chat = options.is_chat
    pool = Workers(workers)
    if options.dedup == "near":
        import_package("rensa", "--dedup near")
    recipe = recipe_of(files, options, given)
    work, (differences, finished) = out / WORK, compare(out, recipe)
    if finished is not None:
        if differences:
            raise UserError(f"{out} holds data made with other options ({differences}); choose another --out, or delete {out}")
        problem = damage(out, finished)
        if not problem:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its very end
            console.print(f"{out} was made from these files with these options before; nothing to do", markup=False)
            return read_json_object(out / REPORT, remedy=REMEDY)
        console.print(f"{out} was made before, but it is no longer complete ({problem}); it is made again", markup=False)
    try:
        with locked(work, "another tritale prepare"), pool, _progress(console) as progress:
            job = Job(files, recipe["files"], options, out, pool, progress)
            if differences:
                console.print(f"{out} holds unfinished data made with other options ({differences}); it is replaced", **WARNING)
            if differences or finished is not None:
                discard(out)
            write_durably(out / RECIPE, recipe)
            read = fingerprints(job)
            status, chosen = selection(job, read)
            tokenizer = given or trained_tokenizer(job, status)
            if read["marked"]:
                n = f"{read['marked']:,} documents contain {END_OF_TEXT} as ordinary text, the first at {read['marked_at']}"
                console.print(f"{n}; if it separates stories there, split them before", **WARNING)
            if chosen["validation"] < ENOUGH_VALIDATION:
                n = f"validation has only {chosen['validation']:,} documents"
                console.print(f"{n}, so its loss is inexact; --val-documents {ENOUGH_VALIDATION} or more documents help", **WARNING)
            if BulkEncoder(tokenizer).is_fallback:
                n = "fastokens is not installed (pip install fastokens): tokenizers encodes instead, several times slower"
                console.print(n, **WARNING)
            if not (out / "tokenizer" / "tokenizer.json").exists():
                tokenizer.save(out / "tokenizer")
            encoded = encoding(job, status, tokenizer)
            found = Result(job, tokenizer, status, read, chosen, encoded).report(preset_sizes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            problem = os.strerror(error.errno)
            raise OSError(f"{out} could not be written ({problem}); free some space and run the same command again: it resumes") from error
        raise
    write_durably(out / REPORT, found)
    report.write_html(out / "report.html", found)
    write_durably(out / RECIPE, recipe | {"finished": checksums(out)})
    shutil.rmtree(work)
    return found


# ---- the status of each document --------------------------------------------------------------------------------------------------------


def fingerprints(job: Job) -> dict:
    """Write work/documents.bin (RECORD per document) and, for near duplicates, work/signatures.bin; return the counts."""
    state: dict = {"documents": 0, "place": [0, 0], "normalised": 0, "marked": 0, "marked_at": "", "errors": {}, "first_errors": []}
    state |= job.load("fingerprints.json") or {}
    if state.get("done"):
        return state
    is_near = job.options.dedup == "near"
    outputs = {job.documents: RECORD.itemsize} | ({job.signatures: SIGNATURE.itemsize} if is_near else {})
    opened = [open_at(path, state["documents"] * size) for path, size in outputs.items()]
    reader = job.reader(state["errors"], state["first_errors"])
    total = sum(Path(f).stat().st_size for f in job.files if Path(f).is_file())
    task = job.progress.add_task("reading", total=total or None)

    def commit(**more: object) -> None:
        for file in opened:
            sync(file)
        job.save("fingerprints.json", state | more)

    arguments = lambda batch: (batch.texts, batch.groups, batch.places, is_near)
    for batch, (data, n_normalised, marked) in _batches(job, reader, state, deduplicate.fingerprints, arguments, commit):
        for file, part in zip(opened, data, strict=True):
            file.write(part)
        state["normalised"] += n_normalised
        state["marked"] += len(marked)
        state["marked_at"] = state["marked_at"] or next(iter(marked), "")
        state |= {"errors": batch.errors, "first_errors": batch.first_errors}
        job.progress.update(task, completed=batch.bytes_read)
    state |= {"errors": dict(reader.errors), "first_errors": reader.first_errors}
    if not state["documents"]:
        seen = "; ".join(f"{n} × {what}" for what, n in state["errors"].items())
        raise UserError(f"no document could be read from {len(job.files)} files: {seen}; the first: {state['first_errors'][0]}")
    commit(done=True)
    for file in opened:
        file.close()
    job.progress.update(task, completed=total)
    return state


def selection(job: Job, read: dict) -> tuple[np.ndarray, dict]:
    """The status of each document, (documents,) uint8, and the counts."""
    path, counts, options = job.work / "status.bin", job.load("selection.json"), job.options
    if counts and path.is_file() and path.stat().st_size == read["documents"]:
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
        "exact_across_splits_removed": given - kept,
        "near_across_splits_removed": near_across,
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
    if (job.out / "tokenizer" / "tokenizer.json").exists():
        return Tokenizer.load(job.out / "tokenizer")
    task = job.progress.add_task("training the tokenizer", total=None)
    tokenizer = Tokenizer.train(sample(job.reader(), status, job.documents, SAMPLE_CHARACTERS), job.options.vocab_size)
    job.progress.update(task, total=1, completed=1)
    return tokenizer


def encoding(job: Job, status: np.ndarray, tokenizer: Tokenizer) -> dict:
    """Write train/ and validation/; return the byte tokens and the strangest documents."""
    state = job.load("encoding.json") or {"documents": 0, "place": [0, 0], "splits": [None, None], "byte_tokens": [0, 0], "strangest": {}}
    writers = [
        SplitWriter(job.out / name, tokenizer, state=written, max_shard_tokens=job.options.max_shard_tokens, has_learnt=job.options.is_chat)
        for name, written in zip(SPLITS, state["splits"], strict=True)
        if not (state.get("done") and (job.out / name).exists())
    ]

    def commit(**more: object) -> None:
        state["splits"] = [writer.commit() for writer in writers]
        job.save("encoding.json", state | more)

    def kept(batch: Batch) -> list[list[int]]:
        part = status[batch.first : batch.first + len(batch.texts)]
        return [np.flatnonzero(part == split).tolist() for split in (TRAIN, VALIDATION)]

    def arguments(batch: Batch) -> tuple:
        splits = [([batch.texts[i] for i in indices], [batch.places[i] for i in indices]) for indices in kept(batch)]
        return str(job.out / "tokenizer"), tokenizer.hash, splits, job.options.is_chat

    if not state.get("done"):
        task = job.progress.add_task("encoding", total=len(status), completed=state["documents"])
        for batch, results in _batches(job, job.reader(), state, encode, arguments, commit):
            for i, (indices, (ids, lengths, characters, n_bytes, learnt)) in enumerate(zip(kept(batch), results, strict=True)):
                if len(lengths):
                    writers[i].add(ids, lengths, characters=int(characters.sum()), learnt=learnt)
                    state["byte_tokens"][i] += int(n_bytes.sum())
                    _note_strangest(state["strangest"], batch, indices, SPLITS[i], lengths, characters, n_bytes)
            job.progress.update(task, completed=batch.first + len(batch.texts))
        if changed := changed_files(job.listing, listing_of(job.files)):
            raise UserError(f"input changed while it was read ({changed}); run the same command again")
        if state["documents"] != len(status):
            raise UserError(f"{state['documents']:,} documents were read, {len(status):,} before: the input has changed; {REMEDY}")
        commit(done=True)
    for writer in writers:
        writer.finish()
    return state


def _batches(
    job: Job, reader: Reader, state: dict, function: Callable, arguments: Callable, commit: Callable
) -> Iterator[tuple[Batch, Any]]:
    # (batch, function(*arguments(batch))) for the documents after those of `state`, which is committed regularly.
    items = ((batch, arguments(batch)) for batch in reader.batches(state["documents"], state["place"]))
    for n, (batch, result) in enumerate(job.workers.map(function, items, lambda batch: batch.places[0]), 1):
        yield batch, result
        state |= {"documents": batch.first + len(batch.texts), "place": batch.place}
        if n % BATCHES_PER_COMMIT == 0:
            commit()


def _note_strangest(strangest: dict, batch: Batch, kept: list[int], name: str, lengths, characters, n_bytes) -> None:
    # Keeps the first few of each kind. The sort is stable, so of two equal ones the earlier is kept.
    share = n_bytes / np.maximum(lengths - 1, 1)  # without `<|endoftext|>`
    for kind, key in (("shortest", characters), ("longest", -characters), ("most byte fallback", -share)):
        best = strangest.setdefault(kind, [])
        for j in np.argsort(key, kind="stable")[: N_STRANGEST[kind]].tolist():
            if (len(best) == N_STRANGEST[kind] and key[j] >= best[-1]["key"]) or (kind == "most byte fallback" and not n_bytes[j]):
                break
            text, place = batch.texts[kept[j]], batch.places[kept[j]]
            best.append(
                {
                    "key": float(key[j]),
                    "split": name,
                    "place": place,
                    "characters": int(characters[j]),
                    "tokens": int(lengths[j]),
                    "byte_fallback": float(share[j]),
                    "excerpt": text[:EXCERPT] + "…" * (len(text) > EXCERPT),
                }
            )
            best.sort(key=lambda entry: entry["key"])
            del best[N_STRANGEST[kind] :]


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description:24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left")
    return Progress(*columns, TimeRemainingColumn(), console=console)
