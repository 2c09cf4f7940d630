"""How good a model is on held-out text: perplexity, bits per byte, and agreement with its teacher."""

import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..models.loading import default_device, load_model
from ..text.documents import load_documents, pack_rows, stack_rows


__all__ = ["compute_agreement", "compute_perplexity", "evaluate_model", "metric_path"]


def evaluate_model(
    model: PreTrainedModel,
    rows: Iterable[dict],
    *,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    description: str | None = None,
) -> dict[str, float | int]:
    """
    Evaluate a causal language model on packed rows, and against its teacher.

    Args:
        model (`PreTrainedModel`):
            Causal language model.
        rows (iterable of `dict`):
            Rows of T tokens, as returned by [`pack_rows`]. In each, T - 1 tokens are predicted.
        teacher (`PreTrainedModel`, *optional*):
            Model with the same vocabulary to compare with.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Needed for `bits_per_byte`. Bytes are counted in the decoded text of the predicted tokens.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.
        description (`str`, *optional*):
            Show a progress bar with this text.

    Returns:
        `dict`: `tokens` predicted; `loss`, the mean negative log-likelihood in nats per token; `perplexity`, its
        exponential; with a tokenizer `bits_per_byte`; with a teacher `kl`, the mean of KL(teacher || model) in nats
        per token, and `agreement`, the share of tokens for which both rank the same token first.

    Raises:
        `ValueError`: there are no rows, or the vocabularies differ.
    """
    if teacher is not None:
        _check_vocabularies(model, teacher)
    totals = torch.zeros(3, dtype=torch.float64)
    tokens = text_bytes = 0
    count = math.ceil(len(rows) / batch_size) if isinstance(rows, Sized) else None
    batches = tqdm(
        batch_rows(rows, batch_size), total=count, desc=description, disable=description is None, leave=False
    )
    with inference(*([model] if teacher is None else [model, teacher])):
        for batch in batches:
            totals += _sum_batch(model, teacher, batch)
            input_ids = batch["input_ids"]
            tokens += input_ids[:, 1:].numel()
            if tokenizer is not None:
                # A difference: at the start of a text some tokenizers drop the space that the first token stands for.
                text_bytes += _count_bytes(tokenizer, input_ids) - _count_bytes(tokenizer, input_ids[:, :1])
    if tokens == 0:
        raise ValueError("There are no rows to evaluate on: give held-out text that fills at least one row.")
    loss, kl, agreement = (totals / tokens).tolist()
    result = {"tokens": tokens, "loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if tokenizer is not None:
        result["bits_per_byte"] = loss * tokens / math.log(2) / max(text_bytes, 1)
    if teacher is not None:
        result |= {"kl": kl, "agreement": agreement}
    return result


def compute_perplexity(
    texts: str | Iterable[str],
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    row_length: int = 256,
    batch_size: int = 8,
) -> dict[str, float | int]:
    """
    Perplexity and bits per byte of a causal language model on texts.

    The texts are packed into rows as [`pack_rows`] does and evaluated as [`evaluate_model`] does.

    Args:
        texts (`str` or iterable of `str`):
            Documents.
        model (`str`, `Path` or `PreTrainedModel`):
            Causal language model, or the path or name to load it from: without remote code, to a GPU if there is one.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model; by default the one saved with it. Needed if `model` is already loaded.
        row_length (`int`, *optional*, defaults to 256):
            Tokens in a row, at most the model's context. What does not fill a last row is left out.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.

    Returns:
        `dict`: `tokens`, `loss`, `perplexity` and `bits_per_byte`, as returned by [`evaluate_model`].

    Raises:
        `ValueError`: no model or tokenizer, or the texts do not fill a row.
    """
    model, tokenizer = _load_model(model), _load_tokenizer(tokenizer, model)
    rows = _pack_texts(texts, tokenizer, row_length)
    return evaluate_model(model, rows, tokenizer=tokenizer, batch_size=batch_size)


def compute_agreement(
    texts: str | Iterable[str],
    model: str | Path | PreTrainedModel,
    teacher: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    row_length: int = 256,
    batch_size: int = 8,
) -> dict[str, float | int]:
    """
    Agreement of a causal language model with its teacher on texts.

    Args:
        texts (`str` or iterable of `str`):
            Documents.
        model (`str`, `Path` or `PreTrainedModel`):
            The student, as in [`compute_perplexity`].
        teacher (`str`, `Path` or `PreTrainedModel`):
            The model it was made from, given like `model`.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`, *optional*):
            Tokenizer of both, as in [`compute_perplexity`].
        row_length (`int`, *optional*, defaults to 256):
            Tokens in a row, at most the models' context. What does not fill a last row is left out.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.

    Returns:
        `dict`: `tokens`, `kl` and `agreement`, as returned by [`evaluate_model`].

    Raises:
        `ValueError`: no model, teacher or tokenizer, the vocabularies differ, or the texts do not fill a row.
    """
    model, tokenizer = _load_model(model), _load_tokenizer(tokenizer, model)
    teacher = _load_model(teacher, "teacher")
    result = evaluate_model(model, _pack_texts(texts, tokenizer, row_length), teacher=teacher, batch_size=batch_size)
    return {key: result[key] for key in ("tokens", "kl", "agreement")}


def metric_path(name: str) -> str:
    """
    Folder of one of the package's `evaluate` modules, for `evaluate.load`.

    Args:
        name (`str`):
            `"echoatt_perplexity"` or `"echoatt_agreement"`.

    Returns:
        `str`: the path; nothing is downloaded.

    Raises:
        `ValueError`: there is no module of this name.

    Example:

    ```python
    >>> import evaluate
    >>> from echoatt_hf.evaluation import metric_path

    >>> perplexity = evaluate.load(metric_path("echoatt_perplexity"))
    >>> perplexity.compute(predictions=texts, model_id="path/to/student", row_length=256)
    ```
    """
    folder = Path(__file__).parent / "metrics"
    known = sorted(file.stem for file in folder.glob("*/*.py"))
    if name not in known:
        raise ValueError(f"There is no metric {name!r}; known are {', '.join(known)}.")
    return str(folder / name)


def _pack_texts(texts: str | Iterable[str], tokenizer: PreTrainedTokenizerBase, row_length: int) -> Dataset:
    texts = [texts] if isinstance(texts, str) else list(texts)
    return pack_rows(load_documents(Dataset.from_dict({"text": texts})), tokenizer, row_length)


def _load_model(model: str | Path | PreTrainedModel | None, role: str = "model") -> PreTrainedModel:
    if model is None:
        raise ValueError(f"No {role} is given: give {role} loaded, or as a path or name ({role}_id in a metric).")
    if not isinstance(model, (str, Path)):
        return model
    return load_model(model, dtype="auto").to(default_device())


def _load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, model: str | Path | PreTrainedModel | None
) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        tokenizer = model
    if isinstance(tokenizer, (str, Path)):
        return AutoTokenizer.from_pretrained(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError("The tokenizer is not known: give tokenizer, or the path or name it was saved under.")
    return tokenizer


def _check_vocabularies(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    sizes = [each.config.get_text_config().vocab_size for each in (model, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The model has {sizes[0]} tokens and the teacher {sizes[1]}: agreement needs the same vocabulary. Give "
            "the teacher the model was made from."
        )


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


def batch_rows(rows: Iterable[dict], batch_size: int) -> Iterator[BatchEncoding]:
    """What a model takes of packed rows, `(B, T)` each, `batch_size` rows at a time."""
    iterator = iter(rows)
    while batch := list(islice(iterator, batch_size)):
        yield stack_rows(batch)


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
        teacher_logits (`torch.Tensor` of shape `(B, T, V)`, *optional*): likewise.
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
    """Sums over one row: negative log-likelihood, KL and equal first tokens. Logits `(T - 1, V)`."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    nll = F.nll_loss(log_probs, targets, reduction="sum")
    kl = same = torch.zeros((), device=logits.device)
    if teacher_logits is not None:
        teacher_log_probs = F.log_softmax(teacher_logits.float(), dim=-1)
        kl = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="sum")
        same = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
    return torch.stack([nll, kl, same])


def _count_bytes(tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor) -> int:
    texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return sum(len(text.encode("utf-8", errors="replace")) for text in texts)
