"""The processes (ranks) that train one model together, and how they exchange values.

A program started by itself is a world of one rank, for which this module loads and costs nothing. Only rank 0 reads and
writes the run directory. An error on one rank is raised on all ranks, so that no rank waits for another that has
stopped. rendezvous.py says how the ranks find each other, and parallel.py distributes the weights over them.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from gptcore.devices import choose_device, count_devices
from gptcore.errors import ConfigError, GPTCoreError, RankLost, error_from_json, error_to_json
from gptcore.processes import count_cpus, identify_cores
from gptcore.training.rendezvous import Place, open_store, read_place

T = TypeVar("T")

TIMEOUT = "GPTFLOW_COLLECTIVE_TIMEOUT"
"""Environment variable: seconds after which a rank that does not answer during an update counts as lost."""
_TIMEOUT_SECONDS = 120.0
_LONG_TIMEOUT_SECONDS = 1800.0
"""Timeout while one rank works alone, for example saves a checkpoint. It only matters for a rank that is cut off from
the network: a rank that dies is noticed at once."""
_CONNECT_SECONDS = 10.0


class Ranks:
    """A world of one rank, and the interface of a larger one."""

    rank = local_rank = 0
    size = local_size = 1

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank reads, writes and prints for all ranks."""
        return self.rank == 0

    def run_on_rank_0(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 only. Return its result, which JSON must be able to hold, on all ranks.

        A GPTCoreError of rank 0 is raised on all ranks.
        """
        return work()

    def run_on_rank_0_only(self, work: Callable[[], T]) -> T | None:
        """Call `work` on rank 0 only. Return its result, of any type, on rank 0, and None on other ranks.

        A GPTCoreError of rank 0 is raised on all ranks.
        """
        return work()

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank. Return this rank's result. A GPTCoreError of any rank is raised on all ranks."""
        return work()

    def run_and_take_max(self, work: Callable[[], int]) -> int:
        """Call `work` on every rank. Return the largest result, at least 0, of all ranks.

        A GPTCoreError of any rank is raised on all ranks.
        """
        return work()

    def average(self, *numbers: float) -> list[float]:
        """Return each number's mean over the ranks, equal on all ranks to the last bit."""
        return list(numbers)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with the tensor of rank 0, and return it."""
        return tensor

    def count_own_cores(self) -> int:
        """Return this rank's share of the cores that it may use: ranks with the same cores divide them."""
        return count_cpus()

    def choose_device(self, kind: str) -> torch.device:
        """Return this rank's device of a kind such as "cpu" or "cuda". Raises DeviceMissing or ConfigError."""
        return choose_device(kind)

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for update `step` by seed, step and rank. A world of one rank does not seed for each update."""


ALONE = Ranks()


class Group(Ranks):
    """Several ranks, joined by torch.distributed. Every method raises torch's errors if another rank is lost."""

    def __init__(self, place: Place, timeout_seconds: float) -> None:
        """`timeout_seconds` is how long a rank waits for the others during an update."""
        from torch import distributed

        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self._timeout_seconds, self._torch = timeout_seconds, distributed

    def run_on_rank_0(self, work: Callable[[], T]) -> T:
        value = self.run_on_rank_0_only(work)
        received = self._broadcast_json(value)
        return cast(T, value if self.is_rank_0 else received)

    def run_on_rank_0_only(self, work: Callable[[], T]) -> T | None:
        value, error = _try(work) if self.is_rank_0 else (None, None)
        with self._long_timeout():
            received = self._broadcast_json(error and error_to_json(error))
        if received is not None:
            raise error or error_from_json(received)
        return value

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        value, error = _try(work)
        with self._long_timeout():
            (alarm,) = self._all_reduce_max([self._alarm_of(error)])
        self._raise_alarm(error, alarm)
        return cast(T, value)

    def run_and_take_max(self, work: Callable[[], int]) -> int:
        value, error = _try(work)
        alarm, largest = self._all_reduce_max([self._alarm_of(error), value or 0])
        self._raise_alarm(error, alarm)
        return largest

    def average(self, *numbers: float) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64)  # (numbers,)
        self._torch.all_reduce(values)
        return [value / self.size for value in values.tolist()]

    def broadcast(self, tensor: Tensor) -> Tensor:
        self._torch.broadcast(tensor, 0)
        return tensor

    def count_own_cores(self) -> int:
        # Slurm may give each rank of a machine cores of its own, or let all of them use all cores.
        seen = torch.zeros(self.size, dtype=torch.int64)  # (ranks,)
        seen[self.rank] = own = zlib.crc32(identify_cores().encode())
        self._torch.all_reduce(seen)
        return max(1, count_cpus() // int((seen == own).sum()))

    def choose_device(self, kind: str) -> torch.device:
        device = choose_device(kind)
        if kind != "cuda":
            return device
        if self.local_rank >= (num_gpus := count_devices("cuda")):
            raise ConfigError(
                f"rank {self.rank} is process {self.local_rank + 1} of its machine, which has {num_gpus} GPUs. Start "
                "one process per GPU (train.processes: auto, or torchrun's --nproc-per-node)."
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)[0] >> 1))

    def _alarm_of(self, error: GPTCoreError | None) -> int:
        """Return 0 without an error. With an error, lower ranks return larger numbers."""
        return 0 if error is None else self.size - self.rank

    def _raise_alarm(self, error: GPTCoreError | None, alarm: int) -> None:
        """Raise the error of the lowest rank that has one, on every rank. `alarm` is the largest of all ranks."""
        if alarm:
            source = self.size - alarm
            received = self._broadcast_json(error and error_to_json(error), source)
            raise error if error is not None and source == self.rank else error_from_json(received)

    @contextmanager
    def _long_timeout(self) -> Iterator[None]:
        """Wait longer for other ranks inside this context, because one of them may be working alone."""
        _set_timeout(_LONG_TIMEOUT_SECONDS)
        yield
        _set_timeout(self._timeout_seconds)

    def _all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest value over the ranks of each number."""
        values = torch.tensor(numbers)  # (numbers,)
        self._torch.all_reduce(values, self._torch.ReduceOp.MAX)
        return values.tolist()

    def _broadcast_json(self, value: Any, source: int = 0) -> Any:
        """Return the `value` of the rank `source`, on every rank, as JSON gives it back."""
        text = bytearray(json.dumps(value).encode() if self.rank == source else b"")
        size = torch.tensor([len(text)])  # (1,)
        self._torch.broadcast(size, source)
        # (bytes,)
        data = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
        self._torch.broadcast(data, source)
        return json.loads(data.numpy().tobytes())


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other ranks that the environment names, and leave them on exit.

    Raises ConfigError for a public address or variables that contradict each other, RankLost if another rank does not
    appear, dies or is cut off.
    """
    place = read_place(os.environ)
    if place is None:
        yield ALONE
        return
    from torch import distributed

    seconds = _timeout_seconds()
    try:
        _connect(place, seconds)
        yield Group(place, seconds)
        distributed.barrier()
        distributed.destroy_process_group()
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        cause = str(error).strip().partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise RankLost(
            f"rank {place.rank} of {place.size} has lost another rank, which died or did not answer for {seconds:g} s "
            f"({TIMEOUT}). Start the training again: all ranks resume from the last checkpoint. torch reports: {cause}"
        ) from error


def _connect(place: Place, seconds: float) -> None:
    from torch import distributed

    store = open_store(place, timedelta(seconds=seconds))
    store.set(f"here/{place.rank}", "")
    store.wait([f"here/{rank}" for rank in range(place.size)], timedelta(seconds=seconds))
    # When all ranks are present, connecting takes no time. The timeout is short because gloo waits five times as long
    # as it should for a connection that nobody makes.
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo",
        store=store,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
        rank=place.rank,
        world_size=place.size,
    )
    _set_timeout(seconds)


def _set_timeout(seconds: float) -> None:
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=seconds))


def _timeout_seconds() -> float:
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given or _TIMEOUT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86_400:
        raise ConfigError(f"{TIMEOUT} is {given!r}; it must be a number of seconds from 1 to 86400.")
    return seconds


def _try(work: Callable[[], T]) -> tuple[T | None, GPTCoreError | None]:
    try:
        return work(), None
    except GPTCoreError as error:
        return None, error
