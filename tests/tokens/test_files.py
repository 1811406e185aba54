"""Token files: their content does not depend on processes or chunks, and damage is detected."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gptcore import manifest, processes
from gptcore.config import CorpusConfig
from gptcore.corpus import ingest
from gptcore.corpus.snapshot import load_snapshot
from gptcore.errors import CheckpointError, ConfigError, CorpusError, TokenizerError
from gptcore.processes import WorkerDied
from gptcore.tokens import directory, encode, files
from gptcore.tokens import tokenizer as tokenizer_room
from gptcore.tokens.files import load_tokens, tokenize
from gptcore.tokens.tokenizer import get_tokenizer
from tests.corpus.passages import read_passages

FIRST = "".join(f"The {n}th cat, naïvely; 日本 and <|endoftext|>.\r\n\t{n * 7919} !!!\n\n" for n in range(200))
SECOND = "".join(f"Another document, line {n}: {n * n * 104729} clouds in the mountains.\n" for n in range(200))


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """Two documents: train holds the first and the start of the second, val the next part, holdout the rest."""
    (tmp_path / "a.txt").write_bytes(FIRST.encode())
    (tmp_path / "b.txt").write_bytes(SECOND.encode())
    return ingested(tmp_path, sources=("*.txt",), split="contiguous", val_fraction=0.1, holdout_fraction=0.1)


def ingested(tmp_path: Path, **settings) -> Path:
    return ingest.ingest(CorpusConfig(**settings), tmp_path / "corpora", tmp_path).path


def expected_ids(snapshot: Path, side: str, tokenizer) -> list[int]:
    """Return the ids of the passages one after another, with an end-of-text id between them."""
    ids: list[int] = []
    for number, passage in enumerate(read_passages(snapshot, side)):
        ids += [tokenizer.eot] * (number > 0) + tokenizer.encode(passage)
    return ids


@pytest.mark.parametrize("name", ["gpt2", "bytes", "bpe:300"])
def test_a_side_is_its_passages_with_one_end_of_text_between_them(snapshot, tmp_path, name):
    made = tokenize(snapshot, name, tmp_path / "tokens")
    tokenizer = made.load_tokenizer()
    for side in ("train", "val"):
        assert made.side(side).tolist() == expected_ids(snapshot, side, tokenizer)
        assert made.counts[side] == len(made.side(side))
    train = made.side("train")
    num_passages = len(list(read_passages(snapshot, "train")))
    assert num_passages > 1 and (train == made.eot).sum() == num_passages - 1
    assert made.eot not in (train[0], train[-1])
    assert (made.tokenizer, made.n_vocab, made.eot) == (name, tokenizer.n_vocab, tokenizer.eot)


def test_the_ids_of_train_decode_to_its_bytes(snapshot, tmp_path):
    made = tokenize(snapshot, "gpt2", tmp_path / "tokens")
    train = made.side("train")
    assert made.load_tokenizer().decode_bytes(train[train != made.eot]) == (snapshot / "train.txt").read_bytes()


def test_the_hash_split_is_tokenized_block_by_block(tmp_path):
    text = "".join(f"Paragraph {number} tells of {number * 7919}.\n\n" for number in range(2000))
    (tmp_path / "long.txt").write_text(text)
    made = ingested(tmp_path, sources=("long.txt",), block_bytes=256, val_fraction=0.2, holdout_fraction=0.2)
    found = tokenize(made, "gpt2", tmp_path / "tokens")
    for side in ("train", "val"):
        assert found.side(side).tolist() == expected_ids(made, side, get_tokenizer("gpt2"))


def test_a_trained_vocabulary_sees_the_train_side_only(tmp_path):
    """The most frequent pair, xq, is only in the holdout."""
    (tmp_path / "a.txt").write_text("".join(f"ab{n} " for n in range(500)) + "".join(f"xq{n}xq " for n in range(500)))
    made = ingested(tmp_path, sources=("a.txt",), split="contiguous", val_fraction=0.1, holdout_fraction=0.55)
    assert tokenize(made, "bpe:258", tmp_path / "tokens").load_tokenizer().decode([256]) == "ab"


def test_several_processes_write_the_same_files_as_one(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH_CHARS", 100)
    monkeypatch.setattr(tokenizer_room, "PIECE_CHARS", 50)
    alone = tokenize(snapshot, "bpe:300", tmp_path / "alone", processes=1)
    many = tokenize(snapshot, "bpe:300", tmp_path / "many", processes=3)
    for name in ("train.bin", "val.bin", manifest.MANIFEST):
        assert (alone.path / name).read_bytes() == (many.path / name).read_bytes()


def test_chunks_that_cut_a_character_change_nothing(snapshot, tmp_path, monkeypatch):
    whole = tokenize(snapshot, "gpt2", tmp_path / "whole").side("train").tolist()
    monkeypatch.setattr(encode, "_CHUNK_BYTES", 7)
    assert tokenize(snapshot, "gpt2", tmp_path / "cut").side("train").tolist() == whole


def test_an_existing_directory_is_reused_and_not_written(snapshot, tmp_path, monkeypatch):
    for name in ("gpt2", "bpe:300"):
        first = tokenize(snapshot, name, tmp_path / "tokens")
        monkeypatch.setattr(encode, "encode_batch", None)
        monkeypatch.setattr(files, "train_bpe", None)
        assert tokenize(snapshot, name, tmp_path / "tokens") == first == load_tokens(first.path)
        monkeypatch.undo()
    assert first.path.name == first.sha256[:16]


def test_another_corpus_or_tokenizer_has_another_identity(snapshot, tmp_path):
    names = ("gpt2", "bytes", "bpe:300", "bpe:301")
    made = [tokenize(snapshot, name, tmp_path / "tokens") for name in names]
    (tmp_path / "c.txt").write_text("A third document with words of its own.\n" * 50)
    larger = ingested(tmp_path, sources=("*.txt",), split="contiguous", val_fraction=0.1, holdout_fraction=0.1)
    made += [tokenize(larger, name, tmp_path / "tokens") for name in names]
    assert len({one.sha256 for one in made}) == len({one.path for one in made}) == 8


def test_a_given_vocabulary_is_used_instead_of_one_trained_on_the_corpus(snapshot, tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text("A third document with words of its own.\n" * 50)
    larger = ingested(tmp_path, sources=("*.txt",), split="contiguous", val_fraction=0.1, holdout_fraction=0.1)
    ancestor = tokenize(snapshot, "bpe:300", tmp_path / "tokens").load_tokenizer()
    own = tokenize(larger, "bpe:300", tmp_path / "tokens")
    monkeypatch.setattr(files, "train_bpe", None)
    made = tokenize(larger, "bpe:300", tmp_path / "tokens", vocabulary=ancestor)
    assert made.tokenizer_sha256 == ancestor.sha256 != own.tokenizer_sha256
    assert made.sha256 != own.sha256, "the vocabulary is part of the identity of the files"
    assert made.side("val").tolist() == expected_ids(larger, "val", ancestor)
    assert tokenize(larger, "bpe:300", tmp_path / "tokens", vocabulary=made.load_tokenizer()) == made


def test_giving_a_fixed_vocabulary_changes_nothing(snapshot, tmp_path):
    made = tokenize(snapshot, "bytes", tmp_path / "tokens")
    assert tokenize(snapshot, "bytes", tmp_path / "tokens", vocabulary=made.load_tokenizer()) == made


def test_a_vocabulary_of_another_name_is_refused_with_both_names(snapshot, tmp_path):
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer is 'bpe:300', but the vocabulary to be kept is 'bytes'"):
        tokenize(snapshot, "bpe:300", tmp_path / "tokens", vocabulary=get_tokenizer("bytes"))


def test_the_manifest_names_the_corpus_the_tokenizer_and_the_counts(snapshot, tmp_path):
    made = tokenize(snapshot, "gpt2", tmp_path / "tokens")
    assert manifest.verify(made.path) == {
        "sha256": made.sha256,
        "corpus_sha256": load_snapshot(snapshot).sha256,
        "tokenizer": "gpt2",
        "tokenizer_sha256": get_tokenizer("gpt2").sha256,
        "n_vocab": 50257,
        "eot": 50256,
        "dtype": "uint16",
        "counts": made.counts,
    }
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "tokenizer", "train.bin", "val.bin"]


def test_ids_take_two_bytes_up_to_65536_entries_and_four_beyond():
    assert [directory.dtype_of(n_vocab).itemsize for n_vocab in (257, 65_536, 65_537, 200_019)] == [2, 2, 4, 4]


def test_the_ids_are_mapped_from_disk_and_cannot_be_written(snapshot, tmp_path):
    train = tokenize(snapshot, "bytes", tmp_path / "tokens").side("train")
    assert isinstance(train, np.memmap) and train.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        train[0] = 1


def test_a_side_without_text_has_no_tokens(snapshot, tmp_path, monkeypatch):
    real = files.read_passages_in_chunks
    monkeypatch.setattr(
        files, "read_passages_in_chunks", lambda path, side, _: real(path, side) if side == "train" else iter(())
    )
    made = tokenize(snapshot, "bytes", tmp_path / "tokens")
    assert made.counts["val"] == 0 and made.side("val").shape == (0,)


def test_a_truncated_or_missing_token_file_is_refused(snapshot, tmp_path):
    file = tokenize(snapshot, "bytes", tmp_path / "tokens").path / "train.bin"
    for damage in (lambda: os.truncate(file, 10), file.unlink):
        damage()
        with pytest.raises(CheckpointError, match=r"train\.bin (has 10 bytes, its manifest says \d+|is missing)"):
            load_tokens(file.parent)


def test_an_altered_token_file_of_the_same_size_is_refused_and_made_again(snapshot, tmp_path, caplog):
    made = tokenize(snapshot, "bytes", tmp_path / "tokens")
    file = made.path / "train.bin"
    intact, mapped = file.read_bytes(), made.side("train")
    with file.open("r+b") as opened:
        opened.seek(200)
        opened.write(bytes(100))
    with pytest.raises(CheckpointError, match=rf"{file} has sha256 .*: it was altered\. Run `gptflow run`"):
        load_tokens(made.path)
    assert not caplog.records
    assert tokenize(snapshot, "bytes", tmp_path / "tokens") == made == load_tokens(made.path)
    assert file.read_bytes() == intact != mapped.tobytes(), "a training that reads the old file keeps it"
    (warning,) = caplog.records
    assert str(file) in warning.getMessage() and "made again" in warning.getMessage()


def test_a_truncated_snapshot_is_refused_without_waiting(snapshot, tmp_path):
    os.truncate(snapshot / "train.txt", 100)
    with pytest.raises(CheckpointError, match=r"train\.txt ends \d+ bytes before its index does"):
        tokenize(snapshot, "bytes", tmp_path / "tokens")


def test_errors_leave_nothing_behind(snapshot, tmp_path):
    with pytest.raises(ConfigError, match="unknown"):
        tokenize(snapshot, "gtp2", tmp_path / "tokens")
    with pytest.raises(CorpusError, match="bpe:100000"):
        tokenize(snapshot, "bpe:100000", tmp_path / "tokens")
    assert not list((tmp_path / "tokens").glob("*"))


def test_a_tokenizing_process_that_dies_is_an_error_and_leaves_no_process_behind(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_CHILD", "import sys; sys.stdin.buffer.read(1); sys.exit(3)")
    with pytest.raises(WorkerDied, match=r"killed 3 processes .* exit code 3"):
        tokenize(snapshot, "bytes", tmp_path / "tokens", processes=2)
    assert not list((tmp_path / "tokens").glob("*"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def script(tmp_path: Path, program: str) -> subprocess.Popen:
    """Start a student's script, without a `__name__` guard, in a directory of its own."""
    (tmp_path / "script.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "script.py"], env=environment, cwd=tmp_path, **pipes)


def test_the_processes_of_an_unguarded_script_that_imports_torch_do_not_import_torch(snapshot, tmp_path):
    program = (
        "import torch\nfrom pathlib import Path\nfrom gptcore.processes import start_pool\n"
        "from gptcore.tokens import encode, files\n"
        f"made = files.tokenize(Path({str(snapshot)!r}), 'bytes', Path('tokens'), processes=2)\n"
        "with start_pool(1) as pool:\n"
        "    encoder = encode._BatchEncoder(made.load_tokenizer(), made.path / 'tokenizer')\n"
        "    print(pool.submit(encoder, ['text']).result().tolist())\n"
        '    print(pool.submit(eval, \'"torch" in __import__("sys").modules\').result())\n'
    )
    with script(tmp_path, program) as running:
        out, said = running.communicate()
    assert running.returncode == 0 and out == f"{list(b'text')}\nFalse\n", said


def test_a_damaged_tokenizer_of_a_token_directory_is_refused(snapshot, tmp_path):
    made = tokenize(snapshot, "bytes", tmp_path / "tokens")
    (made.path / "tokenizer" / "vocabulary.json").write_text("{}")
    with pytest.raises(TokenizerError):
        made.load_tokenizer()
