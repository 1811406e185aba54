"""Passwords and keys in addresses: refuse them in the configuration, insert them into requests, and hide them.

The configuration is recorded in many places: lineage, bundles, MLflow, Prefect's database, logs. So an address in it
names a secret instead of holding it: `https://me:${PASSWORD}@example.org/a.txt` or `https://example.org/a.txt?${QUERY}`.
`resolve` inserts the environment variables when the request is made. It inserts a value as it is, so a character with a
meaning in addresses must be encoded in the value, for example `@` as `%40`.
"""

import logging
import os
import re
from urllib.parse import quote, quote_plus, unquote, urlsplit

from gptcore.errors import ConfigError

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?P<authority>[^/?#]*)(?P<rest>.*)", re.DOTALL)
_SECRET_KEY = re.compile(
    "(key|sig|auth|pwd|pass|sas|jwt)|.*(token(?!s|iz)|passw|secret|signature|credential|(api|access|account|private)key).*"
    "|x(amz|goog).*"
)
"""Matches the letters and digits, in lower case, of a key of a query whose value is a secret."""
_KEY = re.compile(r"([^\s?&;#=]+)=")
_KEY_AFTER_MARK = re.compile(r"(?<=[?&;#])([^\s?&;#=/]+)=")
"""As `_KEY`, for addresses of stores: in `s3://b/year=20??/token=a/x`, `?` is a mark of a glob, and / ends a name."""
_VALUE = re.compile(r"[^\s&;#]*")
_USER_INFO = re.compile(r"(://)([^\s/?#]*)@")
_WEB_ADDRESS = re.compile(r"(https?://)(?:[^\s/?#'\"]*@)?([^\s/?#'\"]*)[^\s'\"]*", re.IGNORECASE)
_NAMES_IN_USER_INFO = ("git", "github")
"""Schemes of fsspec in which the part before @ names a repository and a version."""
_ADVICE = "Addresses are recorded in many places: write ${NAME} instead, and set the environment variable NAME"


def check_address(address: str) -> str:
    """Return the address. Raises ValueError if it holds a secret instead of naming it; the message hides the secret.

    A secret is a password before the host (with http and https, anything before the host), or the value of a key such
    as `token` or `X-Amz-Signature` in the query. Text without a scheme is not an address.
    """
    if (parts := _ADDRESS.fullmatch(address)) is None:
        return address
    for name in _REFERENCE.findall(address):
        if not _NAME.fullmatch(name):
            raise ValueError(
                "holds ${...} around text that is not the name of an environment variable (letters, digits, _)"
            )
    user, at, _ = parts["authority"].rpartition("@")
    if at and not _has_no_secret(parts["scheme"].lower().removesuffix("://"), user):
        raise ValueError(
            f"holds a user or password before its host. {_ADVICE}, as in https://me:${{NAME}}@example.org/"
        )
    query = "".join(re.split("([?#])", parts["rest"], maxsplit=1)[1:])
    is_web = parts["scheme"].lower() in ("http://", "https://")
    for key, value in _find_secret_fields(query, _KEY if is_web else _KEY_AFTER_MARK):
        if value and not _consists_of_references(value):
            raise ValueError(f"holds the value of {unquote(key)[:40]!r} in its query. {_ADVICE}")
    return address


def resolve(address: str) -> str:
    """Insert the environment variables that the address names. Raises ConfigError naming one that is not set."""
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        return address
    user, at, host = parts["authority"].rpartition("@")
    rest = _insert(parts["rest"], address, safe="/?")
    return f"{parts['scheme']}{_insert(user, address)}{at}{_insert(host, address)}{rest}"


def resolve_variable(text: str) -> str:
    """Return the value of the variable if the text is one `${NAME}`, else resolve an address. Raises ConfigError."""
    only = _REFERENCE.fullmatch(text)
    return resolve(text) if only is None else _read(only[1], text)


def conceal(text: object, address: str = "") -> str:
    """Return a library's text without secrets.

    The values that `resolve` inserts into `address` become `${NAME}` again. Secrets in other addresses, such as the
    target of a redirection, become `…`.
    """
    shown = str(text)
    for name in _REFERENCE.findall(address):
        if value := os.environ.get(name, "").strip():
            spellings = {value, _quote(value, "/?"), _quote(value, ""), quote(value, safe=""), quote(value)}
            spellings |= {quote_plus(value), unquote(value)}
            for spelling in sorted(spellings, key=len, reverse=True):
                shown = shown.replace(spelling, f"${{{name}}}")
    shown = _USER_INFO.sub(lambda match: match[0] if _consists_of_references(match[2]) else f"{match[1]}…@", shown)
    for key, value in _find_secret_fields(shown):
        if value and not _consists_of_references(value.rstrip(".,'\")")):
            shown = shown.replace(f"{key}={value}", f"{key}=…")
    return shown


def shorten_addresses(text: object) -> str:
    """Return the text with every web address cut after its host, because a webhook's path is often its password."""
    return conceal(_WEB_ADDRESS.sub(r"\1\2/…", str(text)))


def silence_request_log() -> None:
    """Keep urllib3 from logging whole addresses, for example with a warning about a server's odd headers."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def strip_secrets(address: str) -> str:
    """Return an address without user, password, query and fragment, as a name for lists and messages.

    For example `https://me:${PASSWORD}@example.org/a.txt?${QUERY}` gives `https://example.org/a.txt`.
    """
    if "://" not in address:
        return address
    try:
        parts = urlsplit(address)
    except ValueError:
        return address.partition("://")[0] + "://…"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _has_no_secret(scheme: str, user: str) -> bool:
    """Whether the part before the host holds no secret itself."""
    name, colon, password = user.partition(":")
    if scheme in _NAMES_IN_USER_INFO:
        return True
    if not colon:
        return scheme not in ("http", "https") or _consists_of_references(name)
    return not password or _consists_of_references(password)


def _is_secret(key: str) -> bool:
    return _SECRET_KEY.fullmatch(re.sub(r"[^a-z0-9]", "", unquote(key).lower())) is not None


def _consists_of_references(text: str) -> bool:
    return bool(text) and not _REFERENCE.sub("", text).strip(":")


def _find_secret_fields(text: str, key_pattern: re.Pattern[str] = _KEY) -> list[tuple[str, str]]:
    """Return each key whose value is a secret, with the value, in a query or in a text that contains queries."""
    keys = (match for match in key_pattern.finditer(text) if _is_secret(match[1]))
    return [(key[1], _VALUE.match(text, key.end())[0]) for key in keys]  # type: ignore[index]  # "" matches


def _insert(part: str, address: str, safe: str = "") -> str:
    return _REFERENCE.sub(lambda match: _quote(_read(match[1], address), safe), part)


def _read(name: str, address: str) -> str:
    if value := os.environ.get(name, "").strip():
        return value
    raise ConfigError(
        f"{address!r} needs the environment variable {name}, which is not set. Set it for every process that runs the "
        "pipeline, also for the workers of a pool or cluster."
    )


def _quote(value: str, safe: str) -> str:
    """Encode what would end this part of the address, and leave everything else as it is."""
    encoded = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", value)
    return quote(encoded, safe=f"%!$&'()*+,;=:@~{safe}")
