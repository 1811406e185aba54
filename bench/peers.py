"""The contenders: the training step and generation of gptcore and of other projects.

Each is built from gptcore's initial weights and makes the same step: loss, backward, gradient clipped to norm 1, AdamW,
the loss as a number. Each gets its best setting, which for all but the plain one includes AdamW's fused kernel:

- ours: `gptcore.train.update` as the trainer calls it, in a process that keeps the memory it frees, as the trainer's
  does. It generates with a KV cache. `ours+int8` is the same with 8-bit weights, and only generates.
- plain: plain.py with AdamW in the default form of `torch.optim.AdamW(...)`.
- hf: GPT2LMHeadModel of Hugging Face's transformers with its own loss, fused attention and PyTorch's GELU kernel.
- litgpt: its GPT and its own loss. It has no learned positions, so a quarter of each head is rotated (its default,
  which costs about as little). It begins from its own weights, so its losses are not comparable. Its vocabulary is
  padded to a multiple of 64, which is an option of litgpt. It has no dropout.
- nanogpt: model.py of a checkout, with the tanh form of GELU, so that the losses are equal. It generates without a
  cache, as plain does, and is not measured in generation.

hf and nanogpt have variants, which take part when they are named. `hf+padded` has a vocabulary padded with zeros to a
multiple of 64, as in nanoGPT's trainer: its losses are a little higher, and its head may be faster. `hf+compiled` uses
torch.compile, which takes most of a minute before the first step.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import plain
from bench.shapes import GRAD_CLIP, LEARNING_RATE, SEED, WEIGHT_DECAY, Shape, adamw
from gptcore.config import TrainConfig
from gptcore.generation.generate import generate_batch
from gptcore.generation.quantize import quantize
from gptcore.generation.sampling import Sampling
from gptcore.huggingface.gpt2 import to_huggingface
from gptcore.huggingface.weight_names import BOOK_LAYERS, count_layers
from gptcore.model.gpt import GPTModel
from gptcore.training import memory
from gptcore.training.loop import update_weights
from gptcore.training.state import TrainState

OURS, PLAIN, HF, LITGPT, NANOGPT = "ours", "plain", "hf", "litgpt", "nanogpt"
OURS_INT8 = "ours+int8"
PACKAGES = {HF: "transformers", LITGPT: "litgpt"}
"""The package that a peer needs."""
PADDED, COMPILED = "padded", "compiled"
VARIANTS = (PADDED, COMPILED)
"""Variants of hf and nanogpt, written after a plus sign."""
_MULTIPLE = 64
_EMBEDDING = "transformer.wte.weight"


class Contender(Protocol):
    """One model in training."""

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """Update the weights once with ids (batch, tokens) and return the loss before the update."""

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """Continue ids (batch, tokens) greedily; return ids (batch, tokens + max_new_tokens)."""


class Ours:
    """gptcore."""

    def __init__(self, shape: Shape, drop_rate: float) -> None:
        memory.keep_freed_memory()
        self.train = TrainConfig(
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            grad_clip=GRAD_CLIP,
            batch_size=shape.batch_size,
            threads=torch.get_num_threads(),
            device="cpu",
            precision="fp32",
            compile=False,
            seed=SEED,
        )
        self.state = TrainState.initial(shape.cfg(drop_rate), self.train)

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        return update_weights(self.state, [(inputs, targets)], LEARNING_RATE, self.train)[0]

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        new = generate_batch(self.state.model, idx.tolist(), max_new_tokens, Sampling(temperature=0))
        return torch.cat((idx, torch.tensor(new)), dim=1)


class OursInt8(Ours):
    """gptcore with rounded weights."""

    def __init__(self, shape: Shape, drop_rate: float) -> None:
        super().__init__(shape, drop_rate)
        quantize(self.state.model)


class Peer:
    """The model of another project, in the training loop that all peers share."""

    def __init__(self, model: nn.Module, fused: bool = True, compiled: bool = False) -> None:
        self.optimizer = adamw(model.parameters(), fused)
        self.model: Any = torch.compile(model.train()) if compiled else model.train()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        return loss.item()

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        raise NotImplementedError


class Plain(Peer):
    def __init__(self, shape: Shape, drop_rate: float) -> None:
        model = plain.GPTModel(shape.cfg(drop_rate))
        weights = first_weights(shape)
        model.load_state_dict({**weights, "out_head.weight": weights["tok_emb.weight"]})
        super().__init__(model, fused=False)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return plain.loss(self.model, inputs, targets)

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        return plain.generate(self.model.eval(), idx, max_new_tokens)


class HuggingFace(Peer):
    def __init__(self, shape: Shape, drop_rate: float, padding: int = 0, compiled: bool = False) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=shape.vocab_size + padding,
            n_positions=shape.context_length,
            n_embd=shape.emb_dim,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=drop_rate,
            embd_pdrop=drop_rate,
            attn_pdrop=drop_rate,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        model = GPT2LMHeadModel(config)
        load(model, as_gpt2(first_weights(shape), padding, transposed=True))
        super().__init__(model, compiled=compiled)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        mask = torch.ones_like(idx)
        return self.model.eval().generate(
            idx, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
        )


class LitGPT(Peer):
    def __init__(self, shape: Shape, drop_rate: float) -> None:
        from litgpt.config import Config
        from litgpt.model import GPT

        assert drop_rate == 0, "litgpt has no dropout"
        config = Config(
            block_size=shape.context_length,
            vocab_size=shape.vocab_size,
            padding_multiple=_MULTIPLE if shape.vocab_size > 1000 else 1,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.emb_dim,
            parallel_residual=False,
            attn_bias=True,
            gelu_approximate="tanh",
        )
        torch.manual_seed(SEED)
        model = GPT(config)
        model.apply(model._init_weights)
        model.transformer.wte.weight = model.lm_head.weight
        super().__init__(model)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        return chunked_cross_entropy(self.model(inputs), targets)

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        from litgpt.generate.base import batched_generate_fn
        from litgpt.generate.base import generate as generate_one

        model, (batch, tokens) = self.model.eval(), idx.shape
        model.clear_kv_cache()
        model.max_seq_length = tokens + max_new_tokens
        model.set_kv_cache(batch_size=batch)
        with torch.inference_mode():
            if batch == 1:
                return generate_one(model, idx[0], tokens + max_new_tokens, temperature=0.0)[None]
            sampling = {"temperature": 0.0}
            columns = batched_generate_fn(
                model, idx, tokens + max_new_tokens, sample_args=sampling, include_prompt=True, include_eos=True
            )
            return torch.stack([torch.cat([one.view(1) for one in column]) for column in columns], dim=1)


class NanoGPT(Peer):
    def __init__(
        self, checkout: Path, shape: Shape, drop_rate: float, padding: int = 0, compiled: bool = False
    ) -> None:
        spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.GPTConfig(
            block_size=shape.context_length,
            vocab_size=shape.vocab_size + padding,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.emb_dim,
            dropout=drop_rate,
            bias=True,
        )
        model = module.GPT(config)
        for block in model.transformer.h:
            block.mlp.gelu = nn.GELU(approximate="tanh")
        load(model, as_gpt2(first_weights(shape), padding, transposed=False))
        super().__init__(model, compiled=compiled)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, targets)[1]


def make(name: str, shape: Shape, drop_rate: float, nanogpt: str | None) -> Contender:
    """Return the contender of that name. `nanogpt` is the path of a checkout."""
    base, *variants = name.split("+")
    kinds: dict[str, Callable[..., Contender]] = {OURS: Ours, OURS_INT8: OursInt8, PLAIN: Plain, LITGPT: LitGPT}
    if name in kinds:
        return kinds[name](shape, drop_rate)
    kinds[HF] = HuggingFace
    if nanogpt is not None:
        kinds[NANOGPT] = functools.partial(NanoGPT, Path(nanogpt))
    if not variants:
        return kinds[base](shape, drop_rate)
    padding = -shape.vocab_size % _MULTIPLE if PADDED in variants else 0
    return kinds[base](shape, drop_rate, padding, COMPILED in variants)


def is_known(name: str) -> bool:
    """Whether the name is that of a contender, even if its package is not installed."""
    base, *variants = name.split("+")
    if base in (HF, NANOGPT):
        return set(variants) <= set(VARIANTS)
    return base in (OURS, PLAIN, LITGPT) and not variants


def has_our_losses(name: str) -> bool:
    """Whether the contender is the same function of the same weights, so that its losses must equal ours."""
    base, *variants = name.split("+")
    return base != LITGPT and PADDED not in variants


def first_weights(shape: Shape) -> dict[str, Tensor]:
    """Return the initial weights of ours."""
    torch.manual_seed(SEED)
    return GPTModel(shape.cfg(0.0)).state_dict()


def as_gpt2(weights: Mapping[str, Tensor], padding: int, transposed: bool) -> dict[str, Tensor]:
    """Rename gptcore's weights as GPT-2's published ones; `transposed` turns the matrices of the blocks.

    `padding` rows of zeros are added to the embedding.
    """
    named = to_huggingface(weights, {"n_layers": count_layers(weights, BOOK_LAYERS)})
    named[_EMBEDDING] = F.pad(named[_EMBEDDING], (0, 0, 0, padding))
    if transposed:
        return named
    matrices = [name for name in named if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]
    return {**named, **{name: named[name].t().contiguous() for name in matrices}}


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load all weights that a GPT-2 learns. Its head is its embedding and has no entry of its own."""
    found = model.load_state_dict(weights, strict=False)
    missing = set(found.missing_keys) - {"lm_head.weight"}
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)
