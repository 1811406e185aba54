"""Everything about one NVIDIA GPU, in less than eight minutes: training, generation, a kill, a resume, and scores.

    python -m bench.gpu --json build/gpu.json
    python -m bench.gpu --toy                 # on a CPU, in seconds: whether the script works

1. train: the training step of GPT-2's 124M at context 1,024, in bf16, compiled, with the largest batch that fits,
   beside nanoGPT-style code and Hugging Face's model, and as a share of a large matmul. The goal is 55 percent.
2. generate: 1, 8 and 64 texts at once, beside Hugging Face's model.
3. trainer: a training that is killed with SIGKILL after a checkpoint, and resumed to its end.
4. score: two models scored as the gate does it. The scores of GPU and CPU may differ by 0.001 bits per byte.

It uses the torch that is there, and of the project's other packages only those in NEEDED. On a machine without a
package index, bring the missing ones along, such as

    pip install --target carried --only-binary=:all: --python-version 3.12 pydantic
    PYTHONPATH=carried python3 -m bench.gpu --json gpu.json

A section that fails does not end the others, and what was measured is written after each. The exit code is 1 if a
section failed or a promise does not hold.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEEDED = ("torch", "numpy", "safetensors", "pydantic", "psutil", "tiktoken", "pathspec")
SECTIONS = ("train", "generate", "trainer", "score")
TOLERANCE = 1e-3
"""Bits per byte by which a score of the GPU may differ from that of the CPU."""
GOAL = 0.55
"""Share of the matmul ceiling that the training step should reach."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sections of the command line, and return the exit code."""
    asked = _parse(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"missing packages: {', '.join(missing)}. `python -m bench.gpu --help` says how to bring them along.")
        return 2
    import torch

    from bench import gpu_sections

    if not (asked.toy or torch.cuda.is_available()):
        print("there is no CUDA GPU here. `--toy` shows on a CPU whether the script works.")
        return 2
    scale = gpu_sections.TOY if asked.toy else gpu_sections.Scale()
    found: dict[str, Any] = {"machine": gpu_sections.describe_machine(scale), "seconds": {}}
    problems: list[str] = []
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), "\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "train": lambda: gpu_sections.measure_training(scale),
            "generate": lambda: gpu_sections.measure_generation(scale),
            "trainer": lambda: gpu_sections.measure_trainer(scale, Path(work)),
            "score": lambda: gpu_sections.measure_scores(scale, Path(work)),
        }
        for name in asked.only:
            began = time.perf_counter()
            try:
                found[name] = sections[name]()
                print(RENDER[name](found[name]))
                problems += list_problems(name, found[name])
            except Exception:
                traceback.print_exc()
                problems.append(f"{name}: failed, see the traceback")
            found["seconds"][name] = time.perf_counter() - began
            found["problems"] = problems
            print(f"({name}: {found['seconds'][name]:.0f} s)\n", flush=True)
            if asked.json:
                asked.json.parent.mkdir(parents=True, exist_ok=True)
                asked.json.write_text(json.dumps(found, indent=1) + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def list_problems(section: str, found: dict[str, Any]) -> list[str]:
    """Return a sentence for each promise that does not hold."""
    checks: dict[str, list[tuple[bool, str]]] = {
        "train": [
            ("error" in one, f"train: {one['name']} failed: {one.get('error')}") for one in found.get("contenders", ())
        ],
        "trainer": [
            (not found.get("was_killed", True), "trainer: it ended before it could be killed"),
            (found.get("exit_code", 0) != 0, f"trainer: the resumed one ended with exit code {found.get('exit_code')}"),
            (not found.get("every_update_is_logged_once", True), "trainer: updates are missing or logged twice"),
        ],
        "score": [
            (
                not found.get("largest_difference", 0.0) <= TOLERANCE,
                f"score: the device differs from the CPU by {found.get('largest_difference')} bits per byte",
            )
        ],
    }
    return [sentence for is_wrong, sentence in checks.get(section, []) if is_wrong]


def _render_training(found: dict[str, Any]) -> str:
    head = (found["shape"], "batch", "a step", "tokens/s", "TFLOP/s", "of matmul", "peak memory", "losses")
    rows = [
        (
            one["name"],
            *(
                f"{one['batch']}",
                f"{one['step_ms']:.1f} ms",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['tflops']:.4g}",
            ),
            f"{one['share_of_matmul']:.0%}",
            "-" if one["peak_gb"] is None else f"{one['peak_gb']:.1f} GB",
            " to ".join(f"{loss:.3f}" for loss in one["losses"]),
        )
        if "error" not in one
        else (one["name"], *["failed"] * 7)
        for one in found["contenders"]
    ]
    ours = found["contenders"][0].get("share_of_matmul", 0.0)
    reached = "reached" if ours >= GOAL else "not reached"
    ceiling = f"a large matmul makes {found['matmul_tflops']:.4g} TFLOP/s; the goal of {GOAL:.0%} is {reached}"
    has_hf = any(one["name"] == "hf" for one in found["contenders"])
    absent = "" if has_hf else "\nhf is left out: transformers is not installed"
    return f"{_table(head, rows)}\n{ceiling}{absent}"


def _render_generation(found: dict[str, Any]) -> str:
    keys = ("tokens_per_second", "drawn_tokens_per_second", "hf_tokens_per_second", "same_tokens_as_hf")
    head = (f"{found['shape']}, {found['precision']}, tokens/s", "greedy", "drawn", "hf, greedy", "same tokens")
    rows = [
        (f"{row['texts']} text{'s' * (row['texts'] > 1)}", *(_format(row.get(key, "-")) for key in keys))
        for row in found["rows"]
    ]
    return _table(head, rows)


def _render_facts(found: dict[str, Any]) -> str:
    return _table(("", ""), [(key.replace("_", " "), _format(value)) for key, value in found.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from bench.report import table  # only now, because it needs packages that may be missing

    return table(head, rows)


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_format(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "train": _render_training,
    "generate": _render_generation,
    "trainer": _render_facts,
    "score": _render_facts,
}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what is measured; all")
    parser.add_argument("--toy", action="store_true", help="on the CPU and tiny: whether it works, not how fast")
    parser.add_argument("--json", type=Path, help="where everything is written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
