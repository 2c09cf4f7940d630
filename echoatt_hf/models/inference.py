"""Models run without gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


__all__ = ["inference"]


@contextmanager
def inference(*models: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; at the end each module is in the mode it was in."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
