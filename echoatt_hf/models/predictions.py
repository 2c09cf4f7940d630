"""How far the predictions of a model are from a text, and from those of another model."""

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel

from ..text.rows import batch_rows, stack_rows
from .devices import explained_memory_errors, processes
from .heads import HeadLogits, OutputHead, predict
from .inference import inference


__all__ = ["Predictions", "compare_predictions", "sum_predictions"]


_NO_TARGET = -100


@dataclass(frozen=True)
class Predictions:
    """
    How good the predictions of a model are, as means over tokens.

    Args:
        tokens (`int`): tokens that were predicted.
        loss (`float`): negative log-likelihood of the text, in nats.
        kl (`float`): KL(teacher || model), in nats; 0 without a teacher.
        agreement (`float`): share of the tokens for which teacher and model rank the same one first; 0 without a teacher.
    """

    tokens: int
    loss: float
    kl: float
    agreement: float


def compare_predictions(
    model: PreTrainedModel,
    rows: Iterable[dict],
    teacher: PreTrainedModel | None = None,
    *,
    batch_size: int = 8,
    description: str | None = None,
    among_processes: bool = False,
) -> Predictions:
    """
    Compare what a model predicts with the text, and with what its teacher predicts.

    Of logits there are those of a chunk of tokens at a time, see [`OutputHead.find`].

    Args:
        model (`PreTrainedModel`): causal language model.
        rows (iterable of `dict`): rows of T tokens, as returned by [`pack_rows`]. In each, T - 1 tokens are predicted.
        teacher (`PreTrainedModel`, *optional*): model with the same tokenizer, see [`check_same_tokenizer`].
        batch_size (`int`, *optional*, defaults to 8): rows in a forward pass.
        description (`str`, *optional*): show a progress bar with this text.
        among_processes (`bool`, *optional*, defaults to `False`): divide the rows among the processes that were launched
            together. All of them have to call this, and each gets the means over all rows.

    Raises:
        `ValueError`: there are no rows.
    """
    together = processes() if among_processes else None
    is_divided = together is not None and together.num_processes > 1
    if is_divided:
        batches = _share(list(rows), batch_size, together)
    else:
        batches = ((batch, True) for batch in batch_rows(rows, batch_size))
    count = math.ceil(len(rows) / batch_size) if isinstance(rows, Sized) and not is_divided else None
    sums = torch.zeros(4, dtype=torch.float64)  # negative log-likelihood, KL, equal first tokens, and tokens
    models = [model] if teacher is None or teacher is model else [model, teacher]
    remedy = (
        f"a forward pass of the evaluation has {batch_size} rows. Give a smaller batch_size (evaluation_batch_size where a "
        "student is trained), or shorter rows"
    )
    with explained_memory_errors(remedy), inference(*models):
        heads = [OutputHead.find(each, among_processes=among_processes) for each in models]
        for batch, counts in tqdm(batches, total=count, desc=description, disable=description is None, leave=False):
            logits = [predict(each, head, batch) for each, head in zip(models, heads, strict=True)]
            found = sum_predictions(logits[0], None if teacher is None else logits[-1], batch["input_ids"])
            tokens = batch["input_ids"][:, 1:].numel()
            del logits
            if counts:
                sums += torch.cat([found, found.new_tensor([tokens])])
    if is_divided:
        sums = reduce(sums.to(together.device), "sum").cpu()
    *sums, tokens = sums.tolist()
    if tokens == 0:
        raise ValueError("There are no rows to evaluate on: give held-out text that fills at least one row.")
    return Predictions(int(tokens), *(value / tokens for value in sums))


def _share(rows: list[dict], batch_size: int, together: PartialState) -> Iterator[tuple[BatchEncoding, bool]]:
    """
    The batches of one of the processes, and whether they count. All processes have as many, as each may have a part of the
    model only, and all of them are needed in each forward pass: one without rows of its own takes one that does not count.
    """
    number = together.num_processes
    own = batch_rows(rows[together.process_index :: number], batch_size)
    for _ in range(math.ceil(math.ceil(len(rows) / number) / batch_size)):
        batch = next(own, None)
        yield (stack_rows(rows[:1]), False) if batch is None else (batch, True)


def sum_predictions(logits: HeadLogits, teacher_logits: HeadLogits | None, input_ids: torch.Tensor) -> torch.Tensor:
    """
    Sums over a batch: negative log-likelihood, KL(teacher || model) and equal first tokens.

    Args:
        logits ([`HeadLogits`]): of the `B · T` tokens, `(N, V)` of any float dtype, computed in float32.
        teacher_logits ([`HeadLogits`], *optional*): likewise, `(N, W)`. Where V and W differ, what one of the vocabularies
            has more than the other is padding, on which nothing is compared.
        input_ids (`torch.Tensor` of shape `(B, T)`): the tokens, the last T - 1 of which are predicted.

    Returns:
        `torch.Tensor` of shape `(3,)`, float64, in nats and tokens; without a teacher the last two are 0.
    """
    targets = F.pad(input_ids[:, 1:], (0, 1), value=_NO_TARGET).flatten()
    sums = []
    for tokens in logits.chunks():
        found, expected = logits(tokens), None
        if teacher_logits is not None:
            expected = found if teacher_logits is logits else teacher_logits(tokens).to(found.device)
        sums.append(_sum_chunk(found, targets[tokens].to(found.device), expected))
        del found, expected  # the logits of a chunk go before the next ones come
    return torch.stack(sums).cpu().double().sum(0)


def _sum_chunk(logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None) -> torch.Tensor:
    """Sums over some tokens: negative log-likelihood, KL and equal first tokens. Logits `(N, V)` and `(N, W)`."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    nll = F.nll_loss(log_probs, targets, ignore_index=_NO_TARGET, reduction="sum")
    kl = same = torch.zeros((), device=logits.device)
    if teacher_logits is not None:
        if logits.shape != teacher_logits.shape:
            common = min(logits.shape[-1], teacher_logits.shape[-1])
            logits, teacher_logits = logits[:, :common], teacher_logits[:, :common]
            log_probs = F.log_softmax(logits.float(), dim=-1)
        teacher_log_probs = F.log_softmax(teacher_logits.float(), dim=-1)
        has_target = targets != _NO_TARGET
        of_tokens = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="none").sum(-1)
        kl = of_tokens.masked_fill(~has_target, 0.0).sum()
        same = ((logits.argmax(-1) == teacher_logits.argmax(-1)) & has_target).sum()
    return torch.stack([nll, kl, same])
