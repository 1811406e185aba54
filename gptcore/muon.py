"""Muon: momentum whose step is made orthogonal, for the matrices inside a network; AdamW for everything else.

An update that is orthogonal moves a matrix by the same amount in every direction, also in those that the gradient
hardly shows (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"). Its size is matched to
AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982), so one learning rate and one weight
decay serve both.
"""

from collections import defaultdict
from collections.abc import Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptcore.learning.parts import cut, gathered, is_part

BETAS = (0.9, 0.95)
_EPS = 1e-8
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose repetition brings singular values near 1 fastest, if not quite to 1 (Jordan et al. 2024)."""
_ITERATIONS = 5
_RMS = 0.2
"""Root mean square of AdamW's updates, as Liu et al. found it."""


class Eager(torch.optim.Optimizer):
    """An optimiser that leaves torch's compiler alone.

    torch's own methods import it when they are first called, to be kept out of it, which takes as long as the import of
    torch itself: 1.3 s at the start of every training. These are the same methods without that.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class Muon(Eager):
    """Groups of parameters with `orthogonal: True` hold matrices and are updated by Muon, the others by AdamW."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients as they are."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self._step_orthogonal(parameters, group["lr"], group["weight_decay"])
            elif parameters:
                self._step_adamw(parameters, group["lr"], group["weight_decay"])

    def _step_orthogonal(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape, matrix.device].append(matrix)
        for (shape, _), same in by_shape.items():
            size = lr * _RMS * max(shape) ** 0.5
            for matrix, direction in zip(same, self._directions(same)):
                matrix.mul_(1 - lr * weight_decay).add_(direction.to(matrix.dtype), alpha=-size)

    def _directions(self, same: list[Tensor]) -> Iterable[Tensor]:
        """The steps of matrices of one shape."""
        if not is_part(same[0]):
            return orthogonalised(torch.stack([self._nesterov(matrix) for matrix in same]))
        # One after the other: only one is ever whole on a device that has no room for all.
        return (cut(orthogonalised(gathered(self._nesterov(matrix))[None])[0], matrix) for matrix in same)

    def _nesterov(self, matrix: Tensor) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM)

    def _step_adamw(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                begin = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                self.state[parameter] |= {"step": torch.zeros((), device=parameter.device), **begin}
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=_EPS,
            maximize=False,
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """(number, rows, columns): each matrix with singular values near 1, by Newton and Schulz's iteration."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
