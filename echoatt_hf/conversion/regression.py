"""Ridge regression from sums over tokens: what is to be added to a projection so that its output comes closer to a target."""

from dataclasses import dataclass

import torch
from torch import nn

from .alignment import input_dim, replace_parameter


__all__ = ["RIDGES", "NormalEquations", "add_to_projection", "solve_ridge"]

# Regularisation that is tried, in units of the mean eigenvalue of the normal equations.
RIDGES = tuple(10.0**exponent for exponent in range(-6, 3))


@dataclass
class NormalEquations:
    """
    Sums over tokens for the regression of what is missing, R `(N, O)`, on inputs X `(N, I)`, in float64.

    Args:
        gram (`torch.Tensor` of shape `(I, I)`): Xᵀ X.
        cross (`torch.Tensor` of shape `(I, O)`): Xᵀ R.
        squares (`torch.Tensor`, a scalar): sum of R².
    """

    gram: torch.Tensor | float = 0.0
    cross: torch.Tensor | float = 0.0
    squares: torch.Tensor | float = 0.0

    def add(
        self, projection: nn.Module, inputs: torch.Tensor, missing: torch.Tensor, *, solvable: bool = True
    ) -> None:
        """Add the tokens of a batch: inputs of the projection and what its output lacks; R² alone if not `solvable`."""
        inputs, missing = (_to_float64(tensor) for tensor in (inputs, missing))
        self.squares = self.squares + missing.square().sum()
        if not solvable:
            return
        if getattr(projection, "bias", None) is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=-1)
        self.gram = self.gram + inputs.T @ inputs
        self.cross = self.cross + inputs.T @ missing


def _to_float64(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # which has no float64


def solve_ridge(train: NormalEquations, held_out: NormalEquations) -> tuple[torch.Tensor | None, float]:
    """
    The change of a projection `(I, O)` by the ridge that is best on what is held out, and the squared error that it leaves
    there, as a share of what it was. `None` and 1 if no change lowers it.

    All strengths share one eigenbasis, in which an error costs O(I²).
    """
    values, vectors = torch.linalg.eigh(train.gram)  # (I,), (I, I)
    values, scale = values.clamp_min(0), values.mean()
    rotated = vectors.T @ train.cross  # (I, O)
    linear = (rotated * (vectors.T @ held_out.cross)).sum(1)  # (I,)
    quadratic = (vectors.T @ held_out.gram @ vectors) * (rotated @ rotated.T)  # (I, I)
    total = held_out.squares.clamp_min(torch.finfo(torch.float64).tiny)
    best, least = None, 1.0
    for ridge in RIDGES:
        shrinkage = 1 / (values + ridge * scale)
        error = (1 + (shrinkage @ quadratic @ shrinkage - 2 * (shrinkage @ linear)) / total).item()
        if error < least:
            best, least = shrinkage, error
    return (None, 1.0) if best is None else (vectors @ (best[:, None] * rotated), least)


def add_to_projection(projection: nn.Module, change: torch.Tensor) -> None:
    """Add a change `(I, O)`, with a last row for the bias if there is one, to a projection, whose parameters are replaced."""
    features = change[: projection.weight.shape[input_dim(projection)]]
    changes = {"weight": features if input_dim(projection) == 0 else features.T, "bias": change[-1]}
    for name, parameter in list(projection.named_parameters()):
        changed = parameter.detach().to(changes[name].device, torch.float64) + changes[name]
        replace_parameter(projection, name, changed.to(parameter.device, parameter.dtype))
