"""The model: a GPT-2 in the words of Raschka's "Build a Large Language Model (From Scratch)", chapters 3 and 4.

Names, creation order and initial values of the parameters are the book's, so its state dicts load here and the same
seed gives the same model. Further keys of the cfg choose other parts, each with its source; their defaults are the
book's. Attention stands in attention.py; losses and sampling live elsewhere.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.attention import MultiHeadAttention, Rotary, check_length
from gptcore.errors import ConfigError
from gptcore.recipes import PARTS
from gptcore.untouched import is_untouched

_COUNTS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")


def is_ours(model: nn.Module, *others: type[nn.Module]) -> bool:
    """Whether `model` is a GPTModel of which every part is untouched, so that it may be run in pieces.

    Parts may also be of the kinds `others`.
    """
    kinds = (*_KINDS, *others)
    return type(model) is GPTModel and all(
        type(part) in kinds and is_untouched(part, type(part)) for part in model.modules()
    )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switches every part of `model` to eval mode and afterwards each one back to the mode that it was in."""
    training = [part for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class LayerNorm(nn.Module):
    """Each token's features to mean 0 and variance 1, then a learned scale and shift."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class RMSNorm(nn.Module):
    """Each token's features to mean square 1, and nothing learned (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return F.rms_norm(x, x.shape[-1:])


class GELU(nn.Module):
    """The tanh approximation of GELU that GPT-2 was trained with (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, element by element."""
        return F.gelu(x, approximate="tanh")


class SquaredReLU(nn.Module):
    """What is above zero, squared (So et al. 2021, "Primer", arXiv:2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, element by element."""
        return F.relu(x).square()


class FeedForward(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Reads `emb_dim`; `activation` and `bias` may be there. Raises ConfigError as GPTModel does."""
        super().__init__()
        _check(cfg, "emb_dim")
        width, parts = cfg["emb_dim"], chosen(cfg)
        inner, bias = 4 * width, parts["bias"]
        activation = {"gelu": GELU, "relu2": SquaredReLU}[parts["activation"]]
        self.layers = nn.Sequential(nn.Linear(width, inner, bias), activation(), nn.Linear(inner, width, bias))

    def forward(self, x: Tensor) -> Tensor:
        """(..., emb_dim) -> (..., emb_dim)."""
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward net, each behind a norm and beside a shortcut."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Reads all keys but `vocab_size` and `n_layers`. Raises ConfigError as GPTModel does."""
        super().__init__()
        _check(cfg, "context_length", "emb_dim", "n_heads", "drop_rate", "qkv_bias")
        width, parts = cfg["emb_dim"], chosen(cfg)
        self.att = MultiHeadAttention(
            width,
            width,
            cfg["context_length"],
            cfg["drop_rate"],
            cfg["n_heads"],
            cfg["qkv_bias"],
            out_bias=parts["bias"],
            rotary=parts["positions"] == "rotary",
            qk_norm=parts["qk_norm"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = _norm(cfg)
        self.norm2 = _norm(cfg)
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, emb_dim) -> (batch, tokens, emb_dim)."""
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        """Built from the seed's dict: vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate, qkv_bias.

        The keys of PARTS may be there too; others are ignored. Raises ConfigError naming the key that is missing, out
        of range or in contradiction.
        """
        super().__init__()
        _check(cfg, *_COUNTS, "drop_rate", "qkv_bias")
        width, parts = cfg["emb_dim"], chosen(cfg)
        self.context_length = cfg["context_length"]
        self.tok_emb = nn.Embedding(cfg["vocab_size"], width)
        self.pos_emb = nn.Embedding(self.context_length, width) if parts["positions"] == "learned" else None
        self.emb_norm = RMSNorm() if parts["emb_norm"] else None
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*(TransformerBlock(cfg) for _ in range(cfg["n_layers"])))
        self.final_norm = _norm(cfg)
        self.out_head = nn.Linear(width, cfg["vocab_size"], bias=False)
        if parts["tied"]:
            self.tok_emb.weight = self.out_head.weight  # whose first values are the smaller ones
        initialise(self, parts["init"])

    def forward(self, in_idx: Tensor) -> Tensor:
        """Ids (batch, tokens) -> logits (batch, tokens, vocab_size).

        Raises ConfigError where the tokens are more than the context, and on the CPU where an id is outside the
        vocabulary. (On a GPU that would cost a synchronisation per call: CUDA's own assertion says it.)
        """
        return self.out_head(self.hidden(in_idx))

    def hidden(self, in_idx: Tensor) -> Tensor:
        """All of `forward` but the head: ids (batch, tokens) -> (batch, tokens, emb_dim). Raises as `forward` does."""
        check_length(in_idx.shape[1], self.context_length)
        x = self.embed(in_idx)
        if self.pos_emb is not None:
            x = x + self.pos_emb(torch.arange(in_idx.shape[1], device=in_idx.device))
        if self.emb_norm is not None:
            x = self.emb_norm(x)
        return self.final_norm(self.trf_blocks(self.drop_emb(x)))

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding are one matrix (Press & Wolf 2017, arXiv:1608.05859)."""
        return self.out_head.weight is self.tok_emb.weight

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """As of any module, but that a tied matrix stands in it once, as `tok_emb.weight`."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.is_tied:
            del state[f"{prefix}out_head.weight"]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.is_tied and (name := f"{prefix}tok_emb.weight") in state_dict:
            state_dict.setdefault(f"{prefix}out_head.weight", state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def embed(self, in_idx: Tensor) -> Tensor:
        """Ids (batch, tokens) -> (batch, tokens, emb_dim), without positions. Raises as `forward` does."""
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
    """Gives the model its first weights: `pytorch` leaves those that PyTorch gave it, as the book does.

    `gpt2`: normal with deviation 0.02, biases 0, and what leads back into the residual stream smaller, the deeper the
    model (Radford et al. 2019, section 2.3). `zero`: what leads back into the residual stream begins at 0, so that
    every block begins as the identity (Bachlechner et al. 2021, arXiv:2003.04887), and so does a head of its own, so
    that every token is as likely; the other matrices are uniform with deviation 1/sqrt(fan-in).
    """
    if scheme == "pytorch":
        return
    blocks = cast("Sequence[TransformerBlock]", model.trf_blocks)
    outputs = {id(part) for block in blocks for part in (block.att.out_proj, block.ff.layers[2])}
    for part in model.modules():
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if part is model.out_head and model.is_tied:
            continue
        if isinstance(part, nn.Embedding) or (scheme == "gpt2" and isinstance(part, nn.Linear)):
            shrink = (2 * len(model.trf_blocks)) ** -0.5 if id(part) in outputs else 1.0
            nn.init.normal_(part.weight, std=0.02 * shrink)
        elif isinstance(part, nn.Linear):
            if id(part) in outputs or part is model.out_head:
                nn.init.zeros_(part.weight)
            else:
                bound = (3 / part.in_features) ** 0.5
                nn.init.uniform_(part.weight, -bound, bound)


def chosen(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Which parts a cfg asks for: PARTS with the values that it gives. Raises ConfigError for a part there is not."""
    parts = {key: cfg.get(key, options[0]) for key, options in PARTS.items()}
    for key, value in parts.items():
        if value not in PARTS[key]:
            raise ConfigError(
                f"the model's cfg has {key} {value!r}; it must be one of {', '.join(map(str, PARTS[key]))}."
            )
    return parts


def _norm(cfg: Mapping[str, Any]) -> nn.Module:
    return LayerNorm(cfg["emb_dim"]) if chosen(cfg)["norm"] == "layer" else RMSNorm()


_KINDS = (
    *(GPTModel, TransformerBlock, MultiHeadAttention, Rotary, FeedForward, LayerNorm, RMSNorm, GELU, SquaredReLU),
    *(nn.Embedding, nn.Linear, nn.Dropout, nn.Sequential),
)


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
