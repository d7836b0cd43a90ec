"""`prepare` end to end: nothing lost, no document in both splits, and the same bytes however often it was killed."""

import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chromium import headless_chromium
from rich.console import Console

from tritale.cli.main import main
from tritale.cli.prepare import PRESETS, preset_sizes
from tritale.common.errors import UserError
from tritale.common.files import locked
from tritale.data.built_in import open_data
from tritale.data.prepare import deduplicate, documents, pipeline, result, splitting, tokenize
from tritale.data.prepare import report as prepare_report
from tritale.data.prepare.deduplicate import NEAR, RECORD, TRAIN, VALIDATION, normalise
from tritale.data.prepare.documents import Fields, Reader
from tritale.data.prepare.pipeline import Options, prepare
from tritale.data.prepare.report import VOCABULARIES
from tritale.data.shards import write_split
from tritale.data.tokenizer import Tokenizer
from tritale.stories.generator import story


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([story(1, i).text for i in range(300)], 1000).save(folder)
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 16)
    monkeypatch.setattr(pipeline, "BATCHES_PER_COMMIT", 2)
    monkeypatch.setattr(prepare_report, "VOCABULARIES", VOCABULARIES[:1])


def stories(seed: int, n: int) -> list[str]:
    return [story(seed, i).text for i in range(n)]


def write_jsonl(path: Path, texts: list[str], **more: list) -> Path:
    rows = [{"text": text} | {key: values[i] for key, values in more.items()} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run(inputs, out: Path, tokenizer: Path, **options) -> dict:
    return prepare([str(i) for i in inputs], out, Options(tokenizer=str(tokenizer), **options), preset_sizes=preset_sizes, workers=1)


def texts_by_split(out: Path) -> tuple[list[str], list[str]]:
    tokenizer, *splits = open_data(out)
    train, validation = ([tokenizer.decode(split.document(i)) for i in range(split.n_documents)] for split in splits)
    return train, validation


def digests(out: Path) -> dict[str, str]:
    files = [path for folder in ("tokenizer", "train", "validation") for path in sorted((out / folder).iterdir())]
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_document_comes_back_once_and_in_order(tmp_path, tokenizer_folder, seed):
    texts = stories(seed, 200)
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    report = run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.2, max_shard_tokens=2000)
    train, validation = texts_by_split(tmp_path / "out")
    held_out = set(validation)
    assert train == [t for t in texts if t not in held_out] and validation == [t for t in texts if t in held_out]
    assert 15 <= len(validation) <= 70  # 40 ± 5.7
    assert report["splits"]["train"]["shards"] > 5
    assert report["splits"]["train"]["characters"] == sum(map(len, train))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["prepare.json", "report.json", "report.html", "tokenizer", "train", "validation"]
    )


def test_worker_processes_give_the_same_bytes(tmp_path, tokenizer_folder, seed, monkeypatch):
    row = {"vocab_size": 1, "found": 1, "characters_per_token": 1.0, "byte_fallback_share": 0.0}
    row["embedding_share"] = dict.fromkeys(PRESETS, 0.5)
    monkeypatch.setattr("tritale.data.prepare.report.vocabulary_table", lambda *arguments: [row])  # slow with processes
    file = write_jsonl(tmp_path / "a.jsonl", stories(seed, 60))
    run([file], tmp_path / "one", tokenizer_folder, val_fraction=0.2)
    prepare([str(file)], tmp_path / "two", Options(tokenizer=str(tokenizer_folder), val_fraction=0.2), workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_tokenizer_is_trained_on_training_documents_alone(tmp_path, seed):
    texts = stories(seed, 100) + ["".join(chr(0x4E00 + (seed + 50 * i + j) % 20000) for j in range(50)) for i in range(100)]
    report = prepare(
        [str(write_jsonl(tmp_path / "a.jsonl", texts))], tmp_path / "out", Options(vocab_size=2000, val_fraction=0.3), workers=1
    )
    train, validation = texts_by_split(tmp_path / "out")
    assert sorted(train + validation) == sorted(texts)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == saved(Tokenizer.train(train, 2000), tmp_path / "other")
    assert report["vocab_size"] == Tokenizer.load(tmp_path / "out" / "tokenizer").vocab_size


def saved(tokenizer: Tokenizer, folder: Path) -> bytes:
    tokenizer.save(folder)
    return (folder / "tokenizer.json").read_bytes()


def test_text_is_normalised_and_nothing_else(tmp_path, tokenizer_folder):
    texts = ["  e\u0301 ①ｱ\r\n一\r二\n\n", "从前", "山上"]
    report = run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer_folder, val_documents=1)
    train, validation = texts_by_split(tmp_path / "out")
    assert sorted(train + validation) == sorted(["  é ①ｱ\n一\n二\n\n", "从前", "山上"]) and report["normalised"] == 1


# ---- duplicates, splits, leaks ---------------------------------------------------------------------------------------------------------


def test_planted_exact_duplicates_are_all_removed(tmp_path, tokenizer_folder, seed):
    draw = random.Random(seed)
    texts = [*stories(seed, 150), "café\n" * 5]
    copies = [*draw.choices(texts[:-1], k=70), "café\r\n" * 5]
    mixed = texts + copies + ["", " \n"]
    draw.shuffle(mixed)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", mixed[i::3]) for i in range(3)]
    report = run(files, tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    train, validation = texts_by_split(tmp_path / "out")
    assert sorted(train + validation) == sorted(texts)
    assert (report["selection"]["exact_duplicates"], report["selection"]["blank"]) == (71, 2)
    in_order = dict.fromkeys(map(normalise, mixed[0::3] + mixed[1::3] + mixed[2::3]))
    assert train == [t for t in in_order if t in set(train)]  # the first of each stays
    off = run(files, tmp_path / "off", tokenizer_folder, val_fraction=0.3, dedup="off")
    assert sum(map(len, texts_by_split(tmp_path / "off"))) == 151 + 71
    assert off["selection"]["exact_leaks"] == 0  # without groups equal texts are in the same split


def altered(text: str, draw: random.Random) -> str:
    """`text` with one to three characters replaced, taken out or put in: a similarity of at least 0.85."""
    for _ in range(draw.randint(1, 3)):
        i = draw.randrange(len(text))
        text = text[:i] + draw.choice(["", "龘", text[i] + "龘"]) + text[i + 1 :]
    return text


def random_texts(seed: int, n: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(chr(draw.randrange(0x4E00, 0x5200)) for _ in range(draw.randrange(230, 400))) for _ in range(n)]


def test_planted_near_duplicates_and_leaks_are_all_removed(tmp_path, tokenizer_folder, seed):
    pytest.importorskip("rensa")
    draw = random.Random(seed)
    texts = random_texts(seed, 120)
    copies = {altered(text, draw): text for text in texts[:60]}
    mixed = texts + list(copies)
    draw.shuffle(mixed)
    file = write_jsonl(tmp_path / "a.jsonl", mixed)
    exact = run([file], tmp_path / "exact", tokenizer_folder, val_fraction=0.4)
    splits = [set(texts) for texts in texts_by_split(tmp_path / "exact")]
    n_leaks = sum((copy in splits[1]) != (text in splits[1]) for copy, text in copies.items())
    assert n_leaks > 5 and exact["selection"]["near_duplicates"] == 0 and exact["selection"]["near_leaks"] is None

    report = run([file], tmp_path / "near", tokenizer_folder, val_fraction=0.4, dedup="near")
    train, validation = texts_by_split(tmp_path / "near")
    kept = set(train + validation)
    for copy, text in copies.items():
        assert (copy in kept) + (text in kept) == 1
        if (copy in splits[1]) != (text in splits[1]):  # what leaked: the one in validation stays
            assert (copy if copy in splits[1] else text) in validation
    assert kept >= set(texts[60:]) and len(kept) == 120
    assert set(validation) <= splits[1] and set(train) <= splits[0]
    chosen = report["selection"]
    assert (chosen["near_duplicates"], chosen["near_across_splits_removed"], chosen["near_leaks"]) == (60, n_leaks, 0)


def test_the_near_leak_check_sees_planted_leaks(tmp_path, seed, monkeypatch):
    pytest.importorskip("rensa")
    draw = random.Random(seed)
    texts = random_texts(seed, 40)
    both = texts + [altered(text, draw) for text in texts[:15]]
    path = tmp_path / "signatures.bin"
    path.write_bytes(deduplicate.signatures(both).tobytes())
    status = np.array([VALIDATION] * 40 + [TRAIN] * 15, np.uint8)
    leaks = splitting.count_near_leaks(path, status, 0.7)
    assert 15 <= leaks <= 15 * deduplicate.BANDS
    assert splitting.count_near_leaks(path, np.full(55, TRAIN, np.uint8), 0.7) == 0
    # With all documents sorted in many small parts the same are found.
    monkeypatch.setattr(deduplicate, "SORTED_AT_ONCE", 7)
    monkeypatch.setattr(deduplicate, "ROWS_AT_ONCE", 11)
    assert splitting.count_near_leaks(path, status, 0.7) == leaks
    assert deduplicate.near_duplicates(path, status, 0.7) == 15
    assert (status == NEAR).tolist() == [False] * 40 + [True] * 15  # validation stays
    assert splitting.count_near_leaks(path, status, 0.7) == 0


def test_signatures_estimate_the_jaccard_similarity(seed):
    pytest.importorskip("rensa")
    draw = random.Random(seed)
    text = random_texts(seed, 1)[0]
    for other in [text[: len(text) // 2] + random_texts(seed + 1, 1)[0], altered(text, draw), "一二", "一二三四五六", ""]:
        shingles = lambda t: {t[i : i + 5] for i in range(max(1, len(t) - 4))} - {""}
        a, b = shingles(text), shingles(other)
        signature = deduplicate.signatures([other, text, other])
        assert (signature[0] == signature[2]).all()
        assert (signature[0] == signature[1]).mean() == pytest.approx(len(a & b) / len(a | b), abs=0.2)


def test_small_parts_find_the_same_exact_duplicates(tmp_path, tokenizer_folder, seed, monkeypatch):
    draw = random.Random(seed)
    texts = draw.choices(stories(seed, 40), k=100)
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    one = run([file], tmp_path / "a", tokenizer_folder, val_fraction=0.3)
    monkeypatch.setattr(deduplicate, "SORTED_AT_ONCE", 9)
    monkeypatch.setattr(deduplicate, "ROWS_AT_ONCE", 7)
    two = run([file], tmp_path / "b", tokenizer_folder, val_fraction=0.3)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") and one["lengths"] == two["lengths"]
    assert sum(two["lengths"]["tokens"]) == len(set(texts))


def test_adding_data_never_moves_a_document(tmp_path, tokenizer_folder, seed):
    texts = stories(seed, 300)
    first = write_jsonl(tmp_path / "b.jsonl", texts[:120])
    more = write_jsonl(tmp_path / "a.jsonl", texts[120:] + texts[:20])  # read before the others
    run([first], tmp_path / "small", tokenizer_folder, val_fraction=0.2)
    run([tmp_path / "*.jsonl"], tmp_path / "large", tokenizer_folder, val_fraction=0.2)
    small, large = texts_by_split(tmp_path / "small"), texts_by_split(tmp_path / "large")
    assert set(small[0]) <= set(large[0]) and set(small[1]) <= set(large[1]) and len(large[0]) + len(large[1]) == 300
    assert more.exists()


def test_a_number_of_validation_documents_is_kept_exactly(tmp_path, tokenizer_folder, seed):
    texts = stories(seed, 200)
    file = write_jsonl(tmp_path / "a.jsonl", texts + texts[:30])
    n = random.Random(seed).randrange(1, 190)
    report = run([file], tmp_path / "a", tokenizer_folder, val_documents=n)
    assert report["splits"]["validation"]["documents"] == n and report["splits"]["train"]["documents"] == 200 - n
    # The fraction that the report names holds out the same ones.
    run([file], tmp_path / "b", tokenizer_folder, val_fraction=report["selection"]["val_fraction"])
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    with pytest.raises(ValueError, match="--val-documents 200 leaves none"):
        run([file], tmp_path / "c", tokenizer_folder, val_documents=200)


def test_the_fraction_of_a_number_of_validation_documents_holds_out_the_same(tmp_path, seed):
    hashes = np.random.default_rng(seed).integers(0, 2**64, 1000, np.uint64)
    records = np.zeros(1000, RECORD)
    records["split_hash"] = hashes
    (tmp_path / "documents.bin").write_bytes(records.tobytes())
    for n in range(1, 1000, 37):
        threshold = splitting.threshold_of_documents(tmp_path / "documents.bin", np.zeros(1000, np.uint8), n)
        assert (hashes < np.uint64(threshold)).sum() == n  # except for two hashes that agree in 53 bits
        assert splitting.threshold_of_fraction(float(repr(threshold / 2**64))) == threshold


@pytest.mark.parametrize("how", ["val_fraction", "val_documents"])
def test_a_copy_in_a_training_group_does_not_move_a_held_out_text(tmp_path, tokenizer_folder, seed, how):
    texts = stories(seed, 60)
    groups = [f"主题{i % 20}" for i in range(60)]
    fields = Fields("text", group_key="theme")
    write_jsonl(tmp_path / "b.jsonl", texts, theme=groups)
    first = run(
        [tmp_path / "b.jsonl"],
        tmp_path / "small",
        tokenizer_folder,
        fields=fields,
        **{how: {"val_fraction": 0.3, "val_documents": 12}[how]},
    )
    train, validation = texts_by_split(tmp_path / "small")
    in_training = groups[texts.index(train[0])]
    write_jsonl(tmp_path / "a.jsonl", validation, theme=[in_training] * len(validation))  # read before the others
    fraction = first["selection"]["val_fraction"]
    run([tmp_path / "*.jsonl"], tmp_path / "large", tokenizer_folder, fields=fields, val_fraction=fraction)
    assert texts_by_split(tmp_path / "large") == (train, validation)


def test_groups_stay_together_and_equal_texts_of_two_groups_do_not_leak(tmp_path, tokenizer_folder, seed):
    draw = random.Random(seed)
    texts = stories(seed, 240)
    groups = [f"主题{draw.randrange(40)}" for _ in texts]
    copies = list(range(240))[:60]
    all_texts, all_groups = texts + [texts[i] for i in copies], groups + [f"主题{draw.randrange(40)}" for _ in copies]
    file = write_jsonl(tmp_path / "a.jsonl", all_texts, theme=all_groups)
    fields = Fields("text", group_key="theme")
    report = run([file], tmp_path / "out", tokenizer_folder, fields=fields, val_fraction=0.3)
    train, validation = texts_by_split(tmp_path / "out")
    threshold = splitting.threshold_of_fraction(0.3)
    held_out = {group for group in all_groups if deduplicate.record("", group)[1] < threshold}
    held_out_texts = {t for t, group in zip(all_texts, all_groups, strict=True) if group in held_out}
    assert set(validation) == held_out_texts
    assert sorted(train + validation) == sorted(texts) and report["selection"]["exact_leaks"] == 0
    n_leaks = sum((groups[i] in held_out) != (all_groups[240 + j] in held_out) for j, i in enumerate(copies))
    assert report["selection"]["exact_across_splits_removed"] == n_leaks > 0
    off = run([file], tmp_path / "off", tokenizer_folder, fields=fields, val_fraction=0.3, dedup="off")
    assert off["selection"]["exact_leaks"] == n_leaks  # found and reported
    assert "share documents" in (tmp_path / "off" / "report.html").read_text(encoding="utf-8")


# ---- killed, full disk, other data ----------------------------------------------------------------------------------------------------

DRIVER = """
import os, random, resource, signal, sys
from tritale.data import shards
from tritale.data.prepare import deduplicate, documents, pipeline, report
from tritale.data.prepare.pipeline import Options, prepare
out, tokenizer, dedup, kill_at, file_limit, batch, *inputs = sys.argv[1:]
documents.BATCH_DOCUMENTS, pipeline.BATCHES_PER_COMMIT, report.VOCABULARIES = int(batch), 2, (512,)
n = 0
def counted(function):
    def counting(*args, **kwargs):
        global n
        n += 1
        if n == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counting
os.fsync, os.rename, os.replace = map(counted, (os.fsync, os.rename, os.replace))
shards.SplitWriter.add = counted(shards.SplitWriter.add)
shards.SplitWriter.finish = counted(shards.SplitWriter.finish)
deduplicate.fingerprints = counted(deduplicate.fingerprints)
if int(file_limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_limit), int(file_limit)))
try:
    options = dict(tokenizer=tokenizer or None, vocab_size=600, val_fraction=0.2, dedup=dedup, max_shard_tokens=3000)
    prepare(inputs, out, Options(**options), workers=1)
except (ValueError, OSError) as error:
    sys.exit(f"tritale prepare: {error}")
print("steps", n, "peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def drive(inputs, out: Path, tokenizer, dedup: str, kill_at=0, file_limit=0, batch=16) -> subprocess.CompletedProcess:
    arguments = list(map(str, [out, tokenizer, dedup, kill_at, file_limit, batch, *inputs]))
    return subprocess.run([sys.executable, "-c", DRIVER, *arguments], capture_output=True, text=True, encoding="utf-8")


def number_after(word: str, text: str) -> int:
    match = re.search(rf"{word} (\d+)", text)
    assert match, text
    return int(match[1])


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, seed):
    draw = random.Random(seed)
    dedup = draw.choice(["near", "exact"]) if importable("rensa") else "exact"
    files = [write_jsonl(tmp_path / f"{i}.jsonl", stories(seed + i, 60)) for i in range(3)]
    complete = drive(files, tmp_path / "complete", "", dedup)
    n_steps = number_after("steps", complete.stdout)
    assert n_steps > 60
    for _ in range(6):
        killed = drive(files, tmp_path / "killed", "", dedup, kill_at=draw.randrange(1, n_steps // 3))
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
    assert drive(files, tmp_path / "killed", "", dedup).returncode == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "complete")
    one, two = (json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8")) for name in ("complete", "killed"))
    assert one == two
    assert not list((tmp_path / "killed").glob("*.partial")) and not (tmp_path / "killed" / "work").exists()


def importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of files")
def test_a_full_disk_is_named_and_the_next_run_resumes(tmp_path, tokenizer_folder, seed):
    file = write_jsonl(tmp_path / "a.jsonl", stories(seed, 200))
    run([file], tmp_path / "complete", tokenizer_folder, val_fraction=0.2, max_shard_tokens=3000)
    for limit in (2000, 4500):  # of the fingerprints; of the first shard
        full = drive([file], tmp_path / "full", tokenizer_folder, "exact", file_limit=limit)
        assert full.returncode == 1 and os.strerror(errno.EFBIG) in full.stderr
        assert str(tmp_path / "full") in full.stderr and "run the same command again" in full.stderr, full.stderr
        assert "Traceback" not in full.stderr
        assert not (tmp_path / "full" / "train").exists() and not (tmp_path / "full" / "validation").exists()
    assert drive([file], tmp_path / "full", tokenizer_folder, "exact").returncode == 0
    assert digests(tmp_path / "full") == digests(tmp_path / "complete")


def test_a_finished_folder_is_left_as_it_is_and_other_data_is_not_overwritten(tmp_path, tokenizer_folder, seed):
    file = write_jsonl(tmp_path / "a.jsonl", stories(seed, 50))
    report = run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.3) == json.loads(json.dumps(report))
    with pytest.raises(ValueError, match=r"made with other options \(--val-fraction: 0\.3 → 0\.2\)"):
        run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.2)
    with pytest.raises(ValueError, match=r"made with other options \(--vocab-size: not given → 6400; --tokenizer: [0-9a-f]+ → not given\)"):
        prepare([str(file)], tmp_path / "out", Options(val_fraction=0.3), workers=1)
    write_jsonl(file, stories(seed + 1, 50))
    with pytest.raises(ValueError, match=r"made with other options \(--input: .*a\.jsonl changed\)"):
        run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold prepared data"):
        run([file], tmp_path / "thesis", tokenizer_folder)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.txt"]


def test_unfinished_data_is_replaced_after_a_change_of_options_or_input(tmp_path, tokenizer_folder, seed):
    texts = stories(seed, 60)
    file, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    run([file], tmp_path / "complete", tokenizer_folder, val_fraction=0.3)
    with pytest.raises(ValueError, match="no key 'txt'"):
        run([file], out, tokenizer_folder, fields=Fields("txt"))
    with pytest.raises(ValueError, match="for validation, and both need one; try --val-documents 6"):
        run([file], out, tokenizer_folder, val_fraction=1e-9)
    (out / "train").mkdir()  # of a run that was killed between the splits
    output = io.StringIO()
    options = Options(tokenizer=str(tokenizer_folder), val_fraction=0.3)
    prepare([str(file)], out, options, workers=1, console=Console(file=output, width=400))
    assert "unfinished data made with other options (--val-fraction: 1e-09 → 0.3); it is replaced" in output.getvalue()
    assert digests(out) == digests(tmp_path / "complete")


def test_differences_are_named_as_options(tmp_path, tokenizer_folder, seed):
    texts, out = stories(seed, 60), tmp_path / "[b]"
    files = [write_jsonl(tmp_path / f"{name}.jsonl", texts, story=texts) for name in "abcde"]
    run(files[:4], out, tokenizer_folder)
    with pytest.raises(ValueError) as error:
        run(files[4:], out, tokenizer_folder, fields=Fields("story", group_key="text"), val_documents=3, dedup="off")
    for part in ("--text-key: text → story; --group-key: not given → text", "--val-documents: not given → 3; --dedup: exact → off"):
        assert part in str(error.value)
    assert "e.jsonl is new" in str(error.value) and "and 2 more" in str(error.value) and "{" not in str(error.value)
    recipe = out / "prepare.json"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace('"version": 2', '"version": 1'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\(version of prepare: 1 → 2; the data can still be used for training\)"):
        run(files[:4], out, tokenizer_folder)


@pytest.mark.parametrize("n, expected", [(2, 1), (60, 6), (300, 30)])
def test_small_data_keeps_enough_validation_documents(tmp_path, tokenizer_folder, seed, n, expected):
    file, output = write_jsonl(tmp_path / "a.jsonl", stories(seed, n)), io.StringIO()
    options = Options(tokenizer=str(tokenizer_folder))
    report = prepare([str(file)], tmp_path / "out", options, workers=1, console=Console(file=output, width=400))
    assert report["splits"]["validation"]["documents"] == expected
    assert f"validation has only {expected} documents" in output.getvalue()
    run([file], tmp_path / "again", tokenizer_folder, val_fraction=report["selection"]["val_fraction"])
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_endoftext_marks_inside_documents_are_reported(tmp_path, tokenizer_folder, seed):
    texts, output = stories(seed, 50), io.StringIO()
    texts[7] = "<|endoftext|>".join(texts[7:9])
    options = Options(tokenizer=str(tokenizer_folder), val_fraction=0.3)
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare([str(file)], tmp_path / "out", options, workers=1, console=Console(file=output, width=400))
    assert f"1 documents contain <|endoftext|> as ordinary text, the first at {file}:8; if" in output.getvalue()


@pytest.mark.parametrize("error", [UserError("no ids for it"), MemoryError(), Exception("of the library")])
@pytest.mark.parametrize("step", ["fingerprints", "encoding"])
def test_an_error_about_a_document_names_file_and_line(tmp_path, tokenizer_folder, seed, monkeypatch, step, error):
    texts = stories(seed, 50)
    bad = random.Random(seed).randrange(50)
    owner, name = {"fingerprints": (deduplicate, "signatures"), "encoding": (tokenize.BulkEncoder, "encode")}[step]
    original = getattr(owner, name)

    def fail(*arguments):
        if texts[bad] in arguments[-1]:
            raise error
        return original(*arguments)

    monkeypatch.setattr(owner, name, fail)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", some) for i, some in enumerate((texts[:20], texts[20:]))]
    line = f"{tmp_path}/{int(bad >= 20)}.jsonl:{bad % 20 + 1 if bad < 20 else bad - 19}"
    with pytest.raises(UserError if isinstance(error, UserError) else RuntimeError) as raised:
        run(files, tmp_path / "out", tokenizer_folder, val_fraction=0.3, dedup="near" if step == "fingerprints" else "exact")
    assert str(raised.value) == f"{line}: the document cannot be processed ({str(error) or 'MemoryError'})"


def test_an_error_of_many_documents_together_names_the_first_and_the_last(tmp_path, tokenizer_folder, seed, monkeypatch):
    encode = tokenize.BulkEncoder.encode

    def fail(encoder, texts):
        if len(texts) > 1:
            raise MemoryError
        return encode(encoder, texts)

    monkeypatch.setattr(tokenize.BulkEncoder, "encode", fail)
    with pytest.raises(RuntimeError, match=r"a\.jsonl:\d+ to .*a\.jsonl:\d+: the document cannot be processed \(MemoryError\)"):
        run([write_jsonl(tmp_path / "a.jsonl", stories(seed, 50))], tmp_path / "out", tokenizer_folder, val_fraction=0.3)


def test_when_no_document_can_be_read_the_first_error_is_shown(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "a.jsonl", ["一", "二"])
    with pytest.raises(UserError, match=r"from 1 files: 2 × no key 'story'; the first: .*a\.jsonl:1: no key 'story'; keys there: text"):
        run([file], tmp_path / "out", tokenizer_folder, fields=Fields("story"), skip_errors=True)


def test_brackets_in_messages_are_text(tmp_path, seed, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    file, out, output = write_jsonl(tmp_path / "a.jsonl", stories(seed, 50)), tmp_path / "[b] [/x]", io.StringIO()
    for _ in range(2):  # made, then found
        prepare([str(file)], out, Options(vocab_size=400), workers=1, console=Console(file=output, width=400))
    assert "pip install fastokens" in output.getvalue() and f"{out} was made from these files" in output.getvalue()


def test_a_finished_folder_loses_what_a_kill_left_and_gets_back_what_was_deleted(tmp_path, tokenizer_folder, seed):
    file, out = write_jsonl(tmp_path / "a.jsonl", stories(seed, 50)), tmp_path / "out"
    run([file], out, tokenizer_folder, val_fraction=0.3)
    before = digests(out)
    (out / "work").mkdir()
    (out / "work" / "encoding.json").write_text('{"done": true}', encoding="utf-8")
    run([file], out, tokenizer_folder, val_fraction=0.3)
    assert not (out / "work").exists()
    for missing in ("train", "tokenizer"):
        shutil.rmtree(out / missing)
        run([file], out, tokenizer_folder, val_fraction=0.3)
        assert digests(out) == before and not (out / "work").exists()
    for damaged in ("validation/tokens-00000.bin", "train/index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        content = bytearray((out / damaged).read_bytes())
        content[random.Random(seed).randrange(len(content))] ^= 4
        (out / damaged).write_bytes(content)
        run([file], out, tokenizer_folder, val_fraction=0.3)
        assert digests(out) == before, damaged


def test_two_at_once_do_not_mix(tmp_path, tokenizer_folder, seed):
    with locked(tmp_path / "out" / "work", "another process"):
        with pytest.raises(ValueError, match="work is in use by another tritale prepare; wait"):
            run([write_jsonl(tmp_path / "a.jsonl", stories(seed, 50))], tmp_path / "out", tokenizer_folder)


@pytest.mark.parametrize("n", [40, 50])
def test_an_input_that_changes_between_the_passes_is_named(tmp_path, tokenizer_folder, seed, monkeypatch, n):
    file = write_jsonl(tmp_path / "a.jsonl", stories(seed, 50))
    encoding = pipeline.encoding

    def change(*arguments):
        write_jsonl(file, stories(seed + 1, n))
        return encoding(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encoding", change)
        with pytest.raises(ValueError, match=r"input changed while it was read \(.*a\.jsonl changed\); run the same command again"):
            run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    assert not (tmp_path / "out" / "train").exists()
    assert run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.3)["documents_read"] == n


def test_a_tokenizer_that_does_not_match_is_named(tmp_path, tokenizer_folder, seed):
    file = write_jsonl(tmp_path / "a.jsonl", stories(seed, 50))
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        run([file], tmp_path / "out", tmp_path / "nothing")
    path = tmp_path / "other"
    Tokenizer.load(tokenizer_folder).save(path)
    text = (path / "tokenizer.json").read_text(encoding="utf-8").replace("<|im_start|>", "<|user|>")
    (path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"not one that Tokenizer\.train made"):
        run([file], tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_input(tmp_path, tokenizer_folder, seed):
    texts = stories(seed, 1000)
    peaks = []
    for copies in (1, 30):  # 0.9 and 26 MB
        with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as file:
            for _ in range(copies):
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        done = drive([tmp_path / "a.jsonl"], tmp_path / f"out{copies}", tokenizer_folder, "exact", batch=512)
        assert done.returncode == 0, done.stderr
        peaks.append(number_after("peak", done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks  # MiB; the text alone would take 20


def test_long_documents_are_cut_to_what_is_measured(tmp_path, tokenizer_folder, seed):
    tokenizer = Tokenizer.load(tokenizer_folder)
    long = "".join(stories(seed, 400))  # some 120,000 characters
    for n, texts in enumerate([[long[i:] for i in range(6)], [*stories(seed, 500), long], stories(seed, 500), ["龘" * 5000]]):
        split = write_split(tmp_path / str(n), texts, tokenizer)
        some = result.excerpts(split, tokenizer, 10_000)
        assert 3_000 < sum(map(len, some)) < 13_000 and all(any(t.startswith(s) for t in texts) for s in some)
        assert result.excerpts(split, tokenizer, 10 * split.characters) == texts


def test_long_documents_are_cut_for_the_tokenizer(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(tokenize, "PIECE", 300)
    long = "".join(stories(seed, 40))
    file = write_jsonl(tmp_path / "a.jsonl", [long[i:] for i in range(6)])
    path = tmp_path / "documents.bin"
    records = np.array([deduplicate.record(long[i:], None) for i in range(6)], RECORD)
    for hashes in (0, 2**64 - 1):  # all are wanted; none is
        records["hash"] = hashes
        path.write_bytes(records.tobytes())
        texts = tokenize.sample(Reader([str(file)], Fields()), np.zeros(6, np.uint8), path, 1000)
        assert 1000 <= sum(map(len, texts)) <= 1100 and long.startswith("".join(texts)[:1000]) and max(map(len, texts)) <= 300


# ---- the command and its report -------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_report_and_writes_a_page(tmp_path, tokenizer_folder, seed, capsys):
    texts = [*stories(seed, 60), "<script>alert(1)</script>🜁🜂🜃", "[red]短[/red]"]
    raw, out = tmp_path / "raw", tmp_path / "raw" / "out"  # what is written into the input's folder is not read
    raw.mkdir()
    (raw / "b.csv").write_text("text,genre\n", encoding="utf-8")
    write_jsonl(raw / "a.jsonl", texts)
    with open(raw / "a.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": 3}\n{"text": "没完\n')
    command = ["prepare", "--input", str(raw), "--tokenizer", str(tokenizer_folder), "--workers", "1", "--val-documents", "5"]
    with pytest.raises(SystemExit, match=r"tritale prepare: .*a\.jsonl:63: a number under 'text', not a string"):
        main([*command, "--out", str(out)])
    assert not (out / "train").exists()
    main([*command, "--on-error", "skip", "--out", str(out)])
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert sum(report["errors"].values()) == len(report["first_errors"]) == 3
    assert f"--data.source {out} --out_dir {out}-run" in printed
    assert all(f"{raw / name}:{line}: " in printed.replace("\n", "") for name, line in (("a.jsonl", 63), ("a.jsonl", 64), ("b.csv", 1)))
    assert "left out, broken           3" in printed and "[red]短[/red]" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;🜁" in page and "<script" not in page
    assert not re.search(r"(src|href)=|http", page)
    assert page.count("<svg") == 4 and "a.jsonl:61" in page
    kinds = {kind: [entry["excerpt"] for entry in entries] for kind, entries in report["strangest"].items()}
    assert sum(map(len, kinds.values())) == 10
    by_length = sorted(texts, key=len)
    assert [e["characters"] for e in report["strangest"]["shortest"]] == [len(t) for t in by_length[:3]]
    assert [e["characters"] for e in report["strangest"]["longest"]] == [len(t) for t in by_length[:-4:-1]]
    assert kinds["most byte fallback"][0] == texts[-2]
    assert sum(report["lengths"]["characters"]) == sum(report["lengths"]["tokens"]) == 62


def test_the_report_counts_what_is_in_the_shards(tmp_path, tokenizer_folder, seed):
    texts = stories(seed, 100)
    report = run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    tokenizer, *splits = open_data(tmp_path / "out")
    for split, name, split_texts in zip(splits, ("train", "validation"), texts_by_split(tmp_path / "out"), strict=True):
        stats, found = tokenizer.stats(split_texts), report["splits"][name]
        assert found["characters_per_token"] == pytest.approx(stats.chars_per_token)
        assert found["byte_fallback_share"] == pytest.approx(stats.byte_fallback_share)
        assert (found["documents"], found["tokens"]) == (split.n_documents, split.n_tokens)
    (row,) = report["vocabularies"]
    assert row["vocab_size"] == 2048
    assert row["embedding_share"]["microstories-44m"] == pytest.approx(2048 * 512 / (2048 * 512 + 6 * 512 * (24 * 48 + 3 * 768)))


def test_the_table_of_vocabularies_has_a_row_for_each_size(tmp_path, tokenizer_folder, seed, monkeypatch):
    monkeypatch.setattr(prepare_report, "VOCABULARIES", (300, 400, 30_000, 60_000))
    report = run([write_jsonl(tmp_path / "a.jsonl", stories(seed, 60))], tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    rows = report["vocabularies"]
    assert [row["vocab_size"] for row in rows] == [300, 400, 30_000, 60_000]
    assert [row["characters_per_token"] is None for row in rows] == [False, False, True, True]
    body = 6 * 512 * (24 * 48 + 3 * 768)
    shares = [row["embedding_share"]["microstories-44m"] for row in rows]
    assert shares == pytest.approx([n * 512 / (n * 512 + body) for n in (300, 400, 30_000, 60_000)])
    printed, page = printed_at_80_columns(report), (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (printed, page):
        assert "60,000" in text and f"gives {rows[-1]['found']:,} entries and no more" in text
    assert re.search(r"60,000 +│ – +│ – +│ \d+% +│ 7\d%", printed)
    points = [len(line.split()) for line in re.findall(r'points="([^"]*)"', page)]
    assert points == [2, 4, 4]
    none = [row | {"characters_per_token": None} for row in rows]
    prepare_report.write_html(tmp_path / "none.html", report | {"vocabularies": none})
    assert (tmp_path / "none.html").read_text(encoding="utf-8").count("<polyline") == 2


def printed_at_80_columns(report: dict) -> str:
    output = io.StringIO()
    prepare_report.print_report(report, Console(width=80, highlight=False, file=output))
    return output.getvalue()


def test_the_tables_are_complete_at_80_columns_and_show_control_characters_escaped(tmp_path, tokenizer_folder, seed):
    name = "s-of-many-letters-" * 4 + ".jsonl"
    file = write_jsonl(tmp_path / name, [*stories(seed, 50), "\x1b[31m\u3000红\t色\n\u009b1m", *"一二三"])
    report = run([file], tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    printed, page = printed_at_80_columns(report), (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "microstories-44m" in printed and max(map(len, printed.splitlines())) <= 80
    strangest = printed.partition("Unusual documents")[2].splitlines()
    cells = [line.split("│")[1:-1] for line in strangest if line.count("│") == 6]
    places = [Path(entry["place"]).name for entries in report["strangest"].values() for entry in entries]
    assert "".join(cell[1].strip() for cell in cells) == "".join(places) and f"{name}:52" in places
    for text in (printed, page):
        assert "\x1b" not in text and "\x9b" not in text and "\\x1b[31m\u3000" in text
    assert f">{name}:52</td>" in page and f'title="{tmp_path}/{name}:52"' in page and "break-all" not in page
    assert "width: 100%; height: auto" in page  # the charts


@pytest.fixture(scope="module")
def browser():
    yield from headless_chromium()


@pytest.mark.parametrize("width", [1240, 390])
def test_the_page_fits_its_window_with_long_names(tmp_path, tokenizer_folder, seed, browser, width):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", stories(seed + i, 50)) for i, name in enumerate(("很长的文件名字" * 9, "a-long-name" * 9))
    ]
    run(files, tmp_path / "out", tokenizer_folder, val_fraction=0.3)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    browser.get((tmp_path / "out" / "report.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    unusual, texts = browser.execute_script(
        "return [document.querySelector('.unusual').scrollWidth, [...document.querySelectorAll('.unusual .text')].map(t => t.clientWidth)]"
    )
    assert unusual <= width and len(texts) == 10 and min(texts) > 0.4 * unusual


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dedup": "all"}, "--dedup 'all' must be exact, near or off"),
        ({"val_fraction": 0.0}, "--val-fraction 0.0 must lie between"),
        ({"val_documents": 0}, "--val-documents 0 must be at least 1"),
        ({"near_threshold": 0.2}, "--near-threshold 0.2 must lie between"),
        ({"vocab_size": 100}, "--vocab-size 100 must be at least 262"),
    ],
)
def test_options_that_cannot_work_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


@pytest.mark.parametrize("workers", [0, -1])
def test_a_number_of_workers_that_cannot_work_is_named(tmp_path, workers):
    with pytest.raises(ValueError, match=f"--workers {workers} must be at least 1"):
        prepare([str(write_jsonl(tmp_path / "a.jsonl", ["一", "二"]))], tmp_path / "out", Options(), workers=workers)
    assert not (tmp_path / "out").exists()


def test_near_without_rensa_names_the_command(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    file = write_jsonl(tmp_path / "a.jsonl", ["一", "二"])
    with pytest.raises(ValueError, match="pip install rensa"):
        run([file], tmp_path / "out", tokenizer_folder, dedup="near")


def test_splits_need_a_document_each(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "a.jsonl", ["一", "二", " "])
    with pytest.raises(ValueError, match="of 3 documents 2 are for training and 0 for validation"):
        run([file], tmp_path / "out", tokenizer_folder, val_fraction=1e-9)
