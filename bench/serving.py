"""Many clients at once: `gptflow serve-model` under load, compared with a loop that answers one request at a time.

    python -m bench.serving --seconds 60 --json build/bench/serving.json
    python -m bench.serving gpt-quickstart@champion

If no model is named, one of shape M with random weights is registered in a temporary state root. Every client sends its
next request as soon as it is answered: for 64 tokens after 8 to 48, streamed. The loop calls
`gptcore.generation.generate` for the same requests in this process, before and after, while nothing else runs. A failed
request ends the measurement.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from bench.pipeline import environment
from bench.project import COMMAND
from bench.shapes import SHAPES
from flows.registry import import_, loading, versions
from flows.state.root import StateRoot, state_root
from gptcore.bundle import LoadedModel
from gptcore.generation.generate import generate
from gptcore.generation.quantize import quantize
from gptcore.huggingface.import_ import Checkpoint
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import get_tokenizer

NEW_TOKENS = 64
PROMPT_TOKENS = (8, 48)
PERCENTILES = (50, 90, 99)
_NAME = "gpt-bench"
_LOOP_SECONDS = 15.0
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Answered:
    """The times and tokens of one request."""

    first_seconds: float
    """From the request to the first text."""
    seconds: float
    num_tokens: int


@dataclass(frozen=True)
class Measured:
    """All requests of one way to serve."""

    answered: Sequence[Answered]
    seconds: float
    """From the first request to the last answer."""

    @property
    def tokens_per_second(self) -> float:
        return sum(one.num_tokens for one in self.answered) / self.seconds

    def percentiles(self, name: str) -> list[float]:
        """Return the PERCENTILES of a field of the requests."""
        values = sorted(getattr(one, name) for one in self.answered)
        return [values[min(len(values) - 1, len(values) * percent // 100)] for percent in PERCENTILES]

    def to_json(self) -> dict[str, Any]:
        named = {name: self.percentiles(name) for name in ("first_seconds", "seconds")}
        rate = {"requests": len(self.answered), "tokens_per_second": self.tokens_per_second, "percentiles": PERCENTILES}
        return {**rate, **named, "answered": [asdict(one) for one in self.answered], "measured_seconds": self.seconds}


def prompts(n_vocab: int, seed: int) -> Iterator[list[int]]:
    """Yield random ids without end."""
    draw = random.Random(seed)
    while True:
        yield [draw.randrange(n_vocab) for _ in range(draw.randint(*PROMPT_TOKENS))]


def register_random(root: StateRoot) -> str:
    """Register an untrained model of shape M; return its name and alias."""
    shape, tokenizer = SHAPES["M"], get_tokenizer("gpt2")
    torch.manual_seed(1)
    cfg = shape.cfg(0.0)
    checkpoint = Checkpoint(cfg, GPTModel(cfg).state_dict(), tokenizer, "random weights", {}, 0)
    import_.register(root, _NAME, checkpoint, by="the benchmark")
    return f"{_NAME}@champion"


@contextmanager
def served(root: StateRoot, uri: str, options: Sequence[str]) -> Iterator[str]:
    """Run the endpoint and yield its address. Raise RuntimeError if it does not start or does not stop in order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*COMMAND, "serve-model", uri, "--port", str(port), *options]
    where = {"GPTFLOW_HOME": str(root.path), "MLFLOW_TRACKING_URI": root.tracking_uri}
    process = subprocess.Popen(
        command, env={**environment(), **where}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(url, process)
        yield url
    finally:
        process.terminate()
        code = process.wait(60)
    if code:
        raise RuntimeError(f"gptflow serve-model ended with exit code {code}")


def _wait_until_it_answers(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/health")
            return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("gptflow serve-model did not come up: start it by hand to see why")


async def load(url: str, model: str, n_vocab: int, clients: int, seconds: float) -> Measured:
    """Let `clients` send requests for `seconds`. Raise the error of a failed request."""
    answered: list[Answered] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        asking = prompts(n_vocab, number)
        async with httpx.AsyncClient(timeout=300) as http:
            while time.perf_counter() - began < seconds:
                answered.append(await ask(http, url, model, next(asking), number))

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
    return Measured(answered, time.perf_counter() - began)


async def ask(http: httpx.AsyncClient, url: str, model: str, ids: Sequence[int], seed: int) -> Answered:
    """Send one streamed request."""
    body = {"model": model, "prompt": ids, "max_tokens": NEW_TOKENS, "seed": seed, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began, first, usage = time.perf_counter(), 0.0, None
    async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line.removeprefix("data: "))["usage"]
    if usage is None:
        raise RuntimeError("a stream ended before its end")
    return Answered(first, time.perf_counter() - began, usage["completion_tokens"])


def loop(loaded: LoadedModel, seconds: float) -> Measured:
    """Answer the same requests, one after the other, for `seconds`."""
    answered: list[Answered] = []
    asking, began = prompts(loaded.tokenizer.n_vocab, 0), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start, first, count = time.perf_counter(), 0.0, 0
        for _ in generate(loaded.model, next(asking), NEW_TOKENS, seed=0, eos_id=loaded.tokenizer.eot):
            first, count = first or time.perf_counter() - start, count + 1
        answered.append(Answered(first, time.perf_counter() - start, count))
    return Measured(answered, time.perf_counter() - began)


def table(columns: Mapping[str, Measured]) -> str:
    """Return a Markdown table with one column for each way."""
    percents = ", ".join(f"{percent} %" for percent in PERCENTILES)

    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def seconds(name: str) -> list[str]:
        return [" / ".join(f"{value:.2f}" for value in one.percentiles(name)) for one in columns.values()]

    return "\n".join(
        (
            row("", list(columns)),
            row("---", ["---:"] * len(columns)).replace(" ", ""),
            row("requests", [f"{len(one.answered):,}" for one in columns.values()]),
            row("tokens per second", [f"{one.tokens_per_second:.0f}" for one in columns.values()]),
            row(f"seconds to the first piece: {percents}", seconds("first_seconds")),
            row(f"seconds to the whole text: {percents}", seconds("seconds")),
        )
    )


def measure(root: StateRoot, uri: str, asked: argparse.Namespace) -> dict[str, Measured]:
    """Measure the loop, the endpoint and the loop again."""
    loaded = loading.load(root, versions.resolve(root, f"models:/{uri.removeprefix('models:/')}"))
    options = ["--max-concurrent", str(asked.max_concurrent), "--max-queue", str(asked.clients)]
    if asked.quantize:
        quantize(loaded.model, asked.quantize)
        options += ["--quantize", asked.quantize]
    loop(loaded, 2.0)  # warms up
    before = loop(loaded, _LOOP_SECONDS)
    n_vocab = loaded.tokenizer.n_vocab
    with served(root, uri, options) as url:
        asyncio.run(load(url, uri, n_vocab, asked.clients, 3.0))
        under_load = asyncio.run(load(url, uri, n_vocab, asked.clients, asked.seconds))
    after = loop(loaded, _LOOP_SECONDS)
    both = Measured([*before.answered, *after.answered], before.seconds + after.seconds)
    return {f"serve-model, {asked.clients} clients": under_load, "one request after the other": both}


def main() -> None:
    asked = _arguments()
    with ExitStack() as stack:
        if asked.uri is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # keeps the model out of the user's registry
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            root = StateRoot(Path(directory) / "mlruns").prepare()
        else:
            root = state_root().prepare()
        root.set_environment()
        found = measure(root, asked.uri or register_random(root), asked)
    print(table(found))
    if asked.json:
        about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "command": sys.argv[1:]}
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        body = {"machine": about, **{name: one.to_json() for name, one in found.items()}}
        asked.json.write_text(json.dumps(body, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.partition("\n")[0])
    parser.add_argument("uri", nargs="?", help="a registered model, such as gpt-quickstart@champion; else a random one")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the clients ask")
    parser.add_argument("--clients", type=int, default=32, help="how many ask at once")
    parser.add_argument("--max-concurrent", type=int, default=16, help="of serve-model: texts written at once")
    parser.add_argument("--quantize", choices=["int8"], help="of serve-model, and of the loop")
    parser.add_argument("--json", type=Path, help="where every request's times are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
