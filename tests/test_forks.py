"""The fork server of the tests outlives the processes that use it."""

import json
import os
import socket
from pathlib import Path

import pytest

from tests import forks
from tests.servers import clean, gptflow


def test_a_process_that_dies_while_it_requests_a_child_does_not_end_the_fork_server(tmp_path: Path) -> None:
    assert gptflow(tmp_path, "--version").returncode == 0
    asked = {"program": "gptflow", "arguments": ["--version"], "directory": str(tmp_path), "environment": clean()}
    more = {"is_leader": False, "parent": os.getpid(), "addresses": ["", ""]}
    whole = json.dumps({**asked, **more}).encode() + b"\n"
    with Path(os.devnull).open("r+b") as nothing:
        for body in (b"", whole[:100], whole):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(forks.SERVER.address)
                if body:
                    socket.send_fds(connection, [body], [nothing.fileno()] * 3)
    assert gptflow(tmp_path, "--version").returncode == 0


def test_a_fork_server_that_cannot_fork_or_has_ended_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking, answering = socket.socketpair()
    with answering:
        answering.sendall(b"[Errno 11] Resource temporarily unavailable\n")
        with pytest.raises(RuntimeError, match=r"did not fork: .* Resource temporarily unavailable"):
            forks.Forked(asking, None)
    ended = forks.ForkServer()
    monkeypatch.setattr(forks, "SERVER", ended)
    ended.address = str(tmp_path / "socket")
    with pytest.raises(RuntimeError, match="from which this process was forked, has ended"):
        gptflow(tmp_path, "--version")
