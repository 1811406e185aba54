"""Devices: what `auto` means, a GPU that is missing, and a GPU that training, scores and texts use."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gptcore import devices
from gptcore.components import RECIPES
from gptcore.config import TrainConfig
from gptcore.errors import CheckpointError, ConfigError, DeviceMissing
from gptcore.evaluation.bits_per_byte import score_blocks
from gptcore.evaluation.memorization import measure_memorization
from gptcore.generation.batch import Batch
from gptcore.generation.generate import generate, generate_batch, generate_text_simple
from gptcore.generation.quantize import quantize
from gptcore.generation.sampling import Sampling
from gptcore.model.gpt import GPTModel
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import Tokenizer
from gptcore.training.resolve import resolve
from gptcore.training.state import TrainState
from gptcore.training.trainer import train_directory
from tests.fake_gpu import CUDA, FakeGpu
from tests.tiny import TINY_CFG, prose
from tests.trainings import StopAfter, finish, outcome, prepare

SAMPLINGS = [
    Sampling(0),
    Sampling(),
    Sampling(1.3, top_k=20, repetition_penalty=1.3),
    Sampling(0.9, top_p=0.8),
    Sampling(1.1, top_k=50, top_p=0.95, min_p=0.01),
]
PROMPTS = [[5], [1, 2, 3], [200] * 9, list(range(40)), [7, 8]]


def make_model(**components: object) -> GPTModel:
    torch.manual_seed(3)
    model = GPTModel({**TINY_CFG, **components}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def has(monkeypatch: pytest.MonkeyPatch, gpus: int, has_mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)


def test_auto_is_cuda_else_mps_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, has_mps, expected in ((2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        has(monkeypatch, gpus, has_mps)
        assert devices.choose_device("auto").type == devices.find_device() == expected
        assert resolve(TrainConfig()).device == expected


def test_a_missing_gpu_is_refused_with_what_is_there_and_replaced_only_if_it_was_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has(monkeypatch, 0)
    with pytest.raises(DeviceMissing, match=r"^device cuda: this machine has only cpu\. Choose .* auto\.$"):
        devices.choose_device("cuda")
    with pytest.raises(DeviceMissing, match="device mps"):
        TrainState.initial(TINY_CFG, TrainConfig(device="mps"))
    assert DeviceMissing.exit_code == 1
    assert devices.choose_usable_device("cuda:1").type == devices.choose_usable_device("auto").type == "cpu"
    has(monkeypatch, 2)
    with pytest.raises(DeviceMissing, match="device cuda:2: this machine has only cpu, cuda:0, cuda:1"):
        devices.choose_device("cuda:2")
    assert devices.choose_device("cuda:1") == devices.choose_usable_device("cuda:1") == torch.device("cuda:1")
    assert devices.choose_usable_device("cuda:2").type == "cuda"
    with pytest.raises(ConfigError, match="device is 'gpu'; it must be auto, cpu, cuda, cuda:N or mps"):
        devices.choose_device("gpu")


def test_a_forgotten_tensor_fails_on_the_fake_gpu(gpu: FakeGpu) -> None:
    model = make_model().to(CUDA)
    with pytest.raises(RuntimeError, match="same device"):
        model(torch.tensor([[1, 2]]))
    assert torch.equal(model(torch.tensor([[1, 2]], device="cuda")).cpu(), make_model()(torch.tensor([[1, 2]])))


@pytest.mark.parametrize("components", [{}, RECIPES["modern"]], ids=["gpt2", "modern"])
def test_texts_are_scored_on_the_gpu_with_the_scores_of_the_cpu(
    tokenizer: Tokenizer, gpu: FakeGpu, components: dict[str, object]
) -> None:
    texts = ["Grüße, 世界!", "x", prose(1, 60)]
    expected = list(score_blocks(make_model(**components), tokenizer, texts, "cpu"))
    model = make_model(**components).to(CUDA)
    gpu.products.clear()
    found = list(score_blocks(model, tokenizer, texts, CUDA))
    assert gpu.products["cuda"] and not gpu.products["cpu"]
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "nats", "ranks"))


def test_memorization_is_measured_on_the_gpu(gpu: FakeGpu) -> None:
    tokens = np.tile(np.arange(64, dtype=np.uint16), 9)
    expected = measure_memorization(make_model(), tokens, 256, "cpu")
    model = make_model().to(CUDA)
    gpu.products.clear()
    assert measure_memorization(model, tokens, 256, CUDA) == expected
    assert gpu.products["cuda"] and not gpu.products["cpu"]


@pytest.mark.parametrize("components", [{}, RECIPES["modern"]], ids=["gpt2", "modern"])
def test_texts_are_generated_on_the_gpu_as_on_the_cpu(gpu: FakeGpu, components: dict[str, object]) -> None:
    plain, model = make_model(**components), make_model(**components).to(CUDA)
    gpu.products.clear()
    for sampling in SAMPLINGS[-1:] if components else SAMPLINGS:
        on_gpu = generate_batch(model, PROMPTS, 10, sampling, seed=5, rows=3)
        with torch._C.DisableTorchFunction():
            assert on_gpu == generate_batch(plain, PROMPTS, 10, sampling, seed=5, rows=3)
    alone = list(generate(model, PROMPTS[1], 20, temperature=0.9, top_k=9, seed=1))
    book = generate_text_simple(model, torch.tensor([PROMPTS[1]], device="cuda"), 20, 16)
    assert gpu.products["cuda"] and not gpu.products["cpu"]
    assert alone == list(generate(plain, PROMPTS[1], 20, temperature=0.9, top_k=9, seed=1))
    assert torch.equal(book.cpu(), generate_text_simple(plain, torch.tensor([PROMPTS[1]]), 20, 16))


def test_requests_with_different_settings_share_a_batch_on_the_gpu(gpu: FakeGpu) -> None:
    plain, model = make_model(), make_model().to(CUDA)
    batch = Batch(model, rows=len(SAMPLINGS))
    requests = [batch.add(prompt, 10, sampling, seed=4) for prompt, sampling in zip(PROMPTS, SAMPLINGS)]
    while batch.free < len(SAMPLINGS):
        batch.step()
    for prompt, sampling, request in zip(PROMPTS, SAMPLINGS, requests):
        assert request.ids == list(generate(plain, prompt, 10, **vars(sampling), seed=4))


def test_damaged_weights_and_a_failing_draw_end_their_own_requests_on_the_gpu(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with torch.no_grad():
        model.out_head.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="not numbers"):
        generate_batch(model.to(CUDA), PROMPTS, 3, seed=0)
    batch, bad, draw = Batch(make_model().to(CUDA), rows=2), Sampling(0.5), Sampling.draw_rows
    monkeypatch.setattr(Sampling, "draw_rows", lambda self, *given: 1 / 0 if self is bad else draw(self, *given))
    good, failing = batch.add([1], 2, Sampling(0)), batch.add([1], 2, bad)
    assert batch.step() == [good, failing]
    assert isinstance(failing.error, ZeroDivisionError) and good.error is None and batch.free == 1


def test_rounded_weights_are_refused_on_a_gpu(gpu: FakeGpu) -> None:
    with pytest.raises(ConfigError, match="int8 is for models on the CPU, this one is on cuda"):
        quantize(make_model().to(CUDA))


def test_a_training_on_the_gpu_resumes_with_the_weights_of_an_uninterrupted_one(
    tokens: Tokens, tmp_path: Path, gpu: FakeGpu
) -> None:
    asked = {"optimizer": "muon", "eval_every": 5}  # Muon for the matrices, AdamW for the rest
    whole, stopped = (prepare(tmp_path / name, tokens, device="cuda", **asked) for name in ("whole", "stopped"))
    finish(whole)
    assert train_directory(stopped.path, StopAfter(stopped, 6)) is None
    finish(stopped)
    assert outcome(stopped) == outcome(whole)
    assert gpu.products["cuda"] and not gpu.products["cpu"]
    on_cpu = prepare(tmp_path / "cpu", tokens, **asked)
    finish(on_cpu)
    losses = ([line["loss"] for line in run.read_metrics()] for run in (whole, on_cpu))
    assert next(losses) == pytest.approx(next(losses), rel=1e-3)
