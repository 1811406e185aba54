"""How the ranks of one training find each other.

A launcher starts the same program several times, and gives each process its rank in environment variables. On one
machine, the launcher is `flows` (train.processes): the ranks meet in a file of the run directory, and exchange values
over the loopback interface. So nothing listens to the network. On several machines, the launcher is torchrun, Slurm or
a Kubernetes job: the ranks meet at a TCP port of rank 0's machine (MASTER_ADDR). The port needs no password, and
torchrun runs code that it receives there, so a public address is refused until the user confirms it.
"""

import ipaddress
import os
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

STORE = "GPTFLOW_RANKS_FILE"
"""Environment variable: the file in which the ranks of one machine meet."""
ALLOW_PUBLIC = "GPTFLOW_ALLOW_PUBLIC_ADDRESS"
"""Environment variable: 1 confirms that the ranks may meet at a public address."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_PREFIX = ".ranks-"
_PORT = "29500"
_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


@dataclass(frozen=True)
class Place:
    """The rank of this process among all processes, and among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def new_store(directory: Path) -> Path:
    """Return the path of a file in which ranks that start now can meet. No earlier start has used it."""
    return directory.absolute() / f"{_PREFIX}{uuid.uuid4().hex}"


def remove_old_stores(directory: Path) -> None:
    """Remove the files in which earlier ranks met. They are left if the process that started those ranks was killed."""
    own = Path(os.environ.get(STORE, "")).name
    for store in directory.glob(f"{_PREFIX}*"):
        if store.name != own:
            store.unlink(missing_ok=True)


def make_local_environments(size: int, store: Path) -> Iterator[dict[str, str]]:
    """Yield the environment variables of each of `size` ranks of this machine, which meet in the file `store`.

    The file must not exist yet. The caller removes it after the ranks have ended.
    """
    for rank in range(size):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        yield {name: str(number) for name, number in numbers.items()} | {STORE: str(store), **_loopback_variables()}


def _loopback_variables() -> dict[str, str]:
    """Return the variables with which gloo and NCCL use the loopback interface only."""
    name = "lo" if sys.platform == "linux" else "lo0"
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def read_place(environment: Mapping[str, str]) -> Place | None:
    """Read the place that a launcher gave this process; None if the process trains alone.

    Reads torchrun's variables. If they are absent and MASTER_ADDR names the machine of rank 0, reads Slurm's variables.
    Raises ConfigError naming a missing variable or one that is not a number.
    """
    given = dict(environment)
    if "RANK" not in given and "MASTER_ADDR" in given and "SLURM_PROCID" in given:
        given |= {name: given[slurm_name] for name, slurm_name in _SLURM.items() if slurm_name in given}
    if "RANK" not in given or given.get("WORLD_SIZE") == "1":
        return None
    needed = ("WORLD_SIZE",) if given.get(STORE) else ("WORLD_SIZE", "MASTER_ADDR")
    if missing := [name for name in needed if not given.get(name)]:
        raise ConfigError(
            f"RANK={given['RANK']} is set, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not. "
            "Launch all processes with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        return Place(
            rank=int(given["RANK"]),
            size=int(given["WORLD_SIZE"]),
            local_rank=int(given.get("LOCAL_RANK", "0")),
            local_size=int(given.get("LOCAL_WORLD_SIZE", "1")),
        )
    except ValueError:
        settings = ", ".join(f"{name}={given[name]}" for name in names if name in given)
        raise ConfigError(f"the environment has {settings}: all must be whole numbers.") from None


def has_restarting_launcher(environment: Mapping[str, str]) -> bool:
    """Whether torchrun watches this process and starts it again after any exit code other than 0."""
    return "TORCHELASTIC_RUN_ID" in environment


def open_store(place: Place, timeout: timedelta) -> "Store":
    """Open the key-value store through which the ranks exchange their addresses.

    Raises ConfigError if it would be at a public address. Raises torch's errors if rank 0 does not appear in time.
    """
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    if path := os.environ.get(STORE):
        return distributed.FileStore(path, place.size)
    host = os.environ["MASTER_ADDR"]
    addresses = _resolve(host)
    if os.environ.get(ALLOW_PUBLIC) != "1":
        _check_not_public(host, addresses)
    port = int(os.environ.setdefault("MASTER_PORT", _PORT))
    if addresses and all(address.is_loopback for address in addresses) and _is_on_one_machine(place, host, addresses):
        os.environ.update(_loopback_variables())
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return _open_loopback_store(place, str(addresses[0]), port, timeout)
    store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=timeout))
    return distributed.PrefixStore(_name_attempt(os.environ), store)


def _open_loopback_store(place: Place, address: str, port: int, timeout: timedelta) -> "Store":
    """Open a store at a loopback address. torch itself would listen on every interface."""
    from torch.distributed import TCPStore

    settings: dict[str, Any] = {}
    if place.rank == 0:
        try:
            listener = socket.create_server((address, port), family=_family_of(address))
        except OSError as error:
            raise ConfigError(
                f"rank 0 cannot listen at {address}, MASTER_PORT={port}: {error.strerror}. Choose another port."
            ) from None
        settings = {"is_master": True, "master_listen_fd": listener.detach(), "multi_tenant": True}
    return TCPStore(address, port, place.size, timeout=timeout, **settings)


def _family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _resolve(host: str) -> list[Address]:
    """Return the addresses of a host; none if it cannot be resolved, which torch reports."""
    try:
        texts = {str(entry[4][0]).partition("%")[0]: None for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return []
    addresses = map(ipaddress.ip_address, texts)
    return [getattr(address, "ipv4_mapped", None) or address for address in addresses]


def _is_on_one_machine(place: Place, host: str, addresses: list[Address]) -> bool:
    """Whether a host with these loopback addresses means that all ranks are on this machine.

    Many systems give a machine's own name a loopback address in /etc/hosts. On the machine of rank 0, that says nothing
    about the other ranks.
    """
    return host == "localhost" or host in map(str, addresses) or place.local_size == place.size


def _check_not_public(host: str, addresses: list[Address]) -> None:
    if public := [str(address) for address in addresses if address.is_global]:
        shown = host if public == [host] else f"{host} ({', '.join(public)})"
        raise ConfigError(
            f"MASTER_ADDR={shown} is a public address. Anyone who reaches the ranks' port can read the weights, change "
            f"the training and, under torchrun, run code. Use a private network, or confirm with {ALLOW_PUBLIC}=1."
        )


def _name_attempt(environment: Mapping[str, str]) -> str:
    """Return a prefix for the keys of this start of the processes. Addresses of earlier starts stay in the store.

    On several machines each torchrun counts its own restarts, so the count cannot be used. There,
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun create a new store each time.
    """
    is_on_one_machine = environment.get("GROUP_WORLD_SIZE") == "1"
    return f"attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0') if is_on_one_machine else 'any'}"
