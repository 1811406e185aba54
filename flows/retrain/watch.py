"""The flow `watch`: check whether texts have changed and whether pipelines are overdue, and report both.

It runs every `watch_seconds` if a pipeline has the trigger corpus_changed or sends messages when it is stale. The
registration of the flow writes these pipelines to `watch/.watched.json` in the state root: as a parameter of the flow,
hundreds of them would be stored again with each run. `watch/<pipeline>.json` records what was seen last. It is written
after the event or the message was sent. If the flow is killed in between, the next look sends it again. That is better
than never, and retraining twice costs only seconds, since the second run finds nothing new.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger
from prefect.states import Completed

from flows.config.pipelines import Pipeline
from flows.notifications import events, notify
from flows.notifications.verdicts import write_message
from flows.retrain import last_success
from flows.state import lock_holder, locks
from flows.state.root import StateRoot, state_root
from gptcore.corpus.fingerprint import fingerprint_source
from gptcore.errors import GPTCoreError
from gptcore.manifest import write_atomically
from gptcore.records import read_record

_REGISTERED = {"name", "model_name", "corpus", "schedule", "triggers", "notify"}


@dataclass(frozen=True)
class Memory:
    """What the last looks at a pipeline have seen and reported."""

    sources: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each source."""
    overdue_since: str | None = None
    """Time of the last success for which a message said that the pipeline is overdue."""


@flow(name="watch", flow_run_name="watch", persist_result=False, on_completion=[events.send_former_state_name])
def watch(pipelines: list[Pipeline] | None = None) -> State[None]:
    """Check whether sources have changed, without reading them, and whether pipelines had no success for too long.

    The first look at a source counts as a change, because earlier changes are unknown. So a pipeline that was never
    trained gets its first model, and an up-to-date one needs some seconds to notice that. A source that does not answer
    does not count as a change. The sources of a running pipeline are checked after its run.

    Args:
        pipelines: Pipelines to check, with their sources, schedules and notification targets. Default: those of the
            pipelines.yaml that was registered last.
    """
    root = state_root().prepare()
    if pipelines is None:
        pipelines = read_registered(root)
    reports: list[str] = []
    with suppress(lock_holder.LockHeld), locks.hold(root.path / "watch" / "lock"):  # a slow look may still be running
        for pipeline in pipelines:
            for look in (look_at_sources, look_at_successes):
                try:
                    reports += look(root, pipeline)
                except GPTCoreError as error:
                    get_run_logger().error("%s: %s", pipeline.name, error)
    return Completed(
        message=write_message("changed" if reports else "unchanged", "; ".join(reports) or "nothing to report")
    )


def register(root: StateRoot, pipelines: Iterable[Pipeline]) -> bool:
    """Write down the pipelines that the flow must check. Return whether there are any."""
    wanted = [pipeline.model_dump(mode="json", include=_REGISTERED) for pipeline in pipelines if is_watched(pipeline)]
    _write(root.path / "watch" / ".watched.json", wanted)
    return bool(wanted)


def read_registered(root: StateRoot) -> list[Pipeline]:
    """Return the pipelines that `register` wrote down. Empty if nothing was registered. Raises GPTCoreError."""
    path = root.path / "watch" / ".watched.json"
    if (pipelines := read_record(path, list[Pipeline])) is None and path.exists():
        raise GPTCoreError(
            f"{path} is damaged, or another release wrote it. Start `gptflow up` or `gptflow serve` again."
        )
    return pipelines or []


def is_watched(pipeline: Pipeline) -> bool:
    """Whether the flow must check the pipeline."""
    return _awaits_changes(pipeline) or (pipeline.schedule is not None and _reports_stale(pipeline))


def look_at_sources(root: StateRoot, pipeline: Pipeline) -> list[str]:
    """Send an event if a source differs from the last look. Return what was reported. Raises EventNotSent."""
    if not _awaits_changes(pipeline) or locks.find_holder(root.lock_path(pipeline.name), root.database) is not None:
        return []
    before = read_memory(root, pipeline.name)
    now = {source: before.sources[source] for source in pipeline.corpus.sources if source in before.sources}
    for source in pipeline.corpus.sources:
        try:
            now[source] = fingerprint_source(source, root.project, pipeline.corpus.exclude, pipeline.corpus.formats)
        except GPTCoreError as error:
            get_run_logger().warning("%s: %s", pipeline.name, error)
    changed = sorted(
        source for source in now.keys() | before.sources.keys() if now.get(source) != before.sources.get(source)
    )
    if not changed:
        return []
    events.send_corpus_changed(pipeline.name, changed)
    _write_memory(root, pipeline.name, replace(before, sources=now))
    return [f"the corpus of {pipeline.name} changed: {', '.join(changed)}"]


def look_at_successes(root: StateRoot, pipeline: Pipeline) -> list[str]:
    """Send a message if the pipeline is overdue, once until its next success. Return what was reported."""
    last = last_success.read_last(root, pipeline.name)
    waited = last_success.measure_overdue(pipeline, root, datetime.now(UTC))
    before = read_memory(root, pipeline.name)
    if last is None or waited is None or not _reports_stale(pipeline) or before.overdue_since == last.at.isoformat():
        return []
    text = f"No success for {last_success.format_duration(waited)}, since {last.at.isoformat(' ', 'minutes')}."
    message = notify.Message(pipeline.name, "stale", f"{pipeline.name}: no success for too long", text)
    if not notify.send(pipeline.notify, message, get_run_logger()):
        return []
    _write_memory(root, pipeline.name, replace(before, overdue_since=last.at.isoformat()))
    return [f"{pipeline.name} is overdue"]


def read_memory(root: StateRoot, pipeline: str) -> Memory:
    """Return what was seen and reported last. Empty if there is no record, or if a power cut damaged it."""
    return read_record(_path(root, pipeline), Memory) or Memory()


def _write_memory(root: StateRoot, pipeline: str, memory: Memory) -> None:
    _write(_path(root, pipeline), asdict(memory))


def _write(path: Path, body: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(body, indent=1) + "\n")


def _path(root: StateRoot, pipeline: str) -> Path:
    return root.path / "watch" / f"{pipeline}.json"


def _awaits_changes(pipeline: Pipeline) -> bool:
    return any(trigger.on == "corpus_changed" for trigger in pipeline.triggers)


def _reports_stale(pipeline: Pipeline) -> bool:
    return any("stale" in target.on for target in pipeline.notify)
