"""Brings deployments to a Prefect server: asks what is there, sends what is new or different, deletes what is gone.

A file of hundreds of pipelines is registered at every start, mostly unchanged. So what is there is read by pages, as
plain data, and compared whole: a deployment is left alone only if nothing of it was changed or lost since, on the
server's side either. What is sent goes one after the other: a server on SQLite refuses writers that meet.
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
"""Prefect's servers give no longer list."""


@dataclass(frozen=True)
class Registered:
    """A deployment that is on the server, in the form in which a runner wants to be given it."""

    name: str
    id: UUID
    change: str
    """What was done: added, changed or unchanged."""
    storage: None = None

    async def aapply(self) -> UUID:
        """What a runner calls to register it."""
        return self.id


def register(wanted: Sequence[RunnerDeployment], tags: Sequence[str]) -> tuple[list[Registered], list[str]]:
    """Lets the server have `wanted` and no other deployment with all these tags. Returns also the names of those gone.

    Raises httpx.HTTPError where the server does not answer, or refuses.
    """
    with SyncClientContext() as context:  # whatever asks for a client in here is given this one
        client = context.client
        marked = {"deployments": {"tags": {"all_": list(tags)}}}
        there = {one["name"]: one for one in _all(client, "/deployments/filter", marked)}
        triggers = _triggers(client) if there else {}
        gone = sorted(there.keys() - {deployment.name for deployment in wanted})
        for name in gone:
            client.delete_resource_owned_automations(f"prefect.deployment.{there[name]['id']}")
            client.delete_deployment(UUID(there[name]["id"]))
        return [_put(one, there.get(one.name), triggers) for one in wanted], gone


def _put(wanted: RunnerDeployment, there: dict[str, Any] | None, triggers: dict[str, set[str]]) -> Registered:
    if there is None:
        return Registered(wanted.name, cast(UUID, wanted.apply()), "added")
    change = "unchanged" if there["version"] == wanted.version else "changed"
    if change == "changed" or not _is_intact(wanted, there, triggers.get(there["id"], set())):
        wanted.apply()
    return Registered(wanted.name, UUID(there["id"]), change)


def _is_intact(wanted: RunnerDeployment, there: dict[str, Any], triggers: set[str]) -> bool:
    """Whether the server still has of it what was once registered. Anyone may change much of it in Prefect's UI."""
    asked = wanted.model_dump(mode="json", include={"parameters", "schedules", "work_pool_name", "job_variables"})
    schedules = [(one["schedule"], one["active"]) for one in asked.pop("schedules") or ()]
    return (
        all(there[key] == value for key, value in asked.items())
        and [(one["schedule"], one["active"]) for one in there["schedules"]] == schedules
        and (there["entrypoint"], there["paused"]) == (wanted.entrypoint, False)
        and set(there["tags"]) == set(wanted.tags or ())
        and triggers == {getattr(trigger, "name", "") for trigger in wanted.triggers}
    )


def _triggers(client: SyncPrefectClient) -> dict[str, set[str]]:
    """By the id of the deployment that they start: the names of the automations that are not switched off."""
    found = defaultdict(set)
    for automation in _all(client, "/automations/filter", {}):
        if automation["enabled"]:
            for action in automation["actions"]:
                found[action.get("deployment_id") or ""].add(automation["name"])
    return found


def _all(client: SyncPrefectClient, path: Any, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Every page of a list. As plain data: Prefect's own objects look through all time zones for each schedule."""
    found: list[dict[str, Any]] = []
    while True:
        answer = client.request("POST", path, json={**asked, "limit": _PAGE, "offset": len(found)})
        page = answer.json()
        found += page
        if len(page) < _PAGE:
            return found
