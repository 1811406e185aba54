"""A real PostgreSQL server for tests: Debian's, on a private port, with a password that must not leak."""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import free_ports, wait_for

USER = "keeper"


class Postgres:
    """A server that listens on `host`, and the databases on it."""

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        self.directory, self.host = directory, host
        self.port = free_ports(1)[0]
        self.password = f"pw-{secrets.token_hex(12)}"
        self.count = 0

    def start(self, *before: str) -> None:
        """Create the cluster and start it. `before` precedes the server's command, as in `ip netns exec`."""
        secret = self.directory / "password"
        secret.write_text(self.password)
        data = self.directory / "data"
        if _is_root():
            for path in (self.directory, secret):
                shutil.chown(path, "postgres", "postgres")
        initdb = [*_program("initdb"), "--pgdata", str(data), "--username", USER, "--pwfile", str(secret)]
        options = ["--auth", "scram-sha-256", "--no-sync", "--locale", "C.UTF-8", "--encoding", "UTF8"]
        subprocess.run([*initdb, *options], check=True, capture_output=True, cwd=self.directory)
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 scram-sha-256\n")
        settings = {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": self.directory,
            "fsync": "off",
            "max_connections": 200,
        }
        told = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (self.directory / "log").open("wb") as log:
            command = [*before, *_program("postgres"), "-D", str(data), *told]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)
        wait_for(lambda: "ready to accept" in (self.directory / "log").read_text(), 240)

    def stop(self) -> None:
        pid = int((self.directory / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, 3)  # SIGQUIT: stop at once
        self.process.wait(30)

    def new(self) -> str:
        """Create an empty database and return its URL, without the password."""
        self.count += 1
        self.ask("postgres", f"create database state{self.count}")
        return f"postgresql://{USER}@{self.host}:{self.port}/state{self.count}"

    def ask(self, database: str, *statements: str) -> list[str]:
        """Run the statements with psql over the local socket, and return the lines of its output."""
        told = [part for statement in statements for part in ("-c", statement)]
        place = ["-h", str(self.directory), "-p", str(self.port), "-U", USER, "-d", database]
        environment = {**os.environ, "PGPASSWORD": self.password}
        done = subprocess.run(
            ["psql", *place, "-At", *told], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()

    def dump(self, database: str) -> str:
        """Return everything in a database, as SQL."""
        place = ["-h", str(self.directory), "-p", str(self.port), "-U", USER, database]
        environment = {**os.environ, "PGPASSWORD": self.password}
        return subprocess.run(
            [*_tool("pg_dump"), *place], env=environment, check=True, capture_output=True, text=True
        ).stdout


@contextmanager
def running(host: str = "127.0.0.1", *before: str) -> Iterator[Postgres]:
    """Run a new server. Skip the test if PostgreSQL is not installed."""
    if _found("initdb") is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="gptflow-postgres-", dir="/tmp") as directory:
        server = Postgres(Path(directory), host)
        server.start(*before)
        try:
            yield server
        finally:
            server.stop()


def _found(program: str) -> str | None:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return str(versions[-1]) if versions else shutil.which(program)


def _tool(program: str) -> list[str]:
    found = _found(program)
    assert found is not None, program
    return [found]


def _program(program: str) -> list[str]:
    """Return the command of a server program. If we are root, it runs as `postgres`: PostgreSQL refuses root."""
    return (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *_tool(program)]
        if _is_root()
        else (_tool(program))
    )


def _is_root() -> bool:
    return os.getuid() == 0
