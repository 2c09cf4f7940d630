"""Losses of distillation by the kernels of liger-kernel, which is installed by those who want it."""

import os

import torch
from transformers.utils import is_liger_kernel_available

from ..text.rows import IGNORED
from .losses import LogitLosses, NextTokenLoss, TeacherDivergence, next_tokens


__all__ = ["liger_loss"]

# The β of its generalized Jensen-Shannon divergence.
_BETAS = {"forward": 0.0, "jensen_shannon": 0.5, "reverse": 1.0}


def liger_loss(
    losses: LogitLosses, states: torch.Tensor, weight: torch.nn.Parameter | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    What [`chunked_loss`] returns, by fused kernels, where they can: while training, on a GPU, for the cross-entropy and a
    divergence from a live teacher with as many tokens, whose heads are one product with their weights, such as those of
    Llama and Qwen.

    Args:
        losses ([`LogitLosses`]): what to compute.
        states (`torch.Tensor` of shape `(B, T, D)`): what the output head is applied to.
        weight (`torch.nn.Parameter` of shape `(V, D)`, *optional*): the head.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` or `None`: the weighted sum, with gradients, and the parts, without.
    """
    if weight is None or not torch.is_grad_enabled() or not _has_kernels_for(states.device):
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    states, targets = states.flatten(0, 1), next_tokens(losses.labels).flatten().to(states.device)
    sums = []
    for loss in losses.losses.values():
        if isinstance(loss, NextTokenLoss):
            cross_entropy = LigerFusedLinearCrossEntropyLoss(
                ignore_index=IGNORED,
                reduction="sum",
                label_smoothing=loss.label_smoothing,
                accum_dtype=torch.float32,
            )
            sums.append(cross_entropy(weight, states, targets))
        elif isinstance(loss, TeacherDivergence) and _has_rows(loss.teacher_logits, len(weight)):
            teacher, temperature = loss.teacher_logits, loss.temperature
            divergence = LigerFusedLinearJSD(_BETAS[loss.divergence], IGNORED, temperature, accum_dtype=torch.float32)
            mean = divergence(states, weight, teacher.states, teacher.plain_weight, targets)
            sums.append(mean * (targets != IGNORED).sum() * temperature**2)
        else:
            return None
    parts = torch.stack(sums) / losses.num_tokens
    return losses.total(parts), parts.detach()


def _has_rows(teacher_logits: object, number: int) -> bool:
    """Whether the teacher's head is one product with weights of so many rows."""
    weight = getattr(teacher_logits, "plain_weight", None)
    return weight is not None and len(weight) == number


def _has_kernels_for(device: torch.device) -> bool:
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return is_liger_kernel_available() and (is_interpreted or device.type in ("cuda", "xpu"))
