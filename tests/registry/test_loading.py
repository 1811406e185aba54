"""A registered version is read only if its files are the ones that were registered."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

import flows
from flows.cards.verdict import Verdict
from flows.cli import cli
from flows.cli.doctor_checks import check_champion
from flows.endpoint.followed_version import FollowedVersion
from flows.registry import ancestry, champion, versions
from flows.registry.loading import load
from flows.registry.versions import BUNDLE_SHA256, RegistryError
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import CARD
from gptcore.errors import CheckpointError, DeviceMissing, GPTCoreError
from tests.fake_gpu import CUDA, FakeGpu
from tests.fixtures import TinyRegistry, make_old
from tests.registry.made_versions import bring_versions
from tests.registry.test_gate import champion_version, judged, register, scores, snapshot, trained

__all__ = ["judged", "register", "scores", "snapshot", "trained"]
NAME, URI = "gpt-tiny", "models:/gpt-tiny@champion"


def alter_heads(bundle: Path, is_sealed: bool = False) -> None:
    """Give the model 8 heads, which its weights fit as well, with a manifest that fits if `is_sealed`."""
    config = bundle / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_heads": 8}))
    if is_sealed:
        manifest.seal(bundle, {"kind": "bundle"})


@pytest.fixture
def altered(tiny_registry: TinyRegistry) -> StateRoot:
    """Two versions. Someone has changed the config.json of the first one, the champion."""
    root = tiny_registry.root
    for _ in range(2):
        tiny_registry.register()
    champion.promote(root, NAME, "1", "better", "ann")
    alter_heads(versions.fetch_bundle(root, NAME, "1"))
    return root


READERS: dict[str, Callable[[StateRoot], Any]] = {
    "flows.load": lambda root: flows.load(URI),
    "serve-model": lambda root: FollowedVersion(root, URI),
    "promote": lambda root: champion.promote(root, NAME, "1", "x", "ann"),
    "rollback": lambda root: champion.rollback(root, NAME, "x", "ann"),
    "warm start": lambda root: ancestry.resolve_start(
        root, cast(Any, SimpleNamespace(train=SimpleNamespace(start_from=URI)))
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("is_sealed", [False, True])
def test_an_altered_config_is_refused_by_everything_that_loads_the_version(
    altered: StateRoot, reader: str, is_sealed: bool
) -> None:
    if reader == "rollback":
        champion.promote(altered, NAME, "2", "x", "ann")
    if reader == "promote":
        MlflowClient(altered.tracking_uri).set_registered_model_alias(NAME, "champion", "2")
    if is_sealed:
        alter_heads(versions.fetch_bundle(altered, NAME, "1"), is_sealed=True)
    what = "manifest.json" if is_sealed else "config.json"
    with pytest.raises(GPTCoreError, match=f"{what} has .*: it was altered"):
        READERS[reader](altered)


@pytest.mark.parametrize("command", [("generate", URI, "--prompt", "A"), ("export", URI, "exported")])
def test_the_commands_that_use_a_version_refuse_an_altered_one(
    altered: StateRoot, command: tuple[str, ...], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    done = CliRunner().invoke(cli, command)
    assert isinstance(done.exception, GPTCoreError) and not done.output
    assert "config.json" in str(done.exception) and "it was altered" in str(done.exception)


def test_a_version_is_loaded_on_the_gpu_that_is_there_unless_another_device_is_named(
    root: StateRoot, gpu: FakeGpu
) -> None:
    bring_versions(root, NAME, 1)
    assert flows.load(URI).device == CUDA and flows.load(URI, "cpu").device.type == "cpu"
    assert FollowedVersion(root, URI).current.loaded.device == CUDA
    with pytest.raises(DeviceMissing, match=r"device cuda:1: this machine has only cpu, cuda:0\."):
        flows.load(URI, "cuda:1")


def test_generate_uses_the_gpu_that_is_there_and_the_cpu_for_rounded_weights(
    root: StateRoot, project: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    bring_versions(root, NAME, 1)

    def generate(*options: str) -> tuple[str, bool, bool]:
        gpu.products.clear()
        done = CliRunner().invoke(cli, ("generate", URI, "--prompt", "A", "--seed", "1", *options))
        return done.output, gpu.products["cuda"] > 0, gpu.products["cpu"] > 0

    text, *used = generate()
    assert used == [True, False] and generate("--device", "cpu") == (text, False, True)
    assert generate("--quantize", "int8")[1] is False, "auto is the CPU for rounded weights"
    assert "--quantize int8 is for CPUs, but --device is cuda: leave one of them out" in generate(
        *("--quantize", "int8", "--device", "cuda")
    )[0].replace("\n", " ")


def test_doctor_names_an_altered_champion_and_one_whose_files_an_earlier_release_did_not_list(
    altered: StateRoot,
) -> None:
    found = check_champion(altered, NAME)
    assert not found.ok and "config.json" in found.message and "it was altered" in found.message
    champion.promote(altered, NAME, "2", "x", "ann")
    assert "all its files are as registered" in check_champion(altered, NAME).message
    make_old(altered, NAME, "2")
    found = check_champion(altered, NAME)
    assert found.ok and "an earlier release registered it: only its weights were compared" in found.message


def test_the_gate_promotes_nothing_if_the_config_of_the_champion_was_altered(
    root: StateRoot, register: Callable[..., str], judged: Callable[..., Verdict]
) -> None:
    judged(register("good"))
    bundle = root.path / "models" / "1" / "artifacts" / versions.BUNDLE
    alter_heads(bundle)
    with pytest.raises(RegistryError, match=r"cannot be loaded, and nothing is promoted.*config\.json"):
        judged(register("nearly"))
    assert champion_version(root) == "1"


def test_an_altered_lineage_is_not_shown_and_an_edited_card_is(tiny_registry: TinyRegistry) -> None:
    root, version = tiny_registry.root, tiny_registry.register()
    found = versions.resolve(root, f"models:/{NAME}/{version}")
    bundle = versions.fetch_bundle(root, NAME, version)
    (bundle / CARD).write_text("license: MIT")
    load(root, found)
    assert versions.describe(root, found)["pipeline"] == "tiny"
    lineage = bundle / "lineage.json"
    lineage.write_text(lineage.read_text().replace('"tiny"', '"other"'))
    for read in (versions.describe, ancestry.read_ancestry):
        with pytest.raises(RegistryError, match=r"models:/gpt-tiny/1 is damaged: .*lineage\.json.* it was altered"):
            read(root, found)


def test_a_version_of_an_earlier_release_is_compared_by_its_weights(tiny_registry: TinyRegistry) -> None:
    root, version = tiny_registry.root, tiny_registry.register()
    make_old(root, NAME, version)
    found = versions.resolve(root, f"models:/{NAME}/{version}")
    assert load(root, found).cfg["n_heads"] == 2
    assert versions.describe(root, found)["bundle_sha256"] is None
    weights = versions.fetch_bundle(root, NAME, version) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RegistryError, match="it was altered"):
        load(root, found)


def test_a_registered_bundle_has_its_hash_as_a_tag_and_mlflow_refuses_an_altered_one(root: StateRoot) -> None:
    bring_versions(root, NAME, 1)
    found = versions.resolve(root, URI)
    bundle = versions.fetch_bundle(root, NAME, "1")
    assert found.tags[BUNDLE_SHA256] == manifest.read_sha256(bundle)
    assert CARD not in manifest.list_files(bundle) and (bundle / CARD).exists()
    load(root, found)
    mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    alter_heads(bundle)
    with pytest.raises(CheckpointError, match=r"config\.json .* it was altered"):
        mlflow.pyfunc.load_model(f"models:/{NAME}/1")
