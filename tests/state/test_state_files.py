"""Small files of the state root: a write leaves all of the new text or all of the old text."""

import os
from pathlib import Path

import pytest

from flows.state.files import read_json, write_atomically


def test_a_write_that_fails_before_the_rename_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "up.json"
    write_atomically(path, '{"a": 1}')
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            write_atomically(path, '{"a": 2}')
    assert read_json(path) == {"a": 1}
    write_atomically(path, '{"a": 3}')
    assert read_json(path) == {"a": 3} and [file.name for file in tmp_path.iterdir()] == ["up.json"]


@pytest.mark.parametrize("text", [None, "", '{"a": '])
def test_a_missing_or_half_written_file_reads_as_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "up.json").write_text(text)
    assert read_json(tmp_path / "up.json") is None
