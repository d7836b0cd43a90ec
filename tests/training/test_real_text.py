"""Training on 2,276 real stories in Traditional Chinese, if they are on this machine."""

import csv
import hashlib

import numpy as np
import pytest
from runs import REPOSITORY, losses, train

from tritale.data.shards import write_split
from tritale.data.tokenizer import Tokenizer

STORIES = REPOSITORY.parent / "shared" / "data" / "tiny_chinese_stories.csv"


@pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} does not exist")
def test_training_on_real_stories_falls_well_below_the_unigram_entropy(tmp_path):
    with STORIES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    # Stories come in groups of three with one theme; a group is in one split.
    parts = {"train": [], "validation": []}
    for row in rows:
        in_validation = hashlib.sha256(row["theme"].encode()).digest()[0] < 16
        parts["validation" if in_validation else "train"].append(row)
    assert not {r["theme"] for r in parts["train"]} & {r["theme"] for r in parts["validation"]}
    assert len(parts["train"]) > 1500 and len(parts["validation"]) > 30

    data = tmp_path / "data"
    tokenizer = Tokenizer.train((r["story"] for r in parts["train"]), 2048)
    tokenizer.save(data / "tokenizer")
    splits = {name: write_split(data / name, (r["story"] for r in part), tokenizer) for name, part in parts.items()}

    tokens = np.concatenate(splits["train"].shards)
    share = np.bincount(tokens) / len(tokens)
    unigram = -(share[share > 0] * np.log(share[share > 0])).sum()  # nats per token
    sizes = {"train__max_steps": 250, "train__global_batch": 32, "train__micro_batch": 32}
    often = {"train__validate_every": 250, "train__checkpoint_every": 250, "optim__lr": 0.01, "log__every": 10}
    train(tmp_path / "run", data__source=data, **sizes, **often, optim__warmup_steps=10)
    reached = losses(tmp_path / "run")[250]
    print(f"unigram entropy {unigram:.3f}, training loss {reached:.3f} nats per token")
    assert reached < unigram - 1
