"""The book's API as programs use it, and models that users changed.

Loss and gradients always equal those of plain cross-entropy on the logits.
"""

import copy
import inspect
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import gptcore
from gptcore import (
    GPTDatasetV1,
    GPTModel,
    calc_loss_batch,
    calc_loss_loader,
    create_dataloader_v1,
    evaluate_model,
    generate_and_print_sample,
    generate_text_simple,
    plot_losses,
    text_to_token_ids,
    token_ids_to_text,
    train_model_simple,
)
from gptcore.errors import ConfigError
from gptcore.tokens.tokenizer import load_tiktoken_encoding
from tests.tiny import TINY_CFG

TEXT = "The old man looked at the sea. He said nothing, and the sea said nothing to him. " * 6
CFG = {**TINY_CFG, "vocab_size": 301, "emb_dim": 32, "n_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tiktoken_encoding("gpt2")


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(123)
    return GPTModel(CFG)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(301, (3, 17), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


# The book's signatures and examples.


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "GPTDatasetV1": "txt tokenizer max_length stride",
        "create_dataloader_v1": "txt batch_size max_length stride shuffle drop_last num_workers",
        "MultiHeadAttention": "d_in d_out context_length dropout num_heads qkv_bias",
        "LayerNorm": "emb_dim",
        "GELU": "",
        "FeedForward": "cfg",
        "TransformerBlock": "cfg",
        "GPTModel": "cfg",
        "calc_loss_batch": "input_batch target_batch model device",
        "calc_loss_loader": "data_loader model device num_batches",
        "evaluate_model": "model train_loader val_loader device eval_iter",
        "generate_text_simple": "model idx max_new_tokens context_size",
        "generate": "model idx max_new_tokens context_size temperature top_k eos_id",
        "load_weights_into_gpt": "gpt params",
        "text_to_token_ids": "text tokenizer",
        "token_ids_to_text": "token_ids tokenizer",
        "generate_and_print_sample": "model tokenizer device start_context",
        "train_model_simple": "model train_loader val_loader optimizer device num_epochs eval_freq eval_iter "
        "start_context tokenizer",
        "plot_losses": "epochs_seen tokens_seen train_losses val_losses",
    }.items(),
)
def test_the_signatures_are_those_of_the_book(name, parameters):
    value = getattr(gptcore, name)
    given = inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters
    positional = [p.name for p in given.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    assert positional == parameters.split()


def test_the_examples_of_the_book_run_one_after_another(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    txt = TEXT * 4
    dataset = GPTDatasetV1(txt, tokenizer, max_length=256, stride=128)
    assert [part.shape for part in dataset[0]] == [(256,), (256,)]
    cfg = {
        "vocab_size": 50257,
        "emb_dim": 768,
        "context_length": 256,
        "n_heads": 12,
        "n_layers": 12,
        "drop_rate": 0.1,
        "qkv_bias": True,
    }
    torch.manual_seed(123)
    model = GPTModel(cfg)
    device = torch.device("cpu")
    start_context = "Once upon a time"
    generate_and_print_sample(model, tokenizer, device, start_context)
    written = capsys.readouterr().out
    assert written.startswith(start_context) and written.count("\n") == 1
    assert model.training
    train_loader = DataLoader(dataset, batch_size=1)
    val_loader = create_dataloader_v1(txt, batch_size=1, max_length=64, stride=400, shuffle=False)
    train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter=1)
    assert 10 < train_loss < 12 and 10 < val_loss < 12  # ln 50257 is 10.82
    epochs_seen, tokens_seen, train_losses, val_losses = [0, 1], [0, 512], [train_loss, 9.0], [val_loss, 9.5]
    plot_losses(epochs_seen, tokens_seen, train_losses, val_losses)
    assert [path.read_bytes()[:5] for path in tmp_path.glob("*.pdf")] == [b"%PDF-"]


def test_the_books_training_loop_learns_and_returns_losses_and_tokens_seen(tokenizer, capsys):
    torch.manual_seed(123)
    model = GPTModel({**CFG, "vocab_size": 50257, "drop_rate": 0.1})
    train_loader = create_dataloader_v1(TEXT, batch_size=2, max_length=16, stride=16, drop_last=True, shuffle=True)
    val_loader = create_dataloader_v1(TEXT, batch_size=2, max_length=16, stride=16, drop_last=False, shuffle=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004, weight_decay=0.1)
    updates = 3 * len(train_loader)
    train_losses, val_losses, tokens_seen = train_model_simple(
        model,
        train_loader,
        val_loader,
        optimizer,
        torch.device("cpu"),
        num_epochs=3,
        eval_freq=2,
        eval_iter=1,
        start_context="The old man",
        tokenizer=tokenizer,
    )
    assert len(train_losses) == len(val_losses) == len(tokens_seen) == (updates + 1) // 2
    assert tokens_seen == [32 * (2 * i + 1) for i in range(len(tokens_seen))]
    assert val_losses[-1] < val_losses[0] - 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Ep 1 (Step 000000): Train loss ")
    assert sum(line.startswith("The old man") for line in lines) == 3


def test_a_prompt_is_encoded_continued_by_a_model_and_decoded(tokenizer):
    model = GPTModel({**CFG, "vocab_size": 50257}).eval()
    ids = text_to_token_ids("Every effort moves you", tokenizer)
    assert ids.tolist() == [[6109, 3626, 6100, 345]]  # as printed in the book's chapters 4 and 5
    out = generate_text_simple(model=model, idx=ids, max_new_tokens=10, context_size=16)
    assert out.shape == (1, 14)
    assert token_ids_to_text(out, tokenizer).startswith("Every effort moves you")


def book_generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None):
    """Generate as chapter 5 of the book does."""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1, :]
        if top_k is not None:
            smallest = torch.topk(logits, top_k)[0][:, -1]
            logits = torch.where(logits < smallest, torch.tensor(float("-inf")), logits)
        if temperature > 0.0:
            following = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        else:
            following = torch.argmax(logits, dim=-1, keepdim=True)
        if following == eos_id:
            break
        idx = torch.cat((idx, following), dim=1)
    return idx


def test_the_books_generate_draws_the_books_ids_from_the_global_random_state(model):
    model.eval()
    prompt = torch.tensor([[3, 1, 4]])
    free = book_generate(model, prompt, 20, 16)
    for settings in ({}, {"temperature": 1.4, "top_k": 25}, {"temperature": 0.7}, {"eos_id": int(free[0, 9])}):
        torch.manual_seed(123)
        expected = book_generate(model, prompt, 20, 16, **settings)
        torch.manual_seed(123)
        assert torch.equal(gptcore.generate(model, prompt, 20, 16, **settings), expected)
    assert gptcore.generate(model, torch.tensor([[1], [2]]), 4, 16, 1.0, 10**9).shape == (2, 5)
    with pytest.raises(ConfigError, match="top_k is 0"):
        gptcore.generate(model, prompt, 1, 16, top_k=0)


def test_generate_stays_callable_after_an_earlier_release_has_imported_the_module_of_that_name(model, monkeypatch):
    module = import_module("gptcore.generate")  # as the code that MLflow keeps beside old versions does
    monkeypatch.setitem(gptcore.__dict__, "generate", module)
    assert module.TextStream.__name__ == "TextStream"
    assert gptcore.generate(model.eval(), torch.tensor([[1]]), 2, 16).shape == (1, 3)


def test_openais_weights_load_as_in_the_book():
    model = GPTModel({**CFG, "qkv_bias": True}).eval()
    draw = np.random.default_rng(0).standard_normal
    layer = lambda ins, outs: {"w": draw((ins, outs), np.float32), "b": draw(outs, np.float32)}  # noqa: E731
    norm = lambda: {"g": draw(32, np.float32), "b": draw(32, np.float32)}  # noqa: E731
    blocks = [
        {
            "attn": {"c_attn": layer(32, 96), "c_proj": layer(32, 32)},
            "mlp": {"c_fc": layer(32, 128), "c_proj": layer(128, 32)},
            "ln_1": norm(),
            "ln_2": norm(),
        }
        for _ in range(CFG["n_layers"])
    ]
    params = {"wte": draw((301, 32), np.float32), "wpe": draw((16, 32), np.float32), "blocks": blocks, **norm()}
    gptcore.load_weights_into_gpt(model, params)
    attention = model.trf_blocks[1].att
    fused = torch.from_numpy(blocks[1]["attn"]["c_attn"]["w"])  # (emb_dim, 3 * emb_dim)
    x = torch.randn(5, 32)
    joined = [linear(x) - linear.bias for linear in (attention.W_query, attention.W_key, attention.W_value)]
    torch.testing.assert_close(torch.cat(joined, dim=1), x @ fused, rtol=1e-4, atol=1e-4)
    assert np.array_equal(model.trf_blocks[0].ff.layers[2].bias.detach(), blocks[0]["mlp"]["c_proj"]["b"])
    assert np.array_equal(model.out_head.weight.detach(), params["wte"]) and not model.is_tied
    assert np.array_equal(model.final_norm.scale.detach(), params["g"])
    with pytest.raises(ConfigError, match=r"att.W_key.bias is \(32,\) in params and absent in the model.*qkv_bias"):
        gptcore.load_weights_into_gpt(GPTModel(CFG), params)


class BookAttention(gptcore.MultiHeadAttention):
    """The book's, which stores its mask."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.triu(torch.ones(16, 16), diagonal=1))

    _load_from_state_dict = nn.Module._load_from_state_dict


class BookModel(nn.Module):
    """A model of the book's shape, without any attribute that the book's does not have."""

    def __init__(self, vocab_size: int = 301) -> None:
        super().__init__()
        inner = GPTModel({**CFG, "vocab_size": vocab_size})
        self.tok_emb, self.pos_emb, self.drop_emb = inner.tok_emb, inner.pos_emb, inner.drop_emb
        self.trf_blocks, self.final_norm, self.out_head = inner.trf_blocks, inner.final_norm, inner.out_head
        for block in self.trf_blocks:
            block.att = BookAttention(32, 32, 16, 0.0, 4)

    def forward(self, in_idx):
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(in_idx.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(self.drop_emb(x))))


def test_our_weights_load_into_the_books_model_and_its_weights_into_ours(model, batch):
    book = BookModel()
    with pytest.raises(RuntimeError, match="mask"):
        book.load_state_dict(model.state_dict())
    book.load_state_dict({**book.state_dict(), **model.state_dict()})  # as README.md says
    assert torch.allclose(book(batch[0]), model(batch[0]), atol=1e-6)
    other = GPTModel(CFG)
    other.load_state_dict(book.state_dict())
    assert torch.equal(other(batch[0]), model(batch[0]))


class Bigram(nn.Module):
    """The smallest model of the book's shape, without a limit on its context."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50257, 4)
        self.head = nn.Linear(4, 50257)

    def forward(self, in_idx):
        return self.head(self.table(in_idx))


@pytest.mark.parametrize("make", [lambda: BookModel(50257), lambda: nn.Sequential(BookModel(50257)), Bigram])
def test_the_training_loop_takes_any_module_of_the_books_shape(tokenizer, capsys, make):
    model, loader = make(), create_dataloader_v1(TEXT, batch_size=4, max_length=16, stride=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_model_simple(model, loader, loader, optimizer, "cpu", 1, 5, 1, "The old man " * 9, tokenizer)
    assert "\nThe old man" in capsys.readouterr().out


# Changes that users make to a model.


def plain_loss(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def assert_answers_as_plain(model: nn.Module, batch, atol: float = 1e-5) -> None:
    """Check that loss and gradients equal those of cross-entropy on the logits, before and after a step of SGD."""
    for _ in range(2):
        found = []
        for loss_of in (lambda: plain_loss(model, batch), lambda: calc_loss_batch(*batch, model, "cpu")):
            model.zero_grad()
            loss = loss_of()
            loss.backward()
            found.append((loss.item(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]))
        (expected, expected_grads), (ours, grads) = found
        assert abs(ours - expected) < atol
        for mine, theirs in zip(grads, expected_grads):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(mine, theirs, atol=atol)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()


class LoRA(nn.Module):
    """A linear layer with LoRA, as in the book's appendix E."""

    def __init__(self, linear: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.randn(linear.in_features, rank) / rank)
        self.B = nn.Parameter(torch.randn(rank, linear.out_features) * 0.1)
        self.alpha = alpha

    def forward(self, x):
        return self.linear(x) + self.alpha * (x @ self.A @ self.B)


def wrap_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, LoRA(child))
        else:
            wrap_linears(child)


def test_an_unchanged_model_has_the_loss_of_plain_cross_entropy(model, batch):
    assert_answers_as_plain(model, batch)


def test_linear_layers_wrapped_with_lora_are_called_and_learn(model, batch):
    before = model(batch[0])
    for p in model.parameters():
        p.requires_grad_(False)
    wrap_linears(model)
    assert not torch.allclose(model(batch[0]), before, atol=1e-2)
    assert_answers_as_plain(model, batch)
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 2 * (6 * 2 + 1)
    assert all(name.endswith((".A", ".B")) for name in trained)


@pytest.mark.parametrize("part", ["W_query", "W_key", "W_value", "out_proj"])
def test_wrapping_one_projection_changes_the_logits(model, batch, part):
    before = model(batch[0])
    attention = model.trf_blocks[1].att
    setattr(attention, part, LoRA(getattr(attention, part)))
    assert not torch.allclose(model(batch[0]), before, atol=1e-3)
    assert_answers_as_plain(model, batch)


@pytest.mark.parametrize(
    "head",
    [
        lambda: nn.Linear(32, 40, bias=True),
        lambda: nn.Linear(32, 40, bias=False),
        lambda: nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 40)),
    ],
)
def test_a_replaced_head_is_used(model, batch, head):
    model.out_head = head()
    inputs, targets = batch
    assert model(inputs).shape == (3, 16, 40)
    assert_answers_as_plain(model, (inputs, targets % 40))


def test_the_forward_of_a_subclass_is_used(batch):
    class Sharper(GPTModel):
        def forward(self, in_idx):
            return 3 * super().forward(in_idx)

    torch.manual_seed(0)
    model = Sharper(CFG)
    assert_answers_as_plain(model, batch)
    assert calc_loss_batch(*batch, model, "cpu").item() != pytest.approx(
        F.cross_entropy(GPTModel.forward(model, batch[0]).flatten(0, 1), batch[1].flatten()).item(), abs=1e-3
    )


def on_model(model):
    model.register_forward_hook(lambda module, args, logits: logits * 2)


def before_head(model):
    model.out_head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def on_head(model):
    model.out_head.register_forward_hook(lambda module, args, logits: logits.roll(1, -1))


def on_norm(model):
    model.final_norm.register_forward_hook(lambda module, args, hidden: hidden * 0.5)


def gradient_of_head(model):
    model.out_head.register_full_backward_hook(lambda module, inner, outer: (inner[0] * 3,))


def gradient_of_weight(model):
    model.out_head.weight.register_hook(lambda gradient: gradient * 7)


def own_forward(model):
    usual = model.out_head.forward
    model.out_head.forward = lambda x: usual(x) * 2


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.out_head)


def pruned(model):
    prune.l1_unstructured(model.out_head, "weight", amount=0.5)


def computed_weight(model):
    weight = nn.Parameter(model.out_head.weight.detach().clone())
    del model.out_head.weight
    model.doubled = weight
    model.out_head.weight = weight * 2  # a plain tensor with an autograd history, not a Parameter


@pytest.mark.parametrize(
    "touch",
    [
        *(on_model, before_head, on_head, on_norm, gradient_of_head),
        *(gradient_of_weight, own_forward, weight_norm, pruned),
    ],
)
def test_hooks_and_parametrisations_are_honoured(model, batch, touch):
    plain = copy.deepcopy(model)
    touch(model)
    assert_answers_as_plain(model, batch)
    changed = [
        not torch.allclose(a, b, atol=1e-6)
        for a, b in zip(gradients(plain, batch), gradients(model, batch))
        if a.shape == b.shape
    ]
    assert any(changed) or touch is weight_norm  # weight_norm changes nothing until the model is trained


def gradients(model, batch) -> list[torch.Tensor]:
    calls = calc_loss_batch(*batch, model, "cpu")
    return list(torch.autograd.grad(calls, list(model.parameters())))


def test_a_computed_head_weight_keeps_its_autograd_history(model, batch):
    computed_weight(model)
    (gradient,) = torch.autograd.grad(calc_loss_batch(*batch, model, "cpu"), model.doubled, retain_graph=True)
    (expected,) = torch.autograd.grad(plain_loss(model, batch), model.doubled)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_a_global_hook_is_called_by_the_head(model, batch):
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(type(module)))
    try:
        calc_loss_batch(*batch, model, "cpu")
    finally:
        handle.remove()
    assert called[-1] is GPTModel
    assert called.count(nn.Linear) == 6 * 2 + 1


@pytest.mark.parametrize("frozen", ["tok_emb", "trf_blocks", "out_head", "final_norm"])
def test_frozen_parts_get_no_gradient(model, batch, frozen):
    model.get_submodule(frozen).requires_grad_(False)
    assert_answers_as_plain(model, batch)
    assert all(p.grad is None for p in model.get_submodule(frozen).parameters())


def test_parameters_assigned_by_a_gpt2_loader_are_used_even_if_tied(model, batch):
    def assign(left, right):
        assert left.shape == right.shape
        return nn.Parameter(right.clone().detach())

    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(301, 32, generator=generator) * 0.3
    fused = torch.randn(96, 32, generator=generator) * 0.3
    model.tok_emb.weight = assign(model.tok_emb.weight, vectors)
    model.out_head.weight = assign(model.out_head.weight, vectors)
    attention = model.trf_blocks[0].att
    for part, weight in zip(("W_query", "W_key", "W_value"), fused.chunk(3)):
        linear = getattr(attention, part)
        linear.weight = assign(linear.weight, weight)
    model.final_norm.scale = assign(model.final_norm.scale, torch.full((32,), 2.0))
    assert_answers_as_plain(model, batch)
    model.out_head.weight = model.tok_emb.weight
    assert len(list(model.parameters())) == len(list(GPTModel(CFG).parameters())) - 1
    assert_answers_as_plain(model, batch)


def test_autograd_grad_agrees_and_does_not_set_the_grad_of_parameters(model, batch):
    parameters = list(model.parameters())
    ours = torch.autograd.grad(calc_loss_batch(*batch, model, "cpu"), parameters)
    expected = torch.autograd.grad(plain_loss(model, batch), parameters)
    assert all(p.grad is None for p in parameters)
    for mine, theirs in zip(ours, expected):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_gradient_of_a_sum_of_losses_is_the_sum_of_their_gradients(model, batch):
    other = (batch[0].flip(0), batch[1].flip(1))
    total = calc_loss_batch(*batch, model, "cpu") + 2 * calc_loss_batch(*other, model, "cpu")
    expected = plain_loss(model, batch) + 2 * plain_loss(model, other)
    parameters = list(model.parameters())
    for mine, theirs in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters)):
        assert torch.allclose(mine, theirs, atol=1e-5)


class SignDescent(torch.optim.Optimizer):
    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.01 * p.grad.sign()
        return loss


@pytest.mark.parametrize("kind", [SignDescent, lambda parameters: torch.optim.LBFGS(parameters, max_iter=3)])
def test_a_custom_optimizer_reaches_the_same_losses(model, batch, kind):
    twin = copy.deepcopy(model)
    histories = []
    for trained, loss_of in (
        (model, lambda m: calc_loss_batch(*batch, m, "cpu")),
        (twin, lambda m: plain_loss(m, batch)),
    ):
        optimizer = kind(trained.parameters())
        history = []

        def closure(trained=trained, loss_of=loss_of, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(trained)
            loss.backward()
            return loss

        for _ in range(4):
            history.append(optimizer.step(closure).item())
        histories.append(history)
    assert histories[0] == pytest.approx(histories[1], rel=2e-3)
    assert histories[0][-1] < histories[0][0]


def test_any_module_that_maps_ids_to_logits_has_a_loss(batch):
    bigram = nn.Embedding(301, 301)
    assert_answers_as_plain(bigram, batch)
    assert calc_loss_loader([batch], bigram, "cpu") == pytest.approx(plain_loss(bigram, batch).item(), abs=1e-5)


def test_a_model_inside_another_module_has_a_loss(model, batch):
    assert_answers_as_plain(nn.Sequential(model), batch)


def test_targets_of_minus_100_are_ignored_as_in_the_books_chapter_7(model, batch):
    inputs, targets = batch
    targets = targets.clone()
    targets[0, 4:] = -100
    targets[2] = -100
    assert_answers_as_plain(model, (inputs, targets))


def test_a_model_in_double_precision_has_the_loss_of_plain_cross_entropy(model, batch):
    assert_answers_as_plain(model.double(), batch, atol=1e-10)


def test_weights_tied_by_hand_can_be_loaded_again(model, batch, tmp_path):
    model.out_head.weight = model.tok_emb.weight
    torch.save(model.state_dict(), tmp_path / "model.pth")
    for is_tied in (False, True):
        other = GPTModel(CFG)
        if is_tied:
            other.out_head.weight = other.tok_emb.weight
        other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
        assert torch.equal(other(batch[0]), model(batch[0]))


def test_the_loss_of_a_step_compiles_as_one_graph(model, batch):
    compiled = torch.compile(lambda: calc_loss_batch(*batch, model, "cpu"), backend="eager", fullgraph=True)
    losses = (compiled(), plain_loss(model, batch))
    ours, expected = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    for mine, theirs in zip(ours, expected):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_the_package_lists_the_books_names_and_nothing_else():
    assert [name for name in dir(gptcore) if not name.startswith("__")] == sorted(gptcore.__all__)


def test_a_copied_or_reloaded_model_gives_the_same_logits(model, batch, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other = GPTModel(CFG)
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert torch.equal(other(batch[0]), model(batch[0]))
    assert torch.equal(copy.deepcopy(model)(batch[0]), model(batch[0]))
