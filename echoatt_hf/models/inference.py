"""Models run without gradients, and how far their predictions are from those of another."""

import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import BatchEncoding, PreTrainedModel

from ..text.rows import batch_rows, stack_rows
from .devices import explained_memory_errors, processes


__all__ = ["Predictions", "compare_predictions", "inference", "sum_logits"]


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
    models = [model] if teacher is None else [model, teacher]
    remedy = f"a forward pass has batch_size {batch_size} rows. Give a smaller one, or shorter rows"
    with explained_memory_errors(remedy), inference(*models):
        for batch, counts in tqdm(batches, total=count, desc=description, disable=description is None, leave=False):
            found, tokens = _sum_batch(model, teacher, batch), batch["input_ids"][:, 1:].numel()
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


def _sum_batch(model: PreTrainedModel, teacher: PreTrainedModel | None, batch: BatchEncoding) -> torch.Tensor:
    """Sums over a batch `(B, T)`: negative log-likelihood, KL and equal first tokens, `(3,)` in float64."""
    logits = model(**batch.to(model.device), use_cache=False).logits
    teacher_logits = logits if teacher is model else None
    if teacher is not None and teacher is not model:
        teacher_logits = teacher(**batch.to(teacher.device), use_cache=False).logits.to(logits.device)
    return sum_logits(logits, teacher_logits, batch["input_ids"])


def sum_logits(logits: torch.Tensor, teacher_logits: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    """
    Sums over a batch: negative log-likelihood, KL(teacher || model) and equal first tokens.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`): of any float dtype, computed in float32.
        teacher_logits (`torch.Tensor` of shape `(B, T, W)`, *optional*): likewise. Where V and W differ, what one of the
            vocabularies has more than the other is padding, on which nothing is compared.
        input_ids (`torch.Tensor` of shape `(B, T)`): the tokens, the last T - 1 of which are predicted.

    Returns:
        `torch.Tensor` of shape `(3,)`, float64, in nats and tokens; without a teacher the last two are 0.
    """
    targets = input_ids.to(logits.device)
    sums = [  # one row at a time: float32 logits of a batch may not fit
        _sum_row(logits[row, :-1], targets[row, 1:], None if teacher_logits is None else teacher_logits[row, :-1])
        for row in range(len(input_ids))
    ]
    return torch.stack(sums).cpu().double().sum(0)


def _sum_row(logits: torch.Tensor, targets: torch.Tensor, teacher_logits: torch.Tensor | None) -> torch.Tensor:
    """Sums over one row: negative log-likelihood, KL and equal first tokens. Logits `(T - 1, V)` and `(T - 1, W)`."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    nll = F.nll_loss(log_probs, targets, reduction="sum")
    kl = same = torch.zeros((), device=logits.device)
    if teacher_logits is not None:
        if logits.shape != teacher_logits.shape:
            common = min(logits.shape[-1], teacher_logits.shape[-1])
            logits, teacher_logits = logits[:, :common], teacher_logits[:, :common]
            log_probs = F.log_softmax(logits.float(), dim=-1)
        teacher_log_probs = F.log_softmax(teacher_logits.float(), dim=-1)
        kl = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="sum")
        same = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    return torch.stack([nll, kl, same])
