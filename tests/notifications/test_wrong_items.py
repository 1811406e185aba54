"""What `triggers` and `notify` refuse in pipelines.yaml, with the place in the file and the fix."""

from pathlib import Path

import pytest

from flows.config.pipelines import PipelinesFile
from gptcore.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "item", "parts"),
    [
        ("triggers", "{on: changed}", ["triggers.0.on", "'corpus_changed' or 'promoted'", "changed"]),
        ("triggers", "corpus_changed", ["corpus_changed"]),
        ("triggers", "{on: promoted}", ["promoted needs a model", "{on: promoted, model: gpt-base}"]),
        ("triggers", "{on: corpus_changed, model: gpt-base}", ["it has no model", "gpt-base"]),
        (
            "triggers",
            "{on: promoted, model: gpt-bass}",
            ["triggers.0.model", "makes the model gpt-bass; did you mean gpt-base?"],
        ),
        (
            "triggers",
            "{on: promoted, model: gpt-night}",
            ["triggers.0.model", "own model: each run would start the next"],
        ),
        ("triggers", "{on: corpus_changed, modle: x}", ["triggers.0.modle", "did you mean model?"]),
        ("triggers", "{}", ["triggers.0.on", "required"]),
        ("notify", "{webhook: 'ftp://example.org/hook'}", ["notify.0.webhook", "http(s) address"]),
        ("notify", "{webhook: 'https:///hook'}", ["notify.0.webhook", "http(s) address"]),
        ("notify", "{block: team}", ["notify.0.block", "team"]),
        ("notify", "{on: [failure]}", ["one of webhook and block (given: neither)"]),
        ("notify", "{webhook: 'https://example.org/hook', block: slack-webhook/team}", ["(given: both)"]),
        (
            "notify",
            "{block: slack-webhook/team, on: [fire]}",
            ["notify.0.on.0", "'failure', 'promotion' or 'stale'", "fire"],
        ),
        ("notify", "{block: slack-webhook/team, on: []}", ["notify.0.on", "at least 1"]),
        ("notify", "{blok: slack-webhook/team}", ["notify.0.blok", "did you mean block?"]),
    ],
)
def test_a_wrong_item_is_refused_with_its_line_and_the_fix(
    tmp_path: Path, key: str, item: str, parts: list[str]
) -> None:
    file = tmp_path / "pipelines.yaml"
    file.write_text(f"pipelines:\n  base: {{model_name: gpt-base}}\n  night:\n    {key}:\n      - {item}\n")
    with pytest.raises(ConfigError) as refused:
        PipelinesFile(file).pipeline("night")
    for part in (*parts, f"{file}:5: pipelines.night.{key}.0"):
        assert part in str(refused.value)
