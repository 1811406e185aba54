"""Text from a model: the book's greedy functions, and `generate` with sampling and streaming.

A GPTModel with every module untouched (`is_untouched_gpt`) uses a KV cache (kv_cache.py). Any other model is called on
the whole window for every token, with the same result. Nothing here draws from the global random state. See sampling.py
for how a token is drawn, and batch.py for several requests at once. The book is Raschka's "Build a Large Language Model
(From Scratch)".
"""

import codecs
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptcore.errors import ConfigError
from gptcore.generation.batch import Batch, Request
from gptcore.generation.kv_cache import Decoder
from gptcore.generation.quantize import INT8_KINDS
from gptcore.generation.sampling import Sampling
from gptcore.model.gpt import GPTModel, eval_mode, is_untouched_gpt
from gptcore.tokens.tokenizer import END_OF_TEXT

_UNLIMITED = 2**31
"""The context of a module without a limit."""


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """Encode `text` -> ids (1, tokens) int64.

    `tokenizer` is a tiktoken encoding or anything else with `encode(text)`, such as a gptcore Tokenizer. Only in an
    encoding whose `encode` takes `allowed_special` is "<|endoftext|>" the special token, as in the book.
    """
    try:
        encoded = tokenizer.encode(text, allowed_special={END_OF_TEXT})
    except TypeError:
        encoded = tokenizer.encode(text)
    return torch.tensor(encoded, dtype=torch.long).unsqueeze(0)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """Decode ids (1, tokens) or (tokens,) to text."""
    return tokenizer.decode(token_ids.flatten().tolist())


def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Continue ids (batch, tokens) greedily -> (batch, tokens + max_new_tokens).

    Each token is predicted from the last `context_size` tokens, at most the model's context. `model` is any module that
    maps ids (batch, tokens) to logits (batch, tokens, vocabulary). It stays in its mode. Raises ConfigError for empty
    prompts and a context below 1.
    """
    return continue_ids(model, idx, max_new_tokens, context_size, choose_likeliest)


def choose_likeliest(logits: Tensor) -> Tensor:
    """Return the likeliest id of each row: logits (batch, vocabulary) -> ids (batch, 1)."""
    return logits.argmax(dim=-1, keepdim=True)


def continue_ids(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    context_size: int,
    choose: Callable[[Tensor], Tensor],
    eos_id: int | None = None,
) -> Tensor:
    """Continue ids (batch, tokens) -> (batch, tokens + at most max_new_tokens).

    `choose` maps logits (batch, vocabulary) to ids (batch, 1). The text ends before `eos_id`, in a batch as soon as all
    rows choose it. Raises as `generate_text_simple` does.
    """
    if idx.shape[1] == 0:
        raise ConfigError("the prompt is empty: there is no token to predict the next one from; give at least one.")
    if context_size < 1:
        raise ConfigError(f"context_size is {context_size}; it must be at least 1.")
    size = min(context_size, model.context_length) if type(model) is GPTModel else context_size
    decoder = _make_decoder(model, rows=len(idx), max_tokens=min(size, idx.shape[1] + max_new_tokens))
    is_prefilled = False
    for _ in range(max_new_tokens):
        with torch.no_grad():
            if decoder is None or idx.shape[1] > size:
                # A full window starts one token later each time, so a cache would not help.
                logits = model(idx[:, -size:])[:, -1]  # (batch, vocabulary)
            elif is_prefilled:
                logits = decoder.decode(idx[:, -1].tolist())  # (batch, vocabulary)
            else:
                logits = decoder.prefill(idx.tolist())  # (batch, vocabulary)
            is_prefilled = True
            chosen = choose(logits)  # (batch, 1)
            if eos_id is not None and bool((chosen == eos_id).all()):
                break
            idx = torch.cat((idx, chosen), dim=1)  # (batch, tokens + 1)
    return idx


def generate_and_print_sample(model: nn.Module, tokenizer: Any, device: torch.device | str, start_context: str) -> None:
    """Print 50 tokens that continue `start_context`, on one line. The model stays in its mode.

    The context is that of `find_context_size`.
    """
    context_size = find_context_size(model)
    encoded = text_to_token_ids(start_context, tokenizer).to(device)
    with eval_mode(model):
        token_ids = generate_text_simple(model, encoded, max_new_tokens=50, context_size=context_size)
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))


def find_context_size(model: nn.Module) -> int:
    """Return the longest context of a module of the book's shape: that of a GPTModel, or the rows of a `pos_emb`.

    The module may contain them at any depth, as a compiled or wrapped model does. A module that has neither, such as a
    bigram model, has no limit here.
    """
    for module in model.modules():
        if isinstance(module, GPTModel):
            return module.context_length
        if isinstance(weight := getattr(getattr(module, "pos_emb", None), "weight", None), Tensor):
            return len(weight)
    return _UNLIMITED


def generate(
    model: GPTModel,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_id: int | Collection[int] | None = None,
) -> Iterator[int]:
    """Continue one prompt: yield each new id as soon as it is drawn. `eos_id` ends the text and is not yielded.

    The settings are those of `Sampling`. The same seed draws the same ids; without a seed, every call differs. If the
    prompt exceeds the context, only its last tokens count. When the context is full, its older half is dropped and the
    rest is read again from position 0.

    The model runs in eval mode, and is in its own mode again whenever the caller holds an id. Raises ConfigError, at
    the call, for an empty prompt, an id outside the vocabulary and settings out of range.

    Example: `print(tokenizer.decode(list(generate(model, tokenizer.encode("The"), 50, temperature=0.8, seed=1))))`.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    batch = Batch(model, rows=1, max_tokens=len(ids) + max_new_tokens)
    return _iterate_ids(batch, batch.add(ids, max_new_tokens, sampling, seed=seed, eos_id=eos_id))


def generate_batch(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    seed: int | None = None,
    eos_id: int | Collection[int] | None = None,
    rows: int = 16,
) -> list[list[int]]:
    """Continue several prompts of any lengths, up to `rows` of them at once -> the new ids of each.

    Prompt i gets the ids that `generate` draws with seed `seed` + i, up to rounding. Raises ConfigError as `generate`
    does.
    """
    longest = max((len(prompt) for prompt in prompts), default=1)
    batch = Batch(model, rows=min(rows, max(1, len(prompts))), max_tokens=longest + max_new_tokens)
    requests: list[Request] = []
    for i, prompt in enumerate(prompts):
        while not batch.free:
            batch.step()
        own_seed = None if seed is None else seed + i
        requests.append(batch.add(prompt, max_new_tokens, sampling, seed=own_seed, eos_id=eos_id))
    while any(request.finish_reason is None for request in requests):
        batch.step()
    if error := next((request.error for request in requests if request.error), None):
        raise error
    return [request.ids for request in requests]


class TextStream:
    """Decodes ids one at a time into chunks of text that may be shown at once.

    A chunk never ends inside a character; bytes that are not UTF-8 become U+FFFD. The text ends before the first stop
    string that is complete, so the stream holds back whatever could be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """Take a tiktoken encoding or a gptcore Tokenizer. Raises ConfigError for an empty stop string."""
        if "" in stop:
            raise ConfigError("a stop string is empty: every text would end at once; give it at least one character.")
        self.stopped = False
        """Whether a stop string is complete. All later chunks are empty."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Decode one id. Return the chunk that may be shown now, perhaps an empty one."""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Return the text that was held back, after the last id."""
        released = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return released + rest

    def _release(self, decoded: str) -> str:
        """Return what may be shown of the text held back and `decoded`, and hold back the rest."""
        if self.stopped:
            return ""
        text = self._held + decoded
        matches = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        self.stopped = bool(matches)
        shown = min(matches)[1] if matches else len(text) - self._count_possible_stop(text)
        self._held = "" if matches else text[shown:]
        return text[:shown]

    def _count_possible_stop(self, text: str) -> int:
        """Count the characters at the end of `text` that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        ends = (length for length in range(longest, 0, -1) if any(s.startswith(text[-length:]) for s in self._stop))
        return next(ends, 0)


def stream_text(tokenizer: Any, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the chunks of a TextStream. Together they are the decoded text of `ids`, up to the first stop string."""
    stream = TextStream(tokenizer, stop)
    for token in ids:
        if chunk := stream.push(token):
            yield chunk
        if stream.stopped:
            return
    if rest := stream.finish():
        yield rest


def _make_decoder(model: nn.Module, rows: int, max_tokens: int) -> Decoder | None:
    """Return a decoder with a KV cache, or None if the model must be called as a whole."""
    has_dropout = any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in model.modules())
    if has_dropout or not is_untouched_gpt(model, *INT8_KINDS):
        return None
    return Decoder(cast(GPTModel, model), rows, max_tokens)


def _iterate_ids(batch: Batch, request: Request) -> Iterator[int]:
    while request.finish_reason is None:
        before = len(request.ids)
        batch.step()
        if request.error:
            raise request.error
        yield from request.ids[before:]
