"""Prefect flows, MLflow tracking and registry, and the command line around gptcore. `flows.load` loads a version."""

import atexit
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptcore.bundle import LoadedModel

# Torch, MLflow and Prefect create half a million objects that live until the process ends. By default the garbage
# collector scans them again and again during the import (about 1 s), and three times more at exit (about 2 s).
gc.set_threshold(50_000, 20, 50)
atexit.register(gc.freeze)


def load(uri: str, device: str = "auto") -> "LoadedModel":
    """Load the model and the tokenizer of a registered version, for example models:/gpt-quickstart@champion.

    The model is on `device`: cpu, cuda, cuda:N, mps, or auto (cuda if available, else mps, else cpu). The result's
    `device` says which one that is. Raises DeviceMissing.

    The state root is GPTFLOW_HOME, else `mlruns/` in the working directory. Only safetensors and JSON files are read. A
    password in a server's URL in the environment is moved to a variable of its own. Raises UnknownVersion, and
    RegistryError if the version is damaged.
    """
    from flows.registry import loading, versions
    from flows.state.backends import export_passwords
    from flows.state.root import state_root

    export_passwords()
    root = state_root()
    root.prepare_registry()
    return loading.load(root, versions.resolve(root, uri), device)
