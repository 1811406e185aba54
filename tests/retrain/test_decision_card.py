"""The decision card of real retrainings is in the Prefect run and in the MLflow run, whatever the verdict."""

import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact

from flows.config.pipelines import SECTIONS, Pipeline
from flows.registry import versions
from flows.retrain.flow import Outcome, retrain
from flows.state.root import StateRoot
from flows.state.servers import Servers
from gptcore.bundle import load
from gptcore.config import SampleConfig
from gptcore.evaluation.run_report import read_samples
from gptcore.evaluation.samples import write_samples

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(pipeline: Pipeline, sources_overridden: bool = False, force: bool = False, **train: object) -> Outcome:
    asked = pipeline.model_copy(update={"train": pipeline.train.model_copy(update=train)})
    sections = {name: getattr(asked, name) for name in SECTIONS}
    given = {**sections, "sources_overridden": sources_overridden, "force": force}
    return retrain(asked.name, asked.model_name, **given, return_state=True).result()


def in_prefect() -> Artifact:
    """Return the newest card in Prefect."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["tiny-card"]))
    with get_client(sync_client=True) as client:
        return max(client.read_artifacts(artifact_filter=wanted), key=lambda artifact: str(artifact.created))


def in_mlflow(root: StateRoot, version: str) -> Path:
    """Return the directory with the files of the version's MLflow run."""
    run_id = versions.resolve(root, f"models:/gpt-tiny/{version}").run_id
    return Path(MlflowClient(root.tracking_uri).download_artifacts(run_id or "", "."))


def test_both_runs_have_the_card_and_it_shows_what_the_champion_would_have_written(
    tiny: Pipeline, root: StateRoot
) -> None:
    run(tiny, max_steps=20)
    first = in_prefect()
    assert str(first.data).startswith("# gpt-tiny version 1: promoted") and "## The first version" in str(first.data)
    run(tiny, max_steps=120)
    card = in_prefect()
    assert str(card.data).startswith("# gpt-tiny version 2: promoted")
    assert card.description and card.description.startswith("Version 2 is the new champion")
    files = in_mlflow(root, "2")
    beside = (files / "card.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", beside)
    assert [Path(picture).name for picture in pictures] == ["gains.png", "losses.png"]
    assert all((files / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert re.sub(r"\(data:image/png;base64,[^)]+\)", "()", str(card.data)) == re.sub(
        r"(!\[.*?\])\(.*?\)", r"\1()", beside
    )
    champion = load(versions.fetch_bundle(root, "gpt-tiny", "1"))
    text = next((root.path / "corpora").glob("*/train.txt"))
    expected = write_samples(champion.model, champion.tokenizer, tiny.sample, tiny.train.seed, text, files)
    assert read_samples(files / "champion-samples") == expected
    assert "| prompt | version 2 | version 1 |" in beside


@pytest.mark.slow
def test_the_champion_writes_with_its_own_tokenizer(tiny: Pipeline, root: StateRoot) -> None:
    run(tiny, max_steps=20)
    other = tiny.model_copy(update={"corpus": tiny.corpus.model_copy(update={"tokenizer": "bpe:300"})})
    run(other, max_steps=10)
    card = str(in_prefect().data)
    assert card.startswith("# gpt-tiny version 2: promoted") and "| tokenizer | bpe:300 | bytes |" in card
    (theirs,) = read_samples(in_mlflow(root, "2") / "champion-samples")
    assert theirs.tokens == len(theirs.text.encode()) == 20


@pytest.mark.slow
def test_ties_and_uncompared_versions_have_their_card_with_links_and_a_damaged_champion_only_loses_its_column(
    tiny: Pipeline, root: StateRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny)
    assert "](http" not in str(in_prefect().data), "no server is running"
    with monkeypatch.context() as up:
        servers = Servers("http://127.0.0.1:1", "http://127.0.0.1:2")
        up.setattr("flows.state.root.find_running_servers", lambda home: servers)
        run(tiny, force=True)
    card = str(in_prefect().data)
    assert "predicts unseen text about as well as version 1" in card
    assert "(http://127.0.0.1:2/#/models/gpt-tiny/versions/2)" in card
    assert f"/runs/{versions.resolve(root, 'models:/gpt-tiny/2').run_id})" in card
    weights = versions.fetch_bundle(root, "gpt-tiny", "1") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    sample = SampleConfig(prompts=("A night",), temperatures=(0.0,), max_new_tokens=5)
    run(tiny.model_copy(update={"sample": sample}), sources_overridden=True, max_steps=5)
    card = str(in_prefect().data)
    assert card.startswith("# gpt-tiny version 3: rejected") and "it did not compete" in card
    assert "| not compared |" in card and "The champion's samples are missing: the bundle" in card
    assert "| prompt | version 3 |\n" in card
