"""The command line as a user sees it: real processes, wrong input, exit codes, and nothing left behind."""

import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from flows.cli import run
from flows.cli.tables import print_lineage
from flows.retrain.flow import Outcome
from flows.state.root import StateRoot
from tests.registry.made_versions import bring_versions
from tests.servers import free_ports, gptflow, refused


def test_a_directory_without_pipelines_is_refused_with_the_fix(tmp_path: Path) -> None:
    refused(gptflow(tmp_path, "run"), 2, "pipelines.yaml does not exist", "--file")


def test_a_state_root_that_cannot_be_made_is_named(project: Path) -> None:
    (project / "a-file").write_text("")
    refused(
        gptflow(project, "run", "tiny", GPTFLOW_HOME=str(project / "a-file" / "home")), 1, "a-file/home", "GPTFLOW_HOME"
    )


def test_an_unknown_uri_or_model_is_refused_with_the_existing_ones(project: Path) -> None:
    refused(
        gptflow(project, "show", "models:/nobody@champion"), 2, "models:/nobody@champion does not exist", "none yet"
    )
    refused(gptflow(project, "generate", "runs:/abc/model"), 2, "is a training in MLflow", "NAME/VERSION")
    refused(gptflow(project, "models", "nobody"), 2, "no registered model 'nobody'")


def test_a_gpu_that_is_not_there_is_refused_with_what_is(root: StateRoot, project: Path) -> None:
    bring_versions(root, "gpt-tiny", 1)
    what = "device cuda: this machine has only cpu. Choose one of them, or auto."
    for command in (
        ("generate", "models:/gpt-tiny/1", "--device", "cuda"),
        ("serve-model", "gpt-tiny/1", "--device", "cuda", "--port", str(free_ports(1)[0])),
        ("run", "tiny", "--set", "train.device=cuda"),
    ):
        done = gptflow(project, *command)
        refused(done, 1, what)
        assert not done.stdout
    unknown = gptflow(project, "generate", "models:/gpt-tiny/1", "--device", "gpu")
    refused(unknown, 2, "'gpu'", "auto, cpu, cuda, cuda:N or mps")


def test_an_unreachable_prefect_server_is_named_with_the_fix(project: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
    refused(gptflow(project, "run", "tiny", PREFECT_API_URL=url), 1, url, "unset PREFECT_API_URL")


def test_hosts_to_answer_to_are_named_one_by_one(project: Path) -> None:
    for command in (("up",), ("serve-model", "gpt-tiny@champion")):
        refused(gptflow(project, *command, "--allowed-hosts", "*"), 2, "--allowed-hosts", "NAME or NAME:PORT")


def test_help_lists_every_key_with_its_documentation(project: Path) -> None:
    done = gptflow(project, "run", "--help")
    assert done.returncode == 0
    for key in ("corpus.sources", "model.emb_dim", "train.learning_rate", "sample.prompts"):
        assert key in done.stdout
    assert "updates of the weights" in done.stdout


def test_help_and_settings_work_without_heavy_imports() -> None:
    program = (
        "import sys; import flows.cli, flows.config.pipelines, flows.state.root;"
        "import gptcore.config, gptcore.corpus.sources;"
        "heavy = {'torch', 'prefect', 'mlflow', 'pandas', 'matplotlib', 'pyarrow', 'tiktoken'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.slow
def test_a_retraining_on_one_machine_imports_no_package_for_several_machines() -> None:
    program = (
        "import sys; import flows.cli, flows.retrain.flow;"
        "extras = {'dask', 'distributed', 'ray', 'psycopg2', 'boto3', 's3fs', 'torch.distributed.run'};"
        "assert not extras & set(sys.modules), extras & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_every_shipped_pipeline_is_valid(project: Path) -> None:
    shipped = Path(__file__).parents[2] / "pipelines.yaml"
    from flows.config.pipelines import PipelinesFile

    file = PipelinesFile(shipped)
    assert {"quickstart", "verdict", "shakespeare", "shakespeare-bytes"} <= set(file.names())
    for name in file.names():
        file.pipeline(name)


@pytest.mark.parametrize(
    ("verdict", "uri", "next_"),
    [
        ("promoted", "models:/gpt-notes/2", "models:/gpt-notes@champion"),
        ("rejected", "models:/gpt-notes/1", "models:/gpt-notes/1"),  # there may be no champion
        ("paused", "models:/gpt-notes@champion", "gptflow run notes"),
    ],
)
def test_the_commands_after_a_run_name_a_version_that_exists(verdict: str, uri: str, next_: str) -> None:
    commands = run._list_next_commands(Outcome("notes", verdict, "a reason", uri))
    assert next_ in commands[0]


def test_a_lineage_is_shown_in_sections_with_whole_hashes_and_nothing_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "ad8d3af7" * 8
    train = {"seed": 123, "grad_clip": 0.75}
    tags = {"uri": "models:/gpt-tiny/1", "verdict": "promoted", "seed": 123, "weights_sha256": weights}
    lineage = {**tags, "bundle_sha256": None, "created_ms": 0, "config": {"train": train}, "moves": []}
    lineage["run_config"] = {"train": train}
    print_lineage(lineage)
    short = capsys.readouterr().out
    assert short.index("outcome") < short.index("promoted") < short.index(weights) < short.index("training")
    assert short.count("123") == 1 and "0.75" not in short and "--full shows 1 more keys" in short
    print_lineage(lineage, full=True)
    assert capsys.readouterr().out.count("0.75") == 1
    terminal = Terminal(width=40, file=(out := io.StringIO()))
    monkeypatch.setattr("flows.state.console._terminal", lambda: terminal)
    print_lineage(lineage)
    lines = (line.strip("│\n").split("│") for line in out.getvalue().splitlines())
    assert weights in "".join(cells[1].strip() for cells in lines if len(cells) == 2)
