"""Planted or altered files: no code in them is run, and no path in them leads elsewhere."""

import gzip
import json
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

from flows.registry import versions
from flows.registry.loading import load as load_version
from flows.retrain import attempts
from gptcore import bundle, manifest
from gptcore.config import CorpusConfig
from gptcore.corpus import sources
from gptcore.corpus.ingest import ingest
from gptcore.corpus.reading import Reading
from gptcore.corpus.snapshot import load_snapshot
from gptcore.errors import CheckpointError, CorpusError, TokenizerError
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import load_tokens, tokenize
from gptcore.tokens.tokenizer import END_OF_TEXT, VOCABULARY, Tokenizer, get_tokenizer
from tests.corpus.test_sources import read_sources
from tests.fixtures import TinyRegistry
from tests.tiny import TINY_CFG, prose


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def as_pickle(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value))


def as_torch_file(path: Path, value: object) -> None:
    torch.save(value, path)


def as_numpy_file(path: Path, value: object) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([value], dtype=object), allow_pickle=True)


WRITERS = [as_pickle, as_torch_file, as_numpy_file]
PLANTED = pytest.mark.parametrize("plant", WRITERS)


@pytest.fixture
def executed(tmp_path: Path) -> Iterator[Path]:
    """The file that a payload creates when it is run. The teardown shows that the payload works."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    """A bundle of an untrained model, without a manifest: a hostile one could be made to fit."""
    save_file(GPTModel(TINY_CFG).state_dict(), tmp_path / "weights.safetensors")
    path = tmp_path / "bundle"
    path.mkdir()
    bundle.write_bundle(path, TINY_CFG, tmp_path / "weights.safetensors", get_tokenizer("bytes"), {})
    (path / manifest.MANIFEST).unlink()
    return path


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """Token files of a snapshot, below tmp_path."""
    (tmp_path / "one.txt").write_text(prose(1, 3000))
    cfg = CorpusConfig(sources=("one.txt",), block_bytes=256, val_fraction=0.2, holdout_fraction=0.2)
    snapshot = ingest(cfg, tmp_path / "corpora", tmp_path)
    return tokenize(snapshot.path, "bytes", tmp_path / "tokens")


@PLANTED
def test_a_pickle_in_place_of_the_weights_of_a_bundle_is_refused_and_not_executed(
    bundled: Path, executed: Path, plant: Callable[..., None]
) -> None:
    plant(bundled / bundle.WEIGHTS, Payload(executed))
    with pytest.raises(CheckpointError, match=f"the bundle {bundled} cannot be loaded"):
        bundle.load(bundled)


@PLANTED
def test_a_pickle_in_place_of_the_weights_of_a_version_is_refused_and_not_executed(
    tiny_registry: TinyRegistry, executed: Path, plant: Callable[..., None]
) -> None:
    root = tiny_registry.root
    version = tiny_registry.register()
    plant(versions.fetch_bundle(root, "gpt-tiny", version) / bundle.WEIGHTS, Payload(executed))
    with pytest.raises(versions.RegistryError, match="it was altered"):
        load_version(root, versions.resolve(root, f"models:/gpt-tiny/{version}"))


@PLANTED
@pytest.mark.parametrize("file", ["config.json", f"tokenizer/{VOCABULARY}"])
def test_a_pickle_in_place_of_a_configuration_or_a_vocabulary_is_refused_and_not_executed(
    bundled: Path, executed: Path, plant: Callable[..., None], file: str
) -> None:
    plant(bundled / file, Payload(executed))
    with pytest.raises((CheckpointError, TokenizerError), match=r"is damaged|cannot be loaded"):
        bundle.load(bundled)


@PLANTED
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".csv", ".parquet"])
def test_a_pickle_in_place_of_a_corpus_is_refused_by_name_and_not_executed(
    tmp_path: Path, executed: Path, plant: Callable[..., None], kind: str, suffix: str
) -> None:
    path = tmp_path / f"a{kind}{suffix}"
    plant(path, Payload(executed))
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path.write_bytes(pack(path.read_bytes()))
    with pytest.raises(CorpusError, match=rf"a{kind}"):
        ingest(CorpusConfig(sources=(path.name,)), tmp_path / "corpora", tmp_path)


@PLANTED
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_pickle_that_only_claims_to_be_compressed_is_refused(
    tmp_path: Path, executed: Path, plant: Callable[..., None], suffix: str
) -> None:
    plant(tmp_path / f"a.txt{suffix}", Payload(executed))
    with pytest.raises(CorpusError, match="is not a whole compressed file"):
        ingest(CorpusConfig(sources=(f"a.txt{suffix}",)), tmp_path / "corpora", tmp_path)


def test_an_ascii_pickle_is_read_as_text(tmp_path: Path, executed: Path) -> None:
    text = pickle.dumps([Payload(executed)] * 200 + [str(number) for number in range(3000)], protocol=0)
    (tmp_path / "a.txt").write_bytes(text)
    found = read_sources(["a.txt"], tmp_path)
    assert b"".join(next(found).chunks) == text


@PLANTED
@pytest.mark.parametrize("file", ["train.bin", "manifest.json", f"tokenizer/{VOCABULARY}"])
def test_a_pickle_among_token_files_is_refused_and_not_executed(
    tmp_path: Path, tokens: Tokens, executed: Path, plant: Callable[..., None], file: str
) -> None:
    plant(tokens.path / file, Payload(executed))
    snapshot = next((tmp_path / "corpora").glob("[0-9a-f]*"))
    with pytest.raises(CheckpointError, match=r"its manifest says|is damaged"):
        load_tokens(tokens.path)
    tokenize(snapshot, "bytes", tokens.path.parent).load_tokenizer()


@PLANTED
def test_a_pickle_in_place_of_a_cached_response_is_not_executed_and_the_file_is_fetched_again(
    tmp_path: Path, executed: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.txt").write_text("text")
    with serving(tmp_path / "served") as url:
        for _ in range(2):
            found = read_sources([f"{url}/a.txt"], tmp_path)
            assert b"".join(next(found).chunks) == b"text"
            found.close()
            plant(next((tmp_path / "downloads").glob("*/body.json")), Payload(executed))


class serving:
    """A context manager that serves the files of a directory over HTTP."""

    def __init__(self, directory: Path) -> None:
        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given, directory=str(directory))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.mark.parametrize(
    "changes",
    [
        {"emb_dim": 10**9},
        {"n_layers": 10**9},
        {"context_length": 10**12},
        {"vocab_size": 10**12},
        {"n_heads": 10**9},
        {"n_heads": 0},
        {"n_layers": 2.0},
        {"vocab_size": True},
        {"drop_rate": float("nan")},
        {"emb_dim": None},
        {"qkv_bias": True},
    ],
)
def test_a_bundle_whose_config_does_not_fit_its_weights_is_refused_before_the_model_is_built(
    bundled: Path, changes: dict[str, Any]
) -> None:
    (bundled / "config.json").write_text(json.dumps({**TINY_CFG, **changes}))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        bundle.load(bundled)


def test_a_bundle_whose_tokenizer_has_more_ids_than_its_model_is_refused_with_both_numbers(bundled: Path) -> None:
    get_tokenizer("gpt2").save(bundled / "tokenizer")
    with pytest.raises(CheckpointError, match="its tokenizer has 50257 ids, its model has 257"):
        bundle.load(bundled)


def crafted(directory: Path, **changes: Any) -> Path:
    """Write a vocabulary of bytes with changed fields and the hash that matches them."""
    get_tokenizer("bytes").save(directory)
    path = directory / VOCABULARY
    body = {**json.loads(path.read_text()), **changes}
    kept = {key: body.pop(key) for key in ("format", "sha256")}
    path.write_text(json.dumps({**kept, "sha256": manifest.sha256_of(body), **body}))
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": ""},
        {"pattern": "("},
        {"pattern": 5},
        {"entries": []},
        {"entries": [None] * 300},
        {"entries": {"a": 1}},
        {"entries": ["AA=="] * 256},
        {"entries": ["*"] * 256},
        {"special_tokens": {}},
        {"special_tokens": [END_OF_TEXT]},
        {"special_tokens": {END_OF_TEXT: 0}},
        {"special_tokens": {END_OF_TEXT: -1}},
        {"special_tokens": {END_OF_TEXT: 2**31}},
        {"special_tokens": {END_OF_TEXT: 2**70}},
        {"special_tokens": {END_OF_TEXT: "x"}},
    ],
)
def test_a_crafted_vocabulary_is_refused_even_if_its_hash_is_right(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="is damaged"):
        Tokenizer.load(crafted(tmp_path / "tokenizer", **changes))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"null", b"", b"\xff\xfe\0", b'{"format": ' + b"9" * 5000 + b"}"])
def test_json_that_is_too_deep_too_long_or_invalid_is_reported_as_damage(
    tmp_path: Path, bundled: Path, content: bytes
) -> None:
    (bundled / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        bundle.load(bundled)
    (bundled / "tokenizer" / VOCABULARY).write_bytes(content)
    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer.load(bundled / "tokenizer")
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_snapshot(tmp_path)


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt", "/etc/hostname"])
def test_a_path_in_a_manifest_that_leaves_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("text")
    inside = tmp_path / "directory"
    (inside / "a").mkdir(parents=True)
    target = inside / name
    entry = {"bytes": target.stat().st_size, "sha256": manifest.sha256_of_file(target)}
    (inside / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: entry}, "about": {}}))
    with pytest.raises(CheckpointError, match="which leads out of it: it was altered"):
        manifest.verify(inside)


@pytest.mark.parametrize(
    "noted", ['{"own": ".."}', '{"own": "../../elsewhere"}', '{"own": "/etc"}', '{"own": 5}', '["own"]', "5", "{", "\0"]
)
def test_current_json_without_a_run_of_its_pipeline_is_ignored(tmp_path: Path, noted: str) -> None:
    (tmp_path / attempts.CURRENT).write_text(noted)
    assert attempts._current_run_directory(tmp_path, sources_overridden=False) is None


@pytest.mark.parametrize("source", ["texts", "texts/*", "texts/**/*"])
def test_links_that_lead_out_of_a_text_directory_are_refused_at_once_or_left_out(tmp_path: Path, source: str) -> None:
    texts, private = tmp_path / "texts", tmp_path / "private"
    for directory in (texts, private / "deep"):
        directory.mkdir(parents=True)
    for name in ("secret.txt", "deep/other.txt", "deep/more.txt", "LICENSE"):
        (private / name).write_text("a password")
    (private / "program").write_bytes(b"\x7fELF" + b"\0" * 99)
    (texts / "a.txt").write_text(prose(1, 3000))
    for name in ("LICENSE", "program"):
        (texts / name).symlink_to(private / name)
    (texts / "b.txt").symlink_to(private / "secret.txt")
    links = ["LICENSE", "b.txt"]
    if source == "texts":
        (texts / "deep").symlink_to(private / "deep")
        links.append("deep")
    cfg = CorpusConfig(sources=(source,), block_bytes=256, val_fraction=0.2, holdout_fraction=0.2, exclude=("program",))
    with pytest.raises(CorpusError) as caught:
        ingest(cfg, tmp_path / "corpora", tmp_path)
    first, *problems, last = str(caught.value).splitlines()
    assert first == f"{len(links)} files cannot be used:" and "corpus.errors: skip" in last
    targets = {"LICENSE": "LICENSE", "b.txt": "secret.txt", "deep": "deep"}
    for link, problem in zip(links, sorted(problems), strict=True):
        target = private / targets[link]
        assert f"{texts / link} is a link that leads out of {texts}, to {target}. Remove it, name it in" in problem
    made = ingest(cfg.model_copy(update={"errors": "skip"}), tmp_path / "corpora", tmp_path)
    assert made.documents == 1 and made.reading.num_bad == len(links)


STORES = {
    "Hugging Face": ("hub/models--a--b/snapshots/rev", "hub/models--a--b/blobs/0a1b"),
    "git-annex": ("annexed/texts", "annexed/.git/annex/objects/Xx/Yy/SHA256E-s4--0a.txt/SHA256E-s4--0a.txt"),
    "DVC": ("tracked/data/texts", "tracked/.dvc/cache/files/md5/0a/1b"),
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("way", ["", "/*.txt"])
def test_links_into_the_store_of_a_named_directory_are_followed_but_not_out_of_it(
    tmp_path: Path, store: str, way: str
) -> None:
    directory, content = (tmp_path / name for name in STORES[store])
    for parent in (directory, content.parent, tmp_path / "hub/models--a--b/refs"):
        parent.mkdir(parents=True, exist_ok=True)
    content.write_text("text")
    (directory / "a.txt").symlink_to(os.path.relpath(content, directory))
    assert find(f"{directory}{way}", tmp_path) == (["a.txt"], [])
    (tmp_path / "passwd").write_text("secret")
    (content.parent / "planted").symlink_to(tmp_path / "passwd")
    (directory / "b.txt").symlink_to(content.parent / "planted")
    names, (problem,) = find(f"{directory}{way}", tmp_path)
    assert names == ["a.txt"] and re.search(r"b\.txt is a link that leads out of .*, to .*passwd\. Remove it", problem)


def find(source: str, base: Path) -> tuple[list[str], list[str]]:
    """Return the names of a source's files, and the problems of those that cannot be used."""
    reading = Reading()
    return [path.name for path in sources.find_local_paths(source, base, reading=reading)], reading.problems


CACHES = {
    "relative": (
        "config",
        "[core]\n    remote = r\n['remote \"r\"']\n    url = s3://x\n[cache]\n    dir = ../../disk/cache\n",
    ),
    "local": ("config.local", '[cache]\n    dir = "{}/disk/cache"  # shared\n    type = symlink\n'),
}
HASH = "ab/" + "0123456789" * 3


@pytest.mark.parametrize("form", CACHES)
@pytest.mark.parametrize("layout", ["", "files/md5/"])
def test_links_into_a_cache_that_dvc_keeps_elsewhere_are_followed_if_the_repository_above_names_it(
    tmp_path: Path, form: str, layout: str
) -> None:
    data, cache = tmp_path / "repository" / "data", tmp_path / "disk" / "cache"
    content = cache / layout / HASH
    for directory in (data, tmp_path / "repository" / ".dvc", content.parent):
        directory.mkdir(parents=True)
    content.write_text("text")
    (data / "a.txt").symlink_to(content)
    (data / "own.txt").write_text("text")
    fix = rf"If it is DVC's, run `dvc cache dir --local {cache}`"
    names, (problem,) = find("repository/data", tmp_path)
    assert names == ["own.txt"] and re.search(fix, problem)

    name, text = CACHES[form]
    (tmp_path / "repository" / ".dvc" / name).write_text(text.format(tmp_path) if form == "local" else text)
    assert find("repository/data", tmp_path) == (["a.txt", "own.txt"], [])
    (cache / "notes.txt").write_text("not named by its hash")
    (data / "b.txt").symlink_to(cache / "notes.txt")
    names, problems = find("repository/data", tmp_path)
    assert names == ["a.txt", "own.txt"] and len(problems) == 1
    names, problems = find("repository", tmp_path)
    assert names == ["own.txt"] and len(problems) == 2, "what is in the directory must not choose the store"
    (tmp_path / "repository" / ".dvc" / name).write_text("[cache\n")
    assert find("repository/data", tmp_path)[0] == ["own.txt"]


@pytest.mark.parametrize("target", ["blobs/a", ".git/annex/objects/a", ".dvc/cache/a", "snapshots/../blobs/a"])
def test_a_planted_link_into_the_store_of_another_repository_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "texts" / "snapshots").mkdir(parents=True)
    (tmp_path / "texts" / "refs").mkdir()
    (tmp_path / "private" / "snapshots").mkdir(parents=True)
    other = tmp_path / "private" / target
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("secret")
    (tmp_path / "texts" / "b.txt").symlink_to(other)
    with pytest.raises(CorpusError, match="is a link that leads out of"):
        sources.find_local_paths("texts", tmp_path)


def test_a_file_that_became_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (file,) = sources.find_files(["a.txt"], tmp_path, tmp_path / "downloads").files
    (tmp_path / "a.txt").unlink()
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(CorpusError, match=r"a\.txt is not a regular file"):
        file.open(tmp_path)


@pytest.mark.parametrize("way", ["{}/pipe", "file://{}/pipe", "file://{}", "/dev/zero", "file:///dev/zero"])
def test_a_fifo_or_device_is_refused_as_a_source_and_not_opened(tmp_path: Path, way: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match=r"is not a regular file|holds no text"):
        sources.find_files([way.format(tmp_path)], tmp_path, tmp_path / "downloads")


def test_a_link_named_as_a_source_and_links_within_a_directory_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "a.txt").write_text("text")
    (tmp_path / "texts").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "b.txt").symlink_to("deep/a.txt")
    (tmp_path / "c.txt").symlink_to(tmp_path / "disk" / "b.txt")
    for source, count in (("texts", 2), ("texts/*.txt", 1), ("c.txt", 1), ("texts/../texts/deep", 1)):
        assert len(sources.find_local_paths(source, tmp_path)) == count


@pytest.mark.parametrize("source", ["reference://x", "reference://::file:///x", "zip://a.txt::http://127.0.0.1/x"])
def test_a_source_that_opens_other_sources_or_can_contain_code_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(CorpusError, match="is not opened"):
        sources.check([source], tmp_path)
    with pytest.raises(CorpusError, match="is not opened"):
        next(read_sources([source], tmp_path))


@pytest.mark.parametrize("name", [b"\xff.txt", "\u202egnp.txt".encode(), b"a\nb.txt", b"$(touch executed).txt"])
def test_a_file_with_any_name_is_read_and_listed_under_its_name(tmp_path: Path, executed: Path, name: bytes) -> None:
    (tmp_path / "texts").mkdir()
    with open(os.path.join(os.fsencode(tmp_path / "texts"), name), "w") as file:  # noqa: PTH118, PTH123
        file.write(prose(1, 3000))
    cfg = CorpusConfig(sources=("texts",), block_bytes=256, val_fraction=0.2, holdout_fraction=0.2)
    snapshot = ingest(cfg, tmp_path / "corpora", tmp_path)
    listed = json.loads((snapshot.path / "documents.jsonl").read_text())
    assert os.fsencode(listed["name"]) == b"texts/" + name
