"""Token files in an object store, read as training needs them: block by block, into a cache of bounded size.

Training reads windows of a KB or two in a random order. The blocks that hold the windows of a batch are fetched at the
same time, and the most recently used blocks are kept. The directory is at a URL that fsspec opens, such as
s3://BUCKET/PREFIX. Credentials and endpoints come from the environment of the process, as the documentation of the
storage's package describes. They are never part of a configuration.

See directory.py for the format. Corpora in an object store are read elsewhere (corpus/remote.py).
"""

import importlib.util
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

from gptcore import manifest
from gptcore.corpus.remote import select_version_fields
from gptcore.errors import CheckpointError, ConfigError, GPTCoreError, SourceUnavailable
from gptcore.tokens.directory import Tokens, dtype_of, read_manifest
from gptcore.tokens.tokenizer import VOCABULARY

BLOCK_BYTES = 64 * 1024
"""How much is fetched at once."""
MAX_BLOCKS = 4096
"""Blocks kept in memory per side: together 256 MiB."""

_READERS = 16
"""Blocks fetched at the same time. An object store answers after tens of milliseconds, but many requests at once."""

_PAUSES = (0.5, 2.0, 8.0)
"""Seconds before each retry of a failed read."""


class StreamedIds:
    """The ids of one side, (tokens,), read from an object store on demand, as slices and as windows."""

    ndim = 1

    def __init__(self, url: str, count: int, dtype: np.dtype) -> None:
        """Raises CheckpointError if the object does not hold `count` ids, and the errors of `load`."""
        self._url, self.dtype, self.shape = url, dtype, (count,)
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="tokens")
        self._cache: OrderedDict[int, bytes] = OrderedDict()  # the least recently used block first
        self._files: threading.local | None = None  # the open file of each reader; None after a failed read
        with _translate_errors(url):
            self._version = self._read_version()
        size, expected = self._version["size"], str(count * dtype.itemsize)
        if size != expected:
            raise CheckpointError(f"{url} has {size} bytes, its manifest says {expected}: it was altered.")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, selection: slice) -> np.ndarray:
        """Return the ids of a slice without a step: (ids,)."""
        start, stop, step = selection.indices(len(self))
        assert step == 1, "a slice of streamed ids cannot have a step"
        ids = np.empty(max(0, stop - start), self.dtype)
        ids_per_read = _READERS * BLOCK_BYTES // self.dtype.itemsize
        for begin in range(0, len(ids), ids_per_read):
            span = ids[begin : begin + ids_per_read]
            span[:] = self.read_windows([start + begin], len(span))[0]
        return ids

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all ids: (tokens,)."""
        ids = self[:]
        return ids if dtype is None else ids.astype(dtype)

    def read_windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Return the windows of `length` ids that begin at `starts`: (starts, length).

        For an array of ids this is `sliding_window_view(ids, length)[starts]`.
        """
        size, offsets = length * self.dtype.itemsize, [int(start) * self.dtype.itemsize for start in starts]
        spans = [range(offset // BLOCK_BYTES, -(-(offset + size) // BLOCK_BYTES)) for offset in offsets]
        blocks = self._read_blocks(sorted({number for span in spans for number in span}))
        windows = np.empty((len(starts), length), self.dtype)
        for window, offset, span in zip(windows, offsets, spans, strict=True):
            data = b"".join(blocks[number] for number in span)
            window[:] = np.frombuffer(data, self.dtype, length, offset - span.start * BLOCK_BYTES)
        return windows

    def _read_blocks(self, numbers: list[int]) -> dict[int, bytes]:
        """Return the blocks by number, with retries. Raises SourceUnavailable after the last one."""
        for pause in (*_PAUSES, None):
            try:
                with self._lock:
                    return self._read_blocks_once(numbers)
            except (GPTCoreError, ImportError, MemoryError):
                raise
            except Exception as error:
                self._files = None
                if pause is None:
                    tried = f"tried {1 + len(_PAUSES)} times in {sum(_PAUSES):g} seconds"
                    raise SourceUnavailable(
                        f"{self._url} cannot be read any more ({tried}): {_describe_error(error)}. Saved checkpoints "
                        "are kept. Run the same command again when the storage answers."
                    ) from None
                time.sleep(pause)
        raise AssertionError("returned or raised")

    def _read_blocks_once(self, numbers: list[int]) -> dict[int, bytes]:
        """Return the blocks by number, from the cache or the storage. Raises CheckpointError if the object changed."""
        if self._files is None:
            if self._read_version() != self._version:
                raise CheckpointError(f"{self._url} was replaced while it was read. Prepare the run again.")
            self._files = threading.local()
        missing = [number for number in numbers if number not in self._cache]
        fetched = self._readers.map(partial(self._fetch_block, self._files), missing)
        blocks = dict(zip(missing, fetched, strict=True))
        for number in numbers:
            if number in self._cache:
                self._cache.move_to_end(number)
                blocks[number] = self._cache[number]
        self._cache.update((number, blocks[number]) for number in missing)
        while len(self._cache) > MAX_BLOCKS:
            self._cache.popitem(last=False)
        return blocks

    def _fetch_block(self, files: Any, number: int) -> bytes:
        """Fetch one block through a file that only this thread uses."""
        if not hasattr(files, "opened"):
            filesystem, path = _find_filesystem(self._url)
            files.opened = filesystem.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none")
        begin = number * BLOCK_BYTES
        size = min(BLOCK_BYTES, len(self) * self.dtype.itemsize - begin)
        files.opened.seek(begin)
        data = bytes(files.opened.read(size))
        if len(data) != size:
            raise EOFError(f"the storage sent {len(data)} bytes from byte {begin} on, not {size}")
        return data

    def _read_version(self) -> dict[str, str]:
        """Return the size of the object and the fields that change when it is replaced."""
        filesystem, path = _find_filesystem(self._url)
        filesystem.invalidate_cache()
        info = filesystem.info(path)
        return {**select_version_fields(info), "size": str(info["size"])}


@dataclass(frozen=True)
class StreamedTokens(Tokens):
    """A token directory behind a URL. `path` holds a copy of its manifest and tokenizer while this object lives."""

    url: str = ""
    temporary_directory: Any = field(default=None, repr=False, compare=False)
    """Removes `path` when it is collected."""

    def side(self, side: str) -> np.ndarray:
        """Return the ids of "train" or "val" as StreamedIds: all of an array that `gptcore.training.batches` needs."""
        dtype = dtype_of(self.n_vocab)
        if self.counts[side] == 0:
            return np.empty(0, dtype=dtype)
        return cast(np.ndarray, StreamedIds(f"{self.url}/{side}.bin", self.counts[side], dtype))


def load(url: str) -> StreamedTokens:
    """Open the token directory at `url`, with the same checks as `load_tokens` makes on disk.

    Raises ConfigError if the address holds a password, access is denied or the package of the storage is missing.
    Raises CheckpointError if there is no complete token directory, and SourceUnavailable if the storage does not
    answer.
    """
    url = url.rstrip("/")
    _check_address(url)
    temporary_directory = tempfile.TemporaryDirectory(prefix="gptflow-tokens-")
    path = Path(temporary_directory.name)
    (path / "tokenizer").mkdir()
    for name in (manifest.MANIFEST, f"tokenizer/{VOCABULARY}"):
        with _translate_errors(f"{url}/{name}"):
            filesystem, prefix = _find_filesystem(url)
            (path / name).write_bytes(filesystem.cat_file(f"{prefix}/{name}"))
    tokens = StreamedTokens(**vars(read_manifest(path)), url=url, temporary_directory=temporary_directory)
    for side in tokens.counts:
        tokens.side(side)  # raises if the file is missing or has another size
    return tokens


def _check_address(url: str) -> None:
    """Raise ConfigError if the address holds credentials, or if s3fs is needed and not installed."""
    parts = urlsplit(url)
    if parts.password or parts.username or "@" in parts.netloc:
        raise ConfigError(
            f"the tokens' address {parts.scheme}://...@{parts.netloc.rpartition('@')[2]} holds credentials. Set them "
            "in the environment instead, as the documentation of the storage's package describes."
        )
    if parts.scheme in ("s3", "s3a") and importlib.util.find_spec("s3fs") is None:
        raise ConfigError(f"{url} needs the package s3fs, which is not installed: pip install 'gptflow[s3]'")


def _find_filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem, path


@contextmanager
def _translate_errors(url: str) -> Iterator[None]:
    """Replace the exceptions of fsspec and the storages by those of `load`, with the URL in their message."""
    try:
        yield
    except GPTCoreError:
        raise
    except ImportError as error:
        raise ConfigError(f"{url} needs a package that is not installed: {error}. pip install it.") from None
    except FileNotFoundError:
        raise CheckpointError(f"{url} does not exist: there is no complete token directory.") from None
    except Exception as error:
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            raise ConfigError(
                f"{url} may not be read: {_describe_error(error)}. Credentials come from the environment: for s3://, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of the machine."
            ) from None
        raise SourceUnavailable(f"{url} does not answer: {_describe_error(error)}.") from None


def _describe_error(error: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().rstrip(".:").partition("\n")[0]
