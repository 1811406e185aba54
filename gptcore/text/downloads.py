"""Files from the web, fetched once and kept: resumed after a cut, checked against a sha256, asked about again politely.

Each address has a directory of its own with `body`, what the server said about it in `body.json`, and while a download
is under way or was cut, `part` and `part.json`. The rename of `part` to `body` is the commit.

The address that stands in corpus.sources may be any, on this machine too: whoever wrote it meant it. Where a server
sends us on, it does not decide about this machine's network: a redirection is followed to http and https only, not from
https to http, and only to an address that can be reached from at least as far away as the one that sent us, in the
order public, private network, this machine, link-local (where clouds keep their secrets). Names count as what they
resolve to when they are met; that one resolves otherwise a moment later is not noticed. What is refused says so, and
can be named in corpus.sources itself.
"""

import fcntl
import hashlib
import ipaddress
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from gptcore.errors import CorpusError, SourceUnavailable
from gptcore.manifest import flush, sha256_of_file

if TYPE_CHECKING:
    import requests

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
_PIECE_BYTES = 64 * 1024
_BUSY = (408, 425, 429)
_MAX_REDIRECTIONS = 10
_PUBLIC, _PRIVATE, _THIS_MACHINE, _LINK_LOCAL = 3, 2, 1, 0


def fetch(url: str, sha256: str | None, downloads: Path) -> Path:
    """The downloaded file of `url` inside `downloads`.

    With a sha256 a file that matches is never fetched again; without, the server is asked whether it has changed.
    Raises CorpusError where the server refuses or the hash is wrong, SourceUnavailable where trying later can help.
    """
    directory = downloads / hashlib.sha256(url.encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    body = directory / "body"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two pipelines may name one address
        if sha256 and body.is_file() and sha256_of_file(body) == sha256:
            return body
        _bring(url, directory, revalidate=sha256 is None)
        if sha256 and (found := sha256_of_file(body)) != sha256:
            body.unlink()
            raise CorpusError(
                f"{url} has sha256 {found}, expected {sha256}. The file was removed. If the new content is wanted, "
                f"write #sha256={found} in corpus.sources."
            )
    return body


def _bring(url: str, directory: Path, revalidate: bool) -> None:
    part, body = directory / "part", directory / "body"
    headers = _resume(part) or (_unless_changed(body) if revalidate else {})
    with _responding(url, headers, body) as response:
        if response.status_code == 304 and body.is_file():
            return
        start = part.stat().st_size if part.is_file() else 0
        resumed = response.status_code == 206 and _range_starts_at(response, start)
        if response.status_code == 200 or resumed:
            _save(response, part, append=resumed)
            return
    if not headers:
        raise CorpusError(f"{url} answered {response.status_code} {response.reason}; check the address.")
    part.unlink(missing_ok=True)  # the server does not go on where this part ends
    body.with_suffix(".json").unlink(missing_ok=True)
    _bring(url, directory, revalidate)


def _save(response: "requests.Response", part: Path, append: bool) -> None:
    if not append:
        part.unlink(missing_ok=True)
        said = {name: response.headers.get(name) for name in ("ETag", "Last-Modified")}
        part.with_suffix(".json").write_text(json.dumps({"url": response.url, **said}))
    with part.open("ab") as file:
        for piece in response.iter_content(_PIECE_BYTES):
            file.write(piece)
    flush(part)
    body = part.with_name("body")
    body.with_suffix(".json").unlink(missing_ok=True)
    part.rename(body)
    part.with_suffix(".json").rename(body.with_suffix(".json"))


def _resume(part: Path) -> dict[str, str]:
    """Headers that ask for the rest of `part`, provided the file is still the same one; {} where that can't be told."""
    said = _said(part)
    validator = said.get("ETag") or said.get("Last-Modified")
    if not part.is_file() or not validator or validator.startswith("W/"):
        return {}
    return {"Range": f"bytes={part.stat().st_size}-", "If-Range": validator}


def _unless_changed(body: Path) -> dict[str, str]:
    said = _said(body)
    asked = {"If-None-Match": said.get("ETag"), "If-Modified-Since": said.get("Last-Modified")}
    return {name: value for name, value in asked.items() if value} if body.is_file() else {}


def _said(file: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError, ValueError):
        return json.loads(file.with_suffix(".json").read_text())
    return {}


def _range_starts_at(response: "requests.Response", start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


@contextmanager
def _responding(url: str, headers: dict[str, str], body: Path) -> Iterator["requests.Response"]:
    """An answer that is worth reading; what requests and HTTP call errors, in our own classes."""
    import requests
    from requests import exceptions as failed

    given = {"Accept-Encoding": "identity", **headers}  # a compressed transfer could not be resumed
    try:
        with requests.Session() as session, _answer(session, url, given) as response:
            code, said = response.status_code, f"{response.status_code} {response.reason}"
            if code >= 500 or code in _BUSY:
                raise _unavailable(url, f"the server answered {said}", body)
            if 400 <= code < 500 and code != 416:
                raise CorpusError(f"{url} answered {said}; check the address, or name a file that you have.")
            yield response
    except (failed.InvalidSchema, failed.InvalidURL, failed.MissingSchema) as error:
        raise CorpusError(f"{url} is or leads to an address that is none (only http and https are): {error}") from None
    except failed.RequestException as error:
        raise _unavailable(url, str(error), body) from None


def _answer(session: "requests.Session", url: str, headers: dict[str, str]) -> "requests.Response":
    """What `url`, or the address that it sends us on to, answers."""
    here = url
    for _ in range(_MAX_REDIRECTIONS + 1):
        response = _asked(session, here, headers)
        location = session.get_redirect_target(response)
        if location is None:
            return response
        response.close()
        here = _followed(url, here, location)
    raise CorpusError(f"{url} sends us on more than {_MAX_REDIRECTIONS} times; name the address where it ends.")


def _asked(session: "requests.Session", url: str, headers: dict[str, str]) -> "requests.Response":
    """The answer, its body unread. (A session's own `get` reads all of a redirection's, however long that is.)"""
    import requests

    given = session.prepare_request(requests.Request("GET", url, headers))
    settings: dict[str, Any] = {**session.merge_environment_settings(url, {}, True, None, None)}
    return session.get_adapter(url).send(given, timeout=(CONNECT_SECONDS, READ_SECONDS), **settings)


def _followed(url: str, here: str, location: str) -> str:
    """Where a redirection of `here` leads. Raises CorpusError where it is not followed."""
    try:
        there = urljoin(here, location)
        source, target = urlsplit(here), urlsplit(there)
        source_host, target_host, _ = source.hostname or "", target.hostname or "", target.port
    except ValueError as error:
        raise CorpusError(f"{url} sends us on to {location!r:.200}, which is not an address: {error}") from None
    if target.scheme not in ("http", "https") or not target_host:
        why = "only http and https are"
    elif (source.scheme, target.scheme) == ("https", "http"):
        why = "on the way from https to http the text could be altered"
    elif source_host != target_host and min(_reaches(target_host)) < max(_reaches(source_host)):
        why = "it is an address of a narrower network than the one that names it"
    else:
        return there
    raise CorpusError(
        f"{url} sends us on to {there!r:.200}, which is not followed: {why}. If it is meant, write that address itself "
        "in corpus.sources."
    )


def _reaches(host: str) -> list[int]:
    """From how far away each address of the host can be reached. A name that only a proxy can resolve is public."""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return [_PUBLIC]
    return [_reach(ipaddress.ip_address(address)) for address in found]


def _reach(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address.sixtofour or address
    if address.is_link_local:
        return _LINK_LOCAL
    if address.is_loopback or address.is_unspecified:
        return _THIS_MACHINE
    return _PUBLIC if address.is_global else _PRIVATE


def _unavailable(url: str, reason: str, body: Path) -> SourceUnavailable:
    cure = "Try again later (a cut download goes on where it ended), or name a file that you have"
    if body.is_file():
        cure += f"; #sha256={sha256_of_file(body)} after the address makes do with the copy fetched earlier"
    return SourceUnavailable(f"{url} is unavailable: {reason}. {cure}.")
