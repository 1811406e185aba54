"""The flow `watch`: it looks from outside whether texts have changed and whether a pipeline is overdue, and says so.

It runs every `watch_seconds` where some pipeline has the trigger corpus_changed or wants to hear that it is stale.
Those stand in `watch/.watched.json` in the state root, written by whoever registers the flow: as a parameter,
hundreds of them would be stored again with each run. What was seen last stands in `watch/<pipeline>.json`. It is
written after the event or the message was sent: killed in between, the next look says it once more rather than never.
Retraining twice costs seconds, since the second run finds nothing new.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger
from prefect.states import Completed

from flows import lock
from flows.pipelines import Pipeline
from flows.service import events, notify, successes
from flows.state import StateRoot, state_root
from gptcore.errors import GPTCoreError
from gptcore.text.glance import fingerprint

_REGISTERED = {"name", "model_name", "corpus", "schedule", "triggers", "notify"}


@dataclass(frozen=True)
class Memory:
    """What the last looks at a pipeline have seen and said."""

    sources: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each source."""
    overdue_since: str | None = None
    """The last success at the time when people were told that there has been none since."""


@flow(name="watch", flow_run_name="watch", persist_result=False)
def watch(pipelines: list[Pipeline] | None = None) -> State[None]:
    """Looks whether sources have changed, without reading them, and whether pipelines had no success for too long.

    The first look at a source counts as a change: nobody knows what happened before it. A pipeline that was never
    trained gets its first model so, and one that is up to date spends some seconds to find that out. A source that does
    not answer is no change. While a run of the pipeline is under way it is not looked at: a change is seen afterwards.

    Args:
        pipelines: Which pipelines to look at, with their sources, schedules and who is to be told. Default: those of
            the pipelines.yaml that was registered last.
    """
    root = state_root().create()
    if pipelines is None:
        pipelines = registered(root)
    said: list[str] = []
    with suppress(lock.Held), lock.hold(root.path / "watch" / "lock"):  # a look that takes long is still under way
        for pipeline in pipelines:
            for look in (look_at_sources, look_at_successes):
                try:
                    said += look(root, pipeline)
                except GPTCoreError as error:
                    get_run_logger().error("%s: %s", pipeline.name, error)
    return Completed(name="Changed" if said else "Unchanged", message="; ".join(said) or "nothing to say")


def register(root: StateRoot, pipelines: Iterable[Pipeline]) -> bool:
    """Writes down which of the pipelines want to be looked at, and says whether there is one."""
    wanted = [pipeline.model_dump(mode="json", include=_REGISTERED) for pipeline in pipelines if is_watched(pipeline)]
    _write(root.path / "watch" / ".watched.json", wanted)
    return bool(wanted)


def registered(root: StateRoot) -> list[Pipeline]:
    """The pipelines that were written down; none where nobody has registered any."""
    with suppress(FileNotFoundError):
        return [Pipeline.model_validate(one) for one in json.loads((root.path / "watch" / ".watched.json").read_text())]
    return []


def is_watched(pipeline: Pipeline) -> bool:
    """Whether the pipeline asks to be looked at."""
    return _awaits_changes(pipeline) or (pipeline.schedule is not None and _wants_to_hear(pipeline))


def look_at_sources(root: StateRoot, pipeline: Pipeline) -> list[str]:
    """Emits the event if a source looks different from last time. Returns what was said. Raises EventNotSent."""
    if not _awaits_changes(pipeline) or lock.holder(root.lock(pipeline.name), root.database) is not None:
        return []
    before = recall(root, pipeline.name)
    now = {source: before.sources[source] for source in pipeline.corpus.sources if source in before.sources}
    for source in pipeline.corpus.sources:
        try:
            now[source] = fingerprint(source, root.path)
        except GPTCoreError as error:
            get_run_logger().warning("%s: %s", pipeline.name, error)
    changed = sorted(
        source for source in now.keys() | before.sources.keys() if now.get(source) != before.sources.get(source)
    )
    if not changed:
        return []
    events.corpus_changed(pipeline.name, changed)
    _remember(root, pipeline.name, replace(before, sources=now))
    return [f"the corpus of {pipeline.name} changed: {', '.join(changed)}"]


def look_at_successes(root: StateRoot, pipeline: Pipeline) -> list[str]:
    """Tells people that the pipeline is overdue, once until its next success. Returns what was said."""
    last = successes.last(root, pipeline.name)
    waited = successes.overdue(pipeline, root, datetime.now(UTC))
    before = recall(root, pipeline.name)
    if last is None or waited is None or not _wants_to_hear(pipeline) or before.overdue_since == last.at.isoformat():
        return []
    text = f"No success for {successes.in_words(waited)}, since {last.at.isoformat(' ', 'minutes')}."
    message = notify.Message(pipeline.name, "stale", f"{pipeline.name}: no success for too long", text)
    if not notify.send(pipeline.notify, message, get_run_logger()):
        return []
    _remember(root, pipeline.name, replace(before, overdue_since=last.at.isoformat()))
    return [f"{pipeline.name} is overdue"]


def recall(root: StateRoot, pipeline: str) -> Memory:
    """What was seen and said last; nothing where there is no record, or a power cut left half of one."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Memory(**json.loads(_path(root, pipeline).read_text()))
    return Memory()


def _remember(root: StateRoot, pipeline: str, memory: Memory) -> None:
    _write(_path(root, pipeline), asdict(memory))


def _write(path: Path, body: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(body, indent=1) + "\n")
    temporary.replace(path)


def _path(root: StateRoot, pipeline: str) -> Path:
    return root.path / "watch" / f"{pipeline}.json"


def _awaits_changes(pipeline: Pipeline) -> bool:
    return any(trigger.on == "corpus_changed" for trigger in pipeline.triggers)


def _wants_to_hear(pipeline: Pipeline) -> bool:
    return any("stale" in target.on for target in pipeline.notify)
