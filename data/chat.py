"""The format of a conversation, ChatML: each message between `<|im_start|>` and `<|im_end|>`, which the tokenizer keeps as one id each.

    <|endoftext|><|im_start|>user
    写一个故事。<|im_end|>
    <|im_start|>assistant
    从前，……<|im_end|>

White space around a message is dropped, so that its first line end cannot merge with the one before it.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, islice, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
START, END = "<|im_start|>", "<|im_end|>"
ANSWER = f"{START}assistant\n"
NEXT = "\x1e"  # between the two conversations of a pair in one text
EMPHASIS = "\x1a"  # before and behind an emphasised part of an answer, and no part of it; not white space, which is dropped
BORDER = "\x16"  # in an answer where a token has to end, and no part of it
# The same text for Hugging Face's `apply_chat_template` and for llama.cpp.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Messages = Sequence[Mapping[str, str]]  # each has a role, one of ROLES, and its content


def chat_text(messages: Iterable[Mapping[str, str]]) -> str:
    """The text of a conversation."""
    return "".join(f"{START}{message['role']}\n{message['content'].strip()}{END}\n" for message in messages)


def chat_prompt(messages: Iterable[Mapping[str, str]]) -> str:
    """The text of a conversation up to the place where the assistant answers."""
    return chat_text(messages) + ANSWER


def parse_chat(text: str) -> list[dict[str, str]]:
    """The messages of a `chat_text` whose messages contain neither of the two markers."""
    turns = [turn.partition("\n") for turn in text.split(START)[1:]]
    return [{"role": role, "content": content.removesuffix(f"{END}\n")} for role, _, content in turns]


def problem(messages: object) -> str | None:
    """What is wrong with a conversation, in words; None if it can be encoded."""
    if not isinstance(messages, list | tuple) or not messages:
        return "messages is not a list of messages with a role and a content"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"message {number} has no role and content, both text"
        if message.get("role") not in ROLES:
            return f"message {number} has the role {str(message.get('role'))[:40]!r}; the roles are {', '.join(ROLES)}"
        if any(mark in message["content"] for mark in (START, END, NEXT, EMPHASIS, BORDER)):
            return f"message {number} contains {START}, {END}, U+001E, U+001A or U+0016, which separate messages and their parts"
    return None


def encode_chats(tokenizer: "Tokenizer", chats: Sequence[Messages]) -> list[tuple[list[int], list[int]]]:
    """The ids of each conversation; and for each id 1 if it is learnt, as are the assistant's messages with their `<|im_end|>`, 2 if it is
    learnt and has a character between two EMPHASIS, else 0.

    The ids are those of `<|endoftext|>` and `chat_text` without EMPHASIS. The parts of a message between two BORDER are encoded one by
    one."""
    role_ids = {role: tokenizer.encode(f"{role}\n") for role in ROLES}
    line_end = tokenizer.encode("\n")
    texts = [message["content"].strip() for message in chain.from_iterable(chats)]
    parts = [text.replace(EMPHASIS, "").split(BORDER) for text in texts]
    ids_of_parts = iter(tokenizer.encode_batch([*chain.from_iterable(parts)]))
    contents = iter([(text, [*chain.from_iterable(islice(ids_of_parts, len(p)))]) for text, p in zip(texts, parts, strict=True)])
    encoded = []
    for messages in chats:
        ids, learnt = [tokenizer.eot_id], [0]
        for message in messages:
            head, (text, content) = [tokenizer.im_start_id, *role_ids[message["role"]]], next(contents)
            ids += [*head, *content, tokenizer.im_end_id, *line_end]
            is_answer = int(message["role"] == "assistant")
            flags = emphasised(tokenizer, content, text) if is_answer and EMPHASIS in text else [is_answer] * len(content)
            learnt += [*(0 for _ in head), *flags, is_answer, *(0 for _ in line_end)]
        encoded.append((ids, learnt))
    return encoded


def emphasised(tokenizer: "Tokenizer", ids: Sequence[int], text: str) -> list[int]:
    """1 for each id of `text`, 2 for those with a character between two EMPHASIS."""
    parts = text.replace(BORDER, "").split(EMPHASIS)
    of_bytes = b"".join(bytes([1 + i % 2]) * len(part.encode()) for i, part in enumerate(parts))
    ends = list(accumulate(len(tokenizer.token_bytes(i)) for i in ids))
    return [max(of_bytes[begin:end]) for begin, end in pairwise([0, *ends])]


def mark(text: str, emphasis: Iterable[tuple[int, int]] = (), borders: Iterable[int] = ()) -> str:
    """`text` with EMPHASIS around the characters of the spans (begin, end), which may overlap, and BORDER before those at `borders`."""
    is_in, ends = bytearray(len(text) + 2), set(borders)  # 1 more on both sides
    for begin, end in emphasis:
        is_in[begin + 1 : end + 1] = bytes([1]) * (end - begin)
    return "".join(EMPHASIS * (a != b) + BORDER * (i in ends) + text[i : i + 1] for i, (a, b) in enumerate(pairwise(is_in)))


def without_marks(text: str) -> str:
    """`text` without EMPHASIS and BORDER."""
    return text.replace(EMPHASIS, "").replace(BORDER, "")


def prompt_ids(tokenizer: "Tokenizer", messages: Messages) -> list[int]:
    """The ids of `<|endoftext|>` and `chat_prompt`."""
    ((ids, _),) = encode_chats(tokenizer, [messages])
    return [*ids, tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
