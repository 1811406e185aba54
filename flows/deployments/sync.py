"""Brings the deployments on a Prefect server up to date: adds new ones, updates changed ones and removes the rest.

A file of hundreds of pipelines is registered at every start, and most of them have not changed. So the server's
deployments are fetched in pages of plain data and compared. A deployment is sent again only if the file has changed, or
if somebody has changed the deployment on the server. Requests are sent one after the other, because a server on SQLite
refuses concurrent writers.

A schedule that a person paused or resumed on the server stays so until the file changes its own word about the pause.
So the version of a deployment tells what the file said when it was registered.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.context import SyncClientContext
from prefect.deployments.runner import RunnerDeployment

_PAGE = 200
"""The longest list that Prefect's servers return."""
PAUSED = "-paused"
"""End of the version of a deployment whose schedule the file pauses."""


@dataclass(frozen=True)
class RegisteredDeployment:
    """A deployment on the server, in the form that a Prefect runner expects."""

    name: str
    id: UUID
    change: str
    """What the registration did: added, changed or unchanged."""
    note: str = ""
    """Where file and server differ on purpose."""
    storage: None = None

    async def aapply(self) -> UUID:
        """Return the id. A runner calls this to register a deployment."""
        return self.id


@dataclass(frozen=True)
class SyncResult:
    """What is on the server now, and what was removed."""

    deployments: list[RegisteredDeployment]
    removed: list[str]

    def lines(self) -> list[str]:
        """Return one line per deployment, such as `added      night`."""
        registered = [f"{one.change:<9}  {one.name}{one.note and f' ({one.note})'}" for one in self.deployments]
        return [*registered, *(f"removed    {name}" for name in self.removed)]


def sync_deployments(
    wanted: Sequence[RunnerDeployment], tags: Sequence[str], reset_schedules: bool = False
) -> SyncResult:
    """Register the `wanted` deployments, and delete the server's other deployments that have all of the `tags`.

    With `reset_schedules`, schedules that a person paused or resumed on the server become again what the file says.

    Raises httpx.HTTPError if the server does not answer, or refuses.
    """
    with SyncClientContext() as context:  # every request for a client inside this block gets this client
        client = context.client
        with_tags = {"deployments": {"tags": {"all_": list(tags)}}}
        existing = {body["name"]: body for body in _fetch_all(client, "/deployments/filter", with_tags)}
        triggers = _fetch_triggers(client) if existing else {}
        removed = sorted(existing.keys() - {deployment.name for deployment in wanted})
        for name in removed:
            client.delete_resource_owned_automations(f"prefect.deployment.{existing[name]['id']}")
            client.delete_deployment(UUID(existing[name]["id"]))
        registered = []
        for deployment in wanted:
            there = existing.get(deployment.name)
            note = "" if there is None or reset_schedules else _keep_pause(deployment, there)
            registered.append(_register(deployment, there, triggers, note))
        return SyncResult(registered, removed)


def _keep_pause(wanted: RunnerDeployment, existing: dict[str, Any]) -> str:
    """Pause or resume the `wanted` schedule as a person did on the server. Return a note about it, or an empty text.

    If the file's word has changed since it was registered, the file is newer, and its word stays.
    """
    if not wanted.schedules or not existing["schedules"]:
        return ""
    (schedule,) = wanted.schedules
    has_active = any(there["active"] for there in existing["schedules"])
    is_active, was_active = has_active and not existing["paused"], not str(existing["version"]).endswith(PAUSED)
    if is_active == schedule.active or schedule.active != was_active:
        return ""
    here, there = ("", "not ") if is_active else ("not ", "")
    wanted.paused = existing["paused"]
    wanted.schedules = [schedule.model_copy(update={"active": has_active})]
    return f"schedule {there}paused on the server, {here}paused in the file; --reset-schedules takes the file's word"


def _register(
    wanted: RunnerDeployment, existing: dict[str, Any] | None, triggers: dict[str, set[str]], note: str
) -> RegisteredDeployment:
    if existing is None:
        return RegisteredDeployment(wanted.name, cast(UUID, wanted.apply()), "added")
    change = "unchanged" if existing["version"] == wanted.version else "changed"
    if change == "changed" or not _is_intact(wanted, existing, triggers.get(existing["id"], set())):
        wanted.apply()
    return RegisteredDeployment(wanted.name, UUID(existing["id"]), change, note)


def _is_intact(wanted: RunnerDeployment, existing: dict[str, Any], triggers: set[str]) -> bool:
    """Whether the server's deployment still is as it was registered. Anyone may change it in Prefect's UI."""
    expected = wanted.model_dump(mode="json", include={"parameters", "schedules", "work_pool_name", "job_variables"})
    schedules = [(schedule["schedule"], schedule["active"]) for schedule in expected.pop("schedules") or ()]
    return (
        all(existing[key] == value for key, value in expected.items())
        and [(schedule["schedule"], schedule["active"]) for schedule in existing["schedules"]] == schedules
        and (existing["entrypoint"], existing["paused"]) == (wanted.entrypoint, wanted.paused)
        and set(existing["tags"]) == set(wanted.tags or ())
        and triggers == {getattr(trigger, "name", "") for trigger in wanted.triggers}
    )


def _fetch_triggers(client: SyncPrefectClient) -> dict[str, set[str]]:
    """Return the names of the enabled automations, by the id of the deployment that they start."""
    names = defaultdict(set)
    for automation in _fetch_all(client, "/automations/filter", {}):
        if automation["enabled"]:
            for action in automation["actions"]:
                names[action.get("deployment_id") or ""].add(automation["name"])
    return names


def _fetch_all(client: SyncPrefectClient, path: Any, query: dict[str, Any]) -> list[dict[str, Any]]:
    """Fetch all pages of a list as plain data. Prefect's own objects would go through all time zones per schedule."""
    items: list[dict[str, Any]] = []
    while True:
        response = client.request("POST", path, json={**query, "limit": _PAGE, "offset": len(items)})
        page = response.json()
        items += page
        if len(page) < _PAGE:
            return items
