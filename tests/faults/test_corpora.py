"""Difficult text: too little, odd, huge, changing while it is read, or unchanged."""

import gzip
import json
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config.pipelines import Pipeline
from flows.state.root import StateRoot
from gptcore.config import CorpusConfig
from gptcore.corpus import formats, sources
from gptcore.corpus import ingest as ingestion
from gptcore.corpus.diff import compare_snapshots
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Snapshot
from gptcore.corpus.split import SIDES
from gptcore.errors import CorpusError
from gptcore.tokens.files import tokenize
from tests.corpus.passages import read_passages
from tests.corpus.test_ingest import MANY, snapshot_of
from tests.corpus.test_sources import make_tree, names, read_sources, texts
from tests.retrain.test_flow import mlflow_runs
from tests.retrain.test_policy import TRAINED, asking, run
from tests.tiny import odd_prose

# Too little text.


@pytest.mark.parametrize("texts", [{"a.txt": ""}, {"a.txt": " \n", "b.txt": "\n\n"}])
def test_a_corpus_without_text_is_refused(tmp_path: Path, texts: dict[str, str]) -> None:
    with pytest.raises(CorpusError, match=rf"no text: {len(texts)} documents"):
        snapshot_of(tmp_path, texts)


def test_a_split_side_without_a_block_is_an_error_with_counts_and_fix(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"(?s)at least 1 block.* 5 bytes in 1 blocks.*by chance.*block_bytes"):
        snapshot_of(tmp_path, {"a.txt": "Short"})
    with pytest.raises(CorpusError, match=r"nothing is left for train.*Contamination removed from train: 3000 bytes"):
        snapshot_of(tmp_path, {"a.txt": "a" * 5000}, split="contiguous")
    assert not list((tmp_path / "state" / "corpora").iterdir())


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("text", "corpus_keys", "model_keys", "said"),
    [
        ("", {}, {}, "no text: 1 documents were read"),
        (" \n\t\r\n" * 1000, {}, {}, "no text: 1 documents were read, all of them empty or whitespace"),
        ("Short.", {}, {}, r"nothing is left for .*at least 1 block\): train 6 bytes in 1 blocks"),
        (None, {}, {"context_length": 65_536}, "the train split has [0-9]+ tokens, .* need at least 524289"),
        (
            "x y z " * 1000,
            {"split": "contiguous", "val_fraction": 0.002, "holdout_fraction": 0},
            {},
            r"the val split has 12 tokens, but 1 window of context_length 32 .* need at least 33",
        ),
    ],
)
def test_too_little_text_is_refused_with_counts_and_the_minimum_before_any_mlflow_run(
    tiny: Pipeline,
    project: Path,
    root: StateRoot,
    text: str | None,
    corpus_keys: dict[str, Any],
    model_keys: dict[str, Any],
    said: str,
) -> None:
    if text is not None:
        (project / "text" / "one.txt").write_text(text)
    with pytest.raises(CorpusError, match=said):
        run(asking(tiny, corpus=corpus_keys, model=model_keys))
    assert mlflow_runs(root) == []
    assert not list(root.corpora.glob(".tmp-*")) and not list((root.path / "runs").glob("*/*"))


# Odd and huge text.


ODD = "A mark \ufeff, NUL \0, CRLF\r\n, \r, \x85, \u2028, \ufffe, \U0010ffff and e\u0301.\n\n"


def test_special_strings_nuls_byte_order_marks_and_line_ends_stay_as_they_are(tmp_path: Path) -> None:
    odd = "A mark \ufeff, a NUL \0, <|endoftext|> and\r\nCRLF.\r\n\r\n"
    texts = {f"{number}.txt": odd + odd_prose(number, 300) for number in range(60)}
    snapshot = snapshot_of(tmp_path, texts)
    found = sorted(text for side in SIDES for text in read_passages(snapshot.path, side))
    assert found == sorted(texts.values())


def test_a_byte_that_is_not_utf8_is_refused_with_file_and_offset_or_replaced_as_configured(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(odd_prose(1, 3000).encode() + b"\xff" + odd_prose(2, 3000).encode())
    offset = len(odd_prose(1, 3000).encode())
    settings = {"sources": ("a.txt",), "block_bytes": 256, "val_fraction": 0.2, "holdout_fraction": 0.2}
    with pytest.raises(CorpusError, match=rf"a\.txt is not UTF-8: byte 0xff at offset {offset}\. .*errors: replace"):
        ingest(CorpusConfig(**settings), tmp_path / "corpora", tmp_path)
    assert not list((tmp_path / "corpora").iterdir())
    replaced = ingest(CorpusConfig(**settings, errors="replace"), tmp_path / "corpora", tmp_path)
    whole = "".join((replaced.path / f"{side}.txt").read_text() for side in SIDES)
    assert whole.count("\ufffd") == 1


@pytest.mark.parametrize("escape", ["\\ud800", "\\udfff", "a\\udc00b", "\\ud800\\ud800"])
def test_a_lone_surrogate_in_json_is_an_invalid_byte_and_a_pair_is_a_character(tmp_path: Path, escape: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{escape} \\ud83c\\udf88"}}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:1 is not Unicode text: character [01] is the lone surrogate"):
        texts(["a.jsonl"], tmp_path)
    (replaced,) = texts(["a.jsonl"], tmp_path, "replace")
    assert replaced.endswith(" \U0001f388") and "\ufffd" in replaced


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_odd_text_survives_tokenizing_and_decoding(tmp_path: Path, name: str) -> None:
    snapshot = snapshot_of(tmp_path, {f"{number}.txt": f"{ODD}{odd_prose(number, 400)}" for number in range(40)})
    tokens = tokenize(snapshot.path, name, tmp_path / "tokens")
    vocabulary = tokens.load_tokenizer()
    decoded = vocabulary.decode(tokens.side("train").tolist())
    assert decoded == "<|endoftext|>".join(read_passages(snapshot.path, "train")) and ODD in decoded


def peak(work: Callable[[], str]) -> tuple[str, int]:
    """Run `work` in its own process; return its result, and the bytes by which the process grew."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            said = work()
        except CorpusError as error:
            said = f"CorpusError: {error}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writing, json.dumps([said, grown * 1024]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said, grown = json.loads(pipe.read() or '["died", 0]')
    os.waitpid(child, 0)
    return said, grown


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_read_in_little_memory_and_one_of_50_becomes_a_snapshot(tmp_path: Path) -> None:
    line = tmp_path / "line.txt"
    line.write_bytes(os.urandom(25_000_000).hex().encode())

    def whole() -> str:
        snapshot = ingest(CorpusConfig(sources=("line.txt",)), tmp_path / "corpora", tmp_path)
        return str(sum(snapshot.bytes.values()))

    said, grown = peak(whole)
    assert said == "50000000" and grown < 100_000_000
    with line.open("ab") as file:
        file.write(b"x" * 50_000_000)
    said, grown = peak(lambda: read(tmp_path, "line.txt"))
    assert said == "100000000" and grown < 30_000_000


def read(base: Path, name: str) -> str:
    found = read_sources([name], base)
    return str(sum(len(chunk) for document in found for chunk in document.chunks))


def bomb(path: Path, begin: bytes, piece: bytes, megabytes: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(megabytes):
            file.write(piece)


def test_a_file_that_decompresses_to_a_gigabyte_is_read_in_little_memory(tmp_path: Path) -> None:
    bomb(tmp_path / "a.txt.gz", b"", b"a" * 1_000_000, 1000)
    said, grown = peak(lambda: read(tmp_path, "a.txt.gz"))
    assert said == "1000000000" and grown < 30_000_000


@pytest.mark.parametrize(
    ("name", "begin", "piece"),
    [
        ("a.jsonl.gz", b'{"text": "', b"a" * 1_000_000),
        ("a.csv.gz", b'text\n"', b"a" * 999_999 + b"\n"),
        ("b.csv.gz", b"text\n", b"," * 1_000_000),
    ],
)
def test_a_huge_row_in_a_compressed_file_is_refused_with_its_location(
    tmp_path: Path, name: str, begin: bytes, piece: bytes
) -> None:
    bomb(tmp_path / name, begin, piece, 200)
    said, grown = peak(lambda: read(tmp_path, name))
    assert f"{name}:" in said and f"a row is longer than the {formats.MAX_ROW_BYTES:,} bytes" in said
    assert grown < 8 * formats.MAX_ROW_BYTES


def test_a_long_text_in_a_hundred_parquet_rows_is_held_in_memory_once(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), ["x" * 10_000_000])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2_000_000
    said, grown = peak(lambda: read(tmp_path, "a.parquet"))
    assert said == "1000000000" and grown < 300_000_000


# Special strings.


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe:300"])
def test_the_end_of_text_string_inside_a_document_does_not_end_it(tmp_path: Path, name: str) -> None:
    marks = "<|endoftext|> <|endofprompt|> <|fim_prefix|> <|im_start|> <s> </s> [CLS] "
    with_marks = {f"{number}.txt": marks + odd_prose(number, 900) for number in range(60)}
    plain = {key: text.replace("<|endoftext|>", "@@@") for key, text in with_marks.items()}
    counted = []
    for given in (with_marks, plain):
        snapshot = snapshot_of(tmp_path, given, split="contiguous")
        tokens = tokenize(snapshot.path, name, tmp_path / "tokens")
        ids = tokens.side("train").tolist()
        counted.append((snapshot.documents, ids.count(tokens.eot)))
        vocabulary = tokens.load_tokenizer()
        first = ids[: ids.index(tokens.eot)]
        assert vocabulary.decode(first) == next(read_passages(snapshot.path, "train"))
    assert counted[0][0] == counted[1][0] == 60
    assert counted[0][1] == len(list(read_passages(snapshot.path, "train"))) - 1 == counted[1][1]


# Text that changes or disappears while it is read.


def test_a_loop_of_symbolic_links_is_walked_once(tmp_path: Path) -> None:
    make_tree(tmp_path / "texts")
    (tmp_path / "texts" / "sub" / "up").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "loop.txt").symlink_to("loop.txt")
    assert names(["texts"], tmp_path) == ["texts/a.md", "texts/b.txt", "texts/notes.rst", "texts/sub/c.txt.gz"]
    assert names(["texts/**/*.txt"], tmp_path) == ["texts/b.txt"]


def test_a_file_that_changes_once_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    copy, edits = sources.shutil.copyfileobj, iter(["after the edit"])

    def copy_then_edit(*given: Any) -> None:
        copy(*given)
        for text in edits:
            path.write_text(text)

    monkeypatch.setattr(sources.shutil, "copyfileobj", copy_then_edit)
    assert texts(["a.txt"], tmp_path) == ["after the edit"]


def test_a_file_that_keeps_changing_or_disappears_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 30_000_000)
    done = threading.Event()

    def keep_writing() -> None:
        while not done.is_set():
            with path.open("ab") as file:
                file.write(b"b")
            time.sleep(0.0005)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        with pytest.raises(CorpusError, match=r"a\.txt changed while it was read, 2 times"):
            texts(["a.txt"], tmp_path)
    finally:
        done.set()
        writer.join()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    found = read_sources(["[bc].txt"], tmp_path)
    assert b"".join(next(found).chunks) == b"b"
    (tmp_path / "c.txt").unlink()
    with pytest.raises(CorpusError, match=r"c\.txt disappeared"):
        next(found)


def test_a_snapshot_has_the_hash_of_the_text_that_was_read_even_if_the_file_was_edited_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(before := odd_prose(1, 9000))
    spool = ingestion.Spool

    def edit_after_reading(*given: Any) -> Any:
        made = spool(*given)
        (tmp_path / "a.txt").write_text("edited")
        return made

    settings = CorpusConfig(sources=("a.txt",), block_bytes=256, val_fraction=0.2, holdout_fraction=0.2)
    monkeypatch.setattr(ingestion, "Spool", edit_after_reading)
    snapshot = ingest(settings, tmp_path / "corpora", tmp_path)
    monkeypatch.undo()
    assert sum(snapshot.bytes.values()) == len(before.encode())
    (tmp_path / "a.txt").write_text(before)
    assert ingest(settings, tmp_path / "corpora", tmp_path).sha256 == snapshot.sha256


def test_a_directory_without_text_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(CorpusError, match=r"'pictures' has no file of text"):
        ingest(CorpusConfig(sources=("pictures",)), tmp_path / "corpora", tmp_path)


# The same text, reordered text, more text.


def test_unchanged_and_reordered_text_gives_the_same_snapshot_and_a_new_document_is_counted(tmp_path: Path) -> None:
    def taken(given: dict[str, str]) -> Snapshot:
        return snapshot_of(tmp_path, given)

    first = taken(MANY)
    assert taken(MANY).path == first.path
    assert taken({f"z{key}": text for key, text in reversed(MANY.items())}).path == first.path
    more = taken({**MANY, "new.txt": odd_prose(777, 2000)})
    delta = compare_snapshots(first.path, more.path)
    assert (delta.documents_added, delta.documents_kept, delta.documents_removed) == (1, len(MANY), 0)
    assert delta.new_bytes == len(odd_prose(777, 2000).encode()) and delta.removed_bytes == 0


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "root")
def test_unchanged_and_reordered_text_is_skipped_and_a_new_document_is_trained_on_with_a_report(
    tiny: Pipeline, project: Path
) -> None:
    run(tiny)
    name, outcome = run(tiny)
    assert name == "skipped" and "nothing changed since version 1" in outcome.reason
    (project / "text" / "one.txt").rename(project / "text" / "other.txt")
    name, outcome = run(tiny)
    assert name == "skipped" and "nothing changed since version 1" in outcome.reason
    name, outcome = run(asking(tiny, retrain={"when": "always"}))
    assert (name, outcome.uri) == ("rejected", "models:/gpt-tiny/2")
    (project / "text" / "two.txt").write_text(new := odd_prose(2, 3000))
    name, outcome = run(tiny)
    assert name in TRAINED and outcome.uri == "models:/gpt-tiny/3"
    changes = dict(outcome.changes)
    assert changes["documents"] == "1 added, 0 changed, 0 removed, 1 kept"
    assert changes["new text"].startswith(f"{len(new.encode()):,} of ")
    assert "bits per byte on" in changes["champion on the new text"]
    assert changes["token distribution"].startswith("Jensen-Shannon divergence 0.")
