"""How fast `tritale prepare` makes token shards of jsonl, against `datasets.map` with the same tokenizer.

    python -m bench.make_stories out/corpus --megabytes 250 --files 1
    python -m bench.prepare_speed 'out/corpus/*.jsonl' --text-key story_zh

Both read the same files in a new process, tokenize with two worker processes, and write token ids to the disk: `load_dataset("json")` and a
batched `map` that keeps only the ids, against all of `prepare` with a given tokenizer. `datasets` neither removes duplicates nor splits.
The report's table of vocabularies takes the same time for any amount of data, so small inputs understate the speed of `prepare`. The jobs
alternate. Printed are the medians of the elapsed time and of the CPU time of all processes, which other work on the machine affects less.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

OURS = """
import sys, time
from tritale.cli.prepare import preset_sizes
from tritale.data.prepare.documents import Fields
from tritale.data.prepare.pipeline import Options, prepare
if __name__ == "__main__":
    began = time.perf_counter()
    out, key, tokenizer, *files = sys.argv[1:]
    prepare(files, out, Options(Fields(key), tokenizer=tokenizer), preset_sizes=preset_sizes, workers=2)
    print("seconds", time.perf_counter() - began)
"""
THEIRS = """
import sys, time, datasets
{imported}
if __name__ == "__main__":
    began = time.perf_counter()
    out, key, tokenizer, *files = sys.argv[1:]
    backend = {backend}
    encode = lambda batch: {{"ids": {ids}}}
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=out)
    data.map(encode, batched=True, num_proc=2, remove_columns=data.column_names)
    print("seconds", time.perf_counter() - began)
"""
JOBS = {
    "prepare": OURS,
    "datasets.map, tokenizers": THEIRS.format(
        imported="import tokenizers",
        backend='tokenizers.Tokenizer.from_file(tokenizer + "/tokenizer.json")',
        ids="[e.ids for e in backend.encode_batch_fast(batch[key])]",
    ),
    "datasets.map, AutoTokenizer": THEIRS.format(
        imported="from transformers import AutoTokenizer",
        backend="AutoTokenizer.from_pretrained(tokenizer)",
        ids='backend(batch[key], return_attention_mask=False)["input_ids"]',
    ),
}


def timed(code: str, key: str, tokenizer: str, files: list[str]) -> dict[str, float]:
    """Elapsed seconds, and CPU seconds of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "job.py", str(Path(folder) / "out")
        path.write_text(code, encoding="utf-8")  # a file, since its worker processes import it
        environment, before = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": out}, cpu_seconds()
        done = subprocess.run([sys.executable, str(path), out, key, tokenizer, *files], capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
    (seconds,) = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds ")]
    return {"seconds": seconds, "cpu": cpu_seconds() - before}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", help="glob of jsonl files")
    p.add_argument("--text-key", default="text")
    p.add_argument("--tokenizer", help="folder (default: trained on the first 5 MB)")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    files = sorted(glob(args.files))
    megabytes = sum(os.path.getsize(f) for f in files) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        if not args.tokenizer:
            from tritale.data.tokenizer import Tokenizer

            with open(files[0], encoding="utf-8") as file:
                texts = [json.loads(line)[args.text_key] for line in file.readlines(5_000_000)]
            Tokenizer.train(texts, 6400).save(folder)
        found: dict[str, list[dict]] = {name: [] for name in JOBS}
        for i in range(args.rounds):
            for name, code in JOBS.items():
                found[name].append(timed(code, args.text_key, args.tokenizer or folder, files))
                print(f"round {i + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(f"{megabytes:.0f} MB of jsonl, {platform.machine()}, {os.cpu_count()} cores, medians of {args.rounds}")
    for name, rounds in found.items():
        wall, cpu = (statistics.median(r[kind] for r in rounds) for kind in ("seconds", "cpu"))
        print(f"{name:30} {megabytes / wall:6.2f} MB/s   {megabytes / cpu:6.2f} MB per CPU second")


if __name__ == "__main__":
    main()
