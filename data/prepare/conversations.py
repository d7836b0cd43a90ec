"""Conversations from records in three formats: messages, instructions (Alpaca), and the fields of TinyStoriesInstruct."""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ..chat import NEXT, chat_text, encode_chats, mark, problem, without_marks
from ..tokenizer import Tokenizer
from .checks import BadInput
from .deduplicate import normalise
from .documents import Document, Fields
from .inputs import file_format

STORY = "故事"
STORY_FIELDS = ("词汇", "特点", "摘要", "随机句子")
REQUEST = "写一个故事。"
PAIR_FORMAT = "prompt (messages), chosen and rejected"
MOST_COUNTED = 500_000  # documents whose number of tokens is kept for the second reading, 60 MB
FORMATS = f"messages; instruction and output; or {STORY} with {', '.join(STORY_FIELDS)}"


@dataclass(frozen=True)
class ChatFields(Fields):
    """How a record becomes a conversation that ends with an answer (task "sft"), or a pair of them (task "dpo").

    Its document is the conversation's `chat_text`, of a pair both with NEXT between them."""

    tokenizer: str = ""  # folder of the model's tokenizer
    context: int = 0  # tokens of the longest conversation
    task: str = "sft"

    @cached_property
    def _n_tokens(self) -> dict[int, int]:
        """hash of a document → tokens of its longest conversation, counted by the first of the two readings."""
        return {}

    @cached_property
    def keys(self) -> list[str]:
        return []  # all: the format is that of each record

    def document(self, record: Any, file: str, line: int) -> Document:
        """Raises BadInput for a record without a conversation, one that the context cannot hold, or one with an empty answer."""
        if not isinstance(record, dict):
            raise BadInput(file, line, "a record without fields", f"; it needs {self.formats}")
        if self.task == "dpo":
            chats = [self._checked(messages, file, line) for messages in pair(record, file, line)]
            if chats[0] == chats[1]:
                raise BadInput(file, line, "a pair of equal answers")
            group = chat_text(chats[0][:-1])  # the same question in both splits would be a leak
        else:
            chats = [self._checked(conversation(record, file, line), file, line, record)]
            group = without_marks(chats[0][-1]["content"])  # … and so would be the same answer, whatever was asked
        if self.group_key is not None:
            if self.group_key not in record:
                raise BadInput(file, line, f"no key {self.group_key!r}")
            group = str(record[self.group_key])
        text = NEXT.join(map(chat_text, chats))
        n = self._n_tokens.get(hash(text)) or max(len(ids) for ids, _ in encode_chats(_tokenizer(self.tokenizer), chats))
        if len(self._n_tokens) < MOST_COUNTED:
            self._n_tokens[hash(text)] = n
        if n > self.context:
            raise BadInput(file, line, f"longer than the context of {self.context} tokens", f": {n} tokens")
        return Document(text, group, line)

    def _checked(self, messages: Any, file: str, line: int, marks: dict | None = None) -> list[dict[str, str]]:
        if what := problem(messages):
            raise BadInput(file, line, "a conversation that cannot be encoded", f": {what}")
        if marks:
            messages = marked(messages, marks.get("emphasis") or [], marks.get("borders") or [], file, line)
        messages = [{"role": message["role"], "content": normalise(message["content"]).strip()} for message in messages]
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise BadInput(file, line, "a conversation without an answer", "; its last message must be the assistant's")
        for number, message in enumerate(messages, 1):
            if not message["content"]:
                raise BadInput(file, line, f"an empty {'response' if message['role'] == 'assistant' else 'message'}", f": message {number}")
        return messages

    @property
    def formats(self) -> str:
        return PAIR_FORMAT if self.task == "dpo" else FORMATS

    def check(self, files: list[str]) -> None:
        if txt := next((file for file in files if file_format(Path(file)) == ".txt"), None):
            raise UserError(f"--task {self.task} reads records with {self.formats}, and {txt} is plain text; leave it out")


def conversation(record: dict, file: str, line: int) -> Any:
    """The messages of a record in one of the formats; `problem` says whether they can be encoded. Raises BadInput for another one."""
    if "messages" in record:
        messages = record["messages"]
        if isinstance(messages, str) and messages.lstrip().startswith("["):  # a column of a csv file
            try:
                return json.loads(messages)
            except ValueError as error:
                raise BadInput(file, line, "messages that are not JSON", f" ({error})") from None
        return messages
    if "instruction" in record or "output" in record:
        question = [_text(record, "instruction", file, line), _text(record, "input", file, line, is_optional=True)]
        answer = _text(record, "output", file, line)
    elif STORY in record or any(name in record for name in STORY_FIELDS):
        answer = _text(record, STORY, file, line)
        values = {name: _text(record, name, file, line) for name in record if name in STORY_FIELDS and record[name]}
        if not values:
            raise BadInput(file, line, "no requirement", f"; it needs at least one of {', '.join(STORY_FIELDS)}")
        question = [REQUEST, *(f"{name}：{value.strip()}" for name, value in values.items())]  # in the order of the record
    else:
        keys = ", ".join(map(str, record)) or "none"
        raise BadInput(file, line, "no conversation", f"; it needs {FORMATS}; keys there: {keys[:200]}")
    prompt = "\n".join(part for part in question if part.strip())
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def marked(messages: Any, emphasis: Any, borders: Any, file: str, line: int) -> Any:
    """The messages with the last one's emphasis, [[begin, end], …], and borders, [i, …], both in characters, as `mark` writes them.
    Raises BadInput for other ones."""
    *before, answer = messages
    is_place = lambda value: type(value) is int and 0 <= value <= len(answer["content"])
    places = ", places in the answer, counted in characters"
    if not isinstance(emphasis, list) or not all(isinstance(s, list) and len(s) == 2 and all(map(is_place, s)) for s in emphasis):
        raise BadInput(file, line, "an emphasis that is not [[begin, end], …]", places)
    if not isinstance(borders, list) or not all(map(is_place, borders)):
        raise BadInput(file, line, "borders that are not [i, …]", places)
    return [*before, {**answer, "content": mark(answer["content"], emphasis, borders)}]


def pair(record: dict, file: str, line: int) -> list[Any]:
    """The conversations with the chosen and with the rejected answer. Raises BadInput if a field is missing."""
    if missing := [key for key in ("prompt", "chosen", "rejected") if key not in record]:
        raise BadInput(file, line, f"no key {missing[0]!r}", f"; a pair needs {PAIR_FORMAT}")
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list):
        raise BadInput(file, line, "a prompt that is neither text nor a list of messages")
    chats = []
    for key in ("chosen", "rejected"):
        answer = record[key]
        if not isinstance(answer, str | list):
            raise BadInput(file, line, f"no text under {key!r}")
        chats.append([*messages, *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)])
    return chats


def _text(record: dict, key: str, file: str, line: int, *, is_optional: bool = False) -> str:
    # The text under a key; a list, as of words, joined by commas.
    value = record.get(key)
    if value is None and is_optional:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return "，".join(value)
    if not isinstance(value, str):
        raise BadInput(file, line, f"no text under {key!r}", f"; keys there: {', '.join(map(str, record))[:200]}")
    return value


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)
