"""What `python -m bench.gpu` measures: the training step, generation, a killed trainer, and the gate's scores.

Every function returns plain data for JSON. A figure's name says its unit.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bench import nanogpt_style, peers
from bench.shapes import GRAD_CLIP, LEARNING_RATE, SEED, WEIGHT_DECAY, Shape, adamw
from bench.workers import ROOT
from gptcore.config import CorpusConfig, ModelConfig, RunConfig, TrainConfig
from gptcore.corpus.ingest import ingest
from gptcore.corpus.snapshot import Block
from gptcore.devices import release_memory
from gptcore.evaluation.bits_per_byte import Evaluation, evaluate_blocks
from gptcore.evaluation.compare import compare
from gptcore.evaluation.weights import load_model
from gptcore.generation.generate import generate_batch
from gptcore.generation.sampling import Sampling
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from gptcore.tokens.files import tokenize
from gptcore.tokens.tokenizer import get_tokenizer
from gptcore.training.loop import update_weights
from gptcore.training.resolve import find_training_version
from gptcore.training.run_directory import RunDirectory
from gptcore.training.signals import Stop
from gptcore.training.state import TrainState
from gptcore.training.trainer import train_directory

Figures = dict[str, Any]
Step = Callable[[Tensor, Tensor], float]

NANOGPT_STYLE = "nanogpt-style"
_BYTES_PER_SEQUENCE = 2 * 2**30
"""Memory that a sequence of 1,024 tokens needs in training, in the greediest contender, with something to spare."""
_PROMPT, _BLOCK_CHARS = 16, 2048
_SAMPLING = Sampling(temperature=0.8)


GPT2 = Shape("124M", 12, 12, 768, 1024, 64, 50257, rounds=3)


@dataclass(frozen=True)
class Scale:
    """How large everything is. The default is GPT-2's smallest size."""

    device: str = "cuda"
    shape: Shape = GPT2
    compile: bool = True
    matmul: int = 8192
    steps: int = 10
    """Timed steps of a round."""
    texts: tuple[int, ...] = (1, 8, 64)
    """Numbers of texts that are generated at once."""
    new_tokens: int = 128
    trainer: Figures = field(
        default_factory=lambda: {"batch_size": 16, "max_steps": 120, "checkpoint_steps": 40, "eval_every": 60}
    )
    blocks: int = 24
    """Blocks that two models are scored on."""


TOY = Scale(
    device="cpu",
    shape=Shape("toy", 1, 2, 32, 32, 2, 300, rounds=2),
    compile=False,
    matmul=64,
    steps=2,
    texts=(1, 3),
    new_tokens=6,
    trainer={"batch_size": 4, "max_steps": 120, "checkpoint_steps": 20, "eval_every": 60},
    blocks=21,
)


def describe_machine(scale: Scale) -> Figures:
    """Return what the figures depend on."""
    about: Figures = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": psutil.cpu_count()}
    if scale.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gigabytes = round(properties.total_memory / 1e9)
        about |= {"device": properties.name, "memory_gb": gigabytes, "cuda": torch.version.cuda}
    else:
        about |= {"device": "cpu"}
    return about


def measure_training(scale: Scale) -> Figures:
    """Measure the training step of every contender, each with the largest batch that fits, and a large matmul."""
    ceilings = [_measure_matmul(scale)]
    contenders: list[Figures] = []
    for name, make in _list_contenders(scale):
        try:
            contenders.append({"name": name, **_measure_steps(make, scale)})
        except Exception as error:  # a peer that this torch cannot run must not end the others
            contenders.append({"name": name, "error": f"{type(error).__name__}: {error}"[:300]})
        _forget()
        ceilings.append(_measure_matmul(scale))
    ceiling = statistics.median(ceilings)
    for one in contenders:
        if "error" not in one:
            one["share_of_matmul"] = one["tflops"] / ceiling
    return {"shape": scale.shape.name, "precision": "bf16", "matmul_tflops": ceiling, "contenders": contenders}


def measure_generation(scale: Scale) -> Figures:
    """Measure tokens per second of all texts together, greedily and by drawing, in fp32."""
    torch.manual_seed(SEED)
    model = GPTModel(scale.shape.cfg(0.0)).to(scale.device).eval()
    theirs = None
    if _has_transformers():
        theirs = peers.HuggingFace(scale.shape, 0.0)
        theirs.model.to(scale.device)
        model.load_state_dict(peers.first_weights(scale.shape))
    rows = []
    for texts in scale.texts:
        ids, _ = replace(scale.shape, batch_size=texts, context_length=_PROMPT).batch(0)

        def ours(sampling: Sampling, ids: Tensor = ids, texts: int = texts) -> list[list[int]]:
            return generate_batch(model, ids.tolist(), scale.new_tokens, sampling, seed=SEED, rows=texts)

        count, row = texts * scale.new_tokens, {"texts": texts}
        greedy, seconds = _time(scale, ours, Sampling(temperature=0))
        row["tokens_per_second"] = count / seconds
        row["drawn_tokens_per_second"] = count / _time(scale, ours, _SAMPLING)[1]
        if theirs is not None:
            found, seconds = _time(scale, theirs.generate, ids.to(scale.device), scale.new_tokens)
            row["hf_tokens_per_second"] = count / seconds
            row["same_tokens_as_hf"] = _count_common(greedy[0], found[0, _PROMPT:].tolist())
        rows.append(row)
    _forget()
    return {"shape": scale.shape.name, "precision": "fp32", "rows": rows}


def measure_trainer(scale: Scale, directory: Path) -> Figures:
    """Train a run directory, kill the trainer after a checkpoint, and resume it to the end.

    Returns the updates that were lost, and by how much the losses of updates differ that both trainers made.
    """
    run = _prepare(scale, directory)
    saved, last = scale.trainer["checkpoint_steps"], scale.trainer["max_steps"]
    began, trainer = time.perf_counter(), _start_trainer(run)
    while trainer.poll() is None and not (len(run.read_metrics()) > saved + 2 and any(run.checkpoints.glob("step-*"))):
        time.sleep(0.02)
    was_running = trainer.poll() is None
    trainer.kill()
    trainer.wait()
    before = run.read_metrics()
    first_seconds = time.perf_counter() - began
    began = time.perf_counter()
    code = _start_trainer(run).wait()
    lines = run.read_metrics()
    result = run.read_result()
    common = [(old["loss"], new["loss"]) for old, new in zip(before[saved:], lines[saved:])]
    return {
        "device": scale.device,
        "was_killed": was_running,
        "killed_after_update": len(before),
        "seconds_until_the_kill": first_seconds,
        "seconds_of_the_rest": time.perf_counter() - began,
        "exit_code": code,
        "every_update_is_logged_once": [line["step"] for line in lines] == list(range(1, last + 1)),
        "repeated_updates": len(common),
        "largest_difference_of_a_repeated_loss": max((abs(new - old) / old for old, new in common), default=0.0),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines[1:]),
        "memory_mb": lines[-1].get("memory_mb"),
        "best_val_loss": result and result.best_val_loss,
    }


def measure_scores(scale: Scale, directory: Path) -> Figures:
    """Score the trained model, and the same with noise, as the gate does, on the device and on the CPU."""
    run, tokenizer = RunDirectory(directory / "run"), get_tokenizer("bytes")
    if not run.final.exists():
        train_directory(_prepare(scale, directory).path, Stop())
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    pieces = [text[begin : begin + _BLOCK_CHARS] for begin in range(0, len(text), _BLOCK_CHARS)][: scale.blocks]
    blocks = [Block(document=index, sha256=f"{index:064x}", text=piece) for index, piece in enumerate(pieces)]
    tokens = _make_tokens(directory)
    found: dict[str, list[Evaluation]] = {}
    seconds = {}
    for device in dict.fromkeys((scale.device, "cpu")):
        models = [load_model(run, tokens, torch.device(device))[0] for _ in range(2)]
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in models[1].parameters():
                parameter.add_((0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)).to(device))
        evaluate_blocks(models[0], tokenizer, blocks[:2], device)
        began = time.perf_counter()
        found[device] = [evaluate_blocks(model, tokenizer, blocks, device) for model in models]
        seconds[device] = time.perf_counter() - began
    compared = {device: compare(*(one.per_block for one in pair), 0.95) for device, pair in found.items()}
    pairs = list(zip(*found.values()))
    return {
        "device": scale.device,
        "bytes": found["cpu"][0].bytes,
        "bits_per_byte": {device: [one.bits_per_byte for one in pair] for device, pair in found.items()},
        "seconds": seconds,
        "finding": {device: one.classify(0.005, 0.005) for device, one in compared.items()},
        "largest_difference": max(abs(one[0].bits_per_byte - one[-1].bits_per_byte) for one in pairs),
    }


def _list_contenders(scale: Scale) -> Iterator[tuple[str, Callable[[], Step]]]:
    yield peers.OURS, lambda: _make_ours(scale)
    yield NANOGPT_STYLE, lambda: _make_peer(_NanoGPTStyle(scale), scale)
    if _has_transformers():
        padding = -scale.shape.vocab_size % 64
        yield peers.HF, lambda: _make_peer(peers.HuggingFace(scale.shape, 0.0, padding, scale.compile), scale)


def _make_ours(scale: Scale) -> Step:
    train = TrainConfig(
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        grad_clip=GRAD_CLIP,
        batch_size=scale.shape.batch_size,
        threads=torch.get_num_threads(),
        device=scale.device,
        precision="bf16",
        compile=scale.compile,
        seed=SEED,
    )
    state = TrainState.initial(scale.shape.cfg(0.0), train)
    return lambda inputs, targets: update_weights(state, [(inputs, targets)], LEARNING_RATE, train)[0]


class _NanoGPTStyle(peers.Peer):
    def __init__(self, scale: Scale) -> None:
        padding = -scale.shape.vocab_size % 64
        model = nanogpt_style.GPT(scale.shape, padding)
        peers.load(model, peers.as_gpt2(peers.first_weights(scale.shape), padding, transposed=False))
        super().__init__(model, compiled=scale.compile)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, targets)


def _make_peer(peer: peers.Peer, scale: Scale) -> Step:
    """Move the peer to the device, and compute its loss in bf16 by autocast, as ours is."""
    peer.model.to(scale.device)
    peer.optimizer = adamw(peer.model.parameters(), fused=True)
    peer.loss = torch.autocast(scale.device, dtype=torch.bfloat16)(peer.loss)  # type: ignore[method-assign]
    return peer.step


def _measure_steps(make: Callable[[], Step], scale: Scale) -> Figures:
    """Measure with the shape's batch, or with the largest half of it that fits into the device's memory."""
    batch = _choose_batch(scale)
    while True:
        try:
            return _measure_steps_of(make, replace(scale.shape, batch_size=batch), scale)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        _forget()


def _choose_batch(scale: Scale) -> int:
    batch = scale.shape.batch_size
    if scale.device == "cuda":
        fitting = torch.cuda.get_device_properties(0).total_memory // _BYTES_PER_SEQUENCE
        while batch > max(1, fitting):
            batch //= 2
    return batch


def _measure_steps_of(make: Callable[[], Step], shape: Shape, scale: Scale) -> Figures:
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, step = time.perf_counter(), make()
    batches = [tuple(ids.to(scale.device) for ids in shape.batch(index)) for index in range(scale.steps)]
    losses = [step(*batches[0])]
    first_seconds = time.perf_counter() - began
    losses += [step(*batch) for batch in batches[1:3]]
    seconds = []
    for _ in range(shape.rounds):
        began = _now(scale)
        for batch in batches:
            losses.append(step(*batch))
        seconds.append((_now(scale) - began) / len(batches))
    median = statistics.median(seconds)
    return {
        "batch": shape.batch_size,
        "step_ms": 1e3 * median,
        "tokens_per_second": shape.batch_size * shape.context_length / median,
        "tflops": shape.step_flops / median / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if scale.device == "cuda" else None,
        "seconds_until_the_first_step": first_seconds,
        "losses": [losses[0], losses[-1]],
    }


def _measure_matmul(scale: Scale) -> float:
    """Return 10^12 operations per second of a large product in bf16, on random numbers."""
    left, right = (torch.randn(scale.matmul, scale.matmul, device=scale.device).bfloat16() for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    began = _now(scale)
    for _ in range(scale.steps):
        torch.mm(left, right)
    return 2 * scale.matmul**3 * scale.steps / (_now(scale) - began) / 1e12


def _time(scale: Scale, work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the second result of `work`, and its seconds. The first call warms up."""
    work(*arguments)
    began = _now(scale)
    result = work(*arguments)
    return result, _now(scale) - began


def _now(scale: Scale) -> float:
    if scale.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget() -> None:
    """Release what a contender has left: graphs, compiled code and the device's memory."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    release_memory()


def _count_common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((index for index, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))


def _has_transformers() -> bool:
    from importlib.util import find_spec

    return find_spec("transformers") is not None


def _make_tokens(directory: Path) -> Tokens:
    """Tokenize source code of Python's library as bytes."""
    sources = tuple(sorted(str(path) for path in Path(argparse.__file__).parent.glob("[a-d]*.py")))
    split: Figures = {"val_fraction": 0.05, "holdout_fraction": 0.0, "block_bytes": 2048}
    snapshot = ingest(CorpusConfig(sources=sources, **split), directory / "corpora", directory)
    return tokenize(snapshot.path, "bytes", directory / "tokens", processes=1)


def _prepare(scale: Scale, directory: Path) -> RunDirectory:
    tokens, run, shape = _make_tokens(directory), RunDirectory(directory / "run"), scale.shape
    model = ModelConfig(
        context_length=shape.context_length,
        emb_dim=shape.emb_dim,
        n_heads=shape.n_heads,
        n_layers=shape.n_layers,
        drop_rate=0.0,
        tied=True,
    )
    train = TrainConfig(
        **scale.trainer,
        eval_batches=2,
        checkpoint_seconds=None,
        device=scale.device,
        precision="bf16",
        compile=scale.compile,
        threads=torch.get_num_threads(),
        seed=SEED,
    )
    config = RunConfig(
        training_version=find_training_version(train, is_warm_start=False),
        tokens=str(tokens.path),
        tokens_sha256=tokens.sha256,
        model=model,
        vocab_size=tokens.n_vocab,
        train=train,
        run_key="ab" * 32,
    )
    run.prepare(config)
    return run


def _start_trainer(run: RunDirectory) -> Any:
    command = [sys.executable, "-m", "gptcore.train", str(run.path)]
    with (run.path / "trainer.log").open("ab") as log:
        return psutil.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=log, stderr=log)
