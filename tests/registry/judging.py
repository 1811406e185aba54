"""Made-up text, weights of many qualities, and versions, for tests of the gate that do not train a pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from flows.registry import versions
from flows.state.root import StateRoot
from gptcore import manifest
from gptcore.bundle import WEIGHTS, write_bundle
from gptcore.config import CorpusConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Snapshot, read_blocks
from gptcore.evaluation.baselines import score_baselines
from gptcore.evaluation.bits_per_byte import evaluate_blocks
from gptcore.evaluation.run_report import Scores
from gptcore.model.gpt import GPTModel
from gptcore.tokens.tokenizer import get_tokenizer
from tests.tiny import TINY_CFG, prose

NAME = "gpt-tiny"
CFG = {**TINY_CFG, "context_length": 32, "emb_dim": 32, "n_layers": 1}
Weights = dict[str, torch.Tensor]


def figures(seed: int, count: int) -> str:
    """Return tables of numbers: text unlike prose."""
    draw = np.random.default_rng(seed)
    rows = (" ".join(f"{number:03d}" for number in draw.integers(0, 1000, 12)) for _ in range(count))
    return "".join(row + ("\n\n" if draw.random() < 0.3 else "\n") for row in rows)


def weights_after(updates: Sequence[int], text: str | None = None) -> list[Weights]:
    """Train one model on `text` or on prose, and return its weights after each of these numbers of updates."""
    ids = torch.tensor(get_tokenizer("bytes").encode(text or prose(1, 4000)))
    torch.manual_seed(1)
    model = GPTModel(CFG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    made = {}
    for step in range(1, max(updates) + 1):
        windows = ids[torch.randint(0, len(ids) - 33, (16, 1)) + torch.arange(33)]
        loss = torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in updates:
            made[step] = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return [made[step] for step in updates]


def snapshot_of(root: StateRoot, directory: Path, **settings: Any) -> Snapshot:
    """Return the snapshot of a directory of text as it is now."""
    chosen = {"val_fraction": 0.1, "holdout_fraction": 0.2, "block_bytes": 256, **settings}
    return ingest(CorpusConfig(sources=(str(directory),), **chosen), root.corpora, root.path)


def scores_of(snapshot: Snapshot) -> Scores:
    """Return scores with the unigram score of the snapshot. The rest does not matter to the gate."""
    torch.manual_seed(0)
    tokenizer = get_tokenizer("bytes")
    held_out = list(read_blocks(snapshot.path, "holdout"))
    train = snapshot.path / "train.txt"
    ids = np.asarray(tokenizer.encode(train.read_text()))
    evaluation = evaluate_blocks(GPTModel(CFG), tokenizer, held_out, "cpu")
    return Scores(evaluation, evaluation, score_baselines(ids, tokenizer, tokenizer.n_vocab, held_out, train))


def register(root: StateRoot, weights: Weights, corpus: Snapshot) -> str:
    """Register the weights like a model, but without MLflow's packaging, and return the version."""
    client = MlflowClient(root.tracking_uri)
    number = len(client.search_model_versions(f"name = '{NAME}'")) + 1
    source = root.path / "models" / str(number)
    bundle = source / "artifacts" / versions.BUNDLE
    bundle.mkdir(parents=True)
    save_file(weights, source / "weights")
    sha256 = write_bundle(bundle, CFG, source / "weights", get_tokenizer("bytes"), {})
    digest = manifest.sha256_of_file(bundle / WEIGHTS)
    tags = {"corpus_sha256": corpus.sha256, "weights_sha256": digest, versions.BUNDLE_SHA256: sha256}
    return str(client.create_model_version(NAME, str(source), tags=tags).version)
