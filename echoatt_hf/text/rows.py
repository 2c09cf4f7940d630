"""Documents to packed rows of tokens, and rows to batches."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice

import numpy as np
import pyarrow as pa
import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Sequence,
    Value,
)
from transformers import BatchEncoding, PreTrainedTokenizerBase


__all__ = ["collate_rows", "pack_rows"]

ROW_COLUMNS = ("input_ids", "position_ids")
"""What a row may hold for the model, T numbers each. Other columns are not the model's."""


STORED_COLUMNS = {"teacher_ids": np.int64, "teacher_logprobs": np.float16}
"""What a stored teacher adds to a row."""


def pack_rows(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    row_length: int,
    *,
    document_masks: bool = False,
) -> Dataset | IterableDataset:
    """
    Tokenize documents and pack them, one after the other, into rows of `row_length` tokens.

    Documents are separated by the tokenizer's end-of-sequence token, if it has one. What is left at the end and
    does not fill a row is dropped.

    Args:
        documents (`Dataset` or `IterableDataset`):
            Documents with a column `text`.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        row_length (`int`):
            Tokens in a row, T.
        document_masks (`bool`, *optional*, defaults to `False`):
            Give each row `position_ids` that start again with each document, from which transformers makes masks that keep
            its documents from seeing each other. Flash attention does so in batches of one row alone. The first token of
            a document is still predicted, from the end of the one before.

    Returns:
        `Dataset` or `IterableDataset`: rows with the column `input_ids` `(T,)`, and `position_ids` `(T,)` if asked for.

    Raises:
        `ValueError`: `row_length` is under 2, or the text does not fill a single row (of streamed documents, when
        the rows are read).
    """
    if row_length < 2:
        raise ValueError(f"row_length is {row_length}; it must be at least 2, one token to predict another from.")
    columns = ROW_COLUMNS if document_masks else ROW_COLUMNS[:1]
    features = Features({name: Sequence(Value("int32")) for name in columns})
    if isinstance(documents, IterableDataset):
        return IterableDataset.from_generator(
            _iterate_rows,
            features=features,
            gen_kwargs={
                "documents": documents,
                "tokenizer": tokenizer,
                "row_length": row_length,
                "document_masks": document_masks,
            },
        )
    # Arrays: as Python integers the tokens of a large corpus would take nine times the memory.
    rows = [
        {name: np.asarray(values, np.int32) for name, values in row.items()}
        for row in _iterate_rows(documents, tokenizer, row_length, document_masks)
    ]
    table = {name: [row[name] for row in rows] for name in columns}
    return Dataset(pa.table(table, schema=features.arrow_schema))


def collate_rows(rows: list[dict]) -> dict[str, torch.Tensor]:
    """
    Stack packed rows into a batch for causal language modelling.

    Args:
        rows (`list[dict]`):
            B rows with `input_ids` of T tokens each, `position_ids` if they have them, and what a [`StoredTeacher`] adds.

    Returns:
        `dict`: `input_ids`, `position_ids` if the rows have them, and `labels`, each `(B, T)`, int64; the model shifts the
        labels. Of a stored teacher also `teacher_ids` `(B, T, k)`, int64, and `teacher_logprobs` `(B, T, k + 1)`, float16.
    """
    batch = dict(stack_rows(rows))
    batch |= {name: _stack(rows, name, dtype) for name, dtype in STORED_COLUMNS.items() if name in rows[0]}
    return batch | {"labels": batch["input_ids"].clone()}


def stack_rows(rows: list[dict]) -> BatchEncoding:
    """What a model takes of packed rows, `(B, T)` each, int64. Arguments as in [`collate_rows`]."""
    return BatchEncoding({name: _stack(rows, name, np.int64) for name in ROW_COLUMNS if name in rows[0]})


def _stack(rows: list[dict], name: str, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.asarray([row[name] for row in rows], dtype))


def _iterate_rows(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, row_length: int, document_masks: bool
) -> Iterator[dict[str, list[int]]]:
    pending: list[int] = []
    numbers: list[int] = []  # of the document, for each pending token
    is_empty = True
    for number, text in enumerate(_iterate_column(documents, "text")):
        # verbose=False: documents longer than the model's context are expected, they are cut into rows.
        tokens = tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and tokens and tokens[-1] != tokenizer.eos_token_id:
            tokens.append(tokenizer.eos_token_id)
        pending.extend(tokens)
        numbers.extend([number] * len(tokens))
        start = 0
        while len(pending) - start >= row_length:
            row = {"input_ids": pending[start : start + row_length]}
            if document_masks:
                parts = groupby(numbers[start : start + row_length])
                row["position_ids"] = [position for _, part in parts for position, _ in enumerate(part)]
            yield row
            is_empty = False
            start += row_length
        pending, numbers = pending[start:], numbers[start:]
    if is_empty:
        raise ValueError(f"The text does not fill a row of {row_length} tokens: give more text or a shorter row.")


def _iterate_column(data: Dataset | IterableDataset, column: str) -> Iterator:
    # Not `for row in data`: in a worker of a data loader a data set gives only the worker's share of its shards, and
    # here it is the source of another one, of which this worker already has its share.
    for batch in data.iter(batch_size=16):
        yield from batch[column]


def batch_rows(rows: Iterable[dict], batch_size: int) -> Iterator[BatchEncoding]:
    """What a model takes of packed rows, `(B, T)` each, `batch_size` rows at a time."""
    iterator = iter(rows)
    while batch := list(islice(iterator, batch_size)):
        yield stack_rows(batch)
