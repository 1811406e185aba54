"""Distributed training: how a process finds its rank, which rows each rank reads, and what is refused.

Tests with several real processes are in tests/faults.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptcore.config import TrainConfig
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, TrainingDiverged, error_from_json, error_to_json
from gptcore.training.batches import Batches
from gptcore.training.distributed import ALONE, TIMEOUT, Group, join_ranks
from gptcore.training.rendezvous import (
    ALLOW_PUBLIC,
    STORE,
    Place,
    has_restarting_launcher,
    make_local_environments,
    open_store,
    read_place,
)
from gptcore.training.resolve import resolve
from gptcore.training.run_directory import RunDirectory
from tests.tiny import make_tokens
from tests.trainings import prepare

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}


def test_a_place_is_read_from_torchruns_variables_or_else_from_slurms():
    assert read_place({}) is None, "a process alone"
    assert read_place(TORCHRUN) == read_place({**SLURM, "MASTER_ADDR": "a"}) == Place(3, 4, 1, 2)
    assert read_place({**SLURM, **TORCHRUN, "RANK": "0"}) == Place(0, 4, 1, 2), "torchrun inside a Slurm job"
    assert read_place(SLURM) is None, "a batch script that starts one trainer has Slurm's variables too"
    assert read_place({"RANK": "0", "WORLD_SIZE": "1"}) is None, "one process is alone, even if a launcher started it"
    kubernetes = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert read_place(kubernetes) == Place(1, 2, 0, 1), "one process per pod"
    here = list(make_local_environments(2, Path("/run/meeting")))
    assert [read_place(each) for each in here] == [Place(0, 2, 0, 2), Place(1, 2, 1, 2)], "no address is needed"
    assert has_restarting_launcher({"TORCHELASTIC_RUN_ID": "x"}) and not has_restarting_launcher(SLURM)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "3"}, "RANK=3 is set, but WORLD_SIZE and MASTER_ADDR are not. Launch all processes with torchrun"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE=four.*whole numbers"),
    ],
)
def test_launcher_variables_that_are_missing_or_not_numbers_are_refused(environment, said):
    with pytest.raises(ConfigError, match=said):
        read_place(environment)


def test_a_timeout_that_is_not_a_number_is_refused_by_name(monkeypatch):
    for name, value in {**TORCHRUN, TIMEOUT: "soon"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{TIMEOUT} is 'soon'"), join_ranks():
        pass


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_a_public_address_is_refused_until_it_is_confirmed(monkeypatch, address):
    for name, value in {**TORCHRUN, "MASTER_ADDR": address, TIMEOUT: "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=rf"MASTER_ADDR={address}.* is a public address.*{ALLOW_PUBLIC}=1"),
        join_ranks(),
    ):
        pass
    monkeypatch.setenv(ALLOW_PUBLIC, "1")
    with pytest.raises(StopIteration):
        open_store(*patch_torchs_store(monkeypatch))


@pytest.mark.parametrize("address", ["10.1.2.3", "192.168.1.5", "169.254.3.4", "fe80::1", "fd00::7", "100.64.0.9"])
def test_private_and_link_local_addresses_need_no_confirmation(monkeypatch, address):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.delenv(STORE, raising=False)
    with pytest.raises(StopIteration):
        open_store(*patch_torchs_store(monkeypatch))


def test_a_name_that_is_loopback_on_one_machine_only_does_not_cut_the_others_off(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("MASTER_PORT", "1")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth0")
    monkeypatch.delenv(STORE, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.1.1", 0))])
    place, timeout = patch_torchs_store(monkeypatch)
    with pytest.raises(StopIteration):
        open_store(place, timeout)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    monkeypatch.setattr(socket, "create_server", lambda *_, **__: (_ for _ in ()).throw(OSError(98, "in use")))
    for host, all_here in (("node-0", Place(0, 2, 0, 2)), ("localhost", place), ("127.0.1.1", place)):
        monkeypatch.setenv("MASTER_ADDR", host)
        with pytest.raises(ConfigError, match=r"rank 0 cannot listen at 127\.0\.1\.1"):
            open_store(all_here, timeout)


def patch_torchs_store(monkeypatch: pytest.MonkeyPatch) -> tuple[Place, timedelta]:
    """Make torch raise StopIteration instead of opening a port. Return the arguments of a call that gets there."""
    monkeypatch.setattr(import_module("torch.distributed.rendezvous"), "rendezvous", lambda *_, **__: iter(()))
    return Place(0, 2, 0, 1), timedelta(seconds=1)


def test_a_single_process_joins_no_group_and_runs_everything_itself():
    with join_ranks() as ranks:
        assert ranks is ALONE
    assert (
        ranks.run_on_rank_0(lambda: 1) == ranks.run_on_rank_0_only(lambda: 1) == ranks.run_on_all_ranks(lambda: 1) == 1
    )
    assert ranks.run_and_take_max(lambda: 2) == 2 and ranks.average(0.5, 2.0) == [0.5, 2.0]
    assert ranks.choose_device("cpu") == torch.device("cpu")
    before = torch.get_rng_state()
    ranks.seed(1, 2)
    assert torch.equal(torch.get_rng_state(), before), "the stream of random numbers is not seeded again"


def test_ranks_that_may_use_the_same_cores_of_a_machine_divide_them(monkeypatch):
    total = torch.zeros(3, dtype=torch.int64)

    def count(all_reduce: Callable[[torch.Tensor], object]) -> list[int]:
        counted = []
        for rank, cores in enumerate(({0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5})):
            monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
            group = Group(Place(rank, 3, rank, 3), 1.0)
            monkeypatch.setattr(group, "_torch", SimpleNamespace(all_reduce=all_reduce))
            counted.append(group.count_own_cores())
        return counted

    count(total.add_)
    assert count(lambda numbers: numbers.copy_(total)) == [2, 2, 2]


def test_importing_the_trainer_does_not_load_torch_distributed():
    loading = (
        "import sys, torch; before = {*sys.modules}; import gptcore.training.trainer; print(*{*sys.modules} - before)"
    )
    ran = subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True, check=True)
    assert "gptcore.training.distributed" in ran.stdout.split()
    assert not [name for name in ran.stdout.split() if name.startswith("torch.distributed")]


def test_the_rows_of_all_ranks_in_rank_order_are_the_whole_batch():
    tokens = np.random.default_rng(0).integers(0, 257, 4001).astype(np.uint16)
    whole = Batches(tokens, 8, 8, batch_size=12, accumulation=3, seed=5)
    for size in (2, 3, 4, 12):
        parts = [Batches(tokens, 8, 8, 12, 3, 5, rank=rank, num_ranks=size) for rank in range(size)]
        assert {part.tokens_per_step for part in parts} == {whole.tokens_per_step}
        for step in (0, whole.steps_per_epoch, 7):
            shares = [part.make_micro_batches(step) for part in parts]
            for number, expected in enumerate(whole.make_micro_batches(step)):
                for side in (0, 1):
                    assert torch.equal(torch.cat([share[number][side] for share in shares]), expected[side])


def test_processes_that_cannot_share_a_batch_are_refused_with_both_numbers_and_values_that_fit():
    said = "batch_size 12 is not divisible by processes 8, .* processes 6, or batch_size 16"
    with pytest.raises(ValueError, match=said):
        TrainConfig(batch_size=12, processes=8)
    with pytest.raises(ValueError, match="processes 2 and device cuda:1: one GPU is for one process"):
        TrainConfig(processes=2, device="cuda:1")


def test_processes_auto_means_one_process_per_gpu(monkeypatch):
    auto = TrainConfig(processes="auto", batch_size=6, device="cpu")
    assert resolve(auto).processes == 1 and resolve(auto).threads == resolve(TrainConfig(device="cpu")).threads
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    on_gpus = auto.model_copy(update={"device": "cuda"})
    assert resolve(on_gpus).processes == 3
    with pytest.raises(ConfigError, match="batch_size 4 is not divisible by processes 3"):
        resolve(on_gpus.model_copy(update={"batch_size": 4}))


def test_a_run_directory_can_resume_with_another_number_of_processes(tmp_path: Path):
    tokens = make_tokens(tmp_path / "tokens")
    run = prepare(tmp_path / "run", tokens, processes=4, batch_size=8)
    before = run.read_config()
    prepare(tmp_path / "run", tokens, processes=1, batch_size=8)
    assert (before.train.processes, run.read_config().train.processes) == (4, 1)
    assert run.read_config().run_key == before.run_key


def test_a_held_lock_is_awaited_until_patience_runs_out(tmp_path: Path):
    run = RunDirectory(tmp_path)
    with run.lock():
        began = time.monotonic()
        with pytest.raises(GPTCoreError, match="is being trained by process"), run.lock(patience=0.3):
            pass
        assert time.monotonic() - began >= 0.3
        held = threading.Event()

        def wait() -> None:
            with run.lock(patience=60):
                held.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
    waiting.join()
    assert held.is_set()


@pytest.mark.parametrize("error", [CheckpointError("damaged"), TrainingDiverged("nan", 7), GPTCoreError("else")])
def test_an_error_keeps_its_type_and_message_between_processes(error):
    told = error_from_json(error_to_json(error))
    assert type(told) is type(error) and str(told) == str(error) and vars(told) == vars(error)
