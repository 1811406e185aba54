"""A served model without a registry: the real endpoint on a real port, in a thread of the test's own process."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import cast

import torch
import uvicorn

from flows.serving.app import create_app
from flows.serving.following import Following, Served
from flows.serving.writer import Writer
from gptcore.bundle import Loaded
from gptcore.model import GPTModel
from gptcore.tokenizer import get_tokenizer
from tests.flows.servers import free_ports, wait_for
from tests.flows.versions import endless

CFG = {
    "vocab_size": 257,
    "context_length": 32,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 1,
    "drop_rate": 0.0,
    "qkv_bias": False,
}


def tiny_version(number: int) -> Served:
    """Version `number` of gpt-tiny, with weights of its own and a byte tokenizer. It never ends a text by itself."""
    torch.manual_seed(number)
    loaded = Loaded(endless(GPTModel(CFG)).eval(), get_tokenizer("bytes"), CFG)
    return Served("gpt-tiny", str(number), loaded, f"weights-{number}", 1_700_000_000)


class Followed:
    """What is served, set by hand."""

    names = Following.names

    def __init__(self, served: Served) -> None:
        self.uri, self.served, self.problem = "models:/gpt-tiny@champion", served, None


class Endpoint:
    """Where it is, and what is behind it."""

    def __init__(self, rows: int = 4, most_waiting: int = 8, most_tokens: int = 4096) -> None:
        self.following, self.writer = Followed(tiny_version(1)), Writer(rows, most_waiting)
        app = create_app(cast(Following, self.following), self.writer, most_tokens)
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(app, port=self.port, log_config=None, access_log=False, ws="none", lifespan="on")
        self.server = uvicorn.Server(config)


@contextmanager
def endpoint(**limits: int) -> Iterator[Endpoint]:
    """Answers while this lasts."""
    made = Endpoint(**limits)
    thread = Thread(target=made.server.run)
    thread.start()
    try:
        wait_for(lambda: made.server.started, 20)
        yield made
    finally:
        made.server.should_exit = True
        thread.join(20)
