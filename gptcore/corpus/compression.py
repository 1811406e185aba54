"""Read .gz and .zst files, without holding them in memory. A damaged file is an error, and never ends early."""

import gzip
import io
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from gptcore.errors import CorpusError

CHUNK_BYTES = 256 * 1024
COMPRESSED = (".gz", ".zst")
"""Suffixes of compressed files that are read like the file inside them."""
_ZSTD_READ_BYTES = 4096  # this many bytes cannot decompress to more than about 128 MiB
_LARGE_WINDOW = "requires too much memory"  # in the error of the zstandard library


def decompress(file: BinaryIO, name: str, filename: str) -> BinaryIO:
    """Return `file` without the compression that `filename` names, if it names one.

    Reading from what is returned raises CorpusError, which calls the file `name`, if it is damaged.
    """
    if filename.lower().endswith(".gz"):
        return open_chunks(_gunzip(file, name))
    if filename.lower().endswith(".zst"):
        return open_chunks(_unzstd(file, name))
    return file


def copy_to_disk(file: BinaryIO) -> BinaryIO:
    """Return a copy of the file that can be read from any place, in a file without a name."""
    copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 -- closed with the last reference to it
    while chunk := file.read(CHUNK_BYTES):
        copy.write(chunk)
    copy.seek(0)
    return copy


def open_chunks(chunks: Iterator[bytes]) -> BinaryIO:
    """Return chunks as a file that is read once, from its beginning."""
    return cast(BinaryIO, io.BufferedReader(_ChunkFile(chunks), CHUNK_BYTES))


def _gunzip(file: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise _damage_error(name, error) from None


def _unzstd(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Decompress zstandard.

    The library's own stream_reader ends a truncated file without an error; its decompressor objects know their end.
    """
    import zstandard

    context, frame, rest = zstandard.ZstdDecompressor(), None, b""
    try:
        while rest or (rest := file.read(_ZSTD_READ_BYTES)):
            frame = frame or context.decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data
            frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        if _LARGE_WINDOW in str(error):
            raise CorpusError(
                f"{name} needs more than 128 MiB of memory to decompress, as `zstd --ultra` or `--long` write it. "
                "Decompress it yourself: zstd -d --memory=2048MB FILE"
            ) from None
        raise _damage_error(name, error) from None
    if frame is not None:
        raise _damage_error(name, "the compressed file ended before the end of the stream was reached")


def _damage_error(name: str, reason: object) -> CorpusError:
    return CorpusError(f"{name} is not a whole compressed file: {reason}")


class _ChunkFile(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
