"""Download files from the web once and keep them.

An interrupted download is resumed. A file with a sha256 is checked; for other files the server is asked whether they
have changed. Each address has a directory with `body`, and the server's validators for it in `body.json`. While a
download runs or after it was interrupted, the directory holds `part` and `part.json`. Renaming `part` to `body` commits
the download.

The address in corpus.sources may be any address, also one on this machine, because the user chose it. A server that
redirects to another address must not decide about this machine's network. So a redirection is followed only to http
and https, never from https to http, and never to an address of a narrower network. From the widest to the narrowest,
the networks are: public, private, this machine, link-local (where clouds keep their secrets). A name counts as the
addresses that it resolves to when the redirection arrives; a name that resolves differently a moment later is not
noticed. The error names the refused address, and the user can put that address into corpus.sources.

An address may name environment variables with secrets (credentials.py). Their values are inserted into the request
only; files and messages have the address without the values.
"""

import fcntl
import gzip
import hashlib
import ipaddress
import json
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from gptcore.credentials import conceal, resolve, silence_request_log
from gptcore.errors import CorpusError, SourceUnavailable
from gptcore.manifest import flush, sha256_of_file
from gptcore.records import open_lock, read_record

if TYPE_CHECKING:
    import requests

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
_CHUNK_BYTES = 64 * 1024
_BUSY = (408, 425, 429)
_MAX_REDIRECTIONS = 10
_GZIP_MAGIC = b"\x1f\x8b"
_PUBLIC, _PRIVATE, _THIS_MACHINE, _LINK_LOCAL = 3, 2, 1, 0


def download(url: str, sha256: str | None, downloads: Path) -> Path:
    """Return the downloaded file of `url` inside `downloads`.

    With a sha256, a file that matches is never downloaded again. Without, the server is asked whether the file has
    changed. Raises CorpusError if the server refuses or the hash is wrong, SourceUnavailable if a later try can help.
    """
    directory = downloads / hashlib.sha256(url.encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    body = directory / "body"
    with open_lock(directory / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two pipelines may name one address
        if sha256 and body.is_file() and sha256_of_file(body) == sha256:
            return body
        _download_body(url, directory, revalidate=sha256 is None)
        if sha256 and (actual := sha256_of_file(body)) != sha256:
            body.unlink()
            raise CorpusError(
                f"{url} has sha256 {actual}, expected {sha256}. The file was removed. If you want the new content, "
                f"write #sha256={actual} in corpus.sources."
            )
    return body


def _download_body(url: str, directory: Path, revalidate: bool) -> None:
    part, body = directory / "part", directory / "body"
    headers = _resume_headers(part) or (_revalidation_headers(body) if revalidate else {})
    with _open_response(url, headers, body) as response:
        if response.status_code == 304 and body.is_file():
            return
        start = part.stat().st_size if part.is_file() else 0
        is_resumed = response.status_code == 206 and _range_starts_at(response, start)
        if response.status_code == 200 or is_resumed:
            _save(response, url, part, append=is_resumed)
            return
    if not headers:
        raise CorpusError(f"{url} answered {response.status_code} {response.reason}. Check the address.")
    part.unlink(missing_ok=True)  # the server does not resume where this file ends
    body.with_suffix(".json").unlink(missing_ok=True)
    _download_body(url, directory, revalidate)


def _save(response: "requests.Response", url: str, part: Path, append: bool) -> None:
    if not append:
        part.unlink(missing_ok=True)
        validators = {name: response.headers.get(name) for name in ("ETag", "Last-Modified")}
        part.with_suffix(".json").write_text(json.dumps(validators))
    with part.open("ab") as file:
        # As they were sent: a range counts these bytes, and .gz files are often labelled as if they had to be decoded.
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
            file.write(chunk)
    received = _decode(part, response.headers.get("Content-Encoding", ""), url)
    flush(received)
    known = {**_load_validators(part), "sha256": sha256_of_file(received)}
    part.with_suffix(".json").write_text(json.dumps(known))
    body = part.with_name("body")
    body.with_suffix(".json").unlink(missing_ok=True)
    received.rename(body)
    part.with_suffix(".json").rename(body.with_suffix(".json"))
    part.unlink(missing_ok=True)


def _decode(part: Path, encoding: str, url: str) -> Path:
    """Return the file as it is on the server: `part` itself, or a decoded copy if the server has compressed it.

    Many servers label a .gz file with `Content-Encoding: gzip`, although the file is not compressed once more. Raises
    CorpusError for an encoding that was not asked for and is not known.
    """
    if encoding.lower() in ("", "identity"):
        return part
    if encoding.lower() not in ("gzip", "x-gzip"):
        part.unlink()
        raise CorpusError(f"{url} is sent with Content-Encoding {encoding!r:.40} (expected gzip or none). Name a file.")
    decoded = part.with_name("decoded")
    is_compressed_file = urlsplit(url).path.lower().endswith((".gz", ".tgz"))
    try:
        with gzip.open(part) as content, decoded.open("wb") as file:
            if is_compressed_file and content.peek(2)[:2] != _GZIP_MAGIC:
                return part
            shutil.copyfileobj(content, file, _CHUNK_BYTES)
    except (OSError, EOFError, zlib.error):  # the label is wrong
        return part
    return decoded


def _resume_headers(part: Path) -> dict[str, str]:
    """Return headers that request the rest of `part` if the file has not changed; {} if that cannot be checked."""
    validators = _load_validators(part)
    validator = validators.get("ETag") or validators.get("Last-Modified")
    if not part.is_file() or not validator or validator.startswith("W/"):
        return {}
    return {"Range": f"bytes={part.stat().st_size}-", "If-Range": validator}


def _revalidation_headers(body: Path) -> dict[str, str]:
    """Return headers that request the file only if it differs from `body`; {} if `body` was altered on this machine."""
    validators = _load_validators(body)
    if body.is_file() and "sha256" in validators and sha256_of_file(body) != validators["sha256"]:
        return {}
    headers = {"If-None-Match": validators.get("ETag"), "If-Modified-Since": validators.get("Last-Modified")}
    return {name: value for name, value in headers.items() if value} if body.is_file() else {}


def _load_validators(file: Path) -> dict[str, Any]:
    return read_record(file.with_suffix(".json"), dict[str, Any]) or {}


def _range_starts_at(response: "requests.Response", start: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


@contextmanager
def _open_response(url: str, headers: dict[str, str], body: Path) -> Iterator["requests.Response"]:
    """Yield a response that is worth reading. Errors of requests and of HTTP become errors of gptcore."""
    import requests
    from requests import exceptions
    from urllib3.exceptions import HTTPError

    silence_request_log()
    headers = {"Accept-Encoding": "identity", **headers}  # a compressed transfer could not be resumed
    try:
        with requests.Session() as session, _follow_redirections(session, url, headers) as response:
            code, answer = response.status_code, f"{response.status_code} {response.reason}"
            if code >= 500 or code in _BUSY:
                raise _unavailable_error(url, f"the server answered {answer}", body)
            if 400 <= code < 500 and code != 416:
                raise CorpusError(f"{url} answered {answer}. Check the address, or name a file that you have.")
            yield response
    except (exceptions.InvalidSchema, exceptions.InvalidURL, exceptions.MissingSchema) as error:
        raise CorpusError(
            f"{url} is not a valid http or https address, or redirects to one that is not: {conceal(error, url)}"
        ) from None
    except (exceptions.RequestException, HTTPError) as error:
        raise _unavailable_error(url, conceal(error, url), body) from None


def _follow_redirections(session: "requests.Session", url: str, headers: dict[str, str]) -> "requests.Response":
    """Return the response of `url`, or of the address that it redirects to."""
    address = resolve(url)
    for _ in range(_MAX_REDIRECTIONS + 1):
        response = _send_get(session, address, headers)
        location = session.get_redirect_target(response)
        if location is None:
            return response
        response.close()
        address = _resolve_redirection(url, address, location)
    raise CorpusError(f"{url} redirects more than {_MAX_REDIRECTIONS} times. Name the final address instead.")


def _send_get(session: "requests.Session", url: str, headers: dict[str, str]) -> "requests.Response":
    """Return the response with its body unread. (A session's own `get` reads a redirection's body, however long.)"""
    import requests

    request = session.prepare_request(requests.Request("GET", url, headers))
    settings: dict[str, Any] = {**session.merge_environment_settings(url, {}, True, None, None)}
    return session.get_adapter(url).send(request, timeout=(CONNECT_SECONDS, READ_SECONDS), **settings)


def _resolve_redirection(url: str, address: str, location: str) -> str:
    """Return the address that `address` redirects to. Raises CorpusError if the redirection is not followed.

    `url` is the address in corpus.sources, for the message.
    """
    try:
        goal = urljoin(address, location)
        source, target = urlsplit(address), urlsplit(goal)
        source_host, target_host, _ = source.hostname or "", target.hostname or "", target.port
    except ValueError as error:
        shown = conceal(repr(location), url)
        raise CorpusError(f"{url} redirects to {shown:.200}, which is not an address: {conceal(error, url)}") from None
    if target.scheme not in ("http", "https") or not target_host:
        reason = "only http and https addresses are"
    elif (source.scheme, target.scheme) == ("https", "http"):
        reason = "on the way from https to http the text could be altered"
    elif source_host != target_host and min(_network_ranks(target_host)) < max(_network_ranks(source_host)):
        reason = "it is an address of a narrower network than the one that redirects to it"
    else:
        return goal
    raise CorpusError(
        f"{url} redirects to {conceal(repr(goal), url):.200}, which is not followed: {reason}. If you want its text, "
        "write that address itself in corpus.sources."
    )


def _network_ranks(host: str) -> list[int]:
    """Return the rank of the network of each address of the host. A name that only a proxy can resolve is public."""
    try:
        addresses = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return [_PUBLIC]
    return [_network_rank(ipaddress.ip_address(address)) for address in addresses]


def _network_rank(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address.sixtofour or address
    if address.is_link_local:
        return _LINK_LOCAL
    if address.is_loopback or address.is_unspecified:
        return _THIS_MACHINE
    return _PUBLIC if address.is_global else _PRIVATE


def _unavailable_error(url: str, reason: str, body: Path) -> SourceUnavailable:
    fix = "Try again later (an interrupted download is resumed), or name a file that you have"
    if body.is_file():
        fix += f"; with #sha256={sha256_of_file(body)} after the address, the copy downloaded earlier is used"
    return SourceUnavailable(f"{url} is unavailable: {reason}. {fix}.")
