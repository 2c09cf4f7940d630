"""How far the predictions of a model are from a text, and from those of another model."""

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..text.rows import IGNORED, SCORED, TARGET_MASKS, collate_rows, in_batches, stack_rows
from .devices import explained_memory_errors, processes
from .heads import HeadLogits, OutputHead, predict
from .inference import inference


__all__ = ["Predictions", "compare_predictions", "position_ranges", "score_tokens", "share_batches", "sum_predictions"]


@dataclass(frozen=True)
class Predictions:
    """
    How good the predictions of a model are, as means over tokens.

    Args:
        tokens (`int`): tokens that were predicted.
        loss (`float`): negative log-likelihood of the text, in nats.
        kl (`float`): KL(teacher || model), in nats; 0 without a teacher.
        agreement (`float`): share of the tokens for which teacher and model rank the same one first; 0 without a teacher.
        answers ([`Predictions`], *optional*): the same for the tokens to learn from, where rows say which these are.
        by_position (`list` of [`Predictions`]): the same for equal ranges of positions in a row.
    """

    tokens: int
    loss: float
    kl: float
    agreement: float
    answers: "Predictions | None" = None
    by_position: "tuple[Predictions, ...]" = ()


def compare_predictions(
    model: PreTrainedModel,
    rows: Iterable[dict],
    teacher: PreTrainedModel | None = None,
    *,
    batch_size: int = 8,
    position_buckets: int = 0,
    description: str | None = None,
    among_processes: bool = False,
) -> Predictions:
    """
    Compare what a model predicts with the text, and with what its teacher predicts.

    Of logits there are those of a chunk of tokens at a time, see [`OutputHead.find`].

    Args:
        model (`PreTrainedModel`): causal language model.
        rows (iterable of `dict`): rows of T tokens, as returned by [`pack_rows`] or [`slide_rows`]. In each, T - 1 tokens are
            predicted, but those that rows leave out by `scored` or `attention_mask`. Where rows have `labels` or masks, see
            [`collate_rows`], the tokens to learn from are looked at for themselves too.
        teacher (`PreTrainedModel`, *optional*): model with the same tokenizer, see [`check_same_tokenizer`].
        batch_size (`int`, *optional*, defaults to 8): rows in a forward pass.
        position_buckets (`int`, *optional*, defaults to 0): number of ranges of positions, see [`position_ranges`].
        description (`str`, *optional*): show a progress bar with this text.
        among_processes (`bool`, *optional*, defaults to `False`): divide the rows among the processes that were launched
            together. All of them have to call this, and each gets the means over all rows.

    Raises:
        `ValueError`: there are no rows, there are more ranges than positions, rows are padded elsewhere than at their
            end, or `batch_size` is under 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    batches, together = share_batches(rows, batch_size, among_processes)
    count = math.ceil(len(rows) / batch_size) if isinstance(rows, Sized) and together is None else None
    sums = torch.zeros(2 + position_buckets, 4, dtype=torch.float64)  # of the groups of `_group_tokens`
    models = [model] if teacher is None or teacher is model else [model, teacher]
    remedy = (
        f"a forward pass of the evaluation has {batch_size} rows. Give a smaller batch_size (evaluation_batch_size where a "
        "student is trained), or shorter rows"
    )
    has_answers = False
    with explained_memory_errors(remedy), inference(*models):
        heads = [OutputHead.find(each, among_processes=among_processes) for each in models]
        for batch, counts in tqdm(batches, total=count, desc=description, disable=description is None, leave=False):
            groups = _group_tokens(batch, position_buckets)
            has_answers = has_answers or any(name in batch[0] for name in ("labels", *TARGET_MASKS))
            inputs = stack_rows(batch)
            logits = [predict(each, head, inputs) for each, head in zip(models, heads, strict=True)]
            found = score_tokens(logits[0], None if teacher is None else logits[-1], inputs["input_ids"])
            del logits
            if counts:
                found = torch.cat([found, torch.ones_like(found[:1])])
                # What is left out may be padding, on which a model may give anything.
                sums += torch.stack([found.masked_fill(~group, 0.0).sum((1, 2)) for group in groups])
    if together is not None:
        sums = reduce(sums.to(together.device), "sum").cpu()
    if sums[0, 3] == 0:
        raise ValueError("There are no rows to evaluate on: give held-out text that fills at least one row.")
    whole, answers, *by_position = map(_as_means, sums.tolist())
    return replace(whole, answers=answers if has_answers else None, by_position=tuple(by_position))


def _as_means(sums: list[float]) -> Predictions:
    *sums, tokens = sums
    return Predictions(int(tokens), *(value / tokens if tokens else math.nan for value in sums))


def position_ranges(row_length: int, number: int) -> list[tuple[int, int]]:
    """
    Ranges of positions in a row, the first and the last of each.

    A position is the number of tokens that a predicted token has before it, in its row or, in rows with `position_ids`, in its
    document.

    Raises:
        `ValueError`: there are fewer positions.
    """
    if number > row_length - 1:
        raise ValueError(
            f"position_buckets is {number}; rows of {row_length} tokens have {row_length - 1} to predict."
        )
    ends = [row_length * (index + 1) // number for index in range(number)]
    return [(begin, end - 1) for begin, end in zip([0, *ends], ends, strict=False)]


def _group_tokens(rows: list[dict], position_buckets: int) -> list[torch.Tensor]:
    """Which of the positions `(B, T)` of a batch count in each of the sums: all, those of answers, and those of each range."""
    batch = collate_rows(rows)
    shape = batch["input_ids"].shape
    scored = torch.ones(shape, dtype=torch.bool)
    for name in (SCORED, "attention_mask"):
        if name in rows[0]:
            scored &= torch.from_numpy(np.asarray([row[name] for row in rows]) != 0)
    # The model is not given the mask. It does not need it where padding is at the end, which no token before it sees.
    if "attention_mask" in batch and (batch["attention_mask"].diff(dim=1) > 0).any():
        raise ValueError(
            "attention_mask is 0 before tokens of a row, which would see that padding: pad rows at their end "
            "(tokenizer.padding_side = 'right'), or make them with pack_rows."
        )
    places = batch["position_ids"] if "position_ids" in batch else torch.arange(shape[1]).expand(shape)
    groups = [scored, scored & (batch["labels"] != IGNORED)]
    groups += [
        scored & (begin <= places) & (places <= end)
        for begin, end in (position_ranges(shape[1], position_buckets) if position_buckets else ())
    ]
    # What a position predicts is the next token.
    return [F.pad(group[:, 1:], (0, 1)) for group in groups]


def share_batches(
    rows: Iterable, batch_size: int, among_processes: bool
) -> tuple[Iterator[tuple[list, bool]], PartialState | None]:
    """
    The batches of this process, and whether they count; and the processes that share the rows, `None` where it has all of
    them. Process P of N has the rows P, P + N, P + 2N and so on.

    All processes have as many batches, as each may have a part of the model only, and all of them are needed in each forward
    pass: one without rows of its own takes one that does not count.
    """
    together = processes() if among_processes else None
    if together is None or together.num_processes == 1:
        return ((batch, True) for batch in in_batches(rows, batch_size)), None
    return _share(list(rows), batch_size, together), together


def _share(rows: list, batch_size: int, together: PartialState) -> Iterator[tuple[list, bool]]:
    number = together.num_processes
    own = in_batches(rows[together.process_index :: number], batch_size)
    for _ in range(math.ceil(math.ceil(len(rows) / number) / batch_size)):
        batch = next(own, None)
        yield (rows[:1], False) if batch is None else (batch, True)


def sum_predictions(logits: HeadLogits, teacher_logits: HeadLogits | None, input_ids: torch.Tensor) -> torch.Tensor:
    """Sums over a batch of what [`score_tokens`] gives, `(3,)`, float64."""
    return score_tokens(logits, teacher_logits, input_ids).sum((1, 2))


def score_tokens(logits: HeadLogits, teacher_logits: HeadLogits | None, input_ids: torch.Tensor) -> torch.Tensor:
    """
    For each token of a batch: negative log-likelihood, KL(teacher || model) and whether both rank the same token first.

    Args:
        logits ([`HeadLogits`]): of the `B · T` tokens, `(N, V)` of any float dtype, computed in float32.
        teacher_logits ([`HeadLogits`], *optional*): likewise, `(N, W)`. Where V and W differ, what one of the vocabularies
            has more than the other is padding, on which nothing is compared.
        input_ids (`torch.Tensor` of shape `(B, T)`): the tokens, the last T - 1 of which are predicted.

    Returns:
        `torch.Tensor` of shape `(3, B, T)`, float64, on the CPU, in nats and tokens, at the positions that predict; 0 at the
        last one, and the last two are 0 without a teacher.
    """
    targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED).flatten()
    scores = []
    for tokens in logits.chunks():
        found, expected = logits(tokens), None
        if teacher_logits is not None:
            expected = found if teacher_logits is logits else teacher_logits(tokens).to(found.device)
        scores.append(_score_chunk(found, targets[tokens].to(found.device), expected))
        del found, expected  # the logits of a chunk go before the next ones come
    return torch.cat(scores, -1).cpu().double().unflatten(-1, input_ids.shape)


def _score_chunk(logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None) -> torch.Tensor:
    """Scores of some tokens, `(3, N)`. Logits `(N, V)` and `(N, W)`."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    nll = F.nll_loss(log_probs, targets, ignore_index=IGNORED, reduction="none")
    kl = same = torch.zeros_like(nll)
    if teacher_logits is not None:
        if logits.shape != teacher_logits.shape:
            common = min(logits.shape[-1], teacher_logits.shape[-1])
            logits, teacher_logits = logits[:, :common], teacher_logits[:, :common]
            log_probs = F.log_softmax(logits.float(), dim=-1)
        teacher_log_probs = F.log_softmax(teacher_logits.float(), dim=-1)
        has_target = targets != IGNORED
        of_tokens = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="none")
        # A token to which the teacher gives no probability adds nothing, where 0 · log 0 would be NaN.
        of_tokens.masked_fill_(teacher_log_probs == -torch.inf, 0.0)
        kl = of_tokens.sum(-1).masked_fill(~has_target, 0.0)
        same = ((logits.argmax(-1) == teacher_logits.argmax(-1)) & has_target).to(nll.dtype)
    return torch.stack([nll, kl, same])
