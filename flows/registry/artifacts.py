"""Files that MLflow's database names: where they are, and how retention deletes them.

In a local store, only files inside the state root are deleted: a copied database may name the files of another one.
"""

import shutil
from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from flows.state.root import StateRoot


def is_remote(uri: str) -> bool:
    """Whether the files are in a store that is reached over the network."""
    return "://" in uri and not uri.startswith("file:")


def local_path(root: StateRoot, uri: str) -> Path | None:
    """Return the directory of the files in a local store. None if it does not exist or is outside the state root."""
    path = Path(local_file_uri_to_path(uri)).resolve()
    return path if path.exists() and path.is_relative_to(root.artifacts.resolve()) else None


def free(root: StateRoot, uri: str) -> None:
    """Delete all files under an artifact URI."""
    if is_remote(uri):
        get_artifact_repository(uri, tracking_uri=root.tracking_uri).delete_artifacts()
    elif (path := local_path(root, uri)) is not None:
        shutil.rmtree(path)
