"""Batches of tokens streamed over HTTP, compared with those of a memory map: `python -m bench.streaming`.

The store is a small web server of this script. It answers each request after a delay, as object stores do, and any
number of requests at once. The token ids are made up, and batches come in the random order of training. The result is
the median seconds of a batch while nothing is computed. `cold`: hardly any window is in a cached block. `kept`: all
windows are.
"""

import argparse
import statistics
import tempfile
import threading
import time
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from gptcore.tokens.stream import BLOCK_BYTES, MAX_BLOCKS, StreamedIds
from gptcore.training.batches import Batches


class _Store(BaseHTTPRequestHandler):
    """Serves ranges of one object."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, body: np.ndarray, delay: float, *given: object) -> None:
        self.body, self.delay = body, delay
        super().__init__(*given)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(self.body.nbytes))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        time.sleep(self.delay)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = self.body[first : last + 1].tobytes()
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{self.body.nbytes}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Discard the log."""


def seconds(batches: Batches, steps: range) -> float:
    """Return the median seconds of one batch."""
    took = []
    for step in steps:
        began = time.perf_counter()
        for _ in batches.make_micro_batches(step):
            pass
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def main() -> None:
    """Print a table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--milliseconds", type=float, nargs="+", default=[1, 20])
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    print(f"{asked.megabytes} MB; {asked.batch_size} windows of {asked.context} ids; blocks of {BLOCK_BYTES >> 10} KiB")
    print("| from | ms a batch, cold | ms a batch, kept | MB a batch, at most |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "train.bin"
        np.random.default_rng(0).integers(0, 50257, asked.megabytes * 500_000, dtype=np.uint16).tofile(path)
        ids = np.memmap(path, np.uint16, "r")
        measure("memory map", ids, asked, 0)
        for milliseconds in asked.milliseconds:
            server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Store, ids.view(np.uint8), milliseconds / 1000))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/train.bin"
            measure(f"store, {milliseconds:g} ms", StreamedIds(url, len(ids), ids.dtype), asked, BLOCK_BYTES)
            server.shutdown()


def measure(name: str, ids: "np.ndarray | StreamedIds", asked: argparse.Namespace, block: int) -> None:
    """Print a line of the table: steps that were not read before, and then the same steps again."""
    batches = Batches(ids, asked.context, asked.context, asked.batch_size, 1, seed=0)  # type: ignore[arg-type]
    steps = range(min(asked.steps, MAX_BLOCKS // asked.batch_size // 2))
    cold, kept = seconds(batches, steps), seconds(batches, steps)
    print(f"| {name} | {1e3 * cold:.1f} | {1e3 * kept:.2f} | {asked.batch_size * block / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
