"""Rules by processor: what each known processor gets, and that both libraries multiply alike."""

import pytest
import torch
from torch import nn

from bench import processor as bench
from gptcore import processor
from gptcore.config import TrainConfig
from gptcore.generation import kv_cache
from gptcore.processor import Processor, choose_min_rows, find_processor
from gptcore.training.resolve import resolve

XEON = Processor(is_amd=False, has_avx512=True)
EPYC_AVX2 = Processor(is_amd=True, has_avx512=False)
EPYC_AVX512 = Processor(is_amd=True, has_avx512=True)
EPYC_BF16 = Processor(is_amd=True, has_avx512=True, has_avx512_bf16=True)
XEON_BF16 = Processor(is_amd=False, has_avx512=True, has_avx512_bf16=True)
UNKNOWN = Processor(is_amd=False, has_avx512=False)
HEAD, LAYER, SMALL = 50257 * 768, 3072 * 768, 384 * 384


@pytest.fixture
def pretend(monkeypatch):
    return lambda found: monkeypatch.setattr(processor, "find_processor", lambda: found)


@pytest.mark.parametrize(
    ("found", "expected"),
    [(XEON, (4, 4, None)), (UNKNOWN, (4, 4, None)), (EPYC_AVX2, (1, 2, None)), (EPYC_AVX512, (1, 1, None))],
)
def test_each_processor_multiplies_few_rows_by_the_library_that_was_faster_on_it(pretend, found, expected):
    pretend(found)
    assert tuple(choose_min_rows(weights) for weights in (HEAD, LAYER, SMALL)) == expected


@pytest.mark.parametrize("found", [XEON, EPYC_AVX512])
def test_both_libraries_multiply_alike(pretend, found):
    pretend(found)
    layer = nn.Linear(1024, 2048)
    multiply = kv_cache._choose_multiply(layer)
    for shape in ((1, 1024), (1, 1, 1024), (3, 1024), (5, 2, 1024)):
        x = torch.randn(shape)
        with torch.inference_mode():
            torch.testing.assert_close(multiply(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("found", "expected"),
    [(EPYC_BF16, "bf16"), (XEON_BF16, "fp32"), (EPYC_AVX512, "fp32"), (EPYC_AVX2, "fp32"), (UNKNOWN, "fp32")],
)
def test_each_processor_trains_in_the_precision_that_was_faster_on_it(pretend, found, expected):
    pretend(found)
    assert resolve(TrainConfig(device="cpu")).precision == expected
    assert resolve(TrainConfig(device="cpu", precision="fp32")).precision == "fp32"
    assert resolve(TrainConfig(device="cpu"), "fp32").precision == "fp32", "an unfinished training keeps its own"
    assert resolve(TrainConfig(device="mps")).precision == "fp32"


def test_the_benchmark_measures_products_and_names_a_rule_that_chooses_badly(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", "bench.processor --threads 1 --rounds 1 --matrices 1 --shapes".split())
    bench.main()
    assert "1 x 384 by 384 x 384" in capsys.readouterr().out
    slow = bench.Choice("a product", {"mkl": 2.0, "onednn": 1.0}, "mkl")
    assert slow.is_wrong and not bench.Choice("a product", slow.seconds, "onednn").is_wrong


def test_this_processor_is_recognised():
    assert find_processor() in (XEON, XEON_BF16, UNKNOWN, EPYC_AVX2, EPYC_AVX512, EPYC_BF16)
