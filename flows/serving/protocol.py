"""OpenAI's completions as data: what a request may say, what an answer looks like, and how one is refused.

After the API reference of OpenAI's `POST /v1/completions`, with `top_k`, `min_p` and `repetition_penalty` beside it.
What a request asks for and this server cannot do is refused by name: nothing that was asked for is left out quietly.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

MOST_SAMPLES = 128
MOST_STOPS = 4
MOST_SEED = 2**63 - 1
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (),
    "suffix": ("",),
    "logit_bias": ({},),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
"""Parameters of OpenAI's that are refused, each with the values, beside null, that ask for nothing."""
Prompt = str | list[int]


class Refused(Exception):
    """A request is not answered. The response has OpenAI's shape of an error."""

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
    """The JSON of an error."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _prompts(value: Any) -> list[Prompt]:
    """A string, strings, ids or lists of ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if _are_ids(value):
            return [value]
        if all(isinstance(one, list) and one and _are_ids(one) for one in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
    )


def _are_ids(value: Sequence[Any]) -> bool:
    return all(type(one) is int for one in value)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"must be a string, or a list of at most {MOST_STOPS} strings, none of them empty")
    return stops


class StreamOptions(BaseModel):
    """What a stream has beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`. Defaults and ranges are OpenAI's."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 draws among all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1, le=MOST_SAMPLES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    """Text number i of the answer, counted from 0, is drawn with seed + i."""
    echo: bool = False
    user: str = ""
    """Not read: nothing is kept about who asks."""

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse(body: bytes) -> CompletionRequest:
    """The request in a body. null means the default. Raises Refused, which names the parameter."""
    try:
        asked = from_json(body)
    except ValueError as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise Refused("the body must be a JSON object")
    asked = {key: value for key, value in asked.items() if value is not None}
    for name, neutral in UNSUPPORTED.items():
        if name in asked and asked.pop(name) not in neutral:
            raise Refused(f"{name} is not supported here: leave it out", name, code="unsupported_parameter")
    try:
        request = CompletionRequest.model_validate(asked)
    except ValidationError as error:
        raise _refused(error) from None
    if request.stream_options is not None and not request.stream:
        raise Refused("stream_options is for streams: set stream to true, or leave it out", "stream_options")
    return request


def _refused(error: ValidationError) -> Refused:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, str)) or None
    if first["type"] == "extra_forbidden":
        known = ", ".join(CompletionRequest.model_fields)
        return Refused(f"unknown parameter {name}. Known are: {known}", name, code="unknown_parameter")
    if first["type"] == "missing":
        return Refused(f"{name} is missing", name, code="missing_required_parameter")
    said = first["msg"].removeprefix("Value error, ")
    given = json.dumps(first["input"], default=str)
    return Refused(f"{name}: {said[:1].lower()}{said[1:]}; it is {given:.60}", name)


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common."""

    model: str
    """The version that writes."""
    fingerprint: str
    """Names its weights."""
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def part(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """The JSON of a whole answer, or of one event of a stream."""
        about = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**about, "system_fingerprint": self.fingerprint, "choices": list(choices), **more}


def choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    """One text, or a piece of it."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """What an answer took."""
    both = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": both}


def event(data: Mapping[str, Any] | str) -> bytes:
    """A server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
