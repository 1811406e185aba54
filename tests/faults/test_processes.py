"""Trainings by several processes, killed and stopped: they end like a training by one process, up to rounding."""

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from flows.retrain import trainer_process
from gptcore.errors import ConfigError
from gptcore.tokens.directory import Tokens
from gptcore.training import trainer
from gptcore.training.rendezvous import make_local_environments, new_store
from gptcore.training.run_directory import STOPPED, MetricsLine, Result, RunDirectory
from gptcore.training.trainer import train_directory
from tests.tiny import TINY_MODEL, make_tokens
from tests.trainings import StopAfter, outcome, prepare, updates_of

pytestmark = pytest.mark.timeout(600)
ROOT = Path(trainer.__file__).parents[2]
# 257 rows of embeddings and 100 updates, some of them in another epoch: nothing divides evenly.
MODEL = {**TINY_MODEL, "context_length": 32, "tied": True}
TRAIN = {"max_steps": 100, "batch_size": 8, "eval_every": 33, "eval_batches": 3, "checkpoint_steps": None}
SEVERAL = """
import json, sys
from pathlib import Path
from gptcore.errors import GPTCoreError
from gptcore.training.distributed import join_ranks
from gptcore.training.run_directory import RunDirectory
from gptcore.training.trainer import train_directory
from tests.trainings import StopAfter

with join_ranks() as ranks:
    for path, step in json.loads(sys.argv[1]):
        try:
            train_directory(Path(path), StopAfter(RunDirectory(Path(path)), step), ranks)
        except GPTCoreError as error:
            (Path(path) / f"told-{ranks.rank}").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return make_tokens(tmp_path_factory.mktemp("tokens"), num_words=2250)


@pytest.fixture(autouse=True)
def _from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train_in_turn(processes: int, *asked: tuple[RunDirectory, int]) -> None:
    """Train each run directory to a step or to its end, all in one launch of `processes` processes."""
    steps = json.dumps([(str(run.path), step) for run, step in asked])
    store = new_store(asked[0][0].path.parent)
    ranks = [
        subprocess.Popen([sys.executable, "-c", SEVERAL, steps], env={**os.environ, **rank}, cwd=ROOT)
        for rank in make_local_environments(processes, store)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * processes
    finally:
        for rank in ranks:
            rank.kill()
        store.unlink(missing_ok=True)


def assert_same_curve(run: RunDirectory, twin: RunDirectory) -> None:
    """Compare each loss and gradient norm and the best validation loss to 1e-4, and names and shapes of the weights."""
    lines, expected = run.read_metrics(), twin.read_metrics()
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for key in ("loss", "grad_norm", "train_loss", "val_loss", "tokens_seen", "learning_rate"):
        values = [[line[key] for line in each if key in line] for each in (lines, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), key
    ended, wanted = run.read_result(), twin.read_result()
    assert ended is not None and wanted is not None and ended.best_step == wanted.best_step
    assert ended.best_val_loss == pytest.approx(wanted.best_val_loss, rel=1e-4)
    assert shapes(run.weights) == shapes(twin.weights)


def shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in list(opened.keys())}


def saved_shapes(run: RunDirectory) -> dict[str, dict[str, list[int]]]:
    (directory,) = run.checkpoints.iterdir()
    return {file.name: shapes(file) for file in directory.glob("*.safetensors")}


@pytest.mark.deep
def test_one_two_and_four_processes_learn_the_same_even_if_the_number_changes_on_resume(
    tokens: Tokens, tmp_path: Path
) -> None:
    def made(name: str, **train: Any) -> RunDirectory:
        return prepare(tmp_path / name, tokens, model=MODEL, **{**TRAIN, **train})

    to_the_end = TRAIN["max_steps"] + 1
    twins = {optimizer: made(f"{optimizer}-1", optimizer=optimizer) for optimizer in ("adamw", "muon")}
    for twin in twins.values():
        train_directory(twin.path, trainer.Stop())
    copies, shards = made("adamw-4"), made("muon-4", optimizer="muon", shard=True, batch_size=8)
    mixed, uneven = made("mixed", shard=True), made("uneven", batch_size=6)
    train_in_turn(4, (copies, to_the_end), (shards, to_the_end), (mixed, 30), (uneven, to_the_end))
    by_four = saved_shapes(mixed)
    assert train_directory(mixed.path, StopAfter(mixed, 60)) is None
    assert saved_shapes(mixed) == by_four, "a checkpoint does not depend on the number of processes"
    by_two = made("muon-2", optimizer="muon")
    train_in_turn(2, (mixed, to_the_end), (by_two, to_the_end))

    for run in (copies, mixed):
        assert_same_curve(run, twins["adamw"])
    for run in (shards, by_two):
        assert_same_curve(run, twins["muon"])
    told = [(uneven.path / f"told-{rank}").read_text() for rank in range(4)]
    assert len(set(told)) == 1 and "batch_size 6 is not divisible by processes (WORLD_SIZE) 4" in told[0]
    assert isinstance(uneven.read_failure(), ConfigError) and not uneven.metrics.exists()


def trainers(run: RunDirectory) -> list[psutil.Process]:
    """Return the processes that train the run directory, sorted by rank."""
    alive = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)
    ours = (child for child in alive if str(run.path) in child.cmdline())
    return sorted(ours, key=lambda child: int(child.environ()["RANK"]))


def internet_sockets(processes: list[psutil.Process]) -> list[tuple[int, Any]]:
    """Return (process id, socket) of the processes and their children. A sample may miss some sockets."""
    tree = [each for process in processes for each in (process, *process.children(recursive=True))]
    return [(each.pid, opened) for each in tree for opened in each.net_connections(kind="inet")]


def listening_beyond_this_machine(sockets: list[tuple[int, Any]]) -> list[str]:
    """Return the addresses, other than loopback ones, at which sockets listen."""
    return [
        f"{pid}: {opened.laddr}"
        for pid, opened in sockets
        if opened.status == psutil.CONN_LISTEN and not ipaddress.ip_address(opened.laddr.ip).is_loopback
    ]


@pytest.mark.slow
def test_a_training_by_two_processes_that_is_interrupted_and_killed_ends_like_its_twin(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine this process, which interrupts, may get no time for a hundred updates.
    given = {**TRAIN, "max_steps": 250, "processes": 2, "checkpoint_steps": 20}
    twin, run = (prepare(tmp_path / name, tokens, **given) for name in ("twin", "run"))  # with dropout
    train_in_turn(2, (twin, given["max_steps"] + 1))

    class Interrupted(BaseException):
        pass

    def interrupt(_: list[MetricsLine]) -> None:
        if updates_of(run) >= 10:
            stores.extend(run.path.glob(".ranks-*"))
            raise Interrupted

    def look() -> None:
        while not ended.wait(0.05):
            with suppress(psutil.Error, KeyError):  # a process ended, or is about to become a trainer
                sockets.extend(internet_sockets(trainers(run)))

    stores: list[Path] = []
    sockets: list[tuple[int, Any]] = []
    ended = threading.Event()
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    # An environment for several machines does not open the ports of a training on one.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("MASTER_ADDR", "0.0.0.0")
    (run.path / ".ranks-of-a-killed-start").write_bytes(b"\0" * 64)
    with pytest.raises(Interrupted):
        trainer_process.train(run, interrupt)
    assert len(stores) == 1 and not list(run.path.glob(".ranks-*")), "each start meets in a file of its own"
    assert run.saved_step() == len(run.read_metrics()) >= 10, "all ranks stopped after the same update and saved"

    def kill() -> None:
        for lines, rank in ((50, 1), (100, 0)):
            while updates_of(run) < lines:
                time.sleep(0.05)
            trainers(run)[rank].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    said: list[str] = []
    result = trainer_process.train_with_restarts(run, lambda _: None, said.append)
    thread.join()
    ended.set()
    looking.join()
    assert sockets and listening_beyond_this_machine(sockets) == []
    assert len(said) == 2 and all("was killed by signal 9" in each for each in said), said
    assert isinstance(result, Result)
    assert outcome(run) == outcome(twin), "equal to the last bit: dropout depends on seed, step and rank"
    assert "has lost another rank, which died" in (run.path / "trainer.log").read_text()


@pytest.mark.deep
def test_a_signal_to_one_slurm_process_stops_all_after_the_same_update(tokens: Tokens, tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", tokens, max_steps=5000, batch_size=8, checkpoint_steps=None)
    slurm = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **slurm}
    command = [sys.executable, "-m", "gptcore.train", str(run.path)]
    both = [
        subprocess.Popen(command, env={**environment, "SLURM_PROCID": rank}, text=True, stdout=subprocess.PIPE)
        for rank in "01"
    ]
    try:
        while updates_of(run) < 5 and not any(process.poll() for process in both):
            time.sleep(0.02)
        assert listening_beyond_this_machine(internet_sockets([psutil.Process(process.pid) for process in both])) == []
        both[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60)[0] for process in both]
    finally:
        for process in both:
            with suppress(ProcessLookupError):
                process.kill()
    assert [process.returncode for process in both] == [STOPPED, STOPPED]
    assert run.saved_step() == len(run.read_metrics())
    assert "stopped (another rank was asked to stop) and saved" in said[0] and said[1] == ""
    # Under torchrun, an exit code above 0 would cause restarts, and no restart can fix this error.
    watched = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    wrong = subprocess.run([*command[:-1], str(tmp_path)], env=watched, capture_output=True, text=True)
    assert wrong.returncode == 0 and wrong.stderr.startswith("error: ") and "config.json does not exist" in wrong.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a virtual cable."""
    names = (f"gptflow-a-{os.getpid()}", f"gptflow-b-{os.getpid()}")
    cable = [f"{end}{os.getpid()}" for end in ("gfa", "gfb")]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, cable), 1):
            ip("-n", name, "link", "set", end, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        pytest.skip(f"network namespaces need root and iproute2: {error}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def start_on(host: str, run: RunDirectory, log: Path) -> "subprocess.Popen[bytes]":
    """Start torchrun on one of at most two hosts; the first host keeps the rendezvous."""
    is_first = "-a-" in host
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "test"]
    settings = {"is_host": is_first, "last_call_timeout": 15, "read_timeout": 20}
    settings |= {"keep_alive_interval": 1, "keep_alive_max_attempt": 3}
    patience = ["--rdzv-conf", ",".join(f"{key}={value}" for key, value in settings.items())]
    address = ["--local-addr", "10.77.0.1" if is_first else "10.77.0.2"]
    command = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "5"]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "eth0",
        "GPTFLOW_COLLECTIVE_TIMEOUT": "4",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "LOGLEVEL": "ERROR",
    }
    inside = ["ip", "netns", "exec", host, sys.executable, *command, *rendezvous, *patience, *address]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*inside, "-m", "gptcore.train", str(run.path)], env=environment, stdout=output, stderr=output
        )


@pytest.mark.deep
def test_a_disconnected_host_costs_a_restart_and_joins_again(
    two_hosts: tuple[str, str], tokens: Tokens, tmp_path: Path
) -> None:
    # This low rate keeps rounding errors small for thousands of updates. Each loss still shows which text was learned.
    given = {**TRAIN, "max_steps": 2500, "eval_every": 500, "checkpoint_steps": 50, "learning_rate": 3e-5}
    twin, run = (prepare(tmp_path / name, tokens, model=MODEL, **given) for name in ("twin", "run"))
    train_directory(twin.path, trainer.Stop())
    second = two_hosts[1]
    log = tmp_path / "log"
    agents = [start_on(host, run, log) for host in two_hosts]
    try:
        wait_for(lambda: is_one_of_two(agents[1]), agents, log)
        wait_for(lambda: updates_of(run) >= run.saved_step() + 20, agents, log)
        ip("-n", second, "link", "set", "eth0", "down")
        wait_for(lambda: "has lost another rank" in log.read_text(), agents[:1], log)
        saved = run.saved_step()
        wait_for(lambda: run.saved_step() >= saved + 50, agents[:1], log)  # by the first host alone
        agents[1].kill()  # this torchrun would keep waiting for a rendezvous that is over
        ip("-n", second, "link", "set", "eth0", "up")
        again = start_on(second, run, log)
        agents.append(again)
        ended = [agent.wait(timeout=240) for agent in (agents[0], again)]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert ended == [0, 0], log.read_text()
    assert "stopped (SIGTERM) and saved" in log.read_text(), "the first host stops to resume with two"
    assert_same_curve(run, twin)


def is_one_of_two(agent: "subprocess.Popen[bytes]") -> bool:
    """Whether the trainer of this torchrun is one of two."""
    with suppress(psutil.Error):
        return any(child.environ().get("WORLD_SIZE") == "2" for child in psutil.Process(agent.pid).children())
    return False


def wait_for(condition: Any, alive: list["subprocess.Popen[bytes]"], log: Path) -> None:
    until = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < until and all(process.poll() is None for process in alive), log.read_text()
        time.sleep(0.05)
