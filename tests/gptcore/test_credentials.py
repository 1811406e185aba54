"""Secrets in addresses: which are refused, how variables are inserted, and that no text of a library shows them."""

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import sources
from gptcore.credentials import check_address, conceal, resolve, strip_secrets
from gptcore.errors import ConfigError, CorpusError
from gptcore.sections import check, parse

S = "c4n4ry"


@pytest.mark.parametrize(
    "address",
    [
        f"https://me:{S}@example.org/a.txt",
        f"https://{S}@example.org/a.txt",
        f"HTTPS://me:{S}@example.org/a.txt",
        f"https://me:${{A}}{S}@example.org/a.txt",
        f"ftp://me:{S}@example.org/a.txt",
        f"s3://{S}:{S}@bucket/a.txt",
        *(
            f"https://example.org/a.txt?v=1&{key}={S}"
            for key in (
                *("token", "key", "sig", "signature", "password", "secret", "access_token", "api_key", "SIG", "apiKey"),
                *("X-Amz-Signature", "x-amz-credential", "X-Goog-Signature", "AWSAccessKeyId", "private-token"),
                *("%74oken", "client_secret"),
            )
        ),
        f"https://example.org/a.txt#access_token={S}",
        f"https://example.org/a.txt?v=1;token={S}",
        f"az://container/a.txt?sv=1&sig={S}",
    ],
)
def test_a_secret_in_a_source_is_refused_with_the_fix_and_not_repeated(address: str) -> None:
    for given in ({"sources": [address]}, {"sources": address}, {"sources": [address, 1]}):
        with pytest.raises(ConfigError) as refused:
            parse(CorpusConfig, given, "pipelines.yaml")
        assert S not in str(refused.value)
    with pytest.raises(ConfigError, match=r"corpus.sources.0|sources.0: holds .*\$\{NAME\}"):
        parse(CorpusConfig, {"sources": [address]}, "pipelines.yaml")
    with pytest.raises(ValueError, match="holds") as error:
        CorpusConfig(sources=(address,))
    assert S not in str(error.value), "pydantic repeats no input"


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/a.txt",
        "https://example.org/a.txt?page=2&max_tokens=5&keyword=x#sha256=" + "a" * 64,
        "https://me:${PASSWORD}@example.org/a.txt",
        "https://${TOKEN}@example.org/a.txt?token=${TOKEN}&${QUERY}",
        "sftp://me@example.org/a.txt",
        "abfs://container@account.dfs.core.windows.net/a.txt",
        "github://owner:repository@main/a.txt",
        "s3://bucket/key=1/a?.txt",
        "s3://b/year=20??/token=a/x",
        "notes/me:you@home.txt",
    ],
)
def test_addresses_without_a_secret_pass(address: str) -> None:
    assert check_address(address) == address
    assert CorpusConfig(sources=(address,)).sources == (address,)


def test_variables_are_inserted_as_an_address_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"A": "p/w d?#", "B": "sv=1&sig=a%2Fb", "C": " t0ken\n"}.items():
        monkeypatch.setenv(name, value)
    assert resolve("https://me:${A}@h/x?${B}&t=${C}") == "https://me:p%2Fw%20d%3F%23@h/x?sv=1&sig=a%2Fb&t=t0ken"
    assert resolve("notes/${A}") == "notes/${A}", "a path is literal"


def test_a_missing_variable_and_a_malformed_one_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(CorpusError, match="environment variable NOT_SET, which is not set"):
        sources.check(["https://example.org/a?${NOT_SET}"], tmp_path)
    with pytest.raises(ValueError, match="text that is not the name"):
        check_address("https://example.org/a?${not a name}")


@pytest.mark.parametrize(
    "text",
    [
        f"Max retries exceeded with url: /a.txt?v=1&token={S} (Caused by ...)",
        f"Cannot connect to 'http://me:{S}@proxy:3128'",
        f"redirects to '/login?next=/x?token={S}'",
        f"https://storage/x?X-Amz-Signature={S}&X-Amz-Date=1",
        f"{S} is not a port",
    ],
)
def test_a_librarys_text_does_not_show_what_was_inserted_or_looks_like_a_secret(text, monkeypatch) -> None:
    monkeypatch.setenv("PASSWORD", S)
    shown = conceal(text, "https://me:${PASSWORD}@example.org/")
    assert S not in shown and len(shown) > 10
    monkeypatch.delenv("PASSWORD")
    assert S not in conceal(text) or "port" in text, "the shape alone shows that it is a secret"


def test_a_documents_name_is_its_address_without_user_and_query() -> None:
    assert strip_secrets("https://me:${PASSWORD}@h:8/a%20b.txt?${QUERY}#x") == "https://h:8/a%20b.txt"
    for unchanged in ("https://h:8/a%20b.txt", "http://[::1]:8/a", "notes/a?b.txt"):
        assert strip_secrets(unchanged) == unchanged


def test_a_list_with_a_wrong_item_is_not_also_called_too_short() -> None:
    _, problems = check(CorpusConfig, {"sources": ["https://me:pw@example.org/a.txt"]})
    assert [path for path, _ in problems] == [("sources", 0)]
    assert [path for path, _ in check(CorpusConfig, {"sources": []})[1]] == [("sources",)]
