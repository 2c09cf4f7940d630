"""Documents to packed rows of tokens, and rows to batches."""

import copy
import hashlib
import json
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

from ..settings import check_row_start, check_stride
from .chats import ChatTokenizer, count_common
from .packing import ANSWERS, PACKING_VERSION, Dropped, Packer, Part


__all__ = ["collate_rows", "draw_rows", "mix_rows", "pack_rows", "sample_rows", "slide_rows"]

ROW_COLUMNS = ("input_ids", "position_ids")
"""What a packed row may hold for the model, T numbers each. Other columns are not the model's."""

STORED_COLUMNS = {"teacher_ids": np.int64, "teacher_logprobs": np.float16}
"""What a stored teacher adds to a row."""

TARGET_MASKS = ("completion_mask", ANSWERS)
"""Columns by which TRL marks the tokens that are to be predicted, 1 for those."""

SCORED = "scored"
"""Column of an evaluation: 1 for the tokens that count, where others are there as context alone."""

IGNORED = -100
"""Label of a token that is not to be predicted."""

_PIECE = 2**16
"""
Characters that are tokenized at once: a tokenizer takes about 200 bytes of memory for each of them. Pieces of 2**14 are tokenized
about a seventh faster, but other pieces give other tokens in a few places, and so other rows than those of all figures so far.
"""

_PIECES = 16
"""Pieces that are given to a tokenizer together, which its threads share."""

_BATCH, _BATCH_DOCUMENTS = 2**22, 1000
"""Bytes and documents, at most and about, that are mapped together."""

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
    assistant_only: bool = False,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Tokenize documents and pack them, one after the other, into rows of `row_length` tokens.

    Documents are separated by the tokenizer's end-of-sequence token, if it has one. Conversations are written by its chat
    template, with nothing more. A row never goes on with a conversation: one that a row cuts is at the beginning of the
    next row again, so that its first part is there twice, and only what is longer than a row is lost. What is left at the end and does not fill a row is dropped. Rows of a `Dataset` are kept in the cache of `datasets`, mapped into memory, and found
    there again for the same documents, tokenizer and options.

    Args:
        documents (`Dataset` or `IterableDataset`):
            Documents with a column `text`, and `chat` if some are conversations, as returned by [`load_documents`].
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the model.
        row_length (`int`):
            Tokens in a row, T.
        row_start (`str`, *optional*, defaults to `"bos"`):
            What a row begins with. `"bos"`: the token with which the tokenizer begins a text, as models that were trained
            with one expect it; a tokenizer that begins texts with none adds nothing. `"document"`: the beginning of a
            document; what does not fit into its row is dropped, and how much that is is logged. `"text"`: wherever the row
            before ended, also within a conversation.
        document_masks (`bool`, *optional*, defaults to `False`):
            Give each row `position_ids` that start again with each document, from which transformers makes masks that keep
            its documents from seeing each other. Flash attention does so in batches of one row alone. The first token of
            a document is still predicted, from the end of the one before.
        assistant_only (`bool`, *optional*, defaults to `False`):
            Give each row `assistant_masks`, by which the losses are those of answers alone: of the messages of the
            assistant, by the `{% generation %}` marks of the chat template, else by prefix, and of a completion. Plain text
            counts as a whole.
        num_proc (`int`, *optional*):
            Processes that tokenize a `Dataset`. One uses the threads of a fast tokenizer.

    Returns:
        `Dataset` or `IterableDataset`: rows with the column `input_ids` `(T,)`, and `position_ids` `(T,)` and
        `assistant_masks` `(T,)` if asked for.

    Raises:
        `ValueError`: `row_length` is under 2 or has no place for more than what each row begins with, `row_start` is not
            known, the text does not fill a single row, there is no chat template for conversations, it refuses one, or the
            answers cannot be found in one (of streamed documents, when the rows are read), or no row has an answer in it.
    """
    check_row_start(row_start)
    tokenize = _Tokenize(tokenizer, assistant_only)
    packer = Packer(row_length, row_start, tokenize.prefix, document_masks, assistant_only)
    dtypes = {name: Value("int8" if name == ANSWERS else "int32") for name in packer.columns}
    features = Features({name: Sequence(dtype) for name, dtype in dtypes.items()})
    if isinstance(documents, IterableDataset):
        return IterableDataset.from_generator(
            _iterate_rows,
            features=features,
            gen_kwargs={"documents": documents, "tokenize": tokenize, "packer": packer},
        )
    tokens = documents.map(
        tokenize,
        batched=True,
        batch_size=_batch_size(documents),
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        input_columns=[name for name in ("text", "chat") if name in documents.column_names],
        remove_columns=documents.column_names,
        features=Features({name: features[name] for name in tokenize.columns} | {"is_chat": Value("bool")}),
        cache_file_name=cache_file(documents, tokenize),
        desc="tokenize",
    )
    tokens = tokens.with_format("numpy")
    rows = tokens.map(
        packer,  # which keeps what a batch leaves over for the next one: in order and in one process
        batched=True,
        batch_size=_batch_size(tokens),
        input_columns=tokens.column_names,
        remove_columns=tokens.column_names,
        features=features,
        cache_file_name=cache_file(tokens, packer),
        desc="pack",
    )
    if not len(rows):
        raise _too_little(row_length)
    if assistant_only and not any(
        pc.sum(pc.list_flatten(batch[ANSWERS])).as_py() for batch in rows.with_format("arrow").iter(batch_size=1000)
    ):
        raise ValueError(
            f"No row of {row_length} tokens holds a token of an answer: give longer rows (--row-length), or data in which an "
            "assistant answers."
        )
    dropped = Dropped(row_length, row_start)
    for batch in tokens.with_format("arrow").iter(batch_size=1000):
        lengths = pc.list_value_length(batch["input_ids"]).to_numpy()
        dropped.add(lengths, batch["is_chat"].to_numpy())
    dropped.log(len(rows))
    return rows.with_format(None)


def _batch_size(data: Dataset) -> int:
    """How many documents to map together: few long ones, so that memory does not grow with them, and many short ones."""
    table = data.data
    return min(max(_BATCH * table.num_rows // max(table.nbytes, 1), 1), _BATCH_DOCUMENTS)


def cache_file(data: Dataset, function: object) -> str | None:
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
    assistant_only: bool = False,
    num_proc: int | None = None,
) -> list[dict]:
    """
    Rows at random places of the documents. No more of them is tokenized than that needs.

    Args:
        documents (`Dataset`):
            Documents, see [`pack_rows`].
        count (`int`):
            Rows to draw; there are fewer if the text does not fill so many.
        seed (`int`, *optional*, defaults to 0):
            Seed of the places.
        tokenizer, row_length, row_start, document_masks, assistant_only, num_proc:
            See [`pack_rows`]. Where a part of the text is enough, one process tokenizes it.

    Returns:
        `list[dict]`: rows as those of [`pack_rows`], in random order.

    Raises:
        `ValueError`: as [`pack_rows`].
    """
    generator = np.random.default_rng(seed)
    lengths = [
        length
        for batch in documents.select_columns(["text"]).with_format("arrow").iter(batch_size=64)
        for length in pc.binary_length(batch["text"]).to_pylist()
    ]
    ends, window = np.cumsum(lengths), 16 * row_length  # bytes: about four rows
    rows = []
    if len(ends) and ends[-1] > 4 * count * window:
        tokenize = _Tokenize(tokenizer, assistant_only)
        for place in generator.permutation(ends[-1] // window):
            packer = Packer(row_length, row_start, tokenize.prefix, document_masks, assistant_only)
            found = packer.pack(_parts_between(documents, tokenize, ends, place * window, (place + 1) * window))
            if size := len(found["input_ids"]):
                chosen = generator.integers(size)
                rows.append({name: values[chosen].tolist() for name, values in found.items()})
            if len(rows) == count:
                return rows
    options = {"row_start": row_start, "document_masks": document_masks, "assistant_only": assistant_only}
    packed = pack_rows(documents, tokenizer, row_length, num_proc=num_proc, **options)
    return [packed[int(index)] for index in generator.permutation(len(packed))[:count]]


def _parts_between(documents: Dataset, tokenize: "_Tokenize", ends: np.ndarray, start: int, stop: int) -> list["Part"]:
    """The documents between two bytes of all text, and of conversations those that begin there."""
    parts = []
    index = int(np.searchsorted(ends, start, side="right"))
    while start < stop and index < len(ends):
        document = documents[index]
        first = int(ends[index - 1]) if index else 0
        is_first, is_last = start == first, stop >= ends[index]
        if place := document.get("chat"):
            if is_first:
                found = tokenize.documents([document["text"]], [place])
                parts.append(Part(found["input_ids"][0], found[ANSWERS][0], is_chat=True))
        else:
            text = document["text"].encode()[start - first : stop - first].decode(errors="ignore")
            if not is_first and (found := _LINE_BREAK.search(text) or _SPACE.search(text)):
                text = text[found.end() :]
            tokens = tokenize.whole([text], is_first, is_last)[0]
            parts.append(Part(tokens, np.ones(len(tokens), np.int8), is_first=is_first))
        start, index = int(ends[index]), index + 1
    return parts


def slide_rows(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    row_length: int,
    stride: int,
    *,
    assistant_only: bool = False,
) -> Iterator[dict]:
    """
    Rows to evaluate on in which each token counts once, with at least half a row of its document before it, or all that
    there is.

    A row begins `stride` tokens after the one before, and the tokens that count are the last `stride` ones, or all in the
    first row of a document. Rows hold one document each, and are filled up with zeros that do not count.

    Args:
        documents (`Dataset` or `IterableDataset`):
            As for [`pack_rows`].
        stride (`int`):
            Tokens between the beginnings of two rows, at most half of `row_length`.
        tokenizer, row_length, assistant_only:
            See [`pack_rows`].

    Returns:
        `Iterator[dict]`: rows with `input_ids` `(T,)`, `scored` `(T,)`, 1 for the tokens that count, and `assistant_masks`
        `(T,)` if asked for. They are for [`evaluate_model`].

    Raises:
        `ValueError`: the stride is out of range; and see [`pack_rows`].
    """
    check_stride(stride, row_length)
    return _slide(documents, _Tokenize(tokenizer, assistant_only), row_length, stride)


def _slide(
    documents: Dataset | IterableDataset, tokenize: "_Tokenize", row_length: int, stride: int
) -> Iterator[dict]:
    for batch in _iterate_batches(documents):
        found = tokenize(**batch)
        names = [name for name in ("input_ids", ANSWERS) if name in found]
        for values in zip(*(found[name] for name in names), strict=True):
            scored_until = 1  # the first token has nothing to be predicted from
            for start in range(0, len(values[0]), stride):
                stop = min(start + row_length, len(values[0]))
                if stop <= scored_until:
                    break
                row = {name: np.zeros(row_length, np.int32) for name in [*names, SCORED]}
                for name, value in zip(names, values, strict=True):
                    row[name][: stop - start] = value[start:stop]
                row[SCORED][scored_until - start : stop - start] = 1
                yield row
                scored_until = stop


def sample_rows(rows: Iterable[dict], count: int, seed: int = 0) -> list[dict]:
    """At most `count` of the rows, each with the same chance, without keeping more."""
    generator, sample = np.random.default_rng(seed), []
    for number, row in enumerate(rows, start=1):
        if number <= count:
            sample.append(row)
        elif (place := generator.integers(number)) < count:
            sample[place] = row
    return sample


def mix_rows(
    parts: list[Dataset] | list[IterableDataset], weights: list[float], seed: int = 0
) -> Dataset | IterableDataset:
    """
    Rows of several sources, each by its share, until all rows of all sources were there, with those of the smaller ones again.

    Args:
        parts (`list` of `Dataset` or of `IterableDataset`): rows of each source.
        weights (`list[float]`): shares, up to a factor.
        seed (`int`, *optional*, defaults to 0): seed of the order.
    """
    if len(parts) == 1:
        return parts[0]
    shares = (np.asarray(weights) / np.sum(weights)).tolist()
    return interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


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


def hash_rows(rows: Iterable[dict]) -> str:
    """SHA-256 of what a model takes of packed rows, in their order."""
    columns = [{name: np.asarray(row[name]).tolist() for name in ROW_COLUMNS if name in row} for row in rows]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


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
    return map(stack_rows, in_batches(rows, batch_size))


def in_batches(rows: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
    """The rows, `batch_size` at a time."""
    iterator = iter(rows)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def iterate_table(data: Dataset | IterableDataset, batch_size: int = 16) -> Iterator[dict]:
    """The rows of a data set that is the source of another one."""
    # Not `for row in data`: in a worker of a data loader a data set gives only the worker's share of its shards, and
    # this worker already has its share of the other one.
    for batch in data.iter(batch_size=batch_size):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _iterate_batches(documents: Dataset | IterableDataset) -> Iterator[dict[str, list]]:
    """The texts of documents, and which are conversations, some documents at a time."""
    for batch in documents.iter(batch_size=16):
        yield {name: batch[name] for name in ("text", "chat") if name in batch}


def _stack(rows: list[dict], name: str, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.asarray([row[name] for row in rows], dtype))


class _Tokenize:
    """
    Texts to tokens, with what the tokenizer puts around a text, long ones piece by piece; and conversations to tokens by its
    chat template, with what to learn from if `assistant_only`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool = False):
        self.tokenizer, self.version = tokenizer, PACKING_VERSION
        self.columns = ("input_ids", ANSWERS) if assistant_only else ("input_ids",)
        self._chats = ChatTokenizer(tokenizer, assistant_only)
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        places = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        start = places[0] if places else 0
        self.prefix, self.suffix = list(whole[:start]), list(whole[start + len(plain) :])
        eos = tokenizer.eos_token_id
        if eos is not None and self.suffix[-1:] != [eos]:
            self.suffix.append(eos)

    def __call__(self, text: list[str], chat: list[str] | None = None) -> dict[str, list]:
        """Columns of tokens, of a batch of documents: their texts, and where those that are conversations were read."""
        places = chat or [""] * len(text)
        found = self.documents(text, places)
        return {name: found[name] for name in self.columns} | {"is_chat": [bool(place) for place in places]}

    def documents(self, texts: list[str], places: list[str]) -> dict[str, list[np.ndarray]]:
        """The tokens of documents, and masks of those to learn from."""
        tokens, masks = [None] * len(texts), [None] * len(texts)
        chats = {number: json.loads(texts[number]) for number, place in enumerate(places) if place}
        completed = {number: chat for number, chat in chats.items() if isinstance(chat.get("prompt"), str)}
        plain = [number for number in range(len(texts)) if number not in chats]
        written = [texts[number] for number in plain]
        written += [chat["prompt"] + chat["completion"] for chat in completed.values()]
        for number, found in zip([*plain, *completed], self.whole(written), strict=True):
            tokens[number], masks[number] = found, np.ones(len(found), np.int8)
        prompts = self.whole([chat["prompt"] for chat in completed.values()], is_last=False)
        for number, prompt in zip(completed, prompts, strict=True):
            masks[number][: count_common(prompt, tokens[number])] = 0
        talks = {number: chat for number, chat in chats.items() if number not in completed}
        found = self._chats([*talks.values()], [places[number] for number in talks])
        for number, *values in zip(talks, *found, strict=True):
            tokens[number], masks[number] = values
        return {"input_ids": tokens, ANSWERS: masks}

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


def _iterate_rows(documents: IterableDataset, tokenize: _Tokenize, packer: Packer) -> Iterator[dict[str, np.ndarray]]:
    packer, dropped, taken = copy.deepcopy(packer), Dropped(packer.row_length, packer.row_start), 0
    for batch in _iterate_batches(documents):
        found = tokenize(**batch)
        dropped.add([*map(len, found["input_ids"])], found["is_chat"])
        rows = packer(*found.values())
        for index in range(len(rows["input_ids"])):
            taken += 1
            yield {name: values[index] for name, values in rows.items()}
    if not taken:
        raise _too_little(packer.row_length)
    dropped.log(taken)


def _too_little(row_length: int) -> ValueError:
    return ValueError(f"The text does not fill a row of {row_length} tokens: give more text or a shorter row.")
