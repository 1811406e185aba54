"""Whether a user has hooked, wrapped or replaced a part of a model: whoever takes a short cut past `forward` asks."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is exactly a `kind`, so that computing what `kind` computes is the same as calling it.

    False for subclasses and parametrised modules (which are subclasses too), and for modules that are hooked, compiled
    in place or given a `forward` of their own.
    """
    if type(module) is not kind or "forward" in vars(module) or module._compiled_call_impl is not None:
        return False
    return not _has_any_global_hook() and not any(getattr(module, hooks) for hooks in _HOOKS)
