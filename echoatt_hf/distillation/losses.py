"""
Losses of distillation. Tensors in, scalars out: each is a sum over target tokens divided by a number of tokens given by
the caller, so that the losses of micro-batches and processes add up to that of the whole batch.

Losses of logits are computed for some tokens at a time ([`chunked_loss`]): what is as large as the vocabulary is made for
one chunk of tokens only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..models.heads import token_chunks
from ..settings import DIVERGENCES, HIDDEN_DISTANCES
from ..text.rows import IGNORED


__all__ = [
    "DIVERGENCES",
    "HIDDEN_DISTANCES",
    "HardLabelLoss",
    "KeptLogits",
    "LogitLosses",
    "NextTokenLoss",
    "TeacherDivergence",
    "chunked_loss",
    "divergence_from_stored",
    "forward_kl",
    "hard_labels_from_stored",
    "hidden_distance",
    "jensen_shannon",
    "keep_top",
    "merge_rest",
    "next_tokens",
    "relative_distance",
    "reverse_kl",
    "squared_distance",
    "target_mask",
]

# A probability of 0 has no finite logarithm; the lowest float16 gives 0 as well.
NO_PROBABILITY = torch.finfo(torch.float16).min

# Logits `(N, V)` and which tokens of the flattened batch they are of -> losses of the tokens `(N,)`.
TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]


def target_mask(labels: torch.Tensor) -> torch.Tensor:
    """
    Positions that predict a target token.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; -100 is not predicted.

    Returns:
        `torch.Tensor` of shape `(B, T)`, bool: True where the next label is a token. The last position never is.
    """
    return next_tokens(labels) != IGNORED


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """
    The label that each position predicts.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; -100 is not predicted.

    Returns:
        `torch.Tensor` of shape `(B, T)`: the next label, -100 at the last position.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def forward_kl(student_logits: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """
    KL(teacher || student): the student puts probability wherever the teacher does.

    Args:
        student_logits (`torch.Tensor` of shape `(N, V)`): of any float dtype, computed in float32 at least.
        teacher_log_probs (`torch.Tensor` of shape `(N, V)`): finite logarithms of the teacher's probabilities,
            `NO_PROBABILITY` for 0.

    Returns:
        `torch.Tensor` of shape `(N,)`: in nats.
    """
    return _kl(teacher_log_probs, _log_probs(student_logits))


def reverse_kl(student_logits: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """
    KL(student || teacher): the student puts no probability where the teacher puts none. See [`forward_kl`].

    Source: Gu et al., arXiv 2306.08543, section 2.
    """
    return _kl(_log_probs(student_logits), teacher_log_probs)


def jensen_shannon(student_logits: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """
    Jensen-Shannon divergence: the mean of KL(teacher || M) and KL(student || M), M the mean of both distributions.
    Symmetric, and at most ln 2. See [`forward_kl`].

    Source: Agarwal et al., arXiv 2306.13649, section 2, with β = 1/2.
    """
    student_log_probs = _log_probs(student_logits)
    middle = torch.logaddexp(student_log_probs, teacher_log_probs) - math.log(2)
    return (_kl(teacher_log_probs, middle) + _kl(student_log_probs, middle)) / 2


_DIVERGENCES = dict(zip(DIVERGENCES, (forward_kl, reverse_kl, jensen_shannon), strict=True))


@dataclass(frozen=True)
class TeacherDivergence:
    """
    A loss of tokens: a divergence of the next-token distributions at a temperature, times the temperature squared.

    Called with logits `(N, V)` and the slice of tokens they are of, it returns `(N,)`, in nats.

    Args:
        divergence (`str`): a name of `DIVERGENCES`.
        teacher_logits (`Callable`): tokens of the flattened batch, as a slice -> the teacher's logits `(N, V)`.
        temperature (`float`, *optional*, defaults to 1.0): divides the logits of both.

    Source: Hinton et al., arXiv 1503.02531, section 2 (temperature, and its square to keep the gradients' size).
    """

    divergence: str
    teacher_logits: Callable[[slice], torch.Tensor]
    temperature: float = 1.0

    def __call__(self, logits: torch.Tensor, tokens: slice) -> torch.Tensor:
        with torch.no_grad():
            expected = self.teacher_logits(tokens).to(logits.device)
            # What one of the vocabularies has more than the other is padding.
            common = min(logits.shape[-1], expected.shape[-1])
            expected = _log_probs(expected[..., :common], self.temperature)
        logits = _upcast(logits[..., :common]) / self.temperature
        return _DIVERGENCES[self.divergence](logits, expected) * self.temperature**2


def divergence_from_stored(
    divergence: str, token_ids: torch.Tensor, log_probs: torch.Tensor, vocab_size: int | None = None
) -> TokenLoss:
    """
    A loss of tokens: a divergence of the distributions over the k tokens that a stored teacher kept and one more outcome,
    any other token. See [`merge_rest`].

    Args:
        divergence (`str`): a name of `DIVERGENCES`.
        token_ids (`torch.Tensor` of shape `(B, T, k)`, int64): the tokens that were kept.
        log_probs (`torch.Tensor` of shape `(B, T, k + 1)`): the teacher's, those of all other tokens together last.
        vocab_size (`int`, *optional*): tokens the teacher has, where they are not as many as the student's. What one of
            the vocabularies has more than the other is padding.

    Returns:
        `Callable`: logits `(N, V)` and the slice of tokens they are of -> `(N,)`, in nats.
    """
    token_ids, log_probs = token_ids.flatten(0, 1), log_probs.flatten(0, 1)

    def loss(logits: torch.Tensor, tokens: slice) -> torch.Tensor:
        ids, expected = token_ids[tokens].to(logits.device), log_probs[tokens].to(logits.device)
        if vocab_size not in (None, logits.shape[-1]):
            # A negative padding cuts. What the student does not have gets no probability from either.
            expected = expected.masked_fill(F.pad(ids >= logits.shape[-1], (0, 1)), NO_PROBABILITY)
            logits = F.pad(_upcast(logits), (0, vocab_size - logits.shape[-1]), value=NO_PROBABILITY)
        # Rounded to 16 bits they do not add up to 1 any more.
        return _DIVERGENCES[divergence](merge_rest(logits, ids), _log_probs(expected))

    return loss


class KeptLogits:
    """
    A teacher's logits, kept for the tokens that were asked for last: of a chunk that several losses look at they are made
    once.

    Args:
        teacher_logits (`Callable`): tokens of the flattened batch, as a slice -> the teacher's logits `(N, V)`.
    """

    def __init__(self, teacher_logits: Callable[[slice], torch.Tensor]):
        self._teacher_logits, self._tokens, self._logits = teacher_logits, None, None

    def __call__(self, tokens: slice) -> torch.Tensor:
        if tokens != self._tokens:
            self._logits = None  # which goes before the next ones come
            self._tokens, self._logits = tokens, self._teacher_logits(tokens)
        return self._logits


@dataclass(frozen=True)
class HardLabelLoss:
    """
    A loss of tokens: the cross-entropy of the token that the teacher finds likeliest.

    Called with logits `(N, V)` and the slice of tokens they are of, it returns `(N,)`, in nats.

    Args:
        teacher_logits (`Callable`): tokens of the flattened batch, as a slice -> the teacher's logits `(N, V)`.

    Source: arXiv 2409.14595, section 3.2 (hard labels).
    """

    teacher_logits: Callable[[slice], torch.Tensor]

    def __call__(self, logits: torch.Tensor, tokens: slice) -> torch.Tensor:
        with torch.no_grad():
            expected = self.teacher_logits(tokens)
            common = min(logits.shape[-1], expected.shape[-1])  # the rest is padding
            expected = expected[..., :common].argmax(-1).to(logits.device)
        return F.cross_entropy(_upcast(logits[..., :common]), expected, reduction="none")


def hard_labels_from_stored(token_ids: torch.Tensor) -> TokenLoss:
    """
    A loss of tokens: that of [`HardLabelLoss`], from what a stored teacher kept, which has the likeliest token first.

    Args:
        token_ids (`torch.Tensor` of shape `(B, T, k)`, int64): the tokens that were kept.

    Returns:
        `Callable`: logits `(N, V)` and the slice of tokens they are of -> `(N,)`, in nats.
    """
    token_ids = token_ids.flatten(0, 1)

    def loss(logits: torch.Tensor, tokens: slice) -> torch.Tensor:
        ids = token_ids[tokens].to(logits.device)
        # The first one that the student has: with one tokenizer what it lacks is padding.
        place = (ids < logits.shape[-1]).int().argmax(-1, keepdim=True)
        return F.cross_entropy(_upcast(logits), ids.gather(-1, place)[:, 0], reduction="none")

    return loss


class NextTokenLoss:
    """
    A loss of tokens: the cross-entropy of the next token.

    Called with logits `(N, V)` and the slice of tokens they are of, it returns `(N,)`, in nats; 0 without a target.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; -100 is not predicted.
        label_smoothing (`float`, *optional*, defaults to 0.0): share of each target that goes to all tokens alike.
    """

    def __init__(self, labels: torch.Tensor, label_smoothing: float = 0.0):
        self.targets, self.label_smoothing = next_tokens(labels).flatten(), label_smoothing

    def __call__(self, logits: torch.Tensor, tokens: slice) -> torch.Tensor:
        expected = self.targets[tokens].to(logits.device)
        return F.cross_entropy(
            _upcast(logits),
            expected,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


@dataclass(frozen=True)
class LogitLosses:
    """
    The losses of a batch that depend on its logits, each summed over target tokens and divided by a number of tokens.

    Args:
        losses (`dict[str, Callable]`): logits `(N, V)` and the slice of tokens they are of -> `(N,)`. Whatever else a
            loss compares with, such as the teacher's signal, it looks up for the slice.
        weights (`dict[str, float]`): of each loss in the total.
        labels (`torch.Tensor` of shape `(B, T)`): token ids, not shifted; only positions with a target count.
        num_tokens (`torch.Tensor` or `int`): target tokens to divide the sums by.
    """

    losses: dict[str, TokenLoss]
    weights: dict[str, float]
    labels: torch.Tensor
    num_tokens: torch.Tensor | int

    def parts(self, logits: torch.Tensor, tokens: slice = slice(None)) -> torch.Tensor:
        """
        Args:
            logits (`torch.Tensor` of shape `(N, V)`): of the tokens in the slice.
            tokens (`slice`, *optional*, defaults to all): of the B · T tokens of the batch.

        Returns:
            `torch.Tensor` of shape `(len(losses),)`: what these tokens add to each loss.
        """
        # Positions are masked, not selected: the backward pass of a selection is many times slower on a CPU.
        mask = target_mask(self.labels).flatten()[tokens].to(logits.device)
        return torch.stack([(loss(logits, tokens) * mask).sum() for loss in self.losses.values()]) / self.num_tokens

    def total(self, parts: torch.Tensor) -> torch.Tensor:
        """The weighted sum of `parts`, a scalar."""
        return (parts * parts.new_tensor([self.weights[name] for name in self.losses])).sum()


def chunked_loss(
    losses: LogitLosses,
    states: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Losses of logits from the hidden states that the logits are made of, for some tokens at a time.

    The gradient of a chunk is taken right after its losses, and kept for the hidden states and the parameters only:
    nothing that is as large as tokens times vocabulary is kept for, or made in, the backward pass. That costs one product
    with the output head less than computing the chunk again there (`torch.utils.checkpoint`), and the backward pass needs
    no weights, which FSDP may have taken apart by then, nor does it call modules, whose hooks would take a chunk for a
    whole forward pass. For the same reason what adds gradients up over processes sees one gradient of each parameter.

    Args:
        losses ([`LogitLosses`]): what to compute.
        states (`torch.Tensor` of shape `(B, T, D)`): what the output head is applied to.
        logits_of (`Callable`): states `(N, D)` -> logits `(N, V)`.
        parameters (sequence of `torch.nn.Parameter`): those of `logits_of` that need a gradient, none if it is frozen.
        vocab_size (`int`): V, which decides how many tokens a chunk has.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the weighted sum, with gradients, and the parts `(len(losses.losses),)`,
        without.
    """
    states = states.flatten(0, 1)
    chunks = list(token_chunks(len(states), vocab_size, states.device))
    if torch.is_grad_enabled() and (states.requires_grad or parameters):
        return _ChunkedLoss.apply(losses, logits_of, chunks, states, *parameters)
    parts = sum(losses.parts(logits_of(states[tokens]), tokens) for tokens in chunks)
    return losses.total(parts), parts


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses: LogitLosses, logits_of, chunks: list[slice], states: torch.Tensor, *parameters):
        parts = 0.0
        needed = ctx.needs_input_grad[3]
        state_gradient = torch.zeros_like(states) if needed else None
        # Added up in float32, as the product over all tokens would be.
        gradients = [torch.zeros_like(value, dtype=_accumulation_dtype(value)) for value in parameters]
        for tokens in chunks:
            with torch.enable_grad():
                chunk = states[tokens].detach().requires_grad_(needed)
                of_chunk = losses.parts(logits_of(chunk), tokens)
                total = losses.total(of_chunk)
            inputs = [chunk] * needed + list(parameters)
            found = list(torch.autograd.grad(total, inputs, allow_unused=True))
            if needed:
                state_gradient[tokens] = found.pop(0)
            for gradient, value in zip(gradients, found, strict=True):
                if value is not None:
                    gradient.add_(value)
            parts = parts + of_chunk.detach()
            del chunk, of_chunk, total, found  # the graph of a chunk goes before the next one comes
        kept = [gradient.to(value.dtype) for gradient, value in zip(gradients, parameters, strict=True)]
        ctx.save_for_backward(*([state_gradient] if needed else []), *kept)
        ctx.mark_non_differentiable(parts)
        return losses.total(parts), parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: torch.Tensor, _):
        found = [kept * gradient for kept in ctx.saved_tensors]
        return None, None, None, *([] if ctx.needs_input_grad[3] else [None]), *found


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_accumulation_dtype(tensor))


def _accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _log_probs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    # Of a token that a head suppresses by a logit of -inf too, a divergence multiplies 0 with this logarithm.
    return F.log_softmax(_upcast(logits).clamp_min(NO_PROBABILITY) / temperature, dim=-1)


def _kl(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """KL(first || second) of distributions `(N, V)`, `(N,)`."""
    return F.kl_div(other_log_probs, log_probs, log_target=True, reduction="none").sum(-1)


def merge_rest(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """
    Logits of a distribution over k tokens and one more outcome, any other token.

    A divergence of two distributions that are merged alike is computed as that of whole ones. It is never larger, and
    equal where both share out the rest alike.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): of any float dtype, computed in float32 at least.
        token_ids (`torch.Tensor` of shape `(..., k)`, int64): k different tokens, fewer than V.

    Returns:
        `torch.Tensor` of shape `(..., k + 1)`, float32: the logits of the k tokens, then that of all others together.
        Of log-probabilities, log-probabilities.
    """
    logits = _upcast(logits)
    rest = logits.scatter(-1, token_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, token_ids), rest], -1)


def keep_top(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What a stored teacher keeps of its distributions, see [`merge_rest`].

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): of any float dtype, computed in float32 at least.
        top_k (`int`): k, fewer than V.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: log-probabilities `(..., k + 1)`, float16, and token ids `(..., k)`, int64, the
        likeliest first.
    """
    log_probs = _log_probs(logits)
    token_ids = log_probs.topk(top_k).indices
    return merge_rest(log_probs, token_ids).clamp_min(NO_PROBABILITY).half(), token_ids


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
    return _mean_over_layers(_relative_distances, student_states, teacher_states, labels, num_tokens)


def squared_distance(
    student_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    labels: torch.Tensor,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """
    Squared distance of states, the mean over layers, and over features, so that a wide model does not weigh it more than
    others.

    Args:
        student_states, teacher_states, labels, num_tokens: as in [`relative_distance`].

    Returns:
        `torch.Tensor`: scalar, in squared units of the states, per token.

    Source: arXiv 2409.14595, section 3.2 (intermediate loss), where it is not said whether features are summed.
    """
    return _mean_over_layers(_squared_distances, student_states, teacher_states, labels, num_tokens)


hidden_distance = dict(zip(HIDDEN_DISTANCES, (relative_distance, squared_distance), strict=True))
"""Distances of hidden states by name."""


def _relative_distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    squared_length = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (student - teacher).square().sum(-1) / squared_length


def _squared_distances(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square().mean(-1)


def _mean_over_layers(
    distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    student_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    labels: torch.Tensor,
    num_tokens: torch.Tensor | int,
) -> torch.Tensor:
    mask = target_mask(labels)
    total = student_states[0].new_zeros((), dtype=torch.float32)
    for student, teacher in zip(student_states, teacher_states, strict=True):
        # A model may be spread over devices, and its teacher over others.
        of_tokens = distances(student.float(), teacher.to(student.device).float())
        # Filled, not multiplied: where a row is padding the teacher's state may have no length.
        total = total + of_tokens.masked_fill(~mask.to(student.device), 0.0).sum().to(total.device)
    return total / len(student_states) / num_tokens
