"""A GPU for machines without one: tensors that say they are on cuda:0, and compute on the CPU.

As on a real GPU, a call with tensors of the GPU and tensors in main memory raises an error. So code that forgets to
move a tensor fails here too, and code that moves all of them has the results of the CPU, bit for bit. Speed, memory and
rounding are not those of a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

CUDA = torch.device("cuda", 0)
_BETWEEN_DEVICES = ("copy_", "__getitem__")
"""Calls that may have tensors of both kinds: a GPU copies, and takes indices, from main memory."""
_TO_MAIN_MEMORY = ("cpu", "tolist", "item", "__bool__", "__int__", "__float__")
_PRODUCTS = ("linear", "mm", "matmul", "__matmul__", "bmm", "addmm")


class FakeGpu(TorchFunctionMode):
    """While it is active, tensors may be created on `cuda` in this thread, and moved there in every thread."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        """The number of matrix products on `cuda` and on `cpu`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _PRODUCTS:
            self.products["cuda" if any(isinstance(one, _GpuTensor) for one in args) else "cpu"] += 1
        return _call(func, args, kwargs or {})


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Let torch report one GPU, until the context ends."""
    to = Tensor.to
    with pytest.MonkeyPatch.context() as patched, FakeGpu() as gpu:
        patched.setattr(Tensor, "to", lambda self, *args, **kwargs: _call(to, (self, *args), kwargs))
        patched.setattr(Tensor, "pin_memory", lambda self: self)
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 1)
        patched.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)
        patched.setattr(torch.cuda, "get_rng_state", lambda _: torch.zeros(1))
        patched.setattr(torch.cuda, "set_rng_state", lambda *_: None)
        # So that Module.to makes new parameters, instead of putting other numbers into those that it has.
        patched.setattr(torch, "_has_compatible_shallow_copy_type", lambda *pair: type(pair[0]) is type(pair[1]))
        yield gpu


class _GpuTensor(Tensor):
    """A tensor that says it is on the GPU. `held` has its numbers; its own are never used."""

    held: Tensor
    device = property(lambda _: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: Any, held: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            made = Tensor._make_subclass(cls, torch.empty(0))
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call with the held tensors. The result is on the GPU if a device in the arguments says so, or if a tensor is."""
    name = getattr(func, "__name__", "")
    if func is torch.device or name == "_parse_to":  # with which Module.to reads its arguments
        return func(*args, **kwargs)
    flat, structure = tree_flatten((args, {key: value for key, value in kwargs.items() if key != "pin_memory"}))
    on_gpu = [value for value in flat if isinstance(value, _GpuTensor)]
    if on_gpu:
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Copy it to main memory first.")
        in_memory = [value for value in flat if isinstance(value, Tensor) and not isinstance(value, _GpuTensor)]
        if any(tensor.dim() for tensor in in_memory) and name not in _BETWEEN_DEVICES:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got some on cuda:0 and cpu")
    asked = [torch.device(value) for value in flat if _is_device(value)]
    plain = [value.held if isinstance(value, _GpuTensor) else "cpu" if _is_device(value) else value for value in flat]
    plain_args, plain_kwargs = tree_unflatten(plain, structure)
    result = func(*plain_args, **plain_kwargs)
    goes_to_gpu = asked[-1].type == "cuda" if asked else bool(on_gpu) and name not in _TO_MAIN_MEMORY
    known = {id(tensor.held): tensor for tensor in on_gpu}  # an operation in place returns its argument

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if goes_to_gpu and id(value) in known:
            return known[id(value)]
        moved = value.clone() if any(value is one for one in plain) else value
        return _GpuTensor(moved) if goes_to_gpu else moved

    if not (goes_to_gpu or on_gpu):
        return result
    return iter([put(row) for row in result]) if name == "__iter__" else tree_map(put, result)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "cuda", "cuda:0"))
