"""The tags of a registered version: their names, and how MLflow's strings become values.

register.py and import_.py write the tags about a version's origin, gate.py those about its verdict, and champion.py the
tag `withdrawn`. Searches and lists read them; the version's lineage.json has everything else. Any tag may be missing,
because an earlier release did not write it. This module imports neither torch nor MLflow.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from flows.cards.verdict import Verdict
from gptcore.evaluation.compare import Comparison


def _parse_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _describe_comparison(comparison: Comparison) -> dict[str, Any]:
    return {key: value for key, value in asdict(comparison).items() if key not in ("old", "new")}


JSONObject = Annotated[dict[str, Any], BeforeValidator(_parse_json)]
StoredComparison = Annotated[Comparison, BeforeValidator(_parse_json), PlainSerializer(_describe_comparison)]


class VersionTags(BaseModel):
    """The values of a version's tags. Each field has the name of its tag, and is None if the tag is missing."""

    model_config = ConfigDict(frozen=True)

    pipeline: str | None = None
    run_key: str | None = None
    attempt: int | None = None
    settings_key: str | None = None
    import_key: str | None = None
    """The key by which another import of the same model finds the version."""
    imported_from: str | None = None
    started_from: str | None = None
    """URI of the version whose weights its training started from."""
    parent_version: str | None = None
    """The champion when the version was registered."""
    prefect_flow_run_id: str | None = None
    weights_sha256: str | None = None
    bundle_sha256: str | None = None
    """sha256 of the bundle's manifest. Earlier releases registered bundles without a manifest."""
    parameters: int | None = None
    holdout_bits_per_byte: float | None = None
    corpus_sha256: str | None = None
    documents_sha256: str | None = None
    tokens_sha256: str | None = None
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    split: JSONObject | None = None
    seed: int | None = None
    code_commit: str | None = None
    code_dirty: bool | None = None
    gptcore_sha256: str | None = None
    python: str | None = None
    packages: JSONObject | None = None
    hardware: JSONObject | None = None
    verdict: str | None = None
    """promoted, rejected or imported. It is written after all other tags of a verdict."""
    reason: str | None = None
    withdrawn: str | None = None
    """The person who rolled the version back, and why."""
    gate_kind: str | None = None
    gate_champion_version: str | None = None
    gate_bits_per_byte: float | None = None
    gate_champion_bits_per_byte: float | None = None
    gate_low: float | None = None
    gate_high: float | None = None
    gate_blocks: int | None = None
    gate_bytes: int | None = None
    gate_available_bytes: int | None = None
    gate_excluded_bytes: int | None = None
    gate_unknown: str | None = None
    gate_old: StoredComparison | None = None
    gate_new: StoredComparison | None = None

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self:
        """Read the tags of a version. An empty tag, or one that somebody has damaged, counts as missing."""
        given = {name: tags[name] for name in cls.model_fields if tags.get(name)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            damaged = {detail["loc"][0] for detail in error.errors()}
            return cls.model_validate({name: text for name, text in given.items() if name not in damaged})

    @classmethod
    def from_lineage(cls, lineage: Mapping[str, Any]) -> Self:
        """Take the entries of a lineage that are tags too."""
        return cls(**{name: lineage[name] for name in cls.model_fields if lineage.get(name) is not None})

    @classmethod
    def from_verdict(cls, verdict: Verdict) -> Self:
        """Take the fields of a verdict except `promoted`, which is stored as the tag `verdict`."""
        return cls(reason=verdict.reason, **{name: getattr(verdict, field) for name, field in _GATE_FIELDS.items()})

    def to_tags(self) -> dict[str, str]:
        """Return the tags of the fields that were given. None becomes an empty tag, which replaces an earlier one."""
        return {name: _format(name, value) for name, value in self.model_dump(exclude_unset=True).items()}

    def to_verdict(self) -> Verdict:
        """Return the verdict that an earlier run stored.

        Without the tag `verdict` the run was killed after the promotion: the version is champion, so it was promoted.
        """
        values = {field: getattr(self, name) for name, field in _GATE_FIELDS.items()}
        given = {field: value for field, value in values.items() if value is not None}
        return Verdict(
            promoted=self.verdict in (None, "promoted"),
            reason=self.reason or "",
            **{"kind": "unknown", "bits_per_byte": math.nan, **given},
        )


GATE_TAGS = tuple(name for name in VersionTags.model_fields if name.startswith("gate_"))
_GATE_FIELDS = {name: name.removeprefix("gate_") for name in GATE_TAGS}
"""The field of a verdict that each tag keeps."""


def _format(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value)
    return f"{value:.6f}" if isinstance(value, float) and name in GATE_TAGS else str(value)
