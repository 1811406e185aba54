"""Windows, loaders and the batch order.

The results equal the book's, the corpus is not copied, and a batch is a pure function of the seed and the step.
"""

import itertools
import socket
import subprocess
import sys

import numpy as np
import pytest
import rustbpe
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import ConfigError, CorpusError
from gptcore.tokens.directory import Tokens
from gptcore.tokens.tokenizer import get_tokenizer, load_tiktoken_encoding
from gptcore.training.batches import (
    Batches,
    GPTDatasetV1,
    check_sizes,
    create_dataloader_v1,
    feed,
    make_eval_batches,
    num_windows,
)


class Letters:
    """The smallest possible tokenizer: it has only `encode(text)`."""

    def encode(self, text):
        return [ord(letter) for letter in text]


def literal_windows(ids, max_length, stride):
    """Return the windows that the loop in the book makes."""
    starts = range(0, len(ids) - max_length, stride)
    return [(ids[i : i + max_length], ids[i + 1 : i + max_length + 1]) for i in starts]


@pytest.mark.parametrize(("n", "max_length", "stride"), itertools.product(range(2, 13), range(1, 7), range(1, 6)))
def test_the_windows_of_a_dataset_are_those_of_the_books_loop(n, max_length, stride):
    text = "abcdefghijkl"[:n]
    if n <= max_length:
        return
    dataset = GPTDatasetV1(text, Letters(), max_length, stride)
    expected = literal_windows([ord(letter) for letter in text], max_length, stride)
    assert len(dataset) == num_windows(n, max_length, stride) == len(expected)
    found = [(inputs.tolist(), targets.tolist()) for inputs, targets in dataset]
    assert found == expected
    assert [dataset[i - len(dataset)][0].tolist() for i in range(len(dataset))] == [first for first, _ in expected]


def test_a_window_is_a_pair_of_int64_vectors_that_can_be_changed_without_changing_the_text():
    dataset = GPTDatasetV1("abcdef", Letters(), 4, 1)
    inputs, targets = dataset[0]
    assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (4,)
    inputs.zero_()
    assert dataset[0][0].tolist() == [97, 98, 99, 100]


@pytest.mark.parametrize("index", [2, -3, 100])
def test_an_index_out_of_range_raises_an_index_error(index):
    with pytest.raises(IndexError, match="of 2"):
        GPTDatasetV1("abcdef", Letters(), 4, 1)[index]


@pytest.mark.parametrize("make", [GPTDatasetV1, create_dataloader_v1])
def test_a_text_too_short_for_a_window_is_refused_with_both_numbers(make):
    with pytest.raises(CorpusError, match=r"has 4 tokens, and a window of max_length 4 .* needs 5"):
        make("abcd", tokenizer=Letters(), max_length=4, stride=1)


def test_the_ids_are_stored_once_even_if_windows_overlap():
    dataset = GPTDatasetV1("a" * 10_000, Letters(), 256, 1)
    held = [value for value in vars(dataset).values() if not isinstance(value, int)]
    assert len(held) == 1 and held[0].nbytes == 4 * 10_000 and len(dataset) == 10_000 - 256


@pytest.mark.parametrize(("key", "sizes"), [("max_length", (0, 1)), ("stride", (1, 0)), ("stride", (1, -1))])
def test_a_max_length_or_stride_below_one_is_refused_by_name(key, sizes):
    with pytest.raises(ConfigError, match=f"{key} is"):
        GPTDatasetV1("abc", Letters(), *sizes)


def test_end_of_text_is_a_token_for_a_raw_tiktoken_encoding_and_text_for_our_tokenizer():
    text = "one<|endoftext|>two"
    assert 50256 in GPTDatasetV1(text, load_tiktoken_encoding("gpt2"), 1, 1).token_ids
    assert 50256 not in GPTDatasetV1(text, get_tokenizer("gpt2"), 1, 1).token_ids


def test_a_tokenizer_of_another_library_works():
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(["abab"]), vocab_size=257)
    assert GPTDatasetV1("abc", trained, 1, 1).token_ids.tolist() == [256, 99]


def test_the_loader_needs_no_network(monkeypatch):
    def refuse(*_args):
        raise OSError("no network in this test")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (inputs, targets), *_ = create_dataloader_v1("Hello, world. " * 50, max_length=8, stride=8, shuffle=False)
    assert inputs.shape == targets.shape == (4, 8) and inputs[0, :3].tolist() == [15496, 11, 995]


def test_the_loader_has_the_books_defaults():
    loader = create_dataloader_v1("a" * 5000, tokenizer=Letters())
    assert (loader.batch_size, loader.drop_last, loader.num_workers) == (4, True, 0)
    assert (loader.dataset.max_length, loader.dataset.stride) == (256, 128)
    assert isinstance(loader.sampler, torch.utils.data.RandomSampler)


def test_the_loader_shuffles_like_the_books_loader_with_the_same_seed():
    text = "".join(map(chr, range(1000)))
    windows = [torch.tensor(pair) for pair in literal_windows(list(range(1000)), 16, 8)]
    torch.manual_seed(123)
    book = [
        batch.tolist() for batch in torch.utils.data.DataLoader(windows, batch_size=4, shuffle=True, drop_last=True)
    ]
    torch.manual_seed(123)
    ours = list(create_dataloader_v1(text, max_length=16, stride=8, tokenizer=Letters()))
    assert [torch.stack(batch, dim=1).tolist() for batch in ours] == book


def test_the_loader_keeps_an_incomplete_last_batch_if_drop_last_is_false():
    options = {"batch_size": 4, "max_length": 8, "stride": 8, "shuffle": False, "tokenizer": Letters()}
    text = "abcdefgh" * 10
    dropped = list(create_dataloader_v1(text, **options))
    kept = list(create_dataloader_v1(text, drop_last=False, **options))
    assert [len(inputs) for inputs, _ in dropped] == [4, 4]
    assert [len(inputs) for inputs, _ in kept] == [4, 4, 1]


WITH_WORKERS = """
from gptcore import create_dataloader_v1

class Letters:
    def encode(self, text):
        return [ord(letter) for letter in text]

options = {"batch_size": 4, "max_length": 8, "stride": 8, "shuffle": False, "drop_last": False}
loader = create_dataloader_v1("abcdefgh" * 10, num_workers=2, tokenizer=Letters(), **options)
print([len(inputs) for inputs, _ in loader])
"""


def test_the_loader_works_with_workers():
    # Run the loader in its own process: forked workers would inherit what other tests have left in this process.
    done = subprocess.run([sys.executable, "-c", WITH_WORKERS], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[4, 4, 1]\n", done.stderr


TOKENS = np.arange(1000, dtype=np.uint16)


def starts_of(batches: Batches, steps) -> list[int]:
    return [int(row[0]) for step in steps for inputs, _ in batches.make_micro_batches(step) for row in inputs]


@given(
    n=st.integers(20, 200),
    context=st.integers(1, 8),
    stride=st.integers(1, 8),
    batch_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_visits_each_window_at_most_once_and_drops_less_than_one_update(
    n, context, stride, batch_size, accumulation, seed
):
    total, per_step = num_windows(n, context, stride), batch_size * accumulation
    if total < per_step:
        return
    batches = Batches(TOKENS[:n], context, stride, batch_size, accumulation, seed)
    assert batches.steps_per_epoch == total // per_step
    assert batches.tokens_per_step == per_step * context
    for epoch in (0, 1):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        starts = starts_of(batches, steps)
        assert len(starts) == len(set(starts)) == total - total % per_step
        assert set(starts) <= set(range(0, n - context, stride))


def test_micro_batches_are_int64_windows_with_targets_one_token_later():
    micro_batches = Batches(TOKENS, 8, 3, batch_size=4, accumulation=3, seed=1).make_micro_batches(5)
    assert len(micro_batches) == 3
    for inputs, targets in micro_batches:
        assert inputs.shape == targets.shape == (4, 8) and inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(8)) and not (inputs[:, 0] % 3).any()


def test_a_batch_depends_only_on_the_seed_and_the_step():
    """Check that earlier calls and their order do not matter: a resumed training continues with the same batches."""
    steps = [0, 17, 40, 39, 3, 200, 0]
    one = Batches(TOKENS, 8, 8, 4, 1, seed=5)
    expected = {step: starts_of(Batches(TOKENS, 8, 8, 4, 1, seed=5), [step]) for step in steps}
    assert [starts_of(one, [step]) for step in steps] == [expected[step] for step in steps]


def test_feed_yields_the_batches_of_consecutive_steps_from_any_first_step():
    batches = Batches(np.arange(500, dtype=np.uint16), 8, 8, 4, 2, seed=3)
    here, there = feed(batches, 5, torch.device("cpu")), feed(batches, 5, torch.device("meta"))
    for step in range(5, 20):
        expected = [ids for pair in batches.make_micro_batches(step) for ids in pair]
        assert all(map(torch.equal, [ids for pair in next(here) for ids in pair], expected))
        copied = [ids for pair in next(there) for ids in pair]
        assert [(ids.shape, ids.device.type) for ids in copied] == [(ids.shape, "meta") for ids in expected]


def test_each_seed_and_each_epoch_has_its_own_order():
    orders = [
        tuple(starts_of(batches, range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)))
        for batches in (Batches(TOKENS, 8, 8, 4, 1, seed) for seed in (0, 1, 2**63 - 1))
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == 9
    assert len({frozenset(order) for order in orders}) == 1, "here every epoch visits all windows: 124 = 31 x 4"


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
    """Compute Philox-4x64-10 in plain integers: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"."""
    word = 2**64 - 1
    x = [counter >> (64 * i) & word for i in range(4)]
    for number in range(10):
        first, second = (k + number * weyl & word for k, weyl in zip(key, (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)))
        low, high = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [high >> 64 ^ x[1] ^ first, high & word, low >> 64 ^ x[3] ^ second, low & word]
    return x


def test_the_order_is_the_argsort_of_numbers_from_the_published_generator():
    """Pin the order: a release that changed the order would break every resumed and reproduced training."""
    assert philox_block(0, (0, 0))[0] == 0x16554D9ECA36314C, "the first known answer of Random123"
    stream = [word for counter in (1, 2, 3) for word in philox_block(counter, (123, 0))][:10]
    expected = sorted(range(10), key=stream.__getitem__)
    batches = Batches(TOKENS[:81], 8, 8, 5, 2, seed=123)
    assert [start // 8 for start in starts_of(batches, [0])] == expected == [9, 5, 1, 3, 2, 4, 7, 0, 8, 6]


def test_global_random_states_are_neither_read_nor_changed():
    torch.manual_seed(1)
    np.random.seed(1)
    first = starts_of(Batches(TOKENS, 8, 8, 4, 1, seed=0), range(40))
    after = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    assert after == (torch.rand(1).item(), np.random.rand())
    assert first == starts_of(Batches(TOKENS, 8, 8, 4, 1, seed=0), range(40))


def test_batches_of_a_memory_mapped_file_equal_those_of_the_array(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    for step in (0, 50):
        pairs = zip(
            Batches(mapped, 8, 4, 4, 2, 7).make_micro_batches(step),
            Batches(TOKENS, 8, 4, 4, 2, 7).make_micro_batches(step),
        )
        assert all(torch.equal(a, b) for (mine, other) in pairs for a, b in zip(mine, other))


def test_too_few_tokens_for_one_update_are_refused_with_the_counts():
    assert Batches(TOKENS[:41], 8, 8, 5, 1, 0).steps_per_epoch == 1
    with pytest.raises(CorpusError, match=r"train split has 40 tokens, but 5 windows of context_length 8 at stride 8 "):
        Batches(TOKENS[:40], 8, 8, 5, 1, 0)


def rows(batches) -> list[int]:
    return [int(row[0]) for inputs, _ in batches for row in inputs]


@given(n=st.integers(0, 120), context=st.integers(1, 8), batch_size=st.integers(1, 5))
def test_all_evaluation_windows_cover_the_tokens_once_in_order(n, context, batch_size):
    batches = make_eval_batches(TOKENS[:n], context, batch_size, None)
    assert rows(batches) == list(range(0, n - context, context))
    assert all(len(inputs) == batch_size for inputs, _ in batches[:-1])
    for inputs, targets in batches:
        assert torch.equal(targets, inputs + 1) and inputs.dtype == torch.int64 and inputs.shape[1] == context


@given(n=st.integers(10, 200), batch_size=st.integers(1, 5), num_batches=st.integers(1, 60))
def test_a_limited_number_of_evaluation_windows_is_spread_evenly_without_overlap(n, batch_size, num_batches):
    total = num_windows(n, 4, 4)
    starts = rows(make_eval_batches(TOKENS[:n], 4, batch_size, num_batches))
    assert len(starts) == min(total, batch_size * num_batches) and starts[0] == 0
    gaps = [(b - a) // 4 for a, b in itertools.pairwise(starts)] or [1]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert total - starts[-1] // 4 <= -(-total // len(starts)), "the last gap is not longer than the others"


def sized(tmp_path, train: int, val: int) -> Tokens:
    return Tokens(tmp_path, "0" * 64, 257, 256, "bytes", {"train": train, "val": val}, "1" * 64)


def test_splits_with_just_enough_tokens_pass(tmp_path):
    check_sizes(sized(tmp_path, 16 * 8 + 1, 9), context=8, stride=8, windows_per_update=16)
    check_sizes(sized(tmp_path, 8 + 15 * 2 + 1, 9), context=8, stride=2, windows_per_update=16)


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [
        (128, 9, "train split has 128 tokens, but 16 windows of context_length 8 at stride 8 need at least 129"),
        (0, 9, "train split has 0 tokens"),
        (129, 8, "val split has 8 tokens, but 1 window of context_length 8 at stride 8 need at least 9"),
    ],
)
def test_too_few_tokens_are_refused_with_the_split_the_counts_the_minimum_and_the_fix(tmp_path, train, val, says):
    with pytest.raises(CorpusError) as caught:
        check_sizes(sized(tmp_path, train, val), context=8, stride=8, windows_per_update=16)
    assert says in str(caught.value) and "model.context_length" in str(caught.value)
    assert ("train.batch_size" in str(caught.value)) == ("train split" in says)
