"""Text to packed rows of tokens: files, folders, JSON lines, parquet and any `datasets` data set."""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)

from ..settings import STDLIB
from .rows import _iterate_column


__all__ = ["STDLIB", "load_documents", "split_documents"]

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""A line that is exactly this ends a document inside a plain text file."""

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, *PARQUET_SUFFIXES)

# `large_string`: together the documents may hold more than the 2 GiB that the offsets of `string` can address.
DOCUMENT_FEATURES = Features({"text": Value("large_string"), "name": Value("string")})


# Left out of `STDLIB`: tests (some systems ship Python without them), tables of data, and what a build generates.
_STDLIB_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}

# With the line break before it, which ends the line before the separator and is no part of the document.
_SEPARATOR_LINE = re.compile(rf"\n?^[ \t]*{re.escape(DOCUMENT_SEPARATOR)}[ \t]*(?:\n|\Z)", re.MULTILINE)

# The metadata block by which a README marks its folder as a data set repository.
_DATA_SET_CARD = re.compile(r"---\n(?:(?!---\n).*\n)*?(?:configs|dataset_info):")

_DATA_SETS = (Dataset, IterableDataset, DatasetDict, IterableDatasetDict)

# A file with its name in the data, or a table with a column of text.
_Source = tuple[Path, str] | Dataset | IterableDataset


def load_documents(
    data: str | Path | Dataset | IterableDataset | Iterable[str | Path | Dataset | IterableDataset],
    *,
    text_column: str = "text",
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    Load text as a data set of documents with the columns `text` and `name`.

    Args:
        data (`str`, `Path`, `Dataset`, `IterableDataset` or an iterable of these):
            `"stdlib"` (sources of the running Python's standard library), a text file, a JSON lines or parquet
            file, a folder with such files at any depth, a folder written by `save_to_disk`, a local copy of a data
            set repository, the name of a data set on the Hub, or a data set. In a plain text file a line
            `<|endoftext|>` separates documents; a file without one is one document. In all others a row is one.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text in JSON lines, parquet and `datasets` data sets.
        name (`str`, *optional*):
            Configuration of a data set repository, as in `datasets.load_dataset(path, name)`.
        split (`str`, *optional*, defaults to `"train"`):
            Split to take of a data set that has several.
        streaming (`bool`, *optional*, defaults to `False`):
            Return an `IterableDataset` that reads as it goes instead of holding all the text in memory. An
            `IterableDataset` in `data` is always streamed.

    Returns:
        `Dataset` or `IterableDataset`: documents that are not blank. `name` is the path, below the folder that was
        given, of a document that is a whole file; it is empty for one of many in a file or data set.

    Raises:
        `FileNotFoundError`: no such path, or no data set that can be loaded.
        `ValueError`: no text in it, no column `text_column`, no such split, or a file that cannot be read.
    """
    sources: list[_Source] = []
    for part in [data] if isinstance(data, (str, Path, *_DATA_SETS)) else data:
        found = _find_sources(part, name=name, split=split, streaming=streaming)
        if next(_iterate_documents(found, text_column), None) is None:
            raise ValueError(f"data {_describe(part)} holds no text: give files with text in them.")
        sources.extend(found)
    if not sources:
        raise ValueError("data is empty: give at least one file, folder or data set name.")
    if streaming or any(isinstance(source, IterableDataset) for source in sources):
        return IterableDataset.from_generator(
            _iterate_documents,
            features=DOCUMENT_FEATURES,
            gen_kwargs={"sources": sources, "text_column": text_column},
        )
    # Not `Dataset.from_list`, which is ten times slower on long texts.
    documents = list(_iterate_documents(sources, text_column))
    return Dataset(pa.Table.from_pylist(documents, schema=DOCUMENT_FEATURES.arrow_schema))


def split_documents(
    documents: Dataset | IterableDataset, held_out_fraction: float = 0.05
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """
    Split documents into training and held-out ones, whole documents only.

    A document is held out if a hash of its name (of its text where it has no name) falls under the fraction: the
    same document is on the same side in every run, in any order, and when more documents are added. Where this
    would leave one side empty, the document nearest to the fraction changes sides, unless the data is streamed.

    Args:
        documents (`Dataset` or `IterableDataset`):
            As returned by [`load_documents`].
        held_out_fraction (`float`, *optional*, defaults to 0.05):
            Expected fraction of documents to hold out, in (0, 1).

    Returns:
        `tuple`: training documents and held-out documents.

    Raises:
        `ValueError`: the fraction is out of range, or there is only one document.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}; it must be between 0 and 1, both excluded.")
    if isinstance(documents, IterableDataset):
        return (
            documents.filter(_is_on_side, fn_kwargs={"threshold": held_out_fraction, "held_out": False}),
            documents.filter(_is_on_side, fn_kwargs={"threshold": held_out_fraction, "held_out": True}),
        )
    positions = [_split_position(document) for document in documents]
    distinct = sorted(set(positions))
    if len(distinct) < 2:
        raise ValueError(
            "The data is a single document, of which nothing can be held out: give several files, separate the "
            f"documents of a text file by lines {DOCUMENT_SEPARATOR!r}, or give held-out text of its own."
        )
    # Few documents may all fall on one side: keep at least one on each.
    threshold = min(max(held_out_fraction, distinct[1]), distinct[-1])
    return (
        documents.select([index for index, position in enumerate(positions) if position >= threshold]),
        documents.select([index for index, position in enumerate(positions) if position < threshold]),
    )


def _split_position(document: dict) -> float:
    # Not the place in a file: it changes when documents are added before. Nor the blank around the text.
    key = document["name"] or document["text"].strip()
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _is_on_side(document: dict, threshold: float, held_out: bool) -> bool:
    return (_split_position(document) < threshold) == held_out


def _find_sources(data, *, name: str | None, split: str, streaming: bool) -> list[_Source]:
    if isinstance(data, (Dataset, IterableDataset)):
        return [data]
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        return [_pick_split(data, split)]
    if data == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return [(file, file.relative_to(root).as_posix()) for file in _stdlib_files(root)]
    path = Path(data)
    if path.is_file():
        if path.suffix.lower() not in KNOWN_SUFFIXES:
            raise ValueError(
                f"data file {str(data)!r} has the suffix {path.suffix!r}; known are {', '.join(KNOWN_SUFFIXES)}. "
                "Rename or convert it."
            )
        return [(path, path.name)]
    if path.is_dir():
        if _is_saved_data_set(path):
            return _find_sources(load_from_disk(str(path)), name=name, split=split, streaming=streaming)
        files = _files_below(path)
        if files and not _is_data_set_repository(path):
            return [(file, file.relative_to(path).as_posix()) for file in files]
    elif _looks_like_path(data):
        raise FileNotFoundError(f"data {str(data)!r}: no such file or folder (looked from {str(Path.cwd())!r}).")
    return [_load_named(str(data), name, split, streaming)]


def _load_named(data: str, name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return load_dataset(data, name, split=split, streaming=streaming)
    except Exception as error:  # datasets raises a different type for every way a name can fail to load
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"data {data!r} is neither a file or folder of text ({', '.join(KNOWN_SUFFIXES)}) nor a data set that "
            f"can be loaded ({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the "
            f"spelling, or give {STDLIB!r} for the Python standard library's sources."
        ) from error


def _pick_split(data: DatasetDict | IterableDatasetDict, split: str) -> Dataset | IterableDataset:
    if split not in data:
        raise ValueError(f"The data has no split {split!r}; its splits are {', '.join(data)}. Name one with split.")
    return data[split]


def _looks_like_path(data: str | Path) -> bool:
    """Whether `data` cannot be the name of a data set on the Hub, which is `name` or `owner/name`."""
    return (
        isinstance(data, Path)
        or data.startswith((".", "/", "~"))
        or data.endswith("/")
        or data.count("/") > 1
        or "\\" in data
        or Path(data).suffix.lower() in KNOWN_SUFFIXES
    )


def _is_saved_data_set(folder: Path) -> bool:
    """Whether `save_to_disk` wrote `folder`: a data set, or several splits."""
    is_single = (folder / "dataset_info.json").exists() and (folder / "state.json").exists()
    return is_single or (folder / "dataset_dict.json").exists()


def _is_data_set_repository(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and _DATA_SET_CARD.match(_read_text(card)) is not None


def _iterate_documents(sources: Iterable[_Source], text_column: str) -> Iterator[dict[str, str]]:
    for source in sources:
        name = ""
        if isinstance(source, (Dataset, IterableDataset)):
            texts = _table_texts(source, text_column)
        elif source[0].suffix.lower() in JSON_SUFFIXES:
            texts = _json_texts(source[0], text_column)
        elif source[0].suffix.lower() in PARQUET_SUFFIXES:
            texts = _parquet_texts(source[0], text_column)
        else:
            texts = _SEPARATOR_LINE.split(_read_text(source[0]))
            name = source[1] if len(texts) == 1 else ""
        for text in texts:
            if text.strip():
                yield {"text": text, "name": name}


def _table_texts(data: Dataset | IterableDataset, text_column: str) -> Iterator[str]:
    columns = data.column_names
    if columns is None:  # a streamed data set may not know its columns before its first row
        columns = list(next(data.iter(1), {text_column: []}))
    _check_column(columns, text_column, "The data set")
    for text in _iterate_column(data.select_columns([text_column]), text_column):
        yield _as_text(text, text_column, "the data set")


def _json_texts(file: Path, text_column: str) -> Iterator[str]:
    with file.open("rb") as lines:
        is_array = lines.read(1) == b"["
        lines.seek(0)
        for number, line in enumerate([lines.read()] if is_array else lines, start=1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except json.JSONDecodeError as error:
                place = f"{str(file)!r}, line {number + error.lineno - 1}"
                raise ValueError(f"{place}: not JSON ({error.msg}). Each line must be an object.") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{str(file)!r}, line {number}: not UTF-8. Convert the file.") from error
            for row in content if is_array else [content]:
                if not isinstance(row, dict):
                    raise ValueError(f"{str(file)!r}, line {number}: {type(row).__name__} where an object should be.")
                _check_column(row, text_column, f"{str(file)!r}, line {number},")
                yield _as_text(row[text_column], text_column, repr(str(file)))


def _parquet_texts(file: Path, text_column: str) -> Iterator[str]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(file)!r} is not a parquet file: {error}") from error
    with table:
        _check_column(table.schema_arrow.names, text_column, repr(str(file)))
        for batch in table.iter_batches(columns=[text_column]):
            for text in batch.column(0).to_pylist():
                yield _as_text(text, text_column, repr(str(file)))


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(file)!r} is not UTF-8 text (byte {error.start}): convert it or leave it out."
        ) from error


def _check_column(columns: Iterable[str], text_column: str, place: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{place} has no column {text_column!r}; its columns are {', '.join(columns) or 'none'}. Name the one "
            "that holds the text with text_column (--text-column)."
        )


def _as_text(value, text_column: str, place: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"Column {text_column!r} of {place} holds {type(value).__name__}, not text: name another.")
    return value or ""


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in KNOWN_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)
    )


def _stdlib_files(root: Path) -> list[Path]:
    return sorted(
        file
        for file in root.rglob("*.py")
        if not _STDLIB_SKIPPED_FOLDERS.intersection(file.relative_to(root).parts)
        and not file.name.startswith("_sysconfigdata")
        and not file.relative_to(root).parts[0].startswith("config-")
    )


def _describe(data) -> str:
    return repr(str(data)) if isinstance(data, (str, Path)) else f"set of type {type(data).__name__}"
