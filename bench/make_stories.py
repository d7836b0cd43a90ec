"""Write a corpus of built-in stories: python -m bench.make_stories OUT --megabytes 2000 --files 8

Each file holds stories of a different seed, as JSON lines with the keys id and story_zh.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tritale.common.files import atomic_file
from tritale.stories.generator import story


def write(path: Path, seed: int, size: int) -> None:
    """Write at least `size` bytes of stories of `seed` to `path`. An existing file is kept."""
    if path.exists():
        return
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        i = 0
        while file.tell() < size:
            file.write((json.dumps({"id": i, "story_zh": story(seed, i).text}, ensure_ascii=False) + "\n").encode())
            i += 1


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--megabytes", type=int, default=2000)
    p.add_argument("--files", type=int, default=8)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [args.out / f"stories-{i:02d}.jsonl" for i in range(args.files)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write, paths, itertools.count(args.seed), itertools.repeat(args.megabytes * 10**6 // args.files)))
