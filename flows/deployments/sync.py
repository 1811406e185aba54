"""Brings the deployments on a Prefect server up to date: adds new ones, updates changed ones and removes the rest.

A file of hundreds of pipelines is registered at every start, and most of them have not changed. So the server's
deployments are fetched in pages of plain data and compared. A deployment is sent again only if the file has changed, or
if somebody has changed the deployment on the server. Requests are sent one after the other, because a server on SQLite
refuses concurrent writers.
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


@dataclass(frozen=True)
class RegisteredDeployment:
    """A deployment on the server, in the form that a Prefect runner expects."""

    name: str
    id: UUID
    change: str
    """What the registration did: added, changed or unchanged."""
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
        registered = [f"{deployment.change:<9}  {deployment.name}" for deployment in self.deployments]
        return [*registered, *(f"removed    {name}" for name in self.removed)]


def sync_deployments(wanted: Sequence[RunnerDeployment], tags: Sequence[str]) -> SyncResult:
    """Register the `wanted` deployments, and delete the server's other deployments that have all of the `tags`.

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
        registered = [_register(deployment, existing.get(deployment.name), triggers) for deployment in wanted]
        return SyncResult(registered, removed)


def _register(
    wanted: RunnerDeployment, existing: dict[str, Any] | None, triggers: dict[str, set[str]]
) -> RegisteredDeployment:
    if existing is None:
        return RegisteredDeployment(wanted.name, cast(UUID, wanted.apply()), "added")
    change = "unchanged" if existing["version"] == wanted.version else "changed"
    if change == "changed" or not _is_intact(wanted, existing, triggers.get(existing["id"], set())):
        wanted.apply()
    return RegisteredDeployment(wanted.name, UUID(existing["id"]), change)


def _is_intact(wanted: RunnerDeployment, existing: dict[str, Any], triggers: set[str]) -> bool:
    """Whether the server's deployment still is as it was registered. Anyone may change it in Prefect's UI."""
    expected = wanted.model_dump(mode="json", include={"parameters", "schedules", "work_pool_name", "job_variables"})
    schedules = [(schedule["schedule"], schedule["active"]) for schedule in expected.pop("schedules") or ()]
    return (
        all(existing[key] == value for key, value in expected.items())
        and [(schedule["schedule"], schedule["active"]) for schedule in existing["schedules"]] == schedules
        and (existing["entrypoint"], existing["paused"]) == (wanted.entrypoint, False)
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
