"""How good a model is on held-out text: perplexity, bits per byte, and agreement with its teacher."""

import logging
import math
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..models.checks import check_same_tokenizer
from ..models.loading import load_placed
from ..models.predictions import compare_predictions
from ..text.documents import load_documents
from ..text.readers import check_text
from ..text.rows import pack_rows


__all__ = ["compute_agreement", "compute_perplexity", "evaluate_model", "metric_path"]

logger = logging.getLogger(__name__)


def evaluate_model(
    model: PreTrainedModel,
    rows: Iterable[dict],
    *,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    description: str | None = None,
    among_processes: bool = False,
) -> dict[str, float | int]:
    """
    Evaluate a causal language model on packed rows, and against its teacher.

    Args:
        model (`PreTrainedModel`):
            Causal language model.
        rows (iterable of `dict`):
            Rows of T tokens, as returned by [`pack_rows`]. In each, T - 1 tokens are predicted.
        teacher (`PreTrainedModel`, *optional*):
            Model with the same tokenizer to compare with.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's. Needed for `bits_per_byte`: bytes are counted in the decoded text of the predicted tokens.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.
        description (`str`, *optional*):
            Show a progress bar with this text.
        among_processes (`bool`, *optional*, defaults to `False`):
            Divide the rows among the processes that `accelerate launch` started. All of them have to call this, and each
            gets the result of all rows.

    Returns:
        `dict`: `tokens` predicted; `loss`, the mean negative log-likelihood in nats per token; `perplexity`, its
        exponential; with a tokenizer `bits_per_byte`; with a teacher `kl`, the mean of KL(teacher || model) in nats
        per token, and `agreement`, the share of tokens for which both rank the same token first.

    Raises:
        `ValueError`: there are no rows, or the teacher has another tokenizer, see [`check_same_tokenizer`].
    """
    rows = rows if isinstance(rows, Sized) else list(rows)
    if teacher is not None:
        check_same_tokenizer(model, teacher, tokenizer)
    found = compare_predictions(
        model, rows, teacher, batch_size=batch_size, description=description, among_processes=among_processes
    )
    tokens, loss = found.tokens, found.loss
    if math.isnan(loss):
        logger.warning("The loss is NaN: the model gives logits that are no numbers, as of a training that diverged.")
    result = {"tokens": tokens, "loss": loss, "perplexity": math.inf if loss > 700 else math.exp(loss)}
    if tokenizer is not None:
        # A difference: at the start of a text some tokenizers drop the space that the first token stands for.
        text_bytes = sum(
            _count_bytes(tokenizer, row["input_ids"]) - _count_bytes(tokenizer, row["input_ids"][:1]) for row in rows
        )
        result["bits_per_byte"] = loss * tokens / math.log(2) / max(text_bytes, 1)
    if teacher is not None:
        result |= {"kl": found.kl, "agreement": found.agreement}
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
        `ValueError`: no model, teacher or tokenizer, the teacher has another tokenizer, or the texts do not fill a row.
    """
    model, tokenizer = _load_model(model), _load_tokenizer(tokenizer, model)
    teacher = _load_model(teacher, "teacher")
    rows = _pack_texts(texts, tokenizer, row_length)
    result = evaluate_model(model, rows, teacher=teacher, tokenizer=tokenizer, batch_size=batch_size)
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
    texts = [check_text(text, f"text {number}") for number, text in enumerate(texts)]
    return pack_rows(load_documents(Dataset.from_dict({"text": texts})), tokenizer, row_length)


def _load_model(model: str | Path | PreTrainedModel | None, role: str = "model") -> PreTrainedModel:
    if model is None:
        raise ValueError(f"No {role} is given: give {role} loaded, or as a path or name ({role}_id in a metric).")
    if not isinstance(model, (str, Path)):
        return model
    return load_placed(model)[0]


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


def _count_bytes(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> int:
    text = tokenizer.decode(input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", errors="replace"))
