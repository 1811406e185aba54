"""Detect that a user has hooked, wrapped or replaced a module of a model.

Faster code that computes the same as a module's `forward` without calling it would skip the user's changes. Such code
calls `is_untouched` first.
"""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind`, so that computing what `kind` computes is the same as calling `module`.

    False for subclasses, for parametrised modules (which are subclasses too), and for modules that have a hook, were
    compiled in place or have a method of their own, such as another `forward`.
    """
    if type(module) is not kind or module._compiled_call_impl is not None:
        return False
    if any(name in vars(kind) for name in vars(module)):
        return False
    return not _has_any_global_hook() and not any(getattr(module, hooks) for hooks in _HOOKS)
