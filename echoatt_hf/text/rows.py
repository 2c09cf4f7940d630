"""Documents to packed rows of tokens, and rows to batches."""

import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, IterableDataset, Sequence, Value, interleave_datasets, is_caching_enabled
from datasets.fingerprint import Hasher
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..settings import check_row_start


__all__ = ["collate_rows", "draw_rows", "mix_rows", "pack_rows"]

logger = logging.getLogger(__name__)

ROW_COLUMNS = ("input_ids", "position_ids")
"""What a packed row may hold for the model, T numbers each. Other columns are not the model's."""

STORED_COLUMNS = {"teacher_ids": np.int64, "teacher_logprobs": np.float16}
"""What a stored teacher adds to a row."""

TARGET_MASKS = ("completion_mask", "assistant_masks")
"""Columns by which TRL marks the tokens that are to be predicted, 1 for those."""

IGNORED = -100
"""Label of a token that is not to be predicted."""

_PIECE = 2**16
"""Characters that are tokenized at once: a tokenizer takes about 200 bytes of memory for each of them."""

_PIECES = 16
"""Pieces that are given to a tokenizer together, which its threads share."""

_PACKING_VERSION = 2
"""Part of the fingerprint of rows in the cache: raise it when documents are tokenized or packed in another way."""

# Places where most tokenizers split a text in any case: after a line break, and before a space, that stand alone. In longer
# runs of blanks the last one is often a token of its own, but not at the end of a text.
_LINE_BREAK, _SPACE = re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)")


def pack_rows(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    row_length: int,
    *,
    row_start: str = "bos",
    document_masks: bool = False,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Tokenize documents and pack them, one after the other, into rows of `row_length` tokens.

    Documents are separated by the tokenizer's end-of-sequence token, if it has one. What is left at the end and
    does not fill a row is dropped. Rows of a `Dataset` are kept in the cache of `datasets`, mapped into memory, and found
    there again for the same documents, tokenizer and options.

    Args:
        documents (`Dataset` or `IterableDataset`):
            Documents with a column `text`.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        row_length (`int`):
            Tokens in a row, T.
        row_start (`str`, *optional*, defaults to `"bos"`):
            What a row begins with. `"bos"`: the token with which the tokenizer begins a text, as models that were trained
            with one expect it; a tokenizer that begins texts with none adds nothing. `"document"`: the beginning of a
            document; what does not fit into its row is dropped, and how much that is is logged. `"text"`: wherever the row
            before ended.
        document_masks (`bool`, *optional*, defaults to `False`):
            Give each row `position_ids` that start again with each document, from which transformers makes masks that keep
            its documents from seeing each other. Flash attention does so in batches of one row alone. The first token of
            a document is still predicted, from the end of the one before.
        num_proc (`int`, *optional*):
            Processes that tokenize a `Dataset`. One uses the threads of a fast tokenizer.

    Returns:
        `Dataset` or `IterableDataset`: rows with the column `input_ids` `(T,)`, and `position_ids` `(T,)` if asked for.

    Raises:
        `ValueError`: `row_length` is under 2, `row_start` is not known, or the text does not fill a single row (of
            streamed documents, when the rows are read).
    """
    if row_length < 2:
        raise ValueError(f"row_length is {row_length}; it must be at least 2, one token to predict another from.")
    check_row_start(row_start)
    tokenize = _Tokenize(tokenizer)
    packer = _Packer(row_length, row_start, tokenize.prefix, document_masks)
    features = Features({name: Sequence(Value("int32")) for name in packer.columns})
    if isinstance(documents, IterableDataset):
        return IterableDataset.from_generator(
            _iterate_rows,
            features=features,
            gen_kwargs={"documents": documents, "tokenize": tokenize, "packer": packer},
        )
    tokens = documents.map(
        tokenize,
        batched=True,
        batch_size=100,
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        input_columns=["text"],
        remove_columns=documents.column_names,
        features=Features({"input_ids": Sequence(Value("int32"))}),
        cache_file_name=_cache_file(documents, tokenize),
        desc="tokenize",
    )
    tokens = tokens.with_format("numpy")
    rows = tokens.map(
        packer,  # which keeps what a batch leaves over for the next one: in order and in one process
        batched=True,
        batch_size=100,
        input_columns=["input_ids"],
        remove_columns=tokens.column_names,
        features=features,
        cache_file_name=_cache_file(tokens, packer),
        desc="pack",
    )
    if not len(rows):
        raise _too_little(row_length)
    count = sum(
        pc.sum(pc.list_value_length(batch["input_ids"])).as_py()
        for batch in tokens.with_format("arrow").iter(batch_size=1000)
    )
    _log_dropped(row_start, len(rows) * row_length, count)
    return rows.with_format(None)


def _cache_file(data: Dataset, function: "_Tokenize | _Packer") -> str | None:
    """Where in the cache of `datasets` the result of a map lies; by default it would lie beside data that is on a disk."""
    if not data.cache_files or not is_caching_enabled():
        return None  # a temporary file
    try:
        fingerprint = Hasher.hash((data._fingerprint, function))
    except Exception:  # a tokenizer that cannot be pickled, for whatever reason
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "echoatt"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{fingerprint}.arrow")


def draw_rows(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    row_length: int,
    count: int,
    *,
    seed: int = 0,
    row_start: str = "bos",
    document_masks: bool = False,
) -> list[dict]:
    """
    Rows at random places of the documents. No more of them is tokenized than that needs.

    Args:
        documents (`Dataset`):
            Documents with a column `text`.
        count (`int`):
            Rows to draw; there are fewer if the text does not fill so many.
        seed (`int`, *optional*, defaults to 0):
            Seed of the places.
        tokenizer, row_length, row_start, document_masks:
            See [`pack_rows`].

    Returns:
        `list[dict]`: rows as those of [`pack_rows`], in random order.

    Raises:
        `ValueError`: as [`pack_rows`].
    """
    generator = np.random.default_rng(seed)
    options = {"row_start": row_start, "document_masks": document_masks}
    lengths = [
        length
        for batch in documents.select_columns(["text"]).with_format("arrow").iter(batch_size=64)
        for length in pc.binary_length(batch["text"]).to_pylist()
    ]
    ends, window = np.cumsum(lengths), 16 * row_length  # bytes: about four rows
    rows = []
    if len(ends) and ends[-1] > 4 * count * window:
        tokenize = _Tokenize(tokenizer)
        for place in generator.permutation(ends[-1] // window):
            packer = _Packer(row_length, row_start, tokenize.prefix, document_masks)
            found = packer(*_tokens_between(documents, tokenize, ends, place * window, (place + 1) * window))
            if size := len(found["input_ids"]):
                chosen = generator.integers(size)
                rows.append({name: values[chosen].tolist() for name, values in found.items()})
            if len(rows) == count:
                return rows
    packed = pack_rows(documents, tokenizer, row_length, **options)
    return [packed[int(index)] for index in generator.permutation(len(packed))[:count]]


def _tokens_between(
    documents: Dataset, tokenize: "_Tokenize", ends: np.ndarray, start: int, stop: int
) -> tuple[list[np.ndarray], list[bool]]:
    """The tokens of the documents between two bytes of all text, and which of these parts begin a document."""
    parts, are_first = [], []
    index = int(np.searchsorted(ends, start, side="right"))
    while start < stop and index < len(ends):
        whole = documents[index]["text"]
        first = int(ends[index - 1]) if index else 0
        text = whole.encode()[start - first : stop - first].decode(errors="ignore")
        is_first, is_last = start == first, stop >= ends[index]
        if not is_first and (found := _LINE_BREAK.search(text) or _SPACE.search(text)):
            text = text[found.end() :]
        parts.append(tokenize.whole([text], is_first, is_last)[0])
        are_first.append(is_first)
        start, index = int(ends[index]), index + 1
    return parts, are_first


def mix_rows(
    parts: list[Dataset] | list[IterableDataset], weights: list[float], seed: int = 0, *, repeat: bool = True
) -> Dataset | IterableDataset:
    """
    Rows of several sources, each by its share.

    Args:
        parts (`list` of `Dataset` or of `IterableDataset`): rows of each source.
        weights (`list[float]`): shares, up to a factor.
        seed (`int`, *optional*, defaults to 0): seed of the order.
        repeat (`bool`, *optional*, defaults to `True`):
            Go on until all rows of all sources were there, with those of the smaller ones again; otherwise end with the
            first source that ends.
    """
    if len(parts) == 1:
        return parts[0]
    shares = (np.asarray(weights) / np.sum(weights)).tolist()
    return interleave_datasets(
        parts,
        probabilities=shares,
        seed=seed,
        stopping_strategy="all_exhausted" if repeat else "first_exhausted",
    )


def shuffle_rows(rows: Dataset | IterableDataset, seed: int, buffer_size: int) -> Dataset | IterableDataset:
    """
    Rows in an order that depends on the seed alone.

    Args:
        rows (`Dataset` or `IterableDataset`): rows, as returned by [`pack_rows`].
        seed (`int`): seed of the order.
        buffer_size (`int`): streamed rows that are kept, of which the next one is drawn; the first rows of a stream are
            among the first that come out.
    """
    options = {"buffer_size": buffer_size} if isinstance(rows, IterableDataset) else {}
    return rows.shuffle(seed=seed, **options)


def collate_rows(rows: list[dict]) -> dict[str, torch.Tensor]:
    """
    Make a batch of rows for causal language modelling.

    Args:
        rows (`list[dict]`):
            B rows with `input_ids`, `position_ids` if they have them, and what a [`StoredTeacher`] adds. Packed rows have T
            tokens each. Others may bring `labels`, -100 where nothing is to be predicted, or TRL's `completion_mask` or
            `assistant_masks`, 1 where something is, and `attention_mask`, 0 on padding. Rows of different lengths are
            padded on the right to the longest.

    Returns:
        `dict`: `input_ids`, `position_ids` and `attention_mask` if the rows have them or are padded, and `labels`, each
        `(B, T)`, int64; the model shifts the labels. Labels that no row brings are the tokens that are not padding. Of a
        stored teacher also `teacher_ids` `(B, T, k)`, int64, and `teacher_logprobs` `(B, T, k + 1)`, float16.

    Raises:
        `ValueError`: a column is missing in some of the rows, or is not as long as the tokens of its row.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    is_padded = len({*lengths}) > 1
    names = [*ROW_COLUMNS, "attention_mask", "labels", *TARGET_MASKS]
    batch = {name: _pad(rows, name, np.int64, IGNORED if name == "labels" else 0) for name in names if name in rows[0]}
    if is_padded and "attention_mask" not in batch:
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    if is_padded and any(name in rows[0] for name in STORED_COLUMNS):
        raise ValueError(
            f"Rows of a stored teacher have {min(lengths)} and {max(lengths)} tokens: they must be as long."
        )
    labels = batch.pop("labels", batch["input_ids"]).clone()
    for mask in [batch.pop(name) for name in TARGET_MASKS if name in batch] + [batch.get("attention_mask")]:
        if mask is not None:
            labels[mask == 0] = IGNORED
    stored = {name: _stack(rows, name, dtype) for name, dtype in STORED_COLUMNS.items() if name in rows[0]}
    return batch | stored | {"labels": labels}


def _pad(rows: list[dict], name: str, dtype: type, filling: int) -> torch.Tensor:
    padded = np.full((len(rows), max(len(row["input_ids"]) for row in rows)), filling, dtype)
    for index, row in enumerate(rows):
        if name not in row or row[name] is None:
            raise ValueError(
                f"Row {index} of a batch has no {name}, which the first one has: all rows need it or none."
            )
        if len(row[name]) != len(row["input_ids"]):
            raise ValueError(
                f"Row {index} of a batch has {len(row['input_ids'])} tokens and {len(row[name])} numbers in {name}: there "
                "must be one for each token."
            )
        padded[index, : len(row[name])] = row[name]
    return torch.from_numpy(padded)


def stack_rows(rows: list[dict]) -> BatchEncoding:
    """
    What a model takes of packed rows, `(B, T)` each, int64.

    Raises:
        `ValueError`: the rows differ in length, as only [`collate_rows`] pads.
    """
    lengths = sorted({len(row["input_ids"]) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"Rows have {lengths[0]} and {lengths[-1]} tokens; here all must be as long: make them with pack_rows."
        )
    return BatchEncoding({name: _stack(rows, name, np.int64) for name in ROW_COLUMNS if name in rows[0]})


def batch_rows(rows: Iterable[dict], batch_size: int) -> Iterator[BatchEncoding]:
    """What a model takes of packed rows, `(B, T)` each, `batch_size` rows at a time."""
    iterator = iter(rows)
    while batch := list(islice(iterator, batch_size)):
        yield stack_rows(batch)


def iterate_column(data: Dataset | IterableDataset, column: str) -> Iterator:
    """The values of a column of a data set that is the source of another one."""
    # Not `for row in data`: in a worker of a data loader a data set gives only the worker's share of its shards, and
    # this worker already has its share of the other one.
    for batch in data.iter(batch_size=16):
        yield from batch[column]


def _stack(rows: list[dict], name: str, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.asarray([row[name] for row in rows], dtype))


class _Tokenize:
    """Texts to tokens, with what the tokenizer puts around a text; long ones piece by piece."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.version = tokenizer, _PACKING_VERSION
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        places = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        start = places[0] if places else 0
        self.prefix, self.suffix = list(whole[:start]), list(whole[start + len(plain) :])
        eos = tokenizer.eos_token_id
        if eos is not None and self.suffix[-1:] != [eos]:
            self.suffix.append(eos)

    def __call__(self, texts: list[str]) -> dict[str, list[np.ndarray]]:
        return {"input_ids": self.whole(texts)}

    def whole(self, texts: list[str], is_first: bool = True, is_last: bool = True) -> list[np.ndarray]:
        """The tokens of each text: of a whole document, or of a part that is not its first or its last."""
        numbers, pieces = [], []
        for number, text in enumerate(texts):
            for piece in _cut(text):
                numbers.append(number)
                pieces.append(piece)
        tokens = [[np.asarray(self.prefix if is_first else [], np.int32)] for _ in texts]
        start = 0
        while start < len(pieces):
            stop, size = start, 0
            while stop < len(pieces) and (stop == start or size + len(pieces[stop]) <= _PIECES * _PIECE):
                size += len(pieces[stop])
                stop += 1
            # verbose=False: documents longer than the model's context are expected, they are cut into rows.
            found = self.tokenizer(
                pieces[start:stop], add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            for number, ids in zip(numbers[start:stop], found["input_ids"], strict=True):
                tokens[number].append(np.asarray(ids, np.int32))
            start = stop
        for parts in tokens:
            # A document that ends with the token itself gets no second one.
            ends_itself = len(self.suffix) == 1 and len(parts[-1]) and parts[-1][-1] == self.suffix[0]
            if is_last and not ends_itself:
                parts.append(np.asarray(self.suffix, np.int32))
        return [np.concatenate(parts) for parts in tokens]


def _cut(text: str) -> Iterator[str]:
    """Pieces of a text, most of them between `_PIECE / 2` and `_PIECE` characters, cut where its tokens stay what they are."""
    start = 0
    while len(text) - start > _PIECE:
        window = text[start + _PIECE // 2 : start + _PIECE]
        places = [found.end() for found in _LINE_BREAK.finditer(window)] or [
            found.end() for found in _SPACE.finditer(window)
        ]
        stop = start + _PIECE // 2 + places[-1] if places else start + _PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


class _Packer:
    """Tokens of documents to rows. What does not fill a row is kept for the next call."""

    def __init__(self, row_length: int, row_start: str, prefix: list[int], document_masks: bool):
        self.row_length, self.row_start, self.version = row_length, row_start, _PACKING_VERSION
        self.prefix = np.asarray(prefix if row_start == "bos" else [], np.int32)
        self.columns = ROW_COLUMNS if document_masks else ROW_COLUMNS[:1]
        self._tokens, self._begins = np.zeros(0, np.int32), np.zeros(0, bool)

    def __call__(
        self, documents: Iterable[np.ndarray], are_first: Iterable[bool] | None = None
    ) -> dict[str, np.ndarray]:
        documents = list(documents)
        begins = [np.zeros(len(tokens), bool) for tokens in documents]
        for marks, is_first in zip(begins, are_first or [True] * len(documents), strict=True):
            marks[:1] = is_first
        tokens = np.concatenate([self._tokens, *documents]).astype(np.int32)
        begins = np.concatenate([self._begins, *begins])
        rows, row_begins, start, added = [], [], 0, len(self.prefix)
        firsts = np.flatnonzero(begins) if self.row_start == "document" else None
        while True:
            if firsts is not None:
                place = np.searchsorted(firsts, start)
                start = int(firsts[place]) if place < len(firsts) else len(tokens)
            # A document that begins here has brought its own.
            prefix = (
                self.prefix if added and not (tokens[start : start + added] == self.prefix).all() else self.prefix[:0]
            )
            stop = start + self.row_length - len(prefix)
            if stop > len(tokens):
                break
            rows.append(np.concatenate([prefix, tokens[start:stop]]))
            row_begins.append(np.concatenate([np.zeros(len(prefix), bool), begins[start:stop]]))
            start = stop
        self._tokens, self._begins = tokens[start:], begins[start:]
        shape = (len(rows), self.row_length)
        found = {"input_ids": np.asarray(rows, np.int32).reshape(shape)}
        if "position_ids" in self.columns:
            places = np.arange(self.row_length, dtype=np.int32)
            starts = np.where(np.asarray(row_begins, bool).reshape(shape), places, 0)
            found["position_ids"] = places - np.maximum.accumulate(starts, axis=1)
        return found


def _iterate_rows(documents: IterableDataset, tokenize: _Tokenize, packer: _Packer) -> Iterator[dict[str, np.ndarray]]:
    packer = _Packer(packer.row_length, packer.row_start, tokenize.prefix, "position_ids" in packer.columns)
    texts, count, taken = iterate_column(documents, "text"), 0, 0
    while batch := list(islice(texts, 16)):
        tokens = tokenize.whole(batch)
        count += sum(map(len, tokens))
        found = packer(tokens)
        for index in range(len(found["input_ids"])):
            taken += packer.row_length
            yield {name: values[index] for name, values in found.items()}
    if not taken:
        raise _too_little(packer.row_length)
    _log_dropped(packer.row_start, taken, count)


def _too_little(row_length: int) -> ValueError:
    return ValueError(f"The text does not fill a row of {row_length} tokens: give more text or a shorter row.")


def _log_dropped(row_start: str, taken: int, count: int) -> None:
    if row_start == "document" and taken < count:
        share = 1 - taken / count
        logger.warning(
            f"Rows that start with a document leave out {count - taken:,} of {count:,} tokens ({share:.1%}): what did not "
            "fit into a row after the beginning of its document."
        )
