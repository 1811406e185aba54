"""Encodings: byte order marks, corpus.encoding, and what bytes are if they are not text."""

import gzip
import io
import random

import pytest
import zstandard

from gptcore.config import CorpusConfig
from gptcore.corpus.formats import ReadOptions, read_texts
from gptcore.errors import ConfigError, CorpusError
from gptcore.sections import parse

FRENCH = "Le café était fermé à Noël, « bien sûr », dit-elle — où êtes-vous ?\n" * 9
JAPANESE = "これは日本語のテキストです。漢字とかな、カタカナ。\n" * 9
RUSSIAN = "Это русский текст, который кто-то написал.\n" * 9


def read(data: bytes, filename: str = "a.txt", options: ReadOptions | None = None) -> list[str]:
    texts = read_texts(io.BytesIO(data), filename, filename, options or ReadOptions())
    return [b"".join(chunks).decode() for _, chunks in texts]


@pytest.mark.parametrize("text", [FRENCH, JAPANESE, RUSSIAN])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding_and_is_not_part_of_the_text(text: str, encoding: str) -> None:
    assert read(text.encode(encoding)) == read(gzip.compress(text.encode(encoding)), "a.txt.gz") == [text]
    assert read(text.encode(encoding), options=ReadOptions(encoding="cp1252")) == [text]
    rows = f"text;n\n{text.splitlines()[0]!r};1\n"
    assert read(rows.encode(encoding), "a.csv") == [repr(text.splitlines()[0])]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(FRENCH, "cp1252"), (JAPANESE, "shift_jis"), (JAPANESE, "euc_jp"), (RUSSIAN, "koi8-r"), (JAPANESE, "utf-16-le")],
)
def test_corpus_encoding_is_used_for_text_and_tables_and_stored_as_utf8(text: str, encoding: str) -> None:
    options = ReadOptions(encoding=encoding)
    assert read(text.encode(encoding), options=options) == [text]
    assert read((text * 5000).encode(encoding), options=options) == [text * 5000]
    assert read(f'{{"text": "{text[:20]}"}}\n'.encode(encoding), "a.jsonl", options) == [text[:20]]


def test_bytes_that_are_not_valid_in_corpus_encoding_are_refused_with_their_offset_or_replaced() -> None:
    data = b"a" * 300_000 + b"\x82\xff"
    with pytest.raises(
        CorpusError, match=r"a\.txt is not shift_jis: byte 0x82 at offset 300000\. Save it in that encoding"
    ):
        read(data, options=ReadOptions(encoding="shift_jis"))
    assert read(data, options=ReadOptions("replace", encoding="shift_jis"))[0].startswith("a" * 300_000 + "\ufffd")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("text", [FRENCH, JAPANESE, RUSSIAN, "Plain words.\n" * 9])
def test_wide_text_without_a_mark_is_refused_with_the_key_to_set(text: str, encoding: str) -> None:
    with pytest.raises(CorpusError, match=rf"looks like {encoding}.* corpus\.encoding: {encoding}\."):
        read(text.encode(encoding))


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (
            b"Some words. " * 99 + b"\xff" + b" Some more words.",
            r"byte 0xff at offset 1188\. Save it as UTF-8, or set corpus\.errors: replace",
        ),
        (("é" * 200).encode()[:-1], r"corpus\.errors: replace"),
        (
            FRENCH.encode("cp1252"),
            r"cp1252\. Convert it: iconv -f cp1252 .* If all text is cp1252, set corpus\.encoding: cp1252",
        ),
        (b"a caf\xe9", r"It looks like cp1252"),
        (RUSSIAN.encode("cp1251"), r"Save it as UTF-8\. If all text has its encoding, set corpus\.encoding"),
        (JAPANESE.encode("shift_jis"), r"Save it as UTF-8\. If all text has its encoding, set corpus\.encoding"),
        (random.Random(1).randbytes(5000), r"It looks like a binary file\. Remove it"),
        (bytes(range(64)) * 2 + b"\0" * 90, r"looks like a binary file: it has 92 NULs\. Remove it"),
        (b"%PDF-1.7 \xb5", r"begins like \.pdf: PDF is not read\. Convert it: pdftotext"),
        (gzip.compress(b"text", mtime=0), r"is compressed\. Give it a name that ends in \.gz"),
    ],
)
def test_the_advice_depends_on_what_the_bytes_look_like(data: bytes, advice: str) -> None:
    with pytest.raises(CorpusError, match=advice) as raised:
        read(data, "text")
    assert ("errors: replace" in str(raised.value)) == ("replace" in advice)


def test_single_nuls_are_text() -> None:
    assert read(b"a\0b, and many more words") == ["a\0b, and many more words"]


@pytest.mark.parametrize("encoding", ["rot13", "hex", "utf-9", "a\0b", "undefined", "punycode", "idna"])
def test_an_encoding_that_python_does_not_have_is_refused_with_the_config(encoding: str) -> None:
    with pytest.raises(ConfigError, match=r"corpus: encoding: .* is not an encoding\. Name one as Python does"):
        parse(CorpusConfig, {"encoding": encoding}, "corpus")
    assert parse(CorpusConfig, {"encoding": "cp1252"}, "corpus").encoding == "cp1252"


def test_a_zstandard_window_above_128_mib_is_named_for_what_it_is() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, strategy=zstandard.STRATEGY_FAST)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(b"text") + compressor.flush()
    with pytest.raises(CorpusError, match=r"needs more than 128 MiB of memory .*--long.*zstd -d --memory=2048MB FILE"):
        read(data, "a.txt.zst")


@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_utf16_without_its_mark_is_a_problem_of_the_file_even_if_the_pipeline_names_utf16(errors: str) -> None:
    with pytest.raises(CorpusError, match=r"^text cannot be read as utf-16: .*set corpus\.encoding: utf-16-le"):
        read(b"hello there", "text", ReadOptions(errors, encoding="utf-16"))  # type: ignore[arg-type]
