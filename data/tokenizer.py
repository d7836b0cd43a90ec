"""A BPE tokenizer with readable entries: Chinese characters, words and phrases, and single bytes for rare characters.

The ids are

    0 … 3      special tokens: <|endoftext|>, <|im_start|>, <|im_end|>, <|pad|>
    4 … 259    the 256 bytes, written <0x00> … <0xFF>: a character without an entry becomes its UTF-8 bytes
    260 …      the frequent characters, then the merges in the order in which they were learnt

Nothing is normalised: `decode(encode(text)) == text` for every text that UTF-8 can encode. On disk it is the `tokenizer.json` and
`tokenizer_config.json` of Hugging Face. `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids, except for the names of
special tokens inside a text, which are ordinary text here.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from ..common.errors import UserError, one_line
from ..common.files import atomic_file, read_json_object, write_json
from .chat import CHAT_TEMPLATE, END, START

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END, PAD)
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
FIXED_TOKENS = SPECIAL_TOKENS + BYTE_TOKENS

# Merges stay inside one of these pieces: a clause or word with the space before it, a digit, a mark or its repetition (…… —— ！！),
# line ends, other white space. `<`, digits and letters are never in one piece, so no merge can spell a byte token.
PIECES = r" ?[\p{L}\p{M}]+|\p{N}|([^\p{L}\p{M}\p{N}\s])\1*|[\r\n]+|[^\S\r\n]+"
MAX_ENTRY_CHARACTERS = 8  # without a limit 0.2 % fewer tokens at 16 k entries, but entries are clauses of the training text
MAX_VOCAB = 2**20  # at 10⁹ the tokenizers library cannot allocate its tables, and ends the process
CHARACTER_COVERAGE = 0.9995  # share of the text whose characters get an entry,
CHARACTER_SHARE = 2 / 3  # in at most this share of the entries: at 4,096, entries for all characters give 9 % more tokens


@contextmanager
def unicode_errors(texts: Iterable[str]) -> Iterator[None]:
    """Raises UserError in place of the TypeError of `tokenizers` for a text that UTF-8 cannot encode."""
    try:
        yield
    except TypeError:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                found = ascii(text[max(0, error.start - 10) : error.start + 10])
                raise UserError(f"character {error.start + 1} of the text ({found}) is not valid Unicode; give the text as UTF-8") from None
        raise


@dataclass(frozen=True)
class TokenizerStats:
    """How well a tokenizer fits a text."""

    chars_per_token: float
    byte_fallback_share: float  # of the tokens; about 1 in 100 is usual, 1 in 10 indicates another kind of text


class Tokenizer:
    """Converts text to ids and back. Made by `Tokenizer.train` or `Tokenizer.load`.

    `is_chat`: its model is or will be trained on conversations in the format of `chat.py`, so `save` writes that as `chat_template`."""

    def __init__(self, backend: tokenizers.Tokenizer, *, is_chat: bool = False):
        self.is_chat = is_chat
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is ordinary text; this setting is not saved
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._bytes = {i: token.encode() for token, i in backend.get_vocab().items()}  # id -> UTF-8
        self._bytes |= dict.fromkeys(range(len(SPECIAL_TOKENS)), b"")
        self._bytes |= {len(SPECIAL_TOKENS) + byte: bytes([byte]) for byte in range(256)}
        self.vocab_size = len(self._bytes)
        self.eot_id = FIXED_TOKENS.index(END_OF_TEXT)
        self.pad_id = FIXED_TOKENS.index(PAD)
        self.im_start_id, self.im_end_id = FIXED_TOKENS.index(START), FIXED_TOKENS.index(END)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` entries from `texts`, which are held in memory; give a sample of at most about 100 MB of a large corpus.

        The same texts in the same order give the same tokenizer on any machine. Pairs that occur once are not merged, so a small text may
        give fewer entries. Raises UserError if `vocab_size` leaves no room for entries or is above MAX_VOCAB, or if there is no text."""
        texts = list(texts)
        room = vocab_size - len(FIXED_TOKENS)
        if vocab_size > MAX_VOCAB:
            raise UserError(f"vocab_size ({vocab_size}) must be at most {MAX_VOCAB}; for Chinese stories try 8192")
        if room < 2:
            raise UserError(
                f"vocab_size ({vocab_size}) must be at least {len(FIXED_TOKENS) + 2}: {len(FIXED_TOKENS)} ids are special tokens "
                "and bytes; for Chinese stories try 8192"
            )
        counts = Counter()
        for text in texts:
            counts.update(text)
        if not counts:
            raise UserError(f"there is no text to train a tokenizer on: {len(texts)} texts, 0 characters; check the input files")

        # Rare characters are encoded as bytes. In training they are replaced by a line end, which no merge crosses.
        by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
        enough = CHARACTER_COVERAGE * counts.total()
        n_covering = 1 + sum(total < enough for total in accumulate(counts[c] for c in by_frequency[:-1]))
        n_characters = max(1, min(n_covering, int(room * CHARACTER_SHARE)))
        rare = dict.fromkeys(map(ord, by_frequency[n_characters:]), "\n")

        learner = tokenizers.Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
        longest = MAX_ENTRY_CHARACTERS + 1  # the trainer's limit is exclusive
        trainer = trainers.BpeTrainer(vocab_size=room, min_frequency=2, max_token_length=longest, show_progress=False)
        learner.train_from_iterator((text.translate(rare) for text in texts), trainer)
        learnt = json.loads(learner.to_str())["model"]
        return cls(make_backend(sorted(learnt["vocab"], key=learnt["vocab"].get), [(a, b) for a, b in learnt["merges"]]))

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` from the folder of a tokenizer or checkpoint.

        Raises FileNotFoundError if it is missing, UserError if it is damaged or not of the kind that `Tokenizer.train` makes."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; train a tokenizer with Tokenizer.train, or give the folder that holds one")
        try:
            text = path.read_text(encoding="utf-8")
            model = json.loads(text)["model"]
            if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
                raise ValueError("its model has a subword prefix or suffix")  # the library ends the process if the merges do not match
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises a bare Exception for every kind of damage
            raise UserError(f"{path} cannot be read as a tokenizer ({one_line(error)}); restore it, or train it again") from error
        for i, token in enumerate(FIXED_TOKENS):
            if backend.id_to_token(i) != token:
                raise UserError(
                    f"{path} has {backend.id_to_token(i)!r} at id {i} instead of {token!r}: not one that Tokenizer.train made; "
                    "train one on your text; a Hugging Face checkpoint is converted by tritale import FOLDER --from hf --out NEW_FOLDER"
                )
        backend.no_padding()
        backend.no_truncation()
        settings, expected = _settings(backend), _settings(make_backend([], []))
        if differing := [key for key in expected if settings.get(key) != expected[key]]:
            raise UserError(f"{path} has another {differing[0]} than Tokenizer.train makes; restore it, or train it again")
        ids = sorted(backend.get_vocab().values())
        if ids != list(range(len(ids))):
            wrong = next((i for i, id in enumerate(ids) if i != id), len(ids))
            raise UserError(f"{path} is damaged: of its {len(ids):,} ids, {wrong:,} is missing or repeated; restore it, or train it again")
        config = path.with_name("tokenizer_config.json")
        saved = read_json_object(config, remedy="restore it, or train it again") if config.is_file() else {}
        return cls(backend, is_chat=saved.get("chat_template") == CHAT_TEMPLATE)

    def save(self, folder: str | Path, *, context: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`. `context` is that of the model in the same folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": PAD,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:3]),  # transformers 4 and 5; the newer extra_special_tokens fails in 4
            "model_input_names": ["input_ids", "attention_mask"],  # else `generate` refuses the tokenizer's token_type_ids
            "padding_side": "left",  # for batches of prompts
            "clean_up_tokenization_spaces": False,
        }
        if self.is_chat:
            config["chat_template"] = CHAT_TEMPLATE
        if context is not None:
            config["model_max_length"] = context
        write_json(folder / "tokenizer_config.json", config)
        with atomic_file(folder / "tokenizer.json") as temporary:  # last and complete: a folder with this file is complete
            temporary.write_text(self._backend.to_str(pretty=True) + "\n", encoding="utf-8")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text. Only a model for conversations has learnt `<|im_end|>`, its last one."""
        return (self.eot_id, self.im_end_id) if self.is_chat else (self.eot_id,)

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids that `save_model` writes."""
        ids = {"eos_token_id": self.eot_id, "pad_token_id": self.pad_id}
        return ids | ({"im_end_id": self.im_end_id} if self.is_chat else {})

    def to_json(self) -> str:
        """`tokenizer.json` without white space."""
        return self._backend.to_str()

    @cached_property
    def hash(self) -> str:
        """sha256 of `to_json()`. It does not change if another program saves the file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of `text`, without special tokens. With `bos`, the id of `<|endoftext|>`, which begins every document, comes first.

        Raises UserError for a text that UTF-8 cannot encode: one with half a surrogate pair, as decoding other bytes may give."""
        with unicode_errors([text]):
            return self._backend.encode(text, add_special_tokens=bos).ids

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        with unicode_errors(texts):
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=bos)]

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs of entries that are merged, in the order in which they were learnt."""
        return [(a, b) for a, b in json.loads(self._backend.to_str())["model"]["merges"]]

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id: the UTF-8 of an entry, one byte for a byte token, none for a special token."""
        return self._bytes[i]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special tokens are dropped; incomplete characters become U+FFFD.

        Raises UserError for an id that is not in the vocabulary."""
        try:
            return b"".join([self._bytes[i] for i in ids]).decode("utf-8", errors="replace")
        except KeyError as error:
            raise UserError(f"id {error} is not in the vocabulary; ids are integers from 0 to {self.vocab_size - 1}") from None

    def stats(self, texts: Iterable[str]) -> TokenizerStats:
        """Characters per token and the share of byte tokens over `texts`, without `<|endoftext|>`. Raises UserError without text."""
        texts = list(texts)
        ids = [i for document in self.encode_batch(texts) for i in document]
        if not ids:
            raise UserError(f"there is no text to measure: {len(texts)} texts, 0 characters; give at least one that is not empty")
        n_bytes = sum(i < len(FIXED_TOKENS) for i in ids)
        return TokenizerStats(chars_per_token=sum(map(len, texts)) / len(ids), byte_fallback_share=n_bytes / len(ids))


def make_backend(entries: Sequence[str], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The `tokenizers` object with the fixed tokens first, then `entries`, in the order of their ids."""
    # Not trained with `special_tokens`: those, "<0x41>" among them, would be matched in the text.
    vocab = {token: i for i, token in enumerate((*FIXED_TOKENS, *entries))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges), byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, FIXED_TOKENS.index(END_OF_TEXT))]
    )
    return backend


def _settings(backend: tokenizers.Tokenizer) -> dict:
    # Everything in tokenizer.json except the entries and their merges.
    content = json.loads(backend.to_str())
    return content | {"model": {key: value for key, value in content["model"].items() if key not in ("vocab", "merges")}}
