"""The model: the book's GPT-2 (chapters 3 and 4), with a choice of newer components.

Names, creation order and initial values of the parameters are the book's. So the book's state dicts load here, and the
same random seed gives the same model. Further keys of the cfg choose other components; their defaults are the book's.
Attention is in attention.py, the loss in loss.py, and sampling in gptcore/generation.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.components import COMPONENTS
from gptcore.errors import ConfigError
from gptcore.model.attention import MultiHeadAttention, Rotary, check_length
from gptcore.model.overrides import is_untouched

_COUNTS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")


def is_untouched_gpt(model: nn.Module, *others: type[nn.Module]) -> bool:
    """Whether `model` is a GPTModel with no module replaced, added or hooked, so that it may be run layer by layer.

    Each place must have a module of the class that belongs there. In the places of linear layers, modules of the
    classes `others` are accepted too. The attention of all blocks must have the same shape.
    """
    if type(model) is not GPTModel:
        return False
    places = _list_places(model, (nn.Linear, *others))
    if not all(type(module) in kinds and is_untouched(module, type(module)) for module, kinds in places):
        return False
    attentions = [cast(TransformerBlock, block).att for block in model.trf_blocks]
    if any(attention.context_length < model.context_length for attention in attentions):
        return False
    if len({(attention.num_heads, attention.head_dim, attention.rotary is None) for attention in attentions}) > 1:
        return False
    rotations = [(attention.rotary.cos, attention.rotary.sin) for attention in attentions if attention.rotary]
    return all(torch.equal(*pair) for rotation in rotations[1:] for pair in zip(rotation, rotations[0]))


Kinds = tuple[type[nn.Module], ...]


def _list_places(model: "GPTModel", linears: Kinds) -> Iterator[tuple[nn.Module, Kinds]]:
    """Yield every module that `GPTModel.forward` calls, each with the classes that it may have.

    A place that is filled in another way has no class. The caller stops at the first module of another class.
    """
    yield model.tok_emb, (nn.Embedding,)
    if model.pos_emb is not None:
        yield model.pos_emb, (nn.Embedding,)
        if model.pos_emb.max_norm is not None:
            yield model.pos_emb, ()
    if model.emb_norm is not None:
        yield model.emb_norm, (RMSNorm,)
    yield model.drop_emb, (nn.Dropout,)
    yield model.final_norm, (LayerNorm, RMSNorm)
    yield model.out_head, linears
    yield model.trf_blocks, (nn.Sequential,)
    if not len(model.trf_blocks):
        yield model.trf_blocks, ()
    for block in cast("Sequence[TransformerBlock]", model.trf_blocks):
        yield block, (TransformerBlock,)
        yield from ((norm, (LayerNorm, RMSNorm)) for norm in (block.norm1, block.norm2))
        yield block.drop_shortcut, (nn.Dropout,)
        yield block.att, (MultiHeadAttention,)
        yield from ((getattr(block.att, name), linears) for name in ("W_query", "W_key", "W_value", "out_proj"))
        yield block.att.dropout, (nn.Dropout,)
        if block.att.rotary is not None:
            yield block.att.rotary, (Rotary,)
        yield block.ff, (FeedForward,)
        layers = block.ff.layers
        yield layers, (nn.Sequential,)
        if len(layers) != 3:
            yield layers, ()
        yield from zip(layers, (linears, (GELU, SquaredReLU), linears))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module of `model` to eval mode, and on exit switch each one back to its earlier mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class LayerNorm(nn.Module):
    """Normalise each token's features to mean 0 and variance 1, then apply a learned scale and shift."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class RMSNorm(nn.Module):
    """Scale each token's features to mean square 1. Nothing is learned (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return F.rms_norm(x, x.shape[-1:])


class GELU(nn.Module):
    """The tanh approximation of GELU that GPT-2 was trained with (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, element by element."""
        return F.gelu(x, approximate="tanh")


class SquaredReLU(nn.Module):
    """The square of ReLU (So et al. 2021, "Primer", arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, element by element."""
        return F.relu(x).square()


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, where the width is four times as large."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Read `emb_dim` and, if given, `activation` and `bias` from `cfg`. Raises ConfigError as GPTModel does."""
        super().__init__()
        _check(cfg, "emb_dim")
        width, components = cfg["emb_dim"], read_components(cfg)
        inner, bias = 4 * width, components["bias"]
        activation = {"gelu": GELU, "relu2": SquaredReLU}[components["activation"]]
        self.layers = nn.Sequential(nn.Linear(width, inner, bias), activation(), nn.Linear(inner, width, bias))

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network, each with a norm before it and a shortcut around it."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Read all keys of `cfg` except `vocab_size` and `n_layers`. Raises ConfigError as GPTModel does."""
        super().__init__()
        _check(cfg, "context_length", "emb_dim", "n_heads", "drop_rate", "qkv_bias")
        components = read_components(cfg)
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
            out_bias=components["bias"],
            rotary=components["positions"] == "rotary",
            qk_norm=components["qk_norm"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = _build_norm(cfg)
        self.norm2 = _build_norm(cfg)
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, emb_dim) -> (batch, tokens, emb_dim)."""
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """A GPT: takes token ids and returns the logits of the next token.

    model = GPTModel({"vocab_size": 50257, "context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 4,
                      "drop_rate": 0.1, "qkv_bias": False})
    logits = model(torch.zeros(1, 5, dtype=torch.int64))  # (1, 5, 50257)
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Build the model from `cfg`, the book's dict.

        It has the keys vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate and qkv_bias, and may have
        keys of COMPONENTS. Other keys are ignored. Raises ConfigError with the key that is missing, out of range or
        contradicts another.
        """
        super().__init__()
        _check(cfg, *_COUNTS, "drop_rate", "qkv_bias")
        width, components = cfg["emb_dim"], read_components(cfg)
        self.context_length = cfg["context_length"]
        self.tok_emb = nn.Embedding(cfg["vocab_size"], width)
        self.pos_emb = nn.Embedding(self.context_length, width) if components["positions"] == "learned" else None
        self.emb_norm = RMSNorm() if components["emb_norm"] else None
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*(TransformerBlock(cfg) for _ in range(cfg["n_layers"])))
        self.final_norm = _build_norm(cfg)
        self.out_head = nn.Linear(width, cfg["vocab_size"], bias=False)
        self._is_tied_by_cfg: bool = components["tied"]
        if components["tied"]:
            self.tok_emb.weight = self.out_head.weight  # the head's, because its initial values are smaller
        initialise(self, components["init"])

    def forward(self, in_idx: Tensor) -> Tensor:
        """Compute logits: ids (batch, tokens) -> (batch, tokens, vocab_size).

        Raises ConfigError if there are more tokens than the context length, and on the CPU if an id is outside the
        vocabulary. On a GPU, that check would cost a synchronisation per call; CUDA's own assertion reports such an id.
        """
        return self.out_head(self.compute_hidden(in_idx))

    def compute_hidden(self, in_idx: Tensor) -> Tensor:
        """Compute what the head gets: ids (batch, tokens) -> (batch, tokens, emb_dim). Raises as `forward` does."""
        check_length(in_idx.shape[1], self.context_length)
        x = self.embed(in_idx)  # (batch, tokens, emb_dim)
        if self.pos_emb is not None:
            x = x + self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device))  # + (tokens, emb_dim)
        if self.emb_norm is not None:
            x = self.emb_norm(x)
        return self.final_norm(self.trf_blocks(self.drop_emb(x)))

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding are one matrix (Press & Wolf 2017, arXiv:1608.05859)."""
        return self.out_head.weight is self.tok_emb.weight

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Return the state as any module does, but with a matrix that the cfg ties only once, as `tok_emb.weight`.

        A matrix that was tied by hand has both names, so that a model of the same cfg loads the state.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self._is_tied_by_cfg and self.is_tied:
            del state[f"{prefix}out_head.weight"]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.is_tied and (name := f"{prefix}tok_emb.weight") in state_dict:
            state_dict.setdefault(f"{prefix}out_head.weight", state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def embed(self, in_idx: Tensor) -> Tensor:
        """Embed ids (batch, tokens) -> (batch, tokens, emb_dim), without positions. Raises as `forward` does."""
        try:
            return self.tok_emb(in_idx)
        except IndexError:
            vocab_size = len(self.tok_emb.weight)
            wrong = in_idx[(in_idx < 0) | (in_idx >= vocab_size)]
            if not len(wrong):
                raise
            raise ConfigError(
                f"token id {int(wrong[0])} is outside the model's vocabulary of {vocab_size} ids; "
                "encode the text with the tokenizer that the model was built for."
            ) from None


def initialise(model: GPTModel, scheme: str) -> None:
    """Set the initial weights of the model by one of three schemes.

    `pytorch` keeps the weights that PyTorch gave the layers, as the book does. `gpt2` draws from a normal distribution
    with standard deviation 0.02 and sets biases to 0. The layers that write into the residual stream get smaller
    weights, the deeper the model (Radford et al. 2019, section 2.3). `zero` sets the layers that write into the
    residual stream to 0, so that every block begins as the identity (Bachlechner et al. 2021, arXiv:2003.04887). It
    also sets an untied head to 0, so that all tokens begin equally likely. It sets biases to 0, draws embeddings as
    `gpt2` does, and draws the other matrices from a uniform distribution with standard deviation 1/sqrt(fan-in).
    """
    if scheme == "pytorch":
        return
    blocks = cast("Sequence[TransformerBlock]", model.trf_blocks)
    outputs = {id(layer) for block in blocks for layer in (block.att.out_proj, block.ff.layers[2])}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if module is model.out_head and model.is_tied:
            continue
        if isinstance(module, nn.Embedding) or (scheme == "gpt2" and isinstance(module, nn.Linear)):
            shrink = (2 * len(model.trf_blocks)) ** -0.5 if id(module) in outputs else 1.0
            nn.init.normal_(module.weight, std=0.02 * shrink)
        elif isinstance(module, nn.Linear):
            if id(module) in outputs or module is model.out_head:
                nn.init.zeros_(module.weight)
            else:
                bound = (3 / module.in_features) ** 0.5  # a uniform distribution on +-bound has deviation bound/sqrt(3)
                nn.init.uniform_(module.weight, -bound, bound)


def read_components(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option that `cfg` chooses for each component, the book's by default.

    Raises ConfigError if COMPONENTS does not have the option.
    """
    components = {key: cfg.get(key, options[0]) for key, options in COMPONENTS.items()}
    for key, value in components.items():
        if value not in COMPONENTS[key]:
            raise ConfigError(
                f"the model's cfg has {key} {value!r}; it must be one of {', '.join(map(str, COMPONENTS[key]))}."
            )
    return components


def _build_norm(cfg: Mapping[str, Any]) -> nn.Module:
    return LayerNorm(cfg["emb_dim"]) if read_components(cfg)["norm"] == "layer" else RMSNorm()


def _check(cfg: Mapping[str, Any], *keys: str) -> None:
    missing = [key for key in keys if key not in cfg]
    if missing:
        raise ConfigError(f"the model's cfg lacks {', '.join(missing)}; it needs {', '.join(keys)}.")
    for key in keys:
        if key in _COUNTS and (isinstance(cfg[key], bool) or not isinstance(cfg[key], Integral) or cfg[key] < 1):
            raise ConfigError(f"the model's cfg has {key} {cfg[key]!r}; it must be a whole number, at least 1.")
    if "drop_rate" in keys and not (isinstance(cfg["drop_rate"], int | float) and 0 <= cfg["drop_rate"] <= 1):
        raise ConfigError(f"the model's cfg has drop_rate {cfg['drop_rate']!r}; it must lie between 0 and 1.")
    if "n_heads" in keys and cfg["emb_dim"] % cfg["n_heads"]:
        raise ConfigError(
            f"the model's cfg has emb_dim {cfg['emb_dim']}, which is not divisible by n_heads {cfg['n_heads']}."
        )
