"""Tensors of which every rank holds a part, as fully_shard makes them (torch's DTensor).

Of other tensors the same may be asked: they are whole. Nothing is imported for them.
"""

from typing import Any, cast

from torch import Tensor


def is_part(tensor: Tensor) -> bool:
    """Whether other ranks hold the rest of it."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What of `tensor` lies on this rank; writing to it writes to `tensor`."""
    return cast(Any, tensor).detach().to_local() if is_part(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of `tensor`. Every rank has to ask."""
    return cast(Any, tensor).full_tensor() if is_part(tensor) else tensor


def cut(full: Tensor, like: Tensor) -> Tensor:
    """`full`, which every rank has whole, as a tensor of which each holds the part that it holds of `like`."""
    if not is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    there = cast(Any, like)
    return distribute_tensor(full, there.device_mesh, there.placements, src_data_rank=None)
