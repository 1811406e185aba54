"""Entry point that Prefect servers have stored. The flow is in flows/retrain/watch.py."""

from flows.retrain.watch import watch

__all__ = ["watch"]
