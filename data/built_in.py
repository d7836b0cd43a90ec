"""The data of the quick start: built-in stories, a tokenizer trained on them, and token splits."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import UserError
from ..common.files import atomic_folder, final_name, read_json_object, write_json
from ..stories.generator import TRAIN_START, VALIDATION_START, story
from .shards import REMEDY, Split, write_split
from .tokenizer import Tokenizer

TOKENIZER_STORIES = 4000  # more stories hardly change the entries
ESTIMATE_STORIES = 1000
RECIPE = "recipe.json"


def write_built_in(
    folder: Path,
    *,
    seed: int,
    stories: int,
    validation_stories: int,
    vocab_size: int,
    track: Callable[[Iterable, str], Iterable] = lambda items, description: items,
) -> None:
    """Write tokenizer/, train/ and validation/ into `folder`, unless it holds the same data. The splits come from separate ranges of the
    generator, without validation stories whose text is in training. `track` may wrap the slow loops in a progress bar.

    Raises UserError if `folder` holds something else."""
    recipe = {"stories": stories, "validation_stories": validation_stories, "vocab_size": vocab_size, "seed": seed, "version": 1}
    if (folder / RECIPE).is_file() and read_json_object(folder / RECIPE, remedy=REMEDY) == recipe:
        return
    if folder.exists() and not (folder / RECIPE).is_file():
        raise UserError(f"{folder} exists and does not hold built-in stories, so it is not overwritten; move it, or change --out_dir")
    for left in folder.parent.glob(f".{folder.name}.*"):
        if final_name(left) == folder.name:  # of a killed process
            shutil.rmtree(left, ignore_errors=True)
    train = [story(seed, TRAIN_START + i) for i in track(range(stories), "writing stories")]
    known = {s.text for s in train}
    validation = [s for s in (story(seed, VALIDATION_START + i) for i in range(validation_stories)) if s.text not in known]
    sample = [s.text for s in train[:TOKENIZER_STORIES]]
    (tokenizer,) = [Tokenizer.train(sample, vocab_size) for _ in track(range(1), "training the tokenizer")]
    with atomic_folder(folder) as temporary:
        tokenizer.save(temporary / "tokenizer")
        for name, part in (("train", train), ("validation", validation)):
            texts = (s.text for s in track(part, f"tokenizing {name}"))
            write_split(temporary / name, texts, tokenizer, entropy_bits=sum(s.bits for s in part))
        write_json(temporary / RECIPE, recipe)


@dataclass(frozen=True)
class Estimate:
    """The size of the built-in data before it is written."""

    vocab_size: int
    tokens: int
    characters: int
    sample: int  # number of stories from which the other fields were computed


def estimate(*, seed: int, stories: int, vocab_size: int) -> Estimate:
    """Estimate the training split of `write_built_in` from its first stories."""
    n = min(ESTIMATE_STORIES, stories)
    sample = [story(seed, TRAIN_START + i).text for i in range(n)]
    tokenizer = Tokenizer.train(sample, vocab_size)
    tokens = sum(map(len, tokenizer.encode_batch(sample, bos=True)))
    return Estimate(tokenizer.vocab_size, round(tokens * stories / n), round(sum(map(len, sample)) * stories / n), n)


def open_data(folder: Path, *, verify: bool = True) -> tuple[Tokenizer, Split, Split]:
    """The tokenizer and the splits train and validation of a data folder; `verify` as in `Split.open`.

    Raises FileNotFoundError or UserError if one is missing, damaged, or made with another tokenizer."""
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"{folder} holds no training data (tokenizer/, train/, validation/); make it with tritale prepare --input FILE --out {folder}"
        )
    tokenizer = Tokenizer.load(folder / "tokenizer")
    train, validation = (Split.open(folder / name, verify=verify) for name in ("train", "validation"))
    for split in (train, validation):
        if not split.is_of(tokenizer):
            raise UserError(f"{split.folder} was made with another tokenizer than {folder / 'tokenizer'}; make the data again")
    return tokenizer, train, validation
