"""Token files behind a URL: the same batches as from disk, errors with a fix, and retries of unreachable stores."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from gptcore.config import CorpusConfig, ModelConfig, RunConfig, TrainConfig
from gptcore.corpus import ingest
from gptcore.errors import CheckpointError, ConfigError, SourceUnavailable
from gptcore.tokens import stream
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import load_tokens, tokenize
from gptcore.training.batches import Batches, make_eval_batches
from gptcore.training.resolve import find_training_version
from gptcore.training.run_directory import RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory
from tests.tiny import TINY_MODEL, odd_prose


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    (tmp_path / "a.txt").write_text(odd_prose(1, 60_000))
    cfg = CorpusConfig(sources=("a.txt",), val_fraction=0.2, holdout_fraction=0.1, block_bytes=512)
    return tokenize(ingest.ingest(cfg, tmp_path / "corpora", tmp_path).path, "bytes", tmp_path / "tokens")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PAUSES", (0.01, 0.01, 0.01))


def put(tokens: Tokens, url: str, **options: Any) -> str:
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    filesystem.put(f"{tokens.path}/", f"{path}/", recursive=True)
    return url


def assert_same_batches(found: Tokens, tokens: Tokens) -> None:
    assert (found.sha256, found.counts, found.n_vocab) == (tokens.sha256, tokens.counts, tokens.n_vocab)
    assert found.load_tokenizer().sha256 == tokens.tokenizer_sha256
    one, other = (Batches(one.side("train"), 32, 7, 8, 2, seed=5) for one in (found, tokens))
    for step in (0, 1, one.steps_per_epoch, 3 * one.steps_per_epoch + 2):
        for ours, theirs in zip(one.make_micro_batches(step), other.make_micro_batches(step), strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    ours, theirs = (make_eval_batches(one.side("val"), 32, 8, None) for one in (found, tokens))
    assert all(torch.equal(x, y) for pair in zip(ours, theirs, strict=True) for x, y in zip(*pair))
    assert np.array_equal(np.asarray(found.side("train")), tokens.side("train"))
    assert np.array_equal(found.side("val")[100:-3], tokens.side("val")[100:-3])


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_batches_are_those_of_a_memory_map_bit_for_bit(tokens: Tokens, tmp_path: Path, scheme: str) -> None:
    assert_same_batches(load_tokens(put(tokens, f"{scheme}://{tmp_path}/away")), tokens)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server that speaks S3 over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ACCESS_KEY_ID", "AKIATEST"), ("SECRET_ACCESS_KEY", "s3cret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    fsspec.filesystem("s3").makedirs("corpus", exist_ok=True)
    yield "s3://corpus/tokens"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_an_object_store_is_read_in_blocks_and_may_be_unreachable_for_a_moment(
    tokens: Tokens, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(stream, "MAX_BLOCKS", 3)
    found = load_tokens(put(tokens, s3))
    assert_same_batches(found, tokens)
    ids = found.side("train")
    assert np.array_equal(ids[:10], tokens.side("train")[:10])
    assert len(ids._cache) <= 3  # type: ignore[attr-defined]
    storage, away = fsspec.filesystem("s3"), f"{s3}/train.bin"
    body = storage.cat_file(away)
    storage.rm(away)
    with pytest.raises(SourceUnavailable, match=r"train\.bin cannot be read any more \(tried 4 times .*FileNotFound"):
        ids[30_000:30_010]
    sleep = time.sleep
    back = [lambda: None, lambda: storage.pipe_file(away, body)]
    monkeypatch.setattr(stream.time, "sleep", lambda seconds: (back.pop(0)(), sleep(seconds)))
    ids._version = {key: value for key, value in ids._version.items() if "odified" not in key}  # type: ignore[attr-defined]
    read = ids._read_version
    monkeypatch.setattr(ids, "_read_version", lambda: {k: v for k, v in read().items() if "odified" not in k})
    assert np.array_equal(ids[30_000:30_010], tokens.side("train")[30_000:30_010])
    monkeypatch.undo()


def test_another_object_under_the_same_name_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    url = put(tokens, f"file://{tmp_path}/away")
    ids = load_tokens(url).side("train")
    (tmp_path / "away" / "train.bin").write_bytes(bytes((tmp_path / "away" / "train.bin").stat().st_size))
    with pytest.raises(CheckpointError, match=r"train\.bin was replaced while it was read"):
        ids[:10]


def test_an_altered_or_incomplete_token_directory_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    url = put(tokens, f"file://{tmp_path}/away")
    with (tmp_path / "away" / "val.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"val\.bin has \d+ bytes, its manifest says \d+: it was altered"):
        load_tokens(url)
    (tmp_path / "away" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json does not exist: there is no complete token directory"):
        load_tokens(url)


@pytest.mark.slow
def test_credentials_are_refused_in_the_url_and_read_from_the_environment(
    tokens: Tokens, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"s3://\.\.\.@corpus holds credentials") as refused:
        load_tokens("s3://AKIATEST:s3cret@corpus/tokens")
    assert "s3cret" not in str(refused.value) and "AKIATEST" not in str(refused.value)
    put(tokens, s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=r"may not be read: .*AWS_ACCESS_KEY_ID"):
        load_tokens(s3)
    monkeypatch.setattr(stream.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gptflow\[s3\]'"):
        load_tokens(s3)


def test_a_run_directory_that_names_a_url_trains_the_same_weights(tokens: Tokens, tmp_path: Path) -> None:
    weights = []
    train = TrainConfig(
        max_steps=3, batch_size=2, device="cpu", precision="fp32", compile=False, threads=1, eval_batches=2
    )
    for number, place in enumerate((str(tokens.path), put(tokens, f"file://{tmp_path}/away"))):
        run = RunDirectory(tmp_path / f"run{number}")
        run.prepare(
            RunConfig(
                training_version=find_training_version(train, is_warm_start=False),
                tokens=place,
                tokens_sha256=tokens.sha256,
                model=ModelConfig(**TINY_MODEL),
                vocab_size=tokens.n_vocab,
                train=train,
                run_key="ab" * 32,
            )
        )
        result = train_directory(run.path, Stop())
        assert result is not None
        weights.append(result.weights_sha256)
    assert weights[0] == weights[1]
