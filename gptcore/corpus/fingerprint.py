"""Fingerprint a source from outside, so that a change is noticed without reading any text.

The fingerprint of local files is made of their names, sizes, times and inodes. That of a web address is made of the
server's headers, and that of an object of fsspec's description. Two equal fingerprints mean that the source need not be
read again. If they differ, it must be read, though the text may turn out to be the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.corpus import remote
from gptcore.corpus.file_types import Formats
from gptcore.corpus.sources import PYTHON_DOCS, find_local_paths, parse_address, scheme_of
from gptcore.credentials import conceal, resolve, silence_request_log
from gptcore.errors import CorpusError, SourceUnavailable
from gptcore.manifest import sha256_of

if TYPE_CHECKING:
    import requests

_CONNECT_SECONDS = 5.0
_READ_SECONDS = 15.0
_HEADERS = ("ETag", "Last-Modified", "Content-Length")
_NO_HEAD = (403, 405, 501)


def fingerprint_source(source: str, base: Path, exclude: Sequence[str] = (), formats: Formats = None) -> str:
    """Return a hash of the present state of an entry of corpus.sources. No text is read.

    Relative paths start at `base`; `exclude` is corpus.exclude, and `formats` is corpus.formats. The fingerprint of
    python-docs never changes, nor that of an address with a sha256. Raises CorpusError if the source is missing. Raises
    SourceUnavailable if a remote source does not answer in time, or gives no information by which a change could be
    noticed.
    """
    scheme = scheme_of(source)
    if source == PYTHON_DOCS:
        return sha256_of(PYTHON_DOCS)
    if scheme is None:
        paths = find_local_paths(source, base, exclude, formats=formats)
        return sha256_of([_describe_file(path) for path in paths])
    if scheme in ("http", "https"):
        address, sha256 = parse_address(source)
        return sha256_of(sha256 or _request_headers(address))
    objects = remote.find_objects(source, exclude, formats=formats).objects
    return sha256_of([[name, remote.select_version_fields(info)] for name, info in objects.items()])


def _describe_file(path: Path) -> list[Any]:
    try:
        state = path.stat()
    except OSError as error:
        raise CorpusError(f"{path} cannot be looked up: {error.strerror}.") from None
    return [str(path), state.st_size, state.st_mtime_ns, state.st_ino]


def _request_headers(address: str) -> dict[str, str]:
    """Return the headers that change with the file. If a server refuses HEAD, send GET and leave the body unread."""
    import requests

    try:
        with _request("HEAD", address) as response:
            if response.status_code not in _NO_HEAD:
                return _select_headers(response, address)
        with _request("GET", address) as response:
            return _select_headers(response, address)
    except requests.RequestException as error:
        raise SourceUnavailable(f"{address} does not answer: {conceal(error, address)}.") from None


def _request(method: str, address: str) -> "requests.Response":
    import requests

    silence_request_log()
    seconds = (_CONNECT_SECONDS, _READ_SECONDS)
    headers = {"Accept-Encoding": "identity"}
    return requests.request(
        method, resolve(address), headers=headers, allow_redirects=True, stream=True, timeout=seconds
    )


def _select_headers(response: "requests.Response", address: str) -> dict[str, str]:
    if response.status_code != 200:
        raise SourceUnavailable(f"{address} answered {response.status_code} {response.reason}.")
    if headers := {name: response.headers[name] for name in _HEADERS if name in response.headers}:
        return headers
    raise SourceUnavailable(
        f"{address} sends none of the headers {', '.join(_HEADERS)}, so a change of the file cannot be noticed."
    )
