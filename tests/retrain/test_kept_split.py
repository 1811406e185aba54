"""A pipeline whose file leaves the split empty: it is chosen once, and kept on all later nights."""

from pathlib import Path

import pytest

from flows.config.pipelines import Pipeline
from flows.registry import versions
from flows.registry.lineage import settings_key
from flows.registry.tags import VersionTags
from flows.state.root import StateRoot
from gptcore.corpus.split import CHOICES
from tests.retrain.test_policy import TRAINED, asking, run
from tests.tiny import prose

pytestmark = pytest.mark.usefixtures("prefect_server", "root")
KEYS = ("block_bytes", "val_fraction", "holdout_fraction")
EMPTY = dict.fromkeys(KEYS)


def split_of(root: StateRoot, version: int) -> tuple[float, ...]:
    lineage = versions.read_lineage(root, versions.resolve(root, f"models:/gpt-tiny/{version}"))
    recorded = tuple(lineage["split"][key] for key in KEYS)
    assert recorded == tuple(lineage["config"]["corpus"][key] for key in KEYS)
    return recorded


def test_the_split_is_chosen_on_the_first_night_and_kept_while_the_text_grows(
    tiny: Pipeline, project: Path, root: StateRoot, caplog: pytest.LogCaptureFixture
) -> None:
    short = asking(tiny, corpus=EMPTY, train={"max_steps": 5})
    (project / "text" / "one.txt").write_text(prose(1, 3000))
    run(short)
    first = split_of(root, 1)
    assert first in CHOICES[1:] and run(short)[0] == "skipped"
    chosen = asking(short, corpus=dict(zip(KEYS, first)))
    tags = VersionTags.from_tags(versions.resolve(root, "models:/gpt-tiny/1").tags)
    assert tags.settings_key == settings_key(chosen) and run(chosen)[0] == "skipped"

    (project / "text" / "two.txt").write_text(prose(2, 15_000))
    name, outcome = run(short)
    assert name in TRAINED and outcome.uri == "models:/gpt-tiny/2" and split_of(root, 2) == first
    assert "the settings are not those" not in caplog.text

    kept = versions.find_split_snapshot(root, short)
    assert kept is not None
    listed = (kept / "documents.jsonl").read_bytes()
    (kept / "documents.jsonl").write_bytes(b"\0" + listed[1:])
    assert versions.find_split_snapshot(root, short) is None, "a damaged list does not stop the next night"
    (kept / "documents.jsonl").write_bytes(listed)

    run(asking(short, corpus={"block_bytes": 512}))
    assert split_of(root, 3) == (512, *first[1:])
    assert f"corpus.block_bytes {first[0]} -> 512" in caplog.text and "moves text between train, val" in caplog.text


def test_a_pipeline_of_an_earlier_release_keeps_its_split_and_does_not_retrain(
    tiny: Pipeline, root: StateRoot, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = asking(tiny, corpus={"block_bytes": 1024, "val_fraction": 0.15, "holdout_fraction": 0.2})
    paused = asking(earlier, train={"session_seconds": 0.001})
    assert run(paused)[0] == "paused"
    assert "ingest: holdout has" in caplog.text and "the gate needs 20 that are clean for both" in caplog.text
    assert run(asking(earlier, corpus=EMPTY))[1].uri == "models:/gpt-tiny/1"
    assert "unfinished training" in caplog.text, "it is found although no version has recorded a split"
    for upgraded in (earlier, asking(earlier, corpus=EMPTY)):
        name, outcome = run(upgraded)
        assert name == "skipped" and outcome.reason.startswith("nothing changed since version 1")
    assert split_of(root, 1) == (1024, 0.15, 0.2)
