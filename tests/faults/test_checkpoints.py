"""Damaged, foreign and hostile checkpoints, and a full disk: training resumes only from its own intact checkpoints."""

import errno
import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import manifest
from gptcore.errors import CheckpointError, DiskFull, NewerFormat
from gptcore.training import checkpoint
from gptcore.training.state import TrainState
from tests.faults.test_hostile_files import Payload
from tests.training.checkpoints import CFG, IDENTITY, TRAIN, everything, names, restored, saved, train_on

NEWEST = "step-00000006"
FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "random.safetensors", "best.safetensors")


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file; a second call restores the file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2 * 8)


def rewritten(directory: Path, **changes: Any) -> None:
    """Rewrite the manifest with some keys changed; None removes a key."""
    path = directory / "manifest.json"
    body = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))


def without_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("a file")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flip": lambda directory: flip_middle(directory / "model.safetensors"),
    "bit flip in the optimizer": lambda directory: flip_middle(directory / "optimizer.safetensors"),
    "truncated": lambda directory: os.truncate(directory / "model.safetensors", 1000),
    "zero bytes": lambda directory: os.truncate(directory / "random.safetensors", 0),
    "file missing": lambda directory: (directory / "best.safetensors").unlink(),
    "manifest missing": lambda directory: (directory / "manifest.json").unlink(),
    "manifest empty": lambda directory: os.truncate(directory / "manifest.json", 0),
    "manifest without content": lambda directory: (directory / "manifest.json").write_text("{}"),
    "manifest altered": lambda directory: rewritten(directory, about={"kind": "checkpoint"}),
    "manifest a directory": lambda directory: [
        (directory / "manifest.json").unlink(),
        (directory / "manifest.json").mkdir(),
    ],
    "no directory": without_directory,
}


# Damaged checkpoints.


class Damaged:
    """Two checkpoints. The newest one is damaged and restored again and again."""

    def __init__(self, root: Path) -> None:
        self.checkpoints, self.copy = root / "checkpoints", root / "copy"
        saved(self.checkpoints, 4, 6)
        shutil.copytree(self.checkpoints / NEWEST, self.copy)
        self.state = TrainState.initial(CFG, TRAIN)

    def newest(self) -> Path:
        """Return the newest checkpoint, and copy it back if it is gone."""
        goal = self.checkpoints / NEWEST
        if not goal.exists():
            shutil.copytree(self.copy, goal)
        return goal

    def restore(self) -> tuple[int, str]:
        """Return the restored step, and the warnings."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert checkpoint.restore(self.checkpoints, self.state, IDENTITY)
        return self.state.step, " ".join(str(one.message) for one in said)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.deep)])
def test_any_flipped_bit_is_reported_and_the_previous_checkpoint_is_used(tmp_path: Path, count: int) -> None:
    draw, damaged, expected = random.Random(1), Damaged(tmp_path), None
    for number in range(count):
        path = damaged.newest() / FILES[number % len(FILES)]
        bit = draw.randrange(path.stat().st_size * 8)
        flip(path, bit)
        step, said = damaged.restore()
        assert step == 4 and f"checkpoint skipped: {path}" in said, f"bit {bit} of {path.name}: {said}"
        expected = expected or everything(damaged.state)
    assert everything(damaged.state) == expected, "the previous checkpoint was restored completely each time"
    damaged.newest()
    assert damaged.restore() == (6, ""), "without a flip, the newest checkpoint is restored"


def test_any_flipped_bit_of_a_manifest_is_detected_as_damage(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    goal = tmp_path / "step-00000001"
    path = goal / "manifest.json"
    for bit in range(path.stat().st_size * 8):
        flip(path, bit)
        with pytest.raises(CheckpointError, match="is damaged") as caught:
            manifest.read_about(goal)
        assert not isinstance(caught.value, NewerFormat), f"bit {bit}"
        flip(path, bit)
    assert manifest.verify(goal)["kind"] == "checkpoint"


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_is_reported_and_the_previous_checkpoint_is_used(tmp_path: Path, name: str) -> None:
    draw, damaged = random.Random(2), Damaged(tmp_path)
    size = (damaged.newest() / name).stat().st_size
    for length in {0, 1, 8, size - 1, *(draw.randrange(size) for _ in range(30))}:
        path = damaged.newest() / name
        os.truncate(path, length)
        step, said = damaged.restore()
        assert step == 4 and f"checkpoint skipped: {path}" in said, f"{name} cut to {length} of {size} bytes: {said}"


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_replaced_when_training_reaches_its_step_again(
    tmp_path: Path, damage: str, keep: int
) -> None:
    twin = everything(saved(tmp_path, 4, 6))
    DAMAGES[damage](tmp_path / NEWEST)
    with pytest.warns(UserWarning, match=f"checkpoint skipped: .*{NEWEST}"):
        state = restored(tmp_path)
    assert state.step == 4
    train_on(state, 5)
    checkpoint.save(tmp_path, state, IDENTITY, keep)
    assert restored(tmp_path).step == 5
    train_on(state, 6)
    checkpoint.save(tmp_path, state, IDENTITY, keep)
    back = everything(restored(tmp_path))
    assert {**back, "counters": None} == {**twin, "counters": None}
    assert names(tmp_path)[-1] == NEWEST and len(names(tmp_path)) == keep


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_all_checkpoints_are_damaged_training_does_not_start_over(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 4, 6)
    for name in names(tmp_path):
        DAMAGES[damage](tmp_path / name)
    state = TrainState.initial(CFG, TRAIN)
    with (
        pytest.warns(UserWarning, match="checkpoint skipped"),
        pytest.raises(CheckpointError, match=rf"nothing in .* \(step-00000004, {NEWEST}\) can be used"),
    ):
        checkpoint.restore(tmp_path, state, IDENTITY)
    assert state.step == 0 and len(names(tmp_path)) == 2, "nothing was removed"


def test_when_only_unusable_directories_exist_training_does_not_start_over(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    (tmp_path / "step-00000004").rename(tmp_path / "backup of step 4")
    with pytest.raises(CheckpointError, match=r"nothing in .* \(backup of step 4\) can be used"):
        checkpoint.restore(tmp_path, TrainState.initial(CFG, TRAIN), IDENTITY)


def test_the_leftover_of_a_killed_first_save_is_not_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    (tmp_path / "step-00000004").rename(tmp_path / ".tmp-abc")
    assert not checkpoint.restore(tmp_path, TrainState.initial(CFG, TRAIN), IDENTITY)


# Checkpoints of another training or format.


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({**IDENTITY, "train.learning_rate": 2e-3}, r"train\.learning_rate is 0\.001, this training has 0\.002"),
        ({**IDENTITY, "model.emb_dim": 32}, r"model\.emb_dim is 16, this training has 32"),
        ({**IDENTITY, "tokens": "ab"}, r"tokens is None, this training has 'ab'"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_with_the_key_and_both_values(
    tmp_path: Path, identity: dict[str, Any], said: str
) -> None:
    saved(tmp_path, 2)
    with pytest.raises(CheckpointError, match=said):
        checkpoint.restore(tmp_path, TrainState.initial(CFG, TRAIN), identity)


def test_a_checkpoint_of_a_newer_format_is_refused_with_both_formats_even_if_an_older_one_exists(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 4, 6)
    rewritten(tmp_path / NEWEST, format=manifest.FORMAT + 1)
    state = TrainState.initial(CFG, TRAIN)
    with pytest.raises(CheckpointError, match=rf"{NEWEST}/manifest.json has format 8, this release reads .* 1 and 7"):
        checkpoint.restore(tmp_path, state, IDENTITY)
    assert state.step == 0 and names(tmp_path) == ["step-00000004", NEWEST]


def test_a_checkpoint_of_the_earlier_format_is_restored(tmp_path: Path) -> None:
    expected = everything(saved(tmp_path, 6))
    rewritten(tmp_path / NEWEST, format=1, sha256=None)
    assert everything(restored(tmp_path)) == expected


def test_a_committed_directory_of_another_kind_is_not_a_checkpoint(tmp_path: Path) -> None:
    with manifest.stage(tmp_path) as staged:
        manifest.commit(staged, tmp_path / NEWEST, {"kind": "tokens"})
    with pytest.raises(CheckpointError, match=r"model\.emb_dim is None, this training has 16"):
        checkpoint.restore(tmp_path, TrainState.initial(CFG, TRAIN), IDENTITY)


# Hostile checkpoints.


@pytest.mark.parametrize("name", ["model", "optimizer", "random", "best"])
def test_a_pickle_in_place_of_weights_is_not_executed(tmp_path: Path, name: str) -> None:
    checkpoints, executed = tmp_path / "checkpoints", tmp_path / "executed"
    saved(checkpoints, 4)
    (checkpoints / "step-00000004" / f"{name}.safetensors").write_bytes(pickle.dumps(Payload(executed)))
    with pytest.warns(UserWarning, match=f"checkpoint skipped: .*{name}.safetensors"), pytest.raises(CheckpointError):
        restored(checkpoints)
    assert not executed.exists()


@pytest.mark.parametrize("name", ["model", "optimizer", "random", "best"])
def test_a_pickle_with_a_matching_manifest_is_refused_too(tmp_path: Path, name: str) -> None:
    checkpoints, executed = tmp_path / "checkpoints", tmp_path / "executed"
    saved(checkpoints, 4)
    goal = checkpoints / "step-00000004"
    about = manifest.read_about(goal)
    with manifest.stage(checkpoints) as staged:
        shutil.copytree(goal, staged, dirs_exist_ok=True)
        (staged / "manifest.json").unlink()
        torch.save(Payload(executed), staged / f"{name}.safetensors")
        shutil.rmtree(goal)
        manifest.commit(staged, goal, about)
    with pytest.raises(CheckpointError, match=r"a file in .*step-00000004 is not a safetensors file"):
        restored(checkpoints)
    assert not executed.exists()


# A full disk.


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = saved(tmp_path, 2)
    train_on(state, 3)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "flush", full)
    with pytest.raises(
        DiskFull, match=r"is full: more than the [1-9][0-9,]+ bytes written so far are needed and [0-9,]+"
    ):
        checkpoint.save(tmp_path, state, IDENTITY, keep=2)
    assert names(tmp_path) == ["step-00000002"]
    assert restored(tmp_path).step == 2
