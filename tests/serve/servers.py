"""Checkpoints that generate a known text, and a server in this process."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tritale.data.tokenizer import Tokenizer
from tritale.inference.engine import Engine
from tritale.model import GPT, GPTConfig
from tritale.model.checkpoint import save_model
from tritale.serve.app import make_app
from tritale.serve.connections import make_server
from tritale.stories.generator import story

ENDLESS = "从前有一只小兔"  # repeated until the completion ends
SCRIPT, IMAGE = "<script>hacked()\n", "<img src onerror=hacked()>"


def train_tokenizer() -> Tokenizer:
    return Tokenizer.train([*(story(1, i).text for i in range(60)), *(SCRIPT + IMAGE for _ in range(40))], 700)


def write_checkpoint(folder: Path, tokenizer: Tokenizer, model: GPT) -> Path:
    folder.mkdir(parents=True)
    save_model(folder, model, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return folder


def tiny(tokenizer: Tokenizer, context: int = 512) -> GPT:
    """A model with large random weights, so that the logits differ clearly."""
    model = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, tie_embeddings=False, context=context))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def reciting(tokenizer: Tokenizer, text: str, *, is_endless: bool = False) -> GPT:
    """A model that generates `text` and ends, or repeats it. Only the embedding and the head are not zero, so each token determines the
    next. No token may occur twice in the text."""
    ids = tokenizer.encode(text)
    assert len(set(ids)) == len(ids), [tokenizer.decode([i]) for i in ids]
    model = tiny(tokenizer)
    for p in model.parameters():
        p.fill_(1.0 if p.ndim == 1 else 0.0)
    model.embedding.copy_(torch.randn(model.embedding.shape))
    for token, following in zip([tokenizer.eot_id, *ids], [*ids, ids[0] if is_endless else tokenizer.eot_id], strict=True):
        model.head[following] += model.embedding[token]
    return model


@torch.no_grad()
def write_answering(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    """A checkpoint that answers `text` to every conversation, and ends it with `<|im_end|>`."""
    model, ids = reciting(tokenizer, text), tokenizer.encode(text)
    (line_end,) = tokenizer.encode("\n")
    model.head[ids[0]] += model.embedding[line_end]
    model.head[tokenizer.eot_id] -= model.embedding[ids[-1]]
    model.head[tokenizer.im_end_id] += model.embedding[ids[-1]]
    tokenizer.is_chat = True
    write_checkpoint(folder, tokenizer, model)
    tokenizer.is_chat = False


@dataclass
class Server:
    engine: Engine
    url: str


@contextlib.contextmanager
def running(folder: Path, *, slots: int = 16, queue: int = 32, **settings) -> Iterator[Server]:
    """A server in a thread of this process, on a free port."""
    engine = Engine(folder, slots=slots, queue=queue, device="cpu")
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(make_app(engine, **settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Server(engine, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
        engine.stop()
        listener.close()


def wait_until(is_so: Callable[[], object], seconds: float = 60) -> None:
    """The timeout is long, because the machine may be busy."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
