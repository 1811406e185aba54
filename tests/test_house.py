"""The layers of the code: imports run down, and there is no import cycle.

A room is a folder or module directly in a package. A floor is a layer of rooms.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
GPTCORE = (
    (
        *("errors", "credentials", "sections", "components", "config", "devices"),
        *("manifest", "progress", "processes", "processor", "records"),
    ),
    *(("model",), ("corpus",), ("tokens",), ("generation",), ("training",), ("bundle",), ("evaluation",)),
    *(("huggingface",), ("train",), ("__init__",)),
)
"""Floors from the bottom up. A room imports only rooms of its own or a lower floor."""
FLOWS = (
    *(("state", "web"), ("notifications",), ("config",), ("tracking",), ("cards",), ("registry",), ("retrain",)),
    *(("operations",), ("watch", "operate"), ("deployments",), ("endpoint",), ("cli",), ("__init__",)),
)
FLOORS = {
    f"{package}.{room}": (number, floor)
    for number, (package, floors) in enumerate((("gptcore", GPTCORE), ("flows", FLOWS)))
    for floor, rooms in enumerate(floors)
    for room in rooms
}


def modules() -> dict[str, Path]:
    paths = (path for package in ("gptcore", "flows") for path in (REPOSITORY / package).rglob("*.py"))
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in paths}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield our modules that a file imports: at its top, lazily, or only for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        for name in names:
            if name in known:
                yield name
            elif f"{name}.__init__" in known and name not in ("gptcore", "flows"):
                yield f"{name}.__init__"


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def test_every_room_is_on_a_floor() -> None:
    assert {room_of(module) for module in modules()} == set(FLOORS)


def test_imports_run_down_only() -> None:
    back = [
        f"{module} -> {imported}"
        for module, targets in arrows().items()
        for imported in targets
        if FLOORS[room_of(imported)] > FLOORS[room_of(module)]
    ]
    assert not back, back


def test_there_is_no_import_cycle() -> None:
    left = arrows()
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    # Every module that is left imports another one that is left. A package's `__init__` imports its modules lazily.
    assert not left, f"modules that are in an import cycle or import one: {sorted(left)}"
