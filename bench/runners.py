"""Snapshot and tokens of a large corpus by each task runner: `python -m bench.runners --megabytes 10 100 1000`.

The text is made up (see tokenizing.py), in documents of a few KB to some MB, one file each. Every engine works on it in
its own process, with two workers on two cores:

- whole: without shards, as for small corpora: one process makes the snapshot, two encode it;
- processes: the plain processes of gptcore, over shards;
- dask, ray: a cluster of their own. Each shard is a task of a Prefect flow run on a temporary server. The start of the
  server is not counted, because a run of gptflow has one in any case.

The seconds have four parts. `start` lasts until the cluster is up. `work` is the time inside the functions, summed over
the shards and divided by the workers. `between` is the rest of the mapping, which is the cost of the engine:
serialising, scheduling, Prefect's records, imports in the workers, and waiting for the last shard. `merge` is the work
of a single process.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.tokenizing import _reference, made_up
from bench.workers import peak_mb
from gptcore.config import CorpusConfig
from gptcore.corpus import contamination, ingest
from gptcore.processes import count_cpus, map_in_processes
from gptcore.tokens import files

ENGINES = ("whole", "processes", "dask", "ray")
_WHOLE = 1 << 60


def write_texts(directory: Path, megabytes: int) -> int:
    """Write documents of made-up text, of some KB in the median and 4 MB at most; return their bytes."""
    draw, text = random.Random(megabytes), made_up(_reference(), min(megabytes, 50) * 1_000_000)
    total = 0
    for number in range(10**6):
        if total >= megabytes * 1_000_000:
            break
        size = min(int(draw.lognormvariate(math.log(12_000), 1.5)), 4_000_000)
        start = draw.randrange(max(1, len(text) - size))
        words = text[start : start + size].split(" ")
        draw.shuffle(words)  # so that no run of words is in two documents
        written = " ".join(words).encode()
        (directory / f"{number:06d}.txt").write_bytes(written)
        total += len(written)
    return total


def timed(function: Callable[[Any], Any], shard: Any) -> tuple[Any, float, float]:
    """Return a shard's result, its seconds, and the peak memory of its process in MB."""
    began = time.perf_counter()
    result = function(shard)
    return result, time.perf_counter() - began, peak_mb(os.getpid())


class _Watched:
    """A map that records where its seconds go."""

    def __init__(self, map_shards: Any, start: Callable[[], object]) -> None:
        self._map_shards, self._start = map_shards, start
        self.start = self.mapping = self.work = self.peak = 0.0
        self.shards = 0

    def __call__(self, step: str, action: str, function: Callable[[Any], Any], shards: Sequence[Any]) -> list[Any]:
        began = time.perf_counter()
        self._start()
        started = time.perf_counter()
        made = self._map_shards(step, action, functools.partial(timed, function), shards)
        self.start += started - began
        self.mapping += time.perf_counter() - started
        self.work += sum(seconds for _, seconds, _ in made)
        self.peak = max([self.peak, *(peak for _, _, peak in made)])
        self.shards += len(shards)
        return [result for result, _, _ in made]


def measure(engine: str, texts: Path) -> dict[str, Any]:
    """Measure the work of one engine on the texts."""
    for room in (ingest, contamination, files):
        room.WHOLE_BYTES = _WHOLE if engine == "whole" else 0  # type: ignore[attr-defined]
    if engine in ("dask", "ray"):
        return _in_a_flow(engine, texts)
    return _worked_on(_Watched(map_in_processes, lambda: None), texts)


def _worked_on(watched: _Watched, texts: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=texts.parent) as name:
        began = time.perf_counter()
        made = ingest.ingest(CorpusConfig(sources=(str(texts),)), Path(name) / "corpora", texts, watched)
        ingested = time.perf_counter()
        encoded = files.tokenize(made.path, "gpt2", Path(name) / "tokens", map_shards=watched)
        total = time.perf_counter() - began
        work = watched.work / count_cpus()
        return {
            "total": total,
            "ingest": ingested - began,
            "tokenize": total - (ingested - began),
            "start": watched.start,
            "work": work,
            "between": watched.mapping - work,
            "merge": total - watched.start - watched.mapping,
            "shards": watched.shards,
            "peak_mb": watched.peak,
            "sha256": [made.sha256[:8], encoded.sha256[:8]],
        }


def _in_a_flow(engine: str, texts: Path) -> dict[str, Any]:
    from prefect import flow, task

    from flows.retrain.clusters import Cluster

    @task
    def work(watched: Any) -> dict[str, Any]:
        return _worked_on(watched.it, texts)

    @flow
    def measured() -> dict[str, Any]:
        with Cluster(engine, None) as cluster:
            return work(_Unsent(_Watched(cluster, cluster.start)))

    flow(lambda: None, name="server-starts")()
    return measured()


class _Unsent:
    """A value that stays in this process: Prefect sends a task's parameters along with the tasks that it calls."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __reduce__(self) -> tuple[Any, ...]:
        return _Unsent, (None,)


@contextlib.contextmanager
def _quiet_prefect(home: str) -> Iterator[dict[str, str]]:
    from flows.state.root import OPT_OUTS

    own = {"PREFECT_HOME": home, "PREFECT_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    yield {**os.environ, **OPT_OUTS, **own, "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}


def main() -> None:
    """Print a table per size, and one line of JSON per measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench.runners")
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--texts", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.texts:
        from bench import runners  # other processes find its functions, unlike those of __main__

        print(json.dumps(runners.measure(given.engines[0], given.texts)))
        return
    for megabytes in given.megabytes:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "texts").mkdir()
            written = write_texts(Path(name) / "texts", megabytes)
            print(f"{written / 1e6:,.0f} MB")
            for engine in given.engines:
                with _quiet_prefect(f"{name}/prefect") as environment:
                    command = [sys.executable, "-m", "bench.runners", "--texts", f"{name}/texts", "--engines", engine]
                    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
                found = json.loads(said.stdout.splitlines()[-1])
                numbers = "  ".join(f"{key} {found[key]:.1f}" for key in list(found)[:-1])
                print(f"  {engine:<10} {numbers}  {' '.join(found['sha256'])}", flush=True)


if __name__ == "__main__":
    main()
