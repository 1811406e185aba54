"""Package installation: by uv with pip's settings, or by pip if uv might behave differently."""

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "install.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pips_indexes_wheels_constraints_and_certificates_are_passed_to_uv(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://mirror.example/simple\nextra-index-url =\n  https://a.example/simple\n"
        "  https://b.example/simple\ncert = /etc/own.pem\n[install]\nfind-links = /wheels\n"
        "constraint = /etc/own.txt\n"
    )
    for name in [name for name in script.os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_INDEX_URL", "https://nearer.example/simple")
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    settings = script.pip_settings()
    assert settings["index-url"] == "https://nearer.example/simple", "a variable overrides a file, as in pip"
    command, variables = script.uv_command(settings)
    said = " ".join(command)
    assert "--index-url https://nearer.example/simple" in said and "mirror.example" not in said
    assert "--extra-index-url https://a.example/simple --extra-index-url https://b.example/simple" in said
    assert "--find-links /wheels" in said and variables["SSL_CERT_FILE"] == "/etc/own.pem"
    assert "--constraint /etc/own.txt" in said


@pytest.mark.parametrize("works", [True, False], ids=["uv works", "uv fails"])
def test_every_installation_has_the_constraints_of_the_repository(
    script: Any, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0 if works or "uv" not in command[:3] else 1)

    monkeypatch.setattr(script, "pip_settings", dict)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.install(["--editable", ".[dev]"]) == 0
    installed = [command[command.index("-m") + 1] for command in commands]
    assert installed == (["pip", "uv"] if works else ["pip", "uv", "pip"]), "uv, and pip if uv fails"
    for command in commands:
        assert command[command.index("--constraint") + 1] == "constraints.txt", command
    assert (SCRIPT.parents[1] / "constraints.txt").exists()


@pytest.mark.parametrize(
    "name", ["client-cert", "proxy", "no-index", "only-binary", "keyring-provider", "anything-new"]
)
def test_pip_installs_the_packages_if_uv_might_not_follow_a_setting(
    script: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda program: None)
    assert script.uv_command({"cert": "/a.pem", "quiet": "1"}) is not None
    assert script.uv_command({"cert": "/a.pem", name: "x"}) is None
    monkeypatch.setattr(script.shutil, "which", lambda program: f"/bin/{program}")
    assert script.uv_command({}) is None, "pip would ask the keyring for passwords"
