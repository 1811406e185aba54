"""Text from a model: the seed's greedy functions, and `generate` with sampling and streaming.

Both keep keys and values of the tokens already seen wherever the model is one of ours with every part untouched
(`model.is_ours`), and call the model on the whole window otherwise, with the same result. The global random state is
never drawn from. Which prompts are continued and where the texts are kept is decided elsewhere.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptcore.attention import KVCache
from gptcore.errors import ConfigError
from gptcore.model import GPTModel, eval_mode, is_ours
from gptcore.tokenizer import END_OF_TEXT

_LEAST = torch.finfo(torch.float32).tiny
"""A smaller setting would be 0 in the arithmetic, and divide by it."""


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """Ids (1, tokens) of `text`.

    `tokenizer` is a tiktoken encoding, in which "<|endoftext|>" is the special token as in the book, or one that has no
    `allowed_special`, as a gptcore Tokenizer, in which it is text like any other.
    """
    try:
        encoded = tokenizer.encode(text, allowed_special={END_OF_TEXT})
    except TypeError:
        encoded = tokenizer.encode(text)
    return torch.tensor(encoded, dtype=torch.long).unsqueeze(0)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """The text of ids (1, tokens) or (tokens,)."""
    return tokenizer.decode(token_ids.flatten().tolist())


def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Continues ids (batch, tokens) greedily -> (batch, tokens + max_new_tokens).

    Each token is predicted from the last `context_size` ones, at most the model's context. `model` is any module that
    maps ids to logits (batch, tokens, vocabulary), and stays in the mode that it is in. Raises ConfigError for empty
    prompts and a context below 1.
    """
    if idx.shape[1] == 0:
        raise ConfigError("the prompt is empty: there is no token to predict the next one from; give at least one.")
    if context_size < 1:
        raise ConfigError(f"context_size is {context_size}; it must be at least 1.")
    size = min(context_size, model.context_length) if type(model) is GPTModel else context_size
    room = min(size, idx.shape[1] + max_new_tokens)
    predict = _predictor(model, idx.shape[0], room)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            logits = predict(idx[:, -size:], idx.shape[1] > size)
            idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def generate_and_print_sample(model: nn.Module, tokenizer: Any, device: torch.device | str, start_context: str) -> None:
    """Prints 50 tokens that continue `start_context`, on one line. The model stays in the mode that it was in."""
    context_size = cast(GPTModel, model).context_length
    encoded = text_to_token_ids(start_context, tokenizer).to(device)
    with eval_mode(model):
        token_ids = generate_text_simple(model, encoded, max_new_tokens=50, context_size=context_size)
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))


def generate(
    model: GPTModel,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Continues one prompt; yields each new id as soon as it is drawn, and ends before `eos_id`, which is not yielded.

    temperature 0 takes the likeliest token; else logits are divided by it, cut to the `top_k` likeliest, then to the
    fewest likeliest that together reach probability `top_p`. The same seed draws the same ids; without one, every call
    differs. Of a prompt longer than the context the last tokens count. When the context is full, its older half is
    forgotten and the rest is read again from position 0 (positions are learned, so keys cannot be moved along).

    The model runs in eval mode and is back in its own mode whenever the caller holds an id. Raises ConfigError, at the
    call, for an empty prompt, an id outside the vocabulary and settings out of range.
    """
    prompt = _whole_numbers(ids)
    _check(model, prompt, temperature, top_k, top_p, seed)
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)

    def draw(logits: Tensor) -> int:
        return _draw(logits, temperature, top_k, top_p, generator)

    return _continue(model, prompt, max_new_tokens, draw, eos_id)


def stream_text(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come, in pieces that never end inside a character; bytes that are no UTF-8 become U+FFFD.

    The pieces together are what `decode` gives for all ids. `tokenizer` is a tiktoken encoding or a gptcore Tokenizer.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


Predict = Callable[[Tensor, bool], Tensor]
"""Ids (batch, tokens) of a window, and whether its start has moved since the last call -> logits (batch, vocabulary)
of the token that follows."""


def _predictor(model: nn.Module, batch_size: int, room: int) -> Predict:
    dropping = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in model.modules())
    if not is_ours(model):
        return lambda window, moved: model(window)[:, -1]
    ours = cast(GPTModel, model)
    cache = KVCache(ours, batch_size, room)

    def predict(window: Tensor, moved: bool) -> Tensor:
        if dropping or (moved and window.shape[1] == room):
            return ours.out_head(ours.hidden(window)[:, -1])  # nothing to keep: the next window starts elsewhere
        if moved:
            cache.length = 0
        return ours.out_head(ours.hidden(window[:, cache.length :], cache)[:, -1])

    return predict


def _continue(
    model: GPTModel, ids: list[int], max_new_tokens: int, draw: Callable[[Tensor], int], eos_id: int | None
) -> Iterator[int]:
    context = model.context_length
    window = ids[-context:]
    moved = False
    with eval_mode(model):
        predict = _predictor(model, 1, min(context, len(window) + max_new_tokens))
    device = model.tok_emb.weight.device
    for _ in range(max_new_tokens):
        # Entered for one token at a time: what the caller does with it is not to run in eval or inference mode.
        with eval_mode(model), torch.inference_mode():
            token = draw(predict(torch.tensor([window], device=device), moved)[0])
        if token == eos_id:
            return
        yield token
        window.append(token)
        if moved := len(window) > context:
            window = window[-max(context // 2, 1) :]


def _draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """One id from logits (vocabulary,). Drawn on the CPU, so that a seed means the same on every device."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.float() - logits.max()) / max(temperature, _LEAST)
    if top_k is None and top_p == 1:
        return int(torch.multinomial(torch.softmax(scaled.cpu(), dim=0), 1, generator=generator))
    scaled, candidates = scaled.topk(min(top_k or len(scaled), len(scaled)))
    probabilities = torch.softmax(scaled.cpu(), dim=0)
    probabilities[probabilities.cumsum(0) - probabilities >= max(top_p, _LEAST)] = 0
    return int(candidates[int(torch.multinomial(probabilities, 1, generator=generator))])


def _whole_numbers(ids: Sequence[int]) -> list[int]:
    try:
        if getattr(ids, "ndim", 1) == 1:
            return [int(index(token)) for token in ids]
    except TypeError:
        pass
    raise ConfigError(
        f"the prompt must be one row of whole numbers, found {ids!r:.80}. Give each of several prompts to a call of "
        "its own: then each ends by itself."
    )


def _check(
    model: GPTModel, ids: Sequence[int], temperature: float, top_k: int | None, top_p: float, seed: int | None
) -> None:
    vocab_size = len(model.tok_emb.weight)
    if not len(ids):
        raise ConfigError("the prompt has no tokens; give at least one (the end-of-text id starts a new document).")
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConfigError(f"token id {wrong} of the prompt is outside the model's vocabulary of {vocab_size} ids.")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature is {temperature}; it must be 0 (the likeliest token) or a positive number.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it must be at least 1, or None for the whole vocabulary.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    if seed is not None and not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed}; it must be from 0 to {2**64 - 1}.")
