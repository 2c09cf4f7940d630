"""How good a model is on held-out text: perplexity, bits per byte, and agreement with its teacher."""

import logging
import math
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.checks import check_same_tokenizer
from ..models.loading import load_placed, load_tokenizer
from ..models.predictions import Predictions, compare_predictions, position_ranges
from ..outputs.tables import format_markdown
from ..text.documents import load_documents
from ..text.readers import check_text
from ..text.rows import SCORED, pack_rows, slide_rows


__all__ = ["compute_agreement", "compute_perplexity", "evaluate_model", "format_positions", "metric_path"]

logger = logging.getLogger(__name__)


def evaluate_model(
    model: PreTrainedModel,
    rows: Iterable[dict],
    *,
    teacher: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    position_buckets: int = 0,
    description: str | None = None,
    among_processes: bool = False,
) -> dict[str, float | int | list]:
    """
    Evaluate a causal language model on packed rows, and against its teacher.

    Args:
        model (`PreTrainedModel`):
            Causal language model.
        rows (iterable of `dict`):
            Rows of T tokens, as returned by [`pack_rows`]: in each, T - 1 tokens are predicted. Or as returned by
            [`slide_rows`]: each token is predicted once, with at least half a row before it.
        teacher (`PreTrainedModel`, *optional*):
            Model with the same tokenizer to compare with.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's. Needed for `bits_per_byte`: bytes are counted in the decoded text of the predicted tokens.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.
        position_buckets (`int`, *optional*, defaults to 0):
            Number of equal ranges of positions in a row to report the same numbers for, as of a long context.
        description (`str`, *optional*):
            Show a progress bar with this text.
        among_processes (`bool`, *optional*, defaults to `False`):
            Divide the rows among the processes that `accelerate launch` started. All of them have to call this, and each
            gets the result of all rows.

    Returns:
        `dict`: `tokens` predicted; `loss`, the mean negative log-likelihood in nats per token; `perplexity`, its
        exponential; with a tokenizer `bits_per_byte`; with a teacher `kl`, the mean of KL(teacher || model) in nats
        per token, and `agreement`, the share of tokens for which both rank the same token first. Where rows say which tokens
        are answers, as those with `assistant_masks`, all but the bytes also for these, as `answer_tokens`, `answer_loss` and
        so on. With ranges, `by_position`: for each `first` and `last`, the numbers of tokens of its text that a predicted
        token has before it, and the same numbers.

    Raises:
        `ValueError`: there are no rows, rows are padded elsewhere than at their end, there are more ranges than positions,
            `batch_size` is under 1, or the teacher has another tokenizer, see [`check_same_tokenizer`].
    """
    rows = rows if isinstance(rows, Sized) else list(rows)
    if teacher is not None:
        check_same_tokenizer(model, teacher, tokenizer)
    found = compare_predictions(
        model,
        rows,
        teacher,
        batch_size=batch_size,
        position_buckets=position_buckets,
        description=description,
        among_processes=among_processes,
    )
    tokens, loss = found.tokens, found.loss
    if math.isnan(loss):
        logger.warning("The loss is NaN: the model gives logits that are no numbers, as of a training that diverged.")
    result = _describe(found, teacher is not None)
    if tokenizer is not None:
        text_bytes = sum(_count_scored_bytes(tokenizer, row) for row in rows)
        agreement = {name: result.pop(name) for name in ("kl", "agreement") if name in result}
        result |= {"bits_per_byte": loss * tokens / math.log(2) / max(text_bytes, 1), **agreement}
    if found.answers is not None and not found.answers.tokens:
        logger.warning("None of the rows holds a token of an answer: give longer rows, or more of them.")
    elif found.answers is not None:
        result |= {f"answer_{name}": value for name, value in _describe(found.answers, teacher is not None).items()}
    if position_buckets:
        length = len(next(iter(rows))["input_ids"])
        result["by_position"] = [
            {"first": first, "last": last, **_describe(part, teacher is not None)}
            for (first, last), part in zip(position_ranges(length, position_buckets), found.by_position, strict=True)
            if part.tokens
        ]
    return result


def _describe(found: Predictions, is_compared: bool) -> dict[str, float | int]:
    described = {
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": math.inf if found.loss > 700 else math.exp(found.loss),
    }
    return described | ({"kl": found.kl, "agreement": found.agreement} if is_compared else {})


def format_positions(positions: list[dict]) -> str:
    """
    Perplexity by position as a Markdown table.

    Args:
        positions (`list[dict]`): `by_position` of [`evaluate_model`].
    """
    columns = {
        "tokens": ("tokens", ","),
        "perplexity": ("perplexity", ".3f"),
        "agreement": ("agreement", ".1%"),
        "kl": ("KL (nats)", ".4f"),
    }
    columns = {name: column for name, column in columns.items() if name in positions[0]}
    lines = [["positions", *(title for title, _ in columns.values())]]
    for part in positions:
        values = [format(part[name], form) for name, (_, form) in columns.items()]
        lines.append([f"{part['first']:,} to {part['last']:,}", *values])
    return format_markdown(lines)


def compute_perplexity(
    texts: str | Iterable[str],
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    row_length: int = 256,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, float | int]:
    """
    Perplexity and bits per byte of a causal language model on texts.

    The texts are packed into rows as [`pack_rows`] does, or with a stride as [`slide_rows`] does, and evaluated as
    [`evaluate_model`] does.

    Args:
        texts (`str` or iterable of `str`):
            Documents.
        model (`str`, `Path` or `PreTrainedModel`):
            Causal language model, or its name or path as for [`load_model`]; it is loaded to a GPU if there is one.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerBase`, *optional*):
            Tokenizer of the model; by default the one saved with it. Needed if `model` is already loaded.
        row_length (`int`, *optional*, defaults to 256):
            Tokens in a row, at most the model's context. What does not fill a last row is left out.
        stride (`int`, *optional*):
            Tokens by which rows advance, at most half of `row_length`: each token is predicted once, with at least half a
            row before it or all of its text, and nothing is left out. Without it rows do not overlap.
        batch_size (`int`, *optional*, defaults to 8):
            Rows in a forward pass.

    Returns:
        `dict`: `tokens`, `loss`, `perplexity` and `bits_per_byte`, as returned by [`evaluate_model`].

    Raises:
        `ValueError`: no model or tokenizer, or the texts do not fill a row.
    """
    model, tokenizer = _load_with_tokenizer(model, tokenizer)
    rows = _pack_texts(texts, tokenizer, row_length, stride)
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
    model, tokenizer = _load_with_tokenizer(model, tokenizer)
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


def _pack_texts(
    texts: str | Iterable[str], tokenizer: PreTrainedTokenizerBase, row_length: int, stride: int | None = None
) -> Dataset | list[dict]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    texts = [check_text(text, f"text {number}") for number, text in enumerate(texts)]
    documents = load_documents(Dataset.from_dict({"text": texts}))
    if stride is not None:
        return list(slide_rows(documents, tokenizer, row_length, stride))
    return pack_rows(documents, tokenizer, row_length)


def _load_model(model: str | Path | PreTrainedModel | None, role: str = "model") -> PreTrainedModel:
    if model is None:
        raise ValueError(f"No {role} is given: give {role} loaded, or as a path or name ({role}_id in a metric).")
    if not isinstance(model, (str, Path)):
        return model
    return load_placed(model)[0]


def _load_with_tokenizer(
    model: str | Path | PreTrainedModel | None, tokenizer: str | Path | PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded = _load_model(model)
    if tokenizer is None:
        tokenizer = model
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer, loaded)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError("The tokenizer is not known: give tokenizer, or the path or name it was saved under.")
    return loaded, tokenizer


def _count_scored_bytes(tokenizer: PreTrainedTokenizerBase, row: dict) -> int:
    """The bytes of the text of the tokens that are predicted."""
    input_ids, begin, end = row["input_ids"], 1, len(row["input_ids"])
    if SCORED in row:
        places = np.flatnonzero(row[SCORED])
        begin, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (1, 1)
    # A difference: at the start of a text some tokenizers drop the space that the first token stands for.
    return _count_bytes(tokenizer, input_ids[:end]) - _count_bytes(tokenizer, input_ids[:begin])


def _count_bytes(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> int:
    text = tokenizer.decode(input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", errors="replace"))
