"""The components of a model, and the recipes that choose among them.

A component is a choice of the architecture, such as how positions are encoded. To add an option, edit four places:
COMPONENTS here, the key's Literal in config.ModelConfig, the module that gpt.py builds for it, and `_list_places`
there. Without the last one, the model works but never takes the fast paths. Nothing here needs torch.
"""

from typing import Any

COMPONENTS: dict[str, tuple[Any, ...]] = {
    "positions": ("learned", "rotary"),
    "norm": ("layer", "rms"),
    "activation": ("gelu", "relu2"),
    "qk_norm": (False, True),
    "emb_norm": (False, True),
    "bias": (True, False),
    "tied": (False, True),
    "init": ("pytorch", "gpt2", "zero"),
}
"""The options of each component. The first option is the book's."""

RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {component: options[0] for component, options in COMPONENTS.items()},
    "modern": {
        "positions": "rotary",
        "norm": "rms",
        "activation": "relu2",
        "qk_norm": True,
        "emb_norm": True,
        "bias": False,
        "tied": False,
        "init": "zero",
    },
}
"""The option that each recipe chooses for each component. gpt2 is the book's model."""
