"""One model over several ranks: a copy on each rank, or shards of its tensors, one per rank.

DistributedDataParallel keeps the copies equal by averaging their gradients (Li et al. 2020, "PyTorch Distributed",
arXiv:2006.15704). fully_shard keeps the shards, and gathers them block by block while they are needed (Zhao et al.
2023, "PyTorch FSDP", arXiv:2304.11277). A checkpoint holds complete tensors in both cases: `gather_to_rank_0` and
`scatter` translate.

A sharded tensor is a DTensor of torch, of which every rank holds one shard. The functions for tensors also take plain
ones, which every rank holds completely; they import nothing for them. distributed.py starts and joins the processes.
"""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptcore.model.gpt import GPTModel
from gptcore.model.loss import calc_loss_batch
from gptcore.training.distributed import Ranks

Tensors = dict[str, Tensor]


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, because DDP and FSDP need every use of the weights in one `forward`."""

    def __init__(self, model: GPTModel, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Inputs and targets (batch, tokens) int64 -> the mean loss in nats per token, a scalar."""
        return calc_loss_batch(inputs, targets, self.model, self.device)


class ParallelModel:
    """A model as the ranks hold it, and its loss on this rank's rows of a batch."""

    def __init__(self, model: GPTModel, ranks: Ranks, device: torch.device, shard: bool) -> None:
        """Move `model` to the device, and with several ranks give it the weights of rank 0."""
        self.model, self.ranks = model, ranks
        self.is_sharded = shard and ranks.size > 1
        self._with_loss = ModelWithLoss(model, device)
        self._synchronised: nn.Module = self._with_loss
        if self.is_sharded:
            _shard(self._with_loss, ranks.size, device)
        else:
            model.to(device)
        if ranks.size > 1 and not self.is_sharded:
            self._synchronised = _replicate(self._with_loss)

    def compute_loss(self, inputs: Tensor, targets: Tensor, is_last_micro_batch: bool) -> Tensor:
        """Return the mean loss, a scalar to call `backward` on. Inputs and targets are (rows, tokens) int64.

        Copies average their gradients in the `backward` of the last micro-batch of an update. Shards do so for every
        micro-batch: accumulating first would take the memory that sharding is meant to save.
        """
        is_copied = isinstance(self._synchronised, nn.parallel.DistributedDataParallel)
        postpone = is_copied and not is_last_micro_batch
        with cast(Any, self._synchronised).no_sync() if postpone else nullcontext():
            return self._synchronised(inputs, targets)

    def evaluate_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, a scalar, without gradient synchronisation."""
        return self._with_loss(inputs, targets)

    def load_weights(self, weights: Tensors) -> None:
        """Give the model the weights that rank 0 passes; those that other ranks pass are ignored."""
        if self.ranks.size == 1:
            self.model.load_state_dict(weights)
            return
        for name, own in self.model.state_dict().items():
            scatter(self.ranks, own, weights.get(name))


def _replicate(module: ModelWithLoss) -> nn.Module:
    with warnings.catch_warnings():
        # torch warns about the new name of an argument, which torch 2.9 does not know yet.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def _shard(module: ModelWithLoss, size: int, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size,))
    for block in module.model.trf_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, of which other ranks hold the other shards."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of `tensor`, or `tensor` itself if it is not sharded. Both share their memory."""
    return cast(Any, tensor).detach().to_local() if is_sharded(tensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """Return the complete `tensor` on every rank. All ranks have to call this."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def shard_like(complete: Tensor, like: Tensor) -> Tensor:
    """Shard `complete`, which every rank holds, in the way `like` is sharded. Return it unchanged if `like` is not."""
    if not is_sharded(like):
        return complete
    from torch.distributed.tensor import distribute_tensor

    layout = cast(Any, like)
    return distribute_tensor(complete, layout.device_mesh, layout.placements, src_data_rank=None)


def gather_to_rank_0(ranks: Ranks, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the complete tensors on rank 0, and {} on other ranks. Gathered tensors are moved to main memory."""
    kept = {}
    for name, tensor in tensors.items():
        complete = gather(tensor)
        if ranks.is_rank_0:
            kept[name] = complete.cpu() if is_sharded(tensor) else complete
    return kept


def scatter(ranks: Ranks, own: Tensor, complete: Tensor | None) -> None:
    """Overwrite `own`, on every rank, with its shard (or its copy) of the tensor `complete` of rank 0."""
    received = torch.empty(own.shape, dtype=own.dtype, device=own.device)
    if ranks.is_rank_0:
        assert complete is not None, "rank 0 has read the tensor"
        received.copy_(complete)
    received = ranks.broadcast(received)
    with torch.no_grad():
        local_shard(own).copy_(local_shard(shard_like(received, own)))
