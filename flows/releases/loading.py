"""A registered version as a model that answers, once its files have been compared with what was registered.

Only safetensors and JSON are read, by the gptcore that is installed. It stands apart from registry.py because it needs
torch, which look-ups need not wait for.
"""

from mlflow.entities.model_registry import ModelVersion

from flows.releases.registry import RegistryError, bundle_path, uri_of
from flows.state import StateRoot
from gptcore import manifest
from gptcore.bundle import WEIGHTS, Loaded
from gptcore.bundle import load as load_bundle
from gptcore.errors import CheckpointError, TokenizerError


def load(root: StateRoot, found: ModelVersion, device: str = "cpu") -> Loaded:
    """The version's model and tokenizer. Raises RegistryError if it cannot be loaded, or was altered."""
    try:
        return verified(root, found, device)
    except (CheckpointError, TokenizerError) as error:
        raise RegistryError(
            f"{uri_of(found)} cannot be loaded, and nothing is promoted: {error} Restore its artifacts from a backup, "
            "or promote another version."
        ) from None


def verified(root: StateRoot, found: ModelVersion, device: str = "cpu") -> Loaded:
    """As `load`, for who promotes nothing: raises CheckpointError or TokenizerError, as they are."""
    bundle = bundle_path(root, found.name, str(found.version))
    weights, expected = bundle / WEIGHTS, found.tags.get("weights_sha256")
    if expected and weights.exists() and (digest := manifest.sha256_of_file(weights)) != expected:
        raise CheckpointError(f"{weights} has sha256 {digest}, registered was {expected}: it was altered.")
    return load_bundle(bundle, device)
