"""The command line as a user meets it: real processes, wrong input, exit codes, and nothing left behind."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.flows.servers import gptflow


def refused(done: "subprocess.CompletedProcess[str]", code: int, *parts: str) -> None:
    """One message with all `parts` on stderr, the exit code, no traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "error: " in done.stderr.lower()
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.max_step=5"], ["--set train.max_step", "did you mean max_steps?"]),
        (["train.max_steps=-5"], ["--set train.max_steps", "greater than or equal to 1", "-5"]),
        (["train.max_steps=many"], ["--set train.max_steps", "valid integer", "many"]),
        (["train.max_steps=true"], ["--set train.max_steps", "valid integer"]),
        (["train.max_steps"], ["section.key=value"]),
        (["train.learning_rate=[1"], ["--set train.learning_rate", "not YAML"]),
        (["train.learning_rate=.nan"], ["--set train.learning_rate", "finite"]),
        (["model.emb_dim=33"], ["emb_dim 33 is not divisible by n_heads 2", "32", "34"]),
        (["model.size=huge"], ["'gpt2-xl'", "huge"]),
        (["traim.max_steps=5"], ["traim", "did you mean train?"]),
        (["corpus.val_fraction=0.6", "corpus.holdout_fraction=0.6"], ["0.6", "nothing is left to train on"]),
        (["corpus.sources=['missing.txt']"], ["missing.txt"]),
        (["corpus.sources=['*.nothing']"], ["*.nothing"]),
        (["corpus.sources=[]"], ["at least 1 item"]),
        (["corpus.tokenizer=gpt-2"], ["gpt-2", "gpt2"]),
    ],
)
def test_wrong_settings_are_refused_with_key_and_cure_before_anything_is_made(
    project: Path, overrides: list[str], parts: list[str]
) -> None:
    done = gptflow(project, "run", "tiny", *(word for override in overrides for word in ("--set", override)))
    refused(done, 2, *parts)
    assert not list((project / "mlruns").glob("**/*.db"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("pipelines:\n  tiny:\n    train:\n      max_step: 5\n", ["pipelines.yaml:4:", "max_step", "max_steps"]),
        ("pipelines:\n  tiny:\n    train:\n      max_steps: 0\n", ["pipelines.yaml:4:", "greater than or equal to 1"]),
        ("defaults:\n  train: {seed: -1}\npipelines:\n  tiny: {}\n", ["pipelines.yaml:2:", "defaults.train.seed"]),
        ("pipelines:\n  tiny: {}\n  tiny: {}\n", ["pipelines.yaml:3:", "tiny stands twice", "line 2"]),
        ("pipeline:\n  tiny: {}\n", ["pipelines.yaml:1:", "pipeline: there is no such key"]),
        ("pipelines:\n  tiny: [1]\n", ["pipelines.yaml:2:", "must be a mapping"]),
        ("pipelines: {}\n", ["pipelines: must map"]),
        ("pipelines:\n  a: &a {}\n  tiny: *a\n", ["pipelines.yaml:3:", "aliases are not supported"]),
        ("pipelines: [\n", ["pipelines.yaml:2:", "not YAML"]),
        ("- 1\n", ["must be a mapping"]),
        ("pipelines:\n  other: {}\n", ["no pipeline 'tiny'", "other"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(project: Path, text: str, parts: list[str]) -> None:
    (project / "pipelines.yaml").write_text(text)
    refused(gptflow(project, "run", "tiny"), 2, *parts)


def test_a_directory_without_pipelines_says_what_to_do(tmp_path: Path) -> None:
    refused(gptflow(tmp_path, "run"), 2, "pipelines.yaml does not exist", "--file")


def test_a_state_root_that_cannot_be_made_is_named(project: Path) -> None:
    (project / "a-file").write_text("")
    refused(
        gptflow(project, "run", "tiny", GPTFLOW_HOME=str(project / "a-file" / "home")), 1, "a-file/home", "GPTFLOW_HOME"
    )


def test_an_unknown_uri_or_model_is_refused_with_what_there_is(project: Path) -> None:
    refused(
        gptflow(project, "show", "models:/nobody@champion"), 2, "models:/nobody@champion does not exist", "none yet"
    )
    refused(gptflow(project, "generate", "gpt-tiny"), 2, "is not a model URI", "models:/NAME@champion")
    refused(gptflow(project, "models", "nobody"), 2, "no registered model 'nobody'")


def test_an_unreachable_prefect_is_named_with_the_cure(project: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
    refused(gptflow(project, "run", "tiny", PREFECT_API_URL=url), 1, url, "unset PREFECT_API_URL")


def test_help_lists_every_key_with_its_documentation(project: Path) -> None:
    done = gptflow(project, "run", "--help")
    assert done.returncode == 0
    for key in ("corpus.sources", "model.emb_dim", "train.learning_rate", "sample.prompts"):
        assert key in done.stdout
    assert "Updates of the weights" in done.stdout


def test_help_and_settings_are_answered_without_the_heavy_imports() -> None:
    program = (
        "import sys; import flows.cli, flows.pipelines, flows.state, gptcore.config, gptcore.text.sources;"
        "heavy = {'torch', 'prefect', 'mlflow', 'pandas', 'matplotlib', 'pyarrow', 'tiktoken'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_shipped_pipeline_is_valid(project: Path) -> None:
    shipped = Path(__file__).parents[2] / "pipelines.yaml"
    from flows.pipelines import PipelinesFile

    file = PipelinesFile(shipped)
    assert {"quickstart", "verdict", "shakespeare", "shakespeare-bytes"} <= set(file.names())
    for name in file.names():
        file.pipeline(name)


@pytest.mark.slow
def test_run_generate_models_show_and_prepare_from_the_command_line(project: Path) -> None:
    done = gptflow(project, "run", "tiny")
    assert done.returncode == 0, done.stderr
    assert "promoted" in done.stdout and "models:/gpt-tiny/1" in done.stdout and "holdout bits per byte" in done.stdout
    for step in ("ingest", "compare", "tokenize", "train", "evaluate", "sample", "plot", "register", "gate"):
        assert f"\n{step}" in f"\n{done.stdout}"
    for noise in ("Warning", "WARNING", "INFO", "Traceback"):
        assert noise not in done.stdout + done.stderr
    again = gptflow(project, "run", "tiny")
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
    prepared = gptflow(project, "prepare", "tiny", "by-hand")
    assert prepared.returncode == 0, prepared.stderr
    trained = subprocess.run(
        [sys.executable, "-m", "gptcore.train", "by-hand"], cwd=project, capture_output=True, text=True, timeout=120
    )
    assert trained.returncode == 0, trained.stderr
    import hashlib

    weights = (project / "by-hand" / "final" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == shown["weights_sha256"]
