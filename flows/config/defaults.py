"""Defaults of a pipeline that are not those of gptcore's sections: the recipe, the optimizer and its learning rate.

A pipeline has the defaults that learn most. gptcore's own stay the book's, for users of the library. A warm start has
the book's too, because the weights of imports, and of versions of earlier releases, fit no other recipe.
"""

from collections.abc import Mapping
from typing import Any

from gptcore.config import ModelConfig, TrainConfig

MODEL = ModelConfig(recipe="modern")
TRAIN = TrainConfig(optimizer="muon", learning_rate=0.02)
"""The rate was better than 0.012, 0.03, 0.04 or 0.06 (bench/RESULTS.md, "Learning")."""
_BOOK_MODEL, _BOOK_TRAIN = ModelConfig(), TrainConfig()


def fill_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the recipe, the optimizer and its learning rate where a pipeline's plain sections leave them out."""
    model, train = given.get("model", {}), given.get("train", {})
    if not (isinstance(model, Mapping) and isinstance(train, Mapping)):
        return dict(given)  # wrong data, which is reported as it is
    is_warm_start = train.get("start_from", "scratch") != "scratch"
    own_model, own_train = (_BOOK_MODEL, _BOOK_TRAIN) if is_warm_start else (MODEL, TRAIN)
    with_optimizer = {"optimizer": own_train.optimizer, **train}
    rate = (TRAIN if with_optimizer["optimizer"] == TRAIN.optimizer else _BOOK_TRAIN).learning_rate
    return {
        **given,
        "model": {"recipe": own_model.recipe, **model},
        "train": {"learning_rate": rate, **with_optimizer},
    }


def describe_new_defaults(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return how to keep the defaults of earlier releases, if settings changed from those to today's. Empty otherwise.

    `then` and `now` hold settings as text under dotted keys. Example: "these are the defaults now: to keep the old
    ones, set model.recipe: gpt2 and train.optimizer: adamw".
    """
    old, new = str(_BOOK_TRAIN.learning_rate), str(TRAIN.learning_rate)
    rates = then.get("train.learning_rate"), now.get("train.learning_rate")
    keep, note = [], ""
    if (then.get("model.recipe"), now.get("model.recipe")) == (_BOOK_MODEL.recipe, MODEL.recipe):
        keep.append(f"model.recipe: {_BOOK_MODEL.recipe}")
    if now.get("train.optimizer") == TRAIN.optimizer:
        if then.get("train.optimizer") == _BOOK_TRAIN.optimizer:
            keep.append(f"train.optimizer: {_BOOK_TRAIN.optimizer}")
            note = f" (train.learning_rate {rates[1]} stays; muon's default is {new})" if rates[0] == rates[1] else ""
        elif rates == (old, new):
            keep.append(f"train.learning_rate: {old}")
    return f"these are the defaults now: to keep the old ones, set {' and '.join(keep)}{note}" if keep else ""
