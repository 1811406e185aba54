"""How one model is spread over the ranks: copied to each of them, or cut in parts of which each holds one.

Copies are kept equal by DistributedDataParallel, which averages their gradients (Li et al. 2020, "PyTorch Distributed",
arXiv:2006.15704). Parts are put together block by block while they are needed, by fully_shard (Zhao et al. 2023,
"PyTorch FSDP", arXiv:2304.11277). Either way a checkpoint holds whole tensors: here they are gathered and dealt out.
"""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptcore.learning.parts import cut, gathered, is_part, local
from gptcore.learning.ranks import Ranks
from gptcore.loss import calc_loss_batch
from gptcore.model import GPTModel

Tensors = dict[str, Tensor]


class Learner(nn.Module):
    """A model with its loss, so that everything that uses the weights happens inside one `forward`."""

    def __init__(self, model: GPTModel, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Ids (batch, tokens), twice -> the mean loss in nats, a scalar."""
        return calc_loss_batch(inputs, targets, self.model, self.device)


class Spread:
    """A model as the ranks hold it, and the loss of what is this rank's part of a batch."""

    def __init__(self, model: GPTModel, ranks: Ranks, device: torch.device, shard: bool) -> None:
        """Moves `model` to the device. With several ranks its weights become the first rank's."""
        self.model, self.ranks = model, ranks
        self.is_sharded = shard and ranks.size > 1
        self._learner = Learner(model, device)
        self._synchronised: nn.Module = self._learner
        if self.is_sharded:
            _shard(self._learner, ranks.size, device)
        else:
            model.to(device)
        if ranks.size > 1 and not self.is_sharded:
            self._synchronised = _copied(self._learner)

    def loss(self, inputs: Tensor, targets: Tensor, is_last: bool) -> Tensor:
        """The mean loss, to call `backward` on. With the last micro-batch of an update, copies average gradients.

        Parts do so with every micro-batch: adding up first would take the memory that sharding is to save.
        """
        wait = isinstance(self._synchronised, nn.parallel.DistributedDataParallel) and not is_last
        with cast(Any, self._synchronised).no_sync() if wait else nullcontext():
            return self._synchronised(inputs, targets)

    def evaluated(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, for no gradient."""
        return self._learner(inputs, targets)

    def load(self, weights: Tensors) -> None:
        """Gives the model the weights that the first rank holds; what other ranks give does not count."""
        if self.ranks.size == 1:
            self.model.load_state_dict(weights)
            return
        for name, own in self.model.state_dict().items():
            deal(self.ranks, own, weights.get(name))


def _copied(learner: Learner) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a new name for an argument, which torch 2.9 has not got
        return nn.parallel.DistributedDataParallel(learner, broadcast_buffers=False, gradient_as_bucket_view=True)


def _shard(learner: Learner, size: int, device: torch.device) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size,))
    for block in learner.model.trf_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)


def whole(ranks: Ranks, tensors: Mapping[str, Tensor]) -> Tensors:
    """All of each tensor, for the first rank, in its main memory where parts had to be gathered; {} for the others."""
    held = {}
    for name, tensor in tensors.items():
        full = gathered(tensor)
        if ranks.is_first:
            held[name] = full.cpu() if is_part(tensor) else full
    return held


def deal(ranks: Ranks, own: Tensor, full: Tensor | None) -> None:
    """Writes to `own` this rank's part of the first rank's `full`."""
    on_device = torch.empty(own.shape, dtype=own.dtype, device=own.device)
    if ranks.is_first:
        assert full is not None, "the first rank has read it"
        on_device.copy_(full)
    part = ranks.broadcast(on_device)
    with torch.no_grad():
        local(own).copy_(local(cut(part, own)))
