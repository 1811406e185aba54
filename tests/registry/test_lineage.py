"""Lineage: a version's record of its text, settings, code and machine, and that the record is true."""

import json
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version as installed
from pathlib import Path

import pytest
from mlflow import MlflowClient

import gptcore
from flows.config.pipelines import SECTIONS, Pipeline
from flows.registry import versions
from flows.registry.lineage import code, hardware, packages, source_sha256
from flows.retrain.flow import retrain
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import load

CONTRACT = (
    "model version aliases weights_sha256 holdout_bits_per_byte corpus_sha256 tokenizer config seed code_commit "
    "packages mlflow_run_id prefect_flow_run_id parent_version"
).split()


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """A small package with a subpackage."""
    (tmp_path / "package" / "wing").mkdir(parents=True)
    (tmp_path / "package" / "one.py").write_text("a = 1\n")
    (tmp_path / "package" / "wing" / "two.py").write_text("b = 2\n")
    yield tmp_path / "package"


def test_the_source_hash_changes_with_every_name_and_byte_of_code_and_with_nothing_else(package: Path) -> None:
    before = source_sha256(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "one.pyc").write_bytes(b"compiled")
    (package / "notes.txt").write_text("no code")
    assert source_sha256(package) == before
    hashes = {before}
    (package / "wing" / "two.py").write_text("b = 3\n")
    hashes.add(source_sha256(package))
    (package / "wing" / "two.py").rename(package / "two.py")
    hashes.add(source_sha256(package))
    (package / "two.py").unlink()
    hashes.add(source_sha256(package))
    assert len(hashes) == 4


def test_code_names_the_commit_of_this_checkout_and_separately_whether_it_was_edited() -> None:
    here = Path(str(gptcore.__file__)).parent
    head = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    found = code()
    if head.returncode:
        assert found["code_commit"].startswith("gptflow ") and found["code_dirty"] is None
    else:
        assert found["code_commit"] == head.stdout.strip() and isinstance(found["code_dirty"], bool)
    assert found["gptcore_sha256"] == source_sha256(here)


def test_packages_and_hardware_are_those_of_this_process() -> None:
    assert packages(["torch", "no-such-distribution"]) == {"torch": installed("torch"), "no-such-distribution": None}
    found = hardware("cpu", 3)
    assert found["threads"] == 3 and found["device"] == "cpu" and found["device_name"] is None
    assert found["machine"] and found["processor"]


@pytest.mark.usefixtures("prefect_server")
def test_a_version_records_everything_it_was_made_from_in_its_lineage_its_tags_and_its_mlflow_run(
    tiny: Pipeline, root: StateRoot
) -> None:
    retrain(tiny.name, tiny.model_name, **{name: getattr(tiny, name) for name in SECTIONS})
    found = versions.resolve(root, "models:/gpt-tiny@champion")
    described = versions.describe(root, found)
    assert set(CONTRACT) <= described.keys()
    snapshot = root.path / described["corpus"]["path"]
    assert manifest.verify(snapshot)["sha256"] == described["corpus_sha256"]
    assert sha256((snapshot / "documents.jsonl").read_bytes()).hexdigest() == described["documents_sha256"]
    assert described["split"] == {
        "split": "hash",
        "block_bytes": 256,
        "val_fraction": 0.15,
        "holdout_fraction": 0.15,
    }
    assert described["config"]["train"]["max_steps"] == 60 and described["run_config"]["train"]["threads"] == 1
    assert described["hardware"]["threads"] == 1 and described["ancestors"] == []
    bundle = versions.fetch_bundle(root, "gpt-tiny", "1")
    assert manifest.sha256_of_file(bundle / "model.safetensors") == described["weights_sha256"]
    loaded = load(bundle)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == described["parameters"]
    assert loaded.tokenizer.sha256 == described["tokenizer_sha256"]
    for key in ("weights_sha256", "documents_sha256", "gptcore_sha256", "code_commit", "tokenizer", "python"):
        assert found.tags[key] == described[key]
    for key in ("split", "packages", "hardware"):
        assert json.loads(found.tags[key]) == described[key]
    client = MlflowClient(root.tracking_uri)
    stored = json.loads(Path(client.download_artifacts(found.run_id or "", "lineage.json")).read_text())
    assert stored == json.loads((bundle / "lineage.json").read_text())
    assert stored["mlflow_run_id"] == found.run_id
