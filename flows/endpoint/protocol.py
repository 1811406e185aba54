"""OpenAI's completions protocol as data: requests, answers and errors.

It follows the API reference of OpenAI's `POST /v1/completions`, and adds `top_k`, `min_p` and `repetition_penalty`. A
parameter that this server does not support is refused by name, and never ignored silently. The module knows nothing of
HTTP or of models.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import from_json

MAX_SAMPLES = 128
MAX_STOPS = 4
MAX_SEED = 2**63 - 1
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
"""OpenAI's parameters that are refused. Each has the values that are accepted, besides null, as they do nothing."""
Prompt = str | list[int]


class RequestError(Exception):
    """The server cannot or will not fulfil a request. The response has the shape of OpenAI's errors."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = error_body(message, type, param, code)


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _parse_prompts(value: Any) -> list[Prompt]:
    """Return a list of prompts for a string, a list of strings, a list of ids or a list of lists of ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _are_ids(value):
            return [value]
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
    )


def _are_ids(value: Sequence[Any]) -> bool:
    return all(type(item) is int for item in value)


def _parse_stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    are_strings = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not are_strings or len(stops) > MAX_STOPS:
        raise ValueError(f"must be a string, or a list of at most {MAX_STOPS} strings, none of them empty")
    return stops


_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}
_STOP: dict[str, Any] = {"type": "string", "minLength": 1}
_STOPS: dict[str, Any] = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]}


class StreamOptions(BaseModel):
    """What a stream contains besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`. Defaults and ranges are OpenAI's, and gptcore's for its own parameters."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: Annotated[list[Prompt], BeforeValidator(_parse_prompts), WithJsonSchema(_PROMPTS)]
    max_tokens: int = Field(16, ge=0)
    """0 is for echo: the answer is the prompt."""
    logprobs: int | None = Field(None, ge=0, le=5)
    """Number of likeliest tokens at each place whose log probabilities the answer has, besides that of the token."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 means all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_parse_stops), WithJsonSchema(_STOPS)] = []
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    """Text number i of the answer, counted from 0, is drawn with seed + i."""
    echo: bool = False
    user: str = ""
    """Not read: the server stores nothing about its users."""

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse(body: bytes) -> CompletionRequest:
    """Parse a request's body. A null means the default. Raises RequestError, which names the wrong parameter."""
    try:
        parameters = from_json(body)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(parameters, dict):
        raise RequestError("the body must be a JSON object")
    parameters = {key: value for key, value in parameters.items() if value is not None}
    for name, neutral in UNSUPPORTED.items():
        if name in parameters and parameters.pop(name) not in neutral:
            raise RequestError(
                f"{name} is not supported by this server: leave it out", name, code="unsupported_parameter"
            )
    try:
        request = CompletionRequest.model_validate(parameters)
    except ValidationError as error:
        raise _request_error_of(error) from None
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("max_tokens is 0: ask for at least 1 token, or set echo to true", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is for streams: set stream to true, or leave it out", "stream_options")
    return request


def _request_error_of(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, str)) or None
    if first["type"] == "extra_forbidden":
        known = ", ".join(CompletionRequest.model_fields)
        return RequestError(f"unknown parameter {name} (expected one of {known})", name, code="unknown_parameter")
    if first["type"] == "missing":
        return RequestError(f"{name} is missing", name, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    value = json.dumps(first["input"], default=str)
    return RequestError(f"{name}: {message[:1].lower()}{message[1:]} (given: {value:.60})", name)


@dataclass(frozen=True)
class Answer:
    """The fields that all events of one answer have in common."""

    model: str
    """The version that generates."""
    fingerprint: str
    """Identifies the version's weights."""
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """Return the JSON of a whole answer, or of one event of a stream."""
        shared = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**shared, "system_fingerprint": self.fingerprint, "choices": list(choices), **more}


LOGPROB_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
"""The lists with an entry per token in the logprobs of a text."""


def choice_body(
    index: int, text: str, finish_reason: str | None, logprobs: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, Any]:
    """Return the JSON of one text, or of a chunk of it."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the JSON of the numbers of tokens that an answer took."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def encode_event(data: Mapping[str, Any] | str) -> bytes:
    """Encode a server-sent event, for example `[DONE]` as `data: [DONE]` and an empty line."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
