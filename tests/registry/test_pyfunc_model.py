"""A registered model behind MLflow's own scoring server: its answers and its refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import pytest
from mlflow.pyfunc import scoring_server
from safetensors.torch import save_file
from starlette.testclient import TestClient

from flows.registry import pyfunc_model, register
from gptcore.bundle import write_bundle
from gptcore.generation.generate import generate
from tests.endpoint.endpoint import tiny_version
from tests.fake_gpu import FakeGpu

LOADED = tiny_version(1).loaded
ASKED = {"max_new_tokens": 12, "seed": 5}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    (directory / "bundle").mkdir()
    save_file(LOADED.model.state_dict(), directory / "weights")
    write_bundle(directory / "bundle", LOADED.cfg, directory / "weights", LOADED.tokenizer, {})
    return directory / "bundle"


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[TestClient]:
    """The application that `mlflow models serve` runs, in this process."""
    directory = bundle.parent
    mlflow.pyfunc.save_model(
        path=str(directory / "model"),
        python_model=str(Path(register.__file__).with_name("pyfunc_model.py")),
        artifacts={"bundle": str(bundle)},
        signature=register.SIGNATURE,
        pip_requirements=["mlflow"],
    )
    with TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(directory / "model")))) as client:
        yield client


def ask(server: TestClient, body: object) -> Any:
    return server.post("/invocations", content=json.dumps(body), headers={"content-type": "application/json"})


def written(prompt: str, seed: int, num_tokens: int = 12, **settings: Any) -> str:
    settings = {"temperature": 0.8, "top_k": 50, **settings}
    ids = generate(LOADED.model, LOADED.tokenizer.encode(prompt), num_tokens, seed=seed, **settings)
    return LOADED.tokenizer.decode(list(ids))


def test_each_prompt_is_continued_with_its_own_seed(server: TestClient) -> None:
    answer = ask(server, {"inputs": ["The model", "A"], "params": ASKED})
    assert answer.json() == {"predictions": [written("The model", 5), written("A", 6)]}
    assert ask(server, {"dataframe_records": [{"any": "A"}], "params": {**ASKED, "seed": 6}}).json() == {
        "predictions": [written("A", 6)]
    }
    assert ask(server, {"prompt": "A", **ASKED}).json() == [written("A", 5)]


def test_the_gpu_that_is_there_answers(bundle: Path, gpu: FakeGpu) -> None:
    model = pyfunc_model.GPTTextModel()
    model.load_context(cast(Any, SimpleNamespace(artifacts={"bundle": str(bundle)})))
    gpu.products.clear()
    answer = model.predict(None, ["The model"], ASKED)
    assert gpu.products["cuda"] and not gpu.products["cpu"]
    assert answer == [written("The model", 5)]


def test_every_parameter_reaches_the_generation(server: TestClient) -> None:
    settings = {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}
    answer = ask(server, {"inputs": ["A"], "params": {**ASKED, **settings}})
    text = written("A", 5, **{**settings, "top_k": None})
    assert answer.json() == {"predictions": [text]}
    stopped = ask(server, {"inputs": ["A"], "params": {**ASKED, **settings, "stop": ["nowhere", text[5:7]]}})
    assert stopped.json() == {"predictions": [text[: text.index(text[5:7])]]}


def test_the_signature_has_the_parameters_with_their_defaults() -> None:
    signature = {spec.name: spec.default for spec in register.SIGNATURE.params.params}
    assert signature == pyfunc_model.DEFAULTS


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": -1}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -3}, "top_k is -3"),
        ({"top_k": "5"}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 5.5}, "top_k"),
        ({"top_p": 2}, "top_p is 2.0"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be from 1 to 4096"),
        ({"max_new_tokens": 10**9}, "it must be from 1 to 4096"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": "a"}, "stop"),
        ({"stop": [""]}, "stop string is empty"),
        (5, "Parameters must be a dictionary"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name_without_a_traceback(server: TestClient, params: Any, words: str) -> None:
    refused(ask(server, {"inputs": ["A"], "params": params}), words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": []}, "missing inputs"),
        ({"inputs": None}, "NoneType"),
        ({"params": {}}, "exactly one of the input fields"),
        ({"dataframe_records": [{"prompt": 3}]}, "prompt 0 is 3, of type int"),
        ({"dataframe_split": {"columns": ["p"], "data": [["A"], [None]]}}, "prompt 1 is"),
        ({"prompt": ["A", "B"]}, "prompt 0 is ['A', 'B'], of type list"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "of type"),
        ({"inputs": ["A"] * 1001}, "there are 1001 prompts; a request must have from 1 to 1000"),
    ],
)
def test_an_invalid_prompt_is_refused_without_a_traceback(server: TestClient, body: Any, words: str) -> None:
    refused(ask(server, body), words)


def refused(answer: Any, words: str) -> None:
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["message"]
    assert "Traceback" not in answer.text
