"""The format of a conversation, ChatML: each message between `<|im_start|>` and `<|im_end|>`, which the tokenizer keeps as one id each."""

from collections.abc import Iterable, Mapping

from .tokenizer import Tokenizer


def chat_prompt(messages: Iterable[Mapping[str, str]]) -> str:
    """The text of a conversation up to the place where the assistant answers.

    A message has a `role` ("system", "user" or "assistant") and its `content`."""
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def prompt_ids(tokenizer: Tokenizer, messages: Iterable[Mapping[str, str]]) -> list[int]:
    """The ids of `<|endoftext|>` and `chat_prompt`."""
    ids, line_end = [tokenizer.eot_id], tokenizer.encode("\n")
    for message in messages:
        content = tokenizer.encode(message["content"].strip())
        ids += [tokenizer.im_start_id, *tokenizer.encode(f"{message['role']}\n"), *content, tokenizer.im_end_id, *line_end]
    return [*ids, tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
