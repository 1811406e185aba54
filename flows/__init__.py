"""Prefect flows, MLflow tracking and registry, and the command line around gptcore."""

import atexit
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptcore.bundle import Loaded

# Torch, MLflow and Prefect are half a million objects that stay to the end. By default Python walks through them again
# and again while they are imported, about 1 s, and three times more when it ends, about 2 s.
gc.set_threshold(50_000, 20, 50)
atexit.register(gc.freeze)


def load(uri: str, device: str = "cpu") -> "Loaded":
    """The model and the tokenizer of a registered version, such as models:/gpt-quickstart@champion.

    The state root is GPTFLOW_HOME, else `mlruns/` in the working directory. Only safetensors and JSON are read. Raises
    UnknownVersion, and RegistryError if the version is damaged.
    """
    from flows.releases import loading, registry
    from flows.state import state_root

    root = state_root()
    return loading.load(root, registry.resolve(root, uri), device)
