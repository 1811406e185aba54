"""Install packages as pip would, but with uv, which takes a tenth of the time.

    python .ci/install.py --editable ".[dev]"

uv does not read pip's settings, so this script passes them on: index, directory of wheels, certificate, constraint and
time-out. If another setting decides which packages are installed or how a server is reached, pip installs. pip also
installs if uv cannot be installed or fails. So behind a mirror, this script contacts no server that pip would not.
"""

import ast
import os
import shutil
import subprocess
import sys

OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
"""uv's option for each of these settings of pip. Each setting may have several values."""
VARIABLES = {"cert": "SSL_CERT_FILE", "timeout": "UV_HTTP_TIMEOUT", "default-timeout": "UV_HTTP_TIMEOUT"}
HARMLESS = {
    *("disable-pip-version-check", "no-input", "no-color", "no-cache-dir", "cache-dir", "progress-bar", "quiet"),
    *("verbose", "config-file", "root-user-action", "require-virtualenv", "no-compile", "no-python-version-warning"),
}
PIP = [sys.executable, "-m", "pip"]


def pip_settings() -> dict[str, str]:
    """Return the settings of pip's files and variables for `install`. More specific settings win."""
    listed = subprocess.run([*PIP, "config", "list"], check=True, capture_output=True, text=True).stdout
    scopes: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, found, value = line.partition("=")
        scope, _, key = name.rpartition(".")
        if found and scope in scopes:
            scopes[scope][key] = str(ast.literal_eval(value))
    return {**scopes["global"], **scopes["install"], **scopes[":env:"]}


def uv_command(settings: dict[str, str]) -> tuple[list[str], dict[str, str]] | None:
    """Return uv's command and variables for these settings of pip, or None if uv might install something else."""
    if not set(settings) <= {*OPTIONS, *VARIABLES, *HARMLESS} or shutil.which("keyring"):
        return None
    # Take the best version of all indexes, as pip does.
    command = ["pip", "install", "--quiet", "--no-config", "--index-strategy", "unsafe-best-match"]
    for key, option in OPTIONS.items():
        for value in settings.get(key, "").split():
            command += [option, value]
    return command, {VARIABLES[key]: value for key, value in settings.items() if key in VARIABLES}


def install(arguments: list[str]) -> int:
    """Install the packages that the arguments name, as for `pip install`, into the environment of this Python."""
    wanted = ["--constraint", "constraints.txt", *arguments]
    pip = [*PIP, "install", "-qq", "--disable-pip-version-check"]
    if (made := uv_command(pip_settings())) is not None:
        command, variables = made
        environment = {**os.environ, **variables}
        if subprocess.run([*pip, "--constraint", "constraints.txt", "uv"]).returncode == 0:
            uv = [sys.executable, "-m", "uv", *command, "--python", sys.executable, *wanted]
            if subprocess.run(uv, env=environment).returncode == 0:
                return 0
        print("uv could not install; pip does it", file=sys.stderr)
    return subprocess.run([*pip, "--no-compile", *wanted]).returncode


if __name__ == "__main__":
    sys.exit(install(sys.argv[1:]))
