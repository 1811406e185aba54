"""Committed directories: complete or absent, at whichever file operation the process dies."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import pytest

from gptcore import manifest
from gptcore.errors import CheckpointError, DiskFull, NewerFormat

FILES = {"a.bin": bytes(range(256)) * 4, "inner/b.txt": b"text"}


class Killed(BaseException):
    """Simulates SIGKILL: as rmtree is disabled too, no clean-up runs after it."""


def fill(directory: Path) -> None:
    for name, data in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)


def publish(goal: Path, about=None) -> Path:
    with manifest.stage(goal.parent) as staged:
        fill(staged)
        return manifest.commit(staged, goal, about or {"kind": "test"})


@pytest.fixture
def committed(tmp_path):
    return publish(tmp_path / "goal")


def die_at(monkeypatch, number: int) -> None:
    """Let the process die just before its `number`-th file operation, counted from 1."""
    done = 0

    def dying(operation):
        def wrapper(*args, **kwargs):
            nonlocal done
            done += 1
            if done == number:
                raise Killed
            return operation(*args, **kwargs)

        return wrapper

    for name in ("write_bytes", "write_text", "rename", "chmod", "mkdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(manifest, "flush", dying(manifest.flush))
    monkeypatch.setattr(manifest.shutil, "rmtree", lambda *args, **kwargs: None)


def test_a_committed_directory_holds_its_files_and_its_description(committed):
    assert {name: (committed / name).read_bytes() for name in FILES} == FILES
    assert manifest.verify(committed) == manifest.read_about(committed) == {"kind": "test"}
    listed = json.loads((committed / "manifest.json").read_text())["files"]
    assert listed["inner/b.txt"] == {"bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()}
    assert list(committed.parent.iterdir()) == [committed]


def test_a_death_at_any_file_operation_leaves_the_whole_directory_or_nothing(tmp_path):
    survived = 0
    for number in range(1, 100):
        goal = tmp_path / str(number) / "goal"
        with pytest.MonkeyPatch.context() as patched:
            die_at(patched, number)
            try:
                publish(goal)
                break
            except Killed:
                pass
        if manifest.is_committed(goal):
            manifest.verify(goal)
            survived += 1
        else:
            assert not goal.exists()
        if goal.parent.exists():
            manifest.sweep(goal.parent, older_than_seconds=0)
            assert set(goal.parent.iterdir()) <= {goal}
        publish(goal)
        manifest.verify(goal)
    assert number > 10, "the file operations were intercepted"
    assert survived >= 1, "a death after the rename leaves the directory"


def test_an_error_while_filling_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), manifest.stage(tmp_path) as staged:
        fill(staged)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_committing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "flush", full)
    with pytest.raises(DiskFull, match="is full: more than"):
        publish(tmp_path / "goal")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_stays_as_it_is(committed):
    inode = (committed / "a.bin").stat().st_ino
    publish(committed, {"kind": "another"})
    assert (committed / "a.bin").stat().st_ino == inode
    assert manifest.read_about(committed) == {"kind": "test"}
    assert list(committed.parent.iterdir()) == [committed]


def test_an_existing_goal_that_was_never_completed_is_not_overwritten_silently(tmp_path):
    goal = tmp_path / "goal"
    goal.mkdir()
    (goal / "mine.txt").write_text("mine")
    with pytest.raises(OSError):
        publish(goal)
    assert (goal / "mine.txt").read_text() == "mine"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit flip": (lambda goal: flip_bit(goal / "a.bin"), "a.bin has sha256"),
    "truncation": (lambda goal: os.truncate(goal / "a.bin", 1000), "a.bin has 1000 bytes, its manifest says 1024"),
    "zero bytes": (lambda goal: os.truncate(goal / "a.bin", 0), "a.bin has 0 bytes"),
    "missing file": (lambda goal: (goal / "inner/b.txt").unlink(), "b.txt is missing"),
    "missing manifest": (lambda goal: (goal / "manifest.json").unlink(), "never completed"),
    "empty manifest": (lambda goal: os.truncate(goal / "manifest.json", 0), "manifest.json is damaged"),
    "cut manifest": (lambda goal: os.truncate(goal / "manifest.json", 40), "manifest.json is damaged"),
    "binary manifest": (lambda goal: (goal / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
    "foreign JSON": (lambda goal: (goal / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "a newer format": (
        lambda goal: (goal / "manifest.json").write_text('{"format": 99}'),
        "has format 99, this release reads formats 1 and 7: a newer release made it",
    ),
    "a format that never was": (
        lambda goal: (goal / "manifest.json").write_text('{"format": 5}'),
        "manifest.json is damaged: format 5 does not exist",
    ),
    "altered manifest": (
        lambda goal: (goal / "manifest.json").write_text((goal / "manifest.json").read_text().replace("test", "text")),
        "manifest.json is damaged: its text has sha256",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(committed, damage):
    harm, said = DAMAGES[damage]
    harm(committed)
    with pytest.raises(CheckpointError, match=said):
        manifest.verify(committed)


def test_a_directory_of_the_earlier_format_is_read(committed):
    path = committed / "manifest.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps({"format": 1, "files": body["files"], "about": body["about"]}, indent=1) + "\n")
    assert manifest.verify(committed) == manifest.read_about(committed) == {"kind": "test"}
    flip_bit(committed / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin has sha256"):
        manifest.verify(committed)


def test_a_removed_directory_is_whole_or_gone_wherever_the_process_dies(tmp_path):
    for number in range(1, 5):
        goal = publish(tmp_path / f"goal-{number}")
        with pytest.MonkeyPatch.context() as patched:
            operations = iter(range(1, 5))

            def die(operation, operations=operations, number=number):
                def wrapper(*args, **kwargs):
                    if next(operations) == number:
                        raise Killed
                    return operation(*args, **kwargs)

                return wrapper

            patched.setattr(Path, "rename", die(Path.rename))
            patched.setattr(manifest.shutil, "rmtree", die(manifest.shutil.rmtree))
            with contextlib.suppress(Killed):
                manifest.remove(goal)
        if goal.exists():
            manifest.verify(goal)
            manifest.remove(goal)
        manifest.sweep(tmp_path, older_than_seconds=0)
        assert list(tmp_path.iterdir()) == []


def test_sweeping_leaves_young_temporary_directories_and_committed_ones_alone(committed):
    young, old = committed.parent / ".tmp-young", committed.parent / ".tmp-old"
    young.mkdir()
    old.mkdir()
    os.utime(old, (0, 0))
    manifest.sweep(committed.parent)
    assert sorted(committed.parent.iterdir()) == [young, committed]


def test_half_written_files_are_swept_too(tmp_path):
    (tmp_path / ".tmp-metrics.jsonl").write_text("{")
    manifest.sweep(tmp_path, older_than_seconds=0)
    assert list(tmp_path.iterdir()) == []


def test_equal_values_have_equal_hashes_whatever_the_order_of_their_keys():
    # The hash is that of the canonical text, which other languages can produce too.
    assert manifest.sha256_of({"b": [1, 2.5], "a": "é"}) == manifest.sha256_of({"a": "é", "b": [1, 2.5]})
    assert manifest.sha256_of({"b": 1, "a": None}) == hashlib.sha256(b'{"a":null,"b":1}').hexdigest()
    with pytest.raises(ValueError):
        manifest.sha256_of(float("nan"))


def test_a_write_that_fails_before_the_rename_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "up.json"
    manifest.write_atomically(path, '{"a": 1}')
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            manifest.write_atomically(path, '{"a": 2}')
    assert path.read_text() == '{"a": 1}'
    manifest.write_atomically(path, '{"a": 3}')
    assert path.read_text() == '{"a": 3}' and [file.name for file in tmp_path.iterdir()] == ["up.json"]


def test_a_damaged_directory_is_set_aside_and_made_again_but_not_one_of_a_newer_release(tmp_path):
    goal = manifest.make_once(tmp_path / "goal", lambda staged: {"size": (staged / "a").write_text("first")})
    (goal / "a").write_text("other")
    assert manifest.make_once(goal, lambda staged: {"size": (staged / "a").write_text("again")}) == goal
    assert (goal / "a").read_text() == "again" and manifest.verify(goal) == {"size": 5}
    (aside,) = tmp_path.glob(".tmp-removed-goal*")
    assert (aside / "a").read_text() == "other"
    newer = (goal / "manifest.json").read_text().replace('"format": 7', '"format": 8')
    (goal / "manifest.json").write_text(newer)
    with pytest.raises(NewerFormat):
        manifest.make_once(goal, lambda staged: {})
    assert goal.exists()


def test_a_damaged_directory_that_another_process_sets_aside_meanwhile_is_made_again(tmp_path, monkeypatch):
    goal = manifest.make_once(tmp_path / "goal", lambda staged: {"size": (staged / "a").write_text("first")})

    def verify_too_late(directory):
        directory.rename(tmp_path / ".tmp-removed-goal")
        raise CheckpointError("it was altered.")

    monkeypatch.setattr(manifest, "verify", verify_too_late)
    assert manifest.make_once(goal, lambda staged: {"size": (staged / "a").write_text("again")}) == goal
    assert (goal / "a").read_text() == "again"


def test_a_directory_is_made_once_and_stays_away_if_filling_fails(tmp_path):
    def fill_and_describe(staged):
        fill(staged)
        return {"kind": "test"}

    with pytest.raises(ZeroDivisionError):
        manifest.make_once(tmp_path / "goal", lambda staged: {"kind": 1 / 0})
    assert list(tmp_path.iterdir()) == []
    assert manifest.make_once(tmp_path / "goal", fill_and_describe) == tmp_path / "goal"
    assert manifest.verify(tmp_path / "goal") == {"kind": "test"}
    manifest.make_once(tmp_path / "goal", lambda staged: {"kind": 1 / 0})
