"""Types of weights: the one that is trained in, and the one that is saved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


__all__ = ["as_saved", "cast_weights"]


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """
    Give the parameters of a model another type, in place. Buffers keep theirs: rotary frequencies need float32 whatever
    the type of the weights.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def as_saved(model: PreTrainedModel, saved: torch.dtype, computed: torch.dtype) -> Iterator[None]:
    """
    A model as it will be once it is saved and loaded, while the context lasts: with adapters merged and weights rounded.

    Weights that FSDP or ZeRO-3 divide among processes stay as they are.

    Args:
        model (`PreTrainedModel`): a student, in training or not.
        saved (`torch.dtype`): the type it will be saved in.
        computed (`torch.dtype`): the type it will be loaded in.
    """
    weights = {parameter: parameter.data for parameter in model.parameters() if parameter.is_floating_point()}
    is_divided = any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in weights)
    if is_divided or saved == computed and {parameter.dtype for parameter in weights} <= {saved}:
        yield
        return
    has_adapters = hasattr(model, "merge_adapter")
    try:
        if has_adapters:
            for parameter in weights:
                parameter.data = parameter.data.clone()  # which merging writes to
            model.merge_adapter()
        for parameter in weights:
            parameter.data = parameter.data.to(saved).to(computed)
        yield
    finally:
        if has_adapters:
            model.unmerge_adapter()
        for parameter, data in weights.items():
            parameter.data = data
