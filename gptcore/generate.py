"""Text from a model: the seed's greedy functions, and `generate` with sampling and streaming.

Keys and values of the tokens already seen are kept wherever the model is one of ours with every part untouched
(`model.is_ours`); any other is called on the whole window for every token, with the same result. The global random
state is never drawn from. How the next token is drawn and how several texts are written side by side stands in
writing/. Which prompts are continued and where the texts are kept is decided elsewhere.
"""

import codecs
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptcore.errors import ConfigError
from gptcore.model import GPTModel, eval_mode, is_ours
from gptcore.tokenizer import END_OF_TEXT
from gptcore.writing.batch import Batch, Text
from gptcore.writing.decoder import Decoder
from gptcore.writing.quantize import INT8_KINDS
from gptcore.writing.sampling import Sampling


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
    decoder = _decoder(model, len(idx), min(size, idx.shape[1] + max_new_tokens))
    seen = 0
    with torch.no_grad():
        for _ in range(max_new_tokens):
            if decoder is None or idx.shape[1] > size:
                logits = model(idx[:, -size:])[:, -1]  # nothing to keep: every window starts elsewhere
            else:
                logits = decoder.extend(idx[:, -1].tolist()) if seen else decoder.begin(idx.tolist())
            seen = idx.shape[1]
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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_id: int | Collection[int] | None = None,
) -> Iterator[int]:
    """Continues one prompt; yields each new id as soon as it is drawn, and ends before `eos_id`, which is not yielded.

    The settings are those of `Sampling`. The same seed draws the same ids; without one, every call differs. Of a prompt
    longer than the context the last tokens count. When the context is full, its older half is forgotten and the rest is
    read again from position 0.

    The model runs in eval mode and is back in its own mode whenever the caller holds an id. Raises ConfigError, at the
    call, for an empty prompt, an id outside the vocabulary and settings out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    batch = Batch(model, 1, len(ids) + max_new_tokens)
    return _written(batch, batch.add(ids, max_new_tokens, sampling, seed=seed, eos_id=eos_id))


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
    """Continues several prompts of any lengths, up to `rows` of them at once -> the new ids of each.

    Each text ends by itself. The text of prompt i is that of `generate` with seed `seed` + i, up to rounding. Raises
    ConfigError as `generate` does.
    """
    longest = max((len(prompt) for prompt in prompts), default=1)
    batch = Batch(model, min(rows, max(1, len(prompts))), longest + max_new_tokens)
    texts: list[Text] = []
    for i, prompt in enumerate(prompts):
        while not batch.free:
            batch.step()
        own_seed = None if seed is None else seed + i
        texts.append(batch.add(prompt, max_new_tokens, sampling, seed=own_seed, eos_id=eos_id))
    while any(text.finish_reason is None for text in texts):
        batch.step()
    return [text.ids for text in texts]


class TextStream:
    """The text of ids as they come, in pieces that may be shown at once.

    A piece never ends inside a character (bytes that are no UTF-8 become U+FFFD) and never holds a part of what may
    turn out to be one of the strings `stop`, before the first of which to be complete the text ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        """`tokenizer` is a tiktoken encoding or a gptcore Tokenizer. Raises ConfigError for an empty stop string."""
        if "" in stop:
            raise ConfigError("a stop string is empty: every text would end at once; give it at least one character.")
        self.stopped = False
        """Whether a stop string was met. Nothing comes after that."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token: int) -> str:
        """What may be shown now that this id has come."""
        return self._released(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """What was held back, once no more ids come."""
        released = self._released(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return released + rest

    def _released(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(found)
        shown = min(found)[1] if found else len(text) - self._possible(text)
        self._held = "" if found else text[shown:]
        return text[:shown]

    def _possible(self, text: str) -> int:
        """Characters at the end of `text` that a stop string may begin with."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        ends = (length for length in range(longest, 0, -1) if any(s.startswith(text[-length:]) for s in self._stop))
        return next(ends, 0)


def stream_text(tokenizer: Any, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """The pieces of a TextStream; together they are what `decode` gives for all ids, up to the first stop string."""
    stream = TextStream(tokenizer, stop)
    for token in ids:
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
    if rest := stream.finish():
        yield rest


def _decoder(model: nn.Module, rows: int, max_tokens: int) -> Decoder | None:
    """None where the model must be called as a whole."""
    dropping = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in model.modules())
    return Decoder(cast(GPTModel, model), rows, max_tokens) if is_ours(model, *INT8_KINDS) and not dropping else None


def _written(batch: Batch, text: Text) -> Iterator[int]:
    while text.finish_reason is None:
        before = len(text.ids)
        batch.step()
        yield from text.ids[before:]
