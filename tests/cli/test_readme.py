"""The code blocks of README.md's section on how other systems take the champion, run as they are printed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from flows.config.pipelines import PipelinesFile
from flows.state.root import StateRoot
from flows.state.servers import answers
from tests.registry.made_versions import bring_versions
from tests.servers import clean, free_ports, wait_for

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
HEADING = "## How other systems take the champion\n"
SERVERS = ("mlflow models serve ", "gptflow serve-model ")
HOME, PORTS = "/path/to/mlruns", ("5001", "8000")
"""The path that every reader replaces, and ports that may be in use on the machine of the tests."""


def blocks(root: StateRoot) -> list[tuple[str, str]]:
    """Return language and text of the section's blocks, with the state root's path and free ports in them."""
    text = README.read_text().partition(HEADING)[2].partition("\n## ")[0].replace(HOME, str(root.path))
    for port, free in zip(PORTS, free_ports(len(PORTS))):
        text = text.replace(port, str(free))
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@contextmanager
def server(command: str, directory: Path, environment: dict[str, str]) -> Iterator[None]:
    """Run a server command during the context, which begins once the server answers."""
    (port,) = re.findall(r"--port (\d+)", command)
    log = directory / f"{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command.split(), cwd=directory, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/health"), 240)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_every_block_runs_as_printed(root: StateRoot, tmp_path: Path) -> None:
    quickstart = PipelinesFile(REPOSITORY / "pipelines.yaml").pipeline("quickstart")  # what `make run` trains
    bring_versions(root, "gpt-quickstart", 1, qkv_bias=False, **quickstart.model.components())
    binaries = Path(sys.executable).parent
    environment = clean(PATH=f"{binaries}{os.pathsep}{os.environ['PATH']}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = []
    with ExitStack() as running:
        for language, text in blocks(root):
            if exports := re.findall(r"^export (\w+)=(.*)$", text, re.MULTILINE):
                environment |= dict(exports)
            served = [line for line in text.splitlines() if line.startswith(SERVERS)]
            for command in served:
                running.enter_context(server(command, elsewhere, environment))
                text = text.replace(command, "")
            program = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", text]
            done = subprocess.run(program, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, text + done.stdout + done.stderr
            said.append(done.stdout)
    assert len(said) == 9, "a block without its language, ```sh or ```python, is not run"
    assert sum(map(bool, said)) >= 4
    assert '"predictions": [' in "".join(said) and "<Tokenizer 'bytes'" in "".join(said)
