"""Machines as far as a network goes: network namespaces, each joined to this one by a cable that can be pulled."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.flows.servers import COMMAND, clean

SERVER = "10.77.0.1"
"""Where this machine answers all of them."""


class Host:
    """One of them."""

    def __init__(self, number: int) -> None:
        self.begun: list[subprocess.Popen[bytes]] = []
        self.name, self.cable = f"gptflow-{os.getpid()}-{number}", f"gf{os.getpid() % 100000}-{number}"
        here, there, inside = f"10.77.{number}.1", f"10.77.{number}.2", f"{self.cable}i"
        _ip("netns", "add", self.name)
        _ip("link", "add", self.cable, "type", "veth", "peer", "name", inside, "netns", self.name)
        _ip("addr", "add", f"{here}/30", "dev", self.cable)
        _ip("link", "set", self.cable, "up")
        for command in (
            ["addr", "add", f"{there}/30", "dev", inside],
            ["link", "set", inside, "up"],
            ["link", "set", "lo", "up"],
            ["route", "add", "default", "via", here],
        ):
            _ip("-n", self.name, *command)

    def cut(self) -> None:
        """Pulls the cable."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Plugs it in again."""
        _ip("link", "set", self.cable, "up")

    def remove(self) -> None:
        """Also ends what was begun there and is not over."""
        for process in self.begun:
            process.kill()
            process.wait()
        _ip("netns", "del", self.name)

    def begin(self, project: Path, log: Path, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Starts the command line there; what it says goes to `log`."""
        with log.open("w") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *COMMAND, *arguments],
                cwd=project,
                env=clean(**environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.begun.append(process)
        return process


@contextmanager
def two() -> Iterator[tuple[Host, Host]]:
    """Two hosts, which reach this machine as SERVER. Skips where namespaces may not be made."""
    if os.getuid() != 0:
        pytest.skip("only root may make network namespaces")
    made: list[Host] = []
    try:
        try:
            _ip("addr", "add", f"{SERVER}/32", "dev", "lo")
            made += [Host(1), Host(2)]
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield made[0], made[1]
    finally:
        for host in made:
            host.remove()
        with suppress(OSError, subprocess.CalledProcessError):
            _ip("addr", "del", f"{SERVER}/32", "dev", "lo")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
