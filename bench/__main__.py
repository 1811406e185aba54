"""gptcore compared with its peers on this machine: training steps, generation, tokenising and the loader.

    python -m bench --json build/bench/bench.json
    python -m bench --shapes S M --only step --rounds 10
    python -m bench --quick

Every contender runs in its own process, and they take turns. Tables hold medians and, because a shared machine changes
its speed, ratios within this run. peers.py describes the contenders. Peers that are not installed are left out with a
message. The exit code is 1 if a peer of the same architecture that began from our weights has other losses.

bench.learning measures how much a recipe learns in its time, and bench.checkpoints what saving costs.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench import peers, report, tokenizing
from bench.generation import CONTENDERS as GENERATION_CONTENDERS
from bench.generation import SHAPES as GENERATION_SHAPES
from bench.generation import Generation, measure_generation
from bench.shapes import SHAPES
from bench.steps import Steps, measure_loader, measure_steps

SECTIONS = ("step", "generate", "tokenize", "loader")
CONTENDERS = (peers.OURS, peers.PLAIN, peers.HF, peers.LITGPT)
GENERATION_PEERS = GENERATION_CONTENDERS[1:]
DROP_RATE, DROPOUT_SHAPE = 0.1, "S"
_PACKAGES = ("torch", "numpy", "tiktoken", "transformers", "tokenizers", "litgpt")
_QUICK_ROUNDS, _QUICK_MB, _QUICK_TOKENS = 3, 2, 20
_MB, _GENERATION_ROUNDS, _TOKENIZING_ROUNDS, _DROPOUT_ROUNDS, _LOADER_ROUNDS = 50, 3, 3, 5, 10


def main() -> int:
    """Run the benchmarks of the command line; return the exit code."""
    asked = _arguments()
    names = _available(asked)
    if len(names) == 1:
        print("no peer takes part: name one with --contenders, such as plain", file=sys.stderr)
        return 2
    began = time.perf_counter()
    about = machine(asked.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n", flush=True)
    found: dict[str, Any] = {"machine": about, "command": sys.argv[1:]}
    measured: list[Steps] = []
    sections: dict[str, Callable[[], Any]] = {
        "step": lambda: _steps(asked, names, measured),
        "generate": lambda: _generation(asked, names),
        "tokenize": lambda: _tokenizing(asked),
        "loader": lambda: _loader(asked),
    }
    for section in asked.only:
        found[section] = sections[section]()
    found["seconds"] = time.perf_counter() - began
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
        if measured:
            report.plot(measured, asked.json.with_suffix(".png"))
    print(f"{found['seconds']:.0f} s in all")
    wrong = report.losses_differ(measured)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def machine(threads: int) -> dict[str, Any]:
    """Return what the figures depend on: the machine, Python and the versions of packages."""
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES if _is_installed(package)}
    gigabytes = round(psutil.virtual_memory().total / 1e9)
    return {"cpu": _cpu(), "threads": threads, "memory_gb": gigabytes, "python": platform.python_version(), **versions}


def _steps(asked: argparse.Namespace, names: Sequence[str], measured: list[Steps]) -> list[dict[str, Any]]:
    wanted = [(SHAPES[name], 0.0, SHAPES[name].rounds) for name in asked.shapes]
    if DROPOUT_SHAPE in asked.shapes:
        wanted.append((SHAPES[DROPOUT_SHAPE], DROP_RATE, _DROPOUT_ROUNDS))
    for shape, drop_rate, rounds in wanted:
        measured.append(measure_steps(shape, names, drop_rate, asked.rounds or rounds, asked.threads, asked.nanogpt))
        print(report.steps_table(measured[-1]), "\n", flush=True)
    print(report.steps_summary(measured), "\n", flush=True)
    return [steps.to_json() for steps in measured]


def _generation(asked: argparse.Namespace, names: Sequence[str]) -> list[dict[str, Any]]:
    made: list[Generation] = []
    if not set(names) & set(GENERATION_PEERS):
        print(f"generation is left out: of its contenders {', '.join(GENERATION_PEERS)} none takes part\n")
        return []
    for name in GENERATION_SHAPES:
        if name in asked.shapes:
            rounds, new = asked.rounds or _GENERATION_ROUNDS, _QUICK_TOKENS if asked.quick else None
            made += measure_generation(SHAPES[name], names, rounds, asked.threads, new)
    if made:
        print(report.generation_table(made), "\n", flush=True)
    return [one.to_json() for one in made]


def _tokenizing(asked: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in tokenizing.CONTENDERS if _is_installed(tokenizing.PACKAGES.get(name, "tiktoken"))]
    megabytes = _QUICK_MB if asked.quick else _MB
    rounds = asked.rounds or _TOKENIZING_ROUNDS
    made = tokenizing.measure_tokenizing(names, megabytes * 10**6, rounds, asked.threads, asked.text)
    print(report.tokenizing_table(made), "\n", flush=True)
    return made.to_json()


def _loader(asked: argparse.Namespace) -> dict[str, Any]:
    loader = measure_loader(SHAPES[DROPOUT_SHAPE], asked.rounds or _LOADER_ROUNDS, asked.threads)
    print(report.loader_line(loader), "\n", flush=True)
    return loader.to_json()


def _available(asked: argparse.Namespace) -> list[str]:
    """Return the requested contenders that can run here."""
    names = list(asked.contenders or CONTENDERS)
    if asked.nanogpt and not asked.contenders:
        names.append(peers.NANOGPT)
    missing = {name: package for name in names if (package := _missing(name, asked))}
    for name, package in missing.items():
        print(f"{name} is left out: {package}")
    return [peers.OURS, *(name for name in names if name not in missing and name != peers.OURS)]


def _missing(name: str, asked: argparse.Namespace) -> str | None:
    base = name.split("+")[0]
    if base == peers.NANOGPT and not asked.nanogpt:
        return "name a checkout with --nanogpt"
    package = peers.PACKAGES.get(base)
    return f"{package} is not installed; `make bench` installs it" if package and not _is_installed(package) else None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what is measured; all of it")
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="of steps and generation; all of them")
    add(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help="beside ours: plain, hf, hf+padded, nanogpt+padded+compiled, ...",
    )
    add("--rounds", type=int, help="how often each contender is asked; by default as often as there is time")
    add("--quick", action="store_true", help="few rounds, tokens and megabytes: whether it works, not how fast")
    add("--nanogpt", type=Path, help="a checkout of nanoGPT, whose model.py takes part")
    add("--text", type=Path, help="whose words the text to be tokenised is made of; Python's reference")
    add(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="of every contender; one for each core",
    )
    add("--json", type=Path, help="where everything is written; the plot goes beside it")
    asked = parser.parse_args()
    for name in asked.contenders or ():
        if not peers.is_known(name):
            parser.error(
                f"there is no contender {name!r}: known are ours, plain, hf, litgpt and nanogpt, and of hf and "
                f"nanogpt +padded and +compiled"
            )
    asked.rounds = asked.rounds or (_QUICK_ROUNDS if asked.quick else None)
    asked.nanogpt = str(asked.nanogpt.resolve()) if asked.nanogpt else None
    return asked


if __name__ == "__main__":
    sys.exit(main())
