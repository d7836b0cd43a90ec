"""Tokenizers of imported models: any tokenizer.json that is byte-level (GPT-2, Qwen) or writes spaces as ▁ (Llama, Mistral)."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from ..common.errors import UserError, one_line
from ..common.files import read_json_object
from .tokenizer import Tokenizer, unicode_errors


def _byte_of_character() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, the others are 256, 257, …"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class ForeignTokenizer(Tokenizer):
    """A tokenizer that this project did not train. Documents begin with `bos_id` if the tokenizer adds one."""

    def __init__(self, backend: tokenizers.Tokenizer, *, eot_id: int, pad_id: int, bos_id: int | None):
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend, self.eot_id, self.pad_id, self.bos_id, self.is_chat = backend, eot_id, pad_id, bos_id, False
        vocab, model = backend.get_vocab(), json.loads(backend.to_str())
        special = {token.get("id") for token in model["added_tokens"] if token.get("special")}
        bytes_of, is_byte_level = _byte_of_character(), '"ByteLevel"' in json.dumps([model.get("pre_tokenizer"), model.get("decoder")])
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self._bytes = dict.fromkeys(range(self.vocab_size), b"")
        for token, i in vocab.items():
            if i in special:
                continue
            if is_byte_level:
                in_bytes = all(c in bytes_of for c in token)
                self._bytes[i] = bytes(bytes_of[c] for c in token) if in_bytes else token.encode()
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                self._bytes[i] = bytes.fromhex(token[3:5])
            else:
                self._bytes[i] = token.replace("▁", " ").encode()

    @classmethod
    def load(cls, folder: str | Path) -> "ForeignTokenizer":
        """Read tokenizer.json, and the ids of special tokens from tokenizer_config.json, config.json and generation_config.json.

        Raises UserError if a file is damaged or there is no end-of-text token."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{path} cannot be read as a tokenizer ({one_line(error)}); save it again with transformers") from None
        found = [read_json_object(folder / name, remedy="save it again") for name in _CONFIGS if (folder / name).is_file()]

        n_ids = max(backend.get_vocab().values(), default=-1) + 1

        def token_id(name: str) -> int | None:
            for config in found:
                value = config.get(f"{name}_id", config.get(name))
                value = value[0] if isinstance(value, list) and value else value.get("content") if isinstance(value, dict) else value
                value = backend.token_to_id(value) if isinstance(value, str) else value
                if type(value) is int and 0 <= value < n_ids:  # the model has no embedding for others
                    return value
            return None

        eot = token_id("eos_token")
        if eot is None:
            raise UserError(f"{folder}: no eos_token in {', '.join(_CONFIGS)}; add it to tokenizer_config.json")
        with_special, plain = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
        added = with_special[0] if with_special[0] != plain[0] else None
        flags = [config["add_bos_token"] for config in found if "add_bos_token" in config]
        bos = (token_id("bos_token") if flags[0] else None) if flags else added
        pad = token_id("pad_token")
        return cls(backend, eot_id=eot, pad_id=eot if pad is None else pad, bos_id=bos)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        with unicode_errors([text]):
            ids = self._backend.encode(text, add_special_tokens=False).ids
        first = self.bos_id if self.bos_id is not None else self.eot_id if not ids else None
        return [first, *ids] if bos and first is not None else ids

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[list[int]]:
        return [self.encode(text, bos) for text in texts]


_CONFIGS = ("tokenizer_config.json", "config.json", "generation_config.json")
