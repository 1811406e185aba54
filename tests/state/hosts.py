"""Hosts for network tests: network namespaces, each connected to this machine by a cable that a test can unplug."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.servers import COMMAND, clean

SERVER = "10.77.0.1"
"""The address of this machine that every host can reach."""


class Host:
    """A network namespace with its cable to this machine."""

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
        """Unplug the cable."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip("link", "set", self.cable, "up")

    def remove(self) -> None:
        """Kill the processes that still run on this host, and delete its namespace."""
        for process in self.begun:
            process.kill()
            process.wait()
        _ip("netns", "del", self.name)

    def begin(self, project: Path, log: Path, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Start the command line on this host, with its output in `log`."""
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
    """Make two hosts, which reach this machine at SERVER. Skip the test if network namespaces cannot be made."""
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
