"""Which packages gptcore may import, and which modules importing gptcore loads."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptcore

PACKAGE = Path(gptcore.__file__).parent
PATHS = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): path for path, name in sorted(PATHS.items())}
FORBIDDEN = ("prefect", "mlflow", "flows")


def python(code: str) -> str:
    """Run `code` in a fresh interpreter that finds this checkout's package, and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_can_be_imported_without_prefect_mlflow_and_flows():
    names = list(MODULES)
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Absent())
for name in {FORBIDDEN}:
    try: importlib.import_module(name)
    except ModuleNotFoundError: pass
    else: raise SystemExit(f"{{name}} was not blocked")
for name in {names}: importlib.import_module(name)
print(len({names}), "imported")
"""
    assert python(code) == f"{len(MODULES)} imported\n"
    assert {"gptcore.model.gpt", "gptcore.train", "gptcore.training.trainer"} < MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_no_function_of_the_core_imports_prefect_mlflow_or_flows(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        assert not {module.partition(".")[0] for module in imported} & set(FORBIDDEN)


def test_importing_the_package_loads_neither_torch_nor_pydantic():
    heavy = ("torch", "pydantic", "numpy", "tiktoken", "matplotlib", "pyarrow")
    assert python(f"import gptcore, sys; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


def test_the_modules_for_text_and_configuration_do_not_load_torch():
    rooms = "gptcore.config, gptcore.manifest, gptcore.corpus.sources, gptcore.corpus.ingest, gptcore.tokens.tokenizer"
    assert python(f"import sys, {rooms}; print('torch' in sys.modules)") == "False\n"


def test_every_exported_name_is_listed_and_resolves_to_the_object_of_its_module():
    code = """
import gptcore
for name in gptcore.__all__:
    assert name in dir(gptcore), name
    value = getattr(gptcore, name)
    assert value.__name__ == name and value.__module__.startswith("gptcore."), name
from gptcore import *
print(len(gptcore.__all__), GPTModel is gptcore.GPTModel)
"""
    assert python(code) == "20 True\n"


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="GPTModle"):
        _ = gptcore.GPTModle
