"""A served model without a registry: the real endpoint on a real port, in a thread of the test process."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, cast

import torch

from flows.endpoint.app import create_app
from flows.endpoint.followed_version import FollowedVersion, ServedVersion
from flows.endpoint.scheduler import Scheduler
from flows.web.server import Config, Server
from gptcore.bundle import LoadedModel
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import get_tokenizer
from tests.registry.made_versions import endless
from tests.servers import free_ports, wait_for
from tests.tiny import TINY_CFG

CFG = {**TINY_CFG, "context_length": 32, "n_layers": 1}


def tiny_version(number: int) -> ServedVersion:
    """Return version `number` of gpt-tiny with its own weights and a byte tokenizer. It never ends a text by itself."""
    torch.manual_seed(number)
    loaded = LoadedModel(endless(GPTModel(CFG)).eval(), get_tokenizer("bytes"), CFG)
    return ServedVersion("gpt-tiny", str(number), loaded, f"weights-{number}", 1_700_000_000, f"# Card {number}")


class FixedVersion:
    """A followed version that the test sets by hand."""

    names = FollowedVersion.names

    def __init__(self, current: ServedVersion) -> None:
        self.uri, self.current, self.problem = "models:/gpt-tiny@champion", current, None


class Endpoint:
    """The endpoint: its address, its followed version and its scheduler."""

    def __init__(
        self,
        max_running: int = 4,
        max_waiting: int = 8,
        max_tokens: int = 4096,
        key: str | None = None,
        page: bool = True,
    ) -> None:
        self.followed, self.scheduler = FixedVersion(tiny_version(1)), Scheduler(max_running, max_waiting)
        app = create_app(cast(FollowedVersion, self.followed), self.scheduler, max_tokens, key=key, has_page=page)
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        config = Config(app, port=self.port, log_config=None, access_log=False, ws="none", lifespan="on")
        self.server = Server(config)


@contextmanager
def endpoint(**options: Any) -> Iterator[Endpoint]:
    """Serve an endpoint until the context ends."""
    made = Endpoint(**options)
    thread = Thread(target=made.server.run)
    thread.start()
    try:
        wait_for(lambda: made.server.started, 20)
        yield made
    finally:
        made.server.should_exit = True
        thread.join(20)
