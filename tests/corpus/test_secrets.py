"""Keys and passwords in the text are counted, with their places, and never shown."""

import json
import random
import string
from pathlib import Path

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.secrets import SecretFinder
from tests.tiny import prose


def draw(number: int, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(random.Random(number).choices(letters, k=number))


# Made at run time, so that no scanner takes this file for a leak.
SECRETS = {
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA1x\n-----END",
    "private key in JSON": r'"private_key": "-----BEGIN ' + r'PRIVATE KEY-----\nMIIEvQIBADANBgkq\n"',
    "AWS key": "AK" + "IA" + draw(16, string.ascii_uppercase + "234567"),
    "GitHub token": "gh" + "p_" + draw(36),
    "GitHub fine-grained token": "github" + "_pat_" + draw(70),
    "Slack token": "xo" + "xb-" + draw(12, string.digits) + "-" + draw(24),
    "Google key": "AI" + "za" + draw(35),
    "API key": "sk" + "-proj-" + draw(40),
    "Hugging Face token": "h" + "f_" + draw(34),
    "JSON web token": "ey" + "J" + draw(17) + ".eyJ" + draw(40) + "." + draw(43),
    "address with a password": "postgres://me:" + "hunter2" + "@db.example.org/x",
    "password": 'password = "' + "k7" + draw(12) + '"',
    "API key in YAML": "API_KEY: '" + draw(20) + "'",
    "password in JSON": '{"dbPassword": "' + draw(13) + '"}',
}
HARMLESS = (
    'password = "password"',
    'password = "correct horse"',
    'password="${PASSWORD}"',
    "password = getpass()",
    "https://user:password@example.org/",
    "https://me:${PASSWORD}@example.org/a.txt",
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    "http://[::1]:8080/a@b",
    "Mail me at 12:30 ://a b:c@d",
    "the secret: a token is a piece of text, sk-learn and risk-based",
    "data:image/png;base64," + draw(400),
    'token = "xxxxxxxxxxxxxxxx"',
)


def find(*chunks: bytes) -> dict[int, str]:
    finder = SecretFinder()
    assert list(finder.search(chunks)) == list(chunks), "the text itself passes unchanged"
    return finder.found


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_with_its_line(kind: str) -> None:
    text = f"one\ntwo {SECRETS[kind]}\nthree"
    assert list(find(text.encode())) == [2]


@pytest.mark.parametrize("text", HARMLESS)
def test_words_and_placeholders_are_not_secrets(text: str) -> None:
    assert find(text.encode()) == {}


def test_a_secret_across_two_chunks_is_found_once() -> None:
    text = ("a line of text\n" * 100 + SECRETS["GitHub token"] + "\n" + "the end\n" * 200).encode()
    for at in (0, 1, 1499, 1500, 1502, 1520, 1541, len(text)):
        assert find(text[:at], text[at:]) == {101: "GitHub token"}


def test_a_run_warns_of_secrets_by_document_and_line_and_never_shows_them(tmp_path: Path) -> None:
    secret = SECRETS["AWS key"]
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(prose(number, 200))
    (tmp_path / "notes.md").write_text(f"first\n\nkey {secret}\n")
    rows = [{"text": f"row {number} {secret}"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ingest(CorpusConfig(sources=(".",), val_fraction=0.3, holdout_fraction=0.3), tmp_path / "state", tmp_path)
    warning = made.reading.describe_secrets()
    assert warning.startswith("13 lines of text may hold keys or passwords (AWS key 13): notes.md line 3, ")
    assert "rows.jsonl:9 line 1 and 3 more. A model may learn" in warning
    assert secret not in warning and secret not in (made.path / "manifest.json").read_text()
    assert (made.path / "train.txt").read_bytes().count(secret.encode()) > 0, "a warning only"
