"""Entry points that Prefect servers have stored. The flows are in flows/operations/flows.py."""

from flows.operations.flows import promote, prune, rollback

__all__ = ["promote", "prune", "rollback"]
