"""What is checked of a model before it is used."""

import torch
from torch import nn


__all__ = ["check_no_nan"]


@torch.no_grad()
def check_no_nan(model: nn.Module, name: str) -> None:
    """
    Check that the weights of a model are numbers.

    Args:
        model (`nn.Module`): the model. Weights without values, on the meta device, are passed over.
        name (`str`): what it is to the reader of the error, such as `"teacher"`.

    Raises:
        `ValueError`: a weight is NaN.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and tensor.isnan().any():
            raise ValueError(
                f"The {name} has weights that are NaN, in {key!r}: its checkpoint is broken, or training it diverged."
            )
