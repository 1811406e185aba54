"""Small state files: how they are written and read, for every module that keeps one in the state root.

A reader finds the old text or the new text, and never a mixture, even after a power cut. Directories with many files
are committed by gptcore.manifest instead.
"""

import json
import os
from pathlib import Path
from typing import Any

from gptcore.manifest import TEMPORARY, flush


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`, all of it or nothing. The directory must exist.

    The text is flushed to disk under a temporary name in the same directory before the rename, and the directory after
    it, so a power cut cannot leave half a file.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    temporary.write_text(text)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def read_json(path: Path) -> Any:
    """Return the JSON value in the file, or None if the file is missing or half-written.

    Earlier releases wrote some of these files without flushing them, so a power cut may have left half of one.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
