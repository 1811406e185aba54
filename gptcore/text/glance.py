"""What a source looks like from outside, so that a change is noticed without reading any text.

A fingerprint is made of names, sizes, times and inodes of local files, of what a web server says about a file, or of
what fsspec lists. Two equal fingerprints mean that nobody has a reason to read the source again; two different ones
that somebody should, though the text may turn out to be the same.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcore.errors import CorpusError, SourceUnavailable
from gptcore.manifest import sha256_of
from gptcore.text import stored
from gptcore.text.sources import PYTHON_DOCS, local_paths, parse_address, scheme_of

if TYPE_CHECKING:
    import requests

_CONNECT_SECONDS = 5.0
_READ_SECONDS = 15.0
_HEADERS = ("ETag", "Last-Modified", "Content-Length")
_NO_HEAD = (403, 405, 501)


def fingerprint(source: str, base: Path) -> str:
    """What an entry of corpus.sources looks like now, as a hash. Relative paths start at `base`; no text is read.

    python-docs and an address with a sha256 never change. Raises CorpusError where the source is missing and
    SourceUnavailable where a remote one does not answer in time, or tells nothing to know it by.
    """
    scheme = scheme_of(source)
    if source == PYTHON_DOCS:
        return sha256_of(PYTHON_DOCS)
    if scheme is None:
        return sha256_of([_local(path) for path in local_paths(source, base)])
    if scheme in ("http", "https"):
        address, sha256 = parse_address(source)
        return sha256_of(sha256 or _said_about(address))
    return sha256_of([[name, stored.telling(info)] for name, info in stored.find(source)[1].items()])


def _local(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError as error:
        raise CorpusError(f"{path} cannot be looked at: {error.strerror}.") from None
    return [str(path), found.st_size, found.st_mtime_ns, found.st_ino]


def _said_about(address: str) -> dict[str, str]:
    """The headers that change with the file. Some servers answer no HEAD: a GET is then left unread."""
    import requests

    try:
        with _asked("HEAD", address) as answer:
            if answer.status_code not in _NO_HEAD:
                return _telling_headers(answer)
        with _asked("GET", address) as answer:
            return _telling_headers(answer)
    except requests.RequestException as error:
        raise SourceUnavailable(f"{address} does not answer: {error}.") from None


def _asked(method: str, address: str) -> "requests.Response":
    import requests

    seconds = (_CONNECT_SECONDS, _READ_SECONDS)
    headers = {"Accept-Encoding": "identity"}
    return requests.request(method, address, headers=headers, allow_redirects=True, stream=True, timeout=seconds)


def _telling_headers(answer: "requests.Response") -> dict[str, str]:
    if answer.status_code != 200:
        raise SourceUnavailable(f"{answer.url} answered {answer.status_code} {answer.reason}.")
    if said := {name: answer.headers[name] for name in _HEADERS if name in answer.headers}:
        return said
    raise SourceUnavailable(f"{answer.url} tells none of {', '.join(_HEADERS)}: no change of it can be seen.")
