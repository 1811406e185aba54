"""Several processes that train together: who is who, who reads which rows, and what is refused. Real ones: faults/."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gptcore.config import TrainConfig
from gptcore.data import Batches
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, TrainingDiverged, as_plain, from_plain
from gptcore.learning.ranks import ALONE, TIMEOUT, Place, is_restarted, joined, place
from gptcore.learning.rundir import RunDirectory
from gptcore.train import resolve
from tests.faults.trainings import make_tokens, prepare

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}


def test_a_place_is_read_from_torchruns_variables_and_from_slurms_where_these_are_absent():
    assert place({}) is None, "alone"
    assert place(TORCHRUN) == place({**SLURM, "MASTER_ADDR": "a"}) == Place(3, 4, 1, 2)
    assert place({**SLURM, **TORCHRUN, "RANK": "0"}) == Place(0, 4, 1, 2), "torchrun inside a Slurm job"
    assert place(SLURM) is None, "a batch script that starts one trainer has Slurm's variables too"
    assert place({"RANK": "0", "WORLD_SIZE": "1"}) is None, "one process is alone, whoever started it"
    kubernetes = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    assert place(kubernetes) == Place(1, 2, 0, 1), "one process per pod"
    assert is_restarted({"TORCHELASTIC_RUN_ID": "x"}) and not is_restarted(SLURM)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "3"}, "RANK=3 but not WORLD_SIZE nor MASTER_ADDR: start all processes with torchrun"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, "WORLD_SIZE=four.*whole numbers"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(environment, said):
    with pytest.raises(ConfigError, match=said):
        place(environment)


def test_a_timeout_that_is_none_is_refused_with_its_name(monkeypatch):
    for name, value in {**TORCHRUN, TIMEOUT: "soon"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{TIMEOUT} is 'soon'"), joined():
        pass


def test_a_world_of_one_costs_nothing_and_joins_nobody():
    with joined() as ranks:
        assert ranks is ALONE
    assert ranks.first(lambda: 1) == ranks.all(lambda: 1) == 1 and ranks.any(lambda: (True, False)) == [True, False]
    assert ranks.means(0.5, 2.0) == [0.5, 2.0] and ranks.device("cpu") == torch.device("cpu")
    before = torch.get_rng_state()
    ranks.seed(1, 2)
    assert torch.equal(torch.get_rng_state(), before), "its stream of random numbers goes on"


def test_training_alone_loads_nothing_of_what_joins_and_shards():
    loading = (
        "import sys, torch; before = {*sys.modules}; import gptcore.learning.trainer; print(*{*sys.modules} - before)"
    )
    ran = subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True, check=True)
    assert "gptcore.learning.ranks" in ran.stdout.split()
    assert not [name for name in ran.stdout.split() if name.startswith("torch.distributed")]


def test_the_rows_of_all_ranks_together_are_the_batch_in_its_order():
    tokens = np.random.default_rng(0).integers(0, 257, 4001).astype(np.uint16)
    whole = Batches(tokens, 8, 8, batch_size=12, accumulation=3, seed=5)
    for size in (2, 3, 4, 12):
        parts = [Batches(tokens, 8, 8, 12, 3, 5, share=(rank, size)) for rank in range(size)]
        assert {part.tokens_per_step for part in parts} == {whole.tokens_per_step}
        for step in (0, whole.steps_per_epoch, 7):
            shares = [part.batch(step) for part in parts]
            for number, expected in enumerate(whole.batch(step)):
                for side in (0, 1):
                    assert torch.equal(torch.cat([share[number][side] for share in shares]), expected[side])


def test_processes_that_cannot_share_a_batch_are_refused_with_both_numbers_and_what_would_do():
    said = "batch_size 12 is not divisible by processes 8, .* processes 6, or batch_size 16"
    with pytest.raises(ValueError, match=said):
        TrainConfig(batch_size=12, processes=8)
    with pytest.raises(ValueError, match="processes 2 and device cuda:1: one GPU is for one process"):
        TrainConfig(processes=2, device="cuda:1")


def test_processes_are_one_per_gpu_where_they_are_to_be_chosen(monkeypatch):
    auto = TrainConfig(processes="auto", batch_size=6, device="cpu")
    assert resolve(auto).processes == 1 and resolve(auto).threads == resolve(TrainConfig(device="cpu")).threads
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    on_gpus = auto.model_copy(update={"device": "cuda"})
    assert resolve(on_gpus).processes == 3
    with pytest.raises(ConfigError, match="batch_size 4 is not divisible by processes 3"):
        resolve(on_gpus.model_copy(update={"batch_size": 4}))


def test_a_run_directory_may_go_on_with_another_number_of_processes(tmp_path: Path):
    tokens = make_tokens(tmp_path / "tokens")
    run = prepare(tmp_path / "run", tokens, processes=4, batch_size=8)
    before = run.config()
    prepare(tmp_path / "run", tokens, processes=1, batch_size=8)
    assert (before.train.processes, run.config().train.processes) == (4, 1)
    assert run.config().run_key == before.run_key


def test_a_lock_is_waited_for_while_patience_lasts(tmp_path: Path):
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
def test_an_error_reaches_another_process_as_what_it_was(error):
    told = from_plain(as_plain(error))
    assert type(told) is type(error) and str(told) == str(error) and vars(told) == vars(error)
