"""Muon: momentum whose update is made orthogonal, for the matrices of the blocks; AdamW for everything else.

An orthogonal update moves a matrix by the same amount in every direction, including those that the gradient hardly
shows (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"). Its size is matched to AdamW's
(Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982), so both use one learning rate and one weight
decay. optim.py decides which parameter goes where.
"""

from collections import defaultdict
from collections.abc import Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptcore.training.parallel import gather, is_sharded, shard_like

BETAS = (0.9, 0.95)
_EPS = 1e-8
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial that, applied repeatedly, brings singular values near 1 fastest, if not quite
to 1 (Jordan et al. 2024)."""
_ITERATIONS = 4
_MARGIN = 1.02
"""Factor on the bound of the singular values, for rounding."""
_RMS = 0.2
"""Root mean square of AdamW's updates, as measured by Liu et al."""


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that does not import torch's compiler.

    torch wraps these methods to exclude them from compilation, and the wrapper imports the compiler on its first call:
    1.3 s at the start of every training, as long as importing torch itself. These are the same methods, unwrapped.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class Muon(EagerOptimizer):
    """Updates parameter groups with `orthogonal: True`, which hold matrices, by Muon, and other groups by AdamW."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters once from their gradients."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self._step_orthogonal(parameters, group["lr"], group["weight_decay"])
            elif parameters:
                self._step_adamw(parameters, group["lr"], group["weight_decay"])

    def _step_orthogonal(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update matrices along their orthogonalised momentum, those of equal shape together."""
        by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape, matrix.device].append(matrix)
        for (shape, _), same_shape in by_shape.items():
            size = lr * _RMS * max(shape) ** 0.5
            for matrix, direction in zip(same_shape, self._compute_directions(same_shape)):
                # Both are (rows, columns).
                matrix.mul_(1 - lr * weight_decay).add_(direction.to(matrix.dtype), alpha=-size)

    def _compute_directions(self, matrices: list[Tensor]) -> Iterable[Tensor]:
        """Return the orthogonal direction (rows, columns) of each matrix. All matrices have one shape."""
        if not is_sharded(matrices[0]):
            stacked = torch.stack([self._update_momentum(matrix) for matrix in matrices])  # (matrices, rows, columns)
            return orthogonalise(stacked)
        # One matrix at a time: a device that needs shards has no room for all complete matrices.
        return (
            shard_like(orthogonalise(gather(self._update_momentum(matrix))[None])[0], matrix) for matrix in matrices
        )

    def _update_momentum(self, matrix: Tensor) -> Tensor:
        """Update the momentum of a matrix, and return Nesterov's look-ahead of it: (rows, columns)."""
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]  # (rows, columns)
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM)

    def _step_adamw(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update the other parameters by torch's fused AdamW."""
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                self.state[parameter] |= {"step": torch.zeros((), device=parameter.device), **moments}
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


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices (matrices, rows, columns) with singular values near 1.

    The polynomial changes the singular values alone. Those from 0.005 to 1 times the bound below end between 0.66 and
    1.20; smaller ones grow by a factor of up to 141.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).to(_choose_dtype(matrices))  # (matrices, short, long), as every x below
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # so that no product underflows
    gram = x @ x.mT  # (matrices, short, short), as every matrix below but x
    squared = gram @ gram
    # The eigenvalues of `gram` are squared singular values. None exceeds the norm of their fourth powers (Schatten),
    # which is a closer bound than the norm of x and saves an iteration.
    bound = _MARGIN * squared.norm(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-7)  # (matrices, 1, 1)
    x, gram, squared = x * bound.rsqrt(), gram / bound, squared / bound.square()
    use_gram = x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]
    x = (_iterate_on_gram if use_gram else _iterate)(x, gram, squared)
    return x.mT if is_tall else x  # (matrices, rows, columns)


def _iterate(x: Tensor, gram: Tensor, squared: Tensor) -> Tensor:
    """Apply the polynomial to x (matrices, short, long). `gram` is x @ x.mT, and `squared` is gram @ gram."""
    a, b, c = _COEFFICIENTS
    for number in range(_ITERATIONS):
        if number > 0:
            gram = x @ x.mT
            squared = gram @ gram
        x = torch.baddbmm(x, b * gram + c * squared, x, beta=a)
    return x


def _iterate_on_gram(x: Tensor, gram: Tensor, squared: Tensor) -> Tensor:
    """Return what `_iterate` returns, with two products of the size of x instead of eight.

    Each iteration multiplies x from the left by a polynomial of `gram`, so the factors can be multiplied before x.
    ("Gram Newton-Schulz", tridao.me, 2026.) Rounding grows with the square of x's condition, too much for bf16.
    """
    a, b, c = _COEFFICIENTS
    product: Tensor | None = None
    for number in range(_ITERATIONS):
        if number > 0:
            squared = gram @ gram
        factor = b * gram + c * squared
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else product @ factor
        if number + 1 < _ITERATIONS:
            gram = gram @ factor @ factor
    assert product is not None
    return product @ x


def _choose_dtype(matrices: Tensor) -> torch.dtype:
    """Return the dtype in which the device multiplies fastest and exactly enough."""
    return torch.bfloat16 if matrices.is_cuda else torch.float32
