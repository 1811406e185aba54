"""Files that MLflow's database names: where they lie, and freeing them.

Of a local store only what lies inside the state root is ever freed: a copied database may name another one's files.
"""

import shutil
from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from flows.state import StateRoot


def is_remote(uri: str) -> bool:
    """Whether the files lie in a store that is asked over the network."""
    return "://" in uri and not uri.startswith("file:")


def local_path(root: StateRoot, uri: str) -> Path | None:
    """Where the files of a local store lie; None if there are none, or they are not this state root's."""
    path = Path(local_file_uri_to_path(uri)).resolve()
    return path if path.exists() and path.is_relative_to(root.artifacts.resolve()) else None


def free(root: StateRoot, uri: str) -> None:
    """Removes all files under an artifact URI."""
    if is_remote(uri):
        get_artifact_repository(uri, tracking_uri=root.tracking_uri).delete_artifacts()
    elif (path := local_path(root, uri)) is not None:
        shutil.rmtree(path)
