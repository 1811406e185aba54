"""The tags of a version: the texts that every release has stored, and values that are missing or damaged."""

import math
import subprocess
import sys

import pytest

from flows.cards.verdict import Verdict
from flows.registry.tags import GATE_TAGS, VersionTags
from gptcore.evaluation.compare import Comparison

OLD = Comparison(math.nan, 1.5, blocks=0, bytes=0, drawn_by="block", confidence=0.95, low=None, high=None)
VERDICT = Verdict(
    promoted=False,
    kind="tie within noise",
    reason="too close",
    bits_per_byte=2.12345678,
    champion_bits_per_byte=2.5,
    champion_version="3",
    low=-0.1,
    high=0.25,
    blocks=40,
    bytes=9000,
    available_bytes=45_000,
    old=OLD,
)
STORED = {
    "reason": "too close",
    "gate_kind": "tie within noise",
    "gate_champion_version": "3",
    "gate_bits_per_byte": "2.123457",
    "gate_champion_bits_per_byte": "2.500000",
    "gate_low": "-0.100000",
    "gate_high": "0.250000",
    "gate_blocks": "40",
    "gate_bytes": "9000",
    "gate_available_bytes": "45000",
    "gate_excluded_bytes": "0",
    "gate_unknown": "",
    "gate_old": '{"challenger": NaN, "champion": 1.5, "blocks": 0, "bytes": 0, "drawn_by": "block", '
    '"confidence": 0.95, "low": null, "high": null, "available_bytes": null}',
    "gate_new": "",
}
EARLIER = {
    **{name: text for name, text in STORED.items() if name != "gate_available_bytes"},
    "gate_old": STORED["gate_old"].replace(', "available_bytes": null', ""),
}
"""The same verdict, stored by a release that scored all text."""


def test_a_verdict_is_stored_as_text_and_read_again() -> None:
    assert VersionTags.from_verdict(VERDICT).to_tags() == STORED
    read = VersionTags.from_tags({**STORED, "verdict": "rejected"}).to_verdict()
    assert read.bits_per_byte == 2.123457 and math.isnan(read.old.challenger if read.old else 0.0)
    for name in ("promoted", "kind", "reason", "champion_version", "low", "high", "blocks", "bytes", "unknown", "new"):
        assert getattr(read, name) == getattr(VERDICT, name), name
    assert read.available_bytes == 45_000
    assert VersionTags.from_tags(STORED).to_verdict().promoted, "without the tag `verdict` the version was promoted"
    earlier = VersionTags.from_tags(EARLIER).to_verdict()
    assert earlier.available_bytes is None and earlier.old is not None and earlier.old.available_bytes is None


def test_a_new_verdict_leaves_no_number_of_an_earlier_one() -> None:
    first = Verdict(promoted=False, kind="not finite", reason="nan", bits_per_byte=math.nan)
    written = VersionTags.from_verdict(first).to_tags()
    assert written.keys() == {"reason", *GATE_TAGS}
    assert (written["gate_bits_per_byte"], written["gate_low"], written["gate_champion_version"]) == ("nan", "", "")


def test_a_lineage_gives_only_the_entries_to_search_for() -> None:
    lineage = {
        "pipeline": "tiny",
        "parameters": 1234,
        "holdout_bits_per_byte": 2.123456789,
        "code_dirty": False,
        "split": {"holdout_fraction": 0.1},
        "seed": 7,
        "parent_version": None,
        "ancestors": [],
    }
    tags = VersionTags.from_lineage(lineage)
    assert tags.to_tags() == {
        "pipeline": "tiny",
        "parameters": "1234",
        "holdout_bits_per_byte": "2.123456789",
        "split": '{"holdout_fraction": 0.1}',
        "seed": "7",
        "code_dirty": "False",
    }
    assert VersionTags.from_tags(tags.to_tags()) == tags


@pytest.mark.parametrize("damaged", [{"gate_low": "about 1"}, {"gate_low": ""}, {"gate_old": "{"}, {"split": "[]"}, {}])
def test_missing_empty_and_damaged_tags_count_as_missing(damaged: dict[str, str]) -> None:
    tags = VersionTags.from_tags({"weights_sha256": "ab", "of a later release": "x", **damaged})
    assert (tags.weights_sha256, tags.gate_low, tags.gate_old, tags.split, tags.attempt) == ("ab", *[None] * 4)
    assert tags.to_tags() == {"weights_sha256": "ab"}
    assert tags.to_verdict().kind == "unknown"


def test_reading_tags_imports_neither_mlflow_nor_torch() -> None:
    program = "import sys, flows.registry.tags; assert not {'mlflow', 'torch', 'prefect'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
