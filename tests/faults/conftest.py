"""The fixtures of the flow tests serve here too: a project, its state root, a tiny pipeline, one Prefect server."""

from tests.flows.conftest import prefect_server, project, root, tiny

__all__ = ["prefect_server", "project", "root", "tiny"]
