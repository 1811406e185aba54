"""How fast a text becomes token ids, and with how much memory: ours and others in turn, each in its own process.

The text is made up of random words of a given text, or of the reference that ships with Python, each with the white
space that follows it. So it can have any length, has the words and word lengths of real text, and no long repetitions.
"""

import contextlib
import random
import re
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.encoders import HF, NUMPY, OURS, TIKTOKEN
from bench.shapes import SEED
from bench.workers import Worker, peak_mb, workers
from gptcore.config import CorpusConfig
from gptcore.corpus.ingest import ingest

CONTENDERS = (OURS, TIKTOKEN, NUMPY, HF)
PACKAGES = {HF: "tokenizers"}
_MODULE = "bench.encoders"
_CORPUS: dict[str, Any] = {"split": "contiguous", "val_fraction": 0.05, "holdout_fraction": 0.0}
_WORDS_AT_ONCE = 50_000
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Encoded:
    """The result of one contender."""

    name: str
    mb_per_second: float
    """Megabytes of text per second: the median of the rounds."""
    peak_mb: float
    """The peak of resident memory, summed over the process and its children. Shared memory counts twice."""
    same_ids: bool
    """Whether the ids equal ours."""


@dataclass(frozen=True)
class Tokenizing:
    """All contenders."""

    num_bytes: int
    contenders: tuple[Encoded, ...]
    """Ours first."""

    @property
    def best(self) -> Encoded:
        """Return the fastest peer."""
        return max(self.contenders[1:], key=lambda one: one.mb_per_second)

    @property
    def ratio(self) -> float:
        """Return the ratio of our speed to that of the fastest peer."""
        return self.contenders[0].mb_per_second / self.best.mb_per_second

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "best_peer": self.best.name, "ratio": self.ratio}


def measure_tokenizing(
    names: Sequence[str], num_bytes: int, rounds: int, threads: int, text: Path | None
) -> Tokenizing:
    """Let each contender in turn encode a text of about `num_bytes`."""
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "text.txt"
        source.write_text(made_up(text.read_text() if text else _reference(), num_bytes))
        snapshot = ingest(CorpusConfig(sources=(str(source),), **_CORPUS), Path(made) / "corpora", Path(made))
        specs = {name: {"name": name, "snapshot": str(snapshot.path), "threads": threads} for name in names}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        peaks: dict[str, float] = dict.fromkeys(names, 0.0)
        with workers(_MODULE, specs) as started:
            for _ in range(rounds):
                for name, worker in started.items():
                    with _watched(worker) as peak_of:
                        answers[name].append(worker.ask("tokenize"))
                    peaks[name] = max(peaks[name], sum(peak_of.values()))
    total = sum(snapshot.bytes.values())
    ours = answers[names[0]][0]["ids"]
    encoded = (
        Encoded(
            name,
            total / 1e6 / statistics.median(answer["seconds"] for answer in answers[name]),
            peaks[name],
            all(answer["ids"] == ours for answer in answers[name]),
        )
        for name in names
    )
    return Tokenizing(total, tuple(encoded))


def made_up(text: str, num_bytes: int) -> str:
    """Return about `num_bytes` of random words, as frequent as in `text`. The result is the same every time."""
    words = re.findall(r"\S+\s+", text)
    draw = random.Random(SEED)
    parts: list[str] = []
    size = 0
    while size < num_bytes:
        parts.append("".join(draw.choices(words, k=_WORDS_AT_ONCE)))
        size += len(parts[-1].encode())
    return "".join(parts).encode()[:num_bytes].decode(errors="ignore")


def _reference() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


@contextlib.contextmanager
def _watched(worker: Worker) -> Iterator[dict[int, float]]:
    """Collect the peak memory in MB of a worker and of each of its children while the context lasts."""
    peaks: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        process = psutil.Process(worker.pid)
        while not done.wait(_POLL_SECONDS):
            for pid in (worker.pid, *(child.pid for child in process.children(recursive=True))):
                with contextlib.suppress(OSError):
                    peaks[pid] = peak_mb(pid) or peaks.get(pid, 0.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()
        peaks[worker.pid] = worker.peak_mb()
