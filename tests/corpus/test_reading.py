"""Nothing is passed over in silence: what became of every file and document, and all problems at once."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptcore.config import CorpusConfig
from gptcore.corpus import ingest as ingest_module
from gptcore.corpus import shards
from gptcore.corpus.ingest import ingest
from gptcore.corpus.reading import Reading, suffix_of
from gptcore.corpus.snapshot import Snapshot, load_snapshot
from gptcore.errors import CorpusError
from gptcore.processes import map_in_processes
from tests.tiny import prose


def write(directory: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(base: Path, *sources: str, **settings: Any) -> Snapshot:
    cfg = CorpusConfig(sources=sources or ("texts",), val_fraction=0.3, holdout_fraction=0.3, **settings)
    return ingest(cfg, base / "corpora", base)


def tickets(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


MIXED: dict[str, str | bytes] = {
    **{f"texts/{number}.txt": prose(number, 200) for number in range(12)},
    "texts/copy.txt": prose(1, 200),
    "texts/blank.txt": " \n",
    "texts/rows.jsonl.gz": gzip.compress(tickets(*(prose(number, 100) for number in (50, 51, 51, 51)), "").encode()),
    "texts/picture.png": b"\xff\xd8",
    "texts/other.PNG": b"\xff",
    "texts/.gitignore": "logs/\n*.log.txt\n",
    "texts/logs/a.txt": "log",
    "texts/logs/b.txt": "log",
    "texts/a.log.txt": "log",
    "texts/.hidden.txt": "hidden",
    "texts/drafts/a.txt": "draft",
    "texts/node_modules/a.md": "program",
}


@pytest.mark.parametrize("way", ["one process", "shards"])
def test_every_file_and_document_that_is_left_out_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    write(tmp_path, MIXED)
    if way == "shards":
        monkeypatch.setattr(shards, "SHARD_BYTES", 4_000)
        monkeypatch.setattr(ingest_module, "WHOLE_BYTES", 4_000)
    made = read(tmp_path, exclude=("drafts/",))
    lines = made.reading.describe()
    assert lines[:3] == [
        ".jsonl.gz: 1 file read with 5 documents; left out: 1 empty, 2 duplicate documents",
        ".png: 2 files not read: a picture is not text.",
        ".txt: 14 files read; left out: 1 empty, 1 duplicate documents",
    ]
    assert lines[3] == ("excluded: 3 files, 3 directories (.gitignore 2, corpus.exclude 1, files of tools 1, hidden 2)")
    assert load_snapshot(made.path).reading == made.reading, "the manifest has the same numbers"


def test_a_corpus_of_one_suffix_with_nothing_left_out_has_nothing_to_report(tmp_path: Path) -> None:
    write(tmp_path, {f"texts/{number}.txt": prose(number, 200) for number in range(9)})
    assert read(tmp_path).reading.describe() == []


def test_a_snapshot_that_exists_already_reports_what_was_read_today(tmp_path: Path) -> None:
    write(tmp_path, {f"texts/{number}.txt": prose(number, 200) for number in range(9)})
    before = read(tmp_path)
    write(tmp_path, {"texts/copy.txt": prose(3, 200), "texts/a.pdf": b"%PDF"})
    after = read(tmp_path)
    assert after.path == before.path
    assert after.reading.describe() == [
        ".pdf: 1 file not read: PDF is not read. Convert it: pdftotext -layout FILE FILE.txt",
        ".txt: 10 files read; left out: 1 duplicate document",
    ]


BAD: dict[str, str | bytes] = {
    "texts/a.txt": b"a\xff",
    "texts/b.jsonl": tickets("one", "two") + "{",
    "texts/c.txt.gz": b"not gzip",
    "texts/d.csv": 'text\n"never closed\n',
    "texts/sub/e.md": b"\xfe\xff\x00",
}


@pytest.mark.parametrize("way", ["one process", "shards"])
def test_all_bad_files_are_in_one_report_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    write(tmp_path, {f"texts/{number}.txt": prose(number, 200) for number in range(9)} | BAD)
    if way == "shards":
        monkeypatch.setattr(shards, "SHARD_BYTES", 4_000)
        monkeypatch.setattr(ingest_module, "WHOLE_BYTES", 4_000)
    with pytest.raises(CorpusError) as caught:
        read(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 files cannot be used:"
    assert [line.split()[0].partition(":")[0] for line in lines[1:6]] == list(BAD)
    assert lines[6] == "Or set corpus.errors: skip to leave such files out."
    made = read(tmp_path, errors="skip")
    assert made.documents == 9, "a file with a bad row is left out as a whole"
    assert made.reading.num_bad == 5
    assert made.reading.describe()[-6:] == ["left out by corpus.errors: skip:", *lines[1:6]]


def test_a_bad_file_that_is_repaired_is_read_again_from_its_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {f"texts/{number}.txt": prose(number, 200) for number in range(9)} | {"texts/a.txt": b"a\xff"})
    monkeypatch.setattr(shards, "SHARD_BYTES", 4_000)
    monkeypatch.setattr(ingest_module, "WHOLE_BYTES", 4_000)
    with pytest.raises(CorpusError, match=r"a\.txt is not UTF-8.*corpus\.errors: skip"):
        read(tmp_path)
    write(tmp_path, {"texts/a.txt": prose(77, 200)})
    assert read(tmp_path).documents == 10


def test_of_very_many_bad_files_twenty_are_named(tmp_path: Path) -> None:
    write(tmp_path, {f"texts/{number:03d}.txt": b"\xff" for number in range(70)})
    with pytest.raises(CorpusError) as caught:
        read(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "70 files cannot be used:"
    assert (len(lines), lines[21]) == (23, "  and 50 more")


def test_a_foreign_table_in_a_directory_is_reported_and_a_named_one_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {f"texts/{number}.txt": prose(number, 200) for number in range(9)})
    write(tmp_path, {"texts/prices.csv": "item,price\nlamp,3\n"})
    made = read(tmp_path)
    assert made.documents == 9
    assert made.reading.describe()[0] == ".csv: 1 file left out, see below"
    assert "texts/prices.csv:1 has no column 'text'; columns found: item, price" in made.reading.describe()[-1]
    with pytest.raises(CorpusError, match="has no column 'text'"):
        read(tmp_path, "texts", "texts/prices.csv")


def test_all_sources_that_do_not_exist_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        read(tmp_path, "one.txt", "python-docs", "two/", "https://[", "three-*.md")
    assert len(str(caught.value).splitlines()) == 4


def test_a_directory_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"texts/{number}.txt": prose(number, 200) for number in range(9)})
    walks = []
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top, **options: walks.append(top) or walk(top, **options))
    read(tmp_path)
    assert walks == [tmp_path / "texts"]


def test_replaced_characters_are_counted_and_those_that_were_in_the_text_are_not(tmp_path: Path) -> None:
    write(tmp_path, {f"texts/{number}.txt": prose(number, 200) for number in range(9)})
    write(tmp_path, {"texts/a.txt": b"a\xff\xfe b\xe4\xb8 \xef\xbf\xbd", "texts/b.jsonl": '{"text": "x \\ud800"}'})
    assert read(tmp_path, errors="replace").reading.describe() == [
        ".jsonl: 1 file read; 1 character replaced, because bytes were not valid",
        ".txt: 10 files read; 3 characters replaced, because bytes were not valid",
    ]


def test_readings_are_merged_and_keep_their_size() -> None:
    first, second = Reading(), Reading()
    for number in range(300):
        first.count(f".{number}", skipped=1)
        second.add_problem(".txt", f"{number}.txt is damaged")
    first.merge(second)
    assert len(first.counts) <= 51 and first.total("skipped") == 300
    assert first.num_bad == 300 and len(first.problems) == 20
    assert Reading.from_json(json.loads(json.dumps(first.to_json()))) == first


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.txt", ".txt"), ("A.JSONL.GZ", ".jsonl.gz"), ("LICENSE", "no suffix"), ("x/.hidden", "no suffix")],
)
def test_the_suffix_of_a_name(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


def test_workers_report_the_same_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, MIXED | BAD)
    cfg = CorpusConfig(sources=("texts",), block_bytes=256, val_fraction=0.3, holdout_fraction=0.3, errors="skip")
    alone = ingest(cfg, tmp_path / "alone" / "corpora", tmp_path)
    monkeypatch.setattr(shards, "SHARD_BYTES", 4_000)
    monkeypatch.setattr(ingest_module, "WHOLE_BYTES", 4_000)

    def in_two(step: str, action: str, function: Any, parts: Any) -> Any:
        return map_in_processes(step, action, function, parts, processes=2)

    shared = ingest(cfg, tmp_path / "shared" / "corpora", tmp_path, in_two)
    assert shared.reading == alone.reading
    assert (shared.path / "manifest.json").read_bytes() == (alone.path / "manifest.json").read_bytes()


def test_a_file_name_that_is_not_utf8_can_be_reported(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_bytes(b"a caf\xe9")
    (tmp_path / "good.txt").write_text(prose(1, 20_000))
    with pytest.raises(CorpusError, match="not UTF-8") as raised:
        ingest(CorpusConfig(sources=(".",)), tmp_path / "corpora", tmp_path)
    str(raised.value).encode()
    made = ingest(CorpusConfig(sources=(".",), errors="skip"), tmp_path / "corpora", tmp_path)
    "\n".join(made.reading.describe()).encode()
    assert made.reading.num_bad == 1
