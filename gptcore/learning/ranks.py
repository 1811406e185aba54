"""The processes that train together: which of them this one is, and what they tell one another.

A launcher (torchrun, Slurm, a Kubernetes job) starts the same program several times and says in the environment who is
who; a program started by itself is a world of one, for which nothing here costs or loads anything. Rank 0, the first,
alone reads and writes the run directory; what goes wrong on one rank is told to all, so that none waits for another
that will not come. How the weights are spread over the ranks stands in spread.py.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from gptcore.errors import ConfigError, GPTCoreError, RankLost, as_plain, from_plain

T = TypeVar("T")

TIMEOUT = "GPTFLOW_COLLECTIVE_TIMEOUT"
"""Environment variable: seconds after which a rank that does not answer during an update is taken for gone."""
_TIMEOUT_SECONDS = 120.0
_PATIENCE_SECONDS = 1800.0
"""How long ranks wait for work that only one of them does, as saving a checkpoint. A rank that dies is noticed at once
then too; only one that is cut off from the network is waited for."""
_CONNECT_SECONDS = 10.0
_MOST_QUESTIONS = 7
_PORT = "29500"
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


class Ranks:
    """A world of one."""

    rank = local_rank = 0
    size = local_size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that reads, writes and speaks for all."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T:
        """What `work`, done by the first rank alone, returns: JSON. Its GPTCoreError is raised on every rank."""
        return work()

    def all(self, work: Callable[[], T]) -> T:
        """What `work`, done by every rank, returns here. A GPTCoreError of one is raised on every rank."""
        return work()

    def any(self, asked: Callable[[], Sequence[bool]]) -> list[bool]:
        """For each question that `asked` answers, whether some rank says yes. A GPTCoreError of one is everyone's."""
        return list(asked())

    def means(self, *numbers: float) -> list[float]:
        """Each number's mean over the ranks, the same on all of them to the last bit."""
        return list(numbers)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """`tensor`, overwritten by what the first rank holds in its own."""
        return tensor

    def device(self, asked: str) -> torch.device:
        """This rank's own, of the kind that `asked` names."""
        return torch.device(asked)

    def seed(self, seed: int, step: int) -> None:
        """Makes the random numbers of update `step` a function of seed, step and rank. Alone, one stream goes on."""


ALONE = Ranks()


@dataclass(frozen=True)
class Place:
    """Who this process is among all, and among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


class Group(Ranks):
    """Several processes, joined by torch.distributed. Raises torch's errors where another rank is gone."""

    def __init__(self, place: Place, timeout_seconds: float) -> None:
        """`timeout_seconds` is how long a rank waits for others in the midst of an update."""
        from torch import distributed

        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self._timeout_seconds, self._torch = timeout_seconds, distributed

    def first(self, work: Callable[[], T]) -> T:
        value, error = _tried(work) if self.is_first else (None, None)
        with self._patience():
            told = self._told({"value": value, "error": error and as_plain(error)})
        if error is not None or told["error"] is not None:
            raise error or from_plain(told["error"])
        return cast(T, value if self.is_first else told["value"])

    def all(self, work: Callable[[], T]) -> T:
        value, error = _tried(work)
        with self._patience():
            (alarm,) = self._largest([self._alarm(error)])
        self._raise_alarm(error, alarm)
        return cast(T, value)

    def any(self, asked: Callable[[], Sequence[bool]]) -> list[bool]:
        answers, error = _tried(asked)
        said = [int(answer) for answer in answers or ()]
        silence = [0] * (_MOST_QUESTIONS - len(said))
        alarm, *heard = self._largest([self._alarm(error), *said, *silence])
        self._raise_alarm(error, alarm)
        return [bool(answer) for answer in heard[: len(said)]]

    def means(self, *numbers: float) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64)
        self._torch.all_reduce(values)
        return [value / self.size for value in values.tolist()]

    def broadcast(self, tensor: Tensor) -> Tensor:
        self._torch.broadcast(tensor, 0)
        return tensor

    def device(self, asked: str) -> torch.device:
        if asked != "cuda":
            return torch.device(asked)
        if self.local_rank >= (there := torch.cuda.device_count()):
            raise ConfigError(
                f"rank {self.rank} is process {self.local_rank + 1} of its machine, which has {there} GPUs: start one "
                "process per GPU (train.processes: auto, or torchrun's --nproc-per-node)."
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)[0] >> 1))

    def _alarm(self, error: GPTCoreError | None) -> int:
        """0, or a number that is the larger, the lower the rank."""
        return 0 if error is None else self.size - self.rank

    def _raise_alarm(self, error: GPTCoreError | None, alarm: int) -> None:
        """Raises on every rank the error of the lowest one that has any."""
        if alarm:
            source = self.size - alarm
            told = self._told(error and as_plain(error), source)
            raise error if error is not None and source == self.rank else from_plain(told)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """While it lasts, another rank may be busy with what it does alone."""
        _set_timeout(_PATIENCE_SECONDS)
        yield
        _set_timeout(self._timeout_seconds)

    def _largest(self, numbers: Sequence[int]) -> list[int]:
        values = torch.tensor(numbers)
        self._torch.all_reduce(values, self._torch.ReduceOp.MAX)
        return values.tolist()

    def _told(self, value: Any, source: int = 0) -> Any:
        """`value`, as JSON, of the rank `source`."""
        text = bytearray(json.dumps(value).encode() if self.rank == source else b"")
        size = torch.tensor([len(text)])
        self._torch.broadcast(size, source)
        data = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(int(size), dtype=torch.uint8)
        self._torch.broadcast(data, source)
        return json.loads(data.numpy().tobytes())


def place(environment: Mapping[str, str]) -> Place | None:
    """Where a launcher put this process; None if it is alone.

    Reads torchrun's variables, and Slurm's where they are absent and MASTER_ADDR says where rank 0 is. Raises
    ConfigError naming the one that is missing.
    """
    given = dict(environment)
    if "RANK" not in given and "MASTER_ADDR" in given and "SLURM_PROCID" in given:
        given |= {name: given[theirs] for name, theirs in _SLURM.items() if theirs in given}
    if "RANK" not in given or given.get("WORLD_SIZE") == "1":
        return None
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR") if not given.get(name)]:
        raise ConfigError(
            f"the environment says RANK={given['RANK']} but not {' nor '.join(missing)}: start all processes with "
            "torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        return Place(*(int(given.get(name, default)) for name, default in zip(names, ("", "", "0", "1"))))
    except ValueError:
        said = ", ".join(f"{name}={given[name]}" for name in names if name in given)
        raise ConfigError(f"the environment says {said}: they must be whole numbers.") from None


def is_restarted(environment: Mapping[str, str]) -> bool:
    """Whether torchrun watches over this process and starts it again when it ends with another exit code than 0."""
    return "TORCHELASTIC_RUN_ID" in environment


@contextmanager
def joined() -> Iterator[Ranks]:
    """The world that this process belongs to, by its environment.

    Raises ConfigError for one that makes no sense, RankLost where another rank does not come, dies or is cut off.
    """
    here = place(os.environ)
    if here is None:
        yield ALONE
        return
    from torch import distributed

    seconds = _timeout_seconds()
    try:
        _join(here, seconds)
        yield Group(here, seconds)
        distributed.barrier()
        distributed.destroy_process_group()
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        said = str(error).strip().partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
        raise RankLost(
            f"rank {here.rank} of {here.size} is without another one, which died or did not answer for {seconds:g} s "
            f"({TIMEOUT}). Started again, all go on from the last checkpoint. torch says: {said}"
        ) from error


def _join(here: Place, seconds: float) -> None:
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    os.environ.setdefault("MASTER_PORT", _PORT)
    store, _, _ = next(rendezvous("env://", here.rank, here.size, timeout=timedelta(seconds=seconds)))
    store = distributed.PrefixStore(_attempt(os.environ), store)
    store.set(f"here/{here.rank}", "")
    store.wait([f"here/{rank}" for rank in range(here.size)], timedelta(seconds=seconds))
    # Once all are there, connecting takes no time, and where gloo waits in vain for a connection it does so five times
    # as long as it was told to.
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo",
        store=store,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
        rank=here.rank,
        world_size=here.size,
    )
    _set_timeout(seconds)


def _attempt(environment: Mapping[str, str]) -> str:
    """Tells this start of the processes from earlier ones, whose addresses torchrun leaves in the store.

    On several machines each torchrun counts its own restarts: there it has to be told to make a new store each time,
    by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    is_on_one_machine = environment.get("GROUP_WORLD_SIZE") == "1"
    return f"attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0') if is_on_one_machine else 'any'}"


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


def _tried(work: Callable[[], T]) -> tuple[T | None, GPTCoreError | None]:
    try:
        return work(), None
    except GPTCoreError as error:
        return None, error
