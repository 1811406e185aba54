"""The description of the endpoint in the OpenAPI format, which GET /openapi.json answers."""

from typing import Any

from flows.endpoint.protocol import LOGPROB_LISTS, UNSUPPORTED, CompletionRequest

_STRING, _INTEGER, _OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "object"}
_NULLABLE = {"type": ["string", "null"]}


def describe() -> dict[str, Any]:
    """Return the description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gptflow",
            "version": "1",
            "description": "A registered model over OpenAI's completions API.",
        },
        "paths": {
            "/v1/completions": {"post": _operation("Continue prompts.", _completion_answers(), body=_request_schema())},
            "/v1/models": {"get": _operation("List the served model.", {"200": _json(_list_schema())})},
            "/v1/models/{name}": {
                "get": _operation(
                    "Describe the served model.",
                    {"200": _json(_MODEL)},
                    parameters=[{"name": "name", "in": "path", "required": True, "schema": _STRING}],
                )
            },
            "/health": {
                "get": {
                    **_operation("Report the version, its problems and the load.", {}),
                    "responses": {"200": _json(_OBJECT), "503": _json(_OBJECT)},
                    "security": [],
                }
            },
            "/": {
                "get": {
                    **_operation("Show a page where a person tries the model.", {"200": _text("text/html")}),
                    "security": [],
                }
            },
            "/card": {"get": _operation("Return the model card in markdown.", {"200": _text("text/plain")})},
            "/metrics": {"get": _operation("Measure the load for Prometheus.", {"200": _text("text/plain")})},
            "/openapi.json": {"get": _operation("Describe this API.", {"200": _json(_OBJECT)})},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
        "security": [{}, {"key": []}],
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _STRING, "type": _STRING, "param": _NULLABLE, "code": _NULLABLE},
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "version", "context_length"],
    "properties": {
        "id": _STRING,
        "object": {"const": "model"},
        "created": _INTEGER,
        "owned_by": _STRING,
        "version": _STRING,
        "context_length": _INTEGER,
    },
}


def _operation(summary: str, answers: dict[str, Any], body: Any = None, **more: Any) -> dict[str, Any]:
    """Return an operation, whose errors have OpenAI's shape."""
    error = {"$ref": "#/components/schemas/Error"}
    responses = {
        **{code: {"description": "", **answer} for code, answer in answers.items()},
        "default": {"description": "An error.", "content": {"application/json": {"schema": error}}},
    }
    described = {"summary": summary, "responses": responses, **more}
    content = {"application/json": {"schema": body}}
    return described if body is None else {**described, "requestBody": {"required": True, "content": content}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "", "content": {"application/json": {"schema": schema}}}


def _text(kind: str) -> dict[str, Any]:
    return {"description": "", "content": {kind: {"schema": _STRING}}}


def _list_schema() -> dict[str, Any]:
    models = {"type": "array", "items": _MODEL}
    return {"type": "object", "properties": {"object": {"const": "list"}, "data": models}, "required": ["data"]}


def _request_schema() -> dict[str, Any]:
    """Return the schema of a request. A null means the default, and the values that do nothing are accepted."""
    schema = CompletionRequest.model_json_schema()
    (options,) = schema.pop("$defs").values()
    schema["properties"]["stream_options"] = {**options, "default": None}
    for name, known in schema["properties"].items():
        if name not in schema["required"] and {"type": "null"} not in known.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [known, {"type": "null"}]}
    schema["properties"] |= {name: {"enum": [*values, None]} for name, values in UNSUPPORTED.items()}
    return schema


def _completion_answers() -> dict[str, Any]:
    lists = {name: {"type": "array"} for name in LOGPROB_LISTS}
    logprobs = {"anyOf": [{"type": "object", "properties": lists, "required": list(lists)}, {"type": "null"}]}
    choice = {
        "type": "object",
        "required": ["index", "text", "logprobs", "finish_reason"],
        "properties": {"index": _INTEGER, "text": _STRING, "logprobs": logprobs, "finish_reason": _NULLABLE},
    }
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _INTEGER)
    answer = {
        "type": "object",
        "required": ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"],
        "properties": {
            "id": _STRING,
            "object": {"const": "text_completion"},
            "created": _INTEGER,
            "model": _STRING,
            "system_fingerprint": _STRING,
            "choices": {"type": "array", "items": choice},
            "usage": {"type": "object", "properties": usage, "required": list(usage)},
        },
    }
    content = {"application/json": {"schema": answer}, "text/event-stream": {"schema": _STRING}}
    return {"200": {"description": "The texts, whole or as server-sent events.", "content": content}}
