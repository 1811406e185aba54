"""The nightly retraining: the flow, its steps, when it trains, and the triggers that start it.

Prefect servers have stored `flows.retrain.retrain` as a deployment's entry point. It is loaded on first use, so that
importing a neighbour of flow.py loads neither Prefect nor torch.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "retrain":
        return import_module("flows.retrain.flow").retrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
