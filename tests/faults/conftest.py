"""The fixtures of the flow tests serve here too: a project, its state root, a pipeline, a registry, Prefect."""

from tests.flows.conftest import empty_database, prefect_server, project, root, tiny, tiny_registry

__all__ = ["empty_database", "prefect_server", "project", "root", "tiny", "tiny_registry"]
