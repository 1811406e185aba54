"""Load a registered version as a model, after comparing its files with the registered hashes.

The tag `bundle_sha256` names the bundle's manifest, and the manifest every file. A version that an earlier release
registered has only the tag `weights_sha256`; then only the weights are compared.

The installed gptcore reads the files, which are safetensors and JSON only. This module is separate from versions.py
because it imports torch, which takes seconds that look-ups need not wait for.
"""

from mlflow.entities.model_registry import ModelVersion

from flows.registry.tags import VersionTags
from flows.registry.versions import RegistryError, check_manifest, fetch_bundle, uri_of
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import WEIGHTS, LoadedModel
from gptcore.bundle import load as load_bundle
from gptcore.errors import CheckpointError, TokenizerError


def load(root: StateRoot, version: ModelVersion, device: str = "cpu") -> LoadedModel:
    """Load the version's model and tokenizer. Raises RegistryError if the files cannot be loaded or were altered."""
    try:
        return load_verified(root, version, device)
    except (CheckpointError, TokenizerError) as error:
        raise RegistryError(
            f"{uri_of(version)} cannot be loaded, and nothing is promoted: {error} Restore its artifacts from a "
            "backup, or promote another version."
        ) from None


def load_verified(root: StateRoot, version: ModelVersion, device: str = "cpu") -> LoadedModel:
    """Load like `load`, for callers other than the gate.

    Raises RegistryError if the files are missing, CheckpointError or TokenizerError if they are damaged.
    """
    bundle = fetch_bundle(root, version.name, str(version.version))
    tags = VersionTags.from_tags(version.tags)
    weights, expected = bundle / WEIGHTS, tags.weights_sha256
    if tags.bundle_sha256 is not None:
        check_manifest(bundle, tags.bundle_sha256)
    elif expected and weights.exists() and (digest := manifest.sha256_of_file(weights)) != expected:
        raise CheckpointError(f"{weights} has sha256 {digest}, registered was {expected}: it was altered.")
    return load_bundle(bundle, device)  # compares the files with the manifest
