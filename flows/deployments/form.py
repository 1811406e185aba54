"""The form of a custom run in Prefect's UI: titles for people, and the fields that change most often first.

Prefect derives the form from a flow's signature, with the keys of pipelines.yaml as titles. The keys stay the names by
which a run's parameters are given and by which errors name them.
"""

from copy import deepcopy
from typing import Any

_FIRST: dict[str, tuple[str, ...]] = {
    "": ("force", "accept_text", "train", "corpus", "model", "sample", "evaluate", "gate", "retrain", "overlap"),
    "TrainConfig": ("max_steps", "max_epochs", "learning_rate", "batch_size", "accumulation", "session_seconds"),
    "CorpusConfig": ("sources", "exclude", "tokenizer", "text", "formats", "encoding", "errors", "duplicates"),
    "ModelConfig": ("size", "recipe", "context_length", "emb_dim", "n_layers", "n_heads", "drop_rate"),
}
"""The fields that come first, by section. The flow's own parameters are the section without a name."""
_TITLES = {
    "force": "Train even if nothing has changed",
    "accept_text": "Accept the text",
    "sources_overridden": "Experiment on other sources",
    "train": "Training",
    "corpus": "Text",
    "sample": "Samples",
    "evaluate": "Evaluation",
    "retrain": "When to train",
    "overlap": "If another run is active",
    "notify": "Notifications",
    "on": "Events",
    "model_name": "Registered model",
    "emb_dim": "Embedding width",
    "n_heads": "Attention heads",
    "n_layers": "Layers",
    "drop_rate": "Dropout",
    "qkv_bias": "Biases of queries, keys and values",
    "bias": "Biases of the other layers",
    "qk_norm": "Norms of queries and keys",
    "emb_norm": "Norm of the embeddings",
    "tied": "One matrix for head and embeddings",
    "init": "Initial weights",
    "val_fraction": "Share of val",
    "holdout_fraction": "Share of holdout",
    "text": "Text of a table's row",
    "errors": "If a file cannot be used",
    "forget": "Allowed loss on old text",
}
"""The titles that are not the key itself in words."""


def build_form(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a flow's parameters with titles and an order for people."""
    form = deepcopy(schema)
    for name, section in {"": form, **form.get("definitions", {})}.items():
        fields = section.get("properties", {})
        first = [key for key in _FIRST.get(name, ()) if key in fields]
        for position, key in enumerate([*first, *(key for key in fields if key not in first)]):
            fields[key] |= {"title": _TITLES.get(key, key.replace("_", " ").capitalize()), "position": position}
    return form
