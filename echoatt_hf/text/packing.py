"""Tokens of documents to rows of equal length."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


__all__ = ["ANSWERS", "PACKING_VERSION", "Dropped", "Packer", "Part"]

logger = logging.getLogger(__name__)

ANSWERS = "assistant_masks"
"""Column that marks the tokens to learn from, as TRL has it: those of answers, and of plain text all."""

PACKING_VERSION = 3
"""Part of the fingerprint of rows in the cache: raise it when documents are tokenized or packed in another way."""


@dataclass
class Part:
    """Tokens of a document, or of what is left of one, and which of them to learn from."""

    tokens: np.ndarray
    mask: np.ndarray | None = None
    is_chat: bool = False
    is_first: bool = True  # with the beginning of the document

    def __getitem__(self, place: slice) -> "Part":
        mask = self.mask if self.mask is None else self.mask[place]
        return Part(self.tokens[place], mask, self.is_chat, self.is_first and not place.start)


class Packer:
    """
    Tokens of documents to rows. What does not fill a row is kept for the next call.

    Raises:
        `ValueError`: the rows are too short to predict a token, or to go on with a text.
    """

    def __init__(self, row_length: int, row_start: str, prefix: list[int], document_masks: bool, assistant_only: bool):
        self.row_length, self.row_start, self.version = row_length, row_start, PACKING_VERSION
        self.prefix = np.asarray(prefix if row_start == "bos" else [], np.int32)
        if row_length < 2:
            raise ValueError(f"row_length is {row_length}; it must be at least 2, one token to predict another from.")
        if row_length <= len(self.prefix):
            raise ValueError(
                f"row_length is {row_length}; it must be more than {len(self.prefix)}, the tokens with which the tokenizer "
                "begins a text, and by row_start 'bos' each row: give longer rows (--row-length)."
            )
        optional = {"position_ids": document_masks, ANSWERS: assistant_only}
        self.columns = ("input_ids", *(name for name, is_asked in optional.items() if is_asked))
        self._left: list[Part] = []

    def __call__(self, *columns: Iterable) -> dict[str, np.ndarray]:
        """Rows of a batch of documents with the columns of [`_Tokenize`]."""
        *masks, are_chats = columns[1:]
        masks = masks[0] if masks else [None] * len(columns[0])
        return self.pack(
            [
                Part(np.asarray(tokens, np.int32), mask, bool(is_chat))
                for tokens, mask, is_chat in zip(columns[0], masks, are_chats, strict=True)
            ]
        )

    def pack(self, parts: list[Part]) -> dict[str, np.ndarray]:
        parts = [part for part in [*self._left, *parts] if len(part.tokens)]
        ends = np.cumsum([len(part.tokens) for part in parts], dtype=np.int64)
        begins = ends - [len(part.tokens) for part in parts]
        rows = {name: [] for name in self.columns}
        start, total = 0, int(ends[-1]) if parts else 0
        while start < total:
            first = int(np.searchsorted(ends, start, side="right"))
            part, is_beginning = parts[first], parts[first].is_first and start == begins[first]
            if not is_beginning and self._begins_with_document(part):
                start = int(ends[first])
                continue
            added = self._find_prefix(part[start - int(begins[first]) :])
            stop = start + self.row_length - len(added)
            if stop > total:
                break
            last = int(np.searchsorted(ends, stop, side="left"))
            cut = [
                parts[index][max(start - int(begins[index]), 0) : stop - int(begins[index])]
                for index in range(first, last + 1)
            ]
            for name, values in self._make_row(added, cut).items():
                rows[name].append(values)
            is_cut = stop < ends[last] and begins[last] > start
            # A conversation that is cut is whole in the next row.
            start = int(begins[last]) if is_cut and parts[last].is_chat and self.row_start != "text" else stop
        first = int(np.searchsorted(ends, start, side="right"))
        self._left = [
            part if index else part[start - int(begins[first]) :] for index, part in enumerate(parts[first:])
        ]
        return {name: np.asarray(values, np.int32).reshape(-1, self.row_length) for name, values in rows.items()}

    def _begins_with_document(self, part: Part) -> bool:
        return self.row_start == "document" or part.is_chat and self.row_start != "text"

    def _find_prefix(self, part: Part) -> np.ndarray:
        """What a row that begins with a part has before it. A document may have brought its own, a conversation has."""
        has_own = np.array_equal(part.tokens[: len(self.prefix)], self.prefix)
        return self.prefix[:0] if has_own or part.is_chat and part.is_first else self.prefix

    def _make_row(self, added: np.ndarray, parts: list[Part]) -> dict[str, np.ndarray]:
        row = {"input_ids": np.concatenate([added, *(part.tokens for part in parts)])}
        if "position_ids" in self.columns:
            places, starts, place = np.arange(self.row_length), np.zeros(self.row_length, np.int64), len(added)
            for part in parts:
                starts[place] = place if part.is_first else 0
                place += len(part.tokens)
            row["position_ids"] = places - np.maximum.accumulate(starts)
        if ANSWERS in self.columns:
            row[ANSWERS] = np.concatenate([np.zeros(len(added), np.int8), *(part.mask for part in parts)])
        return row


class Dropped:
    """What rows leave out, to be said."""

    def __init__(self, row_length: int, row_start: str):
        self._row_length, self._row_start = row_length, row_start
        self._tokens = self._long_chats = self._lost = 0

    def add(self, lengths: Iterable[int], are_chats: Iterable[bool]) -> None:
        """Count documents with so many tokens."""
        lengths = np.asarray(lengths, np.int64)
        too_long = (lengths - self._row_length)[np.asarray(are_chats, bool)].clip(0)
        self._tokens += int(lengths.sum())
        self._long_chats, self._lost = self._long_chats + int((too_long > 0).sum()), self._lost + int(too_long.sum())

    def log(self, rows: int) -> None:
        taken, count = rows * self._row_length, self._tokens
        if self._row_start == "document" and taken < count:
            logger.warning(
                f"Rows that start with a document leave out {count - taken:,} of {count:,} tokens ({1 - taken / count:.1%}): "
                "what did not fit into a row after the beginning of its document."
            )
        elif self._row_start != "text" and self._lost:
            logger.warning(
                f"{self._long_chats:,} conversations are longer than a row, and the last {self._lost:,} of {count:,} tokens "
                f"({self._lost / count:.1%}) are left out: give longer rows (--row-length), or let rows go on with a "
                "conversation (--row-start text)."
            )
