"""The losses of a batch, computed where its output head is: by fused kernels where they can, else in chunks of tokens."""

import torch

from ..models.heads import HeadCall
from .liger import liger_loss
from .losses import LogitLosses, chunked_loss


__all__ = ["compute_losses"]


def compute_losses(losses: LogitLosses, head: HeadCall) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The losses of a batch, without the logits of all its tokens at once.

    Args:
        losses ([`LogitLosses`]): what to compute.
        head ([`HeadCall`]): what the output head is applied to, and the head.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the weighted sum, with gradients, and the parts, without.
    """
    computed = liger_loss(losses, head.states, head.plain_weight)
    if computed is not None:
        return computed
    parameters = [value for value in head.logits_of.parameters() if value.requires_grad]
    return chunked_loss(losses, head.states, head.logits_of, parameters, head.vocab_size)
