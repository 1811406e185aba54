"""The parts that a model may be made of, and the recipes that choose among them. Nothing here needs torch."""

from typing import Any

PARTS: dict[str, tuple[Any, ...]] = {
    "positions": ("learned", "rotary"),
    "norm": ("layer", "rms"),
    "activation": ("gelu", "relu2"),
    "qk_norm": (False, True),
    "emb_norm": (False, True),
    "bias": (True, False),
    "tied": (False, True),
    "init": ("pytorch", "gpt2", "zero"),
}
"""What each may be, the book's first."""

RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {part: options[0] for part, options in PARTS.items()},
    "modern": dict(zip(PARTS, ("rotary", "rms", "relu2", True, True, False, False, "zero"))),
}
"""The parts that each recipe chooses. gpt2 is the book's model."""
