"""
Losses of distillation. Tensors in, scalar out: each is a sum over target tokens divided by a number of tokens given by
the caller, so that the losses of micro-batches and processes add up to that of the whole batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


__all__ = ["cross_entropy", "kl_divergence", "merge_rest", "relative_distance", "target_mask"]

IGNORED_LABEL = -100


def target_mask(labels: torch.Tensor) -> torch.Tensor:
    """
    Positions that predict a target token.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; -100 is not predicted.

    Returns:
        `torch.Tensor` of shape `(B, T)`, bool: True where the next label is a token. The last position never is.
    """
    return F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1), value=False)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """
    Cross-entropy of the next token.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`): of any float dtype, computed in float32.
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; -100 is not predicted.
        num_tokens (`torch.Tensor` or `int`): target tokens to divide the sum by.

    Returns:
        `torch.Tensor`: scalar, in nats per token.
    """
    # Positions are masked, not selected: the backward pass of a selection is many times slower on a CPU.
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return loss / num_tokens


def kl_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    num_tokens: torch.Tensor | int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    KL(teacher || student) of the next-token distributions at a temperature, times the temperature squared.

    Args:
        student_logits (`torch.Tensor` of shape `(B, T, V)`): of any float dtype, computed in float32.
        teacher_logits (`torch.Tensor` of shape `(B, T, V)`): likewise.
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; only positions with a target count.
        num_tokens (`torch.Tensor` or `int`): target tokens to divide the sum by.
        temperature (`float`, *optional*, defaults to 1.0): divides both logits.

    Returns:
        `torch.Tensor`: scalar, in nats per token.

    Source: Hinton et al., arXiv 1503.02531, section 2 (temperature, and its square to keep the gradients' size).
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return (divergence * target_mask(labels)).sum() * temperature**2 / num_tokens


def merge_rest(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """
    Logits of a distribution over k tokens and one more outcome, any other token.

    A divergence of two distributions that are merged alike is computed as that of whole ones. It is never larger, and
    equal where both share out the rest alike.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): of any float dtype, computed in float32.
        token_ids (`torch.Tensor` of shape `(..., k)`, int64): k different tokens, fewer than V.

    Returns:
        `torch.Tensor` of shape `(..., k + 1)`, float32: the logits of the k tokens, then that of all others together.
        Of log-probabilities, log-probabilities.
    """
    logits = logits.float()
    rest = logits.scatter(-1, token_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, token_ids), rest], -1)


def relative_distance(
    student_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    labels: torch.Tensor,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """
    Squared distance of states relative to the teacher's squared length, the mean over layers. For hidden states, and
    for the outputs of attention.

    Relative, so that layers whose states are long do not outweigh the others.

    Args:
        student_states (sequence of `torch.Tensor` of shape `(B, T, D)`): one per layer.
        teacher_states (sequence of `torch.Tensor` of shape `(B, T, D)`): of the same layers.
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; only positions with a target count.
        num_tokens (`torch.Tensor` or `int`): target tokens to divide the sum by.

    Returns:
        `torch.Tensor`: scalar, without unit, per token.
    """
    mask = target_mask(labels)
    total = student_states[0].new_zeros((), dtype=torch.float32)
    for student, teacher in zip(student_states, teacher_states, strict=True):
        expected = teacher.float()
        squared_length = expected.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        distance = (student.float() - expected).square().sum(-1) / squared_length
        # Filled, not multiplied: where a row is padding the teacher's state may have no length.
        total = total + distance.masked_fill(~mask, 0.0).sum()
    return total / len(student_states) / num_tokens
