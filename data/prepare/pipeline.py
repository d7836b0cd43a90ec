"""From raw text to training data: read → normalise → remove duplicates → split → tokenizer → shards → report.

    fingerprints   every document's hash, side and length into work/; for near duplicates a MinHash signature too
    selection      from the fingerprints: what each document is (select.py)
    tokenizer      loaded, or trained on a sample of the training documents
    encoding       the documents that are kept, read a second time, into train.partial/ and validation.partial/
    report         report.json, report.html (prepare_report.py); then work/ goes

Reading twice costs less than a tenth of the encoding, and lets the input stay where it is. Each step can be stopped at any moment, also
by SIGKILL, and goes on in the next run of the same command with the same result to the bit: what was written after the last commit is
cut off and written again. Memory does not grow with the input but for two bytes per document.
"""

import errno
import hashlib
import json
import os
import shutil
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...common.errors import UserError
from ...common.files import atomic_file, temporary_of
from ..built_in import open_data
from ..shards import REMEDY, STARTS, Split, SplitWriter, evenly
from ..tokenizer import FIXED_TOKENS, SPECIAL_TOKENS, Tokenizer
from . import select
from .bulk_encoder import BulkEncoder
from .read import EXTRA, Fields, Reader, find_files
from .select import BLANK, EXACT, NEAR, RECORD, SIGNATURE, TRAIN, VALIDATION, chunks

RECIPE, REPORT, WORK = "prepare.json", "report.json", "work"
VERSION = 1
SIDES = ("train", "validation")
BATCH_DOCUMENTS, BATCH_CHARACTERS = 2048, 1 << 20  # what a worker gets at once
BATCHES_PER_COMMIT = 16
SAMPLE_CHARACTERS = 6_000_000  # for training the tokenizer; more gains little, and takes 60 bytes of memory for each
PIECE = 1 << 16  # characters; the trainer takes more memory for a longer text
MEASURED_CHARACTERS = 1_000_000  # for the table of vocabulary sizes
PLACES = 100  # they are taken from
N_STRANGEST = {"shortest": 3, "longest": 3, "most byte fallback": 4}
EXCERPT = 60  # characters


@dataclass(frozen=True)
class Options:
    """What decides the data. The same options over the same files give the same data."""

    fields: Fields = field(default_factory=Fields)
    vocab_size: int = 6400  # unless there is a tokenizer
    tokenizer: str | None = None  # folder
    val_fraction: float = 0.01
    val_documents: int | None = None  # in place of val_fraction
    dedup: str = "exact"
    near_threshold: float = 0.8  # Jaccard similarity
    skip_errors: bool = False
    max_shard_tokens: int = 2**27

    def __post_init__(self):
        if self.dedup not in ("exact", "near", "off"):
            raise UserError(f"--dedup {self.dedup!r} must be exact, near or off")
        if self.val_documents is None and not 0 < self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction} must lie between 0 and 1, such as 0.01")
        if self.val_documents is not None and self.val_documents < 1:
            raise UserError(f"--val-documents {self.val_documents} must be at least 1")
        if not 0.5 <= self.near_threshold <= 1:
            raise UserError(f"--near-threshold {self.near_threshold} must lie between 0.5 and 1; 0.8 is usual")
        if self.tokenizer is None and self.vocab_size < len(FIXED_TOKENS) + 2:
            raise UserError(f"--vocab-size {self.vocab_size} must be at least {len(FIXED_TOKENS) + 2}; for Chinese stories try 6400")


def prepare(inputs: list[str], out: str | Path, options: Options, *, workers: int | None = None, console: Console | None = None) -> dict:
    """Make tokenizer/, train/ and validation/ in `out`, for `open_data`; returns what report.json holds.

    Raises ValueError for input that cannot be used, naming file and line, or where `out` holds other data; FileNotFoundError for missing
    input; OSError where the disk is full. After all of them the same command goes on where it was.
    """
    out, console = Path(out), console or Console(quiet=True)
    files = [file for file in find_files(inputs) if out.resolve() not in Path(file).resolve().parents]
    options.fields.check(files)
    given = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} must be at least 1; without it there is one for each core, at most 8")
    if options.dedup == "near":
        try:
            import rensa  # noqa: F401
        except ImportError:
            raise UserError(f"--dedup near needs the package rensa: {EXTRA}; or take --dedup exact") from None
    work = out / WORK
    if _is_finished(out, _recipe(files, options, given)):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its very end
        problem = _missing(out)
        if not problem:
            console.print(f"{out} was made from these files with these options before; nothing to do", markup=False)
            return json.loads((out / REPORT).read_text(encoding="utf-8"))
        console.print(f"{out} was made before, but it is no longer whole ({problem}); it is made again", markup=False)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with _only_one(work), _Workers(workers, options.tokenizer) as pool, _progress(console) as progress:
            _write_json(out / RECIPE, _recipe(files, options, given))
            read = fingerprints(files, options, work, pool, progress)
            fates, chosen = selection(options, work, read, progress)
            tokenizer = given or trained_tokenizer(files, options, fates, work, out, progress)
            if BulkEncoder(tokenizer).is_fallback:
                console.print(f"fastokens is not installed ({EXTRA}): tokenizers encodes instead, several times slower", style="yellow")
            if not (out / "tokenizer").exists():
                _save_tokenizer(tokenizer, out / "tokenizer")
            pool.use(out / "tokenizer")
            encoded = encoding(files, options, fates, tokenizer, out, work, pool, progress)
            report = report_of(files, options, read, chosen, encoded, fates, tokenizer, out, work, pool, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            problem = os.strerror(error.errno)
            raise OSError(f"{out} could not be written ({problem}); free some space and run the same command again: it goes on") from error
        raise
    _write_json(out / REPORT, report)
    from .report import write_html

    write_html(out / "report.html", report)
    _write_json(out / RECIPE, _recipe(files, options, given) | {"finished": True})
    shutil.rmtree(work)
    return report


# ---- what each document is --------------------------------------------------------------------------------------------------------------


def fingerprints(files: list[str], options: Options, work: Path, pool: "_Workers", progress: Progress) -> dict:
    """Write work/documents.bin (RECORD per document) and, for near duplicates, work/signatures.bin; returns what was met on the way."""
    state = _read_json(work / "fingerprints.json") or {"documents": 0, "place": [0, 0], "normalised": 0, "errors": {}, "first_errors": []}
    if state.get("done"):
        return state
    is_near = options.dedup == "near"
    outputs = {work / "documents.bin": RECORD.itemsize} | ({work / "signatures.bin": SIGNATURE.itemsize} if is_near else {})
    opened = [_open_at(path, state["documents"] * size) for path, size in outputs.items()]
    reader = Reader(files, options.fields, options.skip_errors, Counter(state["errors"]), state["first_errors"])
    task = progress.add_task("reading", total=sum(Path(f).stat().st_size for f in files if Path(f).is_file()) or None)

    def commit(**more):
        for file in opened:
            file.flush()
            os.fsync(file.fileno())
        _write_json(work / "fingerprints.json", state | more)

    batches = _batches(reader, state["place"])
    for n, (batch, (data, n_normalised)) in enumerate(pool.map(_fingerprint, ((b, (b.texts, b.groups, is_near)) for b in batches)), 1):
        for file, part in zip(opened, data, strict=True):
            file.write(part)
        state["documents"] += len(batch.texts)
        state["normalised"] += n_normalised
        state |= {"place": batch.place, "errors": batch.errors, "first_errors": batch.first_errors}
        progress.update(task, completed=batch.bytes_read)
        if n % BATCHES_PER_COMMIT == 0:
            commit()
    state |= {"errors": dict(reader.errors), "first_errors": reader.first_errors}
    if not state["documents"]:
        seen = "; ".join(f"{n} × {what}" for what, n in state["errors"].items()) or "the files are empty"
        raise UserError(f"no document could be read from {len(files)} files: {seen}")
    commit(done=True)
    for file in opened:
        file.close()
    progress.update(task, completed=progress.tasks[task].total)
    return state


def _fingerprint(texts: list[str], groups: list[str | None], is_near: bool) -> tuple[list[bytes], int]:
    records = np.zeros(len(texts), RECORD)
    n_normalised = 0
    normal = []
    for i, text in enumerate(texts):
        normal.append(normalise(text))
        n_normalised += normal[i] != text
        records[i] = _record(normal[i], groups[i])
    return [records.tobytes()] + ([select.signatures(normal).tobytes()] if is_near else []), n_normalised


def _record(text: str, group: str | None) -> tuple:
    digest = hashlib.blake2b(text.encode(), digest_size=24).digest()
    a, b, side = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if group is not None:
        side = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little")
    return (a, b), side, 0 if text.isspace() else len(text)


def normalise(text: str) -> str:
    """NFC, and line ends as \\n; nothing else."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


def selection(options: Options, work: Path, read: dict, progress: Progress) -> tuple[np.ndarray, dict]:
    """What becomes of each document: (documents,) uint8, and the counts."""
    fates_path, counts = work / "fates.bin", _read_json(work / "selection.json")
    if counts:
        return np.fromfile(fates_path, np.uint8), counts
    documents, n = work / "documents.bin", read["documents"]
    task = progress.add_task("removing duplicates", total=None)
    fates = np.zeros(n, np.uint8)
    for first, records in chunks(documents, RECORD):
        fates[first : first + len(records)][records["characters"] == 0] = BLANK
    if options.dedup != "off":
        select.exact_duplicates(documents, n, fates)
    if options.val_documents is None:
        threshold = select.threshold_of_fraction(options.val_fraction)
    else:
        threshold = select.threshold_of_documents(documents, fates, options.val_documents)
    for first, records in chunks(documents, RECORD):
        part = fates[first : first + len(records)]
        part[(part == TRAIN) & (records["side"] < np.uint64(threshold))] = VALIDATION
    near_across = near_leaks = None
    if options.dedup == "near":
        signatures = work / "signatures.bin"

        def track(items):
            progress.update(task, total=len(items))
            for item in items:
                yield item
                progress.advance(task)

        near_across = select.near_duplicates(signatures, fates, options.near_threshold, track)
        near_leaks = select.count_near_leaks(signatures, fates, options.near_threshold)
    given, kept = select.count_exact_leaks(documents, n, fates, threshold)
    totals = [int(np.count_nonzero(fates == fate)) for fate in range(5)]
    if not totals[TRAIN] or not totals[VALIDATION]:
        raise UserError(
            f"of {n:,} documents {totals[TRAIN]:,} are for training and {totals[VALIDATION]:,} for validation, and both need one; "
            "change --val-fraction or --val-documents"
        )
    counts = {
        **{side: totals[i] for i, side in enumerate(SIDES)},
        "exact_duplicates": totals[EXACT],
        "near_duplicates": totals[NEAR],
        "blank": totals[BLANK],
        "val_fraction": threshold / 2**64,
        "exact_across_sides_removed": given - kept,
        "near_across_sides_removed": near_across,
        "exact_leaks": kept,
        "near_leaks": near_leaks,
    }
    with atomic_file(fates_path) as aside:
        fates.tofile(aside)
    _write_json(work / "selection.json", counts)
    progress.update(task, total=1, completed=1)
    return fates, counts


# ---- tokenizer --------------------------------------------------------------------------------------------------------------------------


def trained_tokenizer(files: list[str], options: Options, fates: np.ndarray, work: Path, out: Path, progress: Progress) -> Tokenizer:
    """The tokenizer in `out`, or one trained on a sample of the training documents."""
    if (out / "tokenizer").exists():
        return Tokenizer.load(out / "tokenizer")
    task = progress.add_task("training the tokenizer", total=None)
    tokenizer = Tokenizer.train(sample(files, options, fates, work, SAMPLE_CHARACTERS), options.vocab_size)
    progress.update(task, total=1, completed=1)
    return tokenizer


def sample(files: list[str], options: Options, fates: np.ndarray, work: Path, characters: int) -> list[str]:
    """Training documents with about so many characters together, chosen by their hashes, in the order of the input; long ones in pieces,
    and where they are few, the last one cut off."""
    path = work / "documents.bin"
    of_side = lambda first, records: fates[first : first + len(records)] == TRAIN
    total = sum(int(r["characters"][of_side(first, r)].sum(dtype=np.int64)) for first, r in chunks(path, RECORD))
    limit = min(int(characters / max(total, 1) * 2**64), 2**64 - 1)
    parts = [first + np.flatnonzero(of_side(first, r) & (r["hash"][:, 0] <= np.uint64(limit))) for first, r in chunks(path, RECORD)]
    wanted = iter(np.concatenate(parts).tolist())
    texts, room, number = [], round(1.1 * characters), next(wanted, int(np.argmax(fates == TRAIN)))  # all may have high hashes
    for i, (_, document) in enumerate(Reader(files, options.fields, options.skip_errors).read()):
        if i == number:
            text = normalise(document.text)[:room]
            texts += (text[i : i + PIECE] for i in range(0, len(text), PIECE))
            room -= len(text)
            number = next(wanted, None)
            if number is None or not room:
                break
    return texts


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    aside = folder.with_name("tokenizer.partial")
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer.save(aside)
    for path in aside.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    aside.rename(folder)


# ---- shards -----------------------------------------------------------------------------------------------------------------------------


def encoding(
    files: list[str], options: Options, fates: np.ndarray, tokenizer: Tokenizer, out: Path, work: Path, pool: "_Workers", progress: Progress
) -> dict:
    """Write train/ and validation/; returns byte tokens and the strangest documents."""
    path = work / "encoding.json"
    state = _read_json(path) or {"documents": 0, "place": [0, 0], "splits": [None, None], "byte_tokens": [0, 0], "strangest": {}}
    if state.get("done") and all((out / side).exists() for side in SIDES):
        return state
    sizes = dict(max_shard_tokens=options.max_shard_tokens)
    writers = [
        None if state.get("done") and (out / side).exists() else SplitWriter(out / side, tokenizer, state=split, **sizes)
        for side, split in zip(SIDES, state["splits"], strict=True)
    ]

    def commit(**more):
        state["splits"] = [writer.commit() for writer in writers]
        _write_json(path, state | more)

    if not state.get("done"):
        task = progress.add_task("encoding", total=len(fates), completed=state["documents"])
        reader = Reader(files, options.fields, options.skip_errors)
        work_items = _kept(_batches(reader, state["place"]), fates, state["documents"])
        for n, (batch, results) in enumerate(pool.map(_encode, work_items), 1):
            for side, (ids, lengths, characters, n_bytes) in enumerate(results):
                if len(lengths):
                    writers[side].add(ids, lengths, characters=int(characters.sum()))
                    state["byte_tokens"][side] += int(n_bytes.sum())
                    _note_strangest(state["strangest"], batch, side, lengths, characters, n_bytes, files)
            state["documents"] += len(batch.texts)
            state["place"] = batch.place
            progress.update(task, completed=state["documents"])
            if n % BATCHES_PER_COMMIT == 0:
                commit()
        if state["documents"] != len(fates):
            raise UserError(f"{state['documents']:,} documents were read, {len(fates):,} before: an input file has changed; {REMEDY}")
        commit(done=True)
    for writer in writers:
        if writer:
            writer.finish()
    return state


def _encode(*sides: list[str]) -> list[tuple]:
    # For each side (ids, lengths, characters, byte tokens), per document but for the ids.
    results = []
    for texts in sides:
        texts = [normalise(text) for text in texts]
        ids, lengths = _encoder.encode(texts) if texts else (np.empty(0, np.uint16), np.empty(0, np.int64))
        is_byte = (ids >= len(SPECIAL_TOKENS)) & (ids < len(FIXED_TOKENS))
        ends = np.cumsum(lengths)
        total = np.concatenate([[0], np.cumsum(is_byte, dtype=np.int64)])
        n_bytes = total[ends] - total[ends - lengths]
        results.append((ids, lengths, np.array([len(text) for text in texts], np.int64), n_bytes))
    return results


def _kept(batches, fates: np.ndarray, done: int) -> Iterator[tuple]:
    # (batch, its texts by side); `batch.of_side` gets the places of these in the batch.
    for batch in batches:
        fate = fates[done : done + len(batch.texts)]
        batch.of_side = [np.flatnonzero(fate == side).tolist() for side in (TRAIN, VALIDATION)]
        yield batch, tuple([batch.texts[i] for i in of] for of in batch.of_side)
        done += len(batch.texts)


def _note_strangest(strangest: dict, batch: "_Batch", side: int, lengths, characters, n_bytes, files: list[str]) -> None:
    # Keeps the first few of each kind. The sort is stable, so of two alike the earlier stays.
    share = n_bytes / lengths
    for kind, key in (("shortest", characters), ("longest", -characters), ("most byte fallback", -share)):
        best = strangest.setdefault(kind, [])
        for j in np.argsort(key, kind="stable")[: N_STRANGEST[kind]].tolist():
            if (len(best) == N_STRANGEST[kind] and key[j] >= best[-1]["key"]) or (kind == "most byte fallback" and not n_bytes[j]):
                break
            i = batch.of_side[side][j]
            text, (file, line) = batch.texts[i], batch.lines[i]
            best.append(
                {
                    "key": float(key[j]),
                    "side": SIDES[side],
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


def report_of(
    files, options: Options, read: dict, chosen: dict, encoded: dict, fates, tokenizer: Tokenizer, out: Path, work: Path, pool, progress
) -> dict:
    """All that the report tells, as JSON."""
    from .report import vocabulary_table

    splits = {side: Split.open(out / side, verify=False) for side in SIDES}
    characters = np.zeros(64, np.int64)
    for first, records in chunks(work / "documents.bin", RECORD):
        kept = fates[first : first + len(records)] <= VALIDATION
        characters += np.bincount(length_bin(records["characters"][kept]), minlength=64)
    tokens = np.zeros(64, np.int64)
    for split in splits.values():
        last = np.empty(0, np.int64)
        for _, starts in chunks(split.folder / STARTS, split.starts.dtype):  # read, since mapped pages count as memory
            tokens += np.bincount(length_bin(np.diff(np.concatenate([last, starts]))), minlength=64)
            last = starts[-1:]
    task = progress.add_task("comparing vocabularies", total=None)
    texts = [_some(splits[side], tokenizer, n) for side, n in zip(SIDES, (MEASURED_CHARACTERS, MEASURED_CHARACTERS // 5), strict=True)]
    table = vocabulary_table(*texts, pool, lambda done, total: progress.update(task, completed=done, total=total))
    return {
        "files": len(files),
        "bytes": sum(Path(f).stat().st_size for f in files if Path(f).is_file()),
        "documents_read": read["documents"],
        "normalised": read["normalised"],
        "errors": read["errors"],
        "first_errors": read["first_errors"],
        "selection": chosen,
        "options": asdict(options),
        "vocab_size": tokenizer.vocab_size,
        "splits": {
            side: {
                "documents": split.n_documents,
                "characters": split.characters,
                "tokens": split.n_tokens,
                "shards": len(split.shards),
                "characters_per_token": split.characters / (split.n_tokens - split.n_documents),
                "byte_fallback_share": encoded["byte_tokens"][i] / (split.n_tokens - split.n_documents),
            }
            for i, (side, split) in enumerate(splits.items())
        },
        "lengths": {"edges": [length_edge(i) for i in range(65)], "characters": characters.tolist(), "tokens": tokens.tolist()},
        "vocabularies": table,
        "strangest": encoded["strangest"],
    }


def _some(split: Split, tokenizer: Tokenizer, characters: int) -> list[str]:
    # At most about so many characters, as runs of documents from places evenly spread over the split, since each page of the mapped shards
    # that is touched counts as memory. A document longer than its place's share is cut off. Decoding gives them back as they were.
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


def length_bin(lengths: np.ndarray) -> np.ndarray:
    """The bar of the histogram that each length belongs to: four to a doubling."""
    return np.floor(4 * np.log2(np.maximum(lengths, 1))).astype(np.int64).clip(0, 63)


def length_edge(i: int) -> float:
    return 2 ** (i / 4)


# ---- machinery: batches, workers, files -------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    texts: list[str]
    groups: list[str | None]
    lines: list[tuple[int, int]]  # (number of the file, line)
    place: list[int]  # after it: number of the file, documents read of that file
    errors: dict
    first_errors: list[str]
    bytes_read: int
    of_side: list | None = None


def _batches(reader: Reader, place: list[int]) -> Iterator[_Batch]:
    texts, groups, lines, characters = [], [], [], 0
    (file, n_of_file), last = place, None

    def batch():
        return _Batch(texts, groups, lines, [file, n_of_file], dict(reader.errors), list(reader.first_errors), reader.bytes_read)

    for number, document in reader.read(file, n_of_file):
        if number != file:
            file, n_of_file = number, 0
        n_of_file += 1
        texts.append(document.text)
        groups.append(document.group)
        lines.append((number, document.line))
        characters += len(document.text)
        if len(texts) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            last = batch()
            yield last
            texts, groups, lines, characters = [], [], [], 0
    if texts:
        yield batch()


_encoder: BulkEncoder | None = None  # of a worker


def _set_up_worker(tokenizer: str | None) -> None:
    global _encoder
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # the processes share the cores already
    if tokenizer:
        _encoder = BulkEncoder(Tokenizer.load(tokenizer))
    if parent := parent_process():  # die with it, also where it is killed
        Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


class _Workers:
    """Worker processes; with one, this process does the work."""

    def __init__(self, n: int | None, tokenizer: str | None):
        self.n = n or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self._tokenizer, self._pool = tokenizer, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def use(self, tokenizer: Path) -> None:
        """From now on the workers encode with this one."""
        if self._tokenizer is None:
            self.stop()
        self._tokenizer = str(tokenizer)
        if self.n == 1:
            _set_up_worker(self._tokenizer)

    def map(self, function: Callable, items: Iterable[tuple]) -> Iterator[tuple]:
        """(item, function(*arguments)) for each (item, arguments), in order, a few ahead."""
        if self.n == 1:
            yield from ((item, function(*arguments)) for item, arguments in items)
            return
        if not self._pool:
            # Not forked: this process may have threads.
            self._pool = ProcessPoolExecutor(self.n, get_context("spawn"), _set_up_worker, (self._tokenizer,))
        ahead = deque()
        for item, arguments in items:
            ahead.append((item, self._pool.submit(function, *arguments)))
            if len(ahead) > 2 * self.n:
                item, future = ahead.popleft()
                yield item, future.result()
        for item, future in ahead:
            yield item, future.result()

    def stop(self) -> None:
        """End the processes, and with them what they hold; the next call starts others."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _recipe(files: list[str], options: Options, tokenizer: Tokenizer | None) -> dict:
    listing = {}
    for name in files:
        stat = Path(name).stat() if Path(name).is_file() else None
        listing[name] = [stat.st_size, stat.st_mtime_ns] if stat else None
    chosen = asdict(options) | {"vocab_size": None if tokenizer else options.vocab_size, "tokenizer": tokenizer and tokenizer.hash}
    del chosen["skip_errors"]  # who was stopped by an error may go on with skip
    return json.loads(json.dumps({"format": "tritale-prepare", "version": VERSION, "files": listing, **chosen}))


def _is_finished(out: Path, recipe: dict) -> bool:
    """Raises ValueError where `out` holds something else."""
    begun = {out / WORK, temporary_of(out / RECIPE)}  # by a run that was killed before it could say what it makes
    if out.is_file() or (out.is_dir() and not (out / RECIPE).is_file() and not begun.issuperset(out.iterdir())):
        raise UserError(f"{out} exists and does not hold prepared data, so nothing is written there; choose another --out")
    found = _read_json(out / RECIPE)
    if not found:
        return False
    is_finished = found.pop("finished", False)
    differing = [key for key in recipe if recipe[key] != found.get(key)]
    if differing:
        what = ", ".join(f"{key} ({_short(found.get(key))} there, {_short(recipe[key])} now)" for key in differing)
        raise UserError(f"{out} holds data made in another way: {what}; choose another --out, or delete {out}")
    return is_finished


def _missing(out: Path) -> str:
    # What of the finished data is no longer there, in words.
    try:
        open_data(out, verify=False)
    except (FileNotFoundError, ValueError) as error:
        return str(error).partition(";")[0]
    return "" if (out / REPORT).is_file() else f"{out / REPORT} is missing"


def _short(value) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "…"


@contextmanager
def _only_one(work: Path):
    # The lock goes with the process, however it ends.
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(work / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another tritale prepare is writing to {work.parent}; wait for it, or choose another --out") from None
        yield


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _open_at(path: Path, size: int):
    # For appending after the first `size` bytes.
    file = open(path, "r+b" if path.exists() else "wb")
    file.seek(0, os.SEEK_END)
    if file.tell() < size:
        file.close()
        raise UserError(f"{path} has fewer bytes than were written; {REMEDY}")
    file.truncate(size)
    file.seek(size)
    return file


def _read_json(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_json(path: Path, value: dict) -> None:
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
